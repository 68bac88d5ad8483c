"""A simulated voter whose truth is known: the demo's annotator, with its noise, votes on a demo study's vote.html.

    python Human_Preference_compare.py --demo
    python demo/voter.py generated_images/demo/Human_Preference_compare --voters 3
    python Human_Preference_compare.py --demo --votes generated_images/demo/Human_Preference_compare/votes-annotator-*.csv

Its votes go through the same CSV as people's: every pair once, and one in ten again, its sides swapped. It prints what the
tables should find: how often the annotator chooses the first row's picture, and how often it makes the same choice again.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import annotator
import numpy as np
import pandas as pd
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dipo import cli
from dipo.files import write_csv
from dipo.votes import COLUMNS


@dataclass
class Settings:
    study: tyro.conf.Positional[str]
    """the output folder of a study's --demo, or wherever vote.html is"""
    voters: int = 1
    """how many, annotator-0 and so on"""


def page_data(page: Path) -> dict:
    """What vote.html asks about: rows, and pairs with pair, prompt, fingerprint and pictures, by paths from the page."""
    return json.loads(re.search(r'<script id="study"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])


def rewards(folder: Path, pair: dict) -> list[float]:
    """The annotator's rewards of the two pictures of a pair, in the order of the rows."""
    values = []
    for file in pair["pictures"]:
        with Image.open(folder / unquote(file)) as image:
            values.append(annotator.reward(image, pair["prompt"]))
    return values


def votes(voter: str, study: dict, values: list[list[float]], rng: np.random.Generator) -> pd.DataFrame:
    """The lines of a voter's CSV. values: the rewards of each pair's two pictures."""
    n, lines = len(values), []
    swapped = rng.random(n) < 0.5
    for showing, shown in ((1, rng.permutation(n)), (2, rng.permutation(n)[: max(1, round(n / 10))])):
        for i in shown:
            order = [1, 0] if swapped[i] ^ (showing == 2) else [0, 1]
            choice = {1.0: "left", 0.5: "tie", 0.0: "right"}[annotator.label(*(values[i][k] for k in order), rng)]
            pair, sides = study["pairs"][i], [study["rows"][k] for k in order]
            lines.append([voter, pair["pair"], showing, *sides, pair["fingerprint"], 1000, choice])
    return pd.DataFrame(lines, columns=COLUMNS)


def main(s: Settings) -> None:
    folder = Path(s.study)
    study = page_data(folder / "vote.html")
    values = [rewards(folder, pair) for pair in study["pairs"]]
    gap = np.subtract(*np.transpose(values))
    tie = np.abs(gap) < annotator.TIE
    chance = np.where(tie, 0, 1 / (1 + np.exp(-gap)))
    again = np.where(tie, 1, chance**2 + (1 - chance) ** 2)
    print(
        f"{study['rows'][0]} over {study['rows'][1]}, {len(values)} pairs: chosen in {chance.mean():.1%}, "
        f"ties {tie.mean():.1%}, the same choice again in {again.mean():.1%}"
    )
    for k in range(s.voters):
        table = votes(f"annotator-{k}", study, values, np.random.default_rng(k))
        print(write_csv(folder / f"votes-annotator-{k}.csv", table))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
