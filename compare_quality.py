"""Table 1 and Figure 1: DIPO at 20 to 100 DDIM steps against Diffusion-DPO's 500 and 800, in quality and in time.

Both sides sample the same DPO-trained UNet from the same prompts and initial noise: DIPO by DDIM (eta = 0), Diffusion-DPO by
ancestral DDPM (eta = 1) on its longer subsequence.

    python compare_quality.py --demo                                           # the small model in assets/demo, without GPU
    python compare_quality.py --limit 20                                       # SDXL, 20 of our prompts for each category
    accelerate launch compare_quality.py --prompts parti --limit 25 --output-dir generated_images/parti_quality
    python compare_quality.py --rows rows/training_free.yaml                   # what else people sample with
    python compare_quality.py --paper --limit 100                              # with the paper's prompts, guidance and seed
    python compare_quality.py --score-only --votes votes-*.csv                 # tables of images and votes that are there
    python compare_quality.py --folders generated_images/a generated_images/b  # scores what hasty_sample.py left there

Images come first (a folder of PNGs for each row of the table, settings inside), then scores.csv, table1.csv, wins.csv,
equivalence.csv (two one-sided tests within --margin, Holm's correction), quality.png and .pdf, grid.png, and vote.html that
asks people about two rows (--vote). A stopped run goes on with the same command; more steps add what is missing only.

PickScore is 100 times a cosine (near 22), HPSv2 a cosine (near 0.28). Seconds per image are measured after a warm-up, device
synchronised. To use other models, edit the paths at the top of Settings or pass them as flags.
"""

from dataclasses import dataclass

from dipo import cli
from dipo.settings import Judges, VoteSettings


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
    output_dir: str = "generated_images/compare_quality"
    judges: Judges = ("pickscore", "hpsv2", "clipscore", "clipscore_paper")
    folders: tuple[str, ...] | None = None
    """instead of the study, score these folders of pictures: hasty_sample.py's, or others whose prompts are known"""
    folder_prompts: str = ""
    """the prompts of such pictures in the order of their names, from whatever --prompts takes"""

    steps: tuple[int, ...] = (20, 30, 50, 100)
    """DIPO's steps"""
    baseline_steps: tuple[int, ...] = (500, 800)
    """Diffusion-DPO's steps; all else is compared with the first of them"""
    rows: tuple[str, ...] = ()
    """YAML files of more rows: other samplers, distilled LoRAs; the form is that of rows/training_free.yaml"""
    margin: float = 0.1
    """two rows are equivalent if their mean scores differ by less, in standard deviations between the baseline's prompts"""
    eta: float = 0.0
    """DIPO's share of the ancestral noise, 0 to 1; Diffusion-DPO's is 1"""


# --help and wrong flags end here, before the seconds that the imports below take.
cli.answer(Settings, __name__, __doc__)

import itertools
import math
from inspect import signature
from math import sqrt

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dipo import stats
from dipo.batches import Batch
from dipo.checks import check_sampling, completed, papers
from dipo.compiled import projected_once
from dipo.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, describe, save_plot
from dipo.files import write_csv
from dipo.judges import Judge, judges_of
from dipo.loras import merge_loras, read_loras
from dipo.models import decode, encode, fitted, load_part, pipeline_class, ready
from dipo.rows import read_rows, scheduled
from dipo.study import Row, Study, eta_label, open_study, score_folders
from dipo.tables import gap_column, mean_columns, print_table, win_columns
from dipo.timesteps import successive
from dipo.votes import ask, asked_rows

# What --demo sets besides the demo's models.
DEMO = {"prompts": "assets/demo/prompts", "limit": 18, "batch_size": 12, "rows": ("rows/training_free.yaml",)}
DEMO |= {"baseline_steps": (500,), "output_dir": "generated_images/demo/compare_quality"}
# What --paper sets: the terms of Table 1 (docs/paper.md).
PAPER_TERMS = {"prompts": "parti", "guidance_scale": 5.0, "steps": (20, 30, 50), "baseline_steps": (500, 300, 800)}
PAPER_TERMS |= {"seed": 42, "one_seed": True, "output_dir": "generated_images/paper/compare_quality"}
# Table 1 of the paper: PickScore, seconds per image and speed-up as printed (126.28 s / 5.34 s is 23.65).
PAPER = {("DIPO", 20, 0): (22.0609, 5.34, 23.80), ("DIPO", 50, 0): (22.3247, 12.87, 9.87)}
PAPER |= {("Diffusion-DPO", 500, 1): (22.6312, 126.28, 1.00)}


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


@torch.no_grad()
def sample_by(pipe: DiffusionPipeline, batch: Batch, scheduler, eta: float, w: float) -> torch.Tensor:
    """The same from the same initial noise by a scheduler of diffusers, whose own noise comes from the images' seeds too."""
    text = encode(pipe, batch, guided=w > 1)
    more = {"eta": eta, "generator": batch.generators}
    more = {k: v for k, v in more.items() if k in signature(scheduler.step).parameters}
    x = batch.noise() * scheduler.init_noise_sigma
    with projected_once(pipe.unet, text):
        for t in batch.progress(scheduler.timesteps):
            x_in = scheduler.scale_model_input(torch.cat([x, x]) if w > 1 else x, t)
            e = pipe.unet(x_in.to(text.prompt_embeds.dtype), t, **text.last(len(x_in)))[0].to(x.dtype)
            if w > 1:
                e_uncond, e_cond = e.chunk(2)
                e = e_uncond + w * (e_cond - e_uncond)
            x = scheduler.step(e, t, x, **more, return_dict=False)[0]
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
    """Sample what is missing of the rows of one UNet, row by row."""
    pipe = load_pipeline(s, study.device, study.dtype)
    for row, batch in study.batches(pipe, s):
        own = row.of(s)
        with batch:
            with batch.timed("seconds_sampling"):
                if row.scheduler == "ddim":
                    latents = sample(pipe, batch, batch.tau, row.eta, own.guidance_scale)
                else:
                    config, n = pipe.scheduler.config, len(batch.tau)
                    scheduler = scheduled(row, config, own.timestep_spacing, n, batch.device)
                    latents = sample_by(pipe, batch, scheduler, row.eta, own.guidance_scale)
            with batch.timed("seconds_decoding"):
                images = decode(pipe.vae, latents)
            batch.save(images)


def study_rows(s: Settings) -> list[Row]:
    """The rows of Table 1, and those of the files --rows."""
    kinds = [("dipo", "DIPO", n, s.eta, eta_label(s.eta)) for n in s.steps]
    kinds += [("diffusion-dpo", "Diffusion-DPO", n, 1.0, "") for n in s.baseline_steps]
    rows = [
        Row(variant=f"{key}-{n}", label=f"{group}, {n} steps{random}", group=group, steps=n, eta=eta)
        for key, group, n, eta, random in kinds
    ]
    return rows + read_rows(s, rows)


def report(s: Settings, study: Study, rows: list[Row], baseline: Row, images: pd.DataFrame) -> None:
    """Table 1, win rates over the first row of Diffusion-DPO, which rows are as good as it, their plot, Figure 1's grid."""
    judges, variants = study.scores.judges, [r.variant for r in rows]
    about = [(r.label, r.steps, r.eta, (r.calls or r.steps) * (1 + (r.of(s).guidance_scale > 1))) for r in rows]
    about = pd.DataFrame(about, columns=["label", "steps", "eta", "unet_calls"])
    means = stats.means(images, variants, study.scores.names, baseline.variant)
    times = pd.DataFrame([image_seconds(images[images["variant"] == v]) for v in variants])
    table = pd.concat([about, means, times], axis=1)
    reference = table[table["variant"] == baseline.variant].iloc[0]
    alike = (table["batch_size"] == reference["batch_size"]) & (table["device"] == reference["device"])
    table["speed_up"] = (reference["seconds"] / table["seconds"]).where(alike)
    paper = [PAPER.get((r.group, r.steps, r.eta), (None, None, None)) for r in rows]
    table[["paper_pickscore", "paper_seconds", "paper_speed_up"]] = pd.DataFrame(paper, dtype=float)
    if baseline.steps != 500:
        table["paper_speed_up"] = np.nan
    wins, equal = [], []
    for row, judge in itertools.product([row for row in rows if row is not baseline], judges):
        about, pair = {"sampler": row.label, "score": judge.label}, (images, row.variant, baseline.variant, judge.name)
        wins.append(about | stats.wins(*pair, judge.logit))
        equal.append(about | {"group": row.group, "steps": row.steps} | stats.equivalence(*pair, s.margin))
    wins, equal = pd.DataFrame(wins), stats.verdicts(pd.DataFrame(equal))
    print_report(s, study, table, wins, baseline)
    print_equivalence(s, equal, baseline)
    correlation = images[study.scores.names].corr("spearman").assign(score=[j.label for j in judges])
    columns = {"score": "score"} | {j.label: (j.name, ".2f") for j in judges}
    print_table("Spearman's rank correlation of the judges over all images", correlation, columns)

    # Figure 1: DIPO's row nearest to 30 steps above Diffusion-DPO's longest.
    shown = [min((r for r in rows if r.group == "DIPO"), key=lambda r: abs(r.steps - 30))]
    shown += [max((r for r in rows if r.group == "Diffusion-DPO"), key=lambda r: r.steps)]
    study.finish(
        write_csv(study.folder / "table1.csv", table),
        write_csv(study.folder / "wins.csv", wins),
        write_csv(study.folder / "equivalence.csv", equal),
        save_plot(plot_quality(table, equal, rows, judges, baseline), study.folder / "quality.png", s.demo),
        *study.grid("grid", shown, images),
        *ask(s, study.folder, images, judges, asked_rows(s, variants, shown[0].variant, baseline.variant)),
    )


def print_report(s: Settings, study: Study, table: pd.DataFrame, wins: pd.DataFrame, baseline: Row) -> None:
    """Quality, times and wins as text."""
    theirs = papers(s, PAPER_TERMS)
    columns = {"sampler": "label", "n": "n"} | mean_columns(study.scores.judges, f"{baseline.steps} steps")
    columns[f"{theirs}: PickScore"] = ("paper_pickscore", ".4f")
    print_table("Quality: means over prompts with 95 % bootstrap intervals, paired for differences", table, columns)
    columns = {
        "sampler": "label",
        "UNet calls": "unet_calls",
        "batch": "batch_size",
        "n batches": "batches",
        "sampling, s per image": ("seconds_sampling", ".3f", "seconds_low", "seconds_high"),
        "decoding, s": ("seconds_decoding", ".3f"),
        "speed-up (none: other batch or device)": ("speed_up", ".2fx"),
        f"{theirs}: s per image": ("paper_seconds", ".2f"),
        f"{theirs}: speed-up": ("paper_speed_up", ".2fx"),
    }
    title = f"Time on {', '.join(table['device'].unique())}; a guided step is two calls, the speed-up counts decoding too"
    print_table(title, table, columns)
    columns = {"sampler": "sampler", "score": "score"} | win_columns()
    print_table(f"Wins over {baseline.label}: same prompts and noise{study.pairs_note()}", wins, columns)


def print_equivalence(s: Settings, equal: pd.DataFrame, baseline: Row) -> None:
    """The verdicts as text, and the fewest steps of DIPO that are no worse by each score."""
    columns = {"sampler": "sampler", "score": "score", "verdict": "verdict", "mean difference": gap_column(equal)}
    columns |= {"margin": ("margin", ".3g"), "p (differ by the margin)": ("p_equal", ".2g")}
    columns |= {"p (no difference)": ("p_different", ".2g"), "prompts needed if equal": "n_needed"}
    shown = equal.assign(n_needed=equal["n_needed"].where(equal["verdict"] == "not decided").astype("Int64").astype(object))
    title = f"As good as {baseline.label}? Within {s.margin:g} standard deviations between {equal['n'].max()} prompts"
    print_table(f"{title}; p corrected by Holm for the whole table", shown, columns)
    for score, part in equal[equal["group"] == "DIPO"].groupby("score", sort=False):
        good = part[part["verdict"].isin(("equivalent", "better"))]["steps"]
        print(f"Fewest steps of DIPO shown to be no worse by {score}: {good.min() if len(good) else 'none of these'}")


def image_seconds(images: pd.DataFrame) -> dict:
    """Seconds per image of a row, means over the batches of its most frequent device and size, with 95 % intervals."""
    kinds = images.groupby(["device", "batch_size"])
    device, size = kinds.size().idxmax()
    batches = kinds.get_group((device, size))[["seconds_sampling", "seconds_decoding"]].drop_duplicates()
    sampling = stats.mean_interval(sorted(batches["seconds_sampling"]))
    decoding = float(batches["seconds_decoding"].mean())
    times = dict(zip(("seconds_sampling", "seconds_low", "seconds_high"), sampling, strict=True))
    times |= {"seconds_decoding": decoding, "seconds": sampling[0] + decoding, "batch_size": size}
    return times | {"batches": len(batches), "device": device}


def plot_quality(table: pd.DataFrame, equal: pd.DataFrame, rows: list[Row], judges: list[Judge], baseline: Row) -> Figure:
    """Each score's paired difference from the baseline row over UNet calls and seconds per image, and the margin."""
    figure = Figure(figsize=(11, 3.9 * len(judges) + 0.8), layout="constrained")
    styles = itertools.product("^vDPX*", (GREEN, PURPLE, SKY, "black"))
    groups = dict(list(table.groupby([r.group for r in rows], sort=False)))
    kinds = {"DIPO": (BLUE, "o-"), "Diffusion-DPO": (ORANGE, "s")}
    kinds = {g: kinds.get(g) or next(styles)[::-1] for g in groups}
    # Other samplers of about as many calls stand side by side, from DIPO's place to the right.
    others = table[[r.group not in ("DIPO", "Diffusion-DPO") for r in rows]].sort_values("unet_calls", kind="stable")
    rank = others.groupby((others["unet_calls"].pct_change() > 0.1).cumsum()).cumcount() + 1
    place = (1.06**rank).reindex(table.index, fill_value=1)
    panels = figure.subplots(len(judges), 2, sharex="col", sharey="row", squeeze=False)
    for (left, right), judge in zip(panels, judges, strict=True):
        name, margin = f"{judge.name}_difference", equal.loc[equal["score"] == judge.label, "margin"].iloc[0]
        for axes, x in ((left, "unet_calls"), (right, "seconds")):
            axes.axhspan(-margin, margin, color=GREY, alpha=0.25, label="as good as it: within the margin", zorder=0)
            axes.axhline(0, color=ORANGE, linewidth=0.8, zorder=1)
            for group, (colour, marker) in kinds.items():
                part = groups[group].sort_values(x)
                bars = [part[name] - part[f"{name}_low"], part[f"{name}_high"] - part[name]]
                style = {"fmt": marker, "color": colour, "capsize": 2, "markersize": 6, "elinewidth": 1.2, "label": group}
                axes.errorbar(place[part.index] * part[x], part[name], bars, **style)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            describe(axes, f"{judge.label}, n = {table['n'].iloc[0]} prompts")
        left.set_ylabel(f"less that of {baseline.steps} steps, 95 %", fontsize=12)
    for axes, x in ((left, "UNet calls per image, two a guided step"), (right, "seconds per image, decoding included")):
        axes.set_xlabel(f"{x} (log scale),\nother samplers side by side", fontsize=12)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=11)
    return figure


def check_settings(s: Settings) -> None:
    """Raise UserError for every value that can be judged without loading a model."""
    check_sampling(s)
    if not 0 < s.margin < math.inf:
        raise cli.UserError(f"--margin {s.margin}: use a number above 0, such as 0.1 standard deviations")
    if not s.folders and (s.folders is not None or s.folder_prompts):
        raise cli.UserError("--folders: name the folders to score")


def main(s: Settings) -> None:
    s = completed(s, DEMO, PAPER_TERMS)
    check_settings(s)
    judges = judges_of(s)
    if s.folders is not None:
        return score_folders(s, judges)
    s = fitted(s)
    rows = study_rows(s)
    baseline = next(r for r in rows if r.group == "Diffusion-DPO")
    asked = asked_rows(s, [r.variant for r in rows])
    with open_study(s, rows, judges, timing=True) as study:
        for model in study.models():
            make_images(model, study)
        there, images = study.results(baseline, *(r for r in rows if r.variant in asked))
        if "DIPO" not in [row.group for row in there]:
            raise cli.UserError(f"--score-only: no images of DIPO in {study.folder}; make them first")
        if study.is_main:
            report(s, study, there, baseline, images)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
