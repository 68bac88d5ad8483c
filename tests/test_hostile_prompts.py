"""Prompts are data: whatever they hold, no file lands outside the output folder, and every CSV and PNG can be read."""

import csv
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from dipo.files import csv_text, read_record
from dipo.prompts import by_category, one_line, read_prompts
from dipo.scores import Scores

HOSTILE = [
    *("../../escape", "/etc/passwd", "..", ".", "~", "C:\\windows\\system32", "a/b/c.png", "00000.png", "con", "nul.txt"),
    *("%2e%2e%2f", "=cmd|' /C calc'!A0", "=1+1", "+1+1", "-1+1", "@SUM(A1:A9)", "'=1", '=HYPERLINK("http://x","y")'),
    *('"', '""', "'", '"quoted" and "more', "a,b,c", "a;b\tc", 'comma, "quote", both', "tail\\"),
    *("two\nlines", "two\r\nlines", "carriage\rreturn", "line\u2028separator", "\tleading tab", "nul\x00inside"),
    *(
        "bell\x07escape\x1b[31mred",
        "😀 👩\u200d👩\u200d👧",
        "中文提示词",
        "مرحبا بالعالم",
        "e\u0301 combining",
        "\u202eright to left",
    ),
    *("\ufeffmark", "x" * 10_000, "long " * 2_000, "<script>alert(1)</script>", "{prompt}", "%s %d %n", "$x_$ \\frac{1}"),
    *("`rm -rf /`", "$(touch harm)", "None", "nan", "NULL", "0", "Negative prompt: all\nSteps: 1, Sampler: x"),
    *("a | b | c", "<!-- end -->"),
]
STUDIES = {
    "compare_quality": ("--steps", 2, "--baseline-steps", 3, "--rows", ROOT / "tests/rows.yaml"),
    "Ablation_experiment": ("--num-inference-steps", 2, "--etas", 0, 1, "--redraws", 0),
    "Semantic_Categories": ("--dipo-steps", 2, "--baseline-steps", 3),
    "Human_Preference_compare": ("--dipo-steps", 2, "--baseline-steps", 3),
}


@pytest.fixture
def prompts(tmp_path):
    """A table with every hostile text as a prompt, and as the category of one."""
    table = pd.DataFrame({"prompt": HOSTILE, "category": HOSTILE[1:] + HOSTILE[:1]})
    path = tmp_path / "in" / "prompts.parquet"
    path.parent.mkdir()
    table.to_parquet(path)
    return path


def check_folder(folder, images):
    """Every PNG opens, every CSV has whole rows and no formula, the page has no markup but its own, nothing lies outside."""
    assert {p.name for p in folder.parent.iterdir()} == {"in", folder.name}
    for path in folder.rglob("*"):
        assert path.is_dir() or path.suffix in (".png", ".pdf", ".csv") or path.name == "vote.html", path
        if path.name == "vote.html":
            own = (ROOT / "dipo/vote.html").read_text(encoding="utf-8")
            assert path.read_text(encoding="utf-8").count("<") == own.count("<")
        assert len(path.name) < 100
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.verify()
        if path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as f:
                rows = list(csv.reader(f, strict=True))
            assert len({len(row) for row in rows}) == 1 and len(rows) == len(pd.read_csv(path)) + 1, path
            texts = [cell for row in rows for cell in row if not is_number(cell)]
            assert not any(cell.startswith(("=", "+", "-", "@")) for cell in texts), path
            assert all(c.isprintable() or unicodedata.category(c) != "Cc" for cell in texts for c in cell)
    assert len(list(folder.rglob("0*.png"))) == images


def is_number(cell):
    try:
        float(cell)
    except ValueError:
        return False
    return True


def test_texts_are_made_harmless_and_no_more():
    assert one_line(" a \n b\x00\x1b[31m\tc ") == "a b[31m c"
    assert one_line("👩\u200d👧") == "👩\u200d👧"
    texts = {"=1": "'=1", "+1": "'+1", "-1": "'-1", "@a": "'@a", "1=1": "1=1", "": "", "'=1": "'=1"}
    assert {x: csv_text(x) for x in texts} == texts


def test_hasty_sample(run, prompts, tmp_path):
    code, _, err = run(
        *("hasty_sample", "--demo", "--prompts", prompts, "--num-inference-steps", 2, "--batch-size", 12),
        *("--negative-prompt", "=1+1\n\ttwo", "--output-dir", "out"),
    )
    assert code == 0 and "Traceback" not in err, err
    wanted = [one_line(p) for p in HOSTILE]
    check_folder(tmp_path / "out", len(wanted))
    assert len(wanted) >= 50 and all(wanted)
    for i, prompt in enumerate(wanted):
        record = read_record(Path(f"out/{i:05d}.png"))
        assert record["prompt"] == prompt
        with Image.open(f"out/{i:05d}.png") as image:
            first, second, last = image.info["parameters"].split("\n")
        assert first == prompt and second == "Negative prompt: =1+1 two" and last.startswith("Steps: 2, Sampler: DDIM")
    table = pd.read_csv("out/images.csv", keep_default_na=False, dtype=str)
    assert table["prompt"].tolist() == [csv_text(p) for p in wanted]
    # And the same command goes on with what it made.
    code, out, err = run(
        *("hasty_sample", "--demo", "--prompts", prompts, "--num-inference-steps", 2, "--batch-size", 12),
        *("--negative-prompt", "=1+1\n\ttwo", "--output-dir", "out"),
    )
    assert code == 0 and f"{len(wanted)} of {len(wanted)} images" in out, err


@pytest.mark.parametrize("script", STUDIES)
def test_studies(run, tiny, prompts, tmp_path, monkeypatch, script):
    flags = (script, "--demo", "--base-model", tiny, "--dpo-unet", tiny / "unet", *STUDIES[script], "--prompts", prompts)
    flags += ("--height", 32, "--width", 32, "--output-dir", "out")
    code, out, err = run(*flags)
    assert code == 0 and "Traceback" not in err, err
    assert "\x1b[31m" not in out and "\x00" not in out
    check_folder(tmp_path / "out", len(HOSTILE) * {"c": 3, "H": 4}.get(script[0], 2))
    scores = pd.read_csv("out/scores.csv", keep_default_na=False, dtype=str)
    assert set(scores["prompt"]) == {csv_text(one_line(p)) for p in HOSTILE}
    if script == "Semantic_Categories":
        table = pd.read_csv("out/categories.csv", keep_default_na=False, dtype=str)
        categories = {csv_text(one_line(c)) for c in HOSTILE}
        assert set(table["category"]) == categories | {"all"} and set(table["n"]) == {"1", "2", str(len(HOSTILE))}
    monkeypatch.setattr(Scores, "load_judges", lambda *_: 1 / 0)
    assert run(*flags)[0] == 0


def test_train_dipo(run, tiny, tmp_path):
    """Captions and validation prompts of any kind: a run and its resumption, a cache, tables, grids and a model card."""
    rows = pd.read_parquet(ROOT / "assets/demo/pickapic/train.parquet").query("label_0 != 0.5")[: len(HOSTILE)]
    (tmp_path / "in").mkdir()
    rows.assign(caption=HOSTILE).to_parquet(tmp_path / "in/train.parquet")
    (tmp_path / "in/prompts.txt").write_text("\n".join(["=1+1", "../../escape \x1b[31m", "long " * 2_000]), encoding="utf-8")
    flags = ("train_dipo", "--demo", "--base-model", tiny, "--dataset", "in/train.parquet")
    flags += ("--validation-prompts", "in/prompts.txt")
    flags += ("--effective-batch-size", 54, "--train-batch-size", 54, "--checkpoint-every", 1, "--keep-checkpoints", 1)
    flags += ("--validate-every", 2, "--output-dir", "out", "--cache-dir", "out/cache", "--lora-rank", 2)
    code, _, err = run(*flags, "--max-train-steps", 1)
    assert code == 0 and "Traceback" not in err, err
    code, _, err = run(*flags, "--max-train-steps", 2, "--resume")
    assert code == 0 and "Traceback" not in err, err
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}
    assert len(pd.read_csv("out/metrics.csv")) == 2
    with Image.open("out/validation/step-0000002.png") as image:
        image.load()
    cached = pd.concat([pd.read_parquet(p) for p in sorted(Path("out/cache").glob("*.parquet"))])
    assert len(cached) == len(HOSTILE) == 54


def test_every_prompt_of_a_text_file_is_its_own(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(HOSTILE), encoding="utf-8")
    table = read_prompts(str(tmp_path / "p.txt"))
    read = table["prompt"].tolist()
    assert read == by_category(table, (), None, "p.txt")["prompt"].tolist()
    assert all(p == one_line(p) and p for p in read)
