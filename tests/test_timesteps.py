"""The subsequence of timesteps: diffusers' own where it starts near pure noise, and any settings."""

import itertools
import math

import pytest
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from dipo.timesteps import ddim_timesteps

SPACINGS = ("leading", "trailing", "linspace")
SDXL = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_descend_without_repetition_for_every_step_count(spacing):
    for n in range(1, 1001):
        tau = ddim_timesteps(n, spacing)
        assert len(tau) == n
        assert all(0 <= b < a <= 999 for a, b in itertools.pairwise(tau)) and 0 <= tau[0] <= 999


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing):
    # linspace with one step is the exception: diffusers takes t = 0, where nothing is left to denoise.
    counts = [2, 4, 5, 10, 20, 25, 30, 35, 40, 50, 100, 125, 200, 250, 500]
    if spacing != "leading":
        counts += [3, 7, 60, 75, 333, 501, 600, 800, 997, 999]
    for n in counts:
        scheduler = DDIMScheduler(**SDXL, timestep_spacing=spacing)
        scheduler.set_timesteps(n)
        assert ddim_timesteps(n, spacing) == scheduler.timesteps.tolist(), n


def test_leading_spacing_starts_near_the_top_for_large_step_counts():
    assert ddim_timesteps(30, "leading")[0] == 958
    assert ddim_timesteps(800, "leading")[0] == 999
    assert ddim_timesteps(1000, "leading") == list(range(999, -1, -1))
    for n in range(10, 1001):
        tau = ddim_timesteps(n, "leading")
        assert tau[0] > 999 - 2 * 1000 / n - 1, n


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(steps=st.integers(1, 1000), spacing=st.sampled_from(SPACINGS), offset=st.integers(0, 1))
def test_timesteps_of_any_steps(steps, spacing, offset):
    """As many as asked for, falling, inside the training range, from near pure noise: two strides below the last training
    timestep at the most."""
    tau = ddim_timesteps(steps, spacing, 1000, offset)
    assert len(tau) == steps and all(a > b for a, b in itertools.pairwise(tau)) and 0 <= tau[-1] <= tau[0] <= 999
    assert tau[0] >= 999 - 2 * math.ceil(1000 / steps)
