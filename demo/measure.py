"""Measure the demo model on held-out captions and write the figures into assets/demo/README.md.

    python demo/measure.py                 # about five minutes on 2 CPU cores
    python demo/measure.py --n 60          # a quick look; with any flag it prints only and writes nothing

It samples with diffusers' own StableDiffusionXLPipeline and DDIMScheduler (50 steps, guidance 5), not with this
repository's loop. Three figures, each with its n: the VAE's PSNR on held-out scenes; the share of pictures in which the
named background (portraits, abstract art) or sky and hills (landscapes) have the named colour as the nearest one in
CIELAB (demo/world.py's colours_right); and, for comparison, the same for the renderer's own pictures after the VAE.
A sheet of 60 of the pictures goes to assets/demo/sheet.png.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
import tyro
import world
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm


@dataclass
class Settings:
    model: str = "assets/demo/sdxl"
    """the demo pipeline"""
    unet: str = ""
    """another UNet for it, such as a DPO-trained one; empty: its own"""
    n: int = 300
    """pictures"""
    num_inference_steps: int = 50
    """DDIM steps"""
    guidance_scale: float = 5.0
    """classifier-free guidance"""
    seed: int = 0
    """picture number i is drawn from seed + i"""
    readme: str = "assets/demo/README.md"
    """the file whose part between the lines <!-- measured --> and <!-- end --> is replaced"""
    sheet: str = "assets/demo/sheet.png"
    """contact sheet of the first 60 pictures"""


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, for tensors (B, 3, H, W) in [-1, 1]: (B,)."""
    return -10 * ((a - b) / 2).double().square().mean(dim=(1, 2, 3)).log10()


def rate(right: list[bool]) -> str:
    """A share in percent with its 95 % Wilson interval and n."""
    low, high = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return f"{100 * np.mean(right):.1f} % ({100 * low:.1f} to {100 * high:.1f}), n = {len(right)}"


@torch.no_grad()
def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    pipe = StableDiffusionXLPipeline.from_pretrained(s.model, add_watermarker=False).to(torch.float32)
    if s.unet:
        pipe.unet = diffusers.UNet2DConditionModel.from_pretrained(s.unet).to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    scenes = world.sample_scenes("held_out", s.n, 0)

    drawn = [np.asarray(world.draw(x, np.random.default_rng([1, i]))) for i, x in enumerate(scenes)]
    quality, rebuilt = [], []
    for i in tqdm(range(0, s.n, 20), desc="VAE"):
        x = torch.from_numpy(np.stack(drawn[i : i + 20])).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        quality += psnr(x, y).tolist()
        rebuilt += pipe.image_processor.postprocess(y)

    pictures = []
    for i in tqdm(range(0, s.n, 20), desc=f"{s.num_inference_steps} DDIM steps"):
        batch = scenes[i : i + 20]
        pictures += pipe(
            [world.caption(x) for x in batch],
            num_inference_steps=s.num_inference_steps,
            guidance_scale=s.guidance_scale,
            generator=[torch.Generator().manual_seed(s.seed + i + k) for k in range(len(batch))],
        ).images

    rows = []
    for name, images in (("sampled", pictures), ("renderer's, through the VAE", rebuilt)):
        checks = [(x, world.colours_right(image, x)) for x, image in zip(scenes, images, strict=True)]
        groups = {"all pictures": checks} | {c: [k for k in checks if k[0].category == c] for c in world.SLOTS}
        for group, members in groups.items():
            rows.append({"pictures": name, "of": group, "named colours right": rate([all(r.values()) for _, r in members])})
    per_region = {}
    for _, right in [(x, world.colours_right(p, x)) for x, p in zip(scenes, pictures, strict=True)]:
        for region, ok in right.items():
            per_region.setdefault(region, []).append(ok)
    error = np.std(quality, ddof=1) / np.sqrt(len(quality))
    lines = [
        f"- VAE reconstruction: {np.mean(quality):.1f} dB PSNR (standard error {error:.2f}), n = {len(quality)} pictures",
        *[f"- {region}: {rate(right)} regions" for region, right in per_region.items()],
        "",
        "| pictures | of | all measured regions have the named colour (95 % Wilson interval) |",
        "|---|---|---|",
        *[f"| {r['pictures']} | {r['of']} | {r['named colours right']} |" for r in rows],
        "",
        f"{s.num_inference_steps} DDIM steps, guidance {s.guidance_scale:g}, seeds {s.seed} to {s.seed + s.n - 1}, "
        f"{len(set(scenes))} different held-out captions; float32 on the CPU, torch {torch.__version__.split('+')[0]}, "
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}.",
    ]
    print("\n".join(lines))
    if s != Settings():
        return
    sheet = Image.new("RGB", (10 * 100, 6 * 100), "white")
    for i, image in enumerate(pictures[:60]):
        sheet.paste(image.resize((96, 96), Image.Resampling.LANCZOS), (i % 10 * 100 + 2, i // 10 * 100 + 2))
    sheet.save(s.sheet)
    readme = Path(s.readme)
    text = readme.read_text(encoding="utf-8")
    between = "<!-- measured -->\n" + "\n".join(lines) + "\n<!-- end -->"
    readme.write_text(re.sub(r"<!-- measured -->.*<!-- end -->", lambda _: between, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
