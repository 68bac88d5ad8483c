"""How the cost of hasty_sample.py's loop grows with steps, batch, resolution and processes, and its memory with prompts.

    python benchmarks/bench_growth.py                    # SDXL on a GPU; without one, the demo model
    python benchmarks/bench_growth.py --random-weights   # SDXL at full size from its configuration alone

All take turns in rounds, after a warm-up, the device synchronised; a row holds the median and the range. The plot shows the
fastest rounds, as whatever else a machine does only adds to them, with bars to the slowest. The fastest over steps are
fitted by a straight line: its intercept is what an image costs besides the steps (text, decoding), its slope a step. Memory
is that of the host's process while hasty_sample.py samples 10,000 prompts at one step and half the size with every image
thrown away; the first 1,000 fill caches.
"""

import os
import subprocess
import sys
import tempfile
import time
import unittest.mock
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import pandas as pd
import psutil
import scipy.stats
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from tqdm import tqdm

import hasty_sample
from dipo import batches
from dipo.devices import clock
from dipo.models import decode


@dataclass
class Settings:
    random_weights: bool = False
    """SDXL at full size with random weights; needs no network"""
    steps: tuple[int, ...] = (1, 5, 10, 20, 30, 50)
    """DDIM steps, at batch 1"""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    """batch sizes, at 10 steps"""
    sizes: tuple[int, ...] = ()
    """pixels of a side, at 10 steps and batch 1; empty: a half to twice the model's own"""
    processes: tuple[int, ...] = (1, 2)
    """processes of hasty_sample.py --demo that share images, on the CPU with a thread each; empty: not measured"""
    prompts: int = 10_000
    """prompts of the run whose memory is watched; 0: not measured"""
    rounds: int = 5
    """rounds of each time"""
    csv: str = "benchmarks/growth.csv"
    """where the rows go, after those that are there; beside it the plot of this run; empty: nowhere"""


def time_sampling(pipe, steps: int, batch_size: int, size: int) -> float:
    """Seconds from prompts to pictures in host memory."""
    before = clock(pipe.unet.device)
    common.pictures(pipe, common.prompts_of(batch_size), 0, steps, size)
    return clock(pipe.unet.device) - before


def time_processes(n: int, images: int) -> float:
    """Wall-clock seconds of hasty_sample.py --demo for so many images on n processes, start and loading included."""
    script = Path(hasty_sample.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port", "29611"]
    flags = ["--demo", "--images-per-prompt", str(images // 12), "--num-inference-steps", "20", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [*launch, str(script), *flags, "--output-dir", folder],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            check=True,
        )
        return time.perf_counter() - start


def throw_away(path: Path, image: Image.Image, record: dict) -> None:
    """What becomes of images whose memory is watched."""


def watch_memory(pipe, prompts: int) -> list[tuple[int, float]]:
    """Megabytes of this process in RAM after every 500 of so many prompts, half the model's size, a step each."""
    size = common.native_size(pipe) // 2
    wanted = {
        Path(f"{i:05d}.png"): {"prompt": f"prompt number {i}, a lighthouse", "seed": i, "height": size, "width": size}
        for i in range(prompts)
    }
    seen = []
    with unittest.mock.patch.object(batches, "save_png", throw_away), tqdm(disable=True) as bar:
        for i, batch in enumerate(batches.Batches(pipe, wanted, [999], 50, bar, timing=False), start=1):
            with batch:
                batch.save(decode(pipe.vae, hasty_sample.sample(pipe, batch, batch.tau, 0.0, 5.0)))
            if i % 10 == 0:
                seen.append((50 * i, psutil.Process().memory_info().rss / 1e6))
    return seen


def fit_line(part: pd.DataFrame):
    """The line through the fastest rounds over the steps."""
    return scipy.stats.linregress(part["x"], part["low"])


def plot(table: pd.DataFrame, path: Path) -> None:
    labels = {"steps": "steps", "batch": "images in a batch", "resolution": "pixels of a side", "processes": "processes"}
    labels |= {"memory": "prompts done"}
    kinds = [k for k in labels if k in set(table["kind"])]
    figure = Figure(figsize=(3.6 * len(kinds), 3.6), layout="constrained")
    for axis, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        part = table[table["kind"] == kind]
        if kind == "memory":
            axis.plot(part["x"], part["value"])
            axis.set(ylabel="resident memory, MB", ylim=(0, 1.25 * part["value"].max()))
        else:
            best = part["high"] if kind == "processes" else part["low"]
            axis.errorbar(part["x"], best, yerr=[best - part["low"], part["high"] - best], fmt="o", elinewidth=1)
            axis.set(ylabel="images per second" if kind == "processes" else "seconds", ylim=(0, None), xlim=(0, None))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if kind == "steps":
            fit = fit_line(part)
            x = np.array([0, part["x"].max()])
            axis.plot(x, fit.intercept + fit.slope * x, color="grey", lw=1)
            axis.set_title(f"{1000 * fit.intercept:.0f} ms + {1000 * fit.slope:.1f} ms per step", fontsize=10)
        axis.set_xlabel(labels[kind])
        axis.grid(alpha=0.3)
    figure.suptitle(common.title(table.iloc[0]))
    figure.savefig(path, dpi=120)


def measure(s: Settings, pipe) -> list[tuple]:
    """(kind, x, values) of what is sampled in this process, and memory."""
    own = common.native_size(pipe)
    sizes = s.sizes or (own // 2, 3 * own // 4, own, 3 * own // 2, 2 * own)
    jobs = [("steps", n, (n, 1, own)) for n in s.steps] + [("batch", n, (10, n, own)) for n in s.batch_sizes]
    seconds = {job: [] for job in jobs + [("resolution", n, (10, 1, n)) for n in sizes]}
    # All take turns, so that a machine that changes its pace changes it for all.
    for _ in range(s.rounds + 1):
        for job, values in seconds.items():
            values.append(time_sampling(pipe, *job[2]))
    seen = watch_memory(pipe, s.prompts)
    later = [value for x, value in seen if x > 1000]
    if len(later) > 2:
        slope = scipy.stats.linregress(range(len(later)), later).slope / 500
        print(f"memory after the first 1,000 prompts: {1e3 * slope:+.2f} kB a prompt")
    return [(kind, x, values[1:]) for (kind, x, _), values in seconds.items()] + [("memory", x, [v]) for x, v in seen]


def main(s: Settings) -> None:
    device = common.begin(s)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe, model = common.load(s.random_weights, device, dtype)
    measured = measure(s, pipe)
    for n in s.processes:
        # The difference of two lengths leaves out what happens once.
        rates = [(96 - 24) / (time_processes(n, 96) - time_processes(n, 24)) for _ in range(min(s.rounds, 3))]
        measured.append(("processes", n, rates))
    rows, same = [], common.machine(device) | {"model": model, "dtype": str(dtype).removeprefix("torch.")}
    for kind, x, values in measured:
        row = {"kind": kind, "x": x} | common.spread(values, "value") | same | common.versions("torch", "diffusers")
        other = {"device": "cpu", "model": "demo", "dtype": "float32"} if kind == "processes" else {}
        rows.append(row | {"rounds": len(values)} | other)
        print("{kind} {x}: {value:.4g} ({low:.4g} to {high:.4g})".format(**row), flush=True)
    table = pd.DataFrame(rows)
    common.append(rows, s.csv)
    if s.steps:
        fit = fit_line(table[table["kind"] == "steps"])
        print(f"time = {fit.intercept:.4f} s + {fit.slope:.5f} s x steps, r^2 = {fit.rvalue**2:.5f}")
    if s.csv:
        plot(table, Path(s.csv).with_suffix(".png"))


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
