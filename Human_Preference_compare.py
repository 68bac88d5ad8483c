"""Figure 2: does the DPO-trained UNet keep its advantage over base SDXL when DIPO samples it in 50 steps instead of 500?

Base and tuned UNet get the same prompts and initial noise, once under DIPO (DDIM, eta = 0, 50 steps) and once under
Diffusion-DPO's sampling (ancestral DDPM, eta = 1, 500 steps). HPSv2 and PickScore, models of human preference, say which of
the two pictures people would choose. vote.html asks people themselves; --votes adds what they said.

    python Human_Preference_compare.py --demo                         # the small model in assets/demo, without GPU
    python Human_Preference_compare.py --limit 20                     # SDXL, 20 of our prompts for each category
    python Human_Preference_compare.py --dpo-unet models/dipo --output-dir generated_images/mine       # one of your own
    accelerate launch Human_Preference_compare.py --prompts pickapic --output-dir generated_images/pickapic
    python Human_Preference_compare.py --score-only                   # tables of the images that are there
    python Human_Preference_compare.py --score-only --votes votes-*.csv    # and of what people said on vote.html

Images come first (a folder of PNGs for each UNet and sampling, settings inside), scores after (scores.csv, image by image),
then preference.csv, preference.png and .pdf, grid.png and vote.html. A run that was stopped at any moment goes on when the
same command is given again; a larger --limit adds what is missing only. PickScore is 100 times a cosine at its trained scale
(near 22), HPSv2 a cosine (near 0.28). To use other models, edit the paths at the top of Settings or pass them as flags.
"""

from dataclasses import dataclass

from dipo import cli
from dipo.settings import VoteSettings


@dataclass(kw_only=True)
class Settings(VoteSettings):
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
    output_dir: str = "generated_images/Human_Preference_compare"

    dipo_steps: int = 50
    """DIPO's steps"""
    baseline_steps: int = 500
    """Diffusion-DPO's steps"""
    eta: float = 0.0
    """DIPO's share of the ancestral noise, 0 to 1; Diffusion-DPO's is 1"""
    grid_prompts: int = 8


# --help and wrong flags end here, before the seconds that the imports below take.
cli.answer(Settings, __name__, __doc__)

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
from dipo.judges import HPSv2, judges_of
from dipo.loras import merge_loras, read_loras
from dipo.models import decode, encode, fitted, load_part, pipeline_class, ready
from dipo.study import Row, Study, eta_label, open_study
from dipo.tables import gap_column, mean_columns, print_table, win_columns
from dipo.timesteps import successive
from dipo.votes import ask, asked_rows

# What --demo sets besides the demo's models, wherever the command line left the default.
DEMO = {"prompts": "assets/demo/prompts", "limit": 18, "batch_size": 12}
DEMO |= {"output_dir": "generated_images/demo/Human_Preference_compare"}
# What --paper sets: the terms of Figure 2 (docs/paper.md).
PAPER_TERMS = {"prompts": "parti", "guidance_scale": 7.5, "seed": 77, "one_seed": True}
PAPER_TERMS |= {"output_dir": "generated_images/paper/Human_Preference_compare"}
# Figure 2 of the paper in %: how often an HPSv2 model scores the tuned UNet's picture higher.
PAPER = 59.9


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


def report(s: Settings, study: Study, rows: list[Row], images: pd.DataFrame) -> None:
    """Win rates of tuned against base UNet under both samplings, both sides of each, with their plot, and a grid."""
    judges, variants = study.scores.judges, [r.variant for r in rows]
    means = stats.means(images, variants, study.scores.names).assign(label=[r.label for r in rows])
    columns = {"images": "label", "n": "n"} | mean_columns(judges)
    print_table("Means over prompts with 95 % bootstrap intervals", means, columns)

    samplings = {f"DIPO {s.dipo_steps}{eta_label(s.eta)}": variants[:2], f"Diffusion-DPO {s.baseline_steps}": variants[2:]}
    wins = pd.DataFrame(
        {"sampling": sampling, "score": judge.label, **stats.wins(images, tuned, base, judge.name, judge.logit)}
        for sampling, (tuned, base) in samplings.items()
        for judge in reversed(judges)
    )
    as_paper = (wins["sampling"] == next(iter(samplings))) & (wins["score"] == HPSv2.label)
    wins["paper"] = pd.Series(PAPER, wins.index).where(as_paper & ((s.dipo_steps, s.eta) == (50, 0)))
    columns = {"sampling": "sampling", "score": "score"} | win_columns("tuned wins", "base wins")
    columns |= {"mean gain": gap_column(wins), f"{papers(s, PAPER_TERMS)}, %": ("paper", ".1f")}
    title = "Tuned against base UNet: win rates (95 % Wilson) and mean gains (95 % paired bootstrap)"
    print_table(title + study.pairs_note(), wins, columns)

    kept = [(j.label, *kept_advantage(stats.by_variant(images, j.name), *variants)) for j in judges]
    kept = pd.DataFrame(kept, columns=["score", "n", "difference", "difference_low", "difference_high"])
    columns = {"score": "score", "n": "n", "gain under DIPO - under Diffusion-DPO": gap_column(kept)}
    print_table("Does the shorter sampling keep the advantage? Difference of the mean gains, paired", kept, columns)

    paper = {(variants[0], variants[1]): PAPER / 100} if (s.dipo_steps, s.eta) == (50, 0) else {}
    study.finish(
        write_csv(study.folder / "preference.csv", wins),
        save_plot(plot_wins(wins, "sampling", "tuned over base UNet"), study.folder / "preference.png", s.demo),
        *study.grid("grid", rows, images),
        *ask(s, study.folder, images, judges, asked_rows(s, variants, *variants[:2]), paper),
    )


def kept_advantage(scores: pd.DataFrame, a: str, b: str, c: str, d: str) -> tuple[int, float, float, float]:
    """n prompts and the mean, with its 95 % interval, of (tuned - base under DIPO) - (tuned - base under Diffusion-DPO),
    image by image. scores: by prompt and seed, with the columns a, b, c, d in that order."""
    return stats.prompt_means((scores[a] - scores[b]) - (scores[c] - scores[d]))


def main(s: Settings) -> None:
    s = completed(s, DEMO, PAPER_TERMS)
    check_sampling(s)
    if not s.dpo_unet and not s.dpo_lora:
        raise cli.UserError("--dpo-unet is empty: give the tuned UNet (or --dpo-lora) to compare the base model's own with")
    s = fitted(s)
    samplings = [("dipo", f"DIPO {s.dipo_steps}{eta_label(s.eta)}", s.dipo_steps, s.eta)]
    samplings += [("diffusion-dpo", f"Diffusion-DPO {s.baseline_steps}", s.baseline_steps, 1.0)]
    unets = {"tuned": {}, "base": {"dpo_unet": "", "dpo_lora": ()}}
    rows = [
        Row(variant=f"{unet}-{key}-{steps}", label=f"{unet} UNet, {label}", steps=steps, eta=eta, **own)
        for key, label, steps, eta in samplings
        for unet, own in unets.items()
    ]
    asked_rows(s, [r.variant for r in rows])
    judges = judges_of(s)
    with open_study(s, rows, judges) as study:
        for model in study.models():
            make_images(model, study)
        _, images = study.results(*rows)
        if study.is_main:
            report(s, study, rows, images)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
