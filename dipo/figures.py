"""Plots that studies share."""

import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dipo.files import written_whole

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#999999"


def save_plot(figure: Figure, path: Path, demo: bool = False) -> Path:
    """Write a figure as PNG, and as PDF beside it; the demo's says so, wherever it is shown."""
    if demo:
        figure.suptitle("demo model and its own judges in place of PickScore and HPSv2, not SDXL", fontsize=12)
    for kind in ("pdf", "png"):
        with written_whole(path.with_suffix(f".{kind}")) as part:
            figure.savefig(part, dpi=150, format=kind)
    return path


def describe(axes, title: str, x: str = "", y: str = "") -> None:
    """Title and labels of a panel, in sizes that stay readable in a README, and a grid."""
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3, zorder=0)


def plot_text(text: str) -> str:
    """At most 24 letters for matplotlib, without mathematics and what its font lacks, at which the PDF may fail."""
    known = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans")).get_charmap()
    text = unicodedata.normalize("NFC", text if len(text) <= 24 else text[:23] + "…")
    text = "".join(c if ord(c) in known and unicodedata.category(c)[0] not in "CM" else "□" for c in text)
    return text.replace("$", r"\$")


def plot_wins(table: pd.DataFrame, by: str, title: str) -> Figure:
    """How often the first side's picture is preferred, a row for each value of the column by, a panel for each score: the
    share of pairs in which it scores higher, and the mean probability that the judge's own model gives it, with 95 %
    intervals. table: rows of stats.wins with the columns score, by and, where the paper has a figure in %, paper."""
    scores = list(dict.fromkeys(table["score"]))
    figure = Figure(figsize=(11, 1.9 + 0.62 * len(table) / len(scores)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(scores), sharey=True))
    kinds = (("win_rate", "low", "high", "scores higher, % of pairs", GREY, "s"),)
    kinds += (("probability", "probability_low", "probability_high", "mean probability of being preferred, %", BLUE, "o"),)
    for axes, score in zip(panels, scores, strict=True):
        rows = table[table["score"] == score].reset_index(drop=True)
        for shift, (name, low, high, label, colour, marker) in zip((-0.16, 0.16), kinds, strict=True):
            x = 100 * rows[name]
            bars = np.maximum([x - 100 * rows[low], 100 * rows[high] - x], 0)
            style = {"fmt": marker, "color": colour, "capsize": 4, "label": label, "zorder": 3}
            axes.errorbar(x, rows.index + shift, xerr=bars, **style)
        if (paper := pd.to_numeric(rows["paper"], errors="coerce")).notna().any():
            axes.plot(paper, rows.index - 0.16, "x", color=ORANGE, markersize=9, label="the paper's figure", zorder=4)
        axes.axvline(50, color="black", linewidth=0.8, linestyle="--")
        axes.set_yticks(rows.index, [f"{plot_text(str(v))}\nn = {n}" for v, n in zip(rows[by], rows["n"], strict=True)])
        axes.set(xlim=(-3, 103), ylim=(len(rows) - 0.5, -0.5))
        describe(axes, f"{title}, by {score}", "%")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=11)
    return figure
