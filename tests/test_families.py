"""Models as people have them: SD 1.5 and 2.1, models that predict v, single files, pickles, shards, the hub's cache. Their
latents are those of diffusers' own pipelines."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from conftest import DEMO, ROOT
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from helpers import PROMPTS, SAMPLERS, demo_settings, latents, load, script
from original import original_vae, save_original, small_pipeline
from safetensors.torch import load_file, save_file

from dipo.cli import UserError
from dipo.models import fitted, image_size, load_config, load_part
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
    pipe = load()
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
    assert torch.equal(
        latents(script("hasty_sample").load_pipeline(s, torch.device("cpu"), torch.float32), PROMPTS, tau),
        latents(pipe, PROMPTS, tau),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_of_each_kind(folders, kind, tmp_path, monkeypatch):
    """Without a configuration beside it: the kind is told by the tensors, what it predicts by those that are only a mark."""
    family, scheduler = KINDS[kind]
    path = tmp_path / "model.safetensors"
    marks = ["v_pred"] * (family == "sdxl" and "prediction_type" in scheduler) + ["ztsnr"] * (
        "timestep_spacing" in scheduler
    )
    save_original(small_pipeline(family, **scheduler), path, *marks)
    # A small model's configuration in the place of the real one's, under assets/configs.
    configs = tmp_path / "assets/configs"
    shutil.copytree(folders["SDXL, v" if family == "sdxl" else kind], configs / family)
    shutil.copytree(DEMO / "tokenizer", configs / "tokenizer")
    for part in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(configs / family / part, ignore_errors=True)
    if family == "sdxl":
        shutil.copy(ROOT / "assets/configs/sdxl/scheduler/scheduler_config.json", configs / "sdxl/scheduler")
    from dipo import single_file

    monkeypatch.setattr(single_file, "ROOT", tmp_path)
    kinds = {"sdxl": "xl_base", "sd15": "v1", "sd21": "v2"}
    monkeypatch.setattr(single_file, "infer_diffusers_model_type", lambda shapes: kinds[family])
    monkeypatch.setitem(single_file.CHECKPOINT_KEY_NAMES, kinds[family], "model.diffusion_model.out.0.weight")
    assert torch.equal(ours(path, 10), ours(folders[kind], 10))


@pytest.mark.parametrize("family", ["sdxl", "sd15", "sd21"])
def test_a_single_file_by_the_shipped_configuration(family, tmp_path):
    """Which says less than diffusers saves: its defaults count for the rest. The file holds only what tells its kind."""
    kind, tensors = {"sdxl": "xl_base", "sd15": "v1", "sd21": "v2"}[family], {}
    width = {"sdxl": 2048, "sd15": 768, "sd21": 1024}[family]
    for name, shape in {
        CHECKPOINT_KEY_NAMES[kind]: (320, width) if kind == "v2" else (1280,),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    }.items():
        tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    td = script("train_dipo")
    s = fitted(td.Settings(base_model=str(tmp_path / "model.safetensors"), vae=""))
    assert load_config(UNet2DConditionModel, "init-unet", "", s.base_model, "unet")["in_channels"] == 4
    side = 1024 if family == "sdxl" else 512 if family == "sd15" else 768
    assert image_size(script("hasty_sample").Settings(base_model=s.base_model, dpo_unet="", vae="")) == (side, side)


# --------------------------------------------------------------------------------------------------------------- training


def test_the_target_of_a_model_that_predicts_v_is_v(folders, train_on, monkeypatch):
    """sqrt(alpha_bar) e - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022), in float64 from what the noise is added to."""
    td, seen, loss = script("train_dipo"), {}, script("train_dipo").preference_loss

    class Spy(td.DDPMScheduler):
        def add_noise(self, latents, noise, t):
            seen["parts"] = [x.double() for x in (latents, noise, self.alphas_cumprod[t].view(-1, 1, 1, 1))]
            return super().add_noise(latents, noise, t)

    def watched(name, model_pred, reference_pred, target, *more):
        seen.setdefault("targets", []).append((seen["parts"], target))
        return loss(name, model_pred, reference_pred, target, *more)

    monkeypatch.setattr(td, "DDPMScheduler", Spy)
    monkeypatch.setattr(td, "preference_loss", watched)
    for kind in ("SDXL, v, zero SNR", "SD 2.1", "SD 1.5"):
        seen.pop("targets", None)
        vae = ("--vae", "") if "XL" in kind else ()
        code, _, err = train_on(folders[kind], "--max-train-steps", "1", "--output-dir", kind, *vae)
        assert code == 0, err
        for (x_0, e, alpha_bar), target in seen["targets"]:
            v = alpha_bar.sqrt() * e - (1 - alpha_bar).sqrt() * x_0
            assert (target - (e if kind == "SD 1.5" else v)).abs().max() < 1e-5
            assert (v - e).abs().max() > 0.1


@pytest.mark.parametrize("more", [(), ("--lora-rank", "4", "--cache-dir", "cache")], ids=["full", "LoRA, cached"])
def test_sd15_is_trained_resumed_and_sampled(folders, train_on, run, tmp_path, more):
    base = folders["SD 1.5"]
    code, _, err = train_on(base, "--output-dir", "whole", "--max-train-steps", "4", *more)
    assert code == 0, err
    for steps in (2, 4):
        code, _, err = train_on(base, "--output-dir", "parts", "--max-train-steps", steps, "--resume", *more)
        assert code == 0, err
    file = "pytorch_lora_weights.safetensors" if "--lora-rank" in more else "unet/diffusion_pytorch_model.safetensors"
    whole, parts = (load_file(tmp_path / x / file) for x in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    metrics = (tmp_path / "whole/metrics.csv").read_text().splitlines()
    assert float(metrics[1].split(",")[1]) == pytest.approx(0.6931, abs=1e-3) and len(metrics) == 5
    assert (tmp_path / "whole/validation/step-0000004.png").exists()
    flag = "--dpo-lora" if "--lora-rank" in more else "--dpo-unet"
    flags = ("--base-model", base, "--num-inference-steps", "5", "--limit", "1", "--output-dir", "out")
    assert run("hasty_sample", *flags, flag, "whole")[0] == 0
    assert run("hasty_sample", *flags, "--dpo-unet", "", "--output-dir", "base")[0] == 0
    trained, untrained = ((tmp_path / x / "00000.png").read_bytes() for x in ("out", "base"))
    assert trained != untrained


@pytest.fixture
def train_on(run, tmp_path):
    """train_on(base, "--flag", ...) runs train_dipo.py in this process on a base model and 16 small pairs."""
    import io

    import numpy as np
    import pandas as pd
    from PIL import Image

    def picture(seed):
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(out, format="PNG")
        return out.getvalue()

    rows = [
        {"jpg_0": picture(i), "jpg_1": picture(100 + i), "caption": PROMPTS[i % 2], "label_0": float(i % 2)}
        for i in range(16)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "validation.txt").write_text(PROMPTS[0])

    def call(base, *flags):
        common = ("--base-model", base, "--dataset", tmp_path / "train.parquet", "--optimizer", "adamw", "--device", "cpu")
        common += ("--validation-prompts", tmp_path / "validation.txt")
        common += ("--no-scale-lr", "--learning-rate", "1e-3", "--effective-batch-size", "4", "--train-batch-size", "2")
        common += ("--checkpoint-every", "2", "--validate-every", "4", "--save-dtype", "fp32", "--max-mse-ratio", "100")
        return run("train_dipo", *common, "--shuffle-buffer", "4", "--beta-dpo", "10", "--lr-warmup-steps", "0", *flags)

    return call


# ----------------------------------------------------------------------------------------------- pickles, shards, the cache


def unet_folder(path, **options):
    small_pipeline().unet.save_pretrained(path / "unet", **options)
    return path


@pytest.mark.parametrize("kind", ["pickle", "shards", "cached shards", "cached pickle"])
def test_a_unet_in_a_pickle_in_shards_and_in_the_hubs_cache(folders, tmp_path, monkeypatch, kind):
    """The cache is one that the hub's own client finds without a connection; diffusers asks for a sharded model's list."""
    pickle = "pickle" in kind
    folder = tmp_path / "models--owner--tuned/snapshots" / ("0" * 40) if "cached" in kind else tmp_path
    unet_folder(folder, **({"safe_serialization": False} if pickle else {"max_shard_size": "100KB"}))
    files = [p.name for p in (folder / "unet").iterdir()]
    assert ("diffusion_pytorch_model.bin" in files) if pickle else len(files) > 3
    if "cached" in kind:
        (folder.parents[1] / "refs").mkdir()
        (folder.parents[1] / "refs/main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    s = fitted(settings(folders["SD 1.5"]))
    s.dpo_unet = "owner/tuned" if "cached" in kind else str(folder)
    pipe = script("hasty_sample").load_pipeline(s, torch.device("cpu"), torch.float32)
    wanted = small_pipeline().unet.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in pipe.unet.state_dict().items())


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_a_pickle_that_holds_code_is_not_run(folders, tmp_path, run):
    unet_folder(tmp_path, safe_serialization=False)
    torch.save({"conv_in.weight": Evil()}, tmp_path / "unet/diffusion_pytorch_model.bin")
    flags = ("--base-model", folders["SD 1.5"], "--dpo-unet", tmp_path, "--num-inference-steps", "2")
    code, _, err = run("hasty_sample", *flags)
    assert code == 2 and err.splitlines()[-1].startswith(f"error: --dpo-unet {tmp_path}: cannot be loaded")
    assert not (tmp_path / "evil").exists()


def test_what_does_not_fit_is_said_before_a_model_is_loaded(folders, tmp_path, run):
    base = folders["SD 1.5"]
    other, refiner, inpainting = tmp_path / "flux", tmp_path / "zero", tmp_path / "inpainting"
    for folder in (other, refiner, inpainting):
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (other / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for path, more in ((refiner / "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),):
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    config = inpainting / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    save_file({"a.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    cross = {"conv_in.weight": torch.zeros(1), "attn2.to_k.weight": torch.zeros(8, 2048)}
    save_file(cross, tmp_path / "unet.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    for name in ("list", "words", "cut"):
        shutil.copytree(base, tmp_path / name)
    (tmp_path / "list/model_index.json").write_text("[]")
    shutil.rmtree(tmp_path / "words/tokenizer")
    (tmp_path / "cut/unet/diffusion_pytorch_model.safetensors").write_bytes(b"cut")

    def at(name):
        return tmp_path / f"{name}.safetensors"

    cases = [
        (("--base-model", base, "--dpo-unet", at("vae")), "(holds no UNet; it is a VAE; give it as --vae)"),
        (("--base-model", base, "--dpo-unet", at("lora")), "(holds no UNet; it is a LoRA; give it as --dpo-lora)"),
        (("--base-model", base, "--vae", at("unet")), "(holds no VAE; it is a UNet; give it as --dpo-unet)"),
        (("--base-model", base, "--dpo-unet", at("unet")), "made for text embeddings of 2048 numbers, but --base-model"),
        (("--base-model", at("lora")), "in the original layout; it is a LoRA; give it as --dpo-lora)"),
        (("--base-model", at("empty")), "cannot be loaded (empty.safetensors is empty; fetch it again)"),
        (("--base-model", at("lfs")), "(lfs.safetensors is a pointer of git LFS; fetch the file itself, with git lfs pull)"),
        (("--base-model", at("cut")), "(cut.safetensors is cut short or no .safetensors file; fetch it again)"),
        (("--base-model", tmp_path / "cut"), "(diffusion_pytorch_model.safetensors is cut short or no .safetensors file"),
        (("--base-model", tmp_path / "list"), "cannot be loaded (its configuration is no JSON object)"),
        (("--base-model", tmp_path / "words"), "has no vocabulary in tokenizer/; fetch the folder again"),
        (("--base-model", other), f"--base-model {other}: holds a FluxPipeline; use a base model of SDXL, SD 1.5 or SD 2.1"),
        (("--base-model", refiner), "predicts the noise where all is noise (rescale_betas_zero_snr)"),
        (("--base-model", inpainting), "its UNet takes 9 channels, the VAE has 4"),
        (("--base-model", base, "--dpo-unet", ROOT / "assets/demo/dpo-unet"), "take both from the same model family"),
        (("--base-model", tmp_path / "x.safetensors"), "no checkpoint of SDXL, SD 1.5 or SD 2 in the original layout"),
        (("--base-model", tmp_path / "cut.safetensors"), f"--base-model {tmp_path / 'cut.safetensors'}: cannot be loaded ("),
        (("--base-model", "owner/name/x.safetensors"), "the hub is out of reach"),
    ]
    for flags, message in cases:
        more = [x for flag in ("--dpo-unet", "--vae") if flag not in flags for x in (flag, "")]
        code, _, err = run("hasty_sample", *flags, *more)
        assert tmp_path not in flags or "--demo" not in err
        assert code == 2 and message in err and len(err.splitlines()) == 1, (flags, err)


def test_a_vae_of_another_family(folders, tmp_path, monkeypatch):
    """Told by the scale of its latents. Only the default is exchanged without a word, and not for one that fits."""
    base, sdxl = folders["SD 1.5"], ROOT / "assets/configs/sdxl/vae"
    cls = script("hasty_sample").Settings
    assert fitted(settings(base, vae=str(base / "vae"))).vae == str(base / "vae")
    with pytest.raises(
        UserError, match=r"scales latents by 0.13025, but .* by 0.18215; take both from the same model family"
    ):
        fitted(settings(base, vae=str(sdxl)))
    # Edited in at the top of Settings.
    monkeypatch.setattr(cls, "vae", str(base / "vae"))
    assert fitted(settings(base, vae=cls.vae)).vae == str(base / "vae")
    monkeypatch.setattr(cls, "vae", str(sdxl))
    assert fitted(settings(base, vae=cls.vae)).vae == ""
    # A file has the configuration beside it, and without one the base model's.
    (tmp_path / "vae").mkdir()
    file = shutil.copy(base / "vae/diffusion_pytorch_model.safetensors", tmp_path / "vae")
    assert load_part(AutoencoderKL, "vae", file, "vae", config_of=str(base))["scaling_factor"] == 0.18215
    config = json.loads((base / "vae/config.json").read_text()) | {"scaling_factor": 0.5}
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    assert load_part(AutoencoderKL, "vae", file, "vae", config_of=str(base))["scaling_factor"] == 0.5
    assert load_part(AutoencoderKL, "vae", file, "vae", torch.float32, str(base)).config.scaling_factor == 0.5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--base-model", "models/sdx"), "--base-model models/sdx: cannot be loaded ("),
        (("--base-model", "x/y/z"), "--base-model 'x/y/z': no such folder"),
        (("--base-model", "model.ckpt"), "--base-model model.ckpt: neither a .safetensors file nor a model folder"),
        (("--vae", "nowhere"), "--vae 'nowhere': no such folder"),
        (("--vae", "unet"), "--vae unet: holds UNet2DConditionModel, not the AutoencoderKL"),
        (("--vae", str(ROOT / "assets/configs/sdxl/vae")), "scales latents by 0.13025"),
        (("--init-unet", str(ROOT / "assets/configs/sdxl/unet")), "made for text embeddings of 2048 numbers"),
    ],
)
def test_training_says_what_does_not_fit_before_a_model_is_loaded(folders, train_on, monkeypatch, flags, said):
    monkeypatch.setattr(script("train_dipo"), "load_models", None)
    Path("model.ckpt").touch()
    Path("unet").symlink_to(folders["SD 1.5"] / "unet")
    code, _, err = train_on(folders["SD 1.5"], *flags)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and said in lines[0], err


# Of UNet, VAE and text encoders, as published.
PARAMETERS = {
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    "sd15": (859_520_964, 83_653_863, 123_060_480),
    "sd21": (865_910_724, 83_653_863, 340_387_840),
}


@pytest.mark.parametrize("family", PARAMETERS)
def test_the_shipped_configurations_are_the_published_models(family):
    folder, found = ROOT / "assets/configs" / family, []
    with torch.device("meta"):
        for part, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            found.append(cls.from_config(cls.load_config(folder, subfolder=part)))
        for part in sorted(folder.glob("text_encoder*")):
            config = transformers.CLIPTextConfig.from_pretrained(part)
            found.append(getattr(transformers, config.architectures[0])(config))
    assert tuple(sum(p.numel() for p in model.parameters()) for model in found) == PARAMETERS[family]


def test_the_shipped_vocabulary_is_clips():
    """open_clip's own tokenizer, where nothing is filled up."""
    ours = transformers.CLIPTokenizer.from_pretrained(ROOT / "assets/configs/tokenizer")
    texts = ["a photo of an astronaut riding a horse, 4k", "naïve café, 東京, $100 & more!", "it's 50 % off"]
    theirs = open_clip.get_tokenizer("ViT-H-14")(texts)
    for text, ids in zip(texts, theirs, strict=True):
        assert ours(text).input_ids == ids[: int(ids.argmax()) + 1].tolist()
