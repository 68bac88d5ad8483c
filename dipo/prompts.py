"""Prompts from files, folders and known data sets."""

import unicodedata
from pathlib import Path

import pandas as pd

from dipo.cli import UserError, first_line
from dipo.files import find_path

KINDS = "give a folder of .txt files, a .txt, .csv or .parquet, parti, pickapic or hpdv2"


def read_prompts(source: str, parti: str = "", pickapic: str = "", flag: str = "prompts") -> pd.DataFrame:
    """The prompts of a source in its order, blank ones left out: columns prompt and category ("" where there are none).

    source: a folder with a .txt for each category, a .txt (UTF-8, a prompt a line), a .csv or .parquet with a column prompt
    and perhaps category (in any case), "parti", "pickapic" (its test prompts) or "hpdv2" (HPSv2's benchmark). parti and
    pickapic: where those data sets are. flag: what the user gave the source with. Raises UserError for what is missing,
    empty, of another kind or not readable.
    """
    try:
        table = prompt_table(source, parti, pickapic)
    except Exception as e:
        raise UserError(f"--{flag} {source}: cannot be read: {first_line(e)[:200]}") from e
    if table is None:
        raise UserError(
            f"--{flag} {source}: {'of no known kind' if find_path(source) else 'no such file or folder'}; {KINDS}"
        )
    table.columns = table.columns.astype(str).str.lower()
    if "prompt" not in table:
        raise UserError(f"--{flag} {source}: has no column prompt; its columns are {', '.join(table.columns)}")
    table = table.reindex(columns=["prompt", "category"]).astype(object)
    table = table.where(table.notna(), "").astype(str).map(one_line)
    table = table[table["prompt"] != ""].reset_index(drop=True)
    if table.empty:
        raise UserError(f"--{flag} {source}: holds no prompt; put one on each line, or in the column prompt")
    return table


def prompt_table(source: str, parti: str, pickapic: str) -> pd.DataFrame | None:
    """The table behind read_prompts as it is; None for a source of no known kind."""
    path = find_path(source)
    kind = path.suffix.lower() if path and path.is_file() else ""
    if source == "parti":
        import datasets

        return datasets.load_dataset(str(find_path(parti) or parti), split="train").to_pandas()
    if source == "pickapic":
        return pd.DataFrame({"prompt": pickapic_captions(pickapic)})
    if source == "hpdv2":
        import hpsv2

        styles = hpsv2.benchmark_prompts("all")
        return pd.DataFrame([(p, style) for style in styles for p in styles[style]], columns=["prompt", "category"])
    if path and path.is_dir():
        texts = {f.stem: read_lines(f) for f in sorted(path.glob("*.txt"))}
        return pd.DataFrame([(p, name) for name in texts for p in texts[name]], columns=["prompt", "category"])
    if kind == ".txt":
        return pd.DataFrame({"prompt": read_lines(path)})
    if kind == ".csv":
        return read_csv(path)
    return pd.read_parquet(path) if kind == ".parquet" else None


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
    """The prompts of these categories (of all without any), the first `limit` of each. Categories come in turn, so that a
    larger limit adds prompts at the end only. UserError for a category that source lacks."""
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


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8-sig").splitlines()


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV as text; ValueError where a row has more cells than the header, which pandas would take for an index."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("a row has more cells than the header; put quotes around prompts with commas")
    return table
