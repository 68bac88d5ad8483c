"""Sample Stable Diffusion XL with a DPO-trained UNet by DDIM: prompts in, PNGs out, in 20 to 50 steps instead of 500.

DIPO changes no training objective: a UNet trained with Diffusion-DPO is put into SDXL, a DDIM scheduler is swapped in,
and the sampling loop below runs over a short subsequence of the 1,000 training timesteps.

    python hasty_sample.py --demo                                      # the small model in assets/demo, without GPU
    python hasty_sample.py --output-dir generated_images/sdxl          # SDXL and the DPO UNet, from the hub or its cache
    python hasty_sample.py --prompts prompts.txt --num-inference-steps 50 --eta 0.5 --output-dir generated_images/mine
    python hasty_sample.py --prompts parti --limit 100 --base-model models/sdxl --output-dir generated_images/parti
    accelerate launch hasty_sample.py --prompts prompts.txt            # shares the images out over all GPUs

To use other models, edit the paths at the top of Settings or pass them as flags. The output folder gets 00000.png and
so on (each with its settings inside, readable by AUTOMATIC1111's web UI), grid.png and images.csv. A run that was
stopped goes on when the same command is given again; a folder holds the images of one set of settings.
"""

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import diffusers
import huggingface_hub.errors
import matplotlib
import numpy as np
import pandas as pd
import torch
import transformers
import tyro
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, find_executable_batch_size
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm


@dataclass
class Settings:
    base_model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """SDXL pipeline: a folder or a hub name"""
    dpo_unet: str = "mhdang/dpo-sdxl-text2image-v1"
    """DPO-trained UNet: a folder or a hub name, with or without a subfolder unet; empty: the base model's own"""
    dpo_lora: str = ""
    """DPO-trained LoRA instead: a folder, a .safetensors file or a hub name; on the base model's own UNet unless dpo_unet
    is given too"""
    vae: str = "madebyollin/sdxl-vae-fp16-fix"
    """VAE that stays finite in fp16: a folder or a hub name; empty: the base model's own"""
    parti: str = "nateraw/parti-prompts"
    """data set behind --prompts parti: a folder or a hub name"""

    demo: bool = False
    """use the small model of assets/demo, and its prompts where none are given"""
    prompts: str = ""
    """a .txt with a prompt a line, a .csv or .parquet with a prompt column, or parti; empty: EXAMPLE_PROMPTS"""
    limit: int | None = None
    """use the first N prompts only"""
    images_per_prompt: int = 1
    """images of each prompt, each with its own seed"""
    output_dir: str = "generated_images/hasty_sample"
    """where images, grid and table go"""
    overwrite: bool = False
    """replace images in the output folder that were made with other settings"""
    font: str = ""
    """a .ttf or .otf file for the prompts in the grid; empty: DejaVu Sans, which has no Chinese, Japanese or emoji"""

    num_inference_steps: int = 30
    """DDIM steps, 1 to 1000"""
    eta: float = 0.0
    """share of the ancestral noise, 0 (DDIM) to 1 (DDPM on the same timesteps)"""
    guidance_scale: float = 5.0
    """classifier-free guidance; 1 or less switches it off, for half the operations"""
    guidance_interval: tuple[float, float] | None = None
    """guide only at noise levels sigma = sqrt(1 / alpha_bar - 1) above the first number and up to the second, which changes
    the images; 0.28 5.42 is Kynkäänniemi et al. 2024's for SDXL. Steps outside cost half the operations"""
    negative_prompt: str = ""
    """what to steer away from; empty: SDXL's own unconditional embeddings"""
    timestep_spacing: str = "leading"
    """leading (SDXL's own), trailing or linspace"""
    seed: int = 0
    """image number i is drawn from seed + i"""
    height: int | None = None
    """pixels; default: the model's own, 1024 for SDXL"""
    width: int | None = None
    """pixels; default: the model's own, 1024 for SDXL"""

    batch_size: int = 4
    """images sampled together; halved when the GPU's memory runs out"""
    compile: str = "auto"
    """torch.compile of the UNet for full batches: on, off, or auto: where a process has 10,000 calls of it ahead (it paid
    from about 9,000 on for the demo model, one image at a time, on 2 CPU cores; not measured on GPUs)"""
    dtype: str = "auto"
    """fp16, bf16, fp32, or auto: fp16 on a GPU, fp32 on the CPU"""
    device: str = "auto"
    """cuda, cuda:1, mps, cpu, or auto: the first of these that is there"""


EXAMPLE_PROMPTS = (
    "a close-up portrait of an old fisherman in a yellow raincoat, soft window light",
    "a young woman with freckles reading in a train, 35mm photograph",
    "an oil painting of a king with a parrot on his shoulder",
    "a lighthouse on a cliff above a stormy sea at dusk",
    "terraced rice fields at sunrise, fog in the valley",
    "a frozen lake under the northern lights, wide angle",
    "abstract composition of overlapping circles in teal and copper",
    "swirling ink in water, deep blue and gold, macro",
)

DEMO_MODEL = "assets/demo/sdxl"
DEMO_DPO_UNET = "assets/demo/dpo-unet"
DEMO_PROMPTS = "assets/demo/prompts.txt"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SPACINGS = ("leading", "trailing", "linspace")
MAX_GRID_PIXELS = 25_000_000
COMPILE_FROM = 10_000


class UserError(Exception):
    """Something that the user can put right; ends the script with one line and exit code 2."""


class ImageError(UserError):
    """The same, found by one process of several."""


# ------------------------------------------------------------------------------------------------------------- settings


def find_path(name: str) -> Path | None:
    """A file or folder given relative to the current folder or to this script's; None where neither exists."""
    try:
        for path in (Path(name).expanduser(), Path(__file__).resolve().parent / name):
            if name and path.exists():
                return path
    except (OSError, RuntimeError):
        pass
    return None


def with_demo(s: Settings) -> Settings:
    """The settings with the demo's models and prompts wherever they were left at their defaults."""
    if not find_path(DEMO_MODEL):
        raise UserError(f"--demo needs {DEMO_MODEL} beside {Path(__file__).name}: run it inside a clone of the repository")
    demo = {"base_model": DEMO_MODEL, "dpo_unet": DEMO_DPO_UNET, "vae": "", "prompts": DEMO_PROMPTS}
    default = Settings()
    return replace(s, **{k: v for k, v in demo.items() if getattr(s, k) == getattr(default, k)})


def check_settings(s: Settings) -> None:
    """Raise UserError for every value that can be judged without loading a model."""
    if not 1 <= s.num_inference_steps <= 1000:
        raise UserError(f"--num-inference-steps {s.num_inference_steps}: use 1 to 1000, as SDXL was trained on 1000")
    if not 0 <= s.eta <= 1:
        raise UserError(f"--eta {s.eta}: use 0 (DDIM, deterministic) to 1 (as random as DDPM)")
    if s.guidance_interval:
        low, high = s.guidance_interval
        if not 0 <= low < high < math.inf:
            raise UserError(
                f"--guidance-interval {low} {high}: use two noise levels, the lower one first; SDXL's go from 0.03 to 14.6"
            )
        if s.guidance_scale <= 1:
            raise UserError(f"--guidance-interval: --guidance-scale {s.guidance_scale:g} switches guidance off; use above 1")
    check_common(s)


def check_common(s: Settings) -> None:
    """The part of check_settings that every script which samples has: guidance, counts, seed, device, model paths."""
    if not math.isfinite(s.guidance_scale):
        raise UserError(f"--guidance-scale {s.guidance_scale}: use a finite number, SDXL's usual range is 5 to 8")
    if s.timestep_spacing not in SPACINGS:
        raise UserError(f"--timestep-spacing {s.timestep_spacing!r}: use one of {', '.join(SPACINGS)}")
    if s.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {s.dtype!r}: use auto, {', '.join(DTYPES)}")
    for flag, value in (("limit", s.limit), ("images-per-prompt", s.images_per_prompt), ("batch-size", s.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: use 1 or more")
    if s.compile not in ("auto", "on", "off"):
        raise UserError(f"--compile {s.compile!r}: use auto, on or off")
    if not s.output_dir.strip():
        raise UserError("--output-dir is empty: give a folder")
    if not 0 <= s.seed < 2**62:
        raise UserError(f"--seed {s.seed}: use 0 to 2**62 - 1")
    caption_font(192, s.font)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", s.device):
        raise UserError(f"--device {s.device!r}: use auto, cuda, cuda:1, mps or cpu")
    if s.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {s.device}: no CUDA GPU is visible to torch here; use --device cpu, or fix the driver")
    if ":" in s.device and int(s.device.split(":")[1]) >= torch.cuda.device_count():
        raise UserError(f"--device {s.device}: this machine has GPUs 0 to {torch.cuda.device_count() - 1} only")
    if s.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU is visible to torch here; use --device cpu")
    check_model_path("base-model", s.base_model, "model_index.json")
    check_model_path("dpo-unet", s.dpo_unet, "config.json")
    check_model_path("vae", s.vae, "config.json")
    lora = find_path(s.dpo_lora)
    if not (lora and lora.is_file() and lora.suffix == ".safetensors"):
        check_model_path("dpo-lora", s.dpo_lora, "pytorch_lora_weights.safetensors")


def check_model_path(flag: str, name: str, index_file: str) -> None:
    """Raise UserError unless name is a model folder (it or its subfolder of the kind holds index_file), could be a hub
    name such as "owner/name", or is empty where the base model's own part can stand in."""
    path = find_path(name)
    if path:
        if not any((path / sub / index_file).exists() for sub in ("", "unet", "vae")):
            raise UserError(f"--{flag} {name}: no {index_file} in it, so this is not a model folder of diffusers")
    elif (name or flag == "base-model") and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"--{flag} {name!r}: no such folder; give a folder, fetch the models with download_models.py, or try --demo"
        )


def read_prompts(source: str, parti: str, limit: int | None) -> list[str]:
    """The prompts of a file or data set, in order, blank ones left out.

    source: a .txt (UTF-8, a prompt a line), a .csv or .parquet with a column named prompt (in any case), "parti", or
    empty for EXAMPLE_PROMPTS. Raises UserError for a file that is missing, empty, of another kind or not readable.
    """
    if not source:
        prompts = list(EXAMPLE_PROMPTS)
    elif source == "parti":
        from datasets import load_dataset

        try:
            table = load_dataset(str(find_path(parti) or parti), split="train")
        except Exception as e:
            raise UserError(f"--prompts parti: could not load {parti}: {first_line(e)}") from e
        prompts = prompt_column(table.to_pandas(), "parti")
    else:
        path = find_path(source)
        if not path or not path.is_file():
            raise UserError(f"--prompts {source}: no such file; give a .txt, .csv or .parquet file, or parti")
        try:
            if path.suffix.lower() == ".txt":
                prompts = path.read_text(encoding="utf-8-sig").splitlines()
            elif path.suffix.lower() == ".csv":
                prompts = prompt_column(read_csv(path), source)
            elif path.suffix.lower() == ".parquet":
                prompts = prompt_column(pd.read_parquet(path), source)
            else:
                raise UserError(f"--prompts {source}: of no known kind; give a .txt, .csv or .parquet file, or parti")
        except (ValueError, OSError) as e:
            raise UserError(f"--prompts {source}: cannot be read: {first_line(e)}") from e
    prompts = [line for p in prompts if (line := one_line(p))][:limit]
    if not prompts:
        raise UserError(f"--prompts {source}: holds no prompt; put one on each line, or in the column prompt")
    return prompts


def one_line(text: str) -> str:
    """Text without control characters, with single blanks for its whitespace, which is how CLIP's tokenizers read it too."""
    return " ".join("".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cc").split())


def csv_text(text: str) -> str:
    """Text for a cell of a CSV: with an apostrophe in front where a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV as text; ValueError where a row has more cells than the header, which pandas would take for an index."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("a row has more cells than the header; put quotes around prompts with commas")
    return table


def prompt_column(table: pd.DataFrame, source: str) -> list[str]:
    columns = [c for c in table.columns if str(c).lower() == "prompt"]
    if not columns:
        raise UserError(f"--prompts {source}: has no column prompt; its columns are {', '.join(map(str, table.columns))}")
    return table[columns[0]].fillna("").astype(str).tolist()


def first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


# --------------------------------------------------------------------------------------------------------------- models


def load_part(loader, flag: str, name: str, subfolder: str, dtype: torch.dtype):
    """One model of a diffusers pipeline from a folder or the hub, from its subfolder where there is one.

    loader: a from_pretrained or load_config of diffusers. Of files in full and half precision (variant fp16) those that
    fit dtype are preferred. Raises UserError when nothing usable is found.
    """
    path = find_path(name)
    variants = [None, "fp16"] if dtype == torch.float32 else ["fp16", None]
    if path:
        inner = subfolder if (path / subfolder / "config.json").exists() else ""
        half_files = any((path / inner).rglob("*.fp16.safetensors"))
        attempts = [(variant, inner) for variant in (variants if half_files else [None])]
    else:
        attempts = [(variant, inner) for inner in dict.fromkeys([subfolder, ""]) for variant in variants]
    options = {"torch_dtype": dtype, "use_safetensors": True}
    for variant, inner in attempts:
        more = options | ({"subfolder": inner} if inner else {})
        try:
            return loader(str(path or name), variant=variant, **more)
        except Exception as e:
            error, cause = e, root_cause(e)
            if not isinstance(cause, huggingface_hub.errors.EntryNotFoundError) and cause is not e:
                break
            if not path and isinstance(cause, huggingface_hub.errors.LocalEntryNotFoundError):
                # The hub was out of reach; whether the cache has another layout takes no further waiting.
                options["local_files_only"] = True
    reasons = {
        huggingface_hub.errors.LocalEntryNotFoundError: "no folder, not in the hub's cache, and the hub is out of reach",
        huggingface_hub.errors.GatedRepoError: "gated: accept its terms on the hub and set HF_TOKEN",
        huggingface_hub.errors.RepositoryNotFoundError: "neither a folder nor a model on the hub that this user may read",
    }
    reason = next((text for kind, text in reasons.items() if isinstance(root_cause(error), kind)), first_line(error)[:200])
    raise UserError(
        f"--{flag} {name}: cannot be loaded ({reason}); fetch it with download_models.py, or try --demo"
    ) from error


def root_cause(e: BaseException) -> BaseException:
    """The first of the hub's own errors among those that led to an exception; the exception itself if there is none."""
    links = [e]
    for link in links:
        if isinstance(link, (huggingface_hub.errors.EntryNotFoundError, huggingface_hub.errors.HfHubHTTPError)):
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


def load_pipeline(s: Settings, device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """SDXL with the DPO-trained UNet and a DDIM scheduler swapped in, in evaluation mode on the device.

    Raises UserError when a model cannot be loaded, does not fit the others, or does not predict the noise.
    """
    parts = {}
    if s.dpo_unet:
        parts["unet"] = load_part(UNet2DConditionModel.from_pretrained, "dpo-unet", s.dpo_unet, "unet", dtype)
    if s.vae:
        parts["vae"] = load_part(AutoencoderKL.from_pretrained, "vae", s.vae, "vae", dtype)

    def base(*args, **kwargs):
        return StableDiffusionXLPipeline.from_pretrained(*args, **kwargs, **parts, add_watermarker=False)

    pipe = load_part(base, "base-model", s.base_model, "", dtype)
    # from_config would fill in True for both where the file lacks them, and clipping ruins latents.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    if pipe.scheduler.config.prediction_type != "epsilon":
        raise UserError(f"--base-model {s.base_model}: predicts {pipe.scheduler.config.prediction_type}, not the noise")
    if not pipe.text_encoder or not pipe.text_encoder_2:
        raise UserError(f"--base-model {s.base_model}: lacks one of SDXL's two text encoders; use an SDXL base model")
    wanted = pipe.text_encoder.config.hidden_size + pipe.text_encoder_2.config.hidden_size
    if pipe.unet.config.cross_attention_dim != wanted:
        raise UserError(
            f"--dpo-unet {s.dpo_unet}: made for text embeddings of {pipe.unet.config.cross_attention_dim} numbers, "
            f"but --base-model {s.base_model} gives {wanted}; take both from the same model family"
        )
    if s.dpo_lora:
        merge_lora(pipe, s.dpo_lora)
    try:
        pipe.to(device)
    except torch.OutOfMemoryError as e:
        raise UserError(
            f"--device {device}: its free memory does not hold the models; free some, or use --dtype fp16"
        ) from e
    if dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    return pipe


def merge_lora(pipe: StableDiffusionXLPipeline, name: str) -> None:
    """Load a LoRA and add it to the UNet's weights, so that sampling costs what it does without; UserError if it does not
    fit."""
    path = find_path(name)
    file = {"weight_name": "pytorch_lora_weights.safetensors"} if path and path.is_dir() else {}
    try:
        pipe.load_lora_weights(str(path or name), use_safetensors=True, **file)
        if not pipe.get_list_adapters().get("unet"):
            raise ValueError("it holds nothing for the UNet")
        pipe.fuse_lora(components=["unet"])
        pipe.unload_lora_weights()
    except Exception as e:
        raise UserError(f"--dpo-lora {name}: cannot be loaded into this UNet ({first_line(root_cause(e))[:200]})") from e


def load_config(cls, flag: str, name: str, s: Settings, subfolder: str) -> dict:
    """The configuration of one model, from the base model where name is empty; UserError if it is of another class."""
    flag, name = (flag, name) if name else ("base-model", s.base_model)
    config = load_part(cls.load_config, flag, name, subfolder, torch.float32)
    if config.get("_class_name") != cls.__name__:
        raise UserError(f"--{flag} {name}: holds {config.get('_class_name')}, not the {cls.__name__} that is needed here")
    return config


def image_size(s: Settings) -> tuple[int, int]:
    """Height and width in pixels, from the models' configurations alone; UserError unless both fit the VAE's factor."""
    load_part(StableDiffusionXLPipeline.load_config, "base-model", s.base_model, "", torch.float32)
    vae = load_config(AutoencoderKL, "vae", s.vae, s, "vae")
    unet = load_config(UNet2DConditionModel, "dpo-unet", s.dpo_unet, s, "unet")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    default = unet["sample_size"] * factor
    height = default if s.height is None else s.height
    width = default if s.width is None else s.width
    for flag, value in (("height", height), ("width", width)):
        if value < factor or value % factor:
            near = max(factor, round(value / factor) * factor)
            raise UserError(f"--{flag} {value}: must be a multiple of {factor}, the VAE's factor; the nearest is {near}")
    return height, width


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


# ------------------------------------------------------------------------------------------------------------- sampling


def ddim_timesteps(steps: int, spacing: str, train_steps: int = 1000, offset: int = 1) -> list[int]:
    """The subsequence tau of the training timesteps, descending (Song et al. 2021, section 4.2).

    The same as diffusers' DDIMScheduler.set_timesteps with one exception of weight. Its "leading" spacing takes the
    whole-number stride train_steps // steps, and so 800 steps would start from pure noise at t = 800. Where that leaves the
    first timestep a stride or more too low, the real-valued stride is used and rounded down: 800 steps start at 999. Two
    corner cases follow: 1000 "leading" steps are 999 to 0, not 1000 to 1, and one "linspace" step is at 999, not 0.

    steps: 1 to train_steps. spacing: "leading", "trailing" or "linspace". offset: the scheduler's steps_offset, used by
    "leading". Lin et al. 2023 (Common diffusion noise schedules and sample steps are flawed) compares the three.
    """
    i = np.arange(steps)
    if spacing == "leading":
        stride = train_steps // steps
        if (steps - 1) * (train_steps / steps - stride) >= train_steps / steps:
            tau = i * train_steps // steps
        else:
            tau = i * stride
        tau = (tau + min(offset, train_steps - 1 - tau[-1]))[::-1]
    elif spacing == "trailing":
        tau = np.round(train_steps - i * (train_steps / steps)) - 1
    else:
        tau = np.round(np.linspace(train_steps - 1, 0, steps))
    return [int(t) for t in tau]


def ddim_coefficients(alphas_cumprod: torch.Tensor, timesteps: list[int], eta: float) -> torch.Tensor:
    """DDIM's update (Song et al. 2021, equations 12 and 16) as x_prev = a x + b e + sigma z, a row (a, b, sigma) a step.

    alphas_cumprod: alpha_bar of all training timesteps, (T,). timesteps: descending; each step goes to the next one, the
    last to alpha_bar[0], as SDXL's set_alpha_to_one = False says. eta: 0 to 1. Returns (len(timesteps), 3), float64.
    """
    alpha_bar = alphas_cumprod.double().cpu()
    a_t = alpha_bar[timesteps]
    a_prev = torch.cat([a_t[1:], alpha_bar[:1]])
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).clamp(min=0).sqrt()
    a = (a_prev / a_t).sqrt()
    b = (1 - a_prev - sigma**2).clamp(min=0).sqrt() - a * (1 - a_t).sqrt()
    return torch.stack([a, b, sigma], dim=1)


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Normal noise, float32 (B, *shape), image by image from its own CPU generator, so that it is the same on every
    device and in every batch; copied without waiting."""
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return (noise.pin_memory() if device.type == "cuda" else noise).to(device, non_blocking=device.type == "cuda")


def guided_steps(
    alphas_cumprod: torch.Tensor, timesteps: list[int], interval: tuple[float, float] | None = None
) -> list[bool]:
    """Which steps guide, those of a noise level low < sigma <= high (Kynkäänniemi et al. 2024, equation 6); None: all.

    alphas_cumprod: alpha_bar of all training timesteps, (T,); sigma is sqrt(1 / alpha_bar - 1).
    """
    low, high = interval or (0, math.inf)
    sigma = (1 / alphas_cumprod.double().cpu()[timesteps] - 1).sqrt()
    return ((low < sigma) & (sigma <= high)).tolist()


class Given(torch.nn.Module):
    """A layer whose output is known."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.register_buffer("output", output, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


@contextlib.contextmanager
def text_projected_once(unet: UNet2DConditionModel, prompt_embeds: torch.Tensor):
    """Inside, cross-attention takes the keys and values of these prompts as computed here, once for all steps: they depend
    on nothing else. A compiled UNet finds them where those of the last batch of this size were, as CUDA graphs need."""
    layers, known = [], {}
    if isinstance(unet, UNet2DConditionModel) and unet.encoder_hid_proj is None:
        if unet._compiled_call_impl is not None:
            known = unet.__dict__.setdefault("known_projections", {}).setdefault(len(prompt_embeds), {})
        for m in unet.modules():
            if type(m).__name__ == "Attention" and m.is_cross_attention and m.norm_cross is None:
                names = ("to_kv",) if isinstance(m.processor, FusedAttnProcessor2_0) else ("to_k", "to_v")
                layers += [(m, name, getattr(m, name)) for name in names]
    try:
        for m, name, layer in layers:
            output = layer(prompt_embeds)
            if (m, name) in known:
                known[m, name].output.copy_(output)
            else:
                known[m, name] = Given(output)
            setattr(m, name, known[m, name])
        yield
    finally:
        for m, name, layer in layers:
            setattr(m, name, layer)


@torch.no_grad()
def ddim_sample(
    unet: UNet2DConditionModel,
    alphas_cumprod: torch.Tensor,
    timesteps: list[int],
    prompt_embeds: torch.Tensor,
    pooled_embeds: torch.Tensor,
    generators: list[torch.Generator],
    height: int,
    width: int,
    guidance_scale: float = 5.0,
    eta: float = 0.0,
    vae_scale_factor: int = 8,
    on_step=lambda: None,
    guidance_interval: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Sample SDXL latents by DDIM (Song et al. 2021) with classifier-free guidance (Ho and Salimans 2022).

    prompt_embeds: (2B, 77, D) with the unconditional half first, or (B, 77, D) for no guidance. pooled_embeds: (2B, P)
    or (B, P). generators: one CPU generator for each of the B images. on_step: called once each step, on the host.
    guidance_interval: as for guided_steps. Returns float32 (B, 4, height / vae_scale_factor, width / vae_scale_factor).
    Nothing in the loop waits for the device.
    """
    device, dtype, batch = prompt_embeds.device, prompt_embeds.dtype, len(generators)
    shape = (unet.config.in_channels, height // vae_scale_factor, width // vae_scale_factor)
    guides = guided_steps(alphas_cumprod, timesteps, guidance_interval)
    if prompt_embeds.shape[0] == batch:
        guides = [False] * len(timesteps)
    coefficients = ddim_coefficients(alphas_cumprod, timesteps, eta).float().to(device)
    t = torch.tensor(timesteps, device=device)
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=dtype)
    x = draw_noise(generators, shape, device)
    for guided, steps in itertools.groupby(range(len(timesteps)), guides.__getitem__):
        text, pooled = (y if guided else y[-batch:] for y in (prompt_embeds, pooled_embeds))
        given = {"text_embeds": pooled, "time_ids": time_ids.expand(len(text), -1)}
        given = {"encoder_hidden_states": text, "added_cond_kwargs": given, "return_dict": False}
        with text_projected_once(unet, text):
            for i in steps:
                a, b, sigma = coefficients[i]
                model_input = (torch.cat([x, x]) if guided else x).to(dtype)
                e = unet(model_input, t[i], **given)[0].float()
                if guided:
                    e_uncond, e_cond = e.chunk(2)
                    e = e_uncond + guidance_scale * (e_cond - e_uncond)
                x = a * x + b * e
                if eta > 0:
                    x = x + sigma * draw_noise(generators, shape, device)
                on_step()
    return x


# torch.compile's options on a GPU, those of huggingface/diffusion-fast.
INDUCTOR = {
    "max_autotune": True,
    "triton.cudagraphs": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "conv_1x1_as_mm": True,
    "epilogue_fusion": False,
}


def compile_unet(pipe: StableDiffusionXLPipeline, warm_up, wanted: str) -> bool:
    """torch.compile of the UNet, with its attention's projections fused and its images as channels_last, on a GPU of the
    VAE's decoder too, tried by warm_up(), a call on a full batch. What is compiled stays in torch's own cache on the disk.

    Returns False, with a warning, where it fails (no compiler on the machine, say); UserError then if wanted is "on".
    """
    cuda = pipe.unet.device.type == "cuda"
    parts = [pipe.unet] + [pipe.vae.decoder] * cuda
    pipe.unet.__dict__.pop("known_projections", None)
    try:
        if pipe.unet._compiled_call_impl is None:
            pipe.unet.fuse_qkv_projections()
        for part in parts:
            part.to(memory_format=torch.channels_last)
            part.compile(options=INDUCTOR if cuda else None, fullgraph=True, dynamic=False)
        tqdm.write("compiling the UNet, which takes longest the first time", file=sys.stderr)
        # CUDA graphs are recorded in the second call.
        for _ in range(2):
            warm_up()
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        pipe.unet.unfuse_qkv_projections()
        for part in parts:
            part.to(memory_format=torch.contiguous_format)
            part._compiled_call_impl = None
        if wanted == "on":
            raise UserError(f"--compile on: torch.compile fails here ({first_line(e)[:200]}); use --compile off") from e
        print(f"warning: torch.compile fails here ({first_line(e)[:200]}); going on without", file=sys.stderr)
        return False


def eager():
    """torch.compile's models as they were, for what is done inside: batches of other sizes, which would be compiled anew."""
    return torch.compiler.set_stance("force_eager")


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionXLPipeline, prompts: list[str], negative: str, guided: bool):
    """SDXL's embeddings of B prompts: (B or 2B, 77, D) and pooled (B or 2B, P), the unconditional half first.

    An empty negative prompt means SDXL's own unconditional embeddings (zeros where the model's index says so).
    """
    unique = list(dict.fromkeys(prompts))
    rows = [unique.index(p) for p in prompts]
    text, no_text, pooled, no_pooled = pipe.encode_prompt(
        unique,
        device=pipe.unet.device,
        do_classifier_free_guidance=guided,
        negative_prompt=[negative] * len(unique) if negative else None,
    )
    if not guided:
        return text[rows], pooled[rows]
    return torch.cat([no_text[rows], text[rows]]), torch.cat([no_pooled[rows], pooled[rows]])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images of latents (B, 4, H, W): (B, 3, F H, F W), float32 in [-1, 1] or a little outside, NaN where the VAE
    overflowed. To bound memory, only as many are decoded together as have the area of one SDXL image. Each is copied, as a
    compiled decoder on a GPU writes the next ones over it."""
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    together = max(1, 128 * 128 // (latents.shape[-2] * latents.shape[-1]))
    return torch.cat([vae.decode(z, return_dict=False)[0].to(torch.float32, copy=True) for z in scaled.split(together)])


# --------------------------------------------------------------------------------------------------------------- images


def infotext(record: dict) -> str:
    """An image's settings in the form that AUTOMATIC1111's web UI writes into PNGs and reads back."""
    model = record["dpo_unet"] or record["base_model"]
    fields = {
        "Steps": record["num_inference_steps"],
        "Sampler": record.get("sampler", "DDIM"),
        "CFG scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": json.dumps(model) if re.search(r"[,:\n]", model) else model,
        "Eta DDIM": f"{record['eta']:g}",
        "Timestep spacing": record["timestep_spacing"],
        "Version": f"DIPO with diffusers {record['diffusers']}",
    }
    lines = [record["prompt"]]
    if record.get("dpo_lora"):
        fields["Lora"] = json.dumps(record["dpo_lora"])
    if record.get("guidance_interval"):
        fields["Guidance interval"] = "{:g}-{:g}".format(*record["guidance_interval"])
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in fields.items())])


def save_png(path: Path, image: Image.Image, record: dict) -> None:
    """Write a PNG with its settings (`parameters` for people and web UIs, `dipo` as JSON), aside and then renamed, so
    that a file under its final name is always whole."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", infotext(record))
    info.add_text("dipo", json.dumps(record))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    image.save(part, format="PNG", pnginfo=info)
    os.replace(part, path)


def is_whole(path: Path) -> bool:
    """Whether the file is there and ends as a PNG does."""
    try:
        with open(path, "rb") as f:
            f.seek(-12, os.SEEK_END)
            return f.read() == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    except OSError:
        return False


def read_record(path: Path) -> dict | None:
    """The settings inside a finished PNG of ours; None for a file that is missing, cut short or of other origin."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info["dipo"]) if is_whole(path) else None
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def fingerprint(*names: str) -> str:
    """A short hash that changes with the weights in model folders: names, sizes and last 64 KiB of their files.
    What is on the hub counts by its name alone."""
    digest = hashlib.sha256()
    for name in filter(None, names):
        path = find_path(name)
        digest.update(b"" if path else name.encode())
        files = (
            []
            if not path
            else [path]
            if path.is_file()
            else sorted(f for f in path.rglob("*.*") if f.suffix in (".safetensors", ".pt", ".bin"))
        )
        for file in files:
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}".encode())
            with open(file, "rb") as f:
                f.seek(max(0, file.stat().st_size - 65536))
                digest.update(f.read())
    return digest.hexdigest()[:12]


def difference(record: dict, wanted: dict) -> str | None:
    """The first setting in which a finished image differs from the wanted one, as a sentence; None if none does."""
    for key, value in wanted.items():
        if record.get(key) != value:
            return f"{key} {record.get(key)!r}, this run has {value!r}"
    return None


def make_grid(paths: list[Path], captions: list[str], columns: int, font: str = "") -> tuple[Image.Image, int]:
    """A grid of images with a caption under each, at most MAX_GRID_PIXELS, and how many images found room in it.

    Small images are enlarged to 192 pixels at least; large ones are scaled down, to no less than that, to fit.
    """
    with Image.open(paths[0]) as first:
        width, height = first.size
    cell = width * math.ceil(192 / width)
    rows = math.ceil(len(paths) / columns)

    def cell_height(cell: int) -> int:
        return round(cell * height / width) + round(caption_font(cell, font).size * 5)

    if columns * cell * rows * cell_height(cell) > MAX_GRID_PIXELS:
        cell = max(192, int(cell * math.sqrt(MAX_GRID_PIXELS / (columns * cell * rows * cell_height(cell)))))
        rows = min(rows, MAX_GRID_PIXELS // (columns * cell * cell_height(cell)) or 1)
    gap = max(4, cell // 40)
    step_x, step_y = cell + gap, cell_height(cell) + gap
    grid = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), "white")
    shown = min(len(paths), rows * columns)
    for i in range(shown):
        x, y = gap + i % columns * step_x, gap + i // columns * step_y
        with Image.open(paths[i]) as image:
            picture = image.convert("RGB").resize((cell, round(cell * height / width)), Image.Resampling.LANCZOS)
        grid.paste(picture, (x, y))
        draw_caption(grid, captions[i], x, y + picture.height, cell, caption_font(cell, font))
    return grid, shown


def caption_font(cell: int, name: str) -> ImageFont.FreeTypeFont:
    """The named font, or DejaVu Sans, which comes with matplotlib, in a size that suits the cell's width."""
    if name and not find_path(name):
        raise UserError(f"--font {name}: no such file; give a .ttf or .otf file")
    path = find_path(name) or Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    try:
        return ImageFont.truetype(str(path), max(12, cell // 20))
    except OSError as e:
        raise UserError(f"--font {name}: cannot be read as a font; give a .ttf or .otf file") from e


def draw_caption(
    grid: Image.Image, text: str, x: int, y: int, cell: int, font: ImageFont.FreeTypeFont, most: int = 3
) -> None:
    """Write text in up to `most` lines of the cell's width, centred, cut with an ellipsis."""
    lines = [""]
    for word in "".join(c if c.isprintable() else " " for c in text[:600]).split():
        for piece in [word[k : k + 20] for k in range(0, len(word), 20)]:
            joined = f"{lines[-1]} {piece}".strip()
            if font.getlength(joined) <= cell:
                lines[-1] = joined
            else:
                lines.append(piece)
    lines = [line for line in lines if line]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    draw = ImageDraw.Draw(grid)
    for k, line in enumerate(lines):
        while font.getlength(line) > cell:
            line = line[:-2].rstrip(" …") + "…"
        draw.text((x + cell / 2, y + font.size * (0.5 + 1.25 * k)), line, "black", font, anchor="ma")


# ----------------------------------------------------------------------------------------------------------------- main


def make_images(s: Settings) -> None:
    """The whole job, on every process of an accelerate launch."""
    if s.dpo_lora and s.dpo_unet == Settings.dpo_unet:
        s = replace(s, dpo_unet="")
    if s.demo:
        s = with_demo(s)
    check_settings(s)
    s = replace(s, negative_prompt=one_line(s.negative_prompt))
    prompts = read_prompts(s.prompts, s.parti, s.limit)
    # A process that is done early waits for the others longer than the ten minutes that NCCL would allow.
    state = PartialState(cpu=s.device == "cpu", timeout=timedelta(days=7))
    device = torch.device(s.device) if ":" in s.device else state.device
    if ":" in s.device:
        torch.cuda.set_device(device)
    dtype_name = s.dtype if s.dtype != "auto" else "fp32" if device.type == "cpu" else "fp16"
    try:
        out = Path(s.output_dir).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--output-dir {s.output_dir}: cannot be written to ({first_line(e)}); give another") from e

    quiet_libraries()
    with claimed(out, state):
        fill_folder(s, prompts, out, state, device, dtype_name)
    state.destroy_process_group()


@contextlib.contextmanager
def claimed(out: Path, state: PartialState, flag: str = "output-dir"):
    """Hold a folder's lock, on the main process; UserError on every process where another run holds it."""
    lock, taken = FileLock(out / ".lock", timeout=0), [False]
    if state.is_main_process:
        try:
            lock.acquire()
        except Timeout:
            taken = [True]
    broadcast_object_list(taken)
    if taken[0]:
        raise UserError(f"--{flag} {out}: another run is writing there; wait for it, or give another")
    try:
        yield
    finally:
        lock.release()


def fill_folder(
    s: Settings, prompts: list[str], out: Path, state: PartialState, device: torch.device, dtype_name: str
) -> None:
    """Make the images that the folder lacks, then its grid and table; UserError for what does not belong there."""
    height, width = image_size(s)
    kept = ("num_inference_steps", "eta", "guidance_scale", "negative_prompt", "timestep_spacing")
    kept += ("base_model", "dpo_unet", "vae") + (("dpo_lora",) if s.dpo_lora else ())
    common = {k: v for k, v in asdict(s).items() if k in kept} | {"height": height, "width": width, "dtype": dtype_name}
    common["guidance_interval"] = s.guidance_interval and list(s.guidance_interval)
    common["weights"] = fingerprint(s.base_model, s.dpo_unet, s.vae, s.dpo_lora)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}
    wanted = {
        out / f"{i:05d}.png": {"prompt": prompts[i // s.images_per_prompt], "seed": s.seed + i} | common
        for i in range(len(prompts) * s.images_per_prompt)
    }

    finished = {p: r for p in sorted(out.glob("[0-9]" * 5 + "*.png")) if (r := read_record(p))}
    if foreign := [p for p in wanted if p not in finished and is_whole(p)]:
        raise UserError(f"{foreign[0]} was not made by this script and would be lost; choose another --output-dir")
    differing = {
        p: d for p, r in finished.items() if (d := difference(r, wanted.get(p, common | {"seed": s.seed + int(p.stem)})))
    }
    if differing and not s.overwrite:
        path, what = next(iter(differing.items()))
        raise UserError(f"{path} was made with {what}; choose another --output-dir, or --overwrite to replace it")
    todo = [p for p in wanted if p not in finished or p in differing]
    # Every process has to have looked before the first one writes.
    state.wait_for_everyone()
    if state.is_main_process:
        for path in out.glob(".*.part"):
            path.unlink()
        if len(todo) < len(wanted):
            print(f"{len(wanted) - len(todo)} of {len(wanted)} images are in {out} already")
    state.wait_for_everyone()

    seconds = []
    if todo:
        pipe = load_pipeline(s, device, DTYPES[dtype_name])
        config = pipe.scheduler.config
        timesteps = ddim_timesteps(
            s.num_inference_steps, s.timestep_spacing, config.num_train_timesteps, config.steps_offset
        )
        if state.is_main_process:
            warn_of_long_prompts(pipe, [*prompts, s.negative_prompt])
            if timesteps[0] < 900:
                few = f"{s.num_inference_steps} {s.timestep_spacing} steps start at t = {timesteps[0]}"
                print(f"warning: {few}, not near 999; use --timestep-spacing trailing for so few", file=sys.stderr)
            if s.guidance_interval:
                guides = guided_steps(pipe.scheduler.alphas_cumprod, timesteps, s.guidance_interval)
                none = "" if any(guides) else "; that is --guidance-scale 1"
                print(f"guidance in {sum(guides)} of {len(guides)} steps{none}")
        with state.split_between_processes(todo) as share:
            seconds = sample_all(s, pipe, share, wanted, timesteps, height, width, versions)
    state.wait_for_everyone()
    if state.is_main_process:
        for path in differing.keys() - wanted.keys():
            path.unlink()
        finish(s, out, list(wanted), seconds)
        (out / ".lock").unlink()


def sample_all(s, pipe, share, wanted, timesteps, height, width, versions) -> list[float]:
    """Make the images of this process, batch by batch, halving the batch when the memory runs out. Returns the seconds
    per image of each batch."""
    left, seconds, batch_size = list(share), [], min(s.batch_size, max(1, len(share)))
    guided, device = s.guidance_scale > 1, pipe.unet.device
    calls = len(timesteps) * (len(share) // batch_size)
    compiling = s.compile == "on" or (s.compile == "auto" and calls >= COMPILE_FROM)
    compiled_for = 0
    guides = guided_steps(pipe.scheduler.alphas_cumprod, timesteps, s.guidance_interval)
    # Two steps, and one wherever guidance begins or ends, as that is another batch for the UNet.
    short = [t for i, t in enumerate(timesteps) if i < 2 or guides[i] != guides[i - 1]]
    bar = tqdm(total=len(left) * len(timesteps), unit="step", disable=not PartialState().is_local_main_process)

    def halve() -> int:
        nonlocal batch_size, compiling
        batch_size //= 2
        # What was compiled for larger batches holds memory.
        torch.compiler.reset()
        if batch_size:
            compiling = compiling and (s.compile == "on" or len(timesteps) * (len(left) // batch_size) >= COMPILE_FROM)
            tqdm.write(f"out of memory: going on with batches of {batch_size}", file=sys.stderr)
        return batch_size

    def make(records: list[dict], timesteps: list[int], on_step) -> torch.Tensor:
        embeds = encode_prompts(pipe, [r["prompt"] for r in records], s.negative_prompt, guided)
        generators = [torch.Generator().manual_seed(r["seed"]) for r in records]
        sizes = (generators, height, width, s.guidance_scale, s.eta, pipe.vae_scale_factor)
        alphas = pipe.scheduler.alphas_cumprod
        latents = ddim_sample(pipe.unet, alphas, timesteps, *embeds, *sizes, on_step, s.guidance_interval)
        return decode(pipe.vae, latents)

    def run(batch_size: int) -> None:
        nonlocal compiling, compiled_for, writing
        while left:
            paths = left[:batch_size]
            records = [wanted[p] for p in paths]
            if compiling and len(paths) == batch_size != compiled_for:
                bar.set_description("compiling")
                compiling = compile_unet(pipe, lambda records=records: make(records, short, lambda: None), s.compile)
                compiled_for = batch_size
            bar.set_description(f"image {len(share) - len(left) + 1}-{len(share) - len(left) + len(paths)} of {len(share)}")
            bar.n = (len(share) - len(left)) * len(timesteps)
            with contextlib.nullcontext() if compiling and len(paths) == batch_size else eager():
                start = time.perf_counter()
                images = make(records, timesteps, functools.partial(bar.update, len(paths)))
                finite = images.isfinite().flatten(1).all(dim=1).tolist()
                pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                each = (time.perf_counter() - start) / len(paths)
            where = device_name(device) + ", compiled" * (compiling and len(paths) == batch_size)
            measured = {"seconds_per_image": round(each, 4), "batch_size": len(paths), "device": where}
            # PNGs are written while the next batch is sampled; what went wrong with the last ones is raised here.
            for written in writing:
                written.result()
            writing = []
            for path, x, is_finite, record in zip(paths, pixels, finite, records, strict=True):
                if not is_finite:
                    raise ImageError(
                        f"the image of prompt {record['prompt']!r} with seed {record['seed']} came out with NaN; "
                        f"try --dtype bf16 or fp32, and with fp16 a VAE that can stand it ({Settings.vae})"
                    )
                writing.append(writer.submit(save_png, path, Image.fromarray(x), record | measured | versions))
            seconds.append(each)
            del left[: len(paths)]

    writing = []
    try:
        with ThreadPoolExecutor(1) as writer:
            find_executable_batch_size(run, starting_batch_size=batch_size, reduce_batch_size_fn=halve)()
        for written in writing:
            written.result()
    except RuntimeError as e:
        if "No executable batch size" in str(e):
            raise UserError("one image alone does not fit into the memory; use a smaller --height and --width") from e
        raise
    finally:
        bar.close()
    return seconds


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def finish(s: Settings, out: Path, paths: list[Path], seconds: list[float]) -> None:
    """Write images.csv and grid.png from the finished PNGs, and say where they are."""
    records = [{"file": p.name} | read_record(p) for p in paths]
    rows = [{k: csv_text(v) if isinstance(v, str) else v for k, v in r.items()} for r in records]
    pd.DataFrame(rows).to_csv(out / ".images.csv.part", index=False)
    os.replace(out / ".images.csv.part", out / "images.csv")
    columns = s.images_per_prompt if 1 < s.images_per_prompt <= 8 else min(len(paths), max(4, math.isqrt(len(paths))))
    grid, shown = make_grid(paths, [r["prompt"] for r in records], columns, s.font)
    grid.save(out / ".grid.png.part", format="PNG")
    os.replace(out / ".grid.png.part", out / "grid.png")
    speed = f"{np.median(seconds):.2f} s per image (median over batches), " if seconds else ""
    note = "" if shown == len(paths) else f" (the first {shown} images)"
    print(f"{len(paths)} images, {speed}{out / 'images.csv'}, {out / 'grid.png'}{note}")


def parse_settings(cls, description: str):
    """The settings dataclass from the command line by tyro; what it says of a bad flag, in a box of several lines, becomes
    one line. Exit code 2 then."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, description=description)
    except SystemExit:
        if said.getvalue():
            # Without the frame, bold type and the help that follows.
            text = re.sub(r"\x1b\[[\d;]*m|\[/?bold\]|[\u2500-\u257f]", " ", said.getvalue())
            print("error:", " ".join(text.split()).partition(" Argument helptext:")[0], file=sys.stderr)
        raise


def main() -> None:
    s = parse_settings(Settings, __doc__)
    try:
        make_images(s)
    except UserError as e:
        if isinstance(e, ImageError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"error: {s.output_dir}: {e.strerror}; finished images are kept, make room and run it again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"stopped; finished images are in {s.output_dir}, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
