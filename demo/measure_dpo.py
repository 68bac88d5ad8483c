"""Compare a DPO-trained demo UNet with the base model by the annotator's reward, same captions and seeds on both sides.

    python demo/measure_dpo.py                                  # assets/demo/dpo-unet, about six minutes on 2 CPU cores
    python demo/measure_dpo.py --dpo-unet models/dipo-demo      # another one; with any flag it prints only

It samples with diffusers' own StableDiffusionXLPipeline and DDIMScheduler (50 steps, guidance 5) on held-out captions. Win
rates have 95 % Wilson intervals and a two-sided binomial p value, the mean difference of rewards a paired bootstrap
interval. With default settings the figures go into assets/demo/README.md, and a sheet to assets/demo/dpo_sheet.png: pairs
of rows, the base model's pictures above the trained one's.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import annotator
import diffusers
import numpy as np
import torch
import transformers
import tyro
import world
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from measure import rate
from PIL import Image
from scipy.stats import binomtest, bootstrap
from tqdm import tqdm


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


@torch.no_grad()
def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    diffusers.utils.logging.set_verbosity_error()
    pipe = StableDiffusionXLPipeline.from_pretrained(s.model, add_watermarker=False).to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    inner = Path(s.dpo_unet) / "unet"
    trained = UNet2DConditionModel.from_pretrained(inner if inner.exists() else s.dpo_unet, torch_dtype=torch.float32)
    unets = {"base": pipe.unet, "trained": trained}
    scenes = world.sample_scenes(s.split, s.n, s.seed)
    captions = [world.caption(x) for x in scenes]
    pictures = {name: [] for name in unets}
    for i in tqdm(range(0, s.n, 20), desc=f"{s.num_inference_steps} DDIM steps"):
        for name, unet in unets.items():
            pipe.unet = unet
            pictures[name] += pipe(
                captions[i : i + 20],
                num_inference_steps=s.num_inference_steps,
                guidance_scale=s.guidance_scale,
                generator=[torch.Generator().manual_seed(s.seed + k) for k in range(i, min(i + 20, s.n))],
            ).images

    rewards = {n: np.array([annotator.reward(p, c) for p, c in zip(pictures[n], captions, strict=True)]) for n in unets}
    gain = rewards["trained"] - rewards["base"]
    wins, ties = int((gain > 0).sum()), int((gain == 0).sum())
    low, high = bootstrap((gain,), np.mean, rng=np.random.default_rng(0)).confidence_interval
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
    p = binomtest(wins, s.n - ties).pvalue
    lines = [
        "| what | of | figure |",
        "|---|---|---|",
        *(f"| {' | '.join(r)} |" for r in rows),
        "",
        f"Base preferred {100 * (s.n - wins - ties) / s.n:.1f} %, equal {ties} of {s.n}; two-sided binomial p = {p:.2g}. "
        f"Mean gain in reward {gain.mean():.3f} (95 % paired bootstrap {low:.3f} to {high:.3f}): the annotator, its "
        f"labels being noisy, would choose the trained picture in {100 * np.mean(1 / (1 + np.exp(-gain))):.1f} %. "
        f"{s.num_inference_steps} DDIM steps, guidance {s.guidance_scale:g}, seeds {s.seed} to {s.seed + s.n - 1}, "
        f"{len(set(scenes))} different captions ({s.split}); float32 on the CPU, torch {torch.__version__.split('+')[0]}, "
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}.",
    ]
    print("\n".join(lines))
    if s.sheet != Settings.sheet or s == Settings():
        sheet = Image.new("RGB", (10 * 100, 8 * 100 + 30), "white")
        for i in range(min(40, s.n)):
            for k, name in enumerate(unets):
                image = pictures[name][i].resize((96, 96), Image.Resampling.LANCZOS)
                sheet.paste(image, (i % 10 * 100 + 2, (i // 10 * 2 + k) * 100 + i // 10 * 10 + 2))
        sheet.save(s.sheet)
    if s == Settings():
        readme = Path(s.readme)
        text = readme.read_text(encoding="utf-8")
        between = "<!-- preference -->\n" + "\n".join(lines) + "\n<!-- end preference -->"
        text = re.sub(r"<!-- preference -->.*<!-- end preference -->", lambda _: between, text, flags=re.S)
        readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
