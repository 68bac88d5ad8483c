"""Will it fit? The memory that SDXL takes by part in training and sampling, predicted from its configuration on any machine,
and beside it what a run took here: SDXL with random weights on a GPU, the demo model without one.

    python benchmarks/bench_memory.py

Training is train_dipo.py's as --dry-run predicts it. Sampling is a call of the UNet with guidance, or the decoding of one
picture, whichever takes more, over the weights of all parts. Measured is torch.cuda.max_memory_allocated on a GPU, and on
the CPU by how much the resident memory of a process of its own has grown, at most, since everything was imported.
"""

import contextlib
import io
import math
import multiprocessing
import os
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import bench_training
import common
import pandas as pd
import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import train_dipo
from dipo import memory
from dipo.cli import UserError, first_line
from dipo.devices import DTYPES
from dipo.files import find_path
from dipo.models import decode

# What differs from train_dipo.py's defaults, and over how many GPUs FSDP spreads it.
TRAINING = {
    "in full": ({}, 0),
    "in full, AdamW": ({"optimizer": "adamw"}, 0),
    "in full, 8-bit AdamW": ({"optimizer": "adamw8bit"}, 0),
    "in full, no checkpointing": ({"gradient_checkpointing": False}, 0),
    "in full, no reference (sft, mapo)": ({"loss": "sft"}, 0),
    "in full, AdamW, FSDP over 2": ({"optimizer": "adamw"}, 2),
    "in full, AdamW, FSDP over 8": ({"optimizer": "adamw"}, 8),
    "LoRA of rank 64": ({"lora_rank": 64}, 0),
    "LoRA of rank 64, no checkpointing": ({"lora_rank": 64, "gradient_checkpointing": False}, 0),
}
# The type of all parts, and that of the VAE, which is float32 for SDXL's own.
SAMPLING = {"fp16": ("fp16", "fp16"), "fp16, VAE in float32": ("fp16", "fp32"), "fp32": ("fp32", "fp32")}


@dataclass
class Settings:
    base_model: str = "assets/configs/sdxl"
    """whose configuration it is"""
    pairs: tuple[int, ...] = (1, 2, 4, 8)
    """pairs trained on at once"""
    images: tuple[int, ...] = (1, 4, 8)
    """images sampled together"""
    measured: tuple[int, ...] = (8, 32, 64)
    """pairs at once of the runs that are measured without a GPU"""
    csv: str = "benchmarks/memory.csv"
    """where the rows go, in the place of those that are there; empty: nowhere"""


def training_settings(base_model: str, pairs: int, **more) -> train_dipo.Settings:
    options = {"mixed_precision": "bf16", "beta_dpo": 5000.0} | more
    return train_dipo.Settings(base_model=base_model, vae="", train_batch_size=pairs, **options)


def sampling(base_model: str, images: int, dtype: str, vae_dtype: str) -> memory.Need:
    """What hasty_sample.py needs for so many images at once, activations being those of a UNet call or of a decoding."""
    unet, vae, encoders = memory.parts(training_settings(base_model, 1))
    unet, vae = unet.to(DTYPES[dtype]), vae.to(DTYPES[vae_dtype])
    own = memory.bytes_of(unet), 0, memory.bytes_of(vae, *(m.to(DTYPES[dtype]) for m in encoders))
    mode, c = FakeTensorMode(), unet.config
    unet, vae = memory.faked(unet, mode), memory.faked(vae, mode)
    with mode, torch.no_grad(), memory.Tally() as tally:
        common.unet_flops(unet, 2 * images)
        decode(vae, torch.zeros(images, c.in_channels, c.sample_size, c.sample_size))
    return memory.Need(*own, 0, 0, tally.most, tally.flops / images)


def took(settings: train_dipo.Settings) -> float:
    """Bytes that a run took at most."""
    before = psutil.Process().memory_info().rss
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        bench_training.train_only(settings)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def measured(settings: train_dipo.Settings) -> float:
    """The same of a process of its own; NaN for what does not fit."""
    # Without which glibc keeps what was freed.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(took, settings).result()
        except UserError as e:
            print(f"left out: {first_line(e)}", flush=True)
            return math.nan


def runs(s: Settings, device: torch.device, folder: Path):
    """Each run that is measured: what it is called, its pairs at once, its settings."""
    keep = {"max_train_steps": 2, "validate_every": 0, "lr_warmup_steps": 0}
    if device.type == "cpu":
        for n in s.measured:
            options = {"effective_batch_size": 2 * n, "train_batch_size": n, "max_train_pairs": 4 * n, "device": "cpu"}
            settings = train_dipo.Settings(demo=True, output_dir=str(folder / f"{n}"), **options | keep)
            yield "demo, in full, AdamW", n, train_dipo.complete(settings)
        return
    common.random_sdxl(torch.device("cpu"), torch.float16).save_pretrained(folder / "sdxl")
    bench_training.make_pairs(folder / "pairs.parquet", 4 * max(s.pairs), 1024)
    for kind in ("in full", "in full, AdamW", "LoRA of rank 64"):
        for n in s.pairs:
            options = TRAINING[kind][0] | keep | {"dataset": str(folder / "pairs.parquet"), "effective_batch_size": 2 * n}
            options["output_dir"] = str(folder / f"{kind}-{n}")
            yield kind, n, training_settings(str(folder / "sdxl"), n, **options)


def row(kind: str, at_once: int, need: memory.Need, took: float = math.nan) -> dict:
    """A row of the table, in GB."""
    sizes = {k: round(v / 1e9, 2) for k, v in need._asdict().items() if k != "flops"}
    total = {"total": round(need.total / 1e9, 2), "measured": round(took / 1e9, 2)}
    return {"what": kind, "at_once": at_once} | sizes | total | {"fits": min(need.fits, default=math.nan)}


def main(s: Settings) -> None:
    device, rows = common.begin(s), []
    base = str(find_path(s.base_model))
    for kind, dtypes in SAMPLING.items():
        rows += [row(f"sampling, {kind}", n, sampling(base, n, *dtypes)) for n in s.images]
    for kind, (more, shards) in tqdm(TRAINING.items(), desc="training", leave=False):
        rows += [row(kind, n, memory.predict(training_settings(base, n, **more), shards)) for n in s.pairs]
    with tempfile.TemporaryDirectory() as name:
        for kind, n, settings in runs(s, device, Path(name)):
            rows.append(row(kind, n, memory.predict(settings), measured(settings)))
    table = pd.DataFrame(rows)
    print(table.to_markdown(index=False))
    if s.csv:
        table.assign(**common.versions("torch", "diffusers")).to_csv(s.csv, index=False)


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
