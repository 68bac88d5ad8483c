"""Time sampling: hasty_sample.py's loop beside diffusers' own pipeline, plain and with its documented speed recipe.

    python benchmarks/bench_sampling.py                                    # SDXL on a GPU; without one, the demo model
    python benchmarks/bench_sampling.py --random-weights                   # SDXL at full size from its configuration alone
    python benchmarks/bench_sampling.py --steps 30 --batch-sizes 1 --ways pipeline ours compiled

The ways, all DDIM with guidance 5, from prompts to pictures in memory:

    pipeline    StableDiffusionXLPipeline as its documentation shows it (fp16 on a GPU, float32 on the CPU)
    recipe      the same with huggingface/diffusion-fast's lossless steps: bf16 on a GPU, fused QKV projections,
                channels_last, torch.compile of UNet and VAE decoder with its options
    ours        hasty_sample.py's loop (in --dtype)
    compiled    the same with --compile on
    interval    ours with --guidance-interval 0.28 5.42 (not among the default ways, as its images differ)

All ways and numbers of steps take turns, batch size by batch size, after a warm-up of each, the device synchronised; a row
holds the median of the rounds, their range, and the median of the rounds' ratios to the pipeline. Time does not depend on
the weights, so random ones do. The floor is the number of operations (torch's FlopCounterMode, one UNet call and one
decoding) over the rate of a large matrix product, measured in the same rounds. Without a GPU the ratios tell of overhead on
the demo model, not of SDXL.
"""

import datetime
import importlib.metadata
import math
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hasty_sample


@dataclass
class Settings:
    base_model: str = hasty_sample.Settings.base_model
    """SDXL pipeline: a folder or a hub name; the demo model without a GPU"""
    random_weights: bool = False
    """SDXL at full size with random weights instead; needs no network"""
    ways: tuple[Literal["pipeline", "recipe", "ours", "compiled", "interval"], ...] = (
        "pipeline",
        "recipe",
        "ours",
        "compiled",
    )
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


# The configurations of stabilityai/stable-diffusion-xl-base-1.0, as far as they differ from the classes' defaults.
UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "sample_size": 1024,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
    "force_upcast": False,
}
TEXT_1 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXT_1 |= {"hidden_act": "quick_gelu", "projection_dim": 768}
TEXT_2 |= {"hidden_act": "gelu", "projection_dim": 1280}
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULER |= {"clip_sample": False, "set_alpha_to_one": False}
# Kynkäänniemi et al. 2024, figure 1 for SDXL.
INTERVAL = (0.28, 5.42)


def random_sdxl(device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """SDXL's architecture with random weights, made on the device; the demo's tokenizers, whose words are numbers too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
            text_1 = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_1))
            text_2 = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT_2))
    finally:
        torch.set_default_dtype(before)
    demo = hasty_sample.find_path(hasty_sample.DEMO_MODEL)
    tokenizers = [transformers.CLIPTokenizer.from_pretrained(demo / name) for name in ("tokenizer", "tokenizer_2")]
    return StableDiffusionXLPipeline(
        vae, text_1, text_2, *tokenizers, unet, DDIMScheduler(**SCHEDULER), add_watermarker=False
    )


def load(s: Settings, device: torch.device, dtype: torch.dtype) -> tuple[StableDiffusionXLPipeline, str]:
    """The pipeline with DDIM, and what it is called in the table."""
    if s.random_weights:
        pipe, name = random_sdxl(device, dtype), "SDXL, random weights"
    else:
        demo = device.type == "cpu" and s.base_model == Settings.base_model
        path = hasty_sample.DEMO_MODEL if demo else s.base_model
        settings = hasty_sample.Settings(base_model=path, dpo_unet="", vae="" if demo else hasty_sample.Settings.vae)
        pipe, name = hasty_sample.load_pipeline(settings, device, dtype), "demo" if demo else path
    pipe.set_progress_bar_config(disable=True)
    return pipe, name


def flops_of(call) -> int:
    """Operations (a multiplication and an addition are two) of the matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = clock(device)
        a @ b
        best = max(best, 2 * n**3 / (clock(device) - start))
    return best


def machine(device: torch.device) -> dict:
    """What a row says of the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"device": hasty_sample.device_name(device), "cpu": cpu, "cores": os.cpu_count()}


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Ways:
    """The ways to sample: each a function of a number of steps and of prompts that gives pictures."""

    def __init__(self, s: Settings, device: torch.device):
        self.s, self.device = s, device
        half = torch.float16 if device.type == "cuda" else torch.float32
        self.dtypes = {"pipeline": half, "recipe": torch.bfloat16 if device.type == "cuda" else half}
        self.dtypes |= dict.fromkeys(("ours", "compiled", "interval"), hasty_sample.DTYPES.get(s.dtype, half))
        self.pipes, self.model = {}, ""
        for way in s.ways:
            # Ways that change the model have one of their own; the others share one where their precision is the same.
            kind = way if way in ("recipe", "compiled") else self.dtypes[way]
            if kind not in self.pipes:
                self.pipes[kind], self.model = load(s, device, self.dtypes[way])
            self.pipes[way] = self.pipes[kind]
        if "recipe" in s.ways:
            self.follow_recipe(self.pipes["recipe"])
        self.compiled_for = None

    def follow_recipe(self, pipe) -> None:
        pipe.fuse_qkv_projections()
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        options = hasty_sample.INDUCTOR if self.device.type == "cuda" else None
        pipe.unet = torch.compile(pipe.unet, options=options, fullgraph=True, dynamic=False)
        pipe.vae.decode = torch.compile(pipe.vae.decode, options=options, fullgraph=True, dynamic=False)

    def timesteps(self, way: str, steps: int) -> list[int]:
        config = self.pipes[way].scheduler.config
        return hasty_sample.ddim_timesteps(steps, "leading", config.num_train_timesteps, config.steps_offset)

    def guided_share(self, way: str, steps: int) -> float:
        """Operations of a way's steps as a share of those with guidance in all."""
        alphas, interval = self.pipes[way].scheduler.alphas_cumprod, INTERVAL if way == "interval" else None
        return (1 + np.mean(hasty_sample.guided_steps(alphas, self.timesteps(way, steps), interval))) / 2

    def call(self, way: str, steps: int, prompts: list[str], seed: int) -> list[Image.Image]:
        pipe = self.pipes[way]
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        if way in ("pipeline", "recipe"):
            return pipe(prompts, num_inference_steps=steps, guidance_scale=5.0, generator=generators).images
        timesteps, more = self.timesteps(way, steps), {"guidance_interval": INTERVAL} if way == "interval" else {}
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor

        def sample(timesteps: list[int]) -> torch.Tensor:
            embeds = hasty_sample.encode_prompts(pipe, prompts, "", True)
            sizes = (generators, size, size, 5.0, 0.0, pipe.vae_scale_factor)
            latents = hasty_sample.ddim_sample(pipe.unet, pipe.scheduler.alphas_cumprod, timesteps, *embeds, *sizes, **more)
            return hasty_sample.decode(pipe.vae, latents).cpu()

        if way == "compiled" and self.compiled_for != len(prompts):
            hasty_sample.compile_unet(pipe, lambda: sample(timesteps[:2]), "on")
            self.compiled_for = len(prompts)
        images = sample(timesteps)
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(x) for x in pixels]


@torch.no_grad()
def count_flops(pipe, batch_size: int) -> tuple[int, int]:
    """Operations of one guided UNet call for a batch, and of decoding one picture."""
    unet, device, dtype = pipe.unet, pipe.unet.device, pipe.unet.dtype
    embeds = hasty_sample.encode_prompts(pipe, ["a picture"] * batch_size, "", True)
    side = unet.config.sample_size
    x = torch.zeros(2 * batch_size, unet.config.in_channels, side, side, device=device, dtype=dtype)
    conditions = {"text_embeds": embeds[1], "time_ids": torch.zeros(2 * batch_size, 6, device=device, dtype=dtype)}
    t = torch.tensor(500, device=device)
    step = flops_of(lambda: unet(x, t, encoder_hidden_states=embeds[0], added_cond_kwargs=conditions))
    return step, flops_of(lambda: hasty_sample.decode(pipe.vae, x[:1].float()))


def title(row: dict) -> str:
    model = "demo model" if row["model"] == "demo" else row["model"]
    return f"{model} on " + (f"{row['cores']} CPU cores" if row["device"] == "cpu" else row["device"])


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
    figure.suptitle(title(rows[0]))
    figure.savefig(path, dpi=120)


def append(rows: list[dict], path: str) -> None:
    """Add rows to a CSV, if there is a path."""
    if path and rows:
        pd.DataFrame(rows).to_csv(path, mode="a", index=False, header=not Path(path).exists())


def command(settings, description: str, run) -> None:
    """The settings from the command line, checked, and run(settings) with them; what a user can put right ends with one
    line and exit code 2."""
    s = hasty_sample.parse_settings(settings, description)
    warnings.simplefilter("ignore")
    hasty_sample.quiet_libraries()
    try:
        for name, value in asdict(s).items():
            numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if type(x) is int]
            # No prompts means that memory is not watched.
            if numbers and min(numbers) < (0 if name == "prompts" else 1):
                raise hasty_sample.UserError(f"--{name.replace('_', '-')} {value}: use positive numbers")
        if s.csv and not Path(s.csv).parent.is_dir():
            raise hasty_sample.UserError(f"--csv {s.csv}: no such folder; make it, or give another")
        run(s)
    except hasty_sample.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; rows that were done are kept", file=sys.stderr)
        sys.exit(130)


def measure(s: Settings, ways: Ways, batch_size: int) -> list[dict]:
    """A row for each way and number of steps, which all take turns."""
    device, cases, first = ways.device, [], {}
    prompts = [f"picture number {i} of a lighthouse above the sea" for i in range(batch_size)]
    with hasty_sample.eager():
        step_flops, decode_flops = count_flops(ways.pipes[s.ways[0]], batch_size)
    for way in s.ways:
        try:
            start = clock(device)
            ways.call(way, min(s.steps), prompts, 0)
            first[way] = clock(device) - start
            ways.call(way, min(s.steps), prompts, 0)
            cases += [(steps, way) for steps in s.steps]
        except torch.OutOfMemoryError:
            print(f"{way}: out of memory at batch {batch_size}, left out", flush=True)
    cases.sort(key=lambda case: case[0])
    seconds, rates = {case: [] for case in cases}, {ways.dtypes[way]: [] for _, way in cases}
    for r in tqdm(range(s.rounds), desc=f"batch {batch_size}", leave=False):
        for dtype in rates:
            rates[dtype].append(matrix_rate(device, dtype))
        for steps, way in cases:
            start = clock(device)
            ways.call(way, steps, prompts, r)
            seconds[steps, way].append((clock(device) - start) / batch_size)
    rows = []
    for steps, way in cases:
        values, dtype = seconds[steps, way], ways.dtypes[way]
        ratios = np.divide(seconds.get((steps, "pipeline"), math.nan), values)
        each, rate = float(np.median(values)), float(np.median(rates[dtype]))
        floor = (ways.guided_share(way, steps) * steps * step_flops / batch_size + decode_flops) / rate
        rows.append(
            {"date": datetime.date.today().isoformat()}
            | machine(device)
            | {
                "model": ways.model,
                "way": way,
                "dtype": str(dtype).removeprefix("torch."),
                "steps": steps,
                "batch_size": batch_size,
                "rounds": s.rounds,
                "seconds_per_image": round(each, 4),
                "low": round(min(values), 4),
                "high": round(max(values), 4),
                "images_per_second": round(1 / each, 3),
                "times_pipeline": round(float(np.median(ratios)), 3),
                "matrix_tflops": round(rate / 1e12, 3),
                "floor_seconds_per_image": round(floor, 4),
                "share_of_floor": round(floor / each, 3),
                "first_call_seconds": round(first[way], 1),
            }
            | {p: importlib.metadata.version(p) for p in ("torch", "diffusers", "transformers")}
            | {"python": platform.python_version()}
        )
        said = f"{way}: {each:.3f} s an image ({min(values):.3f} to {max(values):.3f})"
        print(f"{steps} steps, batch {batch_size}, {said}, {floor / each:.0%} of the matrix rate", flush=True)
    return rows


def run(s: Settings) -> None:
    if not (s.ways and s.steps and s.batch_sizes):
        raise hasty_sample.UserError("--ways, --steps, --batch-sizes: name at least one of each")
    if max(s.steps) > 1000:
        raise hasty_sample.UserError(f"--steps {max(s.steps)}: use 1 to 1000")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways, rows = Ways(s, device), []
    if ways.model == "demo":
        print("no GPU here: the ratios below are of overhead on the demo model, not of SDXL", flush=True)
    for batch_size in s.batch_sizes:
        # What was compiled for another batch is of no more use and holds memory.
        torch.compiler.reset()
        rows += (new := measure(s, ways, batch_size))
        append(new, s.csv)
    shown = ["steps", "batch_size", "way", "seconds_per_image", "low", "high", "times_pipeline", "share_of_floor"]
    print("\n" + pd.DataFrame(rows)[shown].to_markdown(index=False))
    if s.csv:
        plot(rows, Path(s.csv).with_suffix(".png"))


def main() -> None:
    command(Settings, __doc__, run)


if __name__ == "__main__":
    main()
