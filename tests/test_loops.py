"""The sampling loop that every script has: diffusers' own pipeline on the same seeds, formulas in float64, an exactly
solvable model; and the five loops are one."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import DEMO
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from helpers import PROMPTS, SAMPLERS, Noise, bare_pipe, coefficients, latents, load, script, study_rows

import compare_quality
import hasty_sample
from dipo.batches import Batch
from dipo.devices import DTYPES
from dipo.files import find_path
from dipo.rows import scheduled
from dipo.settings import DEMO_PATHS
from dipo.timesteps import ddim_timesteps, subsequence, successive


def alpha_bar_float64():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


# -------------------------------------------------------------------------------------------------- against the pipeline


@pytest.fixture(scope="module")
def stock_pipe():
    unet = UNet2DConditionModel.from_pretrained(find_path(DEMO_PATHS["dpo_unet"]))
    pipe = StableDiffusionXLPipeline.from_pretrained(DEMO, unet=unet, add_watermarker=False).to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_latents(pipe, prompts, seeds, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, output_type="latent", **options).images


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [20, 30, 50])
def test_same_latents_as_the_stock_pipeline(stock_pipe, demo_pipe, steps, eta, guidance):
    theirs = stock_latents(stock_pipe, PROMPTS, (11, 12), num_inference_steps=steps, eta=eta, guidance_scale=guidance)
    ours = latents(demo_pipe, PROMPTS, ddim_timesteps(steps, "leading"), eta, guidance, (11, 12))
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.abs().max() > 0.5


@pytest.fixture(scope="module")
def several_cases(stock_pipe, demo_pipe):
    """Cases, with the latents of the stock pipeline and of hasty_sample.py's loop."""
    results = []
    for case in ((10, 0.0, 5.0, (48, 96)), (20, 0.5, 1.0, (64, 64)), (8, 1.0, 7.5, (32, 64))):
        steps, eta, guidance, (height, width) = case
        options = {"num_inference_steps": steps, "eta": eta, "guidance_scale": guidance}
        theirs = stock_latents(stock_pipe, PROMPTS, (5, 6), height=height, width=width, **options)
        ours = latents(demo_pipe, PROMPTS, ddim_timesteps(steps, "leading"), eta, guidance, (5, 6), (height, width))
        results.append((case, theirs, ours))
    return results


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_of_every_script_is_the_stock_pipelines_and_one_and_the_same(several_cases, name):
    """With each script's own loading; another shape, where height and width must not be taken for each other, neither in the
    latents nor in SDXL's size conditioning."""
    pipe = load(name)
    for case, theirs, first in several_cases:
        steps, eta, guidance, size = case
        ours = latents(pipe, PROMPTS, ddim_timesteps(steps, "leading"), eta, guidance, (5, 6), size, name)
        assert ours.shape == (2, 4, size[0] // 4, size[1] // 4) and ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 1e-4 and torch.equal(ours, first)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_same_latents_with_a_negative_prompt_and_other_spacings(stock_pipe, demo_pipe, spacing, monkeypatch):
    config = stock_pipe.scheduler.config
    monkeypatch.setattr(stock_pipe, "scheduler", DDIMScheduler.from_config(config, timestep_spacing=spacing))
    steps = 20 if spacing == "trailing" else 28
    options = {"negative_prompt": ["green hills"] * 2, "num_inference_steps": steps, "guidance_scale": 4.0}
    theirs = stock_latents(stock_pipe, PROMPTS, (3, 4), **options)
    tau = ddim_timesteps(steps, spacing)
    ours = latents(demo_pipe, PROMPTS, tau, 0.0, 4.0, (3, 4), negative_prompt="green hills")
    # linspace has gaps that differ, where diffusers assumes equal ones; so only trailing must agree with it.
    if spacing == "trailing":
        assert (ours - theirs).abs().max() < 1e-4
    else:
        assert torch.isfinite(ours).all() and (ours - theirs).abs().max() > 1e-4


FREE = {row.variant: row for row in study_rows("rows/training_free.yaml") if row.scheduler != "ddim"}


@pytest.mark.parametrize("name", FREE)
def test_rows_of_other_samplers_are_the_stock_pipelines(stock_pipe, demo_pipe, name, monkeypatch):
    """Latents of diffusers' own StableDiffusionXLPipeline with the same scheduler, prompts and seeds, which its noise is
    drawn from too."""
    row = FREE[name]
    scheduler = getattr(diffusers, row.scheduler).from_config(stock_pipe.scheduler.config, **row.options)
    monkeypatch.setattr(stock_pipe, "scheduler", scheduler)
    steps = {"timesteps": list(row.timesteps)} if row.timesteps else {"num_inference_steps": row.steps}
    calls = []
    hook = demo_pipe.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    for guidance in (5.0, 1.0):
        wanted = stock_latents(stock_pipe, PROMPTS, (3, 4), guidance_scale=guidance, **steps)
        ours = scheduled(row, demo_pipe.scheduler.config, "leading", row.steps)
        batch = Batch(demo_pipe, PROMPTS, [3, 4], 64, 64)
        got = compare_quality.sample_by(demo_pipe, batch, ours, row.eta, guidance)
        assert (got - wanted).abs().max() < 1e-4 * max(1, wanted.abs().max())
    hook.remove()
    assert calls == [4] * row.calls + [2] * row.calls
    by_ddim = latents(demo_pipe, PROMPTS, ddim_timesteps(20, "leading"), 0.0, guidance, (3, 4))
    assert (by_ddim - wanted).abs().max() > 1e-2


def test_rows_of_our_own_loop_are_the_stock_pipelines(stock_pipe, demo_pipe, monkeypatch):
    """Trailing against the DDIM scheduler of diffusers; given timesteps, which that one does not take, against Euler's, the
    same step in other variables, that ends at the noise level of t = 0 as SDXL's DDIM does."""
    trailing, ays = (r for r in study_rows("rows/training_free.yaml") if r.scheduler == "ddim")
    assert (trailing.timestep_spacing, ays.timesteps[:2]) == ("trailing", (999, 845))
    config = stock_pipe.scheduler.config
    cases = (
        (trailing, DDIMScheduler.from_config(config, timestep_spacing="trailing"), {"num_inference_steps": 20}),
        (ays, EulerDiscreteScheduler.from_config(config, final_sigmas_type="sigma_min"), {"timesteps": list(ays.timesteps)}),
    )
    for row, scheduler, steps in cases:
        monkeypatch.setattr(stock_pipe, "scheduler", scheduler)
        theirs = stock_latents(stock_pipe, PROMPTS, (3, 4), guidance_scale=5.0, **steps)
        tau = list(row.timesteps) or subsequence(demo_pipe, row.steps, row.timestep_spacing)
        ours = latents(demo_pipe, PROMPTS, tau, row.eta, 5.0, (3, 4))
        # Euler's variable is x / sqrt(alpha_bar).
        theirs = theirs * alpha_bar_float64()[0] ** 0.5 if row is ays else theirs
        assert (ours - theirs).abs().max() < 1e-4


INTERVAL = (0.28, 5.42)


def guided_steps(tau, interval):
    """Which timesteps are guided: SDXL's noise levels are 14.6 at t = 999 and 0.03 at t = 0 (Kynkäänniemi et al. 2024)."""
    sigma = np.sqrt(1 / alpha_bar_float64() - 1)
    assert sigma[999] == pytest.approx(14.61, abs=0.01) and sigma[0] == pytest.approx(0.03, abs=0.001)
    return [interval[0] < sigma[t] <= interval[1] for t in tau]


def test_the_ends_of_an_interval():
    """The upper end belongs to the interval, the lower one does not: sigma is 0.5, 1 and 2."""
    rows = []

    def unet(x, t):
        rows.append(len(x))
        return torch.zeros(len(x), 4, 8, 8, dtype=torch.float64)

    pipe = bare_pipe(unet, torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64))
    pipe.encode_prompt = lambda *_, **__: (torch.zeros(1, 77, 8, dtype=torch.float64),) * 2 + (torch.zeros(1, 8),) * 2
    hasty_sample.sample(pipe, Noise(0), [2, 1, 0], 0.0, 5.0, (0.5, 2.0))
    assert rows == [2, 2, 1]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_same_latents_with_a_guidance_interval(stock_pipe, demo_pipe, eta):
    """The stock pipeline with its guidance weight set step by step to w or to 1, which is no guidance, at full cost; ours
    leaves the unconditional half out there."""
    steps, rows, tau = 20, [], ddim_timesteps(20, "leading")
    guides = guided_steps(tau, INTERVAL)
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
        options = {"num_inference_steps": steps, "eta": eta, "guidance_scale": 5.0, "callback_on_step_end": on_step_end}
        expected = stock_latents(stock_pipe, PROMPTS, (11, 12), **options)

    def ours(w, **more):
        return latents(demo_pipe, PROMPTS, tau, eta, w, (11, 12), **more)

    hook = demo_pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    inside = ours(5.0, interval=INTERVAL)
    hook.remove()
    assert (inside - expected).abs().max() < 1e-4 and rows == [4 if x else 2 for x in guides]
    everywhere = ours(5.0)
    assert (inside - everywhere).abs().max() > 0.01
    assert torch.equal(ours(5.0, interval=(0.0, 100.0)), everywhere)
    assert torch.equal(ours(5.0, interval=(50.0, 100.0)), ours(1.0))


def test_an_image_does_not_depend_on_its_batch(demo_pipe):
    prompts, tau = [PROMPTS[i % 2] for i in range(5)], ddim_timesteps(10, "leading")
    together = latents(demo_pipe, prompts, tau, 0.7, 5.0, range(5))
    for i in range(5):
        alone = latents(demo_pipe, prompts[i : i + 1], tau, 0.7, 5.0, [i])
        assert (alone - together[i]).abs().max() < 1e-3


# ----------------------------------------------------------------------------------------------------- against formulas


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_steps_keep_the_marginals(eta, name):
    """Whatever eta, a step from x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e with the true e must land on the forward process's
    marginal at t_next (Song et al. 2021, equation 7 and its lemma): mean sqrt(a_n) x0 and variance 1 - a_n."""
    alpha_bar = alpha_bar_float64()
    for n, spacing in ((1, "leading"), (2, "linspace"), (20, "leading"), (333, "trailing"), (1000, "leading")):
        tau = ddim_timesteps(n, spacing)
        for i in {0, n // 2, n - 1}:
            a_t, a_next = alpha_bar[tau[i]], alpha_bar[tau[i + 1]] if i + 1 < n else alpha_bar[0]
            a, b, sigma = coefficients(a_t, a_next, eta, name)
            assert a * np.sqrt(a_t) == pytest.approx(np.sqrt(a_next), abs=1e-12)
            assert (a * np.sqrt(1 - a_t) + b) ** 2 + sigma**2 == pytest.approx(1 - a_next, abs=1e-12)
            variance = (1 - a_next) / (1 - a_t) * (1 - a_t / a_next)
            assert sigma == pytest.approx(eta * np.sqrt(variance), abs=1e-12)


def test_eta_one_is_ancestral_ddpm():
    """On all 1,000 timesteps eta = 1 is Ho et al. 2020: mean (x - beta / sqrt(1 - a_t) e) / sqrt(alpha), posterior
    variance beta_tilde."""
    alpha_bar = alpha_bar_float64()
    for t in (999, 998, 700, 300, 20, 2):
        alpha = alpha_bar[t] / alpha_bar[t - 1]
        a, b, sigma = coefficients(alpha_bar[t], alpha_bar[t - 1], 1.0)
        assert a == pytest.approx(alpha**-0.5, rel=1e-10)
        assert b == pytest.approx(-(1 - alpha) / np.sqrt(1 - alpha_bar[t]) / np.sqrt(alpha), rel=1e-8)
        assert sigma**2 == pytest.approx((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * (1 - alpha), rel=1e-10)


def test_each_step_goes_to_the_next_timestep_and_the_last_to_the_first_of_training(demo_pipe):
    """Real successive pairs, where the gaps differ too."""
    alpha_bar, tau = alpha_bar_float64(), ddim_timesteps(7, "linspace")
    steps = successive(demo_pipe.scheduler, tau, torch.device("cpu"))
    assert [int(t) for t, _, _ in steps] == tau and tau[-1] == 0
    np.testing.assert_allclose([a for _, a, _ in steps], alpha_bar[tau], rtol=1e-4)
    np.testing.assert_allclose([a for _, _, a in steps], alpha_bar[[*tau[1:], 0]], rtol=1e-4)


def sample_gaussian(timesteps, eta, mean=3.0, std=0.5):
    """The loop with the perfect noise predictor for data that are N(mean, std^2) in every coordinate, in closed form:
    E[e | x_t] = sqrt(1 - a_t) (x_t - sqrt(a_t) mean) / (a_t std^2 + 1 - a_t)."""
    alpha_bar, generator = torch.from_numpy(alpha_bar_float64()), torch.Generator().manual_seed(0)

    def unet(x, t):
        a = alpha_bar[t]
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    batch = Noise()
    batch.noise = lambda: torch.randn(1, 4, 64, 64, generator=generator, dtype=torch.float64)
    return hasty_sample.sample(bare_pipe(unet, alpha_bar), batch, timesteps, eta, 1.0)


def gaussian_outcome(timesteps, eta, mean=3.0, std=0.5):
    """Mean and deviation that the same steps come to, exactly, as every one of them is linear in x."""
    alpha_bar = alpha_bar_float64()
    m, variance = 0.0, 1.0
    for t, a_next in zip(timesteps, [*alpha_bar[timesteps[1:]], alpha_bar[0]], strict=True):
        a = alpha_bar[t]
        slope = np.sqrt(1 - a) / (a * std**2 + 1 - a)
        sigma2 = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        by_e = np.sqrt(1 - a_next - sigma2) - np.sqrt(a_next / a) * np.sqrt(1 - a)
        factor = np.sqrt(a_next / a) + by_e * slope
        m, variance = factor * m - by_e * slope * np.sqrt(a) * mean, factor**2 * variance + sigma2
    return m, np.sqrt(variance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [10, 50, 800, 1000])
def test_gaussian_data_come_out_as_the_same_steps_do_exactly(n, eta):
    timesteps = ddim_timesteps(n, "leading")
    x, (mean, std) = sample_gaussian(timesteps, eta), gaussian_outcome(timesteps, eta)
    assert x.shape == (1, 4, 64, 64)
    # Of 16,384 draws: four standard errors.
    assert abs(x.mean().item() - mean) < 4 * std / 128 and x.std().item() == pytest.approx(std, rel=4 / 181)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", [800, 1000])
def test_gaussian_data_come_out_with_their_mean_and_deviation(n, eta):
    """eta = 0 follows the probability flow, which for Gaussians keeps (x - mean) / deviation of the marginals: the start
    from N(0, 1), where the marginal at tau[0] has mean sqrt(a) m, leaves a known error. eta = 1 forgets the start."""
    mean, std = 3.0, 0.5
    alpha_bar = alpha_bar_float64()
    timesteps = ddim_timesteps(n, "leading")
    last, first = alpha_bar[0], alpha_bar[timesteps[0]]
    last_std, first_std = (np.sqrt(a * std**2 + 1 - a) for a in (last, first))
    expected = np.sqrt(last) * mean - (0 if eta else last_std * np.sqrt(first) * mean / first_std)
    got, got_std = gaussian_outcome(timesteps, eta)
    assert got == pytest.approx(expected, rel=0.01)
    assert got_std == pytest.approx(last_std if eta else last_std / first_std, rel=0.02)


def test_800_steps_from_t_800_would_miss_the_mean():
    """Why leading spacing is changed for such counts: diffusers' own timesteps start at 800, from pure noise."""
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(800)
    assert scheduler.timesteps[0] == 800
    theirs, ours = (
        sample_gaussian(tau, 0.0).mean() for tau in (scheduler.timesteps.tolist(), ddim_timesteps(800, "leading"))
    )
    assert abs(theirs - 3) > 2 * abs(ours - 3)


def test_the_cap_of_800_steps_is_reached_on_the_real_model(demo_pipe):
    x = latents(demo_pipe, PROMPTS[:1], ddim_timesteps(800, "leading"), 1.0, 1.0, [0], (32, 32))
    assert torch.isfinite(x).all() and 0.2 < x.std() < 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_gives_nearly_the_same_picture(demo_pipe, dtype):
    from helpers import demo_settings

    from dipo.models import decode

    gpu = script("hasty_sample").load_pipeline(demo_settings(), torch.device("cuda"), DTYPES[dtype])
    tau = ddim_timesteps(30, "leading")
    a, b = (decode(pipe.vae, latents(pipe, PROMPTS, tau)).cpu() for pipe in (demo_pipe, gpu))
    assert torch.isfinite(b).all() and (a - b).abs().mean() < 0.1
