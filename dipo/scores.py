"""scores.csv: a row for each image, kept while the image and the judges stay what they were."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from dipo.cli import UserError, first_line
from dipo.devices import DTYPES
from dipo.files import csv_text, fingerprint, written_whole
from dipo.judges import Judge
from dipo.pictures import UNREADABLE, open_picture


def image_id(record: dict) -> str:
    """Changes whenever an image is made anew: its record holds its times, or the hash of a file that is not ours."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def read_image(path: Path) -> Image.Image:
    """A picture in RGB; UserError for a file that is none."""
    try:
        return open_picture(path)
    except UNREADABLE as e:
        raise UserError(f"{path}: cannot be read as a picture ({first_line(e)}); mend it or take it away") from e


class Scores:
    """scores.csv of a folder, by these judges in this precision (fp16, bf16 or fp32).

    Its columns: file (relative to the folder), variant (the file's folder), prompt, category, seed (empty for pictures of
    unknown origin), image, by each judge a score and, if it is a model of preference, a logit (see Judge), scored_by. Rows
    of other images stay in it.
    """

    def __init__(self, folder: Path, judges: list[Judge], dtype_name: str):
        self.folder, self.judges, self.dtype = folder, judges, DTYPES[dtype_name]
        self.names = [j.name for j in judges]
        self.values = [*dict.fromkeys(x for j in judges for x in (j.name, j.logit) if x)]
        by = {j.name: j.source for j in judges}
        by |= {"weights": fingerprint(*(w for j in judges for w in j.weights)), "dtype": dtype_name}
        self.judged_by = json.dumps(by)
        self.columns = ["file", "variant", "prompt", "category", "seed", "image", *self.values, "scored_by"]

    def load_judges(self, device: torch.device | str = "cpu") -> None:
        for judge in self.judges:
            judge.ready(self.dtype, device)

    def table(self) -> pd.DataFrame:
        """All that the file holds, with every column; empty where there is no such file. UserError for another's file."""
        try:
            table = pd.read_csv(self.folder / "scores.csv", dtype=str, keep_default_na=False)
        except (OSError, ValueError):
            table = pd.DataFrame()
        if len(table) and not {"file", "image", "scored_by"} <= {*table.columns}:
            raise UserError(f"{self.folder / 'scores.csv'}: not of these scripts, and would be lost; move it away")
        table = table.reindex(columns=[*table.columns, *(c for c in self.columns if c not in table)], fill_value="")
        for name in self.values:
            table[name] = pd.to_numeric(table[name], errors="coerce")
        return table.drop_duplicates("file", keep="last")

    def read(self, records: dict[str, dict]) -> pd.DataFrame:
        """The rows, in the records' order, that are whole and still true: of these very images, scored by these judges."""
        table = self.table().set_index("file", drop=False)
        good = table[table[self.values].notna().all(axis=1) & (table["scored_by"] == self.judged_by)]
        files = [f for f, r in records.items() if f in good.index and good.at[f, "image"] == image_id(r)]
        return good.loc[files, self.columns].reset_index(drop=True)

    def add(self, rows: pd.DataFrame) -> None:
        """Put rows in, in the place of older ones of the same files. Processes take turns; it is whole at any moment."""
        with FileLock(self.folder / ".scores.lock"):
            table = pd.concat([self.table(), rows]).drop_duplicates("file", keep="last")
            with written_whole(self.folder / "scores.csv") as part:
                table.sort_values(["variant", "file"]).to_csv(part, index=False)

    def complete(self, records: dict[str, dict], state, device: torch.device, batch_size: int) -> pd.DataFrame:
        """Score the images that lack a row, batch by batch; the processes of an accelerate state share them. records: the
        settings inside the images by file. Returns the rows of all of them."""
        known = set(self.read(records)["file"])
        todo = [f for f in records if f not in known]
        state.wait_for_everyone()
        share = todo[state.process_index :: state.num_processes]
        if share:
            self.load_judges(device)
            with ThreadPoolExecutor() as pool, tqdm(total=len(share), unit="image", desc=f"scoring {self.folder}") as bar:
                bar.disable = not state.is_local_main_process
                for start in range(0, len(share), batch_size):
                    files = share[start : start + batch_size]
                    images = list(pool.map(lambda f: read_image(self.folder / f), files))
                    self.add(self.score(files, images, [records[f] for f in files]))
                    bar.update(len(files))
        state.wait_for_everyone()
        if state.is_main_process:
            (self.folder / ".scores.lock").unlink(missing_ok=True)
        return self.read(records)

    def score(self, files: list[str], images: list[Image.Image], records: list[dict]) -> pd.DataFrame:
        """Rows of scores.csv for a batch."""
        prompts = [r["prompt"] for r in records]
        rows = {
            "file": files,
            "variant": [os.path.dirname(f) for f in files],
            "prompt": [csv_text(p) for p in prompts],
            "category": [csv_text(r.get("category", "")) for r in records],
            "seed": [r.get("seed", "") for r in records],
            "image": [image_id(r) for r in records],
        }
        for judge in self.judges:
            scores = judge(images, prompts)
            rows[judge.name] = scores.tolist()
            if judge.logit:
                rows[judge.logit] = (scores * judge.logit_scale).tolist()
        return pd.DataFrame(rows | {"scored_by": self.judged_by})
