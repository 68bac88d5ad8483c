"""Figure 3 (eta): what the share of random noise in DIPO's steps does to quality, at 50 steps.

eta = 0 is DDIM, eta = 1 ancestral DDPM on the same timesteps. Every eta gets the same prompts and initial noise: what
differs is eta alone.

    python Ablation_experiment.py --demo                              # the small model in assets/demo, without GPU
    python Ablation_experiment.py --limit 20                          # SDXL, 20 of our prompts for each category
    python Ablation_experiment.py --etas 0 0.25 0.5 0.75 1 --num-inference-steps 30 --output-dir generated_images/eta_30
    accelerate launch Ablation_experiment.py --prompts parti --limit 25 --output-dir generated_images/parti_eta
    python Ablation_experiment.py --paper                             # the paper's prompts, guidance, steps, etas, redraws
    python Ablation_experiment.py --score-only                        # tables of the images that are there

Images come first (a folder of PNGs for each eta, settings inside), scores after (scores.csv, image by image), then eta.csv,
fluctuation.csv, eta.png and .pdf, and grid.png with a row for each eta. A run that was stopped at any moment goes on when
the same command is given again; more etas add what is missing only. PickScore is 100 times a cosine at its trained scale
(near 22), HPSv2 a cosine (near 0.28). To use other models, edit the paths at the top of Settings or pass them as flags.
"""

from dataclasses import dataclass

from dipo import cli
from dipo.settings import StudySettings


@dataclass(kw_only=True)
class Settings(StudySettings):
    base_model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    dpo_unet: str = "mhdang/dpo-sdxl-text2image-v1"
    dpo_lora: tuple[str, ...] = ()
    vae: str = "madebyollin/sdxl-vae-fp16-fix"
    pickscore: str = "yuvalkirstain/PickScore_v1"
    pickscore_processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    hpsv2: str = "xswu/HPSv2"
    clip: str = "openai/clip-vit-base-patch32"
    imagereward: str = "zai-org/ImageReward"
    imagereward_tokenizer: str = "google-bert/bert-base-uncased"
    aesthetic: str = "trl-lib/ddpo-aesthetic-predictor"
    aesthetic_clip: str = "openai/clip-vit-large-patch14"
    parti: str = "nateraw/parti-prompts"
    pickapic: str = "yuvalkirstain/pickapic_v2"
    prompts: str = "assets/prompts"
    output_dir: str = "generated_images/Ablation_experiment"

    num_inference_steps: int = 50
    """steps, 1 to 1000"""
    etas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """shares of the ancestral noise, each 0 to 1"""
    redraws: int = 0
    """sets drawn again at eta = 0 with other seeds: how far means move by chance alone"""
    grid_prompts: int = 8


# --help and wrong flags end here, before the seconds that the imports below take.
cli.answer(Settings, __name__, __doc__)

import itertools
import math
from math import sqrt

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from matplotlib.figure import Figure

from dipo import stats
from dipo.batches import Batch
from dipo.checks import check_sampling, completed, papers
from dipo.compiled import projected_once
from dipo.figures import BLUE, GREY, ORANGE, describe, save_plot
from dipo.files import write_csv
from dipo.judges import judges_of
from dipo.loras import merge_loras, read_loras
from dipo.models import decode, encode, fitted, load_part, pipeline_class, ready
from dipo.study import Row, Study, open_study
from dipo.tables import mean_columns, print_table
from dipo.timesteps import successive

# What --demo sets besides the demo's models, wherever the command line left the default.
DEMO = {"prompts": "assets/demo/prompts", "limit": 36, "batch_size": 12, "etas": (0.0, 0.25, 0.5, 0.75, 1.0), "redraws": 4}
DEMO |= {"output_dir": "generated_images/demo/Ablation_experiment"}
# What --paper sets: the terms of Figure 3, whose five rows were all drawn at eta = 0, without seeds (docs/paper.md).
PAPER_TERMS = {"prompts": "parti", "guidance_scale": 7.5, "num_inference_steps": 30, "etas": (0.0, 0.2, 0.5, 0.7, 1.0)}
PAPER_TERMS |= {"redraws": 4, "output_dir": "generated_images/paper/Ablation_experiment"}
# What the paper says of both scores, in % of the mean, from so many means of so many prompts.
PAPER, PAPER_ROWS, PAPER_PROMPTS = "under 0.15", 5, 1632
# How far the seeds of redraws are from each other: beyond the images of any study.
REDRAW = 10**6


@torch.no_grad()
def sample(pipe: DiffusionPipeline, batch: Batch, tau: list[int], eta: float, w: float) -> torch.Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16) with classifier-free guidance w (Ho and Salimans 2022).

    tau: timesteps, descending. eta: 0 (DDIM) to 1 (ancestral DDPM). w: 1 or less for no guidance. Returns latents, float32
    (B, 4, H/8, W/8). Nothing in the loop waits for the device. The UNet predicts the noise e, or v (Salimans and Ho 2022).
    """
    text = encode(pipe, batch, guided=w > 1)
    predicts_v = pipe.scheduler.config.prediction_type == "v_prediction"
    x = batch.noise()
    with projected_once(pipe.unet, text):
        for t, a_t, a_next in batch.progress(successive(pipe.scheduler, tau, x.device)):
            x_in = torch.cat([x, x]) if w > 1 else x
            out = pipe.unet(x_in.to(text.prompt_embeds.dtype), t, **text.last(len(x_in)))[0].to(x.dtype)
            if w > 1:
                uncond, cond = out.chunk(2)
                out = uncond + w * (cond - uncond)
            if predicts_v:
                x_0, e = sqrt(a_t) * x - sqrt(1 - a_t) * out, sqrt(a_t) * out + sqrt(1 - a_t) * x
            else:
                x_0, e = (x - sqrt(1 - a_t) * out) / sqrt(a_t), out
            variance = eta**2 * (1 - a_next) / (1 - a_t) * (1 - a_t / a_next)
            x = sqrt(a_next) * x_0 + sqrt(1 - a_next - variance) * e
            if variance > 0:
                x = x + sqrt(variance) * batch.noise()
    return x


def load_pipeline(s: Settings, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """SDXL (or SD 1.5, 2.1) with the DPO-trained UNet and a DDIM scheduler swapped in."""
    loras, parts = read_loras(s), {}
    if s.dpo_unet:
        parts["unet"] = load_part(UNet2DConditionModel, "dpo-unet", s.dpo_unet, "unet", dtype, s.base_model)
    if s.vae:
        parts["vae"] = load_part(AutoencoderKL, "vae", s.vae, "vae", dtype, s.base_model)
    pipe = load_part(pipeline_class(s.base_model), "base-model", s.base_model, "", dtype, **parts)
    # from_config would fill in True for both where the file lacks them, and clipping ruins latents.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    merge_loras(pipe, loras, s.lora_strict)
    return ready(pipe, s, device)


def make_images(s: Settings, study: Study) -> None:
    """Sample what is missing, row by row."""
    pipe = load_pipeline(s, study.device, study.dtype)
    for row, batch in study.batches(pipe, s):
        with batch:
            with batch.timed("seconds_sampling"):
                latents = sample(pipe, batch, batch.tau, row.eta, s.guidance_scale)
            with batch.timed("seconds_decoding"):
                images = decode(pipe.vae, latents)
            batch.save(images)


def report(s: Settings, study: Study, rows: list[Row], redrawn: list[Row], images: pd.DataFrame) -> None:
    """The scores at each eta, paired with the lowest, how far means fluctuate over eta and over redraws, curves and grid."""
    judges, first = study.scores.judges, rows[0]
    means = stats.means(images, [r.variant for r in rows], study.scores.names, first.variant)
    means.insert(1, "eta", [r.eta for r in rows])
    means.insert(2, "steps", s.num_inference_steps)
    title = f"{s.num_inference_steps} steps: means over prompts, 95 % bootstrap intervals, paired for differences"
    print_table(title, means, {"η": ("eta", "g"), "n": "n"} | mean_columns(judges, f"that at η = {first.eta:g}"))

    over_eta = images[images["variant"].isin([r.variant for r in rows])]
    draws = [r.variant for r in rows if r.eta == 0] + [r.variant for r in redrawn]
    moved = pd.DataFrame(
        {"score": j.label}
        | fluctuation(stats.by_variant(over_eta, j.name))
        | redraw_scatter(images.pivot(index="name", columns="variant", values=j.name)[draws])
        for j in judges
    )
    theirs = papers(s, PAPER_TERMS)
    columns = {
        "score": "score",
        "n": "n",
        f"over {len(rows)} etas: largest less smallest mean, % of the mean": ("fluctuation", ".2f"),
        "by chance, if eta did nothing": ("chance", ".2f"),
        "p": ("p", ".2g"),
        f"over {len(draws)} draws at η = 0": ("redrawn", ".2f"),
        f"{PAPER_ROWS} draws of {PAPER_PROMPTS} prompts would give": ("redrawn_as_paper", ".2f"),
        theirs: "paper",
    }
    print_table("How far the means move with eta, and from draw to draw", moved.assign(paper=PAPER), columns)

    study.finish(
        write_csv(study.folder / "eta.csv", means),
        write_csv(study.folder / "fluctuation.csv", moved),
        save_plot(plot_eta(s, means, moved, judges), study.folder / "eta.png", s.demo),
        *study.grid("grid", rows, images, f"{s.num_inference_steps} steps, "),
    )


def redraw_scatter(scores: pd.DataFrame) -> dict[str, float]:
    """How far means move from draw to draw, in percent of the mean, when nothing but the seeds differs.

    scores: a row for each image, a column for each draw. redrawn: the largest less the smallest mean. redrawn_as_paper: what
    that is on average over as many draws and prompts as the paper has: the standard deviation between an image's draws, by
    the square root of the prompts, times the mean range of that many normal numbers. nan for fewer than two draws.
    """
    values = scores.to_numpy(dtype=np.float64)
    if values.shape[1] < 2:
        return {"redrawn": math.nan, "redrawn_as_paper": math.nan}
    percent, spread = 100 / abs(values.mean()), values.var(axis=1, ddof=1).mean() ** 0.5
    normal = np.random.default_rng(0).standard_normal((100_000, PAPER_ROWS))
    expected = np.ptp(normal, axis=1).mean() * spread / PAPER_PROMPTS**0.5
    return {"redrawn": np.ptp(values.mean(axis=0)) * percent, "redrawn_as_paper": expected * percent}


def fluctuation(scores: pd.DataFrame) -> dict[str, float]:
    """How far the mean score moves with eta: largest less smallest mean, in percent of the mean over all.

    scores: by prompt and seed, a column for each eta; what is not there at every eta is left out, and images of one prompt
    count as their mean. chance: what the same figure would be on average if eta did nothing, since the range of several
    noisy means is never zero; p: how often it would then be as large as here. Both by 9,999 bootstrap resamples of the
    prompts with the mean of each eta taken off, which keeps how alike neighbouring etas are; nan for fewer than two prompts.
    """
    values = scores.dropna().groupby(level="prompt", sort=False).mean().to_numpy(dtype=np.float64)
    result = {"n": len(values), "fluctuation": math.nan, "chance": math.nan, "p": math.nan}
    if not len(values):
        return result
    means = values.mean(axis=0)
    percent = 100 / abs(values.mean())
    result["fluctuation"] = float(np.ptp(means) * percent)
    if len(values) > 1:
        # How often each resample draws each prompt.
        counts = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), size=9999)
        by_chance = np.ptp(counts @ (values - means) / len(values), axis=1)
        result["chance"] = float(by_chance.mean() * percent)
        result["p"] = float((1 + (by_chance >= np.ptp(means)).sum()) / 10000)
    return result


def plot_eta(s: Settings, means: pd.DataFrame, moved: pd.DataFrame, judges: list) -> Figure:
    """Both scores over eta, with the intervals of their paired differences from the lowest eta."""
    figure = Figure(figsize=(5.5 * len(judges), 4.8), layout="constrained")
    eta = means["eta"]
    panels = np.atleast_1d(figure.subplots(1, len(judges)))
    for axes, judge, colour, r in zip(panels, judges, itertools.cycle((BLUE, ORANGE)), moved.itertuples(), strict=False):
        y, gap, low, high = (means[f"{judge.name}{x}"] for x in ("", "_difference", "_difference_low", "_difference_high"))
        half, band = abs(y.mean()) * 0.0015 / 2, "0.15 % of the mean (the paper's figure)"
        axes.axhspan(y.mean() - half, y.mean() + half, color=GREY, alpha=0.5, label=band)
        # The interval that matters is that of the change: how the prompts differ is the same at every eta.
        change = f"mean, and 95 % of its change from η = {eta[0]:g}"
        axes.errorbar(eta, y, [gap - low, high - gap], marker="o", color=colour, capsize=3, label=change)
        title = f"{judge.label} at {s.num_inference_steps} steps moves by {r.fluctuation:.2f} %"
        title += f"\n(by chance {r.chance:.2f} %, p = {r.p:.2g})"
        describe(axes, title, "η (0: DDIM, 1: as random as DDPM)", f"{judge.label}, mean of {r.n} prompts")
        axes.legend(fontsize=10)
    return figure


def main(s: Settings) -> None:
    s = completed(s, DEMO, PAPER_TERMS)
    check_sampling(s)
    s, steps = fitted(s), s.num_inference_steps
    rows = [Row(variant=f"eta-{eta:g}", label=f"η = {eta:g}", steps=steps, eta=eta) for eta in sorted(s.etas)]
    redrawn = [
        Row(variant=f"redraw-{k}", label=f"η = 0, drawn again ({k})", steps=steps, seed=k * REDRAW)
        for k in range(1, s.redraws + 1)
    ]
    judges = judges_of(s)
    with open_study(s, rows + redrawn, judges) as study:
        for model in study.models():
            make_images(model, study)
        there, images = study.results()
        if study.is_main:
            report(s, study, [r for r in rows if r in there], [r for r in redrawn if r in there], images)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
