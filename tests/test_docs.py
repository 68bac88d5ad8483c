"""README and docs: every command parses, every link leads somewhere."""

import math
import re
import shlex
import sys

import pandas as pd
import pytest
from conftest import ROOT
from helpers import SCRIPTS, script

from dipo import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
PAGES += [ROOT / "assets/demo/README.md", ROOT / "tests/README.md"]


def commands():
    """What the pages and the scripts' docstrings tell to run: (script, flags), each once."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES] + [script(name).__doc__ for name in SCRIPTS]
    found = {}
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        for name, flags in re.findall(r"(?:python3?|launch) (\w+)\.py((?: (?!&&)[^`#|;]*?)?)(?=\s*(?:$|#|`|&&|\||;))", line):
            if name in SCRIPTS and "..." not in flags and "$" not in flags:
                found[name, flags.strip()] = None
    return list(found)


@pytest.mark.parametrize(("name", "flags"), commands())
def test_every_command_that_is_told_parses(name, flags, monkeypatch):
    """Flags that are gone or misspelt, and values that no longer fit, end here as they would for a reader."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *shlex.split(flags)])
    if "--help" in flags:
        with pytest.raises(SystemExit, match="0"):
            cli.parse(script(name).Settings, script(name).__doc__)
    else:
        assert isinstance(cli.parse(script(name).Settings, script(name).__doc__), script(name).Settings)


def test_there_are_commands_of_every_script():
    assert {name for name, _ in commands()} == {*SCRIPTS} and len(commands()) > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files that are linked are there, and so are the headings behind a #."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles], link


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_what_fits_is_what_the_benchmark_predicted():
    """The tables of docs/scaling.md: GB, and the smallest GPU."""
    table = pd.read_csv(ROOT / "benchmarks/memory.csv").query("not what.str.startswith('demo')").groupby("what", sort=False)
    lines = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    for what, rows in table:
        fits = ["" if math.isnan(size) else f" ({size:.0f})" for size in rows["fits"]]
        cells = [f"{total:.1f}{size}" for total, size in zip(rows["total"], fits, strict=True)]
        assert f"| {' | '.join([what, *cells])} |" in lines
    assert len(table) == 12
