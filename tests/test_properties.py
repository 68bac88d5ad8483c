"""Properties of the loop and of the settings, whatever their values (hypothesis): finite latents, or the clear error."""

import math

import pytest
import torch
from helpers import PROMPTS, demo_settings, latents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hasty_sample
from dipo.cli import UserError
from dipo.timesteps import ddim_timesteps

RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=15, **RELAXED)
@given(
    steps=st.integers(1, 30),
    eta=st.floats(0, 1),
    spacing=st.sampled_from(("leading", "trailing", "linspace")),
    guidance=st.floats(-5, 40),
    seeds=st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=2),
    size=st.sampled_from([(64, 64), (32, 64), (96, 48)]),
)
def test_latents_are_finite(demo_pipe, steps, eta, spacing, guidance, seeds, size):
    tau = ddim_timesteps(steps, spacing)
    x = latents(demo_pipe, PROMPTS[: len(seeds)], tau, eta, guidance, seeds, size)
    assert x.shape == (len(seeds), 4, size[0] // 4, size[1] // 4) and x.dtype == torch.float32
    assert torch.isfinite(x).all()


def valid(s: hasty_sample.Settings) -> bool:
    return (
        1 <= s.num_inference_steps <= 1000
        and 0 <= s.eta <= 1
        and math.isfinite(s.guidance_scale)
        and (s.limit is None or s.limit >= 1)
        and min(s.images_per_prompt, s.batch_size) >= 1
        and 0 <= s.seed < 2**62
    )


@settings(max_examples=300, **RELAXED)
@given(
    num_inference_steps=st.integers(-2, 1003) | st.integers(),
    eta=st.floats(-0.5, 1.5) | st.floats(),
    guidance_scale=st.floats(),
    limit=st.none() | st.integers(-2, 5),
    images_per_prompt=st.integers(-1, 4),
    batch_size=st.integers(-1, 4),
    seed=st.integers(-1, 5) | st.sampled_from([2**62 - 1, 2**62]) | st.integers(),
)
def test_any_settings_are_valid_or_the_clear_error(**values):
    s = demo_settings(**values)
    if valid(s):
        hasty_sample.check_settings(s)
    else:
        with pytest.raises(UserError, match=r"^--[a-z-]+ .*: use "):
            hasty_sample.check_settings(s)
