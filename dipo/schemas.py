"""Data sets of preferences as streams of rows, known by their columns, and the pairs of pictures in a row."""

import functools
import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet

from dipo.cli import UserError, first_line
from dipo.files import find_path
from dipo.folders import picture_paths, picture_records


class Schema(NamedTuple):
    """Columns that hold pairs: two pictures and a label, two of which the first is better, or a list of them and ranks (or
    without, where nobody has said which are better)."""

    pictures: tuple[str, ...]  # the columns of both, or the one that holds a list
    choice: str  # label (1: the first is better, 0: the second), ranks (1 is best), or "" where there is none
    caption: str
    folder: Path | None = None  # where the names of files in rows start from; None: they stay as they are

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(c for c in (*self.pictures, self.choice, self.caption) if c)


SCHEMAS = (
    Schema(("jpg_0", "jpg_1"), "label_0", "caption"),  # Pick-a-Pic
    Schema(("jpg_0.jpg", "jpg_1.jpg"), "label_0.txt", "original_prompt.txt"),  # Pick-a-Pic as webdataset
    Schema(("chosen", "rejected"), "", "prompt"),  # trl
    Schema(("chosen_file_name", "rejected_file_name"), "", "prompt"),  # datasets' imagefolder
    Schema(("path1", "path2"), "", "prompt"),  # HPDv3
    Schema(("image_path",), "human_preference", "prompt"),  # HPDv2
    Schema(("file_path",), "human_preference", "prompt"),  # HPDv2, as its README has it
    Schema(("image_path",), "rank", "prompt"),  # HPDv2's test set; ImageRewardDB
    Schema(("generations",), "ranking", "prompt"),  # ImageReward's repository
    Schema(("pictures",), "", "prompt"),  # a folder of pictures that were made for prompts
)
# Not needed, and used where they are there: whether a row of Pick-a-Pic was labelled; whose pictures one row each ranks.
OPTIONAL = ("has_label", "prompt_id")
OTHERS = (
    "pairs are known to be in sayakpaul/pickapic_v2_webdataset, liuhuohuo2/pick-a-pic-v2, pickapic-anonymous/pickapic_v1, "
    "kashif/pickascore (--dataset-split validation), data-is-better-together/open-image-preferences-v1-binarized; and, "
    "fetched and unpacked, in MizzenAI/HPDv3, ymhao/HPDv2, zai-org/ImageRewardDB"
)
TO_FETCH = "fetch it (hf download {} --repo-type dataset --local-dir FOLDER), unpack it there and give FOLDER"
# What datasets calls the kinds of files, in the order in which a folder is searched for them.
BUILDERS = {"parquet": "parquet", "arrow": "arrow", "tar": "webdataset", "jsonl": "json", "json": "json"}
# The first look: so many rows at most, of which more than one in a hundred must hold a pair.
LOOK = 1000


def open_dataset(name: str, split: str = "train") -> datasets.IterableDataset:
    """A hub data set, file or folder as a stream of rows of one of SCHEMAS, pictures still encoded. UserError for none."""
    path = find_path(name)
    if not path and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"--dataset {name!r}: no such file or folder; give files or a hub name, or try --demo")
    try:
        if path and path.is_dir() and not data_files(path) and picture_paths(path):
            return own_pictures(name)
        if path:
            files = find_files(path, split)
            kind = BUILDERS[files[0].suffix[1:].lower()]
            names = [str(f) for f in (with_rows(files) if kind == "parquet" else files)]
            rows = datasets.load_dataset(kind, data_files=names, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(name, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows), {}))
        if path and path.is_dir() and "file_name" in columns:
            return own_pictures(name)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--dataset {name}: {failure(name, path, e)}") from e
    schema = find_schema(columns, name)
    rows = encoded(rows.select_columns([*schema.columns, *(c for c in OPTIONAL if c in columns)]))
    return grouped(rows, schema) if schema.choice == "rank" and "prompt_id" in columns else rows


def find_files(path: Path, split: str) -> list[Path]:
    """The file itself, or those of one kind in a folder: named like the split where there are any. UserError for none."""
    if path.is_file():
        if path.suffix[1:].lower() not in BUILDERS:
            raise UserError(f"--dataset {path}: not one of .{', .'.join(BUILDERS)}, nor a folder of them")
        return [path]
    files = data_files(path)
    # Pick-a-Pic has test_unique beside test.
    like = re.compile(rf"(^|[-_./\\]){re.escape(split)}(?!_unique)")
    named = [f for f in files if like.search(str(f.relative_to(path)))]
    if not files:
        raise UserError(f"--dataset {path}: no .{', .'.join(BUILDERS)} file in it")
    if not named and split != "train":
        raise UserError(f"--dataset {path}: no file is named like --dataset-split {split}, as {files[0].name} is not")
    return named or files


def data_files(path: Path) -> list[Path]:
    """The files of rows in a folder, of the first kind that is there."""
    if (path / "metadata.jsonl").is_file():
        return [path / "metadata.jsonl"]
    seen = [f for f in sorted(path.rglob("*.*")) if not any(x.startswith(".") for x in f.relative_to(path).parts)]
    there = [(f, f.suffix[1:].lower()) for f in seen if not f.name.startswith("cache-")]
    return next(filter(None, ([f for f, kind in there if kind == k] for k in BUILDERS)), [])


def with_rows(files: list[Path]) -> list[Path]:
    """The parquet files that are not empty. UserError for one that is cut, or has not the columns of the first."""
    kept, columns = [], None
    for path in files:
        try:
            metadata = pyarrow.parquet.read_metadata(path)
        except (OSError, pyarrow.ArrowException) as e:
            raise UserError(f"--dataset {path}: is no whole parquet file ({first_line(e)[:200]}); fetch it again") from e
        columns = columns or metadata.schema.names
        if metadata.schema.names != columns:
            raise UserError(f"--dataset {path}: has not the columns of {files[0].name} beside it; keep them apart")
        kept += [path] * (metadata.num_rows > 0)
    if not kept:
        raise UserError(f"--dataset {files[0]}: has no rows; give files that have")
    return kept


def own_pictures(name: str) -> datasets.IterableDataset:
    """A folder of pictures whose prompts are known as a row for each prompt that has several. UserError where none has."""
    groups = {}
    for file, record in picture_records(name, flag="dataset").items():
        groups.setdefault(record["prompt"], []).append(file)
    rows = [{"prompt": prompt, "pictures": files} for prompt, files in groups.items() if len(files) > 1]
    if not rows:
        raise UserError(f"--dataset {name}: no prompt has two pictures; use hasty_sample.py --images-per-prompt 2")
    if len(rows) < len(groups) and os.environ.get("RANK", "0") == "0":
        print(f"{name}: {len(groups) - len(rows)} of {len(groups)} prompts have one picture only and are left out")
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def failure(name: str, path: Path | None, e: Exception) -> str:
    """Why a data set cannot be loaded, and what to do."""
    todo = f"give another --dataset-split, or {TO_FETCH.format(name)}"
    if path:
        todo = "use whole files of one kind, or --demo"
    elif isinstance(e, FileNotFoundError | ConnectionError):
        todo = f"{OTHERS}; or give files of your own, or try --demo"
    return f"cannot be loaded ({first_line(e)[:200]}); {todo}"


def find_schema(columns: list[str], name: str) -> Schema:
    """The first of SCHEMAS whose columns are there, or UserError."""
    for schema in SCHEMAS:
        if {*schema.columns} <= {*columns}:
            return schema
    known = "; ".join(", ".join(schema.columns) for schema in SCHEMAS)
    raise UserError(f"--dataset {name}: its columns ({', '.join(columns) or 'none'}) are none of those known: {known}")


def encoded(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """The same rows, with pictures as they are stored: {"bytes": ..., "path": ...}."""
    return rows.decode(False) if rows.features else rows


def grouped(rows: datasets.IterableDataset, schema: Schema) -> datasets.IterableDataset:
    """ImageRewardDB's metadata, which has a row for each picture, as a row for each prompt."""
    groups = {}
    for row in rows:
        group = groups.setdefault(row["prompt_id"], {schema.caption: row[schema.caption], "image_path": [], "rank": []})
        group["image_path"].append(row["image_path"])
        group["rank"].append(row["rank"])
    return datasets.Dataset.from_list([*groups.values()]).to_iterable_dataset()


def pairs_of(
    rows: datasets.IterableDataset, name: str, split: str = "train", ranked_pairs: str = "all"
) -> Callable[[dict], tuple[list[dict], int]]:
    """A function from a row of open_dataset to its pairs (of a ranked group, all or the best against the worst), {"winner":
    picture, "loser": picture, "caption": str} each, and its number of ties (1 for an unusable row). A picture is bytes, a
    dict of bytes and path, or a path. UserError where the first rows are nearly all ties, or name pictures out of reach."""
    schema = layout(rows, name, split)
    if len(schema.pictures) == 1 and not schema.choice:
        raise UserError(f"--dataset {name}: nobody has said which of its pictures are better; --relabel pickscore does")
    find = functools.partial(pairs_in, schema=schema, ranked_pairs=ranked_pairs)
    labels, found = [], 0
    for row in itertools.islice(rows, LOOK):
        named = [p for p in group_of(row, schema._replace(folder=None))[1] if isinstance(p, str)]
        if any(located(p, schema.folder) is None for p in named):
            raise UserError(f"--dataset {name}: row {len(labels)} names a picture outside {schema.folder}; put it inside")
        labels.append(str(row.get(schema.choice)))
        found += bool(find(row)[0])
        if found > LOOK // 100:
            break
    if {"2", "2.0"} & {*labels} and not {"0", "0.0"} & {*labels}:
        raise UserError(f"--dataset {name}: {schema.choice} is 1 or 2; write 1 where the first is better, and else 0")
    if len(labels) >= 50 and found < len(labels) / 100:
        what = f"{len(labels) - found} of the first {len(labels)} rows are ties or have no label that is known"
        raise UserError(f"--dataset {name}: {what}; {schema.choice} is {', '.join(labels[:5])} ...")
    return find


def layout(rows: datasets.IterableDataset, name: str, split: str) -> Schema:
    """Which columns the rows have, and the folder that file names in them start from. UserError for no rows."""
    first = next(iter(rows), None)
    if first is None:
        raise UserError(f"--dataset {name}: has no rows")
    schema = find_schema([*first], name)
    example = next((p for row in itertools.islice(rows, LOOK) for p in group_of(row, schema)[1] if p), None)
    # Where the first picture is none in a file, the name of a file further on leads nowhere.
    return schema._replace(folder=picture_folder(name, split, example) if isinstance(example, str) else Path(os.devnull))


def picture_folder(name: str, split: str, example: str) -> Path:
    """The folder that the file names in rows start from. UserError for what is on the hub: files in archives."""
    path = find_path(name)
    if not path:
        raise UserError(f"--dataset {name}: its rows name files, which cannot be streamed; {TO_FETCH.format(name)}")
    if (path / example).is_file():
        return path
    beside = find_files(path, split)[0].parent
    places = [path] * path.is_dir() + [beside, beside / split]
    return next((place for place in places if (place / example).is_file()), places[0])


def group_of(row: dict, schema: Schema) -> tuple[str, list, list[float]]:
    """The caption of a row, its pictures (or their paths), and their ranks, the lowest best and equal ones ties."""
    caption, choice = row[schema.caption], row.get(schema.choice)
    if len(schema.pictures) == 1:
        pictures = row[schema.pictures[0]] or []
        ranks = (choice or []) if schema.choice else [1] * len(pictures)
        sign = -1 if schema.choice == "human_preference" else 1
        # Lists of different lengths say nothing.
        known = [(p, number(r)) for p, r in zip(pictures, ranks, strict=True)] if len(ranks) == len(pictures) else []
        pictures, ranks = [p for p, r in known if r is not None], [sign * r for _, r in known if r is not None]
    else:
        pictures, usable = [row[c] for c in schema.pictures], number(row.get("has_label")) != 0
        label = number(choice) if schema.choice else 1
        ranks = {1: [1, 2], 0: [2, 1]}.get(label, [1, 1]) if usable else [1, 1]
    return "" if caption is None else str(caption), [located(p, schema.folder) for p in pictures], ranks


def located(picture, folder: Path | None):
    """A picture as it is or, where a row holds a file's name only, its path in the folder; None for one that leads out."""
    if isinstance(picture, dict) and picture["bytes"] is None and "://" not in (picture["path"] or ""):
        picture = picture["path"]
    if not isinstance(picture, str) or folder is None:
        return picture
    path = Path(os.path.abspath(folder / picture))
    return str(path) if path.is_relative_to(os.path.abspath(folder)) else None


def number(value) -> float | None:
    """A label or rank as a number, also where it is text; None for anything else."""
    try:
        value = float({"true": 1, "false": 0}.get(str(value).strip().lower(), value))
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def pairs_in(
    row: dict, schema: Schema, ranked_pairs: str, scores: dict | None = None, margin: float = 0.0
) -> tuple[list[dict], int]:
    """The pairs of a row, and how many ties; as pairs_of says. With scores, a judge's by content_key (None: cannot be read),
    the higher one wins whatever the labels say, and pairs that differ by less than the margin are ties."""
    caption, pictures, ranks = group_of(row, schema)
    if scores is not None:
        try:
            ranks = ranks_of([scores[content_key(p, caption)] for p in pictures])
        except KeyError as e:
            raise UserError("--relabel: the data changed while they were scored; delete the cache and start again") from e
    won, ties = ordered(ranks, ranked_pairs, margin)
    return [{"winner": pictures[i], "loser": pictures[j], "caption": caption} for i, j in won], ties


def ordered(ranks: list[float], ranked_pairs: str, margin: float = 0.0) -> tuple[list[tuple[int, int]], int]:
    """Which pictures of a group make a pair, (better, worse), and how many pairs are ties (1 for no pair). One of infinite
    rank, which cannot be read, is worse than all; but best-worst has none where two others are there."""
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    both = list(itertools.combinations(order, 2))
    if ranked_pairs == "best-worst" and both:
        last = sum(ranks[i] < math.inf for i in order) - 1
        both = [(order[0], order[last if last > 0 else 1])]
    won = [(i, j) for i, j in both if ranks[i] < ranks[j] and ranks[j] - ranks[i] >= margin]
    return won, max(len(both), 1) - len(won)


def ranks_of(scores: list[float | None]) -> list[float]:
    """A judge's scores as ranks, the lowest best."""
    return [math.inf if x is None else -x for x in scores]


def content_key(picture, caption: str) -> str:
    """What a picture and its caption are known by: a hash of its bytes or, for one in a file, of path, size and time."""
    content = picture["bytes"] or picture["path"] if isinstance(picture, dict) else picture
    if isinstance(content, str) and os.path.isfile(content):
        content += f" {os.path.getsize(content)} {os.stat(content).st_mtime_ns}"
    content = content if isinstance(content, bytes) else str(content).encode()
    return hashlib.blake2b(content + b"\0" + caption.encode(), digest_size=16).hexdigest()
