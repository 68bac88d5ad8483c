"""Statistics on known cases."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from dipo import stats


def test_win_rates_on_known_cases():
    r = stats.win_rate([3, 2, 1, 5], [1, 2, 3, 4])
    assert (r["n"], r["wins"], r["losses"], r["ties"]) == (4, 2, 1, 1) and r["win_rate"] == 0.5 and r["loss_rate"] == 0.25
    assert r["p"] == 1.0
    # Wilson's interval in closed form, 59 wins of 100; the two-sided binomial p of 60 and 40 is 0.0569 (R's binom.test).
    z, n, k = 1.959964, 100, 59
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    r = stats.win_rate([1] * 59 + [0] * 41, [0] * 59 + [1] * 41)
    assert (r["low"], r["high"]) == pytest.approx((centre - half, centre + half), abs=1e-5)
    assert stats.win_rate([1] * 60 + [0] * 40, [0] * 60 + [1] * 40)["p"] == pytest.approx(0.05689, abs=1e-4)
    every = stats.win_rate([1] * 20, [0] * 20)
    assert every["win_rate"] == every["high"] == 1 and every["low"] == pytest.approx(20 / (20 + 1.959964**2), abs=1e-5)
    assert every["p"] == pytest.approx(2 * 0.5**20)
    one, ties = stats.win_rate([1], [0]), stats.win_rate([1, 1], [1, 1])
    assert one["n"] == 1 and one["p"] == 1.0 and ties["ties"] == 2 and ties["p"] == 1.0 and ties["win_rate"] == 0


def test_mean_intervals():
    assert stats.mean_interval([2.5]) == (2.5, 2.5, 2.5) and stats.mean_interval([1, 1, 1]) == (1, 1, 1)
    x = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = stats.mean_interval(x)
    half = 1.96 * x.std(ddof=1) / 20
    assert mean == x.mean() and low == pytest.approx(mean - half, abs=0.03) and high == pytest.approx(mean + half, abs=0.03)
    assert stats.mean_interval(x) == (mean, low, high)


def images_of(**variants):
    """Images with a score, four of each variant, two prompts."""
    rows = [
        {"variant": v, "prompt": p, "seed": i, "hpsv2": x}
        for v, scores in variants.items()
        for i, (p, x) in enumerate(zip("ppqq", scores, strict=False))
    ]
    return pd.DataFrame(rows)


def test_means_count_prompts_not_images():
    images = images_of(a=[1.0, 3.0, 10.0, 12.0], b=[0.0, 2.0, 9.0, 11.0])
    a, b = stats.means(images, ["a", "b"], ["hpsv2"], "b").to_dict("records")
    assert (a["variant"], a["n"], a["hpsv2"], a["hpsv2_low"], a["hpsv2_high"]) == ("a", 2, 6.5, 2, 11)
    assert (a["hpsv2_difference"], a["hpsv2_difference_low"], a["hpsv2_difference_high"]) == (1, 1, 1)
    assert (b["hpsv2_difference"], b["hpsv2_difference_low"], b["hpsv2_difference_high"]) == (0, 0, 0)
    assert list(stats.means(images, ["a"], ["hpsv2"]).columns) == ["variant", "n", "hpsv2", "hpsv2_low", "hpsv2_high"]


def test_wins_are_over_the_pairs_that_both_have():
    a, b = [1.0, 3.0, 10.0, 12.0], [0.0, 2.0, 11.0]
    r = stats.wins(images_of(a=a, b=b), "a", "b", "hpsv2")
    assert (r["n"], r["wins"], r["losses"], r["ties"]) == (3, 2, 1, 0)
    # Two images of a prompt count as their mean: +1 for the first prompt, -1 for the second.
    assert (r["difference"], r["difference_low"], r["difference_high"]) == (0, -1, 1)
    none = stats.wins(images_of(a=a), "a", "b", "hpsv2")
    assert none["n"] == none["wins"] == 0 and math.isnan(none["win_rate"]) and math.isnan(none["difference"])


def test_both_sides_of_a_win_rate_have_their_interval():
    r, other = (
        stats.win_rate([1] * 59 + [0] * 41, [0] * 59 + [1] * 41),
        stats.win_rate([0] * 59 + [1] * 41, [1] * 59 + [0] * 41),
    )
    assert (r["loss_low"], r["loss_rate"], r["loss_high"]) == (other["low"], other["win_rate"], other["high"])


def scored(difference, sd, n=200, spread=2.0):
    """Two variants of n prompts: scores of the second have the standard deviation spread between prompts, those of the first
    differ from them by this much on average, with the standard deviation sd, all exactly."""
    rng = np.random.default_rng(0)
    base, gap = (scipy.stats.zscore(rng.normal(size=n), ddof=1) for _ in range(2))
    b = 20 + spread * base
    a = b + difference + sd * gap
    rows = [
        {"variant": v, "prompt": str(i), "seed": i, "hpsv2": x} for v, y in (("a", a), ("b", b)) for i, x in enumerate(y)
    ]
    return pd.DataFrame(rows)


def test_equivalence_on_known_cases():
    """Against the t-test written out: margin 0.2 = 0.1 of the 2.0 between prompts, standard error sd / sqrt(200)."""
    r = stats.equivalence(scored(0.05, 0.8), "a", "b", "hpsv2", 0.1)
    error = 0.8 / 200**0.5
    inside = max(scipy.stats.t.sf((0.05 + 0.2) / error, 199), scipy.stats.t.sf((0.2 - 0.05) / error, 199))
    assert (r["n"], r["difference"], r["margin"]) == (200, pytest.approx(0.05), pytest.approx(0.2))
    assert r["p_equal"] == pytest.approx(inside) and r["p_different"] == pytest.approx(
        2 * scipy.stats.t.sf(0.05 / error, 199)
    )
    # (z_0.95 + z_0.9)^2 (sd / margin)^2 is 137.0; the t distribution takes one or two more (G*Power: 139).
    assert r["n_needed"] == 139
    assert stats.equivalence(scored(0, 0.8), "a", "b", "hpsv2", 0.2)["n_needed"] == pytest.approx(139 / 4, abs=2)
    same = stats.equivalence(scored(0, 0), "a", "b", "hpsv2", 0.1)
    assert (same["p_equal"], same["p_different"]) == (0, 1)
    one = stats.equivalence(scored(0, 1)[lambda x: x["seed"] == 0], "a", "b", "hpsv2", 0.1)
    assert one["n"] == 1 and math.isnan(one["p_equal"])


def test_the_prompts_to_decide_give_the_power_that_they_promise():
    """Studies of n_needed prompts in which both variants are equally good: four in five find it at 5 %."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(1000):
        gap = rng.normal(0, 0.8, 139)
        t = [(gap.mean() + side * 0.2) / (gap.std(ddof=1) / 139**0.5) for side in (1, -1)]
        found += t[0] > scipy.stats.t.ppf(0.95, 138) and t[1] < scipy.stats.t.ppf(0.05, 138)
    assert found / 1000 == pytest.approx(0.8, abs=0.04)


def test_verdicts_of_a_table_are_corrected_by_holm():
    cases = {
        "equivalent": (0.0, 0.4),  # far inside the margin
        "worse": (-1.0, 0.8),
        "better": (1.0, 0.8),
        "not decided": (0.15, 2.0),
        "equivalent too": (0.1, 0.4),  # a difference, and one within the margin
    }
    rows = [{"case": k} | stats.equivalence(scored(*case), "a", "b", "hpsv2", 0.1) for k, case in cases.items()]
    table = stats.verdicts(pd.DataFrame(rows)).set_index("case")
    assert table["verdict"].tolist() == ["equivalent", "worse", "better", "not decided", "equivalent"]
    assert table.at["equivalent too", "p_different"] < 0.05
    # Holm by hand: the i-th smallest of m times (m - i), never falling, at most 1.
    p = np.array([[r["p_equal"], r["p_different"]] for r in rows])
    order = np.argsort(p, axis=None)
    by_hand = np.minimum(np.maximum.accumulate(np.sort(p, axis=None) * np.arange(10, 0, -1)), 1)
    assert table[["p_equal", "p_different"]].to_numpy().ravel()[order] == pytest.approx(by_hand)
    # One more test of the same p of 0.03 leaves it below 0.05 alone, and above among ten.
    alone = pd.DataFrame([{"difference": -1.0, "p_equal": 1.0, "p_different": 0.02}])
    many = pd.concat([alone, pd.DataFrame([{"difference": 0.0, "p_equal": 0.9, "p_different": 0.9}] * 4)])
    assert stats.verdicts(alone)["verdict"].tolist() == ["worse"]
    assert stats.verdicts(many)["verdict"].tolist() == ["not decided"] * 5
    unknown = pd.DataFrame([{"difference": math.nan, "p_equal": math.nan, "p_different": math.nan}])
    assert stats.verdicts(unknown)["verdict"].tolist() == ["not decided"]


def test_the_mean_probability_is_that_of_bradley_and_terry():
    images = images_of(a=[1.0, 3.0, 10.0, 12.0], b=[0.0, 3.0, 12.0, 11.0]).assign(logit=lambda x: 2 * x["hpsv2"])
    r = stats.wins(images, "a", "b", "hpsv2", "logit")
    # By prompts: the means of 1 / (1 + exp(-2)) and 1/2, and of 1 / (1 + exp(4)) and 1 / (1 + exp(-2)).
    each = [(0.880797 + 0.5) / 2, (0.0179862 + 0.880797) / 2]
    assert r["probability"] == pytest.approx(sum(each) / 2, abs=1e-6)
    assert (r["probability_low"], r["probability_high"]) == pytest.approx((each[1], each[0]), abs=1e-6)
    assert math.isnan(stats.wins(images, "a", "b", "hpsv2")["probability"])
