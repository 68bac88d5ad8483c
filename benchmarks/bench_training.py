"""Time training: train_dipo.py beside the way of Diffusion-DPO's own trainer, on the same model and pairs.

    python benchmarks/bench_training.py                    # SDXL on a GPU; without one, the demo model
    python benchmarks/bench_training.py --random-weights   # SDXL at full size from its configuration alone

The ways take turns within one run:

    reference   as SalesforceAIResearch/DiffusionDPO trains SDXL, written anew from its description: one pair a forward pass,
                float32 weights under fp16 autocast (float32 on the CPU), Adafactor, gradient checkpointing, VAE, text
                encoders and reference UNet kept on the CPU and streamed to the GPU for each use (accelerate.cpu_offload)
    full        train_dipo.py, all weights, at --train-batch-sizes, in bf16 over float32 weights (float32 on the CPU)
    lora        the same with --lora-rank 64

A row holds pairs per second, the median of the optimizer steps after each run's first, and the peak of the GPU's memory. The
floor is the operations of a pair (two pictures encoded, model forward and backward, reference forward; torch's
FlopCounterMode) over the rate of a large matrix product, measured in the same run. Time does not depend on the weights.
"""

import copy
import io
import tempfile
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import accelerate
import common
import numpy as np
import pandas as pd
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.memory import clear_device_cache
from diffusers import DDPMScheduler
from PIL import Image
from tqdm import tqdm

import train_dipo
from dipo import schemas
from dipo.cli import UserError, first_line
from dipo.devices import clock
from dipo.files import find_path
from dipo.losses import BETAS, preference_loss
from dipo.models import encode
from dipo.pairs import read_pair


@dataclass
class Settings:
    random_weights: bool = False
    """SDXL at full size with random weights; needs no network"""
    ways: tuple[Literal["reference", "full", "lora"], ...] = ("reference", "full", "lora")
    """what takes turns"""
    train_batch_sizes: tuple[int, ...] = (1, 4)
    """pairs that train_dipo.py holds at once"""
    effective_batch_size: int = 16
    """pairs in an optimizer step"""
    steps: int = 4
    """optimizer steps of a run; the first is not counted"""
    rounds: int = 2
    """runs of each way"""
    csv: str = "benchmarks/training.csv"
    """where the rows go, after those that are there; empty: nowhere"""


def make_pairs(path: Path, n: int, size: int) -> None:
    """n pairs of JPEGs that are no noise, so that decoding them costs what it does for pictures."""
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        out = io.BytesIO()
        small.resize((size, size), Image.Resampling.BICUBIC).save(out, "JPEG")
        return out.getvalue()

    rows = [{"jpg_0": picture(), "jpg_1": picture(), "caption": f"picture {i}", "label_0": float(i % 2)} for i in range(n)]
    pd.DataFrame(rows).to_parquet(path)


def load_models(model: str):
    """The pipeline as train_dipo.py loads it, float32 on the CPU."""
    return train_dipo.load_models(train_dipo.Settings(base_model=model, vae=""), torch.device("cpu"), torch.float32)


def reference_way(s: Settings, model: str, pairs: Path, device: torch.device) -> list[float]:
    """Pairs per second of each optimizer step of the reference trainer's way."""
    cuda = device.type == "cuda"
    half = torch.float16 if cuda else torch.float32
    pipe = load_models(model)
    unet, vae, resolution = pipe.unet, pipe.vae, common.native_size(pipe)
    reference = copy.deepcopy(unet).requires_grad_(False)
    for part in (vae, pipe.text_encoder, pipe.text_encoder_2, reference):
        part.to(half)
        if cuda:
            accelerate.cpu_offload(part, device)
    unet.to(device).train()
    unet.enable_gradient_checkpointing()
    optimizer = transformers.Adafactor(
        unet.parameters(), lr=1e-5, weight_decay=0.01, scale_parameter=False, relative_step=False
    )
    scaler, schedule = torch.amp.GradScaler(device.type, enabled=cuda), DDPMScheduler.from_config(pipe.scheduler.config)
    table = schemas.open_dataset(str(pairs))
    find = schemas.pairs_of(table, str(pairs))
    rows, rates = [pair for row in table for pair in find(row)[0]], []
    for step in tqdm(range(s.steps), desc="reference", leave=False):
        start = clock(device)
        for i in range(s.effective_batch_size):
            pair = read_pair(rows[(step * s.effective_batch_size + i) % len(rows)], resolution)
            with torch.no_grad():
                x = pair["pixels"].permute(0, 3, 1, 2).to(device, half) / 127.5 - 1
                latents = torch.cat([vae.encode(image[None]).latent_dist.sample() for image in x])
                latents = latents * vae.config.scaling_factor
                both = SimpleNamespace(prompts=[pair["caption"]] * 2, height=resolution, width=resolution)
                given = encode(pipe, both, guided=False).last(2)
                noise = torch.randn_like(latents[:1]).expand_as(latents)
                t = torch.randint(schedule.config.num_train_timesteps, (1,), device=device).expand(2)
                noisy = schedule.add_noise(latents, noise, t)
                base = reference(noisy, t, **given)[0]
            with torch.autocast(device.type, half, enabled=cuda):
                out = unet(noisy, t, **given)[0]
            loss = preference_loss("dpo", out, base, noise, BETAS["dpo"])[0]
            scaler.scale(loss / s.effective_batch_size).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        rates.append(s.effective_batch_size / (clock(device) - start))
    return rates


def our_way(s: Settings, model: str, pairs: Path, folder: Path, batch_size: int, rank: int) -> list[float]:
    """Pairs per second of each optimizer step of train_dipo.py, as its metrics.csv has them; nothing else is written."""
    settings = train_dipo.Settings(
        base_model=model,
        vae="",
        dataset=str(pairs),
        output_dir=str(folder),
        max_train_steps=s.steps,
        effective_batch_size=s.effective_batch_size,
        train_batch_size=batch_size,
        learning_rate=1e-5,
        scale_lr=False,
        lr_warmup_steps=0,
        lora_rank=rank,
        validate_every=0,
        max_mse_ratio=1e9,
    )
    train_only(settings)
    return pd.read_csv(folder / "metrics.csv")["pairs_per_second"].tolist()


def train_only(settings: train_dipo.Settings) -> None:
    """A run of train_dipo.py that keeps nothing but its metrics."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    with (
        unittest.mock.patch.object(train_dipo.checkpoints, "save_checkpoint"),
        unittest.mock.patch.object(train_dipo, "save_result"),
    ):
        train_dipo.main(settings)


def pair_flops(model: str) -> float:
    """Operations of a pair: pictures encoded, model forward and backward (twice a forward), reference forward."""
    pipe = load_models(model)
    side, vae = common.native_size(pipe), pipe.vae.to("meta")
    with torch.no_grad():
        encoding = common.flops_of(lambda: vae.encoder(torch.zeros(2, 3, side, side, device="meta")))
        return 4 * common.unet_flops(pipe.unet.to("meta"), 2) + encoding


def measure(s: Settings, model: str, folder: Path, device: torch.device, small: bool) -> tuple[dict, dict]:
    """Pairs per second of the counted steps, and peak gigabytes, of each way and batch size; all take turns."""
    pairs = folder / "train.parquet"
    make_pairs(pairs, 2 * s.effective_batch_size, 64 if small else 1024)
    kinds = [(w, b) for w in dict.fromkeys(s.ways) for b in ((1,) if w == "reference" else s.train_batch_sizes)]
    rates, peaks = {kind: [] for kind in kinds}, dict.fromkeys(kinds, float("nan"))
    for r in range(s.rounds):
        for way, batch_size in kinds:
            clear_device_cache(garbage_collection=True)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            try:
                if way == "reference":
                    got = reference_way(s, model, pairs, device)
                else:
                    rank = 64 if way == "lora" else 0
                    got = our_way(s, model, pairs, folder / f"{way}-{batch_size}-{r}", batch_size, rank)
            except (torch.OutOfMemoryError, UserError) as e:
                print(f"{way}, batch {batch_size}: left out ({first_line(e)})", flush=True)
                continue
            rates[way, batch_size] += got[1:]
            if device.type == "cuda":
                peaks[way, batch_size] = torch.cuda.max_memory_allocated(device) / 1e9
            print(f"{way}, batch {batch_size}: {np.median(got[1:]):.3f} pairs a second", flush=True)
    return {kind: values for kind, values in rates.items() if values}, peaks


def main(s: Settings) -> None:
    device = common.begin(s)
    if s.steps < 2:
        raise UserError(f"--steps {s.steps}: use 2 or more, as the first is not counted")
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        print("no GPU here: nothing is streamed, and the ratios below are the demo model's, not SDXL's", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, label = str(find_path(common.DEMO)), "demo"
        if s.random_weights:
            model, label = str(folder / "sdxl"), "SDXL, random weights"
            common.random_sdxl(device, torch.float16).save_pretrained(model)
        elif device.type == "cuda":
            model = label = train_dipo.Settings.base_model
        flops, rate = pair_flops(model), common.matrix_rate(device, half)
        print(f"{flops / 1e12:.4g} TFLOP a pair, matrix rate {rate / 1e12:.3g} TFLOP/s", flush=True)
        rates, peaks = measure(s, model, folder, device, label == "demo")
    rows, reference = [], np.median(rates.get(("reference", 1), [np.nan]))
    for (way, batch_size), values in rates.items():
        each = float(np.median(values))
        measured = {
            "model": label,
            "way": way,
            "train_batch_size": batch_size,
            "effective_batch_size": s.effective_batch_size,
            "steps_counted": len(values),
            **common.spread(values, "pairs_per_second"),
            "times_reference": round(each / float(reference), 3),
            "peak_gigabytes": round(peaks[way, batch_size], 2),
            "floor_pairs_per_second": round(rate / flops, 3),
            "share_of_floor": round(each * flops / rate, 3),
        }
        rows.append(common.machine(device) | measured | common.versions("torch", "diffusers"))
    shown = ["way", "train_batch_size", "pairs_per_second", "low", "high", "times_reference", "peak_gigabytes"]
    print("\n" + pd.DataFrame(rows)[[*shown, "share_of_floor"]].to_markdown(index=False))
    common.append(rows, s.csv)


if __name__ == "__main__":
    common.command(main, Settings, __doc__)
