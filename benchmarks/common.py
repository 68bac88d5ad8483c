"""What the benchmarks share: their beginning, SDXL with random weights, hasty_sample.py's way, the floor, rows of a CSV."""

import datetime
import importlib.metadata
import os
import platform
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hasty_sample
from dipo import cli
from dipo.batches import Batch
from dipo.devices import clock, device_name
from dipo.files import find_path
from dipo.models import decode, quiet_libraries
from dipo.settings import DEMO_PATHS
from dipo.timesteps import ddim_timesteps

DEMO, SDXL = DEMO_PATHS["base_model"], hasty_sample.Settings.base_model


def command(main, settings: type, description: str) -> None:
    """A benchmark from its command line to its exit code."""
    cli.run(main, settings, description, again="the same command adds its rows to them")


def begin(s) -> torch.device:
    """The device of a benchmark, after a look at its settings; UserError for those that make no sense."""
    warnings.simplefilter("ignore")
    quiet_libraries()
    for name, value in asdict(s).items():
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if type(x) is int]
        # No prompts means that memory is not watched.
        if numbers and min(numbers) < (0 if name == "prompts" else 1):
            raise cli.UserError(f"--{name.replace('_', '-')} {value}: use positive numbers")
    if s.csv and not Path(s.csv).parent.is_dir():
        raise cli.UserError(f"--csv {s.csv}: no such folder; make it, or give another")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_sdxl(device: torch.device, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """SDXL's architecture with random weights, made on the device, and a VAE that runs in fp16; with the demo's tokenizers,
    whose words are numbers too, and its scheduler, which is SDXL's, as DDIM."""
    folder, before, parts = find_path("assets/configs/sdxl"), torch.get_default_dtype(), {}
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            for part, cls, more in (("unet", UNet2DConditionModel, {}), ("vae", AutoencoderKL, {"force_upcast": False})):
                parts[part] = cls.from_config(cls.load_config(folder, subfolder=part), **more)
            for part in ("text_encoder", "text_encoder_2"):
                config = transformers.CLIPTextConfig.from_pretrained(folder, subfolder=part)
                parts[part] = getattr(transformers, config.architectures[0])(config)
    finally:
        torch.set_default_dtype(before)
    pipe = StableDiffusionXLPipeline.from_pretrained(find_path(DEMO), **parts, torch_dtype=dtype, add_watermarker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(random_weights: bool, device: torch.device, dtype: torch.dtype, base_model: str = SDXL):
    """The pipeline with DDIM, and what it is called in the table. Without a GPU the default model is the demo's."""
    if random_weights:
        return random_sdxl(device, dtype), "SDXL, random weights"
    demo = device.type == "cpu" and base_model == SDXL
    path, vae = (DEMO, "") if demo else (base_model, hasty_sample.Settings.vae)
    settings = hasty_sample.Settings(base_model=path, dpo_unet="", vae=vae)
    return hasty_sample.load_pipeline(settings, device, dtype), "demo" if demo else path


def title(row: dict) -> str:
    """What a plot says of model and machine."""
    model = "demo model" if row["model"] == "demo" else row["model"]
    return f"{model} on " + (f"{row['cores']} CPU cores" if row["device"] == "cpu" else row["device"])


def prompts_of(n: int) -> list[str]:
    return [f"picture number {i} of a lighthouse above the sea" for i in range(n)]


def native_size(pipe: StableDiffusionXLPipeline) -> int:
    """Pixels of a side, the model's own."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def timesteps(pipe: StableDiffusionXLPipeline, steps: int) -> list[int]:
    config = pipe.scheduler.config
    return ddim_timesteps(steps, "leading", config.num_train_timesteps, config.steps_offset)


def pictures(
    pipe: StableDiffusionXLPipeline, prompts: list[str], seed: int, steps: int, size: int, interval=None
) -> list[Image.Image]:
    """All that hasty_sample.py does for the pictures of a batch: text, loop, decoding, pixels; guidance 5, eta 0."""
    batch = Batch(pipe, prompts, [seed + i for i in range(len(prompts))], size, size)
    latents = hasty_sample.sample(pipe, batch, timesteps(pipe, steps), 0.0, 5.0, interval)
    return pipe.image_processor.postprocess(decode(pipe.vae, latents).nan_to_num())


def flops_of(call) -> int:
    """Operations (a multiplication and an addition are two) of the matrix products and convolutions in a call."""
    # Attention's fast path is one operation whose inside is not counted.
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter:
        call()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def unet_flops(unet: UNet2DConditionModel, rows: int) -> int:
    """Operations of one call for so many latents of the model's own size."""
    c = unet.config
    x = torch.zeros(rows, c.in_channels, c.sample_size, c.sample_size, device=unet.device, dtype=unet.dtype)
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    text = x.new_zeros(rows, 77, c.cross_attention_dim)
    conditions = {"text_embeds": x.new_zeros(rows, pooled), "time_ids": x.new_zeros(rows, 6)}
    return flops_of(lambda: unet(x, x.new_zeros(rows), encoder_hidden_states=text, added_cond_kwargs=conditions))


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
    """What a row says of day and machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    today = datetime.date.today().isoformat()
    return {"date": today, "device": device_name(device), "cpu": cpu, "cores": os.cpu_count()}


def versions(*packages: str) -> dict:
    """What a row says of the software."""
    return {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()}


def spread(values: list[float], name: str) -> dict:
    """The median of measured values, called name, and their range."""
    return {name: round(float(np.median(values)), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


def append(rows: list[dict], path: str) -> None:
    """Add rows to a CSV, if there is a path."""
    if path and rows:
        pd.DataFrame(rows).to_csv(path, mode="a", index=False, header=not Path(path).exists())
