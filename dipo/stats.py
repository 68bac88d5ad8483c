"""Means, win rates and their intervals, paired by prompt and seed."""

import math

import numpy as np
import pandas as pd
import scipy.special
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired


def mean_interval(values) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval (percentiles, 9,999 resamples, seeded); of equal values or one, the mean thrice."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return (float(x.mean()),) * 3
    options = {"method": "percentile", "rng": np.random.default_rng(0), "batch": max(1, 10**7 // len(x))}
    low, high = scipy.stats.bootstrap((x,), np.mean, **options).confidence_interval
    return float(x.mean()), float(low), float(high)


def prompt_means(scores: pd.Series) -> tuple[int, float, float, float]:
    """n prompts, their mean score and its 95 % interval. scores: by prompt and seed; a prompt counts as its images' mean."""
    each = scores.dropna().groupby(level="prompt", sort=False).mean()
    return (len(each), *mean_interval(each)) if len(each) else (0, math.nan, math.nan, math.nan)


def by_variant(images: pd.DataFrame, name: str) -> pd.DataFrame:
    """One score of images (with the columns variant, prompt, seed and the score) by prompt and seed, a column a variant."""
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


def wins(images: pd.DataFrame, a: str, b: str, name: str, logit: str = "") -> dict[str, float]:
    """win_rate of one variant's images over another's of the same prompt and seed, and, each with its 95 % interval over
    prompts (_low, _high), the mean difference of their scores and the mean probability that the judge's own model gives a's
    image: the logistic function of the difference of the column logit; nan without one."""
    scores = by_variant(images, name).reindex(columns=[a, b]).dropna()
    _, *gap = prompt_means(scores[a] - scores[b])
    logits = by_variant(images, logit or name).reindex(columns=[a, b]).dropna()
    _, *chosen = prompt_means(scipy.special.expit(logits[a] - logits[b])) if logit else (0, *[math.nan] * 3)
    result = win_rate(scores[a], scores[b])
    for key, values in (("difference", gap), ("probability", chosen)):
        result |= dict(zip((key, f"{key}_low", f"{key}_high"), values, strict=True))
    return result


def equivalence(images: pd.DataFrame, a: str, b: str, name: str, margin: float) -> dict[str, float]:
    """Whether two variants' mean scores are as good as the same: two one-sided t-tests (Schuirmann 1987), paired by prompts.

    margin: how far the means may differ, in standard deviations of b's scores between prompts; it comes back in the score's
    own units. n: prompts. difference: of the means, a less b. p_equal: of the hypothesis that it lies outside the margin;
    p_different: that it is none (two-sided t-test). n_needed: the prompts with which two equal variants are found equivalent
    at 5 % in 80 % of all studies, one test taken alone. All nan for fewer than two prompts.
    """
    each = by_variant(images, name).reindex(columns=[a, b]).dropna().groupby(level="prompt", sort=False).mean()
    gap, margin = each[a] - each[b], margin * each[b].std()
    result = {"n": len(each), "difference": gap.mean(), "margin": margin}
    if not margin > 0:
        return result | dict.fromkeys(("p_equal", "p_different", "n_needed"), math.nan)
    if gap.std() == 0:
        return result | {"p_equal": float(abs(gap.mean()) >= margin), "p_different": float(gap.mean() == 0), "n_needed": 2}
    p_equal = ttost_paired(each[a], each[b], -margin, margin)[0]
    p_different = scipy.stats.ttest_rel(each[a], each[b]).pvalue
    # Each one-sided test has to succeed in 90 % of the studies; Guenther 1981's approximation for the paired t-test.
    at, power = scipy.stats.norm.ppf((0.95, 0.9))
    needed = ((at + power) * gap.std() / margin) ** 2 + at**2 / 2
    return result | {"p_equal": p_equal, "p_different": p_different, "n_needed": math.ceil(needed)}


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of equivalence with both p values as Holm (1979) corrects them for all tests of the table together, and a verdict
    (5 % for the whole table): equivalent (within the margin, whatever the difference), better, worse, or not decided."""
    p = table[["p_equal", "p_different"]].to_numpy(dtype=np.float64, copy=True)
    known = ~np.isnan(p)
    if known.any():
        p[known] = multipletests(p[known], method="holm")[1]
    equal, different = (p < 0.05).T
    kinds = [equal, different & (table["difference"] > 0), different]
    verdict = np.select(kinds, ["equivalent", "better", "worse"], "not decided")
    return table.assign(p_equal=p[:, 0], p_different=p[:, 1], verdict=verdict)
