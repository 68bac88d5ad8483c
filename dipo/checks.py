"""What settings must be, as far as it shows without loading a model; what --demo and --paper make of them."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

from dipo.cli import UserError, warn
from dipo.devices import check_device
from dipo.files import find_path, lora_and_strength, lora_file
from dipo.grids import caption_font
from dipo.settings import DEMO_PATHS, SamplingSettings, StudySettings

# owner/name, or a file in that repository
HUB_NAME = r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.txt)(/.+\.safetensors)?"


def completed(s, demo: dict, paper: dict | None = None):
    """The settings with what follows from others: a LoRA alone goes on the base model's own UNet; where the default was left
    --demo sets DEMO_PATHS and demo, and --paper the paper's terms (but not its prompts where both are given)."""
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
    check_at_least(s, limit=1, images_per_prompt=1, batch_size=1, grid_prompts=1, scoring_batch_size=1, redraws=0)
    for name, check in NUMBERS.items():
        if (value := getattr(s, name, None)) is not None:
            check(name.replace("_", "-"), *(value if isinstance(value, tuple) else (value,)))
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


# How a script's settings of these names are checked, of one number or of several.
NUMBERS = dict.fromkeys(("num_inference_steps", "steps", "dipo_steps", "baseline_steps"), check_steps)
NUMBERS |= {"eta": check_etas, "etas": check_etas}


def check_models(s) -> None:
    """Raise UserError unless base model, UNet and VAE are each a .safetensors file, a folder with an index in it or in its
    unet or vae, could be a HUB_NAME, or are empty where the base model's own part can stand in."""
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
