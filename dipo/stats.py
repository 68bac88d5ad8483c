"""Means, win rates and their intervals, paired by prompt and seed."""

import math

import numpy as np
import pandas as pd
import scipy.stats


def mean_interval(values) -> tuple[float, float, float]:
    """Mean of n values and its 95 % bootstrap interval (percentiles, 9,999 resamples, seeded); both ends are the mean where
    all values are equal or n is 1."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return (float(x.mean()),) * 3
    options = {"method": "percentile", "rng": np.random.default_rng(0), "batch": max(1, 10**7 // len(x))}
    low, high = scipy.stats.bootstrap((x,), np.mean, **options).confidence_interval
    return float(x.mean()), float(low), float(high)


def prompt_means(scores: pd.Series) -> tuple[int, float, float, float]:
    """n prompts, their mean score and its 95 % interval. scores: by prompt and seed, without what is missing; images of one
    prompt count as their mean."""
    each = scores.dropna().groupby(level="prompt", sort=False).mean()
    return (len(each), *mean_interval(each)) if len(each) else (0, math.nan, math.nan, math.nan)


def by_variant(images: pd.DataFrame, name: str) -> pd.DataFrame:
    """One score of images as a table: a row for each prompt and seed, a column for each variant.

    images: a row for each, with the columns variant, prompt, seed and the score.
    """
    return images.pivot_table(index=["prompt", "seed"], columns="variant", values=name, sort=False)


def means(images: pd.DataFrame, variants: list[str], names: list[str], baseline: str | None = None) -> pd.DataFrame:
    """A row for each variant: n prompts and, for each score, NAME, NAME_low, NAME_high, its mean over prompts and 95 %
    interval; with a baseline NAME_difference, _low, _high, the same of the paired difference from that variant."""
    rows = {v: {} for v in variants}
    for name in names:
        scores = by_variant(images, name)
        for v, row in rows.items():
            row["n"], row[name], row[f"{name}_low"], row[f"{name}_high"] = prompt_means(scores[v])
            if baseline is not None:
                _, *gap = prompt_means(scores[v] - scores[baseline])
                row |= dict(zip((f"{name}_difference{end}" for end in ("", "_low", "_high")), gap, strict=True))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant").reset_index()


def win_rate(a, b) -> dict[str, float]:
    """How often a exceeds b, for n pairs: n, wins, losses, ties; the shares of wins (win_rate, low, high) and of losses
    (loss_rate, loss_low, loss_high) among all n with their 95 % Wilson intervals; and the two-sided binomial p of wins
    against losses, ties left out. Shares and p are nan for no pairs."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    n, wins, losses = len(a), int((a > b).sum()), int((a < b).sum())
    result = {"n": n, "wins": wins, "losses": losses, "ties": n - wins - losses}
    if not n:
        return result | dict.fromkeys(("win_rate", "loss_rate", "low", "high", "loss_low", "loss_high", "p"), math.nan)
    won, lost = (scipy.stats.binomtest(k, n).proportion_ci(method="wilson") for k in (wins, losses))
    p = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    result |= {"win_rate": wins / n, "loss_rate": losses / n, "low": float(won.low), "high": float(won.high)}
    return result | {"loss_low": float(lost.low), "loss_high": float(lost.high), "p": float(p)}


def wins(images: pd.DataFrame, a: str, b: str, name: str) -> dict[str, float]:
    """win_rate of one variant's images over another's of the same prompt and seed, and the mean difference of their scores
    over prompts with its 95 % interval: difference, difference_low, difference_high."""
    scores = by_variant(images, name).reindex(columns=[a, b]).dropna()
    _, *gap = prompt_means(scores[a] - scores[b])
    ends = ("difference", "difference_low", "difference_high")
    return win_rate(scores[a], scores[b]) | dict(zip(ends, gap, strict=True))
