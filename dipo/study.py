"""What a study wants, what of it is finished, and what its rows have in common."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from tqdm import tqdm

from dipo.batches import Batches, RunBatch
from dipo.cli import UserError
from dipo.devices import DTYPES, claimed, dtype_for, start
from dipo.files import fingerprint, finished_images, writable_folder
from dipo.grids import remove_grids, save_grids
from dipo.judges import Judge
from dipo.models import image_settings, warn_of_long_prompts
from dipo.prompts import by_category, read_prompts
from dipo.scores import Scores
from dipo.settings import StudySettings
from dipo.timesteps import ddim_timesteps


@dataclass(frozen=True)
class Row:
    """One side of a comparison: a UNet under a sampler."""

    variant: str  # its folder
    label: str  # what tables and pictures call it
    steps: int
    eta: float = 0.0
    sampler: str = "DDIM"  # what its images say they were made with
    scheduler: type | None = None  # a class of diffusers; None: DDIM by the script's own loop
    base_unet: bool = False  # the base model's own UNet instead of the tuned one
    group: str = ""  # what it is drawn with in plots


@contextlib.contextmanager
def open_study(s: StudySettings, rows: list[Row], judges: list[Judge]):
    """A Study whose folder is held while it is open. Says what of it is there; loads the judges if images are missing."""
    study = Study(s, rows, judges)
    with claimed(study.folder, study.state):
        study.look()
        ahead = sum(row.steps * len(study.share(row)) for row in rows)
        shown = study.state.is_local_main_process
        with tqdm(total=ahead, unit="step", unit_scale=True, disable=not (ahead and shown)) as study.bar:
            yield study
    study.state.destroy_process_group()


class Study:
    """The images of a study's rows, and their scores by its judges, in the folder --output-dir. Image i has the same prompt
    and seed, and so the same initial noise, under every row. The processes of an accelerate launch share the work."""

    def __init__(self, s: StudySettings, rows: list[Row], judges: list[Judge]):
        self.s, self.rows = s, rows
        self.prompts = by_category(read_prompts(s.prompts, s.parti, s.pickapic), s.categories, s.limit, s.prompts)
        self.state, self.device = start(s.device)
        dtype_name = dtype_for(s.dtype, self.device)
        self.dtype, self.is_main = DTYPES[dtype_name], self.state.is_main_process
        self.folder = writable_folder(s.output_dir)
        self.wanted = self.wanted_images(dtype_name)
        self.scores = Scores(self.folder, judges, dtype_name)

    def wanted_images(self, dtype_name: str) -> dict[str, dict]:
        """The settings of every image by its file in the folder."""
        s, wanted, prompts = self.s, {}, self.prompts.to_dict("records")
        common = image_settings(s, dtype_name)
        if s.score_only:
            # Images may have been made on another machine than the one that scores them.
            del common["dtype"]
        base = {"dpo_unet": "", "dpo_lora": "", "weights": fingerprint(s.base_model, s.vae)}
        for row in self.rows:
            settings = common | {"num_inference_steps": row.steps, "eta": row.eta, "sampler": row.sampler}
            settings |= base if row.base_unet else {}
            for i in range(len(prompts) * s.images_per_prompt):
                wanted[f"{row.variant}/{i:05d}.png"] = prompts[i // s.images_per_prompt] | {"seed": s.seed + i} | settings
        return wanted

    def look(self) -> None:
        """See what is finished and what is missing."""
        done = finished_images(self.folder, self.wanted, self.s.overwrite)
        self.missing = {} if self.s.score_only else {f: r for f, r in self.wanted.items() if f not in done}
        # Every process has to have looked before the first one writes.
        self.state.wait_for_everyone()
        if self.is_main:
            self.clean_up()
            none = ", none are made" if self.s.score_only else ""
            print(f"{len(done)} of {len(self.wanted)} images are in {self.folder}{none}")
        self.state.wait_for_everyone()
        if self.missing:
            # Before the images are made, so that a wrong path shows at once and not hours later.
            self.scores.load_judges()

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

    def unfinished(self, base_unet: bool = False) -> list[Row]:
        """The rows, of the tuned or of the base UNet, of which this process has images to make."""
        return [row for row in self.rows if row.base_unet == base_unet and self.share(row)]

    def batches(self, pipe: DiffusionPipeline, base_unet: bool = False) -> Iterator[tuple[Row, RunBatch]]:
        """The missing images of one UNet's rows, row by row and batch by batch, after warm-ups that are not timed."""
        if self.is_main:
            warn_of_long_prompts(pipe, list(self.prompts["prompt"]))
        trained, size, warm = pipe.scheduler.config, self.s.batch_size, {}
        for row in self.unfinished(base_unet):
            self.bar.set_description(row.label)
            spacing = (self.s.timestep_spacing, trained.num_train_timesteps, trained.steps_offset)
            tau, known = ddim_timesteps(row.steps, *spacing), warm.setdefault(row.sampler, set())
            run = Batches(pipe, self.share(row), tau, size, self.bar, self.s.compile, warm=known)
            for batch in run:
                yield row, batch
            # What did not fit once is not tried again.
            size = run.size

    def results(self, *needed: Row) -> tuple[list[Row], pd.DataFrame]:
        """Score what lacks a score; the rows that have images, and those images that each of these rows has, so that
        unfinished studies are compared in pairs too.

        The images come with all that their records hold, and the columns variant, name (of the file), path, and each judge's
        score and logit. Raises UserError where there is none, or none of a row that is needed.
        """
        self.bar.close()
        clear_device_cache(garbage_collection=True)
        self.state.wait_for_everyone()
        made = finished_images(self.folder, self.wanted, overwrite=True)
        if not made:
            raise UserError(f"--score-only: no images of this study in {self.folder}; run it without --score-only first")
        scores = self.scores.complete(made, self.state, self.device, self.s.scoring_batch_size)
        images = pd.DataFrame([{"file": f, "path": self.folder / f} | r for f, r in made.items()])
        images[["variant", "name"]] = images["file"].str.split("/", expand=True)
        images = images.merge(scores[["file", *self.scores.values]], on="file")
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
