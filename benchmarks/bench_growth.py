"""How the cost of hasty_sample.py's loop grows with steps, batch, resolution and processes, and its memory with prompts.

    python benchmarks/bench_growth.py                    # SDXL on a GPU; without one, the demo model
    python benchmarks/bench_growth.py --random-weights   # SDXL at full size from its configuration alone

All take turns in rounds, after a warm-up, the device synchronised; a row holds the median and the range. The plot shows the
fastest rounds, as whatever else a machine does only adds to them, with bars to the slowest. The fastest over steps are
fitted by a straight line: its intercept is what an image costs besides the steps (text, decoding), its slope a step. Memory
is that of the host's process while hasty_sample.py samples 10,000 prompts at one step and half the size with every image
thrown away; the first 1,000 fill caches.
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
import unittest.mock
from dataclasses import dataclass, replace
from pathlib import Path

import bench_sampling
import numpy as np
import pandas as pd
import scipy.stats
import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import hasty_sample


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
    """Seconds from prompts to pixels in host memory."""
    config, device = pipe.scheduler.config, pipe.unet.device
    timesteps = hasty_sample.ddim_timesteps(steps, "leading", config.num_train_timesteps, config.steps_offset)
    prompts = [f"picture number {i} of a lighthouse above the sea" for i in range(batch_size)]
    start = bench_sampling.clock(device)
    embeds = hasty_sample.encode_prompts(pipe, prompts, "", True)
    generators = [torch.Generator().manual_seed(i) for i in range(batch_size)]
    sizes = (generators, size, size, 5.0, 0.0, pipe.vae_scale_factor)
    latents = hasty_sample.ddim_sample(pipe.unet, pipe.scheduler.alphas_cumprod, timesteps, *embeds, *sizes)
    hasty_sample.decode(pipe.vae, latents).cpu()
    return bench_sampling.clock(device) - start


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


def resident_megabytes() -> float:
    """Memory of this process that lies in RAM (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def watch_memory(pipe, prompts: int) -> list[tuple[int, float]]:
    """Megabytes after every 500 of so many prompts, through hasty_sample.py's own loop over batches."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor // 2
    s = replace(hasty_sample.Settings(), batch_size=50, num_inference_steps=1, compile="off")
    record = {"negative_prompt": "", "height": size, "width": size}
    paths = [Path(f"{i:05d}.png") for i in range(prompts)]
    wanted = {p: record | {"prompt": f"prompt number {i}, a lighthouse", "seed": i} for i, p in enumerate(paths)}
    seen, written = [], 0

    def throw_away(path, image, record):
        nonlocal written
        written += 1
        if written % 500 == 0:
            seen.append((written, resident_megabytes()))

    PartialState()
    with unittest.mock.patch.object(hasty_sample, "save_png", throw_away):
        hasty_sample.sample_all(s, pipe, paths, wanted, [999], size, size, {})
    return seen


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
            fit = scipy.stats.linregress(part["x"], part["low"])
            x = np.array([0, part["x"].max()])
            axis.plot(x, fit.intercept + fit.slope * x, color="grey", lw=1)
            axis.set_title(f"{1000 * fit.intercept:.0f} ms + {1000 * fit.slope:.1f} ms per step", fontsize=10)
        axis.set_xlabel(labels[kind])
        axis.grid(alpha=0.3)
    figure.suptitle(bench_sampling.title(table.iloc[0]))
    figure.savefig(path, dpi=120)


def run(s: Settings) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe, model = bench_sampling.load(bench_sampling.Settings(random_weights=s.random_weights), device, dtype)
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    common = {"date": datetime.date.today().isoformat()} | bench_sampling.machine(device)
    common |= {"model": model, "dtype": str(dtype).removeprefix("torch.")}
    common |= {p: importlib.metadata.version(p) for p in ("torch", "diffusers")} | {"python": platform.python_version()}
    rows = []

    def add(kind: str, x: float, values: list[float], **other) -> None:
        value = float(np.median(values))
        measured = {"value": round(value, 4), "low": round(min(values), 4), "high": round(max(values), 4)}
        rows.append({"kind": kind, "x": x} | measured | common | {"rounds": len(values)} | other)
        print(f"{kind} {x}: {value:.4g} ({min(values):.4g} to {max(values):.4g})", flush=True)

    jobs = [("steps", n, (n, 1, own)) for n in s.steps] + [("batch", n, (10, n, own)) for n in s.batch_sizes]
    sizes = s.sizes or (own // 2, 3 * own // 4, own, 3 * own // 2, 2 * own)
    jobs += [("resolution", n, (10, 1, n)) for n in sizes]
    # All take turns, so that a machine that changes its pace changes it for all.
    seconds = {job: [] for job in jobs}
    for _ in range(s.rounds + 1):
        for job in jobs:
            seconds[job].append(time_sampling(pipe, *job[2]))
    for (kind, x, _), values in seconds.items():
        add(kind, x, values[1:])
    if s.prompts:
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            seen = watch_memory(pipe, s.prompts)
        for x, value in seen:
            add("memory", x, [value])
        later = [value for x, value in seen if x > 1000]
        if len(later) > 2:
            slope = scipy.stats.linregress(range(len(later)), later).slope / 500
            print(f"memory after the first 1,000 prompts: {1e3 * slope:+.2f} kB a prompt")
    for n in s.processes:
        # The difference of two lengths leaves out what happens once.
        rates = [(96 - 24) / (time_processes(n, 96) - time_processes(n, 24)) for _ in range(min(s.rounds, 3))]
        add("processes", n, rates, device="cpu", model="demo", dtype="float32")
    table = pd.DataFrame(rows)
    bench_sampling.append(rows, s.csv)
    if "steps" in set(table["kind"]):
        part = table[table["kind"] == "steps"]
        fit = scipy.stats.linregress(part["x"], part["low"])
        print(f"time = {fit.intercept:.4f} s + {fit.slope:.5f} s x steps, r^2 = {fit.rvalue**2:.5f}")
    if s.csv:
        plot(table, Path(s.csv).with_suffix(".png"))


def main() -> None:
    bench_sampling.command(Settings, __doc__, run)


if __name__ == "__main__":
    main()
