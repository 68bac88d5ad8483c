"""What the demo's scripts share: training that goes on where it was stopped, diffusers' own sampling, figures as text."""

import math
import re
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dipo import stats
from dipo.files import write_text, written_whole


def train(
    path: Path,
    state: dict[str, torch.nn.Module],
    loss_of,
    steps: int,
    lr: float,
    every: int,
    warm_up: int = 200,
    beta_2: float = 0.99,
    weight_decay: float = 0.01,
    ema: EMAModel | None = None,
) -> None:
    """AdamW with linear warm-up and cosine decay, resumed from and saved to path after every so many steps.

    state maps names to modules, which are trained, saved and restored; loss_of(step) returns the loss tensor and must draw
    every random number from a generator seeded by the step, so that a resumed run sees what an unbroken one would have. ema
    follows the parameters.
    """
    parameters = [p for module in state.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, beta_2), weight_decay=weight_decay)
    kept = state | {"optimizer": optimizer} | ({"ema": ema} if ema else {})
    start, average = 0, None
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        for name, part in kept.items():
            part.load_state_dict(saved[name])
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=path.stem, mininterval=5)
    for step in bar:
        rate = lr * min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema:
            ema.step(parameters)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            with written_whole(path) as part:
                torch.save({name: x.state_dict() for name, x in kept.items()} | {"step": step + 1}, part)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_unet(name: str) -> UNet2DConditionModel:
    """A UNet from a folder, with or without a subfolder unet, in float32."""
    inner = Path(name) / "unet"
    return UNet2DConditionModel.from_pretrained(inner if inner.exists() else name, torch_dtype=torch.float32)


def load_pipeline(model: str) -> StableDiffusionXLPipeline:
    """diffusers' own pipeline with its DDIM scheduler, float32 on the CPU."""
    diffusers.utils.logging.set_verbosity_error()
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False).to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: StableDiffusionXLPipeline,
    captions: list[str],
    seeds: list[int],
    steps: int,
    guidance_scale: float,
    title: str = "",
) -> list[Image.Image]:
    """A picture of each caption from its own seed, by diffusers' own pipeline, 20 at a time; a bar with a title."""
    pictures = []
    for i in tqdm(range(0, len(captions), 20), desc=title, disable=not title):
        pictures += pipe(
            captions[i : i + 20],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + 20]],
        ).images
    return pictures


def rate(right: list[bool]) -> str:
    """A share in percent with its 95 % Wilson interval and n."""
    r = stats.win_rate(right, np.zeros(len(right)))
    return f"{100 * r['win_rate']:.1f} % ({100 * r['low']:.1f} to {100 * r['high']:.1f}), n = {r['n']}"


def mean(values) -> str:
    """A mean with its 95 % bootstrap interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*stats.mean_interval(values))


def versions() -> str:
    """What the figures were measured with."""
    torch_version = torch.__version__.split("+")[0]
    return f"torch {torch_version}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"


def put_between(file: str, first: str, last: str, lines: list[str]) -> None:
    """Write lines into a text file between the marks <!-- first --> and <!-- last -->, instead of what stands there."""
    text = Path(file).read_text(encoding="utf-8")
    first, last = f"<!-- {first} -->", f"<!-- {last} -->"
    between = "\n".join([first, *lines, last])
    write_text(Path(file), re.sub(f"{first}.*{last}", lambda _: between, text, flags=re.S))


def thumbnail(sheet: Image.Image, image: Image.Image, x: int, y: int) -> None:
    """Paste a picture of 96x96 pixels on a contact sheet at (x, y), its upper left corner."""
    sheet.paste(image.resize((96, 96), Image.Resampling.LANCZOS), (x, y))
