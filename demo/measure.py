"""Measure the demo model on held-out captions and write the figures into assets/demo/README.md.

    python demo/measure.py                 # about five minutes on 2 CPU cores
    python demo/measure.py --n 60          # a quick look; with any flag it prints only and writes nothing

It samples with diffusers' own StableDiffusionXLPipeline and DDIMScheduler (50 steps, guidance 5), not with this
repository's loop. Three figures, each with its n: the VAE's PSNR on held-out scenes; the share of pictures in which the
named background (portraits, abstract art) or sky and hills (landscapes) have the named colour as the nearest one in
CIELAB (demo/world.py's colours_right); and, for comparison, the same for the renderer's own pictures after the VAE.
A sheet of 60 of the pictures goes to assets/demo/sheet.png.
"""

from dataclasses import dataclass

import numpy as np
import torch
import world
from common import load_pipeline, load_unet, put_between, rate, sample, thumbnail, to_tensor, versions
from PIL import Image
from tqdm import tqdm

from dipo import cli


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


@torch.no_grad()
def rebuild(s: Settings, pipe, scenes: list[world.Scene]) -> tuple[list[float], list[Image.Image]]:
    """The renderer's pictures of the scenes through the VAE: PSNR of each in dB, and what comes out."""
    drawn = [np.asarray(world.draw(x, np.random.default_rng([1, i]))) for i, x in enumerate(scenes)]
    quality, rebuilt = [], []
    for i in tqdm(range(0, s.n, 20), desc="VAE"):
        x = to_tensor(np.stack(drawn[i : i + 20]))
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        quality += psnr(x, y).tolist()
        rebuilt += pipe.image_processor.postprocess(y)
    return quality, rebuilt


def main(s: Settings) -> None:
    pipe = load_pipeline(s.model)
    if s.unet:
        pipe.unet = load_unet(s.unet)
    scenes = world.sample_scenes("held_out", s.n, 0)
    quality, rebuilt = rebuild(s, pipe, scenes)
    captions, seeds = [world.caption(x) for x in scenes], list(range(s.seed, s.seed + s.n))
    title = f"{s.num_inference_steps} DDIM steps"
    pictures = sample(pipe, captions, seeds, s.num_inference_steps, s.guidance_scale, title)

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
        f"{len(set(scenes))} different held-out captions; float32 on the CPU, {versions()}.",
    ]
    print("\n".join(lines))
    if s != Settings():
        return
    sheet = Image.new("RGB", (10 * 100, 6 * 100), "white")
    for i, image in enumerate(pictures[:60]):
        thumbnail(sheet, image, i % 10 * 100 + 2, i // 10 * 100 + 2)
    sheet.save(s.sheet)
    put_between(s.readme, "measured", "end", lines)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
