"""Table 4: 30 steps (DIPO) against 500 (Diffusion-DPO) for portraits, landscapes and abstract art.

Both sides sample the same DPO-trained UNet from the same prompts and initial noise: DIPO by DDIM (eta = 0), Diffusion-DPO by
ancestral DDPM (eta = 1). Both sides of every win rate are given, by HPSv2 and by PickScore.

    python Semantic_Categories.py --demo                              # the small model in assets/demo, without GPU
    python Semantic_Categories.py                                     # SDXL, 100 of our prompts for each category
    python Semantic_Categories.py --prompts parti --categories People Abstract --output-dir generated_images/two
    accelerate launch Semantic_Categories.py --prompts hpdv2 --limit 100 --output-dir generated_images/hpdv2
    python Semantic_Categories.py --score-only                        # tables of the images that are there

Images come first (a folder of PNGs for each side, settings inside), scores after (scores.csv, image by image), then
categories.csv, categories.png and .pdf, and a grid of pairs for each category. A run that was stopped at any moment goes on
when the same command is given again; a larger --limit adds what is missing only. PickScore is 100 times a cosine at its
trained scale (near 22), HPSv2 a cosine (near 0.28). To use other models, edit the paths at the top of Settings or pass them
as flags.
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
    output_dir: str = "generated_images/Semantic_Categories"

    dipo_steps: int = 30
    """DIPO's steps"""
    baseline_steps: int = 500
    """Diffusion-DPO's steps"""
    eta: float = 0.0
    """DIPO's share of the ancestral noise, 0 to 1; Diffusion-DPO's is 1"""


# --help and wrong flags end here, before the seconds that the imports below take.
cli.answer(Settings, __name__, __doc__)

import re
from math import sqrt

import pandas as pd
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from dipo import stats
from dipo.batches import Batch
from dipo.checks import check_sampling, completed, papers
from dipo.compiled import projected_once
from dipo.figures import plot_wins, save_plot
from dipo.files import write_csv
from dipo.judges import judges_of
from dipo.loras import merge_loras, read_loras
from dipo.models import decode, encode, fitted, load_part, pipeline_class, ready
from dipo.study import Row, Study, eta_label, open_study
from dipo.tables import gap_column, print_table, win_columns
from dipo.timesteps import successive

# What --demo sets besides the demo's models, wherever the command line left the default.
DEMO = {"prompts": "assets/demo/prompts", "limit": 54, "batch_size": 12}
DEMO |= {"output_dir": "generated_images/demo/Semantic_Categories"}
# What --paper sets: the terms of Table 4 (docs/paper.md); its prompts are its own.
PAPER_TERMS = {"guidance_scale": 7.5, "output_dir": "generated_images/paper/Semantic_Categories"}
# Table 4 of the paper. Two versions of its repository name the winner in two ways, but for one cell.
PAPER = {
    ("portrait", "HPSv2"): "74.0 % (DIPO or Diffusion-DPO, versions differ)",
    ("portrait", "PickScore"): "50.5 % (DIPO or Diffusion-DPO, versions differ)",
    ("landscape", "HPSv2"): "68.3 % (DIPO or Diffusion-DPO, versions differ)",
    ("landscape", "PickScore"): "54.0 % DIPO",
    ("abstract", "HPSv2"): "63.7 % (DIPO or Diffusion-DPO, versions differ)",
    ("abstract", "PickScore"): "51.2 % (DIPO or Diffusion-DPO, versions differ)",
}


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


def report(s: Settings, study: Study, dipo: Row, baseline: Row, images: pd.DataFrame) -> None:
    """Win rates by category, both sides of each, with their bar chart, and a grid of pairs for each category."""
    by_category = dict(list(images.groupby("category", sort=False)))
    parts = {category or "(none)": part for category, part in by_category.items()}
    if len(parts) > 1:
        parts["all together" if "all" in parts else "all"] = images
    ours = s.prompts in (Settings.prompts, DEMO["prompts"])
    as_in_paper = ours and (s.dipo_steps, s.eta, s.baseline_steps) == (30, 0, 500)
    sides = dipo.variant, baseline.variant
    wins = pd.DataFrame(
        {"category": category, "score": judge.label, **stats.wins(part, *sides, judge.name, judge.logit)}
        for category, part in parts.items()
        for judge in reversed(study.scores.judges)
    )
    cells = zip(wins["category"], wins["score"], strict=True)
    wins["paper"] = [PAPER.get(cell) if as_in_paper else None for cell in cells]
    columns = win_columns(f"DIPO {dipo.steps} wins", f"Diffusion-DPO {baseline.steps} wins")
    columns |= {"mean difference": gap_column(wins), f"{papers(s, PAPER_TERMS)} (prompts of its own)": "paper"}
    title = "Win rates (95 % Wilson intervals) and DIPO's mean score less Diffusion-DPO's (95 % paired bootstrap)"
    short = wins.assign(category=[c if len(c) <= 40 else c[:39] + "…" for c in wins["category"]])
    print_table(title + study.pairs_note(), short, {"category": "category", "score": "score"} | columns)

    plot = plot_wins(wins, "category", f"DIPO {dipo.steps} over Diffusion-DPO {baseline.steps}")
    paths = [write_csv(study.folder / "categories.csv", wins), save_plot(plot, study.folder / "categories.png", s.demo)]
    stems = set()
    for category, part in by_category.items():
        stem = "grid-" + (re.sub(r"\W+", "-", category).strip("-")[:60] or "none")
        while stem in stems:
            stem += "x"
        stems.add(stem)
        paths += study.grid(stem, [dipo, baseline], part, f"{category or 'no category'}: ")
    study.finish(*paths)


def main(s: Settings) -> None:
    s = completed(s, DEMO, PAPER_TERMS)
    check_sampling(s)
    s = fitted(s)
    n, m = s.dipo_steps, s.baseline_steps
    dipo = Row(variant=f"dipo-{n}", label=f"DIPO, {n} steps{eta_label(s.eta)}", steps=n, eta=s.eta)
    baseline = Row(variant=f"diffusion-dpo-{m}", label=f"Diffusion-DPO, {m} steps", steps=m, eta=1.0)
    judges = judges_of(s)
    with open_study(s, [dipo, baseline], judges) as study:
        for model in study.models():
            make_images(model, study)
        _, images = study.results(dipo, baseline)
        if study.is_main:
            report(s, study, dipo, baseline, images)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
