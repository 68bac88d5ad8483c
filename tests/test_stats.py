"""Statistics on known cases."""

import math

import numpy as np
import pandas as pd
import pytest

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
