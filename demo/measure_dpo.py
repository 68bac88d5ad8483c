"""Compare a DPO-trained demo UNet with the base model by the annotator's reward, same captions and seeds on both sides.

    python demo/measure_dpo.py                                  # assets/demo/dpo-unet, about six minutes on 2 CPU cores
    python demo/measure_dpo.py --dpo-unet models/dipo-demo      # another one; with any flag it prints only

It samples with diffusers' own StableDiffusionXLPipeline and DDIMScheduler (50 steps, guidance 5) on held-out captions. Win
rates have 95 % Wilson intervals and a two-sided binomial p value, the mean difference of rewards a paired bootstrap
interval. With default settings the figures go into assets/demo/README.md, and a sheet to assets/demo/dpo_sheet.png: pairs
of rows, the base model's pictures above the trained one's.
"""

from dataclasses import dataclass

import annotator
import numpy as np
import world
from common import load_pipeline, load_unet, put_between, rate, sample, thumbnail, versions
from PIL import Image

from dipo import cli, stats


@dataclass
class Settings:
    model: str = "assets/demo/sdxl"
    """the demo pipeline"""
    dpo_unet: str = "assets/demo/dpo-unet"
    """the trained UNet: a folder, with or without a subfolder unet"""
    split: str = "held_out"
    """captions: held_out, or train (for choosing settings)"""
    n: int = 300
    """captions, one picture of each on both sides"""
    num_inference_steps: int = 50
    """DDIM steps"""
    guidance_scale: float = 5.0
    """classifier-free guidance"""
    seed: int = 0
    """picture number i is drawn from seed + i"""
    readme: str = "assets/demo/README.md"
    """the file whose part between the lines <!-- preference --> and <!-- end preference --> is replaced"""
    sheet: str = "assets/demo/dpo_sheet.png"
    """contact sheet of the first 40 pairs"""


def main(s: Settings) -> None:
    pipe = load_pipeline(s.model)
    unets = {"base": pipe.unet, "trained": load_unet(s.dpo_unet)}
    scenes = world.sample_scenes(s.split, s.n, s.seed)
    captions, seeds = [world.caption(x) for x in scenes], list(range(s.seed, s.seed + s.n))
    pictures, rewards = {}, {}
    for name, unet in unets.items():
        pipe.unet = unet
        title = f"{name}, {s.num_inference_steps} DDIM steps"
        pictures[name] = sample(pipe, captions, seeds, s.num_inference_steps, s.guidance_scale, title)
        rewards[name] = np.array([annotator.reward(p, c) for p, c in zip(pictures[name], captions, strict=True)])

    gain = rewards["trained"] - rewards["base"]
    wins = stats.win_rate(rewards["trained"], rewards["base"])
    mean, low, high = stats.mean_interval(gain)
    rows = [
        ("trained preferred", "all", rate((gain > 0).tolist())),
        *(("", c, rate([bool(g > 0) for g, x in zip(gain, scenes, strict=True) if x.category == c])) for c in world.SLOTS),
    ]
    for name in unets:
        right = [all(world.colours_right(p, x).values()) for p, x in zip(pictures[name], scenes, strict=True)]
        rows.append((f"measured colours right, {name}", "all", rate(right)))
        parts = [v for p, x in zip(pictures[name], scenes, strict=True) for v in annotator.rightness(p, x).values()]
        rows.append((f"annotator's rightness, {name}", "all", f"{np.mean(parts):.4f} (mean of {len(parts)} parts)"))
        vivid = [annotator.colourfulness(p) for p in pictures[name]]
        rows.append((f"colourfulness M, {name}", "all", f"{np.mean(vivid):.1f} (mean of {s.n} pictures)"))
    lines = [
        "| what | of | figure |",
        "|---|---|---|",
        *(f"| {' | '.join(r)} |" for r in rows),
        "",
        f"Base preferred {100 * wins['loss_rate']:.1f} %, equal {wins['ties']} of {s.n}; "
        f"two-sided binomial p = {wins['p']:.2g}. "
        f"Mean gain in reward {mean:.3f} (95 % paired bootstrap {low:.3f} to {high:.3f}): the annotator, its "
        f"labels being noisy, would choose the trained picture in {100 * np.mean(1 / (1 + np.exp(-gain))):.1f} %. "
        f"{s.num_inference_steps} DDIM steps, guidance {s.guidance_scale:g}, seeds {s.seed} to {s.seed + s.n - 1}, "
        f"{len(set(scenes))} different captions ({s.split}); float32 on the CPU, {versions()}.",
    ]
    print("\n".join(lines))
    if s.sheet != Settings.sheet or s == Settings():
        sheet = Image.new("RGB", (10 * 100, 8 * 100 + 30), "white")
        for i in range(min(40, s.n)):
            for k, name in enumerate(unets):
                thumbnail(sheet, pictures[name][i], i % 10 * 100 + 2, (i // 10 * 2 + k) * 100 + i // 10 * 10 + 2)
        sheet.save(s.sheet)
    if s == Settings():
        put_between(s.readme, "preference", "end preference", lines)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
