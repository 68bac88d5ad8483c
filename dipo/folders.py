"""Folders of pictures of any origin: which prompt each was made from, and which are pairs."""

import hashlib
import re
from pathlib import Path

import pandas as pd

from dipo.cli import UserError, first_line, warn
from dipo.files import find_path, read_record
from dipo.grids import is_grid
from dipo.pictures import UNREADABLE, prompt_inside
from dipo.prompts import READERS, listed, named_column, one_line, prompt_columns, read_text

KINDS = (".png", ".jpg", ".jpeg", ".webp")


def picture_paths(folder: Path) -> list[Path]:
    return [p for p in folder.glob("[!.]*") if p.suffix.lower() in KINDS and p.is_file() and not is_grid(p)]


def picture_records(name: str, given: list[dict] | None = None, flag: str = "folders") -> dict[str, dict]:
    """What is known of the pictures in a folder, by file, in the order of their names, numbers by their value.

    A picture of ours has its record inside. Another's prompt comes from given (the rows of read_prompts, one for each
    picture), from metadata.jsonl (Hugging Face's imagefolder; .csv and .parquet too), from a .txt of the same name, or from
    the picture itself. Its record is prompt, category and sha256, which changes with the file. UserError for no folder, no
    picture, another number of given prompts, or pictures without a prompt.
    """
    folder = find_path(name)
    if not folder or not folder.is_dir():
        raise UserError(f"--{flag} {name}: no such folder; give folders of pictures")
    paths = picture_paths(folder)
    if not paths:
        raise UserError(f"--{flag} {name}: no PNG, JPEG or WebP in it; give a folder of pictures")
    records = {p.name: read_record(p) for p in sorted(paths, key=natural)}
    foreign = [file for file, record in records.items() if not record]
    if given and foreign and len(given) != len(records):
        raise UserError(f"--folder-prompts: {len(given)} prompts for {len(records)} pictures of {name}; give one for each")
    if given and len(foreign) < len(records):
        warn(f"--folder-prompts: pictures of {name} that these scripts made keep the prompts inside them")
    known = dict(zip(records, given, strict=False)) if given else metadata_prompts(folder)
    missing = []
    for file in foreign:
        path, row, reason = folder / file, known.get(file, {}), ""
        try:
            beside = (path.with_suffix(suffix) for suffix in (".txt", ".TXT"))
            text = next((read_text(x) for x in beside if x.exists()), "")
            prompt = row.get("prompt") or one_line(text or prompt_inside(path))
        except UNREADABLE as e:
            prompt, reason = "", f" ({e if type(e) is ValueError else 'cannot be read'})"
        missing += [] if prompt else [file + reason]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        records[file] = {"prompt": prompt, "category": row.get("category", ""), "sha256": digest}
    if missing:
        what = f"{len(missing)} of {len(records)} pictures have no prompt: {listed(missing)}"
        more = "--folder-prompts, " if flag == "folders" else ""
        raise UserError(f"--{flag} {name}: {what}; give {more}a metadata.jsonl or a .txt beside each")
    return records


def natural(path: Path) -> list:
    """A key by which 2.png comes before 10.png."""
    return [int(x) if x.isdecimal() else x for x in re.split(r"([0-9]+)", path.name.lower())]


def metadata_prompts(folder: Path) -> dict[str, dict]:
    """Prompt and category by file, from the first metadata file in a folder; nothing where there is none."""
    paths = (folder / f"metadata{kind}" for kind in (".jsonl", ".csv", ".parquet"))
    if not (path := next(filter(Path.exists, paths), None)):
        return {}
    try:
        table = READERS[path.suffix](path)
        if (names := named_column(table, ("file_name",))) is None:
            raise ValueError("has no column file_name")
        return dict(zip(names, prompt_columns(table).to_dict("records"), strict=True))
    except Exception as e:
        raise UserError(f"{path}: cannot be read: {first_line(e)}; each row needs file_name and text") from e


def paired(images: pd.DataFrame, a: str, b: str) -> tuple[pd.DataFrame, str]:
    """The images of two variants, those of a pair alike in prompt and seed, and what pairs share in words. Where one has no
    seed, how many of its prompt came before it stands for the seed of each."""
    both = images[images["variant"].isin([a, b])]
    if (both["seed"] != "").all():
        return both, "same prompts and seeds"
    return both.assign(seed=both.groupby(["variant", "prompt"]).cumcount()), "same prompts, pictures in their order"
