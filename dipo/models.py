"""Models from a folder, a file or the hub; what SDXL is told of a prompt; pictures from latents."""

import sys
import warnings
from typing import NamedTuple

import diffusers
import torch
import transformers
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import errors

from dipo.cli import UserError, first_line
from dipo.files import find_path, fingerprint, lora_names


def load_part(cls, flag: str, name: str, subfolder: str, dtype: torch.dtype | None = None, **more):
    """One model of a diffusers pipeline from a folder or the hub, from its subfolder where there is one.

    cls: a class of diffusers, loaded with more; its configuration alone without a dtype. Of files in full and half precision
    (variant fp16) those that fit dtype are preferred. Raises UserError when nothing usable is found.
    """
    path = find_path(name)
    loader = cls.from_pretrained if dtype else cls.load_config
    variants = ["fp16", None] if dtype in (torch.float16, torch.bfloat16) else [None, "fp16"]
    if path:
        inner = subfolder if (path / subfolder / "config.json").exists() else ""
        half_files = any((path / inner).rglob("*.fp16.safetensors"))
        attempts = [(variant, inner) for variant in (variants if half_files else [None])]
    else:
        attempts = [(variant, inner) for inner in dict.fromkeys([subfolder, ""]) for variant in variants]
    options = {"torch_dtype": dtype, "use_safetensors": True} | more
    for variant, inner in attempts:
        inside = {"subfolder": inner} if inner else {}
        try:
            return loader(str(path or name), variant=variant, **options, **inside)
        except Exception as e:
            error, cause = e, root_cause(e)
            if not isinstance(cause, errors.EntryNotFoundError) and cause is not e:
                break
            if not path and isinstance(cause, errors.LocalEntryNotFoundError):
                # The hub was out of reach; whether the cache has another layout takes no further waiting.
                options["local_files_only"] = True
    raise UserError(f"--{flag} {name}: cannot be loaded ({reason(error)}); use download_models.py, or try --demo") from error


def reason(e: BaseException) -> str:
    """Why a model could not be had, in a few words."""
    reasons = {
        errors.LocalEntryNotFoundError: "no folder, not in the hub's cache, and the hub is out of reach",
        errors.GatedRepoError: "gated: accept its terms on the hub and set HF_TOKEN",
        errors.RepositoryNotFoundError: "neither a folder nor a model on the hub that this user may read",
    }
    return next((text for kind, text in reasons.items() if isinstance(root_cause(e), kind)), first_line(e)[:200])


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


def ready(pipe: StableDiffusionXLPipeline, s, device: torch.device, less: str = "--dtype fp16") -> StableDiffusionXLPipeline:
    """The pipeline on the device, after a look at whether its parts fit each other.

    s: the settings that named them. less: a flag that takes less memory. Raises UserError for parts of different families, a
    model that does not predict the noise, or too little memory.
    """
    if pipe.scheduler.config.prediction_type != "epsilon":
        raise UserError(f"--base-model {s.base_model}: predicts {pipe.scheduler.config.prediction_type}, not the noise")
    if not pipe.text_encoder or not pipe.text_encoder_2:
        raise UserError(f"--base-model {s.base_model}: lacks one of SDXL's two text encoders; use an SDXL base model")
    wanted = pipe.text_encoder.config.hidden_size + pipe.text_encoder_2.config.hidden_size
    if pipe.unet.config.cross_attention_dim != wanted:
        name = getattr(s, "dpo_unet", "") or s.base_model
        raise UserError(
            f"--dpo-unet {name}: made for text embeddings of {pipe.unet.config.cross_attention_dim} numbers, "
            f"but --base-model {s.base_model} gives {wanted}; take both from the same model family"
        )
    # What an earlier pipeline left: one that was compiled is in a circle with what was compiled.
    clear_device_cache(garbage_collection=True)
    try:
        pipe.to(device)
    except torch.OutOfMemoryError as e:
        raise UserError(f"--device {device}: its free memory does not hold the models; free some, or use {less}") from e
    if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_config(cls, flag: str, name: str, base_model: str, subfolder: str) -> dict:
    """The configuration of one model, from the base model where name is empty; UserError if it is of another class."""
    flag, name = (flag, name) if name else ("base-model", base_model)
    config = load_part(cls, flag, name, subfolder)
    if config.get("_class_name") != cls.__name__:
        raise UserError(f"--{flag} {name}: holds {config.get('_class_name')}, not the {cls.__name__} that is needed here")
    return config


def image_size(s) -> tuple[int, int]:
    """Height and width in pixels, from the models' configurations alone; UserError unless both fit the VAE's factor."""
    load_part(StableDiffusionXLPipeline, "base-model", s.base_model, "")
    vae = load_config(AutoencoderKL, "vae", s.vae, s.base_model, "vae")
    unet = load_config(UNet2DConditionModel, "dpo-unet", s.dpo_unet, s.base_model, "unet")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    default = unet["sample_size"] * factor
    height = default if s.height is None else s.height
    width = default if s.width is None else s.width
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


def warn_of_long_prompts(pipe: StableDiffusionXLPipeline, prompts: list[str]) -> None:
    """Print a warning for each prompt longer than the text encoders read (77 tokens), with the part that is cut off."""
    tokenizer = pipe.tokenizer
    for prompt in dict.fromkeys(prompts):
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        room = tokenizer.model_max_length - 2
        if len(ids) > room:
            cut = tokenizer.decode(ids[room:]).strip()
            start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
            print(f"warning: {start!r} has {len(ids) + 2} tokens, {room + 2} are read; cut off: {cut!r}", file=sys.stderr)


class Text(NamedTuple):
    """What SDXL's UNet is told of N rows of prompts and sizes."""

    prompt_embeds: torch.Tensor  # (N, 77, D)
    pooled_embeds: torch.Tensor  # (N, P)
    time_ids: torch.Tensor  # (N, 6): SDXL's size conditioning, in pixels

    def last(self, n: int) -> dict:
        """The UNet's arguments for the last n rows."""
        added = {"text_embeds": self.pooled_embeds[-n:], "time_ids": self.time_ids[-n:]}
        return {"encoder_hidden_states": self.prompt_embeds[-n:], "added_cond_kwargs": added, "return_dict": False}


@torch.no_grad()
def encode(pipe: StableDiffusionXLPipeline, batch, guided: bool, negative_prompt: str = "") -> Text:
    """SDXL's text for the B images of a batch: 2B rows with the unconditional half first where guided, else B.

    An empty negative prompt means SDXL's own unconditional embeddings (zeros where the model's index says so).
    """
    unique = list(dict.fromkeys(batch.prompts))
    rows = [unique.index(p) for p in batch.prompts]
    negative = [negative_prompt] * len(unique) if negative_prompt else None
    text, no_text, pooled, no_pooled = pipe.encode_prompt(
        unique, device=pipe.unet.device, do_classifier_free_guidance=guided, negative_prompt=negative
    )
    text, pooled = text[rows], pooled[rows]
    if guided:
        text, pooled = torch.cat([no_text[rows], text]), torch.cat([no_pooled[rows], pooled])
    size = [batch.height, batch.width]
    time_ids = torch.tensor([[*size, 0, 0, *size]], device=text.device, dtype=text.dtype)
    return Text(text, pooled, time_ids.expand(len(text), -1))


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images of latents (B, 4, H, W): (B, 3, F H, F W), float32 in [-1, 1] or a little outside, NaN where the VAE
    overflowed. To bound memory, only as many are decoded together as have the area of one SDXL image. Each is copied, as a
    compiled decoder on a GPU writes the next ones over it."""
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    together = max(1, 128 * 128 // (latents.shape[-2] * latents.shape[-1]))
    return torch.cat([vae.decode(z, return_dict=False)[0].to(torch.float32, copy=True) for z in scaled.split(together)])
