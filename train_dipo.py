"""Train Stable Diffusion XL with Diffusion-DPO (Wallace et al. 2024) on pairs of pictures of which people preferred one.

DIPO changes no training objective (README.md says why): the UNet that this script leaves is sampled by DDIM in 20 to 50
steps with hasty_sample.py. The defaults are the paper's: SDXL 1.0, Pick-a-Pic, 2048 pairs a step, beta 5000.

    python train_dipo.py --demo                                          # the small model in assets/demo, without GPU
    python train_dipo.py --output-dir models/dipo --train-batch-size 4   # SDXL in full, four pairs at a time on one GPU
    python train_dipo.py --output-dir models/lora --lora-rank 64         # a LoRA: one UNet in memory instead of two
    accelerate launch train_dipo.py --output-dir models/dipo             # all GPUs of this machine
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip 10.0.0.1 \\
        --main_process_port 29500 train_dipo.py --output-dir /shared/dipo      # the same on machine 1 with --machine_rank 1
    accelerate launch --config_file configs/fsdp.yaml train_dipo.py --optimizer adamw --output-dir models/dipo
    accelerate launch --config_file configs/deepspeed_zero2.yaml train_dipo.py --optimizer adamw --output-dir models/dipo
    python train_dipo.py --output-dir models/dipo --resume               # go on after Ctrl-C, SIGTERM or kill -9
    python hasty_sample.py --dpo-unet models/dipo                        # sample the result; --dpo-lora for a LoRA

To use other models or data, edit the paths at the top of Settings or pass them as flags. Data are a hub data set or
parquet files with Pick-a-Pic's columns: jpg_0, jpg_1 (encoded pictures), caption, label_0 (1: jpg_0 wins, 0: jpg_1 wins,
anything else: a tie, not used).

SIGTERM and Ctrl-C end a run with a checkpoint. accelerate launch kills its processes 30 seconds after them, which may be too
soon for all of SDXL; newer versions of torch wait for as many seconds as TORCH_ELASTIC_SHUTDOWN_TIMEOUT says.

The output folder gets unet/ (or pytorch_lora_weights.safetensors), settings.yaml, README.md (a model card), metrics.csv,
loss.png, validation/ (base above trained, same seeds), TensorBoard's events under tensorboard/, and checkpoints/.
"""

import contextlib
import copy
import datetime
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import diffusers
import huggingface_hub
import huggingface_hub.errors
import matplotlib.figure
import numpy as np
import pandas as pd
import pyarrow.parquet
import torch
import torch.nn.functional as F
import transformers
import tyro
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, is_wandb_available
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from filelock import FileLock, Timeout
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm


@dataclass
class Settings:
    base_model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """SDXL pipeline to train and to compare with: a folder or a hub name"""
    vae: str = "madebyollin/sdxl-vae-fp16-fix"
    """VAE that stays finite in fp16: a folder or a hub name; empty: the base model's own"""
    dataset: str = "yuvalkirstain/pickapic_v2"
    """preference pairs: a hub name, a parquet file or a folder of them (those named train*, if there are any)"""

    demo: bool = False
    """train the small model of assets/demo on its own pairs, with the settings in DEMO where these are left alone"""
    output_dir: str = "models/dipo-sdxl"
    """where everything goes; on storage that all machines share"""
    resume: bool = False
    """go on from the last whole checkpoint in the output folder, if there is one"""
    cache_dir: str = ""
    """encode pictures and captions once, ahead, into this folder (0.8 MB a pair at 1024 pixels), for several epochs"""
    max_train_pairs: int | None = None
    """use the first N pairs with a winner only"""

    max_train_steps: int = 1000
    """optimizer steps"""
    effective_batch_size: int = 2048
    """pairs in an optimizer step, over all devices; gradient accumulation follows from it"""
    train_batch_size: int = 1
    """pairs that a device holds at once"""
    learning_rate: float = 8.192e-9
    """per pair where scale_lr is on, else as it is"""
    scale_lr: bool = True
    """multiply the learning rate by the effective batch size, as the reference trainer's --scale_lr does"""
    lr_warmup_steps: int = 200
    """steps of linear warm-up; constant afterwards"""
    beta_dpo: float = 5000.0
    """strength of the tie to the reference model"""
    optimizer: str = "adafactor"
    """adafactor (little memory) or adamw"""
    weight_decay: float = 0.01
    """decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    caption_dropout: float = 0.2
    """share of pairs trained on the unconditional side, SDXL's zeros (the reference trainer: on an empty caption)"""
    lora_rank: int = 0
    """train a LoRA of this rank instead of all weights; the reference model is then the same UNet without it"""
    resolution: int | None = None
    """pixels of a side, after resize and centre crop; default: the model's own, 1024 for SDXL"""
    mixed_precision: str = "auto"
    """bf16, fp16 or no, over float32 weights; auto: bf16 on GPUs that have it, fp16 on others, no on the CPU"""
    gradient_checkpointing: bool = True
    """compute activations twice to save memory"""
    shuffle_buffer: int = 1000
    """pairs that are shuffled among each other, in memory once per data worker"""
    num_workers: int | None = None
    """processes that read and decode pictures for each device; default: 4 on GPUs, else none"""
    seed: int = 0
    """every random choice follows from it"""
    device: str = "auto"
    """auto or cpu"""

    checkpoint_every: int = 50
    """steps between checkpoints"""
    keep_checkpoints: int = 3
    """how many of the last ones stay"""
    validate_every: int = 100
    """steps between validation grids; 0: none"""
    validation_prompts: str = ""
    """a .txt with a prompt a line; empty: VALIDATION_PROMPTS"""
    max_mse_ratio: float = 2.0
    """stop when the model's noise error exceeds this many times the reference's: it is losing what it knew"""
    wandb: bool = False
    """log to Weights & Biases besides TensorBoard"""
    save_dtype: str = "fp16"
    """precision of the saved UNet or LoRA: fp16, bf16 or fp32 (checkpoints are always fp32)"""


# What --demo uses instead of the defaults above: sizes for 2 CPU cores, chosen by the annotator's reward on training
# captions (demo/measure_dpo.py --split train). At beta 5000 and twice this rate the loss rose above ln 2.
DEMO = {
    "base_model": "assets/demo/sdxl",
    "vae": "",
    "dataset": "assets/demo/pickapic/train.parquet",
    "output_dir": "models/dipo-demo",
    "cache_dir": "models/dipo-demo/cache",
    "max_train_steps": 250,
    "effective_batch_size": 64,
    "train_batch_size": 64,
    "learning_rate": 1e-5,
    "scale_lr": False,
    "lr_warmup_steps": 20,
    "beta_dpo": 1000.0,
    "optimizer": "adamw",
    "caption_dropout": 0.0,
    "gradient_checkpointing": False,
    "checkpoint_every": 25,
    "validate_every": 50,
    "validation_prompts": "assets/demo/prompts.txt",
}
VALIDATION_PROMPTS = (
    "a close-up portrait of an old fisherman in a yellow raincoat, soft window light",
    "a lighthouse on a cliff above a stormy sea at dusk",
    "abstract composition of overlapping circles in teal and copper",
    "a red fox reading a newspaper in a train, 35mm photograph",
)
COLUMNS = ("jpg_0", "jpg_1", "caption", "label_0")
CACHED = ("moments", "prompt_embeds", "pooled_embeds")
CACHE_SHARD = 256
# Settings that a resumed run may change; data, model and optimizer have to stay what they were.
MAY_CHANGE = ("output_dir", "resume", "demo", "max_train_steps", "learning_rate", "scale_lr", "beta_dpo")
MAY_CHANGE += ("weight_decay", "max_grad_norm", "checkpoint_every", "keep_checkpoints", "validate_every", "device")
MAY_CHANGE += ("validation_prompts", "max_mse_ratio", "wandb", "save_dtype", "gradient_checkpointing", "lr_warmup_steps")
MAX_SKIPPED = 10
# Copied from hasty_sample.DTYPES
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Copied from hasty_sample.MAX_GRID_PIXELS
MAX_GRID_PIXELS = 25_000_000


# Copied from hasty_sample.UserError
class UserError(Exception):
    """Something that the user can put right; ends the script with one line and exit code 2."""


class Stopped(Exception):
    """A signal, whose number it carries, asked the run to end; a checkpoint has been written."""


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


def with_demo(s: Settings) -> Settings:
    """The settings with those of DEMO wherever they were left at their defaults."""
    if not find_path(DEMO["base_model"]):
        raise UserError(
            f"--demo needs {DEMO['base_model']} beside {Path(__file__).name}: run it inside a clone of the repository"
        )
    default, demo = Settings(), DEMO
    if s.output_dir != default.output_dir:
        demo = DEMO | {"cache_dir": str(Path(s.output_dir) / "cache")}
    return replace(s, **{k: v for k, v in demo.items() if getattr(s, k) == getattr(default, k)})


def check_settings(s: Settings) -> None:
    """Raise UserError for every value that can be judged without data or models."""
    at_least = {"max_train_steps": 1, "effective_batch_size": 1, "train_batch_size": 1, "lr_warmup_steps": 0, "lora_rank": 0}
    at_least |= {"shuffle_buffer": 1, "num_workers": 0, "checkpoint_every": 1, "keep_checkpoints": 1, "validate_every": 0}
    at_least |= {"max_train_pairs": 1, "seed": 0, "resolution": 8}
    for name, least in at_least.items():
        value = getattr(s, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: use {least} or more")
    if not 0 <= s.weight_decay < math.inf:
        raise UserError(f"--weight-decay {s.weight_decay}: use 0 or more")
    for name in ("learning_rate", "beta_dpo", "max_grad_norm", "max_mse_ratio"):
        value = getattr(s, name)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} {value}: use a finite number above 0")
    if not 0 <= s.caption_dropout < 1:
        raise UserError(f"--caption-dropout {s.caption_dropout}: use 0 (every pair with its caption) to less than 1")
    choices = {"optimizer": ("adafactor", "adamw"), "mixed_precision": ("auto", "bf16", "fp16", "no")}
    choices |= {"save_dtype": tuple(DTYPES), "device": ("auto", "cpu")}
    for name, allowed in choices.items():
        if getattr(s, name) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)!r}: use one of {', '.join(allowed)}")
    if s.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16: needs a CUDA GPU; use bf16 or no")
    if s.wandb and not is_wandb_available():
        raise UserError("--wandb: the package is not installed; pip install wandb")


def accumulation_steps(effective_batch_size: int, train_batch_size: int, processes: int) -> int:
    """How many batches each device adds up before an optimizer step; UserError where the numbers do not divide."""
    together = train_batch_size * processes
    steps, rest = divmod(effective_batch_size, together)
    if rest:
        near = [n * together for n in (steps, steps + 1) if n]
        fits = [b for b in range(1, effective_batch_size // processes + 1) if effective_batch_size % (b * processes) == 0]
        fits = sorted(sorted(fits, key=lambda b: abs(b - train_batch_size))[:2])
        other = f", or --train-batch-size {' or '.join(map(str, fits))}" if fits else ""
        raise UserError(
            f"--effective-batch-size {effective_batch_size}: no multiple of {train_batch_size} pairs per device x "
            f"{processes} processes; use {' or '.join(map(str, near))}{other}"
        )
    return steps


def read_validation_prompts(s: Settings) -> list[str]:
    """The prompts of the validation grid, at most eight."""
    if not s.validation_prompts:
        return list(VALIDATION_PROMPTS)
    path = find_path(s.validation_prompts)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path else []
    except (OSError, ValueError) as e:
        raise UserError(f"--validation-prompts {s.validation_prompts}: cannot be read: {first_line(e)}") from e
    prompts = [line.strip() for line in lines if line.strip()][:8]
    if not prompts:
        raise UserError(f"--validation-prompts {s.validation_prompts}: give a .txt file with a prompt a line")
    return prompts


# ----------------------------------------------------------------------------------------------------------------- data


def open_dataset(name: str) -> datasets.IterableDataset:
    """The preference pairs as a stream of rows with COLUMNS, pictures still encoded; UserError if there is none."""
    path = find_path(name)
    try:
        if path:
            files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
            files = [f for f in files if f.name.startswith("train")] or files
            if not files:
                raise UserError(f"--dataset {name}: no .parquet file in it")
            rows = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train", streaming=True)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            rows = datasets.load_dataset(name, split="train", streaming=True)
        else:
            raise UserError(f"--dataset {name!r}: no such file or folder; give parquet files or a hub name, or try --demo")
        columns = rows.column_names or list(next(iter(rows)))
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"--dataset {name}: cannot be loaded ({first_line(e)[:200]}); give parquet files, or try --demo"
        ) from e
    if missing := [c for c in COLUMNS if c not in columns]:
        raise UserError(f"--dataset {name}: lacks the column {missing[0]}; its columns are {', '.join(columns)}")
    rows = rows.select_columns(list(COLUMNS))
    for column in COLUMNS[:2]:
        if rows.features and isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def read_picture(value: bytes | dict, resolution: int) -> np.ndarray:
    """An encoded picture, resized and centre-cropped: uint8 (resolution, resolution, 3). Raises what Pillow raises."""
    with Image.open(io.BytesIO(value["bytes"] if isinstance(value, dict) else value)) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.BILINEAR)
    return np.asarray(fitted)


def read_pair(row: dict, resolution: int) -> dict | None:
    """A row of the data set as {"pixels": uint8 (2, resolution, resolution, 3), the winner first, "caption": str}; None
    where a picture cannot be read."""
    first, second = COLUMNS[:2] if row["label_0"] == 1 else COLUMNS[1::-1]
    try:
        pixels = np.stack([read_picture(row[first], resolution), read_picture(row[second], resolution)])
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, Image.DecompressionBombError):
        return None
    return {"pixels": torch.from_numpy(pixels), "caption": row["caption"] or ""}


def read_cached(row: dict, shapes: dict[str, list[int]], dtype: torch.dtype) -> dict:
    """A row of the cache as tensors of the given shapes."""
    return {k: torch.frombuffer(bytearray(row[k]), dtype=dtype).reshape(shape) for k, shape in shapes.items()}


def random_draws(key: tuple[int, ...], latent_shape: tuple[int, ...], train_timesteps: int, caption_dropout: float) -> dict:
    """What is random about one visit to one pair, from a seed of its own, so that it depends neither on the batch nor on
    the process: timestep (), noise latent_shape, posterior_noise (2, *latent_shape), drop_caption ()."""
    g = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    return {
        "timestep": torch.randint(train_timesteps, (), generator=g),
        "drop_caption": torch.rand((), generator=g) < caption_dropout,
        "noise": torch.randn(latent_shape, generator=g),
        "posterior_noise": torch.randn((2, *latent_shape), generator=g),
    }


class Pairs(torch.utils.data.IterableDataset):
    """The pairs of one process, without end unless epochs says so, shuffled among blocks of shuffle_buffer usable pairs.

    Where the data set has at least as many files as there are processes, each reads its own files. Otherwise all read
    everything and take turns, so that any number of processes makes the same batches.

    state_dict is a position, as JSON: the data set's own state at the start of a block, and how far into the block. On
    resuming that one block is read again. (datasets' own shuffle buffer would lose its contents.)

    rows: a stream with label_0. read: maps a row to an item, None where it cannot be used. draws: maps a key of whole
    numbers to the item's random part. Items carry ties and unreadable: how many of each were left out since the last one.
    """

    def __init__(self, rows, read, draws, seed, shuffle_buffer, rank=0, world=1, limit=None, epochs=None):
        self.read, self.draws, self.seed, self.shuffle_buffer = read, draws, seed, shuffle_buffer
        self.limit, self.epochs = limit, epochs
        own_files = limit is None and rows.num_shards >= world
        self.stream, self.turn, self.turns = (rank, 0, 1) if own_files else (0, rank, world)
        self.rows = rows.shard(world, rank, contiguous=False) if own_files and world > 1 else rows
        self.num_shards = self.rows.num_shards
        self.at = {"epoch": 0, "before": 0, "rows": None, "block": 0, "first": 0, "next": 0, "ties": 0, "unreadable": 0}

    def state_dict(self) -> dict:
        return copy.deepcopy(self.at)

    def load_state_dict(self, state: dict) -> None:
        self.at = copy.deepcopy(state)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        at = self.at
        while self.epochs is None or at["epoch"] < self.epochs:
            self.rows.set_epoch(at["epoch"])
            if at["rows"] is not None:
                self.rows.load_state_dict(at["rows"])
            rows, used = iter(self.rows), at["first"] + at["next"] > 0
            while True:
                room = self.shuffle_buffer if self.limit is None else min(self.shuffle_buffer, self.limit - at["first"])
                block, ties = self.read_block(rows, room)
                if at["next"] == 0 and self.turn == 0:
                    at["ties"] += ties
                if not block:
                    break
                order = np.random.default_rng([self.seed, at["epoch"], worker, at["block"]]).permutation(len(block))
                for j in range(at["next"], len(block)):
                    at["next"] = j + 1
                    if (at["before"] + at["first"] + j) % self.turns != self.turn:
                        continue
                    item = self.read(block[order[j] if self.shuffle_buffer > 1 else j])
                    if item is None:
                        at["unreadable"] += 1
                        continue
                    item |= self.draws((self.seed, at["epoch"], self.stream, worker, at["first"] + j))
                    item |= {"ties": at["ties"], "unreadable": at["unreadable"]}
                    at["ties"] = at["unreadable"] = 0
                    used = True
                    yield item
                at |= {
                    "rows": self.rows.state_dict(),
                    "block": at["block"] + 1,
                    "first": at["first"] + len(block),
                    "next": 0,
                }
            if not used:
                return
            at["before"] += at["first"]
            at |= {"epoch": at["epoch"] + 1, "rows": None, "block": 0, "first": 0, "next": 0}

    @staticmethod
    def read_block(rows, room: int) -> tuple[list[dict], int]:
        """The next usable rows, at most room, and how many ties came between them."""
        block, ties = [], 0
        while len(block) < room and (row := next(rows, None)) is not None:
            if row["label_0"] in (0, 1):
                block.append(row)
            else:
                ties += 1
        return block, ties


def start_worker(_: int) -> None:
    """Signals are the main process's business, also where a launcher sends them to all. Workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(pairs: Pairs, batch_size: int, num_workers: int, pin_memory: bool) -> StatefulDataLoader:
    workers = min(num_workers, pairs.num_shards if pairs.limit is None else 1)
    # Forked workers hang in threads that reading the data has started here before.
    more = {"worker_init_fn": start_worker, "multiprocessing_context": "spawn"} if workers else {}
    return StatefulDataLoader(pairs, batch_size=batch_size, num_workers=workers, pin_memory=pin_memory, **more)


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


def load_models(s: Settings, device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """The base pipeline on the device: VAE and text encoders frozen in dtype, the UNet in float32, or in dtype for a LoRA.

    Raises UserError when a model cannot be loaded or does not predict the noise.
    """
    unet_dtype = dtype if s.lora_rank else torch.float32
    parts = {"unet": load_part(UNet2DConditionModel.from_pretrained, "base-model", s.base_model, "unet", unet_dtype)}
    if s.vae:
        parts["vae"] = load_part(AutoencoderKL.from_pretrained, "vae", s.vae, "vae", dtype)

    def base(*args, **kwargs):
        return StableDiffusionXLPipeline.from_pretrained(*args, **kwargs, **parts, add_watermarker=False)

    pipe = load_part(base, "base-model", s.base_model, "", dtype)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    if pipe.scheduler.config.prediction_type != "epsilon":
        raise UserError(f"--base-model {s.base_model}: predicts {pipe.scheduler.config.prediction_type}, not the noise")
    if not pipe.text_encoder or not pipe.text_encoder_2:
        raise UserError(f"--base-model {s.base_model}: lacks one of SDXL's two text encoders; use an SDXL base model")
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
    try:
        pipe.to(device)
    except torch.OutOfMemoryError as e:
        raise UserError("the GPU's free memory does not hold the models; try --lora-rank 64") from e
    if dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_lora(unet: UNet2DConditionModel, rank: int, dtype: torch.dtype) -> None:
    """Freeze the UNet in dtype and put a LoRA in float32 on its attention, zero at the start."""
    unet.requires_grad_(False).to(dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)


def make_reference(unet: UNet2DConditionModel, dtype: torch.dtype, norms: torch.dtype) -> UNet2DConditionModel:
    """A frozen copy with its norms in one precision and all else in dtype. With the precision in which the model's own
    norms are computed (float32 under autocast, dtype where FSDP or DeepSpeed cast everything) the two agree to the last
    bit, so that training starts with a loss of ln 2."""
    reference = copy.deepcopy(unet).requires_grad_(False).eval().to(norms)
    for module in reference.modules():
        if not isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(p.to(dtype), requires_grad=False))
    return reference


@contextlib.contextmanager
def adapter_off(unet: UNet2DConditionModel):
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and log variance of the VAE's posterior, (N, 8, H/8, W/8) in its dtype, of uint8 pictures (N, H, W, 3), one at
    a time to bound memory."""
    x = pixels.to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
    return torch.cat([vae.encode(picture[None]).latent_dist.parameters for picture in x])


@torch.no_grad()
def encode_captions(pipe: StableDiffusionXLPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's embeddings of B captions, (B, 77, D) and pooled (B, P)."""
    text, _, pooled, _ = pipe.encode_prompt(captions, device=pipe.vae.device, do_classifier_free_guidance=False)
    return text, pooled


def prepare_batch(pipe: StableDiffusionXLPipeline, batch: dict, empty: tuple[torch.Tensor, torch.Tensor]):
    """What the UNet needs of B pairs: latents (2B, 4, H/8, W/8) float32, the winners first, scaled; prompt embeddings
    (2B, 77, D) and pooled ones (2B, P). empty: the embeddings of a dropped caption."""
    device = pipe.vae.device
    if "moments" in batch:
        moments, text, pooled = (batch[k].to(device, non_blocking=True) for k in CACHED)
        moments = moments.transpose(0, 1).flatten(0, 1)
    else:
        moments = encode_pictures(pipe.vae, batch["pixels"].transpose(0, 1).flatten(0, 1))
        text, pooled = encode_captions(pipe, batch["caption"])
    posterior = DiagonalGaussianDistribution(moments.float())
    z = posterior.mean + posterior.std * batch["posterior_noise"].transpose(0, 1).flatten(0, 1).to(device)
    drop = batch["drop_caption"].to(device)
    text = torch.where(drop[:, None, None], empty[0], text)
    pooled = torch.where(drop[:, None], empty[1], pooled)
    return z * pipe.vae.config.scaling_factor, torch.cat([text, text]), torch.cat([pooled, pooled])


def dpo_loss(model_pred: torch.Tensor, reference_pred: torch.Tensor, noise: torch.Tensor, beta_dpo: float):
    """Diffusion-DPO's loss (Wallace et al. 2024, equation 14, with a constant weight) of B pairs.

    model_pred, reference_pred: predicted noise (2B, C, H, W), the winners first. noise: (B, C, H, W), shared by winner and
    loser. With m and r the mean squared errors of model and reference, a pair's argument is
    -beta / 2 * ((m_w - m_l) - (r_w - r_l)), its loss -log sigmoid(argument), computed in float32 (float64 for float64).
    Returns the mean loss (), the arguments (B,), and m and r (2B,).
    """
    kind = torch.float64 if noise.dtype == torch.float64 else torch.float32
    target = torch.cat([noise, noise]).to(kind)
    m, r = ((pred.to(kind) - target).square().mean(dim=(1, 2, 3)) for pred in (model_pred, reference_pred))
    (m_w, m_l), (r_w, r_l) = m.chunk(2), r.chunk(2)
    argument = -beta_dpo / 2 * ((m_w - m_l) - (r_w - r_l))
    return -F.logsigmoid(argument).mean(), argument, m, r


# ---------------------------------------------------------------------------------------------------------------- cache


def read_cache_note(s: Settings) -> dict:
    """What cache.json says; empty without a cache."""
    try:
        return json.loads((Path(s.cache_dir).expanduser() / "cache.json").read_text()) if s.cache_dir else {}
    except (OSError, ValueError):
        return {}


def open_cache(s: Settings) -> datasets.IterableDataset:
    files = sorted(str(p) for p in Path(s.cache_dir).expanduser().glob("*.parquet"))
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def fill_cache(s: Settings, rows, pipe: StableDiffusionXLPipeline, accelerator: Accelerator, resolution: int) -> dict:
    """Encode every usable pair once into parquet shards of CACHE_SHARD pairs, each with the position in the data, so that a
    stopped run goes on behind the last whole one. Returns what cache.json then holds. Raises UserError for a cache
    of other data, models or settings."""
    folder = Path(s.cache_dir).expanduser()
    rank, world = accelerator.process_index, accelerator.num_processes
    wanted = {k: getattr(s, k) for k in ("dataset", "base_model", "vae", "max_train_pairs")}
    wanted |= {"resolution": resolution, "dtype": str(pipe.vae.dtype)}
    note = folder / "cache.json"
    if accelerator.is_main_process and not read_cache_note(s):
        write_text(note, json.dumps(wanted | {"processes": world}))
    accelerator.wait_for_everyone()
    found = read_cache_note(s)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"--cache-dir {s.cache_dir}: made with {key} {found.get(key)!r}, this run has {value!r}; give another"
            )
    if found.get("complete"):
        return found
    if found["processes"] != world:
        raise UserError(f"--cache-dir {s.cache_dir}: begun by {found['processes']} processes; finish it so, or give another")

    pairs = Pairs(rows, lambda row: read_pair(row, resolution), lambda key: {}, s.seed, 1, rank, world, s.max_train_pairs, 1)
    loader = make_loader(pairs, 8, 0, False)
    shards = sorted(folder.glob(f"{rank:04d}-*.parquet"))
    counts, shapes, done = {"pairs": 0, "ties": 0, "unreadable": 0}, None, []
    if shards:
        saved = json.loads(pyarrow.parquet.read_schema(shards[-1]).metadata[b"dipo"])
        loader.load_state_dict(saved["loader"])
        counts, shapes = saved["counts"], saved["shapes"]
    bar = tqdm(desc="encoding", unit="pair", initial=counts["pairs"], total=s.max_train_pairs)
    bar.disable = not accelerator.is_main_process

    def write_shard() -> None:
        table = pyarrow.Table.from_pylist(done)
        record = json.dumps({"loader": loader.state_dict(), "counts": counts, "shapes": shapes})
        path = folder / f"{rank:04d}-{len(shards):06d}.parquet"
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"dipo": record}), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        shards.append(path)
        done.clear()

    for batch in loader:
        n = len(batch["caption"])
        moments = encode_pictures(pipe.vae, batch["pixels"].flatten(0, 1)).unflatten(0, (n, 2)).cpu()
        text, pooled = (x.to(moments.dtype).cpu() for x in encode_captions(pipe, batch["caption"]))
        for item in zip(moments, text, pooled, strict=True):
            done.append({k: x.contiguous().view(torch.uint8).numpy().tobytes() for k, x in zip(CACHED, item, strict=True)})
            done[-1]["label_0"] = 1.0
        shapes = {k: list(x.shape[1:]) for k, x in zip(CACHED, (moments, text, pooled), strict=True)}
        counts["pairs"] += n
        counts["ties"] += int(batch["ties"].sum())
        counts["unreadable"] += int(batch["unreadable"].sum())
        bar.update(n)
        if len(done) >= CACHE_SHARD:
            write_shard()
    if done:
        write_shard()
    bar.close()
    totals = torch.tensor(list(counts.values()), device=accelerator.device)
    counts = dict(zip(counts, accelerator.reduce(totals, "sum").tolist(), strict=True))
    if not counts["pairs"]:
        raise UserError(f"--dataset {s.dataset}: no usable pair in it ({counts['ties']} ties)")
    found |= {"complete": True, "shapes": shapes, "counts": counts}
    if accelerator.is_main_process:
        write_text(note, json.dumps(found))
    accelerator.wait_for_everyone()
    return found


# ---------------------------------------------------------------------------------------------------------- checkpoints


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that it is always whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


@contextlib.contextmanager
def full_disk_told(out: Path):
    """UserError where weights cannot be written for want of room: safetensors and torch.save tell that in their own ways."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        if shutil.disk_usage(out).free > 1e8 and not re.search("No space left|quota|inline_container", str(e)):
            raise
        raise UserError(f"{out}: the disk is full; checkpoints are whole, make room and go on with --resume") from e


def save_checkpoint(accelerator: Accelerator, out: Path, progress: dict, loader_state: dict, keep: int) -> None:
    """checkpoints/step-N: weights, optimizer and random state by accelerate, the position in the data of every process,
    progress.json, and a checksum of each file. It gets its name when whole; the oldest beyond keep are removed."""
    folder = out / "checkpoints" / f"step-{progress['step']:07d}"
    part = folder.with_suffix(".part")
    if accelerator.is_main_process:
        for left_over in (out / "checkpoints").glob("*.part"):
            shutil.rmtree(left_over)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with full_disk_told(out):
        accelerator.save_state(str(part))
    write_text(part / f"loader-{accelerator.process_index}.json", json.dumps(loader_state))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(part / "progress.json", json.dumps(progress, indent=1))
        files = {str(p.relative_to(part)): checksum(p) for p in sorted(part.rglob("*")) if p.is_file()}
        write_text(part / "checksums.json", json.dumps(files, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        for old in sorted((out / "checkpoints").glob("step-" + "[0-9]" * 7))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def find_checkpoint(out: Path) -> Path | None:
    """The last checkpoint whose files are all there and whole; damaged ones are named on the way."""
    for folder in sorted((out / "checkpoints").glob("step-" + "[0-9]" * 7), reverse=True):
        try:
            files = json.loads((folder / "checksums.json").read_text())
            bad = [name for name, value in files.items() if checksum(folder / name) != value]
        except (OSError, ValueError) as e:
            bad = [first_line(e)]
        if not bad:
            return folder
        print(f"warning: {folder} is damaged ({bad[0]}); falling back to the one before", file=sys.stderr)
    return None


def lora_hooks(accelerator: Accelerator, unet: UNet2DConditionModel) -> None:
    """Have checkpoints hold the LoRA alone instead of the whole frozen UNet with it."""

    def save(models, weights, folder):
        if accelerator.is_main_process:
            save_file(get_peft_model_state_dict(unet), Path(folder) / "lora.safetensors")
        weights.clear()

    def load(models, folder):
        set_peft_model_state_dict(unet, load_file(Path(folder) / "lora.safetensors"))
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


# -------------------------------------------------------------------------------------------------------------- results


# Copied from hasty_sample.make_grid
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


@torch.no_grad()
def validate(pipe, unet, prompts: list[str], accelerator: Accelerator, autocast, out: Path, step: int, resolution: int):
    """validation/step-N.png: the base model's pictures above those of this step, 30 DDIM steps, guidance 5, same seeds.
    Step 0 is the base model. Every process samples, as a UNet in parts needs all of them, and the first one writes."""
    folder, name, main = out / "validation", f"{step:07d}" if step else "base", accelerator.is_main_process
    folder.mkdir(exist_ok=True)
    trained_unet, training = pipe.unet, unet.training
    pipe.unet = accelerator.unwrap_model(unet).eval()
    size = {"height": resolution, "width": resolution, "output_type": "latent"}
    for i, prompt in enumerate(tqdm(prompts, desc="validation", leave=False, disable=not main)):
        with autocast():
            generator = torch.Generator().manual_seed(i)
            latents = pipe(prompt, num_inference_steps=30, guidance_scale=5.0, generator=generator, **size).images
        if main:
            decoded = pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample
            image = pipe.image_processor.postprocess(decoded.float())[0]
            image.save(folder / f".{name}-{i}.part", format="PNG")
            os.replace(folder / f".{name}-{i}.part", folder / f"{name}-{i}.png")
    pipe.unet.train(training)
    pipe.unet = trained_unet
    if main and step:
        base, trained = ([folder / f"{n}-{i}.png" for i in range(len(prompts))] for n in ("base", name))
        captions = [f"base: {p}" for p in prompts] + [f"step {step}: {p}" for p in prompts]
        grid, _ = make_grid(base + trained, captions, len(prompts))
        grid.save(folder / ".grid.part", format="PNG")
        os.replace(folder / ".grid.part", folder / f"step-{step:07d}.png")
        for path in trained:
            path.unlink()


def plot_metrics(out: Path) -> None:
    """loss.png: loss, implicit accuracy and noise errors over the steps, each step and a running mean."""
    if not (out / "metrics.csv").exists():
        return
    table = pd.read_csv(out / "metrics.csv")
    window = max(1, len(table) // 20)
    figure = matplotlib.figure.Figure(figsize=(7, 7.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    lines = [("loss", "loss"), ("implicit_accuracy", "implicit accuracy")]
    for axis, (column, title) in zip(axes, lines, strict=False):
        axis.plot(table.step, table[column], color="tab:blue", alpha=0.3, lw=1, label="each step")
        mean = table[column].rolling(window, min_periods=1).mean()
        axis.plot(table.step, mean, color="tab:blue", lw=2, label=f"mean of the last {window}")
        axis.set_ylabel(title)
    axes[0].axhline(math.log(2), color="grey", ls="--", lw=1, label="ln 2, where training starts")
    axes[1].axhline(0.5, color="grey", ls="--", lw=1, label="chance")
    ratio = (table.model_mse / table.reference_mse - 1) * 100
    axes[2].plot(table.step, ratio, color="tab:orange", alpha=0.3, lw=1, label="each step")
    axes[2].plot(table.step, ratio.rolling(window, min_periods=1).mean(), color="tab:orange", lw=2, label="mean")
    axes[2].axhline(0, color="grey", ls="--", lw=1, label="the reference's")
    axes[2].set_ylabel("model's noise error over\nthe reference's, %")
    axes[2].set_xlabel("optimizer step")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(out / ".loss.part", format="png", dpi=120)
    os.replace(out / ".loss.part", out / "loss.png")


def save_result(s: Settings, out: Path, unet: UNet2DConditionModel, weights: dict, summary: dict) -> None:
    """unet/ or pytorch_lora_weights.safetensors in save_dtype, settings.yaml and the model card, each whole or not there."""
    dtype = DTYPES[s.save_dtype]
    part = out / ".result.part"
    shutil.rmtree(part, ignore_errors=True)
    if s.lora_rank:
        weights = get_peft_model_state_dict(unet, state_dict=weights)
        layers = convert_state_dict_to_diffusers({k: v.to(dtype) for k, v in weights.items()})
        StableDiffusionXLPipeline.save_lora_weights(part, unet_lora_layers=layers)
        os.replace(part / "pytorch_lora_weights.safetensors", out / "pytorch_lora_weights.safetensors")
        shutil.rmtree(part)
        use = f'pipe.load_lora_weights("{s.output_dir}")'
        flag = "--dpo-lora"
    else:
        with torch.device("meta"):
            result = UNet2DConditionModel.from_config(unet.config)
        result.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
        result.save_pretrained(part)
        shutil.rmtree(out / "unet", ignore_errors=True)
        os.replace(part, out / "unet")
        use = f'pipe.unet = UNet2DConditionModel.from_pretrained("{s.output_dir}", subfolder="unet")'
        flag = "--dpo-unet"
    write_text(out / "settings.yaml", yaml.safe_dump(asdict(s) | summary, sort_keys=False))
    data = huggingface_hub.ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusion-dpo", "dipo", "stable-diffusion-xl"] + (["lora"] if s.lora_rank else []),
        base_model=s.base_model if find_path(s.base_model) is None else None,
        datasets=[s.dataset] if find_path(s.dataset) is None else None,
    )
    rows = "\n".join(f"| {k} | {v} |" for k, v in (asdict(s) | summary).items())
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {'LoRA' if s.lora_rank else 'UNet'} trained with Diffusion-DPO\n\n"
        f"Trained by train_dipo.py from {s.base_model} on {s.dataset}: {summary['steps']} steps of {s.effective_batch_size} "
        "pairs. Made to be sampled by DDIM in 20 to 50 steps:\n\n"
        f"```bash\npython hasty_sample.py --base-model {s.base_model} {flag} {s.output_dir}\n```\n\n"
        f"or with diffusers, `{use}` and a `DDIMScheduler`.\n\n| setting | value |\n|---|---|\n{rows}\n"
    )
    write_text(out / "README.md", text)


# ------------------------------------------------------------------------------------------------------------- training


class Signals:
    """Notes the first SIGTERM or Ctrl-C while it is entered; a second one ends the process as usual."""

    def __enter__(self):
        self.received = 0
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        self.received = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def anywhere(self, accelerator: Accelerator) -> int:
        """The signal that any process received, 0 if none did."""
        if accelerator.num_processes == 1:
            return self.received
        heard = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(heard).max())


def make_optimizer(s: Settings, parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if s.optimizer == "adamw":
        fused = parameters[0].device.type == "cuda"
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=s.weight_decay, fused=fused)
    adafactor = transformers.Adafactor
    return adafactor(parameters, lr=lr, weight_decay=s.weight_decay, scale_parameter=False, relative_step=False)


@torch.no_grad()
def probe(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Copies of up to 8191 evenly spaced weights of each parameter (of this process's part of it)."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return [p.flatten()[:: max(1, p.numel() // 4096)].clone() for p in local]


def open_metrics(path: Path, step: int) -> None:
    """Leave the whole rows up to the step that a resumed run goes on from, no file for a new run."""
    try:
        text = path.read_text(encoding="utf-8") if step else ""
        table = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]))
        write_text(path, table[table["step"] <= step].to_csv(index=False))
    except (FileNotFoundError, KeyError, ValueError):
        if step and path.exists():
            print(f"warning: {path} cannot be read; it begins anew at step {step + 1}", file=sys.stderr)
        path.unlink(missing_ok=True)


def add_metrics(path: Path, row: dict) -> None:
    """Add one row, with a header before the first; whoever reads the file meanwhile sees whole rows."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, old + pd.DataFrame([row]).to_csv(index=False, header=not old))


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


def train(s: Settings) -> None:
    """The whole job, on every process of an accelerate launch."""
    if s.demo:
        s = with_demo(s)
    check_settings(s)
    prompts = read_validation_prompts(s)
    quiet_libraries()
    warnings.filterwarnings("ignore", message=".*set_vital.*")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    out = Path(s.output_dir).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"--output-dir {s.output_dir}: cannot be written to ({e.strerror}); give another") from e
    accumulation = accumulation_steps(s.effective_batch_size, s.train_batch_size, int(os.environ.get("WORLD_SIZE", 1)))
    if s.mixed_precision == "auto":
        cuda = torch.cuda.is_available() and s.device != "cpu"
        s = replace(
            s,
            mixed_precision="no"
            if not cuda
            else "bf16"
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else "fp16",
        )
    rows = None if read_cache_note(s).get("complete") else open_dataset(s.dataset)
    accelerator = Accelerator(
        cpu=s.device == "cpu",
        mixed_precision=s.mixed_precision,
        gradient_accumulation_steps=accumulation,
        log_with=["tensorboard"] + (["wandb"] if s.wandb else []),
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / "tensorboard")),
        # A process that encodes or writes keeps the others waiting longer than the ten minutes that NCCL would allow.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))],
    )
    try:
        with claimed(out, accelerator):
            run(s, rows, prompts, out, accelerator, accumulation)
            if accelerator.is_main_process:
                (out / ".lock").unlink()
        accelerator.end_training()
    except Stopped:
        accelerator.end_training()
        raise
    except torch.OutOfMemoryError as e:
        raise UserError(
            f"the GPU's memory does not hold {s.train_batch_size} pairs of this size; use a smaller --train-batch-size, "
            "--gradient-checkpointing, --optimizer adafactor, or --lora-rank 64"
        ) from e


def find_progress(s: Settings, out: Path, accelerator: Accelerator) -> tuple[str, dict]:
    """The checkpoint to go on from, empty for none, and what is counted over the run. UserError where a resumed run
    differs from its checkpoint in what cannot change, a line for each other difference."""
    found = [str(find_checkpoint(out) or "")] if accelerator.is_main_process else [None]
    checkpoint, world = broadcast_object_list(found)[0], accelerator.num_processes
    if not checkpoint:
        counts = ("step", "pairs", "ties", "unreadable", "skipped", "skipped_in_row")
        return "", dict.fromkeys(counts, 0) | {"processes": world, "settings": asdict(s)}
    if not s.resume:
        raise UserError(f"--output-dir {s.output_dir}: holds {checkpoint}; --resume goes on from it, or give another folder")
    progress = json.loads((Path(checkpoint) / "progress.json").read_text())
    if progress["processes"] != world:
        raise UserError(
            f"--resume: the checkpoint is of {progress['processes']} processes and its positions in the data fit no other "
            f"number, these are {world}; use as many"
        )
    for key, value in asdict(s).items():
        old = progress["settings"].get(key, value)
        if old == value or key in ("output_dir", "resume") or (key == "cache_dir" and old and value):
            continue
        if key not in MAY_CHANGE:
            raise UserError(f"--resume: the checkpoint was made with {key} {old!r}, this run has {value!r}; use the same")
        accelerator.print(f"{key} is {value!r} from here on; it was {old!r}")
    return checkpoint, progress


def run(s: Settings, rows, prompts: list[str], out: Path, accelerator: Accelerator, accumulation: int) -> None:
    """Everything between the checks of the settings and the result. rows: the data set, None with a finished cache."""
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    main, say = accelerator.is_main_process, accelerator.print
    in_parts = accelerator.distributed_type in ("FSDP", "DEEPSPEED")
    if in_parts and s.optimizer == "adafactor":
        raise UserError("--optimizer adafactor: does not work on weights in parts (FSDP, DeepSpeed); use --optimizer adamw")
    if in_parts and s.lora_rank:
        raise UserError(f"--lora-rank {s.lora_rank}: has no use for FSDP or DeepSpeed; launch without their configuration")
    checkpoint, progress = find_progress(s, out, accelerator)
    if (
        rows is not None
        and next(iter(Pairs(rows, lambda row: read_pair(row, 8), lambda key: {}, 0, 1, epochs=1)), None) is None
    ):
        raise UserError(f"--dataset {s.dataset}: no usable pair in it; all are ties or unreadable")
    lr = s.learning_rate * (s.effective_batch_size if s.scale_lr else 1)
    times = "" if s.scale_lr else ", taken as it is (--scale-lr multiplies it by the effective batch)"
    times = times or f" = {s.learning_rate:g} per pair x {s.effective_batch_size} (--no-scale-lr takes it as it is)"
    say(
        f"effective batch {s.effective_batch_size} = {s.train_batch_size} per device x {world} "
        f"{'process' if world == 1 else 'processes'} x {accumulation} accumulated\nlearning rate {lr:.4g}{times}"
    )

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[s.mixed_precision]
    pipe = load_models(s, device, dtype)
    unet, noise_scheduler = pipe.unet, DDPMScheduler.from_config(pipe.scheduler.config)
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    multiple = factor * 2 ** (len(unet.config.block_out_channels) - 1)
    resolution = s.resolution or unet.config.sample_size * factor
    if resolution % multiple:
        raise UserError(f"--resolution {resolution}: must be a multiple of {multiple}")
    latent_shape = (unet.config.in_channels, resolution // factor, resolution // factor)
    empty = encode_captions(pipe, [""])
    if pipe.config.force_zeros_for_empty_prompt:
        empty = tuple(torch.zeros_like(x) for x in empty)

    timesteps, dropout = noise_scheduler.config.num_train_timesteps, s.caption_dropout
    draws = functools.partial(random_draws, latent_shape=latent_shape, train_timesteps=timesteps, caption_dropout=dropout)
    if s.cache_dir:
        folder = Path(s.cache_dir).expanduser()
        with contextlib.ExitStack() as stack:
            # A finished cache is read only, by any number of runs.
            if not broadcast_object_list([read_cache_note(s).get("complete")])[0]:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(claimed(folder, accelerator, "cache-dir"))
                except OSError as e:
                    raise UserError(f"--cache-dir {folder}: cannot be written to ({e.strerror}); give another") from e
            cache = fill_cache(s, rows, pipe, accelerator, resolution)
        if main:
            (folder / ".lock").unlink(missing_ok=True)
        progress |= {k: cache["counts"][k] for k in ("ties", "unreadable")}
        rows = open_cache(s)
        read = functools.partial(read_cached, shapes=cache["shapes"], dtype=pipe.vae.dtype)
        pairs = Pairs(rows, read, draws, s.seed, s.shuffle_buffer, rank, world)
    else:
        read = functools.partial(read_pair, resolution=resolution)
        pairs = Pairs(rows, read, draws, s.seed, s.shuffle_buffer, rank, world, s.max_train_pairs)
    workers = s.num_workers if s.num_workers is not None else 4 if device.type == "cuda" else 0
    loader = make_loader(pairs, s.train_batch_size, workers, device.type == "cuda")

    reference = None
    if s.lora_rank:
        torch.manual_seed(s.seed)
        add_lora(unet, s.lora_rank, dtype)
        lora_hooks(accelerator, unet)
    else:
        reference = make_reference(unet, dtype, norms=dtype if in_parts else torch.float32)
    unet.train()
    if s.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if accelerator.distributed_type == "DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"train_micro_batch_size_per_gpu": s.train_batch_size, "gradient_clipping": s.max_grad_norm}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    optimizer = make_optimizer(s, [p for p in unet.parameters() if p.requires_grad], lr)
    model, optimizer = accelerator.prepare(unet, optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    same_prompts = progress["settings"]["validation_prompts"] == s.validation_prompts
    if checkpoint:
        try:
            accelerator.load_state(checkpoint)
        except Exception as e:
            # Among others what torch.load says of a pickle that holds more than weights.
            raise UserError(
                f"--resume: {checkpoint} cannot be loaded ({first_line(e)[:200]}); delete it, or start anew"
            ) from e
        accelerator.step = 0  # a run that ended within an accumulation starts that one anew
        loader.load_state_dict(json.loads((Path(checkpoint) / f"loader-{rank}.json").read_text()))
        say(f"going on from {checkpoint}")
    progress |= {"settings": asdict(s)}
    if main:
        open_metrics(out / "metrics.csv", progress["step"])
    config = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(s).items()}
    accelerator.init_trackers("dipo", config, {"tensorboard": {"purge_step": progress["step"] + 1}})

    # FSDP and DeepSpeed cast by themselves; with autocast around it the reference would be computed otherwise.
    autocast = contextlib.nullcontext if in_parts else accelerator.autocast

    @contextlib.contextmanager
    def base_model():
        """The model that training started from, for what is done inside."""
        with adapter_off(unet) if reference is None else contextlib.nullcontext():
            yield reference if reference is not None else model

    if s.validate_every and not (checkpoint and same_prompts and (out / f"validation/base-{len(prompts) - 1}.png").exists()):
        with base_model() as base:
            validate(pipe, base, prompts, accelerator, autocast, out, 0, resolution)

    time_ids = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], device=device, dtype=dtype)

    def predict(net, noisy, t, text, pooled):
        conditions = {"text_embeds": pooled, "time_ids": time_ids.expand(len(noisy), -1)}
        return net(noisy, t, encoder_hidden_states=text, added_cond_kwargs=conditions).sample

    def checkpoint_now() -> None:
        save_checkpoint(accelerator, out, progress, loader_state, s.keep_checkpoints)
        if main:
            plot_metrics(out)

    if progress["step"] >= s.max_train_steps:
        say(f"step {progress['step']} is at or beyond --max-train-steps {s.max_train_steps}: nothing to train, saving it")
    size = s.effective_batch_size
    bar = tqdm(
        total=s.max_train_steps * size, initial=progress["step"] * size, unit="pair", desc="training", disable=not main
    )
    batches, before = iter(loader), probe(parameters)
    loader_state = loader.state_dict()
    with bar, Signals() as signals:
        while progress["step"] < s.max_train_steps:
            rate = lr * min(1.0, (progress["step"] + 1) / max(1, s.lr_warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            began, sums, left_out = time.perf_counter(), torch.zeros(4, device=device), torch.zeros(2)
            for _ in range(accumulation):
                if number := signals.anywhere(accelerator):
                    # What this step has added up is let go; the checkpoint is of its beginning.
                    checkpoint_now()
                    raise Stopped(number)
                batch = next(batches)
                latents, text, pooled = prepare_batch(pipe, batch, empty)
                noise, t = (batch[k].to(device, non_blocking=True) for k in ("noise", "timestep"))
                t = torch.cat([t, t])
                noisy = noise_scheduler.add_noise(latents, torch.cat([noise, noise]), t).to(dtype)
                with accelerator.accumulate(model):
                    with torch.no_grad(), autocast(), base_model() as base:
                        base_pred = predict(base, noisy, t, text, pooled)
                    loss, argument, m, r = dpo_loss(predict(model, noisy, t, text, pooled), base_pred, noise, s.beta_dpo)
                    if progress["step"] == 0 and not sums.any():
                        check_start(argument)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, s.max_grad_norm)
                        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                        norm = float("nan" if norm is None else norm)
                        # The scaler of fp16 and DeepSpeed leave out such a step by themselves, and have to see it.
                        sees_it = accelerator.scaler is not None or accelerator.distributed_type == "DEEPSPEED"
                        if math.isfinite(norm) or sees_it:
                            optimizer.step()
                    optimizer.zero_grad()
                accuracy = (argument > 0).float() + (argument == 0).float() / 2
                sums += torch.stack([loss, accuracy.mean(), m.mean(), r.mean()]).detach()
                left_out += torch.stack([batch["ties"].sum(), batch["unreadable"].sum()])
            figures = torch.cat([sums / (accumulation * world), left_out.to(device)])
            loss, accuracy, m, r, ties, unreadable = accelerator.reduce(figures, "sum").tolist()
            skipped = not math.isfinite(loss) or accelerator.optimizer_step_was_skipped
            skipped |= not math.isfinite(norm) and accelerator.distributed_type != "DEEPSPEED"

            for key, more in (("step", 1), ("pairs", size), ("skipped", skipped)):
                progress[key] += int(more)
            for key, more in (("ties", ties), ("unreadable", unreadable)):
                progress[key] += 0 if s.cache_dir else int(more)
            progress["skipped_in_row"] = progress["skipped_in_row"] + 1 if skipped else 0
            step = progress["step"]
            row = {"loss": loss, "implicit_accuracy": accuracy, "model_mse": m, "reference_mse": r}
            row |= {"learning_rate": rate, "grad_norm": norm, "pairs_per_second": size / (time.perf_counter() - began)}
            row |= {k: progress[k] for k in ("skipped", "ties", "unreadable")}
            accelerator.log(row, step=step)
            if main:
                add_metrics(out / "metrics.csv", {"step": step} | row)
            bar.update(size)
            bar.set_postfix_str(f"step {step}, loss {loss:.4f}, accuracy {accuracy:.2f}, mse {m:.4f}, reference's {r:.4f}")
            loader_state = loader.state_dict()
            if skipped:
                say(f"step {step}: loss or gradient is not finite; step skipped ({progress['skipped']} so far)")
            elif before is not None and accelerator.distributed_type != "DEEPSPEED":  # which moves float32 copies
                check_moved(before, parameters, rate, s.lora_rank > 0, accelerator)
                before = None
            if progress["skipped_in_row"] >= MAX_SKIPPED:
                raise UserError(
                    f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row; the last checkpoint in "
                    f"{out / 'checkpoints'} is from before: resume it with a lower --learning-rate, or train in bf16"
                )
            if m > s.max_mse_ratio * r:
                checkpoint_now()
                raise UserError(
                    f"step {step}: the model's noise error {m:.4f} exceeds {s.max_mse_ratio:g} times the reference's "
                    f"{r:.4f}: it is losing what it knew; start again with a lower --learning-rate, or resume with a larger "
                    "--max-mse-ratio (checkpoints of this step and before are kept)"
                )
            last = step >= s.max_train_steps
            if s.validate_every and (last or step % s.validate_every == 0):
                validate(pipe, model, prompts, accelerator, autocast, out, step, resolution)
            if last or step % s.checkpoint_every == 0:
                checkpoint_now()

    weights = accelerator.get_state_dict(model)
    if main:
        summary = {"steps": progress["step"], "effective_learning_rate": lr, "processes": world}
        summary |= {k: progress[k] for k in ("pairs", "ties", "unreadable", "skipped")}
        summary |= {f"{m.__name__}_version": str(m.__version__) for m in (torch, diffusers, transformers)}
        with full_disk_told(out):
            save_result(s, out, unet, weights, summary)
        print(
            f"{out}: {progress['step']} steps, {progress['ties']} ties and {progress['unreadable']} unreadable pairs left "
            f"out, {progress['skipped']} steps skipped; {out / 'metrics.csv'}, {out / 'loss.png'}; sample it with "
            f"hasty_sample.py {'--demo ' if s.demo else ''}{'--dpo-lora' if s.lora_rank else '--dpo-unet'} {s.output_dir}"
        )
    accelerator.wait_for_everyone()


def check_start(argument: torch.Tensor) -> None:
    """UserError unless model and reference agree, as they must before the first step."""
    far = argument.detach().abs().mean().item()
    if far > 0.1:
        raise UserError(
            f"model and reference differ before training (mean argument {far:.3g}, should be 0), so their differences mean "
            "nothing; use --mixed-precision bf16 or no"
        )


def check_moved(before, parameters, rate: float, lora: bool, accelerator: Accelerator) -> None:
    """Print which share of the weights a step changed; UserError when none did, a warning when most did not. Zeros are left
    out, as any step changes them, but for a LoRA, half of which starts as zeros."""
    pairs = [(a, b, (a != 0) | lora) for a, b in zip(before, probe(parameters), strict=True)]
    counts = [sum(int(((a != b) & mask).sum()) for a, b, mask in pairs), sum(int(mask.sum()) for *_, mask in pairs)]
    moved, total = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()
    share = f"{100 * moved / total:.1f} % of {total} weights looked at"
    accelerator.print(f"the first step, at learning rate {rate:.3g}, moved {share}")
    if not moved:
        raise UserError(
            f"no weight moved in the first step: at learning rate {rate:.3g} steps are smaller than the spacing of float32 "
            "numbers; use --scale-lr, or a larger --learning-rate"
        )
    if moved < 0.4 * total and accelerator.is_main_process:
        print("warning: most steps are lost in rounding at this rate, which is that of warm-up", file=sys.stderr)


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


def end(message: str, code: int) -> None:
    """Print the last line and exit. One process of several must not wait for the others to end in order, as these may be
    waiting for it; and what all of them found out is said by the first, which has ended the others before they speak."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(10)
        message = f"[process {rank}] {message}"
    print(message, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)
    sys.exit(code)


def main() -> None:
    s = parse_settings(Settings, __doc__)
    try:
        train(s)
    except UserError as e:
        end(f"error: {e}", 2)
    except Stopped as e:
        if os.environ.get("RANK", "0") == "0":
            print("stopped; a checkpoint is written, the same command with --resume goes on", file=sys.stderr)
        sys.exit(128 + e.args[0])
    except KeyboardInterrupt:
        end("stopped; --resume goes on from the last checkpoint", 130)
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            end(f"error: {s.output_dir}: {e.strerror}; make room and go on with --resume", 2)
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        end(traceback.format_exc(), 1)


if __name__ == "__main__":
    main()
