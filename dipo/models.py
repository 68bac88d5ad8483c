"""Models from a folder, a file or the hub; what their UNet is told of a prompt; pictures from latents."""

import glob
import inspect
import re
import warnings
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import diffusers
import huggingface_hub
import torch
import transformers
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import errors
from huggingface_hub.constants import HF_HUB_OFFLINE

from dipo import single_file
from dipo.cli import UserError, first_line, warn
from dipo.files import ADAPTER_CONFIG, find_path, fingerprint, lora_names

# The pipelines that are sampled and trained, with what is left out of them: SDXL; SD 1.5, 2.0 and 2.1.
PIPELINES = {"StableDiffusionXLPipeline": {"add_watermarker": False}}
PIPELINES["StableDiffusionPipeline"] = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}


def load_part(cls, flag: str, name: str, subfolder: str, dtype: torch.dtype | None = None, config_of: str = "", **more):
    """A pipeline of diffusers (subfolder "") or one model of it, from a folder, a .safetensors file or the hub.

    cls: the class, loaded with more; its configuration alone without a dtype. Of files in full and half precision (variant
    fp16) those that fit dtype are preferred; pickles are read as weights only. config_of: the base model whose configuration
    a file has that holds a part alone. Raises UserError when nothing usable is found.
    """
    options = PIPELINES.get(cls.__name__, {}) | more
    try:
        path = local_path(name)
        if path and path.is_file():
            base = config_of and (local_path(config_of) or config_of)
            return single_file.load(cls, path, subfolder, dtype, base, **options)
        loaded = load_folder(cls, path, name, subfolder, dtype, **options)
        if not dtype and not isinstance(loaded, dict):
            raise ValueError("its configuration is no JSON object")
        return loaded
    except Exception as e:
        advice = "" if find_path(name) else "; use download_models.py, or try --demo"
        raise UserError(f"--{flag} {name}: cannot be loaded ({reason(e)}){advice}") from e


def local_path(name: str) -> Path | None:
    """Where a model lies on this machine: its folder or file, a single file of a repository (owner/name/file.safetensors)
    once it is fetched, and with HF_HUB_OFFLINE what the hub's cache has of a repository. None for one on the hub."""
    path = find_path(name)
    if path is None and (found := re.fullmatch(r"([^/]+/[^/]+)/(.+\.safetensors)", name)):
        repository, file = found.groups()
        wanted = [file, *(str(PurePosixPath(file).with_name(beside)) for beside in ("config.json", ADAPTER_CONFIG))]
        path = Path(huggingface_hub.snapshot_download(repository, allow_patterns=[*map(glob.escape, wanted)]), file)
        if not path.exists():
            raise FileNotFoundError(f"there is no {file} in {repository}, or it is not in the hub's cache")
    if path is None and HF_HUB_OFFLINE:
        # diffusers asks the hub for the list of a sharded model's files even so.
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    return path


def load_folder(cls, path: Path | None, name: str, subfolder: str, dtype: torch.dtype | None, **more):
    """load_part from a folder, or from the hub where there is none."""
    loader = cls.from_pretrained if dtype else cls.load_config
    variants = ["fp16", None] if dtype in (torch.float16, torch.bfloat16) else [None, "fp16"]
    if path:
        inner = subfolder if (path / subfolder).is_dir() and any((path / subfolder).glob("*config.json")) else ""
        half_files = any((path / inner).rglob("*.fp16.*"))
        attempts = [(variant, inner) for variant in (variants if half_files else [None])]
    else:
        attempts = [(variant, inner) for inner in dict.fromkeys([subfolder, ""]) for variant in variants]
    for variant, inner in attempts:
        inside = {"subfolder": inner} if inner else {}
        try:
            return loader(str(path or name), variant=variant, torch_dtype=dtype, **more, **inside)
        except Exception as e:
            error, cause = e, root_cause(e)
            if not isinstance(cause, errors.EntryNotFoundError) and cause is not e:
                break
            if not path and isinstance(cause, errors.LocalEntryNotFoundError):
                # The hub was out of reach; whether the cache has another layout takes no further waiting.
                more["local_files_only"] = True
    for file in (path / inner).rglob("*.safetensors") if path else ():
        single_file.tensor_shapes(file)  # which says of a damaged one what it is
    raise error


def pipeline_class(name: str):
    """The class of the base model's pipeline, one of PIPELINES. UserError for another one."""
    index, path = load_part(DiffusionPipeline, "base-model", name, ""), find_path(name)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"--base-model {name}: holds a {kind}; use a base model of SDXL, SD 1.5 or SD 2.1")
    for part in (part for part in index if part.startswith("tokenizer") and path and path.is_dir()):
        # transformers makes an empty one of a folder without these files.
        if not any((path / part / file).exists() for file in ("vocab.json", "tokenizer.json")):
            raise UserError(f"--base-model {name}: has no vocabulary in {part}/; fetch the folder again")
    return getattr(diffusers, kind)


def fitted(s):
    """The settings with what follows from the base model: its own timestep spacing for auto, and its own VAE where the
    default is SDXL's and it is of another family. Raises UserError for a base model that cannot be sampled here."""
    quiet_libraries()
    s = replace(s, vae=fitting_vae(s, pipeline_class(s.base_model)))
    check_family(s)
    scheduler = load_part(DDIMScheduler, "base-model", s.base_model, "scheduler")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"--base-model {s.base_model}: predicts {prediction}; use one that predicts epsilon or v_prediction")
    if prediction == "epsilon" and scheduler.get("rescale_betas_zero_snr"):
        raise UserError(f"--base-model {s.base_model}: predicts the noise where all is noise (rescale_betas_zero_snr)")
    if getattr(s, "timestep_spacing", "") == "auto":
        s = replace(s, timestep_spacing=scheduler.get("timestep_spacing", "leading"))
    return s


def fitting_vae(s, pipeline: type) -> str:
    """--vae, or "" for the base model's own where the default is of another family. UserError for another one that is."""
    is_sdxl = pipeline is StableDiffusionXLPipeline
    try:
        # What diffusers takes for it where an old file does not say.
        scale = load_config(AutoencoderKL, "vae", s.vae, s.base_model, "vae")["scaling_factor"]
        own = own_config(AutoencoderKL, s.base_model, "vae")
        wanted = own.get("scaling_factor", scale if is_sdxl and not own else 0.18215)
        if scale != wanted:
            what = f"scales latents by {scale:g}, but --base-model {s.base_model} by {wanted:g}"
            raise UserError(f"--vae {s.vae}: {what}; take both from the same model family, or --vae= for its own")
    except UserError:
        if is_sdxl or s.vae != type(s).vae:
            raise
        return ""
    return s.vae


def own_config(cls, base_model: str, subfolder: str) -> dict:
    """The configuration of a base model's own part; empty where it lacks that, as it may beside another."""
    try:
        return load_part(cls, "base-model", base_model, subfolder)
    except UserError:
        return {}


def check_family(s) -> None:
    """UserError for a UNet of another family than the base model, or of other latents than the VAE."""
    flag, name = ("dpo-unet", s.dpo_unet) if hasattr(s, "dpo_unet") else ("init-unet", s.init_unet)
    unet = load_config(UNet2DConditionModel, flag, name, s.base_model, "unet")
    there = unet.get("cross_attention_dim")
    here = own_config(UNet2DConditionModel, s.base_model, "unet").get("cross_attention_dim", there)
    if there != here:
        made = f"made for text embeddings of {there} numbers, but --base-model {s.base_model} gives {here}"
        raise UserError(f"--{flag} {name}: {made}; take both from the same model family")
    channels = load_config(AutoencoderKL, "vae", s.vae, s.base_model, "vae")["latent_channels"]
    if unet["in_channels"] != channels:
        raise UserError(f"{name or s.base_model}: its UNet takes {unet['in_channels']} channels, the VAE has {channels}")


def reason(e: BaseException) -> str:
    """Why a model could not be had, in a few words."""
    reasons = {
        errors.LocalEntryNotFoundError: "no folder, not in the hub's cache, and the hub is out of reach",
        errors.GatedRepoError: "gated: accept its terms on the hub and set HF_TOKEN",
        errors.RepositoryNotFoundError: "neither a folder nor a model on the hub that this user may read",
        NotImplementedError: "some of its tensors are missing",  # what torch says of those without data
    }
    return next((text for kind, text in reasons.items() if isinstance(root_cause(e), kind)), first_line(e))


def root_cause(e: BaseException) -> BaseException:
    """The first of the hub's own errors among those that led to an exception; the exception itself if there is none."""
    links = [e]
    for link in links:
        if isinstance(link, (errors.EntryNotFoundError, errors.HfHubHTTPError)):
            return link
        links += [x for x in (link.__cause__, link.__context__) if x is not None and x not in links]
    return e


def quiet_libraries() -> None:
    """No loading bars and no advice between our own lines, and no report of a variant that is tried and not there."""
    diffusers.utils.logging.set_verbosity(diffusers.logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")


def ready(pipe: DiffusionPipeline, s, device: torch.device, less: str = "--dtype fp16") -> DiffusionPipeline:
    """The pipeline on the device, its VAE in float32 where fp16 is too narrow for it. UserError for a pipeline that lacks
    one of its text encoders, and for too little memory. less: a flag that takes less."""
    encoders = [part for part in pipe.components if part.startswith("text_encoder")]
    if any(getattr(pipe, part) is None for part in encoders):
        raise UserError(f"--base-model {s.base_model}: lacks one of its {len(encoders)} text encoders; use a base model")
    # What an earlier pipeline left: one that was compiled is in a circle with what was compiled.
    clear_device_cache(garbage_collection=True)
    try:
        pipe.to(device)
    except torch.OutOfMemoryError as e:
        raise UserError(f"--device {device}: its free memory does not hold the models; free some, or use {less}") from e
    if isinstance(pipe, StableDiffusionXLPipeline) and pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_config(cls, flag: str, name: str, base_model: str, subfolder: str) -> dict:
    """The configuration of a model (no name: the base model's), with diffusers' defaults. UserError for another class."""
    flag, name = (flag, name) if name else ("base-model", base_model)
    config = load_part(cls, flag, name, subfolder, config_of=base_model)
    if config.get("_class_name") != cls.__name__:
        raise UserError(f"--{flag} {name}: holds {config.get('_class_name')}, not the {cls.__name__} that is needed here")
    return {name: p.default for name, p in inspect.signature(cls).parameters.items()} | config


def image_size(s) -> tuple[int, int]:
    """Height and width in pixels, from the models' configurations alone; UserError unless both fit the VAE's factor."""
    vae = load_config(AutoencoderKL, "vae", s.vae, s.base_model, "vae")
    unet = load_config(UNet2DConditionModel, "dpo-unet", s.dpo_unet, s.base_model, "unet")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    default = unet["sample_size"] * factor
    height, width = (default if side is None else side for side in (s.height, s.width))
    for flag, value in (("height", height), ("width", width)):
        if value < factor or value % factor:
            near = max(factor, round(value / factor) * factor)
            raise UserError(f"--{flag} {value}: must be a multiple of {factor}, the VAE's factor; the nearest is {near}")
    return height, width


def image_settings(s, dtype_name: str) -> dict:
    """The settings that images of a run have in common, as they stand in their records; sizes in pixels."""
    height, width = image_size(s)
    common = {"guidance_scale": s.guidance_scale, "negative_prompt": "", "timestep_spacing": s.timestep_spacing}
    common |= {"base_model": s.base_model, "vae": s.vae, "height": height, "width": width, "dtype": dtype_name}
    weights = fingerprint(s.base_model, s.dpo_unet, *lora_names(s.dpo_lora), s.vae)
    return common | {"dpo_unet": s.dpo_unet, "dpo_lora": " ".join(s.dpo_lora), "weights": weights}


def warn_of_long_prompts(pipe: DiffusionPipeline, prompts: list[str]) -> None:
    """Print a warning for each prompt longer than the text encoders read (77 tokens), with the part that is cut off."""
    tokenizer = pipe.tokenizer
    for prompt in dict.fromkeys(prompts):
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        room = tokenizer.model_max_length - 2
        if len(ids) > room:
            cut = tokenizer.decode(ids[room:]).strip()
            start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
            warn(f"{start!r} has {len(ids) + 2} tokens, {room + 2} are read; cut off: {cut!r}")


class Text(NamedTuple):
    """What a UNet is told of N rows of prompts and, SDXL's, of sizes."""

    prompt_embeds: torch.Tensor  # (N, 77, D)
    pooled_embeds: torch.Tensor | None = None  # (N, P); None for SD 1.5 and 2.1
    time_ids: torch.Tensor | None = None  # (N, 6): SDXL's size conditioning, in pixels

    def last(self, n: int) -> dict:
        """The UNet's arguments for the last n rows."""
        given = {"encoder_hidden_states": self.prompt_embeds[-n:], "return_dict": False}
        if self.pooled_embeds is not None:
            given["added_cond_kwargs"] = {"text_embeds": self.pooled_embeds[-n:], "time_ids": self.time_ids[-n:]}
        return given


def without_repetition(prompts: list[str]) -> tuple[list[str], list[int]]:
    """The prompts, each once, and which of them each one is."""
    unique = list(dict.fromkeys(prompts))
    return unique, [unique.index(p) for p in prompts]


@torch.no_grad()
def encode(pipe: DiffusionPipeline, batch, guided: bool, negative_prompt: str = "") -> Text:
    """The text for the B images of a batch: 2B rows with the unconditional half first where guided, else B. An empty
    negative prompt means the model's own unconditional embeddings (SDXL's: zeros where its index says so)."""
    unique, rows = without_repetition(batch.prompts)
    negative = [negative_prompt] * len(unique) if negative_prompt else None
    options = {"device": pipe.unet.device, "num_images_per_prompt": 1, "negative_prompt": negative}
    # SD 1.5 and 2.1 have no pooled embeddings.
    text, no_text, *pooled = pipe.encode_prompt(unique, do_classifier_free_guidance=guided, **options)

    def both(cond, uncond):
        return torch.cat([uncond[rows], cond[rows]]) if guided else cond[rows]

    return text_of(both(text, no_text), both(*pooled) if pooled else None, batch.height, batch.width)


def text_of(prompt_embeds: torch.Tensor, pooled_embeds: torch.Tensor | None, height: int, width: int) -> Text:
    """The Text of pictures of one size in pixels, whole ones."""
    if pooled_embeds is None:
        return Text(prompt_embeds)
    # Filled on the device, as a copy from the host would wait for it.
    sizes = [prompt_embeds.new_full((len(prompt_embeds),), x) for x in (height, width, 0, 0, height, width)]
    return Text(prompt_embeds, pooled_embeds, torch.stack(sizes, dim=1))


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images of latents (B, 4, H, W): (B, 3, F H, F W), float32 in [-1, 1] or a little outside, NaN where the VAE
    overflowed. To bound memory, only as many are decoded together as have the area of one SDXL image. Each is copied, as a
    compiled decoder on a GPU writes the next ones over it."""
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    together = max(1, 128 * 128 // (latents.shape[-2] * latents.shape[-1]))
    return torch.cat([vae.decode(z, return_dict=False)[0].to(torch.float32, copy=True) for z in scaled.split(together)])
