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


def describe(axes, title: str, x: str = "", y: str = "", grid: str = "both") -> None:
    """Title and labels of a panel, in sizes that stay readable in a README, and a grid along these axes."""
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(axis=grid, alpha=0.3, zorder=0)


def plot_text(text: str, most: int = 24) -> str:
    """Text for matplotlib, at most that long: no mathematics in it, and no character that its font lacks, which the PDF
    backend may fail at."""
    known = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans")).get_charmap()
    text = unicodedata.normalize("NFC", text if len(text) <= most else text[: most - 1] + "…")
    text = "".join(c if ord(c) in known and unicodedata.category(c)[0] not in "CM" else "□" for c in text)
    return text.replace("$", r"\$")


def plot_wins(table: pd.DataFrame, by: str, labels: list[str]) -> Figure:
    """Bars of both sides' win rates with their intervals, grouped by a column of the table, a panel for each score.

    table: rows of stats.wins with the columns score and by. labels name the two sides.
    """
    scores = list(dict.fromkeys(table["score"]))
    figure = Figure(figsize=(max(11, 2.2 * len(table) / len(scores)), 4.8), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores), sharey=True), scores, strict=True):
        rows = table[table["score"] == score]
        x = np.arange(len(rows))
        sides = ((-0.2, BLUE, "win_rate", "low", "high"), (0.2, ORANGE, "loss_rate", "loss_low", "loss_high"))
        for label, (shift, colour, *columns) in zip(labels, sides, strict=True):
            y, low, high = (100 * rows[c].to_numpy() for c in columns)
            bars = np.maximum([y - low, high - y], 0)
            axes.bar(x + shift, y, 0.38, yerr=bars, color=colour, capsize=4, label=label, zorder=2)
        axes.axhline(50, color="black", linewidth=0.8, linestyle="--", zorder=3)
        axes.set_xticks(x, [f"{plot_text(name)}\nn = {n}" for name, n in zip(rows[by], rows["n"], strict=True)])
        axes.set_ylim(0, 105)
        describe(axes, f"{score}: which picture scores higher", grid="y")
    figure.axes[0].set_ylabel("wins in % of pairs, 95 % interval", fontsize=12)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=11)
    return figure
