"""Numeric tables as text."""

import math

import pandas as pd

from dipo.judges import JUDGES, Judge


def text(value: float, kind: str, low: float = math.nan, high: float = math.nan) -> str:
    """A number as text, with its interval if it has one. kind: a format such as .3f or +.3f, which may have an x or a %
    behind it; % stands for a share of 1. nan is empty."""
    if pd.isna(value):
        return ""
    factor, kind, unit = (100, kind[:-1], " %") if kind.endswith("%") else (1, kind.rstrip("x"), "x" * kind.endswith("x"))
    ends = "" if pd.isna(low) or low == high else f" ({factor * low:{kind}} to {factor * high:{kind}})"
    return f"{factor * value:{kind}}{unit}{ends}"


def print_table(title: str, table: pd.DataFrame, columns: dict) -> None:
    """Print a table as Markdown, without columns that are empty.

    columns: for each header the column of the table that stands under it, as it is; or a column and the kind of its numbers
    (one for all or one for each), which have an interval where the table has columns of that name with _low and _high, or
    with the two names behind it.
    """
    shown = pd.DataFrame(index=table.index)
    for header, column in columns.items():
        if isinstance(column, str):
            shown[header] = table[column]
            continue
        name, kind, *ends = column
        numbers = [table[c] for c in (name, *(ends or (f"{name}_low", f"{name}_high"))) if c in table]
        kinds = [kind] * len(table) if isinstance(kind, str) else kind
        shown[header] = [text(value, one, *ends) for one, value, *ends in zip(kinds, *numbers, strict=True)]
    shown = shown.fillna("")
    shown = shown.loc[:, (shown != "").any()]
    print(f"\n{title}\n\n{shown.to_markdown(index=False, disable_numparse=True)}")


def mean_columns(judges: list[Judge], than: str = "") -> dict:
    """The means of stats.means by each judge and, where `than` names the baseline, their differences from it."""
    columns = {}
    for j in judges:
        columns[j.label] = (j.name, f".{j.digits}f")
        if than:
            columns[f"{j.label} - {than}"] = (f"{j.name}_difference", f"+.{j.digits}f")
    return columns


def win_columns(a: str = "wins", b: str = "losses") -> dict:
    """Both sides of stats.wins, called a and b, and how sure the judge is of the first."""
    sides = {a: ("win_rate", ".1f%", "low", "high"), b: ("loss_rate", ".1f%", "loss_low", "loss_high")}
    return {"n": "n"} | sides | {"ties": "ties", "p": ("p", ".2g"), f"{a}: mean probability": ("probability", ".1f%")}


def gap_column(table: pd.DataFrame) -> tuple:
    """The mean differences of stats.wins, with the decimals of the judge that the column score names."""
    digits = {judge.label: judge.digits for judge in JUDGES.values()}
    return "difference", [f"+.{digits[label]}f" for label in table["score"]]
