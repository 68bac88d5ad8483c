"""Table 1 and Figure 1: DIPO at 20 to 100 DDIM steps against Diffusion-DPO's 500 and 800, in quality and in time.

Both sides sample the same DPO-trained UNet from the same prompts and initial noise: DIPO by DDIM (eta = 0), Diffusion-DPO by
ancestral DDPM (eta = 1) on its longer subsequence.

    python compare_quality.py --demo                                           # the small model in assets/demo, without GPU
    python compare_quality.py --limit 20                                       # SDXL, 20 of our prompts for each category
    accelerate launch compare_quality.py --prompts parti --limit 25 --output-dir generated_images/parti_quality
    python compare_quality.py --samplers dpmsolver++ unipc euler               # what else one could use at 20 and 30 steps
    python compare_quality.py --score-only                                     # tables of the images that are there
    python compare_quality.py --folders generated_images/a generated_images/b  # scores what hasty_sample.py left there

Images come first (a folder of PNGs for each row of the table, settings inside), scores after (scores.csv, image by image),
then table1.csv, wins.csv, quality.png and .pdf, and grid.png. A run that was stopped at any moment goes on when the same
command is given again; more steps or samplers add what is missing only.

PickScore is 100 times a cosine at its trained scale (near 22), HPSv2 a cosine (near 0.28), CLIPScore 2.5 times a cosine, 0
at the least (near 0.66). Seconds per image are measured after a warm-up, the device synchronised, at the batch size in the
table; decoding is counted apart. To use other models, edit the paths at the top of Settings or pass them as flags.
"""

import contextlib
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import diffusers
import huggingface_hub
import huggingface_hub.errors
import matplotlib
import numpy as np
import open_clip
import pandas as pd
import scipy.stats
import torch
import torchvision.transforms.v2.functional as TF
import transformers
import tyro
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, find_executable_batch_size
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel


@dataclass
class Settings:
    base_model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """SDXL pipeline: a folder or a hub name"""
    dpo_unet: str = "mhdang/dpo-sdxl-text2image-v1"
    """DPO-trained UNet: a folder or a hub name, with or without a subfolder unet; empty: the base model's own"""
    dpo_lora: str = ""
    """DPO-trained LoRA instead: a folder, a .safetensors file or a hub name"""
    vae: str = "madebyollin/sdxl-vae-fp16-fix"
    """VAE that stays finite in fp16: a folder or a hub name; empty: the base model's own"""
    pickscore: str = "yuvalkirstain/PickScore_v1"
    """PickScore's CLIP model: a folder or a hub name"""
    pickscore_processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """its processor: a folder or a hub name"""
    hpsv2: str = "xswu/HPSv2"
    """HPSv2's checkpoint: a .pt file, a folder or a hub name that holds it"""
    clip: str = "openai/clip-vit-base-patch32"
    """CLIPScore's CLIP model and processor: a folder or a hub name; empty: no CLIPScore"""
    parti: str = "nateraw/parti-prompts"
    """data set behind --prompts parti: a folder or a hub name"""
    pickapic: str = "yuvalkirstain/pickapic_v2"
    """data set behind --prompts pickapic: a folder or a hub name"""

    demo: bool = False
    """the small model, prompts and judges of assets/demo: no CLIPScore, all samplers, 8 prompts of each category, batches of
    12; sets whatever is left at its default"""
    prompts: str = "assets/prompts"
    """a folder with a .txt for each category, a .txt, a .csv or .parquet with columns prompt and (if any) category, or
    parti, pickapic (its test prompts) or hpdv2 (HPSv2's benchmark, its styles as categories)"""
    categories: tuple[str, ...] = ()
    """use these categories only"""
    limit: int | None = None
    """use the first N prompts only, of each category where there are categories"""
    images_per_prompt: int = 1
    """images of each prompt; intervals of means count prompts, those of win rates images"""
    output_dir: str = "generated_images/compare_quality"
    """where everything goes; with --demo its subfolder demo"""
    overwrite: bool = False
    """replace images in the output folder that were made with other settings"""
    score_only: bool = False
    """sample nothing: score the images that are there and make the tables of them"""
    folders: tuple[str, ...] = ()
    """instead of the study, score these folders of finished images (hasty_sample.py's)"""
    grid_prompts: int = 16
    """prompts shown in the grid"""
    font: str = ""
    """a .ttf or .otf file for the grid; empty: DejaVu Sans, which has no Chinese, Japanese or emoji"""

    steps: tuple[int, ...] = (20, 30, 50, 100)
    """DIPO's steps"""
    baseline_steps: tuple[int, ...] = (500, 800)
    """Diffusion-DPO's steps; all else is compared with the first of them"""
    samplers: tuple[str, ...] = ()
    """other samplers beside them: dpmsolver++, unipc, euler"""
    sampler_steps: tuple[int, ...] = (20, 30)
    """the other samplers' steps"""
    eta: float = 0.0
    """DIPO's share of the ancestral noise, 0 to 1; Diffusion-DPO's is 1"""
    guidance_scale: float = 5.0
    """classifier-free guidance; 1 or less switches it off, for half the operations"""
    timestep_spacing: str = "leading"
    """leading (SDXL's own), trailing or linspace"""
    seed: int = 0
    """image number i is drawn from seed + i, under every sampler"""
    height: int | None = None
    """pixels; default: the model's own, 1024 for SDXL"""
    width: int | None = None
    """pixels; default: the model's own, 1024 for SDXL"""

    hpsv2_version: str = "v2.1"
    """v2.1 or v2.0"""
    batch_size: int = 4
    """images sampled together; halved when the GPU's memory runs out"""
    compile: str = "auto"
    """torch.compile of the UNet for full batches: on, off, or auto: where a process has 10,000 calls of it ahead"""
    scoring_batch_size: int = 16
    """images scored together"""
    dtype: str = "auto"
    """fp16, bf16, fp32, or auto: fp16 on a GPU, fp32 on the CPU"""
    device: str = "auto"
    """cuda, cuda:1, mps, cpu, or auto: the first of these that is there"""


DEMO_JUDGES = {
    "pickscore": "assets/demo/pickscore",
    "pickscore_processor": "assets/demo/pickscore",
    "hpsv2": "assets/demo/hpsv2",
    "clip": "",
}
# What --demo sets wherever the command line left the default.
DEMO = DEMO_JUDGES | {
    "base_model": "assets/demo/sdxl",
    "dpo_unet": "assets/demo/dpo-unet",
    "vae": "",
    "pickapic": "assets/demo/pickapic",
    "prompts": "assets/demo/prompts",
    "limit": 8,
    "samplers": ("dpmsolver++", "unipc", "euler"),
    "batch_size": 12,
    "output_dir": "generated_images/compare_quality/demo",
}
# Table 1 of the paper: PickScore, seconds per image and speed-up as printed (126.28 s / 5.34 s is 23.65).
PAPER = {
    "dipo-20": (22.0609, 5.34, 23.80),
    "dipo-50": (22.3247, 12.87, 9.87),
    "diffusion-dpo-500": (22.6312, 126.28, 1.00),
}
SAMPLERS = {
    "dpmsolver++": ("DPM-Solver++ 2M", DPMSolverMultistepScheduler),
    "unipc": ("UniPC", UniPCMultistepScheduler),
    "euler": ("Euler", EulerDiscreteScheduler),
}
# The files that hpsv2.utils.hps_version_map names.
HPSV2_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
# Hessel et al. 2021, section 3: what captions start with.
CLIPSCORE_PREFIX = "A photo depicts "
# What a score is called, and its decimals.
SCORES = {"pickscore": ("PickScore", 3), "hpsv2": ("HPSv2", 4), "clipscore": ("CLIPScore", 4)}
# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#999999"
# Copied from hasty_sample.DTYPES
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Copied from hasty_sample.SPACINGS
SPACINGS = ("leading", "trailing", "linspace")
# Copied from hasty_sample.MAX_GRID_PIXELS
MAX_GRID_PIXELS = 25_000_000
# Copied from hasty_sample.COMPILE_FROM
COMPILE_FROM = 10_000


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: a UNet under a sampler. name is its folder, label what tables and pictures call it."""

    name: str
    label: str
    steps: int
    eta: float = 0.0
    sampler: str = "DDIM"
    base_unet: bool = False


# Copied from hasty_sample.UserError
class UserError(Exception):
    """Something that the user can put right; ends the script with one line and exit code 2."""


# Copied from hasty_sample.ImageError
class ImageError(UserError):
    """The same, found by one process of several."""


# ------------------------------------------------------------------------------------------------------------- settings


# Copied from hasty_sample.find_path
def find_path(name: str) -> Path | None:
    """A file or folder given relative to the current folder or to this script's; None where neither exists."""
    try:
        for path in (Path(name).expanduser(), Path(__file__).resolve().parent / name):
            if name and path.exists():
                return path
    except (OSError, RuntimeError):
        pass
    return None


# Copied from hasty_sample.first_line
def first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


# Copied from hasty_sample.root_cause
def root_cause(e: BaseException) -> BaseException:
    """The first of the hub's own errors among those that led to an exception; the exception itself if there is none."""
    links = [e]
    for link in links:
        if isinstance(link, (huggingface_hub.errors.EntryNotFoundError, huggingface_hub.errors.HfHubHTTPError)):
            return link
        links += [x for x in (link.__cause__, link.__context__) if x is not None and x not in links]
    return e


# Copied from hasty_sample.quiet_libraries
def quiet_libraries() -> None:
    """No loading bars and no advice between our own lines, and no report of a variant that is tried and not there."""
    diffusers.utils.logging.set_verbosity(diffusers.logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)


def with_demo(s: Settings) -> Settings:
    """The settings with those of DEMO wherever they were left at their defaults."""
    if not find_path(DEMO["base_model"]):
        raise UserError(
            f"--demo needs {DEMO['base_model']} beside {Path(__file__).name}: run it inside a clone of the repository"
        )
    default = type(s)()
    return replace(s, **{k: v for k, v in DEMO.items() if getattr(s, k) == getattr(default, k)})


def check_settings(s: Settings) -> None:
    """Raise UserError for every value that can be judged without loading a model."""
    check_scorers(s)
    if s.folders:
        for folder in s.folders:
            if not find_path(folder) or not find_path(folder).is_dir():
                raise UserError(f"--folders {folder}: no such folder; give one that hasty_sample.py made images in")
        return
    check_common(s)
    check_steps("steps", s.steps)
    check_steps("baseline-steps", s.baseline_steps)
    check_steps("sampler-steps", s.sampler_steps)
    if unknown := [x for x in s.samplers if x not in SAMPLERS]:
        raise UserError(f"--samplers {unknown[0]!r}: use any of {', '.join(SAMPLERS)}")
    for name, n in ((x, n) for x in s.samplers for n in s.sampler_steps):
        # Their whole-number strides leave the noisiest timesteps out where there are many steps.
        scheduler = SAMPLERS[name][1](timestep_spacing=s.timestep_spacing, steps_offset=1)
        scheduler.set_timesteps(n)
        if scheduler.timesteps[0] < 1000 - 2.5 * 1000 / n:
            where = (
                f"{n} {s.timestep_spacing} steps of {name} would start at t = {scheduler.timesteps[0]:.0f} from pure noise"
            )
            raise UserError(f"--sampler-steps: {where}; use fewer, or --timestep-spacing trailing")
    if not 0 <= s.eta <= 1:
        raise UserError(f"--eta {s.eta}: use 0 (DDIM, deterministic) to 1 (as random as DDPM)")
    if s.grid_prompts < 1:
        raise UserError(f"--grid-prompts {s.grid_prompts}: use 1 or more")


def check_steps(flag: str, steps: tuple[int, ...]) -> None:
    if not steps or len(set(steps)) < len(steps) or not all(1 <= n <= 1000 for n in steps):
        raise UserError(f"--{flag} {' '.join(map(str, steps))}: give different numbers of steps from 1 to 1000")


def check_scorers(s: Settings) -> None:
    """Raise UserError for scorers' settings that can be judged without loading them."""
    if s.hpsv2_version not in HPSV2_FILES:
        raise UserError(f"--hpsv2-version {s.hpsv2_version!r}: use one of {', '.join(HPSV2_FILES)}")
    if s.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {s.dtype!r}: use auto, {', '.join(DTYPES)}")
    if s.scoring_batch_size < 1:
        raise UserError(f"--scoring-batch-size {s.scoring_batch_size}: use 1 or more")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", s.device):
        raise UserError(f"--device {s.device!r}: use auto, cuda, cuda:1, mps or cpu")
    if s.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {s.device}: no CUDA GPU is visible to torch here; use --device cpu, or fix the driver")


# Copied from hasty_sample.check_common
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


# Copied from hasty_sample.check_model_path
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


def study_prompts(s: Settings) -> list[tuple[str, str]]:
    """The prompts with their categories ("" where there are none). Categories come in turn, so that a larger --limit adds
    prompts at the end only. Raises UserError for what is missing, empty or not readable."""
    try:
        table = prompt_table(s).astype(object)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--prompts {s.prompts}: cannot be read: {first_line(root_cause(e))[:200]}") from e
    for column in table:
        table[column] = table[column].where(table[column].notna(), "").astype(str).map(one_line)
    table = table[table["prompt"] != ""]
    there = list(dict.fromkeys(table["category"]))
    if unknown := [c for c in s.categories if c not in there]:
        known = f"its categories are {', '.join(there)}" if any(there) else "its prompts have no categories"
        raise UserError(f"--categories {unknown[0]!r}: not in --prompts {s.prompts}; {known}")
    if s.categories:
        table = table[table["category"].isin(s.categories)]
    if table.empty:
        raise UserError(f"--prompts {s.prompts}: holds no prompt; put one on each line, or in the column prompt")
    rank = table.groupby("category", sort=False).cumcount()
    table = table[rank < (s.limit or len(table))]
    return list(table.assign(rank=rank).sort_values("rank", kind="stable")[["prompt", "category"]].itertuples(False, None))


# Copied from hasty_sample.one_line
def one_line(text: str) -> str:
    """Text without control characters, with single blanks for its whitespace, which is how CLIP's tokenizers read it too."""
    return " ".join("".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cc").split())


# Copied from hasty_sample.csv_text
def csv_text(text: str) -> str:
    """Text for a cell of a CSV: with an apostrophe in front where a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


# Copied from hasty_sample.read_csv
def read_csv(path: Path) -> pd.DataFrame:
    """A CSV as text; ValueError where a row has more cells than the header, which pandas would take for an index."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("a row has more cells than the header; put quotes around prompts with commas")
    return table


def prompt_table(s: Settings) -> pd.DataFrame:
    """Columns prompt and category of --prompts, in its order."""
    path = find_path(s.prompts)
    if s.prompts == "parti":
        import datasets

        table = datasets.load_dataset(str(find_path(s.parti) or s.parti), split="train").to_pandas()
    elif s.prompts == "pickapic":
        import datasets

        if local := find_path(s.pickapic):
            files = [str(f) for f in sorted(local.rglob("test*.parquet"))]
            rows = datasets.load_dataset("parquet", data_files=files, split="train", columns=["caption"])
        else:
            # Each prompt of the test set once: Kirstain et al. 2023, section 2. Its pictures are not read.
            rows = datasets.load_dataset(s.pickapic, split="test_unique", streaming=True, columns=["caption"])
        table = pd.DataFrame({"prompt": list(dict.fromkeys(row["caption"] for row in rows))})
    elif s.prompts == "hpdv2":
        import hpsv2

        styles = hpsv2.benchmark_prompts("all")
        table = pd.DataFrame(
            [(p, style) for style, prompts in styles.items() for p in prompts], columns=["prompt", "category"]
        )
    elif path and path.is_dir():
        texts = {f.stem: f.read_text(encoding="utf-8-sig").splitlines() for f in sorted(path.glob("*.txt"))}
        table = pd.DataFrame([(p, name) for name, lines in texts.items() for p in lines], columns=["prompt", "category"])
    elif path and path.suffix.lower() == ".txt":
        table = pd.DataFrame({"prompt": path.read_text(encoding="utf-8-sig").splitlines()})
    elif path and path.suffix.lower() == ".csv":
        table = read_csv(path)
    elif path and path.suffix.lower() == ".parquet":
        table = pd.read_parquet(path)
    else:
        what = "of no known kind" if path else "no such file or folder"
        raise UserError(
            f"--prompts {s.prompts}: {what}; give a folder of .txt files, a .txt, .csv or .parquet, parti, pickapic or hpdv2"
        )
    table = table.rename(columns={c: str(c).lower() for c in table.columns})
    if "prompt" not in table:
        raise UserError(f"--prompts {s.prompts}: has no column prompt; its columns are {', '.join(map(str, table.columns))}")
    return table.reindex(columns=["prompt", "category"]).copy()


# --------------------------------------------------------------------------------------------------------------- models


# Copied from hasty_sample.load_part
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


# Copied from hasty_sample.load_pipeline
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


# Copied from hasty_sample.merge_lora
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


# Copied from hasty_sample.load_config
def load_config(cls, flag: str, name: str, s: Settings, subfolder: str) -> dict:
    """The configuration of one model, from the base model where name is empty; UserError if it is of another class."""
    flag, name = (flag, name) if name else ("base-model", s.base_model)
    config = load_part(cls.load_config, flag, name, subfolder, torch.float32)
    if config.get("_class_name") != cls.__name__:
        raise UserError(f"--{flag} {name}: holds {config.get('_class_name')}, not the {cls.__name__} that is needed here")
    return config


# Copied from hasty_sample.image_size
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


# Copied from hasty_sample.warn_of_long_prompts
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


# Copied from hasty_sample.ddim_timesteps
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


# Copied from hasty_sample.ddim_coefficients
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


# Copied from hasty_sample.draw_noise
def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Normal noise, float32 (B, *shape), image by image from its own CPU generator, so that it is the same on every
    device and in every batch; copied without waiting."""
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return (noise.pin_memory() if device.type == "cuda" else noise).to(device, non_blocking=device.type == "cuda")


# Copied from hasty_sample.guided_steps
def guided_steps(
    alphas_cumprod: torch.Tensor, timesteps: list[int], interval: tuple[float, float] | None = None
) -> list[bool]:
    """Which steps guide, those of a noise level low < sigma <= high (Kynkäänniemi et al. 2024, equation 6); None: all.

    alphas_cumprod: alpha_bar of all training timesteps, (T,); sigma is sqrt(1 / alpha_bar - 1).
    """
    low, high = interval or (0, math.inf)
    sigma = (1 / alphas_cumprod.double().cpu()[timesteps] - 1).sqrt()
    return ((low < sigma) & (sigma <= high)).tolist()


# Copied from hasty_sample.Given
class Given(torch.nn.Module):
    """A layer whose output is known."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.register_buffer("output", output, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


# Copied from hasty_sample.text_projected_once
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


# Copied from hasty_sample.ddim_sample
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


@torch.no_grad()
def scheduler_sample(
    unet: UNet2DConditionModel,
    scheduler,
    steps: int,
    prompt_embeds: torch.Tensor,
    pooled_embeds: torch.Tensor,
    generators: list[torch.Generator],
    height: int,
    width: int,
    guidance_scale: float = 5.0,
    vae_scale_factor: int = 8,
    on_step=lambda: None,
) -> torch.Tensor:
    """Sample SDXL latents as ddim_sample does, from the same initial noise, by a deterministic scheduler of diffusers."""
    device, dtype, batch = prompt_embeds.device, prompt_embeds.dtype, len(generators)
    guided = prompt_embeds.shape[0] == 2 * batch
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=dtype)
    conditions = {"text_embeds": pooled_embeds, "time_ids": time_ids.expand(prompt_embeds.shape[0], -1)}
    scheduler.set_timesteps(steps, device=device)
    # Without it each scheduler looks its step up on the device, and waits.
    scheduler.set_begin_index(0)
    shape = (unet.config.in_channels, height // vae_scale_factor, width // vae_scale_factor)
    x = draw_noise(generators, shape, device) * scheduler.init_noise_sigma
    with text_projected_once(unet, prompt_embeds):
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t).to(dtype)
            e = unet(model_input, t, encoder_hidden_states=prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]
            e = e.float()
            if guided:
                e_uncond, e_cond = e.chunk(2)
                e = e_uncond + guidance_scale * (e_cond - e_uncond)
            x = scheduler.step(e, t, x, return_dict=False)[0]
            on_step()
    return x


def sample_latents(s: Settings, pipe, v: Variant, records: list[dict], on_step=lambda: None) -> torch.Tensor:
    """Latents (B, 4, H/8, W/8) of a batch of images under one variant."""
    embeds = encode_prompts(pipe, [r["prompt"] for r in records], "", s.guidance_scale > 1)
    generators = [torch.Generator().manual_seed(r["seed"]) for r in records]
    height, width, config = records[0]["height"], records[0]["width"], pipe.scheduler.config
    sizes = (generators, height, width, s.guidance_scale)
    if v.sampler != "DDIM":
        cls = next(cls for label, cls in SAMPLERS.values() if label == v.sampler)
        scheduler = cls.from_config(config, timestep_spacing=s.timestep_spacing)
        return scheduler_sample(pipe.unet, scheduler, v.steps, *embeds, *sizes, pipe.vae_scale_factor, on_step)
    timesteps = ddim_timesteps(v.steps, s.timestep_spacing, config.num_train_timesteps, config.steps_offset)
    alphas = pipe.scheduler.alphas_cumprod
    return ddim_sample(pipe.unet, alphas, timesteps, *embeds, *sizes, v.eta, pipe.vae_scale_factor, on_step)


# Copied from hasty_sample.INDUCTOR
INDUCTOR = {
    "max_autotune": True,
    "triton.cudagraphs": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "conv_1x1_as_mm": True,
    "epilogue_fusion": False,
}


# Copied from hasty_sample.compile_unet
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


# Copied from hasty_sample.eager
def eager():
    """torch.compile's models as they were, for what is done inside: batches of other sizes, which would be compiled anew."""
    return torch.compiler.set_stance("force_eager")


# Copied from hasty_sample.encode_prompts
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


# Copied from hasty_sample.decode
@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images of latents (B, 4, H, W): (B, 3, F H, F W), float32 in [-1, 1] or a little outside, NaN where the VAE
    overflowed. To bound memory, only as many are decoded together as have the area of one SDXL image. Each is copied, as a
    compiled decoder on a GPU writes the next ones over it."""
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    together = max(1, 128 * 128 // (latents.shape[-2] * latents.shape[-1]))
    return torch.cat([vae.decode(z, return_dict=False)[0].to(torch.float32, copy=True) for z in scaled.split(together)])


# --------------------------------------------------------------------------------------------------------------- images


# Copied from hasty_sample.infotext
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


# Copied from hasty_sample.save_png
def save_png(path: Path, image: Image.Image, record: dict) -> None:
    """Write a PNG with its settings (`parameters` for people and web UIs, `dipo` as JSON), aside and then renamed, so
    that a file under its final name is always whole."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", infotext(record))
    info.add_text("dipo", json.dumps(record))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    image.save(part, format="PNG", pnginfo=info)
    os.replace(part, path)


# Copied from hasty_sample.is_whole
def is_whole(path: Path) -> bool:
    """Whether the file is there and ends as a PNG does."""
    try:
        with open(path, "rb") as f:
            f.seek(-12, os.SEEK_END)
            return f.read() == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    except OSError:
        return False


# Copied from hasty_sample.read_record
def read_record(path: Path) -> dict | None:
    """The settings inside a finished PNG of ours; None for a file that is missing, cut short or of other origin."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info["dipo"]) if is_whole(path) else None
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


# Copied from hasty_sample.fingerprint
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


# Copied from hasty_sample.difference
def difference(record: dict, wanted: dict) -> str | None:
    """The first setting in which a finished image differs from the wanted one, as a sentence; None if none does."""
    for key, value in wanted.items():
        if record.get(key) != value:
            return f"{key} {record.get(key)!r}, this run has {value!r}"
    return None


# Copied from hasty_sample.device_name
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def wanted_images(s: Settings, variants: list[Variant], prompts: list[tuple[str, str]], dtype_name: str) -> dict[str, dict]:
    """The settings of every image of the study by its file in the output folder. Image i has the same prompt and seed, and
    so the same initial noise, under every variant."""
    height, width = image_size(s)
    common = {"guidance_scale": s.guidance_scale, "negative_prompt": "", "timestep_spacing": s.timestep_spacing}
    common |= {"base_model": s.base_model, "vae": s.vae, "height": height, "width": width}
    # Images may have been made on another machine than the one that scores them.
    common |= {} if s.score_only else {"dtype": dtype_name}
    wanted = {}
    for v in variants:
        unet = {"dpo_unet": "", "dpo_lora": ""} if v.base_unet else {"dpo_unet": s.dpo_unet, "dpo_lora": s.dpo_lora}
        weights = fingerprint(s.base_model, *unet.values(), s.vae)
        sampler = {"num_inference_steps": v.steps, "eta": v.eta, "sampler": v.sampler}
        for i in range(len(prompts) * s.images_per_prompt):
            prompt, category = prompts[i // s.images_per_prompt]
            image = {"prompt": prompt, "category": category, "seed": s.seed + i}
            wanted[f"{v.name}/{i:05d}.png"] = image | sampler | common | unet | {"weights": weights}
    return wanted


def finished_images(s: Settings, out: Path, wanted: dict[str, dict]) -> dict[str, dict]:
    """The records of those wanted images that are there. UserError for files that would be lost."""
    done = {}
    for file, settings in wanted.items():
        record = read_record(out / file)
        if record is None and is_whole(out / file):
            raise UserError(f"{out / file} was not made by this script and would be lost; choose another --output-dir")
        what = difference(record, settings) if record else None
        if what and not s.overwrite:
            raise UserError(f"{out / file} was made with {what}; choose another --output-dir, or --overwrite to replace it")
        if record and not what:
            done[file] = record
    return done


def make_images(s: Settings, variants: list[Variant], todo: dict[str, dict], out: Path, state, device, dtype) -> None:
    """Sample this process's share of the missing images, variant by variant, and save each with its settings and times."""
    shares = {
        v: [f for f in todo if f.split("/")[0] == v.name][state.process_index :: state.num_processes] for v in variants
    }
    total = sum(v.steps * len(files) for v, files in shares.items())
    pipe, loaded, warm, fast = None, None, set(), {}
    with tqdm(total=total, unit="step", unit_scale=True, disable=not state.is_local_main_process) as bar:
        for v, files in sorted(shares.items(), key=lambda x: x[0].base_unet):
            if not files:
                continue
            if loaded != v.base_unet:
                pipe = None
                free_memory(device)
                pipe = load_pipeline(replace(s, dpo_unet="", dpo_lora="") if v.base_unet else s, device, dtype)
                if state.is_main_process and loaded is None:
                    warn_of_long_prompts(pipe, [r["prompt"] for r in todo.values()])
                loaded = v.base_unet
                calls = sum(w.steps * (len(f) // s.batch_size) for w, f in shares.items() if w.base_unet == loaded)
                on = s.compile == "on" or (s.compile == "auto" and calls >= COMPILE_FROM)
                fast = {"on": on, "size": s.batch_size, "compiled": 0}
            bar.set_description(v.label)
            sample_variant(s, pipe, v, files, todo, out, bar, warm, fast)


def sample_variant(
    s: Settings, pipe, v: Variant, files: list[str], todo: dict[str, dict], out: Path, bar, warm: set, fast: dict
) -> None:
    """Make the files of one variant, batch by batch, halving the batch when the memory runs out. warm: the samplers, UNets
    and batch sizes that have run before, so that no time includes what happens once. fast: whether batches of a size are
    to be compiled, and for which size that is done."""
    left, device, batch_size = list(files), pipe.unet.device, min(s.batch_size, len(files))
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}

    def halve() -> int:
        nonlocal batch_size
        batch_size //= 2
        # What was compiled for larger batches holds memory.
        torch.compiler.reset()
        fast["size"] = batch_size
        if batch_size:
            tqdm.write(f"out of memory: going on with batches of {batch_size}", file=sys.stderr)
        return batch_size

    def run(batch_size: int) -> None:
        while left:
            names = left[:batch_size]
            records = [todo[f] for f in names]
            kind, full = (v.sampler, v.base_unet, len(names)), len(names) == fast["size"]

            def short(records=records):
                decode(pipe.vae, sample_latents(s, pipe, replace(v, steps=2), records))

            if fast["on"] and full and fast["compiled"] != fast["size"]:
                fast.update(on=compile_unet(pipe, short, s.compile), compiled=fast["size"])
            with contextlib.nullcontext() if fast["on"] and full else eager():
                if kind not in warm:
                    short()
                    warm.add(kind)
                before = bar.n
                start = clock(device)
                try:
                    latents = sample_latents(s, pipe, v, records, functools.partial(bar.update, len(names)))
                except torch.OutOfMemoryError:
                    bar.n = before
                    raise
                sampled = clock(device)
                images = decode(pipe.vae, latents)
                decoded = clock(device)
            measured = {
                "seconds_sampling": round((sampled - start) / len(names), 5),
                "seconds_decoding": round((decoded - sampled) / len(names), 5),
                "batch_size": len(names),
                "device": device_name(device) + ", compiled" * (fast["on"] and full),
            }
            for file, image, record in zip(names, images.cpu(), records, strict=True):
                if not torch.isfinite(image).all():
                    raise ImageError(
                        f"the image of prompt {record['prompt']!r} with seed {record['seed']} came out with NaN; "
                        f"try --dtype bf16 or fp32, and with fp16 a VAE that can stand it ({Settings.vae})"
                    )
                pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                save_png(out / file, Image.fromarray(pixels), record | measured | versions)
            del left[: len(names)]

    try:
        find_executable_batch_size(run, starting_batch_size=batch_size, reduce_batch_size_fn=halve)()
    except RuntimeError as e:
        if "No executable batch size" in str(e):
            raise UserError("one image alone does not fit into the memory; use a smaller --height and --width") from e
        raise


def clock(device: torch.device) -> float:
    """Seconds, read when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


# -------------------------------------------------------------------------------------------------------------- scorers


@contextlib.contextmanager
def loading(flag: str, name: str, *files: str):
    """UserError instead of whatever goes wrong while a scorer's weights (of these files) are loaded."""
    try:
        yield
    except Exception as e:
        setting = flag.replace("-", "_")
        what, reason = " and ".join(files) or "it", first_line(root_cause(e))[:200]
        command = " ".join(["hf download", getattr(Settings, setting), *files])
        raise UserError(
            f"--{flag} {name}: {what} cannot be loaded ({reason}); get it with {command!r}, or set {setting} at the top of "
            f"{Path(__file__).name} to a copy; images that are made already are kept"
        ) from e


def load_pickscore(s: Settings, device: torch.device, dtype: torch.dtype):
    """PickScore (Kirstain et al. 2023): a function of N images (PIL) and their N prompts that gives scores (N,), float32,
    the model's scale times the cosine of image and text."""
    with loading("pickscore", s.pickscore, "config.json", "model.safetensors"):
        model = CLIPModel.from_pretrained(
            str(find_path(s.pickscore) or s.pickscore), torch_dtype=dtype, use_safetensors=True
        )
    with loading("pickscore-processor", s.pickscore_processor):
        processor = AutoProcessor.from_pretrained(str(find_path(s.pickscore_processor) or s.pickscore_processor))
    return clip_scorer(model.eval().to(device), processor, lambda cosine: model.logit_scale.exp().float() * cosine)


def load_clipscore(s: Settings, device: torch.device, dtype: torch.dtype):
    """CLIPScore (Hessel et al. 2021): 2.5 times the cosine of image and "A photo depicts" prompt, 0 where that is negative;
    a function as load_pickscore's."""
    with loading("clip", s.clip):
        path = str(find_path(s.clip) or s.clip)
        # OpenAI's repository has no safetensors on its main branch; torch.load reads its weights only, no code.
        model = CLIPModel.from_pretrained(path, torch_dtype=dtype)
        processor = AutoProcessor.from_pretrained(path)
    return clip_scorer(model.eval().to(device), processor, lambda cosine: 2.5 * cosine.clamp(min=0), CLIPSCORE_PREFIX)


def clip_scorer(model: CLIPModel, processor, of_cosine, prefix: str = ""):
    """The scoring function of a transformers CLIP model; of_cosine turns cosines (N,) into scores."""

    @torch.inference_mode()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pixels = processor(images=[x.convert("RGB") for x in images], return_tensors="pt").pixel_values
        unique = list(dict.fromkeys(prompts))
        texts = [prefix + p for p in unique]
        text = processor(text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(model.device)
        out = model(**text, pixel_values=pixels.to(model.device, model.dtype))
        rows = torch.tensor([unique.index(p) for p in prompts], device=model.device)
        return of_cosine((out.image_embeds.float() * out.text_embeds.float()[rows]).sum(dim=-1)).cpu()

    score.model = model
    return score


def load_hpsv2(s: Settings, device: torch.device, dtype: torch.dtype):
    """HPSv2 (Wu et al. 2023): a function as load_pickscore's that gives the cosine of image and prompt. The model is
    open_clip's ViT-H-14 with the checkpoint's weights, or the one whose configuration lies beside it, as the demo's does."""
    file = HPSV2_FILES[s.hpsv2_version]
    with loading("hpsv2", s.hpsv2, file):
        path = find_path(s.hpsv2)
        if path is None:
            path = Path(huggingface_hub.hf_hub_download(s.hpsv2, file))
        elif path.is_dir():
            path = path / file
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        name, tokenizer = "ViT-H-14", None
        if config := next(path.parent.glob("*-hpsv2.json"), None):
            open_clip.add_model_config(config)
            name, tokenizer = config.stem, transformers.CLIPTokenizer.from_pretrained(path.parent / "tokenizer")
        precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # It would warn that the model has no weights yet.
            logging.disable(logging.WARNING)
            model = open_clip.create_model(name, precision=precision)
            logging.disable(logging.NOTSET)
        model.load_state_dict(weights)
        model = model.eval().to(device)
        tokenize = open_clip.get_tokenizer(name) if tokenizer is None else None
    size = model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size

    @torch.inference_mode()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        device = model.logit_scale.device
        pixels = torch.stack([hpsv2_pixels(x, size, device) for x in images]).to(dtype)
        unique = list(dict.fromkeys(prompts))
        if tokenize is not None:
            ids = tokenize(unique)
        else:
            ids = tokenizer(unique, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        # The text tower is causal and read at the end-of-text token: what comes after the batch's last one changes nothing.
        length = int(ids.argmax(dim=-1).max()) + 1
        short = {"positional_embedding": model.positional_embedding[:length]}
        short |= {"attn_mask": model.attn_mask[:length, :length]}
        text = torch.func.functional_call(model, short, kwargs={"text": ids[:, :length].to(device)})
        text = text["text_features"] if isinstance(text, dict) else text[1]
        image = model.encode_image(pixels, normalize=True)
        rows = torch.tensor([unique.index(p) for p in prompts], device=device)
        return (image.float() * text.float()[rows]).sum(dim=-1).cpu()

    score.model = model
    return score


def hpsv2_pixels(image: Image.Image, size: int, device: torch.device) -> torch.Tensor:
    """hpsv2's own preprocessing, which resizes the tensor, not the picture, here on the device: float32 (3, size, size)."""
    x = TF.to_dtype(TF.pil_to_tensor(image.convert("RGB")).to(device), torch.float32, scale=True)
    x = TF.center_crop(TF.resize(x, [size], TF.InterpolationMode.BICUBIC, antialias=True), [size, size])
    return TF.normalize(x, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))


# ----------------------------------------------------------------------------------------------------------- statistics


def mean_interval(values) -> tuple[float, float, float]:
    """Mean of n values and its 95 % bootstrap interval (percentiles, 9,999 resamples, seeded); both ends are the mean where
    all values are equal or n is 1."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return (x.mean(),) * 3
    options = {"method": "percentile", "rng": np.random.default_rng(0), "batch": max(1, 10**7 // len(x))}
    low, high = scipy.stats.bootstrap((x,), np.mean, **options).confidence_interval
    return float(x.mean()), float(low), float(high)


def win_rate(a, b) -> dict[str, float]:
    """How often a exceeds b, for n pairs: n, wins, losses, ties; share of wins and of losses among all n with the wins' 95 %
    Wilson interval; and the two-sided binomial p of wins against losses, ties left out."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    n, wins, losses = len(a), int((a > b).sum()), int((a < b).sum())
    interval = scipy.stats.binomtest(wins, n).proportion_ci(method="wilson")
    p = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    counts = {"n": n, "wins": wins, "losses": losses, "ties": n - wins - losses}
    return counts | {
        "win_rate": wins / n,
        "loss_rate": losses / n,
        "low": interval.low,
        "high": interval.high,
        "p": float(p),
    }


# -------------------------------------------------------------------------------------------------------------- scoring


def load_scorers(s: Settings, dtype: torch.dtype) -> dict:
    """The scoring functions by their column in scores.csv, their models on the CPU for the time being."""
    cpu = torch.device("cpu")
    scorers = {"pickscore": load_pickscore(s, cpu, dtype), "hpsv2": load_hpsv2(s, cpu, dtype)}
    return scorers | ({"clipscore": load_clipscore(s, cpu, dtype)} if s.clip else {})


def scored_by(s: Settings, dtype_name: str) -> dict[str, str]:
    """Which models give the scores of each column, and in which precision."""
    by = {"pickscore": f"{s.pickscore} {s.pickscore_processor}", "hpsv2": f"{s.hpsv2} {s.hpsv2_version}"}
    by |= {"clipscore": s.clip} if s.clip else {}
    return by | {"weights": fingerprint(s.pickscore, s.hpsv2, s.clip), "dtype": dtype_name}


def read_scores(out: Path, records: dict[str, dict], columns: list[str], by: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """scores.csv of a folder, and its rows (in the records' order) that are whole and still true: of these very images,
    scored by these very models. Both empty where there is no such file."""
    try:
        table = pd.read_csv(out / "scores.csv", dtype=str, keep_default_na=False)
    except (OSError, ValueError):
        table = pd.DataFrame()
    table = table.reindex(columns=[*table.columns, *(c for c in columns if c not in table)], fill_value="")
    for name in SCORES.keys() & set(table.columns):
        table[name] = pd.to_numeric(table[name], errors="coerce")
    table = table.drop_duplicates("file", keep="last").set_index("file", drop=False)
    good = table[table[[c for c in columns if c in SCORES]].notna().all(axis=1) & (table["scored_by"] == by)]
    files = [f for f, r in records.items() if f in good.index and good.at[f, "image"] == image_id(r)]
    return table, good.loc[files, columns].reset_index(drop=True)


def image_id(record: dict) -> str:
    """Changes whenever an image is made anew: its record holds its times."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def score_images(s: Settings, out: Path, records: dict[str, dict], state, device, dtype_name: str, scorers) -> pd.DataFrame:
    """scores.csv of a folder: a row for each image, written batch by batch; rows that are true already are kept.

    records: the settings inside the images by file, relative to out. scorers: a function that loads them, called if anything
    is missing. Processes share the images. Returns the rows of these records: file, variant, prompt, category, seed, image,
    the scores, scored_by.
    """
    by = scored_by(s, dtype_name)
    by, names = json.dumps(by), [k for k in by if k in SCORES]
    columns = ["file", "variant", "prompt", "category", "seed", "image", *names, "scored_by"]
    known = set(read_scores(out, records, columns, by)[1]["file"])
    todo = [f for f in records if f not in known]
    state.wait_for_everyone()
    share = todo[state.process_index :: state.num_processes]
    if share:
        functions = scorers()
        for function in functions.values():
            function.model.to(device)
        with ThreadPoolExecutor() as pool, tqdm(total=len(share), unit="image", desc=f"scoring {out}") as bar:
            bar.disable = not state.is_local_main_process
            for start in range(0, len(share), s.scoring_batch_size):
                files = share[start : start + s.scoring_batch_size]
                images = list(pool.map(lambda f: Image.open(out / f).convert("RGB"), files))
                prompts = [records[f]["prompt"] for f in files]
                rows = {
                    "file": files,
                    "variant": [f.rpartition("/")[0] for f in files],
                    "prompt": [csv_text(p) for p in prompts],
                    "category": [csv_text(records[f].get("category", "")) for f in files],
                    "seed": [records[f]["seed"] for f in files],
                    "image": [image_id(records[f]) for f in files],
                    **{k: function(images, prompts).tolist() for k, function in functions.items()},
                    "scored_by": by,
                }
                add_rows(out, pd.DataFrame(rows), columns, by)
                bar.update(len(files))
    state.wait_for_everyone()
    return read_scores(out, records, columns, by)[1].astype({"seed": int})


def add_rows(out: Path, rows: pd.DataFrame, columns: list[str], by: str) -> None:
    """Put rows into scores.csv, by variant and file, in the place of older ones of the same files. What is there is whole at
    any moment, and processes take turns."""
    with FileLock(out / ".scores.lock"):
        table = pd.concat([read_scores(out, {}, columns, by)[0], rows]).drop_duplicates("file", keep="last")
        table.sort_values(["variant", "file"]).to_csv(out / ".scores.csv.part", index=False)
        os.replace(out / ".scores.csv.part", out / "scores.csv")


# ------------------------------------------------------------------------------------------------------ tables and plots


def score_means(table: pd.DataFrame, name: str, other: pd.DataFrame | None = None) -> tuple[int, float, float, float]:
    """n prompts, their mean score and its 95 % interval; with other, the same of the difference to the other variant's image
    of the same prompt and seed. Images of one prompt count as their mean."""
    scores = table.set_index(["prompt", "seed"])[name]
    if other is not None:
        scores = (scores - other.set_index(["prompt", "seed"])[name]).dropna()
    each = scores.groupby(level="prompt", sort=False).mean()
    return (len(each), *mean_interval(each)) if len(each) else (0, math.nan, math.nan, math.nan)


def score_wins(table: pd.DataFrame, other: pd.DataFrame, name: str) -> dict[str, float]:
    """win_rate of a variant's images over the other's of the same prompt and seed; n = 0 where they share none."""
    both = table.merge(other, on=["prompt", "seed"], suffixes=("", "_other"))
    if both.empty:
        return dict.fromkeys(("n", "wins", "losses", "ties"), 0) | dict.fromkeys(
            ("win_rate", "loss_rate", "low", "high", "p"), math.nan
        )
    return win_rate(both[name], both[f"{name}_other"])


def interval_text(mean: float, low: float, high: float, digits: int, sign: str = "") -> str:
    interval = "" if low == high else f" ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"
    return f"{mean:{sign}.{digits}f}{interval}"


def percent_text(share: float, low: float = math.nan, high: float = math.nan) -> str:
    return f"{100 * share:.1f} %" + ("" if math.isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})")


def print_table(title: str, rows: list[dict]) -> None:
    """Print rows as a Markdown table."""
    print(f"\n{title}\n\n{pd.DataFrame(rows).fillna('').to_markdown(index=False, disable_numparse=True)}")


def save_table(path: Path, rows: list[dict]) -> Path:
    part = path.with_name(f".{path.name}.part")
    rows = [{k: csv_text(v) if isinstance(v, str) else v for k, v in r.items()} for r in rows]
    pd.DataFrame(rows).to_csv(part, index=False)
    os.replace(part, path)
    return path


def save_plot(s: Settings, figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, and as PDF beside it; the demo's says so, wherever it is shown."""
    if s.base_model == DEMO["base_model"]:
        figure.suptitle("demo model and its own judges in place of PickScore and HPSv2, not SDXL", fontsize=12)
    for suffix in (".pdf", ".png"):
        part = path.with_name(f".{path.stem}{suffix}.part")
        figure.savefig(part, dpi=150, format=suffix[1:])
        os.replace(part, path.with_suffix(suffix))
    return path


def save_grids(
    out: Path, stem: str, variants: list[Variant], records: dict[str, dict], files: list[str], title: str, font: str
):
    """Grid pages with a row for each variant and a column for each file name (of finished images), eight to a band, prompts
    under them and what all have in common on top. Pages have at most MAX_GRID_PIXELS. Returns their paths."""
    files = [f for f in files if all(f"{v.name}/{f}" in records for v in variants)]
    if not files:
        return []
    with Image.open(out / variants[0].name / files[0]) as first:
        width, height = first.size
    columns, gap = min(8, len(files)), 4
    cell = min(512, width * math.ceil(192 / width))
    marked = PngImagePlugin.PngInfo()
    marked.add_text("Software", "DIPO")
    while True:
        label_font, text_font = caption_font(round(cell * 1.4), font), caption_font(cell, font)
        label, picture, text = round(cell * 0.72), round(cell * height / width), round(text_font.size * 5)
        band = len(variants) * (picture + gap) + text
        page_width = label + columns * (cell + gap) + gap
        top = round(label_font.size * (2.2 if label_font.getlength(title) <= page_width - 2 * gap else 3.6))
        if page_width * (band + top) <= MAX_GRID_PIXELS or cell <= 96:
            break
        cell = round(cell * 0.9)
    bands = [files[i : i + columns] for i in range(0, len(files), columns)]
    per_page = max(1, (MAX_GRID_PIXELS // page_width - top) // band)
    paths = []
    for number, start in enumerate(range(0, len(bands), per_page), 1):
        on_page = bands[start : start + per_page]
        page = Image.new("RGB", (page_width, top + band * len(on_page)), "white")
        draw_caption(page, title, gap, 0, page_width - 2 * gap, label_font, most=2)
        for k, names in enumerate(on_page):
            for row, v in enumerate(variants):
                y = top + k * band + row * (picture + gap)
                lines = math.ceil(label_font.getlength(v.label) / (label - 2 * gap))
                middle = round(y + picture / 2 - label_font.size * (0.5 + 0.625 * lines))
                draw_caption(page, v.label, gap, middle, label - 2 * gap, label_font, most=5)
                for column, name in enumerate(names):
                    with Image.open(out / v.name / name) as image:
                        small = image.convert("RGB").resize((cell, picture), Image.Resampling.LANCZOS)
                    page.paste(small, (label + column * (cell + gap), y))
            for column, name in enumerate(names):
                prompt = records[f"{variants[0].name}/{name}"]["prompt"]
                y = top + k * band + len(variants) * (picture + gap) - gap
                draw_caption(page, prompt, label + column * (cell + gap), y, cell, text_font)
        paths.append(out / (f"{stem}.png" if len(bands) <= per_page else f"{stem}-{number}.png"))
        part = out / f".{paths[-1].name}.part"
        page.save(part, format="PNG", pnginfo=marked)
        os.replace(part, paths[-1])
    return paths


# Copied from hasty_sample.caption_font
def caption_font(cell: int, name: str) -> ImageFont.FreeTypeFont:
    """The named font, or DejaVu Sans, which comes with matplotlib, in a size that suits the cell's width."""
    if name and not find_path(name):
        raise UserError(f"--font {name}: no such file; give a .ttf or .otf file")
    path = find_path(name) or Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    try:
        return ImageFont.truetype(str(path), max(12, cell // 20))
    except OSError as e:
        raise UserError(f"--font {name}: cannot be read as a font; give a .ttf or .otf file") from e


# Copied from hasty_sample.draw_caption
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


# ------------------------------------------------------------------------------------------------------------ the study


def study_variants(s: Settings) -> list[Variant]:
    """The rows of Table 1."""
    rows = [Variant(f"dipo-{n}", f"DIPO, {n} steps{eta_label(s.eta)}", n, s.eta) for n in s.steps]
    rows += [Variant(f"diffusion-dpo-{n}", f"Diffusion-DPO, {n} steps", n, 1.0) for n in s.baseline_steps]
    for key in dict.fromkeys(s.samplers):
        label = SAMPLERS[key][0]
        rows += [Variant(f"{key}-{n}", f"{label}, {n} steps", n, 0.0, label) for n in s.sampler_steps]
    return rows


def eta_label(eta: float) -> str:
    return f", η = {eta:g}" if eta else ""


def run_study(s: Settings, variants: list[Variant], report) -> None:
    """Make the images that are missing, then their scores, then call report(s, variants, scores, records, out) on the main
    process, which gives the paths to print. Processes of an accelerate launch share images and scores."""
    prompts = study_prompts(s)
    state, device, dtype_name, out = start_run(s)
    with claimed(out, state):
        wanted = wanted_images(s, variants, prompts, dtype_name)
        done = finished_images(s, out, wanted)
        todo = {f: r for f, r in wanted.items() if f not in done}
        # Every process has to have looked before the first one writes.
        state.wait_for_everyone()
        if state.is_main_process:
            clean_up(s, out, variants)
            print(f"{len(done)} of {len(wanted)} images are in {out}" + (", none are made" if s.score_only else ""))
        state.wait_for_everyone()
        # Loaded before the images are made, so that a wrong path shows at once and not hours later.
        scorers = functools.cache(functools.partial(load_scorers, s, DTYPES[dtype_name]))
        if todo and not s.score_only:
            scorers()
            make_images(s, variants, todo, out, state, device, DTYPES[dtype_name])
            free_memory(device)
        state.wait_for_everyone()
        records = {f: r for f in wanted if (r := done.get(f) or (read_record(out / f) if f in todo else None))}
        records = {f: r for f, r in records.items() if not difference(r, wanted[f])}
        if not records:
            raise UserError(f"--score-only: no images of this study in {out}; run it without --score-only first")
        scores = score_images(s, out, records, state, device, dtype_name, scorers)
        if state.is_main_process:
            there, records = common_images(variants, records, len(wanted))
            scores = scores[scores["file"].isin(list(records))]
            paths = report(s, there, scores, records, out)
            print("\n" + ", ".join(map(str, [out / "scores.csv", *paths])))
            for lock in (out / ".lock", out / ".scores.lock"):
                lock.unlink(missing_ok=True)
    state.destroy_process_group()


# Copied from hasty_sample.claimed
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


def common_images(variants: list[Variant], records: dict[str, dict], wanted: int) -> tuple[list[Variant], dict[str, dict]]:
    """The variants that have images, and the images that each of these has, so that unfinished studies are compared in pairs
    too. UserError where there is none."""
    names = {v: {f.split("/")[1] for f in records if f.startswith(f"{v.name}/")} for v in variants}
    there = [v for v in variants if names[v]]
    common = set.intersection(*(names[v] for v in there))
    if len(records) < wanted:
        print(f"the tables are of the {len(common)} images that each of these has: {'; '.join(v.label for v in there)}")
    if not common:
        raise UserError("--score-only: no image is there on every side yet; run it without --score-only")
    return there, {f: r for f, r in records.items() if f.split("/")[1] in common}


def clean_up(s: Settings, out: Path, variants: list[Variant]) -> None:
    """Remove what a killed run of ours left half-written, and grids that this one makes anew; make the rows' folders."""
    for v in variants:
        try:
            if not s.score_only:
                (out / v.name).mkdir(exist_ok=True)
        except OSError as e:
            raise UserError(f"{out / v.name} cannot be made a folder ({e.strerror}); choose another --output-dir") from e
        for path in (out / v.name).glob(".[0-9]*.png.*.part"):
            path.unlink()
    for path in (*out.glob(".*.csv.part"), *out.glob(".*.png.part"), *out.glob(".*.pdf.part")):
        path.unlink()
    for path in out.glob("grid*.png"):
        with contextlib.suppress(OSError), Image.open(path) as image:
            if image.info.get("Software") == "DIPO":
                path.unlink()


def needed(variants: list[Variant], names: list[str], out: Path) -> list[Variant]:
    """The variants of these names, in this order; UserError for one that has no images."""
    by_name = {v.name: v for v in variants}
    if missing := [name for name in names if name not in by_name]:
        raise UserError(f"--score-only: no images in {out / missing[0]}, which the tables need; make them first")
    return [by_name[name] for name in names]


def start_run(s: Settings):
    """Process state, device, name of the dtype, and the output folder, which is made and tried."""
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
    return state, device, dtype_name, out


def report(s: Settings, variants: list[Variant], scores: pd.DataFrame, records: dict[str, dict], out: Path) -> list[Path]:
    """Table 1, win rates against the first row of Diffusion-DPO, quality over time, and the grid of Figure 1."""
    parts = {v.name: scores[scores["variant"] == v.name] for v in variants}
    baseline = needed(variants, [f"diffusion-dpo-{s.baseline_steps[0]}"], out)[0].name
    names = [k for k in SCORES if k in scores]
    seconds = {v.name: image_seconds([r for f, r in records.items() if f.startswith(f"{v.name}/")]) for v in variants}
    quality, times, wins, table = [], [], [], []
    for v in variants:
        row = {"sampler": v.label, "n": None}
        values = {"variant": v.name, "label": v.label, "steps": v.steps, "eta": v.eta}
        paper = PAPER.get(v.name, (None, None, None)) if v.sampler == "DDIM" and s.eta == 0 else (None, None, None)
        paper = paper if s.baseline_steps[0] == 500 else (*paper[:2], None)
        for name in names:
            label, digits = SCORES[name]
            row["n"], *figures = score_means(parts[v.name], name)
            row[label] = interval_text(*figures, digits)
            values |= dict(zip(("n", name, f"{name}_low", f"{name}_high"), (row["n"], *figures), strict=True))
            if v.name != baseline:
                _, *gap = score_means(parts[v.name], name, parts[baseline])
                row[f"{label} - {s.baseline_steps[0]} steps"] = interval_text(*gap, digits, "+")
                keys = (f"{name}_difference", f"{name}_difference_low", f"{name}_difference_high")
                values |= dict(zip(keys, gap, strict=True))
                r = score_wins(parts[v.name], parts[baseline], name)
                wins.append({"sampler": v.label, "score": label} | r)
        if paper[0]:
            row["paper's PickScore"] = f"{paper[0]:.4f}"
        quality.append(row)
        t, reference = seconds[v.name], seconds[baseline]
        both, speed_up = t["sampling"][0] + t["decoding"][0], None
        if (t["batch_size"], t["device"]) == (reference["batch_size"], reference["device"]):
            speed_up = (reference["sampling"][0] + reference["decoding"][0]) / both
        times.append(
            {
                "sampler": v.label,
                "batch": t["batch_size"],
                "n batches": t["batches"],
                "sampling, s per image": interval_text(*t["sampling"], 3),
                "decoding, s": f"{t['decoding'][0]:.3f}",
                "speed-up": f"{speed_up:.2f}x" if speed_up else "other batch or device",
                "paper's s per image": f"{paper[1]:.2f}" if paper[1] else None,
                "paper's speed-up": f"{paper[2]:.2f}x" if paper[2] else None,
            }
        )
        values |= dict(zip(("seconds_sampling", "seconds_low", "seconds_high"), t["sampling"], strict=True))
        values |= {
            "seconds_decoding": t["decoding"][0],
            "batch_size": t["batch_size"],
            "batches": t["batches"],
            "seconds": both,
        }
        values |= {"device": t["device"], "speed_up": speed_up}
        values |= dict(zip(("paper_pickscore", "paper_seconds", "paper_speed_up"), paper, strict=True))
        table.append(values)
    print_table("Quality: means over prompts with 95 % bootstrap intervals, paired for differences", quality)
    devices = ", ".join(dict.fromkeys(r["device"] for r in table))
    print_table(f"Time on {devices}; the speed-up counts sampling and decoding", times)
    print_table(
        f"Wins over Diffusion-DPO, {s.baseline_steps[0]} steps: same prompts and noise{pairs_note(s)}", wins_text(wins)
    )
    paths = [save_table(out / "table1.csv", table), save_table(out / "wins.csv", wins)]
    paths.append(save_plot(s, plot_quality(table, names, baseline), out / "quality.png"))
    shown = [min((v for v in variants if v.name.startswith("dipo-")), key=lambda v: abs(v.steps - 30))]
    shown += [max((v for v in variants if v.name.startswith("diffusion-dpo-")), key=lambda v: v.steps)]
    files = [f"{i * s.images_per_prompt:05d}.png" for i in range(s.grid_prompts)]
    return paths + save_grids(out, "grid", shown, records, files, study_title(s), s.font)


def pairs_note(s: Settings) -> str:
    """What to know of win rates' intervals where prompts have several images."""
    return "; images of one prompt count as independent" if s.images_per_prompt > 1 else ""


def wins_text(wins: list[dict]) -> list[dict]:
    """Rows of win_rate as text, what else they hold in front."""
    figures = ("n", "wins", "losses", "ties", "win_rate", "loss_rate", "low", "high", "p")
    return [
        {k: v for k, v in r.items() if k not in figures}
        | {
            "n": r["n"],
            "wins": percent_text(r["win_rate"], r["low"], r["high"]),
            "losses": percent_text(r["loss_rate"]),
            "ties": r["ties"],
            "p": f"{r['p']:.2g}",
        }
        for r in wins
    ]


def study_title(s: Settings) -> str:
    """What the pictures of a grid have in common."""
    model = "demo model (not SDXL)" if s.base_model == DEMO["base_model"] else s.dpo_lora or s.dpo_unet or s.base_model
    return f"{model}, guidance {s.guidance_scale:g}, seeds from {s.seed}, same prompt and initial noise in each column"


def image_seconds(records: list[dict]) -> dict:
    """Seconds per image of a variant, means over the batches of its most frequent device and size, with 95 % intervals."""
    kinds = [(r["device"], r["batch_size"]) for r in records]
    device, size = max(sorted(set(kinds)), key=kinds.count)
    batches = {
        (r["seconds_sampling"], r["seconds_decoding"]) for r in records if (r["device"], r["batch_size"]) == (device, size)
    }
    return {
        "batch_size": size,
        "batches": len(batches),
        "sampling": mean_interval([b[0] for b in sorted(batches)]),
        "decoding": mean_interval([b[1] for b in sorted(batches)]),
        "device": device,
    }


def plot_quality(table: list[dict], names: list[str], baseline: str) -> Figure:
    """Each score's paired difference from the baseline row over seconds per image, the steps beside each point, and the
    Pareto front."""
    figure = Figure(figsize=(5.6 * len(names), 4.8), layout="constrained")
    # Colour, marker, and the end of the interval that the steps are written at.
    kinds = {"DIPO": (BLUE, "o", 1), "Diffusion-DPO": (ORANGE, "s", 1), "Euler": (SKY, "D", 0)}
    kinds |= {"DPM-Solver++ 2M": (GREEN, "^", 1), "UniPC": (PURPLE, "v", 0)}
    reference = next(r for r in table if r["variant"] == baseline)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        points = sorted((r["seconds"], r.get(f"{name}_difference", 0.0)) for r in table)
        front = [p for i, p in enumerate(points) if all(p[1] > q[1] for q in points[:i])]
        x, y = [*(p[0] for p in front), points[-1][0]], [*(p[1] for p in front), front[-1][1]]
        axes.step(x, y, where="post", color=GREY, linestyle=":", label="best so far (Pareto front)", zorder=1)
        axes.axhline(0, color=ORANGE, linewidth=0.8, zorder=1)
        for kind, (colour, marker, end) in kinds.items():
            rows = [r for r in table if r["label"].startswith(f"{kind},")]
            if not rows:
                continue
            x, y = [r["seconds"] for r in rows], [r.get(f"{name}_difference", 0.0) for r in rows]
            ends = [[r.get(f"{name}_difference_{end}", 0.0) for r in rows] for end in ("low", "high")]
            bars = [np.subtract(y, ends[0]), np.subtract(ends[1], y)]
            axes.errorbar(x, y, bars, fmt=marker, color=colour, capsize=3, markersize=7, label=kind)
            for r, a, b in zip(rows, x, ends[end], strict=True):
                place = {"xytext": (0, 5 if end else -5), "ha": "center", "va": "bottom" if end else "top"}
                axes.annotate(str(r["steps"]), (a, b), textcoords="offset points", fontsize=11, color=colour, **place)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1, y=0.1)
        axes.set_xlabel("seconds per image, decoding included (log scale)", fontsize=12)
        axes.set_ylabel(f"{SCORES[name][0]} minus that of {reference['steps']} steps", fontsize=12)
        axes.set_title(f"{SCORES[name][0]}: paired differences, 95 %, n = {reference['n']} prompts", fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=11)
    return figure


def score_folders(s: Settings) -> None:
    """Score folders of finished images and print their means, and win rates where there are two."""
    state = PartialState(cpu=s.device == "cpu", timeout=timedelta(days=7))
    device = torch.device(s.device) if ":" in s.device else state.device
    quiet_libraries()
    dtype_name = s.dtype if s.dtype != "auto" else "fp32" if device.type == "cpu" else "fp16"
    scorers, tables = functools.cache(functools.partial(load_scorers, s, DTYPES[dtype_name])), {}
    for folder in s.folders:
        path = find_path(folder)
        records = {p.name: r for p in sorted(path.glob("[0-9]" * 5 + "*.png")) if (r := read_record(p))}
        if not records:
            raise UserError(f"--folders {folder}: no image with its prompt inside; make some with hasty_sample.py")
        tables[folder] = score_images(s, path, records, state, device, dtype_name, scorers)
        (path / ".scores.lock").unlink(missing_ok=True)
    if not state.is_main_process:
        return
    rows = []
    for folder, table in tables.items():
        for name in (k for k in SCORES if k in table):
            n, *figures = score_means(table, name)
            rows.append(
                {"folder": folder, "score": SCORES[name][0], "n": n, "mean": interval_text(*figures, SCORES[name][1])}
            )
    print_table("Means over prompts with 95 % bootstrap intervals", rows)
    (a, first), *others = tables.items()
    for b, second in others:
        wins = [{"score": SCORES[k][0]} | score_wins(first, second, k) for k in SCORES if k in first]
        if wins[0]["n"]:
            alike = "" if first["prompt"].is_unique else "; images of one prompt count as independent"
            print_table(f"Wins of {a} over {b}, same prompts and seeds{alike}", wins_text(wins))
        else:
            print(f"\n{a} and {b} have no prompt and seed in common, so there is no win rate")


# ----------------------------------------------------------------------------------------------------------------- main


# Copied from hasty_sample.parse_settings
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


def prepare(s: Settings) -> Settings:
    """The settings with the demo's where wanted, checked."""
    if s.dpo_lora and s.dpo_unet == Settings.dpo_unet:
        s = replace(s, dpo_unet="")
    if s.demo:
        s = with_demo(s)
    check_settings(s)
    return s


def run_script(s: Settings, job) -> None:
    """Call job(settings); what the user can put right ends with one line and exit code 2."""
    try:
        job(prepare(s))
    except UserError as e:
        if isinstance(e, ImageError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        place = e.filename or s.output_dir
        print(f"error: {place}: {e.strerror}; what is finished is kept, put that right and run it again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; finished images and scores are kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    s = parse_settings(Settings, __doc__)
    run_script(s, lambda s: score_folders(s) if s.folders else run_study(s, study_variants(s), report))


if __name__ == "__main__":
    main()
