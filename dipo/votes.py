"""What people say: the page vote.html, which asks them about two rows of pictures, and tables of the CSVs that it leaves.

The page is blind, not secret: which side is which and the order are drawn for each voter, and nothing that is shown tells
the rows apart, but whoever reads its source finds them.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

from dipo import stats
from dipo.cli import UserError, warn
from dipo.files import csv_text, find_path, write_csv, write_text
from dipo.folders import paired
from dipo.judges import Judge
from dipo.prompts import one_line, read_text
from dipo.tables import print_table, win_columns

TEMPLATE = Path(__file__).with_name("vote.html")
# A vote, as the page writes it. Whether a line is cut short shows in the last one.
COLUMNS = ["voter", "pair", "showing", "left", "right", "pictures", "milliseconds", "choice"]
CHOICES = {"left": 1, "tie": 0, "right": -1}


def asked_rows(s, variants: list[str], *default: str) -> tuple[str, ...]:
    """The two rows that people are asked about, by --vote or default. UserError for rows or --votes that are not there."""
    if missing := [file for file in s.votes if not (find_path(file) or Path()).is_file()]:
        raise UserError(f"--votes {missing[0]}: no such file; give the CSVs that voters sent back")
    rows = tuple(str(Path(v)) for v in s.vote or ())
    if rows and (rows[0] == rows[1] or {*rows} - {*variants}):
        raise UserError(f"--vote {' '.join(rows)}: give two of {', '.join(variants)}")
    return rows or default


def ask(s, folder: Path, images: pd.DataFrame, judges: list[Judge], rows: tuple[str, ...], paper=None) -> list[Path]:
    """Write vote.html about two rows into a folder and, with --votes, tables of what people said of any two, which are
    printed too. Returns the files. images: a row for each, with the columns variant, path, prompt, seed, category, image
    and each judge's score. paper: how often the paper has the first of two rows chosen, 0 to 1, by the two."""
    order = list(dict.fromkeys(images["variant"]))
    a, b = sorted(rows, key=order.index)
    pairs = pairs_of(images, a, b)
    files = [write_page(folder / "vote.html", pairs, a, b)] if len(pairs) else []
    if not s.votes:
        return files
    votes = read_votes(s.votes, images)
    if not (votes["showing"] == "1").any():
        warn("--votes: no vote counts, so there is no table of what people say")
        return files
    wins, agreement = wins_of(votes), agreement_of(votes, judges)
    theirs = [(paper or {}).get(two) for two in zip(wins["a"], wins["b"], strict=True)]
    wins["paper"] = pd.Series(theirs, wins.index, dtype=float).where(wins["by"] == "all")
    alike = "every vote" if pairs["prompt"].is_unique else "every vote, and images of one prompt,"
    columns = {"rows": "rows", "by": "by", "of": "name"} | win_columns("first wins", "second wins")
    columns |= {"paper's, by a judge model, not people": ("paper", ".1f%")}
    shown = named(wins).assign(probability=math.nan)
    print_table(f"People: how often they choose which (95 % Wilson); {alike} counts as independent", shown, columns)
    kinds = [".2f" if m == "alpha" else ".1f%" for m in agreement["measure"]]
    columns = {"rows": "rows", "of": "name", "measure": "measure", "n": "n", "agreement": ("agreement", kinds)}
    print_table("Agreement: alpha is Krippendorff's, nominal; shares with 95 % Wilson intervals", named(agreement), columns)
    return [*files, write_csv(folder / "people.csv", wins), write_csv(folder / "agreement.csv", agreement)]


def named(table: pd.DataFrame) -> pd.DataFrame:
    """With the rows in words, and names in which Markdown finds no markup."""
    name = table["name"].map(lambda text: re.sub(r"[\\`*<|\[\]]", r"\\\g<0>", text))
    return table.assign(rows=table["a"] + " over " + table["b"], name=name)


def pairs_of(images: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """The pairs of two rows' images: prompt, seed, pair (a's file name), category, pictures (changes with either picture),
    and all that an image has, with _a and _b behind."""
    both = paired(images, a, b)[0].drop_duplicates(["variant", "prompt", "seed"])
    sides = [both[both["variant"] == v] for v in (a, b)]
    pairs = pd.merge(*sides, on=["prompt", "seed"], suffixes=("_a", "_b"))
    own = {"pair": pairs["path_a"].map(lambda path: path.name), "category": pairs["category_a"]}
    return pairs.assign(**own, pictures=pairs["image_a"] + "-" + pairs["image_b"])


def write_page(path: Path, pairs: pd.DataFrame, a: str, b: str) -> Path:
    """The page for pairs of the rows a and b, whose pictures it finds from where it lies."""
    names = {"pair": pairs["pair"], "prompt": pairs["prompt"].map(without_apostrophe), "fingerprint": pairs["pictures"]}
    both = zip(pairs["path_a"], pairs["path_b"], strict=True)
    pictures = [[quote(Path(os.path.relpath(x, path.parent)).as_posix()) for x in two] for two in both]
    study = {"rows": [a, b], "pairs": pd.DataFrame(names).assign(pictures=pictures).to_dict("records")}
    study["study"] = hashlib.sha256(json.dumps(study).encode()).hexdigest()[:12]
    # JSON in ASCII, without what could end the element that holds it.
    text = json.dumps(study).replace("<", r"\u003c")
    write_text(path, TEMPLATE.read_text(encoding="utf-8").replace(">STUDY<", f">{text}<", 1))
    return path


def without_apostrophe(cell: str) -> str:
    """What csv_text made a cell from."""
    return cell[1:] if cell and csv_text(cell[1:]) == cell else cell


def lines_of(file: str) -> pd.DataFrame:
    """The lines of a CSV in COLUMNS, as text, None for a cell that is not there; no line, and a warning, for another's."""
    try:
        text = read_text(find_path(file))
        header = text.partition("\n")[0]
        lines = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count)))
    except (ValueError, csv.Error):
        header, lines = "", []
    if not all(name in header for name in COLUMNS):
        warn(f"--votes {file}: not a CSV of vote.html, lines left out: {len(lines)}")
        lines = []
    table = pd.DataFrame(lines, columns=COLUMNS, dtype=object)
    return table.map(lambda x: one_line(without_apostrophe(x)) if isinstance(x, str) else None).assign(file=file)


def read_votes(files: tuple[str, ...], images: pd.DataFrame) -> pd.DataFrame:
    """The votes in CSVs on pairs of these images: COLUMNS, the rows a and b in the images' order, won (1: a's picture, -1:
    b's, 0: a tie), and all of pairs_of. What cannot count is left out, with a warning for each file and kind."""
    order = {v: i for i, v in enumerate(dict.fromkeys(images["variant"]))}
    table = pd.concat([pd.DataFrame(columns=[*COLUMNS, "file"], dtype=object), *map(lines_of, files)], ignore_index=True)
    forward = table["left"].map(order).astype(float) < table["right"].map(order).astype(float)
    table["a"], table["b"] = (table[x].where(forward, table[y]) for x, y in (("left", "right"), ("right", "left")))
    table["won"] = table["choice"].map(CHOICES).astype(float) * np.where(forward, 1, -1)
    couples = table.loc[table["a"].isin(order) & table["b"].isin(order), ["a", "b"]].drop_duplicates()
    pairs = [pairs_of(images, a, b).assign(a=a, b=b) for a, b in couples.itertuples(index=False) if a != b]
    known = pd.concat([pd.DataFrame(columns=["a", "b", "pair", "pictures"], dtype=object), *pairs])
    table = table.merge(known, on=["a", "b", "pair"], how="left", suffixes=("_seen", ""))
    whole = table["won"].notna() & table["showing"].isin(("1", "2")) & table["voter"].astype(bool)
    whole &= table["milliseconds"].map(lambda x: str(x).isdecimal()).astype(bool)
    kinds = {
        "cut short or no votes": ~whole,
        "on pairs that are not here": table["pictures"].isna(),
        "on pictures that have changed since": table["pictures"] != table["pictures_seen"],
    }
    table["kind"] = np.select(list(kinds.values()), list(kinds), "")
    twice = table[table["kind"] == ""].duplicated(["voter", "a", "b", "pair", "showing"])
    table.loc[twice[twice].index, "kind"] = "voted already by the same voter"
    left_out = table[table["kind"] != ""].groupby(["file", "kind"], sort=False).size()
    for (file, kind), n in left_out.items():
        warn(f"--votes {file}: lines left out, {kind}: {n}")
    return table[table["kind"] == ""]


def wins_of(votes: pd.DataFrame) -> pd.DataFrame:
    """How often people chose a's picture: a row for each two rows a and b, in all, by category and by voter, with what
    stats.win_rate has. Only the first showing of a pair counts."""
    lines = []
    for (a, b), part in votes[votes["showing"] == "1"].groupby(["a", "b"], sort=False):
        groups = [("all", "", part)]
        groups += [(by, name, group) for by in ("category", "voter") for name, group in part.groupby(by, sort=False) if name]
        for by, name, x in groups:
            lines.append({"a": a, "b": b, "by": by, "name": name, **stats.win_rate(x["won"], 0 * x["won"])})
    return pd.DataFrame(lines)


def agreement_of(votes: pd.DataFrame, judges: list[Judge]) -> pd.DataFrame:
    """For each two rows how voters agree with each other (Krippendorff's alpha), each with himself where a pair came again,
    and each judge with people, as a share of their votes without ties: measure, n, agreement and its ends _low, _high."""
    from nltk.metrics.agreement import AnnotationTask  # slow to import

    lines = []
    for (a, b), part in votes.groupby(["a", "b"], sort=False):
        first = part[part["showing"] == "1"]
        shared = first[first.groupby("pair")["voter"].transform("size") > 1]
        if len(shared):
            alpha = AnnotationTask(shared[["voter", "pair", "won"]].itertuples(index=False, name=None)).alpha()
            value = {"n": shared["pair"].nunique(), "agreement": alpha}
            lines.append({"a": a, "b": b, "name": "voters", "measure": "alpha"} | value)
        again = part.pivot(index=["voter", "pair"], columns="showing", values="won").reindex(columns=["1", "2"]).dropna()
        for voter, x in again.groupby("voter", sort=False):
            same = share(np.where(x["1"] == x["2"], 1, -1))
            lines.append({"a": a, "b": b, "name": voter, "measure": "same choice again, sides swapped"} | same)
        decided = first[first["won"] != 0]
        for judge in judges:
            sides = np.sign(decided[f"{judge.name}_a"] - decided[f"{judge.name}_b"]) * decided["won"]
            lines.append({"a": a, "b": b, "name": judge.label, "measure": "same choice as people"} | share(sides))
    return pd.DataFrame(lines)


def share(sides) -> dict[str, float]:
    """How many of numbers are above 0, with the 95 % Wilson interval."""
    rate = stats.win_rate(sides, np.zeros(len(sides)))
    names = {"n": "n", "win_rate": "agreement", "low": "agreement_low", "high": "agreement_high"}
    return {name: rate[k] for k, name in names.items()}
