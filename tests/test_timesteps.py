"""The subsequence of timesteps: diffusers' own where it starts near pure noise, and any settings."""

import itertools
import math

import numpy as np
import pytest
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st

from dipo.timesteps import align_your_steps, ddim_timesteps

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


@pytest.mark.parametrize("family", ["StableDiffusionXL", "StableDiffusion"])
def test_align_your_steps(family):
    """The ten published timesteps, and for other counts the log-linear interpolation of the published noise levels, which
    end at 0.029, as the authors' quick start has it."""
    scheduler, known = DDIMScheduler(**SDXL), AysSchedules[f"{family}Timesteps"]
    assert align_your_steps(10, scheduler, known) == known
    sigma = (1 / scheduler.alphas_cumprod.double().numpy() - 1) ** 0.5
    published = [*AysSchedules[f"{family}Sigmas"][:10], 0.029]
    for n in (*range(1, 10), 20, 30, 50):
        tau = align_your_steps(n, scheduler, known)
        wanted = np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, 11), np.log(published)))[:-1]
        assert len(tau) == n and tau[0] == 999 and all(a > b for a, b in itertools.pairwise(tau))
        # To the nearest timestep.
        near = [sigma[np.clip(np.add(tau, k), 0, 999)] for k in (-1, 1)]
        assert (near[0] <= wanted).all() and (wanted < 1.001 * near[1]).all(), n
