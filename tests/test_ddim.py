"""The sampling loop: timesteps, coefficients, an exactly solvable model, and diffusers' own pipeline."""

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

import hasty_sample as hs

SDXL = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def alpha_bar_float64():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


@pytest.mark.parametrize("spacing", hs.SPACINGS)
def test_timesteps_descend_without_repetition_for_every_step_count(spacing):
    for n in range(1, 1001):
        tau = hs.ddim_timesteps(n, spacing)
        assert len(tau) == n
        assert all(0 <= b < a <= 999 for a, b in itertools.pairwise(tau)) and 0 <= tau[0] <= 999


@pytest.mark.parametrize("spacing", hs.SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing):
    # linspace with one step is the exception: diffusers takes t = 0, where nothing is left to denoise.
    counts = [2, 4, 5, 10, 20, 25, 30, 35, 40, 50, 100, 125, 200, 250, 500]
    if spacing != "leading":
        counts += [3, 7, 60, 75, 333, 501, 600, 800, 997, 999]
    for n in counts:
        scheduler = DDIMScheduler(**SDXL, timestep_spacing=spacing)
        scheduler.set_timesteps(n)
        assert hs.ddim_timesteps(n, spacing) == scheduler.timesteps.tolist(), n


def test_leading_spacing_starts_near_the_top_for_large_step_counts():
    assert hs.ddim_timesteps(30, "leading")[0] == 958
    assert hs.ddim_timesteps(800, "leading")[0] == 999
    assert hs.ddim_timesteps(1000, "leading") == list(range(999, -1, -1))
    for n in range(10, 1001):
        tau = hs.ddim_timesteps(n, "leading")
        assert tau[0] > 999 - 2 * 1000 / n - 1, n


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", hs.SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 20, 30, 50, 333, 800, 1000])
def test_coefficients_keep_the_marginals(n, spacing, eta):
    """Whatever eta, a step from x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e with the true e must land on the forward process's
    marginal at t_prev (Song et al. 2021, equation 7 and its lemma): mean sqrt(a_p) x0 and variance 1 - a_p."""
    alpha_bar = alpha_bar_float64()
    tau = hs.ddim_timesteps(n, spacing)
    rows = hs.ddim_coefficients(torch.from_numpy(alpha_bar), tau, eta).numpy()
    for i, t in enumerate(tau):
        a_t, a_p = alpha_bar[t], alpha_bar[tau[i + 1]] if i + 1 < n else alpha_bar[0]
        a, b, sigma = rows[i]
        assert a * np.sqrt(a_t) == pytest.approx(np.sqrt(a_p), abs=1e-12)
        assert (a * np.sqrt(1 - a_t) + b) ** 2 + sigma**2 == pytest.approx(1 - a_p, abs=1e-12)
        assert sigma == pytest.approx(eta * np.sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p)), abs=1e-12)


def test_eta_one_is_ancestral_ddpm():
    """On all 1,000 timesteps eta = 1 is Ho et al. 2020: mean (x - beta / sqrt(1 - a_t) e) / sqrt(alpha), posterior
    variance beta_tilde."""
    alpha_bar = alpha_bar_float64()
    rows = hs.ddim_coefficients(torch.from_numpy(alpha_bar), list(range(999, 0, -1)), 1.0).numpy()[:-1]
    t = np.arange(999, 1, -1)
    alpha = alpha_bar[t] / alpha_bar[t - 1]
    beta_tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * (1 - alpha)
    np.testing.assert_allclose(rows[:, 0], alpha**-0.5, rtol=1e-10)
    np.testing.assert_allclose(rows[:, 1], -(1 - alpha) / np.sqrt(1 - alpha_bar[t]) / np.sqrt(alpha), rtol=1e-8)
    np.testing.assert_allclose(rows[:, 2] ** 2, beta_tilde, rtol=1e-10)


class GaussianUNet:
    """The perfect noise predictor for data that are N(mean, std^2) in every coordinate, in closed form:
    E[e | x_t] = sqrt(1 - a_t) (x_t - sqrt(a_t) mean) / (a_t std^2 + 1 - a_t)."""

    config = SimpleNamespace(in_channels=4)

    def __init__(self, mean, std):
        self.mean, self.std, self.alpha_bar = mean, std, torch.from_numpy(alpha_bar_float64())

    def __call__(self, x, t, **_):
        a = self.alpha_bar[t]
        e = (1 - a).sqrt() * (x.double() - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)
        return (e.to(x.dtype),)


def sample_gaussian(timesteps, eta, mean=3.0, std=0.5):
    return hs.ddim_sample(
        GaussianUNet(mean, std),
        torch.from_numpy(alpha_bar_float64()),
        timesteps,
        torch.zeros(1, 77, 8),
        torch.zeros(1, 8),
        [torch.Generator().manual_seed(0)],
        512,
        512,
        guidance_scale=1.0,
        eta=eta,
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", [50, 800, 1000])
def test_gaussian_data_come_out_with_their_mean_and_deviation(n, eta):
    """eta = 0 follows the probability flow, which for Gaussians keeps (x - mean) / deviation of the marginals: the start
    from N(0, 1), where the marginal at tau[0] has mean sqrt(a) m, leaves a known error. eta = 1 forgets the start."""
    mean, std = 3.0, 0.5
    alpha_bar = alpha_bar_float64()
    timesteps = hs.ddim_timesteps(n, "leading")
    x = sample_gaussian(timesteps, eta)
    assert x.shape == (1, 4, 64, 64)
    last, first = alpha_bar[0], alpha_bar[timesteps[0]]
    last_std, first_std = (np.sqrt(a * std**2 + 1 - a) for a in (last, first))
    expected = np.sqrt(last) * mean - (0 if eta else last_std * np.sqrt(first) * mean / first_std)
    assert x.mean().item() == pytest.approx(expected, rel=0.01)
    expected_std = last_std if eta else last_std / first_std
    assert x.std().item() == pytest.approx(expected_std, rel=0.1 if n == 50 else 0.02)


def test_800_steps_from_t_800_would_miss_the_mean():
    """Why leading spacing is changed for such counts: diffusers' own timesteps start at 800, from pure noise."""
    scheduler = DDIMScheduler(**SDXL, timestep_spacing="leading")
    scheduler.set_timesteps(800)
    assert scheduler.timesteps[0] == 800
    theirs, ours = (
        sample_gaussian(tau, 0.0).mean() for tau in (scheduler.timesteps.tolist(), hs.ddim_timesteps(800, "leading"))
    )
    assert abs(theirs - 3) > 2 * abs(ours - 3)


@pytest.fixture(scope="module")
def stock_pipe():
    unet = UNet2DConditionModel.from_pretrained(ROOT / hs.DEMO_DPO_UNET)
    pipe = StableDiffusionXLPipeline.from_pretrained(DEMO, unet=unet, add_watermarker=False).to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def our_latents(pipe, prompts, steps, eta, guidance, seeds, negative="", spacing="leading", size=(64, 64), interval=None):
    return hs.ddim_sample(
        pipe.unet,
        pipe.scheduler.alphas_cumprod,
        hs.ddim_timesteps(steps, spacing),
        *hs.encode_prompts(pipe, prompts, negative, guidance > 1),
        [torch.Generator().manual_seed(seed) for seed in seeds],
        *size,
        guidance,
        eta,
        pipe.vae_scale_factor,
        guidance_interval=interval,
    )


PROMPTS = ["a landscape with red hills under a white sky and a yellow sun", "abstract art of a blue star"]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [20, 30, 50])
def test_same_latents_as_the_stock_pipeline(stock_pipe, demo_pipe, steps, eta, guidance):
    theirs = stock_pipe(
        PROMPTS,
        num_inference_steps=steps,
        eta=eta,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (11, 12)],
        output_type="latent",
    ).images
    ours = our_latents(demo_pipe, PROMPTS, steps, eta, guidance, (11, 12))
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.abs().max() > 0.5


def test_same_latents_at_another_shape(stock_pipe, demo_pipe):
    """Height and width must not be taken for each other, in the latents nor in SDXL's size conditioning."""
    theirs = stock_pipe(
        PROMPTS[0],
        height=48,
        width=96,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    ours = our_latents(demo_pipe, PROMPTS[:1], 20, 0.0, 5.0, [5], size=(48, 96))
    assert ours.shape == (1, 4, 12, 24) and (ours - theirs).abs().max() < 1e-4


INTERVAL = (0.28, 5.42)


def test_the_steps_that_guide_by_hand():
    """SDXL's noise levels are 14.6 at t = 999 and 0.03 at t = 0 (Kynkäänniemi et al. 2024, section 3.1)."""
    alpha_bar = alpha_bar_float64()
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    assert sigma[999] == pytest.approx(14.61, abs=0.01) and sigma[0] == pytest.approx(0.03, abs=0.001)
    taken = hs.guided_steps(torch.from_numpy(alpha_bar), list(range(999, -1, -1)), INTERVAL)
    assert taken == [0.28 < x <= 5.42 for x in sigma[::-1]] and 0 < sum(taken) < 1000
    # The upper end belongs to the interval, the lower one does not.
    ends = hs.guided_steps(torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64), [2, 1, 0], (0.5, 2.0))
    assert ends == [True, True, False]
    assert all(hs.guided_steps(torch.from_numpy(alpha_bar), [999, 500, 0]))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_same_latents_with_a_guidance_interval(stock_pipe, demo_pipe, eta):
    """The stock pipeline with its guidance weight set step by step to w or to 1, which is no guidance, at full cost; ours
    leaves the unconditional half out there."""
    steps, rows = 20, []
    guides = hs.guided_steps(demo_pipe.scheduler.alphas_cumprod, hs.ddim_timesteps(steps, "leading"), INTERVAL)
    assert 5 < sum(guides) < 18 and not guides[0] and not guides[-1]

    def weight(i):
        stock_pipe._guidance_scale = 5.0 if guides[i] else 1 + 1e-12

    def on_step_end(pipe, i, t, given):
        if i + 1 < steps:
            weight(i + 1)
        return given

    theirs = stock_pipe.__class__.prepare_extra_step_kwargs

    def first(self, *arguments):
        weight(0)
        return theirs(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock_pipe.__class__, "prepare_extra_step_kwargs", first)
        expected = stock_pipe(
            PROMPTS,
            num_inference_steps=steps,
            eta=eta,
            guidance_scale=5.0,
            generator=[torch.Generator().manual_seed(seed) for seed in (11, 12)],
            output_type="latent",
            callback_on_step_end=on_step_end,
        ).images
    hook = demo_pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    ours = our_latents(demo_pipe, PROMPTS, steps, eta, 5.0, (11, 12), interval=INTERVAL)
    hook.remove()
    assert (ours - expected).abs().max() < 1e-4 and rows == [4 if x else 2 for x in guides]
    everywhere = our_latents(demo_pipe, PROMPTS, steps, eta, 5.0, (11, 12))
    assert (ours - everywhere).abs().max() > 0.01
    assert torch.equal(our_latents(demo_pipe, PROMPTS, steps, eta, 5.0, (11, 12), interval=(0.0, 100.0)), everywhere)
    nowhere = our_latents(demo_pipe, PROMPTS, steps, eta, 5.0, (11, 12), interval=(50.0, 100.0))
    assert torch.equal(nowhere, our_latents(demo_pipe, PROMPTS, steps, eta, 1.0, (11, 12)))


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_same_latents_with_a_negative_prompt_and_other_spacings(stock_pipe, demo_pipe, spacing, monkeypatch):
    config = stock_pipe.scheduler.config
    monkeypatch.setattr(stock_pipe, "scheduler", DDIMScheduler.from_config(config, timestep_spacing=spacing))
    theirs = stock_pipe(
        PROMPTS,
        negative_prompt=["green hills"] * 2,
        num_inference_steps=20 if spacing == "trailing" else 28,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="latent",
    ).images
    steps = 20 if spacing == "trailing" else 28
    ours = our_latents(demo_pipe, PROMPTS, steps, 0.0, 4.0, (3, 4), "green hills", spacing)
    # linspace has gaps that differ, where diffusers assumes equal ones; so only trailing must agree with it.
    if spacing == "trailing":
        assert (ours - theirs).abs().max() < 1e-4
    else:
        assert torch.isfinite(ours).all() and (ours - theirs).abs().max() > 1e-4


def test_an_image_does_not_depend_on_its_batch(demo_pipe):
    prompts = [PROMPTS[i % 2] for i in range(5)]
    together = our_latents(demo_pipe, prompts, 10, 0.7, 5.0, range(5))
    for i in range(5):
        alone = our_latents(demo_pipe, prompts[i : i + 1], 10, 0.7, 5.0, [i])
        assert (alone - together[i]).abs().max() < 1e-3


def test_the_cap_of_800_steps_is_reached_on_the_real_model(demo_pipe):
    latents = our_latents(demo_pipe, PROMPTS[:1], 800, 1.0, 1.0, [0])
    assert torch.isfinite(latents).all() and 0.2 < latents.std() < 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_gives_nearly_the_same_picture(demo_pipe, dtype):
    settings = hs.with_demo(hs.Settings())
    gpu = hs.load_pipeline(settings, torch.device("cuda"), hs.DTYPES[dtype])
    reference = hs.decode(demo_pipe.vae, our_latents(demo_pipe, PROMPTS, 30, 0.0, 5.0, (0, 1)))
    half = hs.decode(gpu.vae, our_latents(gpu, PROMPTS, 30, 0.0, 5.0, (0, 1))).cpu()
    assert (half - reference).abs().mean() < 0.05


def test_keys_and_values_of_the_prompt_are_computed_once(demo_pipe, monkeypatch):
    """Once for all steps, to the last bit what computing them each time gives; the UNet is as before afterwards, also after
    an error."""
    unet, calls = demo_pipe.unet, []
    layers = [m for m in unet.modules() if type(m).__name__ == "Attention" and m.is_cross_attention]
    before = [(m.to_k, m.to_v) for m in layers]
    hooks = [m.to_k.register_forward_hook(lambda *_: calls.append(1)) for m in layers]
    embeds = hs.encode_prompts(demo_pipe, ["a red circle", "a blue house"], "", True)

    def sample(on_step=lambda: None):
        calls.clear()
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        sizes = (generators, 64, 64, 5.0, 0.5, demo_pipe.vae_scale_factor, on_step)
        return hs.ddim_sample(unet, demo_pipe.scheduler.alphas_cumprod, [900, 600, 300, 100], *embeds, *sizes)

    once = sample()
    assert len(layers) > 1 and len(calls) == len(layers)
    with pytest.raises(ZeroDivisionError):
        sample(lambda: 1 / 0)
    assert [(m.to_k, m.to_v) for m in layers] == before
    monkeypatch.setattr(hs, "text_projected_once", lambda *_: contextlib.nullcontext())
    assert torch.equal(sample(), once) and len(calls) == 4 * len(layers)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("side", "calls"), [(16, [5]), (128, [1] * 5), (64, [4, 1])])
def test_decoding_takes_the_area_of_one_sdxl_image_at_a_time(side, calls):
    """More would need more memory than one image of 1024x1024 does."""
    seen = []

    def decode(z, return_dict):
        seen.append(len(z))
        return (z[:, :3] * 2,)

    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.5), dtype=torch.float32, decode=decode)
    latents = torch.randn(5, 4, side, side)
    assert torch.equal(hs.decode(vae, latents), latents[:, :3] * 4) and seen == calls


def test_decoded_images_outlive_the_next_ones():
    """A decoder compiled with CUDA graphs gives the same memory each time."""
    memory = torch.zeros(1, 3, 128, 128)

    def decode(z, return_dict):
        return (memory.copy_(z[:, :3]),)

    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), dtype=torch.float32, decode=decode)
    latents = torch.randn(3, 4, 128, 128)
    assert torch.equal(hs.decode(vae, latents), latents[:, :3])
