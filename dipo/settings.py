"""Settings that scripts share, without the paths of models, which stand at the top of each script; their checks; --demo."""

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from dipo.cli import UserError, warn
from dipo.devices import check_device
from dipo.files import find_path, lora_and_strength, lora_file
from dipo.grids import caption_font

# What --demo sets, as far as a script has it and the command line left the default.
DEMO_PATHS = {
    "base_model": "assets/demo/sdxl",
    "dpo_unet": "assets/demo/dpo-unet",
    "vae": "",
    "pickscore": "assets/demo/pickscore",
    "pickscore_processor": "assets/demo/pickscore",
    "hpsv2": "assets/demo/hpsv2",
    **dict.fromkeys(("clip", "imagereward", "imagereward_tokenizer", "aesthetic", "aesthetic_clip"), ""),
    "judges": ("pickscore", "hpsv2"),
    "pickapic": "assets/demo/pickapic",
}

Judges = tuple[Literal["pickscore", "hpsv2", "imagereward", "aesthetic", "clipscore", "clipscore_paper"], ...]
# owner/name, or a file in that repository
HUB_NAME = r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.txt)(/.+\.safetensors)?"


@dataclass(kw_only=True)
class ModelPaths:
    """Where models and data are: a script's own Settings says it. They come first in --help."""

    base_model: str
    """SDXL pipeline, or one of SD 1.5 or 2.1: a folder, a .safetensors file or a hub name"""
    dpo_unet: str
    """DPO-trained UNet: a folder or a hub name, with or without a subfolder unet, or a file; empty: the base model's own"""
    dpo_lora: tuple[str, ...]
    """DPO-trained LoRA instead, on the base model's own UNet unless --dpo-unet is given too: a folder, a .safetensors file,
    a hub name, or owner/name/file.safetensors; :0.8 behind it is its strength; several are merged one after the other"""
    vae: str
    """VAE that stays finite in fp16: a folder, a file or a hub name; empty (and for SD 1.5 and 2.1): the base model's own"""
    parti: str
    """data set behind --prompts parti: a folder or a hub name"""
    pickapic: str
    """data set behind --prompts pickapic: a folder or a hub name"""


@dataclass(kw_only=True)
class JudgePaths(ModelPaths):
    """The same for the judges."""

    pickscore: str
    """PickScore's CLIP model: a folder or a hub name"""
    pickscore_processor: str
    """its processor: a folder or a hub name"""
    hpsv2: str
    """HPSv2's checkpoint: a .pt file, a folder or a hub name that holds it"""
    clip: str
    """CLIPScore's CLIP model and processor: a folder or a hub name"""
    imagereward: str
    """ImageReward's checkpoint: a .pt file with med_config.json beside it, a folder or a hub name that holds both"""
    imagereward_tokenizer: str
    """its tokenizer, BERT's: a folder or a hub name"""
    aesthetic: str
    """LAION's aesthetic predictor: a .pth file, a folder or a hub name that holds it as aesthetic-model.pth"""
    aesthetic_clip: str
    """its CLIP model: a folder or a hub name"""


@dataclass(kw_only=True)
class SamplingSettings(ModelPaths):
    """What every script that samples can be told."""

    demo: bool = False
    """use the small models, prompts and judges of assets/demo, and sizes for two CPU cores, where the default was left"""
    prompts: str
    """a .txt, .csv, .tsv, .json, .jsonl or .parquet, a folder of such files by category, parti, pickapic or hpdv2"""
    limit: int | None = None
    """use the first N prompts only; in a study of each category"""
    images_per_prompt: int = 1
    """images of each prompt, each with its own seed"""
    output_dir: str
    """where everything goes"""
    overwrite: bool = False
    """replace images in the output folder that were made with other settings"""
    font: str = ""
    """a .ttf or .otf file for the prompts in grids; empty: DejaVu Sans, which has no Chinese, Japanese or emoji"""

    guidance_scale: float = 5.0
    """classifier-free guidance; 1 or less switches it off, for half the operations"""
    timestep_spacing: Literal["auto", "leading", "trailing", "linspace"] = "auto"
    """auto: the base model's own, leading for SDXL"""
    seed: int = 0
    """image number i is drawn from seed + i"""
    height: int | None = None
    """pixels; default: the model's own, 1024 for SDXL, 512 for SD 1.5"""
    width: int | None = None
    """pixels; default: the model's own, 1024 for SDXL"""

    batch_size: int = 4
    """images sampled together; halved when the GPU's memory runs out"""
    lora_strict: bool = True
    """refuse a LoRA of which not everything fits the model, instead of merging what does"""
    compile: bool = False
    """torch.compile of the UNet for full batches"""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """auto: fp16 on a GPU, fp32 on the CPU"""
    device: str = "auto"
    """cuda, cuda:1, mps, cpu, or auto: the first of these that is there"""


@dataclass(kw_only=True)
class StudySettings(SamplingSettings, JudgePaths):
    """What a study can be told besides."""

    paper: bool = False
    """the paper's terms (PAPER_TERMS at the top of the script) where the default was left"""
    one_seed: bool = False
    """draw the image of every prompt from --seed, as the paper does"""
    score_only: bool = False
    """sample nothing: score the images that are there and make the tables of them"""
    categories: tuple[str, ...] = ()
    """use these categories only"""
    grid_prompts: int = 16
    """prompts shown in a grid"""
    judges: Judges = ("pickscore", "hpsv2")
    """what scores the images; clipscore_paper is CLIPScore as (cosine + 1) / 2"""
    hpsv2_version: Literal["v2.1", "v2.0"] = "v2.1"
    """which of HPSv2's checkpoints"""
    scoring_batch_size: int = 16
    """images scored together"""


@dataclass(kw_only=True)
class VoteSettings(StudySettings):
    """What a study that asks people can be told besides."""

    vote: tuple[str, str] | None = None
    """the two rows (folders) of pictures that vote.html asks people about"""
    votes: tuple[str, ...] = ()
    """CSVs that voters sent back: adds what people say to the tables"""


def completed(s, demo: dict, paper: dict | None = None):
    """The settings with what follows from others: a LoRA alone goes on the base model's own UNet, which is said; --demo sets
    DEMO_PATHS and the script's own demo wherever the default was left, and --paper the paper's terms (but not its prompts
    where both are given)."""
    default, given = {f.name: f.default for f in fields(s)}, getattr(s, "given", ())
    if getattr(s, "dpo_lora", ()) and s.dpo_unet == default["dpo_unet"] and "dpo_unet" not in given:
        if s.dpo_unet and not s.demo:
            warn(f"--dpo-lora goes on the base model's own UNet; --dpo-unet {s.dpo_unet} beside it would put it on that one")
        s = replace(s, dpo_unet="")
    if s.demo and not find_path(DEMO_PATHS["base_model"]):
        raise UserError(f"--demo needs {DEMO_PATHS['base_model']} beside dipo/: run it inside a clone of the repository")
    chosen = paper if paper and s.paper else {}
    if s.demo:
        chosen = DEMO_PATHS | demo | {k: v for k, v in chosen.items() if k != "prompts"}
    return replace(s, **{k: v for k, v in chosen.items() if k in default and getattr(s, k) == default[k] and k not in given})


def papers(s: StudySettings, terms: dict) -> str:
    """How a table calls the paper's figures: whether prompts, guidance and seeds, as far as its terms name them, are its."""
    names = ("prompts", "guidance_scale", "seed", "one_seed")
    same = not s.demo and all(getattr(s, k) == terms[k] for k in names if k in terms)
    return "paper's" if same else "paper's, on other terms"


def check_sampling(s: SamplingSettings) -> None:
    """Raise UserError for every value that can be judged without loading a model."""
    if not math.isfinite(s.guidance_scale):
        raise UserError(f"--guidance-scale {s.guidance_scale}: use a finite number, SDXL's usual range is 5 to 8")
    check_at_least(s, limit=1, images_per_prompt=1, batch_size=1, grid_prompts=1, scoring_batch_size=1)
    if not s.output_dir.strip():
        raise UserError("--output-dir is empty: give a folder")
    if not 0 <= s.seed < 2**62:
        raise UserError(f"--seed {s.seed}: use 0 to 2**62 - 1")
    caption_font(192, s.font)
    check_device(s.device)
    check_models(s)
    for lora in s.dpo_lora:
        check_lora(lora)


def check_at_least(s, **least: int) -> None:
    """Raise UserError for a whole number below the least that makes sense, if there is such a setting."""
    for name, lowest in least.items():
        value = getattr(s, name, None)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} {value}: use {lowest} or more")


def check_steps(flag: str, *steps: int) -> None:
    if not all(isinstance(n, int) and 1 <= n <= 1000 for n in steps):
        raise UserError(f"--{flag} {' '.join(map(str, steps))}: use 1 to 1000, as SDXL was trained on 1000")
    check_different(flag, *steps)


def check_timesteps(tau: tuple[int, ...]) -> None:
    if not all(isinstance(t, int) and 0 <= t < before for t, before in zip(tau, (1000, *tau), strict=False)):
        raise UserError(f"--timesteps {' '.join(map(str, tau))}: give numbers from 999 down to 0, each below the one before")


def check_etas(flag: str, *etas: float) -> None:
    if not all(0 <= eta <= 1 for eta in etas):
        raise UserError(f"--{flag} {' '.join(map(str, etas))}: use 0 (DDIM, deterministic) to 1 (as random as DDPM)")
    check_different(flag, *etas)


def check_different(flag: str, *values: float) -> None:
    """Raise UserError for no value, or for one that stands twice as far as folders' names show it."""
    if not values or len({f"{x:g}" for x in values}) < len(values):
        raise UserError(f"--{flag} {' '.join(map(str, values))}: give one or more, and none twice")


def check_models(s) -> None:
    """Raise UserError unless base model, UNet and VAE are each a .safetensors file or a model folder (it or its subfolder of
    the kind holds an index), could be a hub name such as "owner/name" or a file there, or are empty where the base model's
    own part can stand in."""
    for flag in ("base-model", "dpo-unet", "init-unet", "vae"):
        name = getattr(s, flag.replace("-", "_"), "")
        index, path = "model_index.json" if flag == "base-model" else "config.json", find_path(name)
        if path and path.suffix != ".safetensors":
            if not any((path / sub / index).exists() for sub in ("", "unet", "vae")):
                raise UserError(f"--{flag} {name}: neither a .safetensors file nor a model folder of diffusers with {index}")
        elif not path and (name or flag == "base-model") and not re.fullmatch(HUB_NAME, name):
            raise UserError(f"--{flag} {name!r}: no such folder; give a folder, run download_models.py, or try --demo")


def check_lora(entry: str) -> None:
    """Raise UserError unless entry is a .safetensors file, a folder with one LoRA, or could be owner/name or
    owner/name/file.safetensors on the hub, with or without :strength behind it."""
    name, _ = lora_and_strength(entry)
    path = find_path(name)
    suffix = Path(name).suffix.lower()
    if suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise UserError(f"--dpo-lora {name}: pickled weights may run code when they are read; give a .safetensors file")
    if path and path.is_dir():
        lora_file(path, name)
    elif path and suffix != ".safetensors":
        raise UserError(f"--dpo-lora {name}: not a .safetensors file")
    elif not path and not re.fullmatch(HUB_NAME, name):
        raise UserError(f"--dpo-lora {name!r}: no such file; give a folder, a .safetensors file or a hub name owner/name")
