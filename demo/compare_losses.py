"""Train the demo model by every loss of train_dipo.py on the same pairs, and compare what the annotator says of the results.

    python demo/compare_losses.py                   # the table and plot of docs/training.md, two hours on 2 CPU cores
    python demo/compare_losses.py --losses dpo sft  # some of them; with any flag it prints only

Each loss sees the same pairs in the same order, from the same base model, at learning rates a factor of three apart; the one
whose pictures of 60 training captions have the highest mean reward is taken, and more are tried while that one lies at an
end. It is then measured on 300 held-out captions, same captions and seeds as the base model's pictures, 20 DDIM steps,
guidance 5, and its noise errors on 256 held-out pairs. A rate at which train_dipo.py stops the run is out. Time and memory
are of six steps, one run after the other. Everything is kept under --folder and goes on where it was.
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import annotator
import matplotlib.figure
import numpy as np
import pandas as pd
import torch
import world
from common import load_pipeline, load_unet, mean, put_between, rate, sample, versions
from diffusers import DDPMScheduler
from torch.utils.data import default_collate

from dipo import cli, stats
from dipo.files import write_text, written_whole
from dipo.pairs import random_draws, read_pair
from dipo.schemas import open_dataset, pairs_of
from dipo.training import encode_unconditional, prepare_batch

ROOT = Path(__file__).resolve().parents[1]
# Flags of train_dipo.py, by what the table calls it.
LOSSES = {
    "dpo": (),
    "dpo, winner preserved": ("--winner-preserving", "0.5"),
    "ipo": ("--loss", "ipo"),
    "kto": ("--loss", "kto"),
    "mapo": ("--loss", "mapo"),
    "dspo": ("--loss", "dspo"),
    "sft": ("--loss", "sft"),
}


@dataclass
class Settings:
    losses: tuple[str, ...] = tuple(LOSSES)
    """which rows, of those in LOSSES"""
    steps: int = 64
    """optimizer steps of a run"""
    batch: int = 32
    """pairs in a step"""
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    """learning rates that are tried first"""
    choose_n: int = 60
    """training captions by which the rate is chosen"""
    n: int = 300
    """held-out captions"""
    num_inference_steps: int = 20
    """DDIM steps"""
    folder: str = "models/losses"
    """where runs and measurements are kept"""
    document: str = "docs/training.md"
    """the file whose part between the lines <!-- losses --> and <!-- end losses --> is replaced"""
    plot: str = "docs/losses.png"
    """gains and changed errors"""
    sheet: str = "docs/losses_pictures.png"
    """pictures of the first captions, a row for each loss"""


def run(s: Settings, name: str, lr: float, folder: Path, *more: str) -> dict:
    """One run of train_dipo.py, unless it is there: its exit code and its peak memory in MiB."""
    note = folder / "run.json"
    if not note.exists():
        command = [sys.executable, ROOT / "train_dipo.py", "--demo", "--resume", "--validate-every", 0, *LOSSES[name]]
        command += ["--learning-rate", lr, "--max-train-steps", s.steps]
        command += ["--effective-batch-size", s.batch, "--train-batch-size", s.batch]
        command += ["--cache-dir", Path(s.folder).absolute() / "cache", "--output-dir", folder.absolute(), *more]
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 2) or not (folder / "metrics.csv").exists():
            raise cli.UserError(f"{name} at {lr:g}: train_dipo.py ended with {code}; its own line says why")
        write_text(note, json.dumps({"code": code, "peak": usage.ru_maxrss / 1024}))
    return json.loads(note.read_text())


def measure(s: Settings, unet: str, split: str, n: int, kept: Path) -> pd.DataFrame:
    """The annotator's reward of a UNet's picture of each caption, and whether all its colours are right."""
    if not kept.exists():
        pipe = load_pipeline(str(ROOT / "assets/demo/sdxl"))
        pipe.unet = load_unet(unet)
        scenes = world.sample_scenes(split, n, 0)
        captions = [world.caption(x) for x in scenes]
        pictures = sample(pipe, captions, list(range(n)), s.num_inference_steps, 5.0, f"{kept.parent.name}, {kept.stem}")
        rewards = [annotator.reward(p, c) for p, c in zip(pictures, captions, strict=True)]
        right = [all(world.colours_right(p, x).values()) for p, x in zip(pictures, scenes, strict=True)]
        with written_whole(kept) as part:
            pd.DataFrame({"reward": rewards, "right": right}).to_csv(part, index=False)
    return pd.read_csv(kept)


@torch.no_grad()
def noise_errors(s: Settings, unet: str, kept: Path) -> pd.Series:
    """A UNet's mean squared noise error on winners and losers of 256 held-out pairs, noise and timesteps alike for all."""
    if not kept.exists():
        pipe, name = load_pipeline(str(ROOT / "assets/demo/sdxl")), str(ROOT / "assets/demo/pickapic/test.parquet")
        unet, scheduler = load_unet(unet), DDPMScheduler.from_config(pipe.scheduler.config)
        rows, unconditional, errors = open_dataset(name), encode_unconditional(pipe), []
        find = pairs_of(rows, name)
        pairs = itertools.islice((pair for row in rows for pair in find(row)[0]), 256)
        items = [read_pair(x, 64) | random_draws((0, i), (4, 16, 16), 1000, 0.0) for i, x in enumerate(pairs)]
        for i in range(0, len(items), 32):
            batch = default_collate(items[i : i + 32])
            latents, text = prepare_batch(pipe, batch, unconditional)
            noise, t = (torch.cat([batch[k], batch[k]]) for k in ("noise", "timestep"))
            noisy = scheduler.add_noise(latents, noise, t)
            error = (unet(noisy, t, **text.last(len(noisy)))[0] - noise).square().mean(dim=(1, 2, 3))
            errors.append(error.unflatten(0, (2, -1)))
        with written_whole(kept) as part:
            pd.DataFrame(torch.cat(errors, dim=1).T.numpy(), columns=["winner", "loser"]).to_csv(part, index=False)
    return pd.read_csv(kept).mean()


def best_rate(s: Settings, name: str) -> tuple[float, Path]:
    """The learning rate whose pictures of training captions have the highest mean reward, and its run."""
    runs, rates, rewards = Path(s.folder) / name.replace(", ", "-").replace(" ", "-"), list(s.rates), {}
    while True:
        for lr in rates:
            folder = runs / f"{lr:.0e}"
            if lr not in rewards:
                stopped = run(s, name, lr, folder)["code"]
                scores = None if stopped else measure(s, str(folder), "train", s.choose_n, folder / "train.csv")
                rewards[lr] = -np.inf if stopped else scores.reward.mean()
                print(f"{name} at {lr:.0e}: {rewards[lr]:.3f}")
        best = max(rates, key=rewards.get)
        # Factors of three as one writes them: 1, 3, 10, 30.
        lower, upper = (float(f"{best * f:.0e}") for f in (0.31, 3.2))
        if best == min(rates) and len(rates) < 6:
            rates.append(lower)
        elif best == max(rates) and len(rates) < 6:
            rates.append(upper)
        else:
            return best, runs / f"{best:.0e}"


def row_of(s: Settings, name: str, base: pd.DataFrame, base_errors: pd.Series) -> dict:
    """All that the table and the plot say of a loss."""
    lr, folder = best_rate(s, name)
    scores = measure(s, str(folder), "held_out", s.n, folder / "held_out.csv")
    gain = (scores.reward - base.reward).to_numpy()
    short = folder.with_name("cost")
    few = ("--max-train-steps", "6", "--checkpoint-every", "100")
    peak = run(s, name, lr, short, *few)["peak"]
    row = {"loss": name, "folder": str(folder), "learning rate": f"{lr:.0e}", "gain": gain, "won": rate((gain > 0).tolist())}
    row["noisy labels"] = f"{100 * np.mean(1 / (1 + np.exp(-gain))):.1f} %"
    row["colours right"] = rate(scores.right.tolist())
    row |= (100 * (noise_errors(s, str(folder), folder / "errors.csv") / base_errors - 1)).to_dict()
    row["seconds"] = s.batch / pd.read_csv(short / "metrics.csv").pairs_per_second[1:].median()
    return row | {"peak": peak}


def sheet(s: Settings, folders: dict[str, str]) -> None:
    """Pictures of twelve held-out captions, which are among those measured: a row for each UNet."""
    pipe = load_pipeline(str(ROOT / "assets/demo/sdxl"))
    captions = [world.caption(x) for x in world.sample_scenes("held_out", s.n, 0)[:12]]
    figure = matplotlib.figure.Figure(figsize=(9, 0.68 * len(folders)), layout="constrained")
    for axis, (name, folder) in zip(figure.subplots(len(folders), 1), folders.items(), strict=True):
        pipe.unet = load_unet(folder)
        pictures = sample(pipe, captions, list(range(12)), s.num_inference_steps, 5.0)
        axis.imshow(np.hstack([np.pad(np.asarray(p), ((1, 1), (1, 1), (0, 0)), constant_values=255) for p in pictures]))
        axis.set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(s.sheet, dpi=120, bbox_inches="tight")


def plot(rows: list[dict], path: str) -> None:
    figure = matplotlib.figure.Figure(figsize=(9, 0.35 * len(rows) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    y = np.arange(len(rows))[::-1]
    for place, row in zip(y, rows, strict=True):
        middle, low, high = stats.mean_interval(row["gain"])
        left.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color="tab:blue", capsize=3)
    for side, colour, marker in (("winner", "tab:blue", "o"), ("loser", "tab:orange", "s")):
        right.plot([row[side] for row in rows], y, marker, color=colour, label=f"{side}s")
    left.set_yticks(y, [row["loss"] for row in rows])
    left.set_xlabel("gain in the annotator's reward over the base model")
    right.set_xlabel("change of the noise error on held-out pairs, %")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.axvline(0, color="grey", ls="--", lw=1)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main(s: Settings) -> None:
    unknown = [x for x in s.losses if x not in LOSSES]
    if unknown:
        raise cli.UserError(f"--losses {unknown[0]}: use {', '.join(LOSSES)}")
    base_folder = Path(s.folder) / "base"
    base_folder.mkdir(parents=True, exist_ok=True)
    base = measure(s, str(ROOT / "assets/demo/sdxl"), "held_out", s.n, base_folder / "held_out.csv")
    base_errors = noise_errors(s, str(ROOT / "assets/demo/sdxl"), base_folder / "errors.csv")
    rows = [row_of(s, name, base, base_errors) for name in s.losses]
    lines = [
        "| loss | learning rate | mean gain in reward | won against the base | by noisy labels | colours right | "
        "winner's error | loser's error | seconds a step | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["loss"], r["learning rate"], mean(r["gain"]), r["won"], r["noisy labels"], r["colours right"]]
        cells += [f"{r['winner']:+.2f} %", f"{r['loser']:+.2f} %", f"{r['seconds']:.2f}", f"{r['peak']:.0f} MiB"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{s.steps} steps of {s.batch} pairs each; base: colours right in {rate(base.right.tolist())}. "
        f"{s.num_inference_steps} DDIM steps, guidance 5, float32 on 2 CPU cores, {versions()}.",
    ]
    print("\n".join(lines))
    if asdict(s) == asdict(Settings()):
        put_between(s.document, "losses", "end losses", lines)
        plot(rows, s.plot)
        sheet(s, {"base": str(ROOT / "assets/demo/sdxl/unet")} | {row["loss"]: row["folder"] for row in rows})


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
