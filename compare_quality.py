"""Table 1 and Figure 1: DIPO at 20 to 100 DDIM steps against Diffusion-DPO's 500 and 800, in quality and in time.

Both sides sample the same DPO-trained UNet from the same prompts and initial noise: DIPO by DDIM (eta = 0), Diffusion-DPO by
ancestral DDPM (eta = 1) on its longer subsequence.

    python compare_quality.py --demo                                           # the small model in assets/demo, without GPU
    python compare_quality.py --limit 20                                       # SDXL, 20 of our prompts for each category
    accelerate launch compare_quality.py --prompts parti --limit 25 --output-dir generated_images/parti_quality
    python compare_quality.py --samplers dpmsolver++ unipc euler               # what else one could use at 20 and 30 steps
    python compare_quality.py --score-only                                     # tables of the images that are there
    python compare_quality.py --folders generated_images/a generated_images/b  # scores what hasty_sample.py left there

Images come first (a folder of PNGs for each row of the table, settings inside), then scores.csv, table1.csv, wins.csv,
quality.png and .pdf, and grid.png. A stopped run goes on with the same command; more steps add what is missing only.

PickScore is 100 times a cosine (near 22), HPSv2 a cosine (near 0.28). Seconds per image are measured after a warm-up, device
synchronised; decoding is counted apart. To use other models, edit the paths at the top of Settings or pass them as flags.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dipo import cli, stats
from dipo.batches import Batch
from dipo.compiled import projected_once
from dipo.devices import dtype_for, start
from dipo.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, describe, save_plot
from dipo.files import find_path, write_csv
from dipo.folders import paired, picture_records
from dipo.judges import Judge, judges_of
from dipo.loras import merge_loras, read_loras
from dipo.models import decode, encode, fitted, load_part, pipeline_class, ready
from dipo.prompts import read_prompts
from dipo.scores import Scores
from dipo.settings import Judges, StudySettings, check_etas, check_sampling, check_steps, completed
from dipo.study import Row, Study, eta_label, open_study
from dipo.tables import mean_columns, print_table, win_columns
from dipo.timesteps import successive


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
    samplers: tuple[Literal["dpmsolver++", "unipc", "euler"], ...] = ()
    """other samplers beside them"""
    sampler_steps: tuple[int, ...] = (20, 30)
    """the other samplers' steps"""
    eta: float = 0.0
    """DIPO's share of the ancestral noise, 0 to 1; Diffusion-DPO's is 1"""


SAMPLERS = {
    "dpmsolver++": ("DPM-Solver++ 2M", diffusers.DPMSolverMultistepScheduler),
    "unipc": ("UniPC", diffusers.UniPCMultistepScheduler),
    "euler": ("Euler", diffusers.EulerDiscreteScheduler),
}
# What --demo sets besides the demo's models, wherever the command line left the default.
DEMO = {"prompts": "assets/demo/prompts", "limit": 8, "batch_size": 12, "samplers": tuple(SAMPLERS)}
DEMO |= {"output_dir": "generated_images/compare_quality/demo"}
# Table 1 of the paper: PickScore, seconds per image and speed-up as printed (126.28 s / 5.34 s is 23.65).
PAPER = {
    ("DIPO", 20, 0): (22.0609, 5.34, 23.80),
    ("DIPO", 50, 0): (22.3247, 12.87, 9.87),
    ("Diffusion-DPO", 500, 1): (22.6312, 126.28, 1.00),
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


@torch.no_grad()
def sample_by(pipe: DiffusionPipeline, batch: Batch, scheduler, steps: int, w: float) -> torch.Tensor:
    """The same from the same initial noise by a deterministic scheduler of diffusers."""
    text = encode(pipe, batch, guided=w > 1)
    scheduler.set_timesteps(steps, device=batch.device)
    # Without it each scheduler looks its step up on the device, and waits.
    scheduler.set_begin_index(0)
    x = batch.noise() * scheduler.init_noise_sigma
    with projected_once(pipe.unet, text):
        for t in batch.progress(scheduler.timesteps):
            x_in = scheduler.scale_model_input(torch.cat([x, x]) if w > 1 else x, t)
            e = pipe.unet(x_in.to(text.prompt_embeds.dtype), t, **text.last(len(x_in)))[0].to(x.dtype)
            if w > 1:
                e_uncond, e_cond = e.chunk(2)
                e = e_uncond + w * (e_cond - e_uncond)
            x = scheduler.step(e, t, x, return_dict=False)[0]
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
    for row, batch in study.batches(pipe):
        with batch:
            with batch.timed("seconds_sampling"):
                if row.scheduler is None:
                    latents = sample(pipe, batch, batch.tau, row.eta, s.guidance_scale)
                else:
                    scheduler = row.scheduler.from_config(pipe.scheduler.config, timestep_spacing=s.timestep_spacing)
                    latents = sample_by(pipe, batch, scheduler, len(batch.tau), s.guidance_scale)
            with batch.timed("seconds_decoding"):
                images = decode(pipe.vae, latents)
            batch.save(images)


def study_rows(s: Settings) -> list[Row]:
    """The rows of Table 1; UserError for a sampler's steps that would not start near the last timestep."""
    rows = [Row(f"dipo-{n}", f"DIPO, {n} steps{eta_label(s.eta)}", n, s.eta, group="DIPO") for n in s.steps]
    rows += [Row(f"diffusion-dpo-{n}", f"Diffusion-DPO, {n} steps", n, 1.0, group="Diffusion-DPO") for n in s.baseline_steps]
    for key, n in ((key, n) for key in dict.fromkeys(s.samplers) for n in s.sampler_steps):
        name, cls = SAMPLERS[key]
        rows.append(Row(f"{key}-{n}", f"{name}, {n} steps", n, 0.0, name, cls, group=name))
        # Whole-number strides leave the noisiest timesteps out where there are many steps.
        scheduler = cls(timestep_spacing=s.timestep_spacing, steps_offset=1)
        scheduler.set_timesteps(n)
        if scheduler.timesteps[0] < 1000 - 2.5 * 1000 / n:
            first = f"{n} {s.timestep_spacing} steps of {key} would start at t = {scheduler.timesteps[0]:.0f}"
            raise cli.UserError(f"--sampler-steps: {first} from pure noise; use fewer, or --timestep-spacing trailing")
    return rows


def report(s: Settings, study: Study, rows: list[Row], baseline: Row, images: pd.DataFrame) -> None:
    """Table 1, win rates against the first row of Diffusion-DPO, quality over time, and the grid of Figure 1."""
    judges, variants = study.scores.judges, [r.variant for r in rows]
    means = stats.means(images, variants, study.scores.names, baseline.variant)
    about = pd.DataFrame([(r.label, r.steps, r.eta) for r in rows], columns=["label", "steps", "eta"])
    times = pd.DataFrame([image_seconds(images[images["variant"] == v]) for v in variants])
    table = pd.concat([about, means, times], axis=1)
    reference = table[table["variant"] == baseline.variant].iloc[0]
    alike = (table["batch_size"] == reference["batch_size"]) & (table["device"] == reference["device"])
    table["speed_up"] = (reference["seconds"] / table["seconds"]).where(alike)
    paper = [PAPER.get((r.group, r.steps, r.eta), (None, None, None)) for r in rows]
    table[["paper_pickscore", "paper_seconds", "paper_speed_up"]] = pd.DataFrame(paper, dtype=float)
    if baseline.steps != 500:
        table["paper_speed_up"] = np.nan
    wins = pd.DataFrame(
        {"sampler": row.label, "score": judge.label, **stats.wins(images, row.variant, baseline.variant, judge.name)}
        for row in rows
        for judge in judges
        if row is not baseline
    )
    print_report(study, table, wins, baseline)

    # Figure 1: DIPO's row nearest to 30 steps above Diffusion-DPO's longest.
    shown = [min((r for r in rows if r.group == "DIPO"), key=lambda r: abs(r.steps - 30))]
    shown += [max((r for r in rows if r.group == "Diffusion-DPO"), key=lambda r: r.steps)]
    study.finish(
        write_csv(study.folder / "table1.csv", table),
        write_csv(study.folder / "wins.csv", wins),
        save_plot(plot_quality(table, rows, judges, baseline), study.folder / "quality.png", s.demo),
        *study.grid("grid", shown, images),
    )


def print_report(study: Study, table: pd.DataFrame, wins: pd.DataFrame, baseline: Row) -> None:
    """Quality, times and wins as text."""
    columns = {"sampler": "label", "n": "n"} | mean_columns(study.scores.judges, f"{baseline.steps} steps")
    columns |= {"paper's PickScore": ("paper_pickscore", ".4f")}
    print_table("Quality: means over prompts with 95 % bootstrap intervals, paired for differences", table, columns)
    columns = {
        "sampler": "label",
        "batch": "batch_size",
        "n batches": "batches",
        "sampling, s per image": ("seconds_sampling", ".3f", "seconds_low", "seconds_high"),
        "decoding, s": ("seconds_decoding", ".3f"),
        "speed-up (none: other batch or device)": ("speed_up", ".2fx"),
        "paper's s per image": ("paper_seconds", ".2f"),
        "paper's speed-up": ("paper_speed_up", ".2fx"),
    }
    print_table(f"Time on {', '.join(table['device'].unique())}; the speed-up counts sampling and decoding", table, columns)
    title = f"Wins over {baseline.label}: same prompts and noise{study.pairs_note()}"
    print_table(title, wins, {"sampler": "sampler", "score": "score"} | win_columns())


def image_seconds(images: pd.DataFrame) -> dict:
    """Seconds per image of a row, means over the batches of its most frequent device and size, with 95 % intervals."""
    kinds = images.groupby(["device", "batch_size"])
    device, size = kinds.size().idxmax()
    batches = kinds.get_group((device, size))[["seconds_sampling", "seconds_decoding"]].drop_duplicates()
    sampling = stats.mean_interval(sorted(batches["seconds_sampling"]))
    decoding = float(batches["seconds_decoding"].mean())
    times = dict(zip(("seconds_sampling", "seconds_low", "seconds_high"), sampling, strict=True))
    times |= {"seconds_decoding": decoding, "seconds": sampling[0] + decoding}
    return times | {"batch_size": size, "batches": len(batches), "device": device}


def plot_quality(table: pd.DataFrame, rows: list[Row], judges: list[Judge], baseline: Row) -> Figure:
    """Each score's paired difference from the baseline row over seconds per image, the steps beside each point, and the
    Pareto front."""
    figure = Figure(figsize=(5.6 * len(judges), 4.8), layout="constrained")
    # Colour, marker, and the end of the interval that the steps are written at.
    kinds = {"DIPO": (BLUE, "o", 1), "Diffusion-DPO": (ORANGE, "s", 1), "Euler": (SKY, "D", 0)}
    kinds |= {"DPM-Solver++ 2M": (GREEN, "^", 1), "UniPC": (PURPLE, "v", 0)}
    groups = dict(list(table.groupby([r.group for r in rows])))
    for axes, judge in zip(np.atleast_1d(figure.subplots(1, len(judges))), judges, strict=True):
        name = f"{judge.name}_difference"
        points = sorted(zip(table["seconds"], table[name], strict=True))
        front = [p for i, p in enumerate(points) if all(p[1] > q[1] for q in points[:i])]
        x, y = [*(p[0] for p in front), points[-1][0]], [*(p[1] for p in front), front[-1][1]]
        axes.step(x, y, where="post", color=GREY, linestyle=":", label="best so far (Pareto front)", zorder=1)
        axes.axhline(0, color=ORANGE, linewidth=0.8, zorder=1)
        for group, (colour, marker, end) in ((g, k) for g, k in kinds.items() if g in groups):
            part = groups[group]
            low, high = part[f"{name}_low"], part[f"{name}_high"]
            bars = [part[name] - low, high - part[name]]
            axes.errorbar(part["seconds"], part[name], bars, fmt=marker, color=colour, capsize=3, markersize=7, label=group)
            place = {"xytext": (0, 5 if end else -5), "ha": "center", "va": "bottom" if end else "top"}
            for steps, a, b in zip(part["steps"], part["seconds"], high if end else low, strict=True):
                axes.annotate(str(steps), (a, b), textcoords="offset points", fontsize=11, color=colour, **place)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1, y=0.1)
        title = f"{judge.label}: paired differences, 95 %, n = {table['n'].iloc[0]} prompts"
        y_label = f"{judge.label} minus that of {baseline.steps} steps"
        describe(axes, title, "seconds per image, decoding included (log scale)", y_label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=11)
    return figure


def score_folders(s: Settings, judges: list[Judge]) -> None:
    """Score folders of finished images and print their means, and win rates of the first one over the others."""
    state, device = start(s.device)
    given = s.folder_prompts and read_prompts(s.folder_prompts, s.parti, s.pickapic, "folder-prompts").to_dict("records")
    found, tables = {folder: picture_records(folder, given) for folder in s.folders}, {}
    for folder, records in found.items():
        scores = Scores(find_path(folder), judges, dtype_for(s.dtype, device))
        tables[folder] = scores.complete(records, state, device, s.scoring_batch_size).assign(variant=folder)
    state.destroy_process_group()
    if not state.is_main_process:
        return
    images = pd.concat(tables.values())
    means = stats.means(images, list(found), [j.name for j in judges])
    columns = {"folder": "variant", "n": "n"} | mean_columns(judges)
    print_table("Means over prompts with 95 % bootstrap intervals", means, columns)
    a, *others = found
    for b in others:
        both, alike = paired(images, a, b)
        wins = pd.DataFrame({"score": j.label, **stats.wins(both, a, b, j.name)} for j in judges)
        if wins["n"].any():
            alike += "" if tables[a]["prompt"].is_unique else "; images of one prompt count as independent"
            print_table(f"Wins of {a} over {b}, {alike}", wins, {"score": "score"} | win_columns())
        else:
            print(f"\n{a} and {b} have nothing in common ({alike}), so there is no win rate")


def check_settings(s: Settings) -> None:
    """Raise UserError for every value that can be judged without loading a model."""
    check_sampling(s)
    check_steps("steps", *s.steps)
    check_steps("baseline-steps", *s.baseline_steps)
    check_steps("sampler-steps", *s.sampler_steps)
    check_etas("eta", s.eta)
    if not s.folders and (s.folders is not None or s.folder_prompts):
        raise cli.UserError("--folders: name the folders to score")


def main(s: Settings) -> None:
    s = completed(s, DEMO)
    check_settings(s)
    judges = judges_of(s)
    if s.folders is not None:
        return score_folders(s, judges)
    s = fitted(s)
    rows = study_rows(s)
    baseline = next(r for r in rows if r.group == "Diffusion-DPO")
    with open_study(s, rows, judges) as study:
        if study.missing:
            make_images(s, study)
        there, images = study.results(baseline)
        if study.is_main:
            report(s, study, there, baseline, images)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
