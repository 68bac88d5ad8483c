"""Properties of hasty_sample.py's loop over its settings (hypothesis): finite latents, or the clear error."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hasty_sample as hs

PROMPTS = ["a landscape with green hills under a red sky and a purple sun", "abstract art of a blue star, white centre"]
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}
spacings = st.sampled_from(hs.SPACINGS)


@settings(max_examples=15, **RELAXED)
@given(
    steps=st.integers(1, 30),
    eta=st.floats(0, 1),
    spacing=spacings,
    guidance=st.floats(-5, 40),
    seeds=st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=2),
    size=st.sampled_from([(64, 64), (32, 64), (96, 48)]),
)
def test_latents_are_finite(demo_pipe, steps, eta, spacing, guidance, seeds, size):
    config = demo_pipe.scheduler.config
    timesteps = hs.ddim_timesteps(steps, spacing, config.num_train_timesteps, config.steps_offset)
    embeds = hs.encode_prompts(demo_pipe, PROMPTS[: len(seeds)], "", guidance > 1)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    latents = hs.ddim_sample(
        demo_pipe.unet, demo_pipe.scheduler.alphas_cumprod, timesteps, *embeds, generators, *size, guidance, eta, 4
    )
    assert latents.shape == (len(seeds), 4, size[0] // 4, size[1] // 4) and latents.dtype == torch.float32
    assert torch.isfinite(latents).all()


@settings(max_examples=300, **RELAXED)
@given(steps=st.integers(1, 1000), eta=st.floats(0, 1), spacing=spacings, offset=st.integers(0, 1))
def test_timesteps_and_coefficients_of_any_steps(steps, eta, spacing, offset):
    """As many timesteps as asked for, falling, inside the training range; coefficients that keep the noise's variance."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    tau = hs.ddim_timesteps(steps, spacing, 1000, offset)
    assert len(tau) == steps and all(a > b for a, b in itertools.pairwise(tau)) and 0 <= tau[-1] <= tau[0] <= 999
    # They start near pure noise: two strides below the last training timestep at the most.
    assert tau[0] >= 999 - 2 * math.ceil(1000 / steps)
    rows = hs.ddim_coefficients(alphas_cumprod, tau, eta)
    assert torch.isfinite(rows).all() and (rows[:, 2] >= 0).all()
    # x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) e becomes the same with alpha_bar of the next timestep.
    a_t, a_prev = alphas_cumprod[tau], torch.cat([alphas_cumprod[tau][1:], alphas_cumprod[:1]])
    a, b, sigma = rows.T
    torch.testing.assert_close(a * a_t.sqrt(), a_prev.sqrt())
    torch.testing.assert_close((a * (1 - a_t).sqrt() + b) ** 2 + sigma**2, 1 - a_prev)


def valid(s: hs.Settings) -> bool:
    return (
        1 <= s.num_inference_steps <= 1000
        and 0 <= s.eta <= 1
        and math.isfinite(s.guidance_scale)
        and s.timestep_spacing in hs.SPACINGS
        and (s.limit is None or s.limit >= 1)
        and min(s.images_per_prompt, s.batch_size) >= 1
        and 0 <= s.seed < 2**62
    )


@settings(max_examples=300, **RELAXED)
@given(
    num_inference_steps=st.integers(-2, 1003) | st.integers(),
    eta=st.floats(-0.5, 1.5) | st.floats(),
    guidance_scale=st.floats(),
    timestep_spacing=spacings | st.text(max_size=5),
    limit=st.none() | st.integers(-2, 5),
    images_per_prompt=st.integers(-1, 4),
    batch_size=st.integers(-1, 4),
    seed=st.integers(-1, 5) | st.sampled_from([2**62 - 1, 2**62]) | st.integers(),
)
def test_any_settings_are_valid_or_the_clear_error(**values):
    s = hs.with_demo(hs.Settings(**values))
    if valid(s):
        hs.check_settings(s)
    else:
        with pytest.raises(hs.UserError, match=r"^--[a-z-]+ .*: use "):
            hs.check_settings(s)
