"""Models as people have them: single files, models that predict v, SD 1.5 and 2.1, pickles, shards, the hub's cache. Latents are
those of diffusers' own pipelines."""

import json
import shutil

import pytest
import torch
from conftest import DEMO, ROOT
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers import PROMPTS, SAMPLERS, demo_settings, latents, load, script
from original import original_vae, save_original, small_pipeline
from safetensors.torch import load_file, save_file

from dipo.cli import UserError
from dipo.models import fitted, image_size
from dipo.timesteps import ddim_timesteps

KINDS = {
    "SD 1.5": ("sd15", {}),
    "SD 2.1 base": ("sd21", {}),
    "SD 2.1": ("sd21", {"prediction_type": "v_prediction"}),
    "SDXL, v": ("sdxl", {"prediction_type": "v_prediction"}),
    "SDXL, v, zero SNR": (
        "sdxl",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of KINDS."""
    found = {}
    for kind, (family, scheduler) in KINDS.items():
        found[kind] = tmp_path_factory.mktemp("model")
        small_pipeline(family, **scheduler).save_pretrained(found[kind])
    return found


def settings(base, name="hasty_sample", **more):
    return script(name).Settings(base_model=str(base), dpo_unet="", **more)


def ours(base, steps=20, eta=0.0, w=5.0, name="hasty_sample", **more):
    """Latents of a script for a base model, its settings fitted to it as main has them."""
    s = fitted(settings(base, name, **({"vae": ""} | more)))
    pipe = script(name).load_pipeline(s, torch.device("cpu"), torch.float32)
    return latents(pipe, PROMPTS, ddim_timesteps(steps, s.timestep_spacing), eta, w, (5, 6), name=name)


def theirs(base, steps=20, eta=0.0, w=5.0):
    cls = {"StableDiffusionXLPipeline": StableDiffusionXLPipeline, "StableDiffusionPipeline": StableDiffusionPipeline}
    more = {"add_watermarker": False} if "XL" in json.loads((base / "model_index.json").read_text())["_class_name"] else {}
    pipe = cls[json.loads((base / "model_index.json").read_text())["_class_name"]].from_pretrained(base, **more)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"num_inference_steps": steps, "eta": eta, "guidance_scale": w, "output_type": "latent"}
    return pipe(PROMPTS, generator=generators, height=64, width=64, **options).images


@pytest.mark.parametrize("w", [5.0, 1.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_stock_pipelines(folders, kind, eta, w):
    got = ours(folders[kind], 20, eta, w)
    if kind == "SDXL, v, zero SNR" and eta == 1:
        # The root of a rounding error below zero makes the stock pipeline's NaN here.
        assert got.isfinite().all()
        eta = 0.9
        got = ours(folders[kind], 20, eta, w)
    expected = theirs(folders[kind], 20, eta, w)
    # A random UNet's v can lead far away.
    assert expected.std() > 0.1 and (got - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_script_samples_them_alike(folders, name):
    for kind in ("SD 1.5", "SDXL, v, zero SNR"):
        first = ours(folders[kind], 5, 0.5)
        assert torch.equal(ours(folders[kind], 5, 0.5, name=name), first)


def test_a_last_timestep_of_noise_alone_is_where_sampling_starts(folders):
    s = fitted(settings(folders["SDXL, v, zero SNR"], vae=""))
    pipe = script("hasty_sample").load_pipeline(s, torch.device("cpu"), torch.float32)
    assert s.timestep_spacing == "trailing" and pipe.scheduler.alphas_cumprod[-1] == 0
    tau = ddim_timesteps(5, s.timestep_spacing)
    whole = latents(pipe, PROMPTS, tau, 0.0, 5.0)
    assert tau[0] == 999 and whole.isfinite().all()
    # An infinite noise level is inside an interval without an upper end, and in no other.
    assert torch.equal(latents(pipe, PROMPTS, tau, 0.0, 5.0, interval=(0.0, float("inf"))), whole)
    assert not torch.equal(latents(pipe, PROMPTS, tau, 0.0, 5.0, interval=(0.0, 100.0)), whole)


# ---------------------------------------------------------------------------------------------------------- single files


def test_the_demo_as_a_single_file_gives_the_latents_of_its_folder(tmp_path):
    """The configuration lies beside the file."""
    shutil.copytree(DEMO, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    pipe = load(dpo_lora="" if isinstance(demo_settings().dpo_lora, str) else ())
    base = StableDiffusionXLPipeline.from_pretrained(DEMO, torch_dtype=torch.float32, add_watermarker=False)
    save_original(base, tmp_path / "m/demo.safetensors")
    assert torch.equal(ours(tmp_path / "m/demo.safetensors"), ours(DEMO))
    # The tuned UNet and the VAE out of single files too, of the whole model and alone.
    base.unet = pipe.unet
    save_original(base, tmp_path / "tuned.safetensors")
    save_file(original_vae(pipe.vae), tmp_path / "vae.safetensors")
    parts = {"dpo_unet": str(tmp_path / "tuned.safetensors"), "vae": str(tmp_path / "vae.safetensors")}
    s = demo_settings()
    s = type(s)(**(vars(s) | parts))
    again = script("hasty_sample").load_pipeline(s, torch.device("cpu"), torch.float32)
    tau = ddim_timesteps(5, "leading")
    assert torch.equal(latents(again, PROMPTS, tau), latents(pipe, PROMPTS, tau))
    assert all(torch.equal(a, b) for a, b in zip(again.vae.parameters(), pipe.vae.parameters(), strict=True))
    # And a UNet in the layout of diffusers.
    s = type(s)(**(vars(s) | {"dpo_unet": str(ROOT / "assets/demo/dpo-unet/diffusion_pytorch_model.safetensors")}))
    assert torch.equal(latents(script("hasty_sample").load_pipeline(s, torch.device("cpu"), torch.float32), PROMPTS, tau), latents(pipe, PROMPTS, tau))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_of_each_kind(folders, kind, tmp_path, monkeypatch):
    """Without a configuration beside it: the kind is told by the tensors, what it predicts by those that are only a mark."""
    family, scheduler = KINDS[kind]
    path = tmp_path / "model.safetensors"
    marks = ["v_pred"] * (family == "sdxl" and "prediction_type" in scheduler) + ["ztsnr"] * ("timestep_spacing" in scheduler)
    save_original(small_pipeline(family, **scheduler), path, *marks)
    # A small model's configuration in the place of the real one's, under assets/configs.
    configs = tmp_path / "assets/configs"
    shutil.copytree(folders["SDXL, v" if family == "sdxl" else kind], configs / family)
    shutil.copytree(DEMO / "tokenizer", configs / "tokenizer")
    for part in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(configs / family / part, ignore_errors=True)
    if family == "sdxl":
        shutil.copy(ROOT / "assets/configs/sdxl/scheduler/scheduler_config.json", configs / "sdxl/scheduler")
    import dipo.models

    monkeypatch.setattr(dipo.models, "ROOT", tmp_path)
    kinds = {"sdxl": "xl_base", "sd15": "v1", "sd21": "v2"}
    monkeypatch.setattr(dipo.models, "infer_diffusers_model_type", lambda shapes: kinds[family])
    monkeypatch.setitem(dipo.models.CHECKPOINT_KEY_NAMES, kinds[family], "model.diffusion_model.out.0.weight")
    assert torch.equal(ours(path, 10), ours(folders[kind], 10))
