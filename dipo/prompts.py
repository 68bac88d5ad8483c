"""Prompts from files, folders and known data sets."""

import contextlib
import csv
import functools
import io
import json
import textwrap
import unicodedata
from pathlib import Path

import pandas as pd
from huggingface_hub.errors import LocalEntryNotFoundError

from dipo.cli import UserError, first_line, warn
from dipo.files import find_path

KINDS = "give a .txt, .csv, .tsv, .json, .jsonl or .parquet, a folder of such files, parti, pickapic or hpdv2"
# What columns may be called. Of several the first in this order is read.
PROMPT, CATEGORY = ("prompt", "prompts", "caption", "captions", "text"), ("category", "categories")
NAMES = f"{', '.join(PROMPT[:-1])} or {PROMPT[-1]}"
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def read_prompts(source: str, parti: str = "", pickapic: str = "", flag: str = "prompts") -> pd.DataFrame:
    """The prompts of a source in its order, blank ones left out: columns prompt and category ("" where there are none).

    source: a .txt (a prompt a line); a .csv, .tsv, .json, .jsonl or .parquet with a column of PROMPT, perhaps one of
    CATEGORY; a .json list of texts, or object of lists by category; a folder of such files, named by category; "parti",
    "pickapic" (its test prompts) or "hpdv2" (HPSv2's benchmark). parti and pickapic: where those data sets are. flag: what
    the user gave the source with. Raises UserError for what is missing, empty, of another kind or not readable.
    """
    try:
        table = source_table(source, parti, pickapic)
    except (ConnectionError, LocalEntryNotFoundError) as e:
        reason = "the hub is out of reach, and its cache has no copy; go online, or give a file of prompts"
        raise UserError(f"--{flag} {source}: cannot be read: {reason}") from e
    except Exception as e:
        raise UserError(f"--{flag} {source}: cannot be read: {first_line(e)}") from e
    if table is None:
        what = "of no known kind" if find_path(source) else "no such file or folder"
        raise UserError(f"--{flag} {source}: {what}; {KINDS}")
    table = table[table["prompt"] != ""].reset_index(drop=True)
    if table.empty:
        raise UserError(f"--{flag} {source}: holds no prompt; put one on each line, or in the column prompt")
    return table


def source_table(source: str, parti: str, pickapic: str) -> pd.DataFrame | None:
    """The table behind read_prompts with its blank ones; None for a source of no known kind."""
    path = find_path(source)
    if source == "parti":
        import datasets

        return prompt_columns(datasets.load_dataset(str(find_path(parti) or parti), split="train").to_pandas())
    if source == "pickapic":
        return prompt_columns(pd.DataFrame({"prompt": pickapic_captions(pickapic)}))
    if source == "hpdv2":
        import hpsv2

        return json_table(hpsv2.benchmark_prompts("all"))
    if path and path.is_dir():
        files = sorted(f for f in path.glob("[!.]*") if f.suffix.lower() in READERS and f.is_file())
        return together((f.stem, f.name, READERS[f.suffix.lower()], f) for f in files)
    return prompt_columns(READERS[path.suffix.lower()](path)) if path and path.suffix.lower() in READERS else None


def together(parts) -> pd.DataFrame:
    """One table of parts (category, name, reader, source), the category for rows without. ValueError names the part."""
    tables = [pd.DataFrame(columns=["prompt", "category"])]
    for category, name, read, source in parts:
        try:
            tables.append(prompt_columns(read(source), category))
        except Exception as e:
            raise ValueError(f"{name}: {first_line(e)}") from e
    return pd.concat(tables)


def prompt_columns(table: pd.DataFrame, category: str = "") -> pd.DataFrame:
    """A table's prompts and categories, each on one line; category where a row has none. ValueError for no such column."""
    prompts, categories = named_column(table, PROMPT), named_column(table, CATEGORY)
    if prompts is None:
        raise ValueError(f"has no column {NAMES}; its columns are {listed(table.columns)}")
    table = pd.DataFrame({"prompt": prompts, "category": categories}).astype(object)
    if not table["prompt"].map(pd.api.types.is_scalar).all():
        raise ValueError(f"the column {prompts.name} holds more than one text in a row; give a row to each prompt")
    table = table.where(table.notna(), "").astype(str).map(one_line)
    return table.assign(category=table["category"].where(table["category"] != "", category))


def named_column(table: pd.DataFrame, names: tuple[str, ...]) -> pd.Series | None:
    """The column of the first of these names, in any case, with blanks around it; where a row is empty, that of the next."""
    columns = plain(table.columns)
    found = [table.iloc[:, columns.index(name)] for name in names if name in columns]
    return functools.reduce(lambda a, b: a.where(a.notna(), b), found) if found else None


def plain(names) -> list[str]:
    return [str(name).strip().lower() for name in names]


def pickapic_captions(name: str) -> list[str]:
    """The captions of Pick-a-Pic's test set (Kirstain et al. 2023, section 2), each once. Its pictures are not read."""
    import datasets

    if path := find_path(name):
        files = [str(f) for f in sorted(path.rglob("test*.parquet"))]
        rows = datasets.load_dataset("parquet", data_files=files, split="train", columns=["caption"])
    else:
        rows = datasets.load_dataset(name, split="test_unique", streaming=True, columns=["caption"])
    return list(dict.fromkeys(row["caption"] for row in rows))


def by_category(table: pd.DataFrame, categories: tuple[str, ...], limit: int | None, source: str) -> pd.DataFrame:
    """The prompts of these categories (of all without any), the first `limit` of each, categories in turn: a larger limit
    adds prompts at the end only. UserError for a category that source lacks."""
    there = list(dict.fromkeys(table["category"]))
    if unknown := [c for c in categories if c not in there]:
        known = f"its categories are {', '.join(there)}" if any(there) else "its prompts have no categories"
        raise UserError(f"--categories {unknown[0]!r}: not in --prompts {source}; {known}")
    if categories:
        table = table[table["category"].isin(categories)]
    rank = table.groupby("category", sort=False).cumcount()
    table = table[rank < (limit or len(table))]
    return table.assign(rank=rank).sort_values("rank", kind="stable")[["prompt", "category"]].reset_index(drop=True)


def one_line(text: str) -> str:
    """Text without control characters, with single blanks for its whitespace, which is how CLIP's tokenizers read it too."""
    return " ".join("".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cc").split())


def read_text(path: Path) -> str:
    """A file in UTF-8, UTF-16 (by its mark) or cp1252, of which latin-1's letters are a part. ValueError for other bytes."""
    data = path.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    with contextlib.suppress(UnicodeDecodeError):
        if "\0" not in (text := data.decode("cp1252")):
            warn(f"{path} is not in UTF-8 and was read as cp1252; save it as UTF-8 if letters come out wrong")
            return text
    raise ValueError("no text in UTF-8, UTF-16 or cp1252")


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV as text, parted by that of SEPARATORS which makes a known column of the header, or the most cells. ValueError
    where a row has more cells than the header, which pandas would take for an index."""
    text = read_text(path)
    cells = {s: next(csv.reader(io.StringIO(text.lstrip("\r\n")), delimiter=s), []) for s in SEPARATORS}
    separator = max(SEPARATORS, key=lambda s: (bool({*PROMPT} & {*plain(cells[s])}), len(cells[s])))
    # Under a header of one cell the lines are whole, whatever they hold.
    options = {"sep": separator if len(cells[separator]) > 1 else "\x1f", "skipinitialspace": True}
    too_wide = f"a row has more cells than the header; put quotes around prompts with {SEPARATORS[separator]}"
    try:
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, **options)
    except pd.errors.EmptyDataError:
        return pd.DataFrame({"prompt": []})
    except pd.errors.ParserError as e:
        raise ValueError(too_wide if "fields in line" in str(e) else "a quote is opened and never closed") from e
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(too_wide)
    if n := int(table.map(lambda cell: "\n" in cell).any(axis=1).sum()):
        warn(f"{path}: {n} of {len(table)} rows go over several lines; look for a quote that is opened and not closed")
    return table


def read_json(path: Path) -> pd.DataFrame:
    """A file with one JSON value, or with one on each line."""
    text = read_text(path)
    try:
        return json_table(json.loads(text) if text.strip() else [])
    except json.JSONDecodeError as e:
        if e.msg != "Extra data":
            raise
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as e:
            raise ValueError(f"line {number}: {e.msg} at column {e.colno}") from e
    return json_table(rows)


def json_table(data) -> pd.DataFrame:
    """A list of texts and objects, an object of columns, or one whose keys are categories. ValueError for all else."""
    if isinstance(data, list) and all(isinstance(x, str | dict | None) for x in data):
        rows = [x if isinstance(x, dict) else {"prompt": x} for x in data]
        if strange := next((row for row in rows if not {*PROMPT} & {*plain(row)}), None):
            raise ValueError(f"an object has no {NAMES}, but {listed(strange)}")
        # As objects: numbers with a gap among them would become fractions.
        return pd.DataFrame(rows, columns=None if rows else ["prompt"], dtype=object)
    if isinstance(data, dict) and (known := {*PROMPT} & {*plain(data)}):
        others = [k for k, x in data.items() if isinstance(x, list) and not {*PROMPT, *CATEGORY} & {*plain([k])}]
        if known == {"text"} and any(isinstance(x, str) for k in others for x in data[k]):
            raise ValueError(f"text may be a column or a category, as {others[0]} is; call it prompt, or something else")
        return pd.DataFrame(data if any(isinstance(x, list | dict) for x in data.values()) else [data], dtype=object)
    if isinstance(data, dict) and all(isinstance(x, list) for x in data.values()):
        return together((key, key, json_table, x) for key, x in data.items())
    wanted = "a list of prompts or of objects with a prompt, or an object of lists, its keys the categories"
    raise ValueError(f"holds {json.dumps(data)[:100]}; give {wanted}")


def listed(names) -> str:
    return textwrap.shorten(", ".join(map(str, names)), 120, placeholder=" ...") or "nothing"


READERS = {".txt": lambda path: pd.DataFrame({"prompt": read_text(path).splitlines()}), ".csv": read_csv, ".tsv": read_csv}
READERS |= {".parquet": pd.read_parquet, ".json": read_json, ".jsonl": read_json}
