"""Time sampling: hasty_sample.py's loop beside diffusers' own pipeline, plain and with its documented speed recipe.

    python benchmarks/bench_sampling.py                                    # SDXL on a GPU; without one, the demo model
    python benchmarks/bench_sampling.py --random-weights                   # SDXL at full size from its configuration alone
    python benchmarks/bench_sampling.py --steps 30 --batch-sizes 1 --ways pipeline ours compiled

The ways, all DDIM with guidance 5, from prompts to pictures in memory:

    pipeline    StableDiffusionXLPipeline as its documentation shows it (fp16 on a GPU, float32 on the CPU)
    recipe      the same with huggingface/diffusion-fast's lossless steps: bf16 on a GPU, fused QKV projections,
                channels_last, torch.compile of UNet and VAE decoder with its options
    ours        hasty_sample.py's loop (in --dtype)
    compiled    the same with --compile
    interval    ours with --guidance-interval 0.28 5.42 (not among the default ways, as its images differ)

All ways and numbers of steps take turns, batch size by batch size, after a warm-up of each, the device synchronised; a row
holds the median of the rounds, their range, and the median of the rounds' ratios to the pipeline. Time does not depend on
the weights, so random ones do. The floor is the number of operations (torch's FlopCounterMode, one UNet call and one
decoding) over the rate of a large matrix product, measured in the same rounds. Without a GPU the ratios tell of overhead on
the demo model, not of SDXL.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from dipo.cli import UserError
from dipo.compiled import INDUCTOR, compile_unet, forget_compiled
from dipo.devices import DTYPES, clock
from dipo.models import decode
from dipo.timesteps import successive

Way = Literal["pipeline", "recipe", "ours", "compiled", "interval"]
# Kynkäänniemi et al. 2024, figure 1 for SDXL.
INTERVAL = (0.28, 5.42)


@dataclass
class Settings:
    base_model: str = common.SDXL
    """SDXL pipeline: a folder or a hub name; the demo model without a GPU"""
    random_weights: bool = False
    """SDXL at full size with random weights instead; needs no network"""
    ways: tuple[Way, ...] = ("pipeline", "recipe", "ours", "compiled")
    """what takes turns"""
    steps: tuple[int, ...] = (20, 30, 50, 500)
    """DDIM steps"""
    batch_sizes: tuple[int, ...] = (1, 4, 8)
    """images sampled together"""
    rounds: int = 5
    """rounds of each way"""
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """of ours, compiled and interval: fp16, bf16, fp32; auto: fp16 on a GPU, fp32 on the CPU"""
    csv: str = "benchmarks/sampling.csv"
    """where the rows go, after those that are there, as they come; beside it the plot of this run; empty: nowhere"""


class Ways:
    """The ways to sample: each a function of a number of steps and of prompts that gives pictures."""

    def __init__(self, s: Settings, device: torch.device):
        self.device, self.pipes, self.model = device, {}, ""
        half = torch.float16 if device.type == "cuda" else torch.float32
        self.dtypes = {"pipeline": half, "recipe": torch.bfloat16 if device.type == "cuda" else half}
        self.dtypes |= dict.fromkeys(("ours", "compiled", "interval"), DTYPES.get(s.dtype, half))
        for way in s.ways:
            # Ways that change the model have one of their own; the others share one where their precision is the same.
            kind = way if way in ("recipe", "compiled") else self.dtypes[way]
            if kind not in self.pipes:
                self.pipes[kind], self.model = common.load(s.random_weights, device, self.dtypes[way], s.base_model)
            self.pipes[way] = self.pipes[kind]
        if "recipe" in s.ways:
            self.follow_recipe(self.pipes["recipe"])
        if "compiled" in s.ways:
            compile_unet(self.pipes["compiled"])

    def follow_recipe(self, pipe) -> None:
        pipe.fuse_qkv_projections()
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        options = INDUCTOR if self.device.type == "cuda" else None
        pipe.unet = torch.compile(pipe.unet, options=options, fullgraph=True, dynamic=False)
        pipe.vae.decode = torch.compile(pipe.vae.decode, options=options, fullgraph=True, dynamic=False)

    def guided_share(self, way: str, steps: int) -> float:
        """Operations of a way's steps as a share of those with guidance in all."""
        low, high = INTERVAL if way == "interval" else (0, math.inf)
        walk = successive(self.pipes[way].scheduler, common.timesteps(self.pipes[way], steps), self.device)
        return (1 + np.mean([low < math.sqrt(1 / a_t - 1) <= high for _, a_t, _ in walk])) / 2

    def call(self, way: str, steps: int, prompts: list[str], seed: int) -> list[Image.Image]:
        pipe = self.pipes[way]
        if way in ("pipeline", "recipe"):
            generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
            return pipe(prompts, num_inference_steps=steps, guidance_scale=5.0, generator=generators).images
        interval = INTERVAL if way == "interval" else None
        return common.pictures(pipe, prompts, seed, steps, common.native_size(pipe), interval)


def plot(rows: list[dict], path: Path) -> None:
    """Seconds per image over the steps, a panel for each batch size: the fastest round, bars to the slowest."""
    table = pd.DataFrame(rows)
    sizes = sorted(set(table["batch_size"]))
    figure = Figure(figsize=(4.2 * len(sizes), 4), layout="constrained")
    for axis, size in zip(np.atleast_1d(figure.subplots(1, len(sizes), sharey=True)), sizes, strict=True):
        for way, part in table[table["batch_size"] == size].groupby("way", sort=False):
            error = [0 * part["low"], part["high"] - part["low"]]
            axis.errorbar(part["steps"], part["low"], yerr=error, marker="o", ms=4, elinewidth=0.7, capsize=2, label=way)
        floor = table[table["batch_size"] == size].drop_duplicates("steps")
        axis.plot(floor["steps"], floor["floor_seconds_per_image"], color="grey", ls="--", label="floor")
        axis.set(title=f"batch {size}", xlabel="steps", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds per image")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(common.title(rows[0]))
    figure.savefig(path, dpi=120)


def warm_up(s: Settings, ways: Ways, prompts: list[str]) -> dict[str, float]:
    """Two calls of each way, as CUDA graphs are recorded in the second one: seconds of the first, without what does not
    fit."""
    first = {}
    for way in s.ways:
        try:
            start = clock(ways.device)
            ways.call(way, min(s.steps), prompts, 0)
            seconds = clock(ways.device) - start
            ways.call(way, min(s.steps), prompts, 0)
            first[way] = seconds
        except torch.OutOfMemoryError:
            print(f"{way}: out of memory at batch {len(prompts)}, left out", flush=True)
    return first


def measure(s: Settings, ways: Ways, batch_size: int) -> list[dict]:
    """A row for each way and number of steps, which all take turns."""
    prompts = common.prompts_of(batch_size)
    pipe = ways.pipes[s.ways[0]]
    c = pipe.unet.config
    latents = torch.zeros(1, c.in_channels, c.sample_size, c.sample_size, device=ways.device)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        step_flops = common.unet_flops(pipe.unet, 2 * batch_size)
        decode_flops = common.flops_of(lambda: decode(pipe.vae, latents))
    first = warm_up(s, ways, prompts)
    cases = [(steps, way) for steps in sorted(s.steps) for way in first]
    seconds, rates = {case: [] for case in cases}, {ways.dtypes[way]: [] for way in first}
    for r in tqdm(range(s.rounds), desc=f"batch {batch_size}", leave=False):
        for dtype in rates:
            rates[dtype].append(common.matrix_rate(ways.device, dtype))
        for steps, way in cases:
            start = clock(ways.device)
            ways.call(way, steps, prompts, r)
            seconds[steps, way].append((clock(ways.device) - start) / batch_size)
    rows = []
    for steps, way in cases:
        values, dtype = seconds[steps, way], ways.dtypes[way]
        ratios = np.divide(seconds.get((steps, "pipeline"), math.nan), values)
        each, rate = float(np.median(values)), float(np.median(rates[dtype]))
        floor = (ways.guided_share(way, steps) * steps * step_flops / batch_size + decode_flops) / rate
        measured = {
            "model": ways.model,
            "way": way,
            "dtype": str(dtype).removeprefix("torch."),
            "steps": steps,
            "batch_size": batch_size,
            "rounds": s.rounds,
            **common.spread(values, "seconds_per_image"),
            "images_per_second": round(1 / each, 3),
            "times_pipeline": round(float(np.median(ratios)), 3),
            "matrix_tflops": round(rate / 1e12, 3),
            "floor_seconds_per_image": round(floor, 4),
            "share_of_floor": round(floor / each, 3),
            "first_call_seconds": round(first[way], 1),
        }
        rows.append(common.machine(ways.device) | measured | common.versions("torch", "diffusers", "transformers"))
        said = f"{way}: {each:.3f} s an image ({min(values):.3f} to {max(values):.3f})"
        print(f"{steps} steps, batch {batch_size}, {said}, {floor / each:.0%} of the matrix rate", flush=True)
    return rows


def main(s: Settings) -> None:
    device = common.begin(s)
    if not (s.ways and s.steps and s.batch_sizes):
        raise UserError("--ways, --steps, --batch-sizes: name at least one of each")
    if max(s.steps) > 1000:
        raise UserError(f"--steps {max(s.steps)}: use 1 to 1000")
    ways, rows = Ways(s, device), []
    if ways.model == "demo":
        print("no GPU here: the ratios below are of overhead on the demo model, not of SDXL", flush=True)
    for batch_size in s.batch_sizes:
        # What was compiled for another batch is of no more use and holds memory.
        for pipe in ways.pipes.values():
            forget_compiled(pipe)
        rows += (new := measure(s, ways, batch_size))
        common.append(new, s.csv)
    shown = ["steps", "batch_size", "way", "seconds_per_image", "low", "high", "times_pipeline", "share_of_floor"]
    print("\n" + pd.DataFrame(rows)[shown].to_markdown(index=False))
    if s.csv:
        plot(rows, Path(s.csv).with_suffix(".png"))


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
