"""What a study wants, what of it is finished, and what its rows have in common."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from tqdm import tqdm

from dipo import stats
from dipo.batches import Batches, RunBatch
from dipo.cli import UserError
from dipo.devices import DTYPES, claimed, dtype_for, start
from dipo.files import find_path, finished_images, read_record, writable_folder, written_whole
from dipo.folders import paired, picture_records
from dipo.grids import remove_grids, save_grids
from dipo.judges import Judge
from dipo.models import image_settings, warn_of_long_prompts
from dipo.prompts import by_category, read_prompts
from dipo.scores import Scores
from dipo.settings import StudySettings
from dipo.tables import mean_columns, print_table, win_columns
from dipo.timesteps import subsequence
from dipo.votes import ask, asked_rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side of a comparison: a UNet under a sampler. What is None is as the settings have it."""

    variant: str  # its folder
    label: str  # what tables and pictures call it
    group: str = ""  # what it is drawn with in plots
    steps: int
    calls: int = 0  # of the UNet, where they are not as many as the steps
    eta: float = 0.0
    seed: int = 0  # added to the settings' seed
    scheduler: str = "ddim"  # the script's own loop, or a class of diffusers
    options: dict = field(default_factory=dict)  # the keywords of that class
    timesteps: tuple[int, ...] = ()  # tau itself, instead of a spacing
    guidance_scale: float | None = None
    timestep_spacing: str | None = None
    dpo_unet: str | None = None
    dpo_lora: tuple[str, ...] | None = None

    def of(self, s: StudySettings) -> StudySettings:
        """The settings with what the row has of its own."""
        own = {k: getattr(self, k) for k in ("guidance_scale", "timestep_spacing", "dpo_unet", "dpo_lora")}
        return replace(s, **{k: v for k, v in own.items() if v is not None})

    @property
    def sampler(self) -> str:
        """What its images say they were made with."""
        options = [f"{k}={v}" for k, v in sorted(self.options.items())]
        return " ".join(["DDIM" if self.scheduler == "ddim" else self.scheduler, *options])


@contextlib.contextmanager
def open_study(s: StudySettings, rows: list[Row], judges: list[Judge], timing: bool = False):
    """A Study whose folder is held while it is open. Says what of it is there; loads the judges if images are missing.

    timing: its tables are of times too, so it makes every image itself. Others take those that a study beside them has."""
    study = Study(s, rows, judges, timing)
    with claimed(study.folder, study.state):
        study.look()
        ahead = sum((row.calls or row.steps) * len(study.share(row)) for row in rows)
        shown = study.state.is_local_main_process
        with tqdm(total=ahead, unit="step", unit_scale=True, disable=not (ahead and shown)) as study.bar:
            yield study
    study.state.destroy_process_group()


class Study:
    """The images of a study's rows, and their scores by its judges, in the folder --output-dir. Image i has the same prompt
    and seed, and so the same initial noise, under every row. The processes of an accelerate launch share the work."""

    def __init__(self, s: StudySettings, rows: list[Row], judges: list[Judge], timing: bool):
        self.s, self.rows, self.timing = s, rows, timing
        self.prompts = by_category(read_prompts(s.prompts, s.parti, s.pickapic), s.categories, s.limit, s.prompts)
        self.state, self.device = start(s.device)
        dtype_name = dtype_for(s.dtype, self.device)
        self.dtype, self.is_main = DTYPES[dtype_name], self.state.is_main_process
        self.folder = writable_folder(s.output_dir)
        self.wanted = self.wanted_images(dtype_name)
        self.scores = Scores(self.folder, judges, dtype_name)

    def wanted_images(self, dtype_name: str) -> dict[str, dict]:
        """The settings of every image by its file in the folder."""
        s, wanted, prompts, known = self.s, {}, self.prompts.to_dict("records"), {}
        for row in self.rows:
            own = row.of(s)
            models = (own.dpo_unet, own.dpo_lora, own.guidance_scale, own.timestep_spacing)
            if models not in known:
                known[models] = image_settings(own, dtype_name)
            settings = dict(known[models])
            if s.score_only:
                # Images may have been made on another machine than the one that scores them.
                del settings["dtype"]
            settings |= {"num_inference_steps": row.steps, "eta": row.eta, "sampler": row.sampler}
            settings["timesteps"] = list(row.timesteps)
            for i in range(len(prompts) * s.images_per_prompt):
                number, copy = divmod(i, s.images_per_prompt)
                seed = s.seed + row.seed + (copy if s.one_seed else i)
                wanted[f"{row.variant}/{i:05d}.png"] = prompts[number] | {"seed": seed} | settings
        return wanted

    def look(self) -> None:
        """See what is finished, take what a study beside this one has, and see what is missing."""
        s, taken = self.s, 0
        done = finished_images(self.folder, self.wanted, s.overwrite)
        self.missing = {} if s.score_only else {f: r for f, r in self.wanted.items() if f not in done}
        # Every process has to have looked before the first one writes.
        self.state.wait_for_everyone()
        if self.is_main:
            self.clean_up()
            taken = 0 if self.timing else self.take()
            more = ", none are made" if s.score_only else f", {taken} of them taken from studies beside it" * (taken > 0)
            print(f"{len(done) + taken} of {len(self.wanted)} images are in {self.folder}{more}")
        self.state.wait_for_everyone()
        taken = finished_images(self.folder, self.missing, overwrite=True)
        self.missing = {f: r for f, r in self.missing.items() if f not in taken}
        if self.missing:
            # Before the images are made, so that a wrong path shows at once and not hours later.
            self.scores.load_judges()

    def take(self) -> int:
        """Take what is missing, as hard links or copies, from studies under the same parent that have scores; how many."""
        if not self.missing:
            return 0
        # A setting that is empty and one that an older version did not have are the same.
        keys = sorted({k for r in self.missing.values() for k in r})

        def key(record: dict) -> str:
            return json.dumps([record.get(k) or None for k in keys])

        ours = self.folder.absolute()
        # Where there are scores; beside --output-dir there may be data sets of a million pictures too.
        studies = [p.parent for p in ours.parent.glob("*/scores.csv") if p.parent != ours]
        paths = [path for study in studies for path in study.glob("*/[0-9]*.png")]
        there = {key(record): path for path in paths if (record := read_record(path))}
        taken = {f: there[key(r)] for f, r in self.missing.items() if key(r) in there}
        for file, path in taken.items():
            with written_whole(self.folder / file) as part:
                try:
                    os.link(path, part)
                except OSError:
                    shutil.copy2(path, part)
        return len(taken)

    def clean_up(self) -> None:
        """Remove what a killed run of ours left half-written, and grids that this one makes anew; make the rows' folders."""
        for folder in (self.folder / row.variant for row in self.rows):
            try:
                if not self.s.score_only:
                    folder.mkdir(exist_ok=True)
            except OSError as e:
                raise UserError(f"{folder} cannot be made a folder ({e.strerror}); choose another --output-dir") from e
            for path in folder.glob(".[0-9]*.png*.part"):
                path.unlink()
        for kind in ("csv", "png", "pdf"):
            for path in self.folder.glob(f".*.{kind}.part"):
                path.unlink()
        remove_grids(self.folder)

    def share(self, row: Row) -> dict[Path, dict]:
        """This process's part of a row's missing images."""
        files = [f for f in self.missing if f.startswith(f"{row.variant}/")]
        files = files[self.state.process_index :: self.state.num_processes]
        return {self.folder / f: self.missing[f] for f in files}

    def models(self) -> list[StudySettings]:
        """The settings that load each UNet, with its LoRAs, of which this process has images to make."""
        own = [row.of(self.s) for row in self.rows if self.share(row)]
        pairs = dict.fromkeys((s.dpo_unet, s.dpo_lora) for s in own)
        return [replace(self.s, dpo_unet=unet, dpo_lora=lora) for unet, lora in pairs]

    def batches(self, pipe: DiffusionPipeline, model: StudySettings) -> Iterator[tuple[Row, RunBatch]]:
        """What is missing of the rows of one of models(), row by row, batch by batch, after warm-ups that are not timed."""
        if self.is_main:
            warn_of_long_prompts(pipe, list(self.prompts["prompt"]))
        size, warm = self.s.batch_size, {}
        for row in self.rows:
            s, share = row.of(self.s), self.share(row)
            if not share or (s.dpo_unet, s.dpo_lora) != (model.dpo_unet, model.dpo_lora):
                continue
            self.bar.set_description(row.label)
            known = warm.setdefault((row.sampler, s.guidance_scale > 1), set())
            tau = list(row.timesteps) or subsequence(pipe, row.steps, s.timestep_spacing)
            run = Batches(pipe, share, tau, size, self.bar, s.compile, warm=known)
            for batch in run:
                yield row, batch
            # What did not fit once is not tried again.
            size = run.size

    def results(self, *needed: Row) -> tuple[list[Row], pd.DataFrame]:
        """Score what lacks a score; the rows that have images, and those images that each of these rows has, so that
        unfinished studies are compared in pairs too. These come with all that their records hold, and the columns variant,
        name (of the file), path, image (its image_id), and each judge's score and logit. Raises UserError where there is
        none, or none of a row that is needed."""
        self.bar.close()
        clear_device_cache(garbage_collection=True)
        self.state.wait_for_everyone()
        made = finished_images(self.folder, self.wanted, overwrite=True)
        if not made:
            raise UserError(f"--score-only: no images of this study in {self.folder}; run it without --score-only first")
        scores = self.scores.complete(made, self.state, self.device, self.s.scoring_batch_size)
        images = pd.DataFrame([{"file": f, "path": self.folder / f} | r for f, r in made.items()])
        images[["variant", "name"]] = images["file"].str.split("/", expand=True)
        images = images.merge(scores[["file", "image", *self.scores.values]], on="file")
        there = [row for row in self.rows if row.variant in set(images["variant"])]
        if missing := [row.variant for row in needed if row not in there]:
            raise UserError(f"--score-only: no images in {self.folder / missing[0]}, which the tables need; make them first")
        images = images[images.groupby("name")["variant"].transform("nunique") == len(there)]
        if len(made) < len(self.wanted) and self.is_main:
            n, labels = images["name"].nunique(), "; ".join(row.label for row in there)
            print(f"the tables are of the {n} images that each of these has: {labels}")
        if images.empty:
            raise UserError("--score-only: no image is there on every side yet; run it without --score-only")
        return there, images

    def grid(self, stem: str, rows: list[Row], images: pd.DataFrame, title: str = "") -> list[Path]:
        """Grid pages of the first --grid-prompts prompts, the first image of each, in these rows. Returns their paths."""
        s = self.s
        first = images[images["name"].map(lambda name: int(Path(name).stem) % s.images_per_prompt == 0)]
        paths = first.pivot(index="name", columns="variant", values="path")[: s.grid_prompts]
        if paths.empty:
            return []
        captions = first.drop_duplicates("name").set_index("name").loc[paths.index, "prompt"]
        model = "demo model (not SDXL)" if s.demo else " ".join(s.dpo_lora) or s.dpo_unet or s.base_model
        title += f"{model}, guidance {s.guidance_scale:g}, seeds from {s.seed}, same prompt and initial noise in each column"
        return save_grids(self.folder, stem, {r.label: list(paths[r.variant]) for r in rows}, list(captions), title, s.font)

    def finish(self, *paths: Path) -> None:
        """Say where everything is."""
        print("\n" + ", ".join(map(str, [self.folder / "scores.csv", *paths])))

    def pairs_note(self) -> str:
        """What to know of win rates' intervals where prompts have several images."""
        return "; images of one prompt count as independent" if self.s.images_per_prompt > 1 else ""


def eta_label(eta: float) -> str:
    return f", η = {eta:g}" if eta else ""


def score_folders(s: StudySettings, judges: list[Judge]) -> None:
    """Score folders of pictures, print their means and the first one's wins over the others, and ask people about two."""
    folders = [*dict.fromkeys(str(Path(folder)) for folder in s.folders)]
    rows = asked_rows(s, folders, *folders[:2])
    state, device = start(s.device)
    given = s.folder_prompts and read_prompts(s.folder_prompts, s.parti, s.pickapic, "folder-prompts").to_dict("records")
    found, tables = {folder: picture_records(folder, given) for folder in folders}, {}
    for folder, records in found.items():
        scores = Scores(find_path(folder), judges, dtype_for(s.dtype, device))
        table = scores.complete(records, state, device, s.scoring_batch_size)
        tables[folder] = table.assign(variant=folder, path=[scores.folder / file for file in table["file"]])
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
        wins = pd.DataFrame({"score": j.label, **stats.wins(both, a, b, j.name, j.logit)} for j in judges)
        if wins["n"].any():
            alike += "" if tables[a]["prompt"].is_unique else "; images of one prompt count as independent"
            print_table(f"Wins of {a} over {b}, {alike}", wins, {"score": "score"} | win_columns())
        else:
            print(f"\n{a} and {b} have nothing in common ({alike}), so there is no win rate")
    if len(rows) == 2:
        print("", *ask(s, find_path(rows[0]), images, judges, rows), sep="\n")
