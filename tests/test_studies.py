"""The four studies: what they sample, what they write, how they go on, what they say of bad input."""

import contextlib
import functools
import io
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from helpers import SAMPLERS, launch_two, pixels, start_two, study_rows
from helpers import script as module_of
from PIL import Image

import Ablation_experiment as ablation
import compare_quality as cq
import Human_Preference_compare as human
from dipo import cli, devices, study
from dipo.checks import completed, papers
from dipo.files import read_record
from dipo.judges import HPSv2, PickScore
from dipo.scores import Scores
from dipo.settings import DEMO_PATHS

# ------------------------------------------------------------------------------------------------------- what comes out

TINY = {
    "compare_quality": ("--steps", 3, "--baseline-steps", 4, 6, "--rows", ROOT / "tests/rows.yaml"),
    "Ablation_experiment": ("--num-inference-steps", 3, "--etas", 0, 0.5, 1, "--redraws", 1),
    "Semantic_Categories": ("--dipo-steps", 3, "--baseline-steps", 5),
    "Human_Preference_compare": ("--dipo-steps", 3, "--baseline-steps", 5),
}
FOLDERS = {
    "compare_quality": ["diffusion-dpo-4", "diffusion-dpo-6", "dipo-3", "euler-3"],
    "Ablation_experiment": ["eta-0", "eta-0.5", "eta-1", "redraw-1"],
    "Semantic_Categories": ["diffusion-dpo-5", "dipo-3"],
    "Human_Preference_compare": ["base-diffusion-dpo-5", "base-dipo-3", "tuned-diffusion-dpo-5", "tuned-dipo-3"],
}
FILES = {
    "compare_quality": [
        *("equivalence.csv", "grid.png", "quality.pdf", "quality.png", "scores.csv", "table1.csv", "vote.html", "wins.csv"),
    ],
    "Ablation_experiment": ["eta.csv", "eta.pdf", "eta.png", "fluctuation.csv", "grid.png", "scores.csv"],
    "Semantic_Categories": [
        *("categories.csv", "categories.pdf", "categories.png"),
        *("grid-abstract.png", "grid-landscape.png", "grid-portrait.png", "scores.csv"),
    ],
    "Human_Preference_compare": [
        *("grid.png", "preference.csv", "preference.pdf", "preference.png", "scores.csv", "vote.html"),
    ],
}
WINS = ["n", "wins", "losses", "ties", "win_rate", "loss_rate", "low", "high", "loss_low", "loss_high", "p"]
WINS += [f"{k}{end}" for k in ("difference", "probability") for end in ("", "_low", "_high")]
GAPS = [f"{k}_difference{end}" for k in ("pickscore", "hpsv2") for end in ("", "_low", "_high")]
MEANS = [f"{k}{end}" for k in ("pickscore", "hpsv2") for end in ("", "_low", "_high")]
COLUMNS = {
    ("compare_quality", "table1.csv"): [
        *(
            "variant",
            "label",
            "steps",
            "eta",
            "unet_calls",
            "n",
            *MEANS,
            *GAPS,
            "seconds",
            "seconds_sampling",
            "seconds_low",
            "seconds_high",
        ),
        *("seconds_decoding", "batch_size", "batches", "device", "speed_up"),
        *("paper_pickscore", "paper_seconds", "paper_speed_up"),
    ],
    ("compare_quality", "wins.csv"): ["sampler", "score", *WINS],
    ("compare_quality", "equivalence.csv"): [
        *("sampler", "score", "group", "steps", "n", "difference", "margin", "p_equal", "p_different", "n_needed", "verdict")
    ],
    ("Ablation_experiment", "eta.csv"): ["variant", "eta", "steps", "n", *MEANS, *GAPS],
    ("Ablation_experiment", "fluctuation.csv"): [
        *("score", "n", "fluctuation", "chance", "p", "redrawn", "redrawn_as_paper")
    ],
    ("Semantic_Categories", "categories.csv"): [
        *("category", "score", *WINS, "paper"),
    ],
    ("Human_Preference_compare", "preference.csv"): [
        *("sampling", "score", *WINS, "paper"),
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a tiny finished run of every study, and what each printed."""
    folder, said = tmp_path_factory.mktemp("studies"), {}
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    for name, flags in TINY.items():
        arguments = (*flags, "--demo", "--limit", 2, "--device", "cpu", "--output-dir", name)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        out, module = io.StringIO(), module_of(name)
        with contextlib.redirect_stdout(out):
            cli.run(module.main, module.Settings, module.__doc__)
        said[name] = out.getvalue()
    patch.undo()
    return folder, said


@pytest.mark.parametrize("script", TINY)
def test_a_tiny_demo_leaves_tables_plots_and_grids(finished, script):
    folder, said = finished[0] / script, finished[1][script]
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == FILES[script]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == FOLDERS[script]
    for name in FOLDERS[script]:
        assert sorted(p.name for p in (folder / name).iterdir()) == [f"{i:05d}.png" for i in range(6)]
    scores = pd.read_csv(folder / "scores.csv")
    assert scores.columns.tolist() == [
        *("file", "variant", "prompt", "category", "seed", "image", "pickscore", "hpsv2", "hpsv2_logit", "scored_by")
    ]
    assert scores["file"].tolist() == [f"{v}/{i:05d}.png" for v in FOLDERS[script] for i in range(6)]
    # Paired: the same prompts and seeds under every variant, the categories in turn.
    for name, part in scores.groupby("variant"):
        first = 10**6 if name == "redraw-1" else 0
        assert part["seed"].tolist() == list(range(first, first + 6))
    assert scores.groupby("seed")["prompt"].nunique().eq(1).all() and scores["prompt"].nunique() == 6
    assert scores["category"].tolist()[:6] == ["abstract", "landscape", "portrait"] * 2
    assert scores[["pickscore", "hpsv2"]].notna().all().all() and scores["pickscore"].nunique() > 6
    for (owner, name), columns in COLUMNS.items():
        if owner == script:
            table = pd.read_csv(folder / name)
            assert sorted(table.columns) == sorted(columns), name
            assert "n" not in table or set(table["n"]) <= {2, 6}
    # Diffusion-DPO is ancestral: eta = 1; every other row but eta's own is deterministic.
    for name in FOLDERS[script]:
        eta = float(name.partition("eta-")[2] or "diffusion-dpo" in name)
        assert read_record(folder / name / "00000.png")["eta"] == eta
    for name in FILES[script]:
        assert name.endswith(".pdf") or name in said
        if name.endswith(".png"):
            assert np.asarray(Image.open(folder / name)).std() > 10
        elif name.endswith(".pdf"):
            assert (folder / name).read_bytes()[:5] == b"%PDF-"
    assert "95 %" in said


def test_the_tables_are_the_scores(finished):
    """Means, differences, wins and speed-ups in the tables, worked out again by hand."""
    scores = pd.read_csv(finished[0] / "compare_quality/scores.csv").pivot(index="seed", columns="variant", values="hpsv2")
    table = pd.read_csv(finished[0] / "compare_quality/table1.csv", index_col="variant")
    gap = scores["dipo-3"] - scores["diffusion-dpo-4"]
    assert table.at["dipo-3", "hpsv2"] == pytest.approx(scores["dipo-3"].mean())
    assert table.at["dipo-3", "hpsv2_difference"] == pytest.approx(gap.mean())
    assert table.at["dipo-3", "hpsv2_difference_low"] < gap.mean() < table.at["dipo-3", "hpsv2_difference_high"]
    wins = (
        pd.read_csv(finished[0] / "compare_quality/wins.csv").set_index(["sampler", "score"]).loc[("DIPO, 3 steps", "HPSv2")]
    )
    assert (wins["wins"], wins["losses"], wins["n"]) == ((gap > 0).sum(), (gap < 0).sum(), 6)
    seconds = table["seconds_sampling"] + table["seconds_decoding"]
    assert table["speed_up"].to_dict() == pytest.approx((seconds["diffusion-dpo-4"] / seconds).to_dict())
    record = read_record(finished[0] / "compare_quality/dipo-3/00002.png")
    assert table.at["dipo-3", "seconds_sampling"] == record["seconds_sampling"] and table.at["dipo-3", "batch_size"] == 6

    scores = pd.read_csv(finished[0] / "Semantic_Categories/scores.csv")
    table = pd.read_csv(finished[0] / "Semantic_Categories/categories.csv").set_index(["category", "score"])
    assert [*dict.fromkeys(table.index.get_level_values(0))] == ["abstract", "landscape", "portrait", "all"]
    by_side = scores[scores["category"] == "landscape"].pivot(index="seed", columns="variant", values="pickscore")
    row = table.loc[("landscape", "PickScore")]
    assert row["wins"] == (by_side["dipo-3"] > by_side["diffusion-dpo-5"]).sum() and row["n"] == 2
    by_side = scores.pivot(index="seed", columns="variant", values="pickscore")
    gap, row = by_side["dipo-3"] - by_side["diffusion-dpo-5"], table.loc[("all", "PickScore")]
    assert row["difference"] == pytest.approx(gap.mean()) and abs(gap.mean()) > 0.01
    assert row["wins"] == (gap > 0).sum() and row["losses"] == (gap < 0).sum() and row["n"] == 6

    scores = pd.read_csv(finished[0] / "Human_Preference_compare/scores.csv")
    assert scores.groupby("variant")["pickscore"].mean().nunique() == 4
    record = read_record(finished[0] / "Human_Preference_compare/base-dipo-3/00000.png")
    assert record["dpo_unet"] == "" and record["eta"] == 0
    record = read_record(finished[0] / "Human_Preference_compare/tuned-diffusion-dpo-5/00000.png")
    assert record["dpo_unet"] == DEMO_PATHS["dpo_unet"] and record["eta"] == 1


def test_images_are_those_of_hasty_sample(finished, run, tmp_path):
    """The same loop in every script: one prompt under one seed gives one picture."""
    (tmp_path / "p.txt").write_text("\n".join(pd.read_csv(finished[0] / "Semantic_Categories/scores.csv")["prompt"][:6]))
    code, _, err = run("hasty_sample", "--demo", "--prompts", "p.txt", "--num-inference-steps", 3, "--output-dir", "out")
    assert code == 0, err
    for i in range(6):
        mine = pixels(f"out/{i:05d}.png")
        for theirs in ("Semantic_Categories/dipo-3", "Human_Preference_compare/tuned-dipo-3", "compare_quality/dipo-3"):
            assert np.abs(mine - np.asarray(Image.open(finished[0] / theirs / f"{i:05d}.png"))).max() <= 2
        other = np.asarray(Image.open(finished[0] / f"Human_Preference_compare/base-dipo-3/{i:05d}.png"))
        assert np.abs(mine - other).max() > 2


# ---------------------------------------------------------------------------------------------------------- going on


@pytest.fixture
def copy(finished, tmp_path):
    """copy(script): a copy of a finished run's folder, and the flags that made it."""

    def make(script):
        shutil.copytree(finished[0] / script, tmp_path / script)
        return tmp_path / script, (*TINY[script], "--demo", "--limit", 2, "--output-dir", script)

    return make


@pytest.mark.parametrize("script", TINY)
def test_a_finished_study_loads_nothing_and_keeps_its_tables(copy, run, monkeypatch, script):
    folder, flags = copy(script)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*.*") if p.suffix in (".csv", ".png")}
    module = module_of(script)
    monkeypatch.setattr(module, "load_pipeline", None)
    monkeypatch.setattr(Scores, "load_judges", lambda *_: 1 / 0)
    code, out, err = run(script, *flags)
    assert code == 0 and out.startswith(f"{len(FOLDERS[script]) * 6} of {len(FOLDERS[script]) * 6} images"), err
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*.*") if p.suffix in (".csv", ".png")}
    assert before.keys() == after.keys()
    for path, (content, stamp) in before.items():
        assert content == after[path][0], path
        assert (path.parent == folder and path.name != "scores.csv") or stamp == after[path][1], path


def test_more_etas_and_prompts_add_what_is_missing_only(copy, run):
    folder, flags = copy("Ablation_experiment")
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/*.png")}
    rows = pd.read_csv(folder / "scores.csv").set_index("file")
    flags = [*flags[:2], "--etas", 0, 0.25, 1, *flags[6:]]
    flags[flags.index("--limit") + 1] = 3
    code, out, err = run("Ablation_experiment", *flags)
    assert code == 0 and out.startswith("18 of 36 images"), err
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    table, scores = pd.read_csv(folder / "eta.csv"), pd.read_csv(folder / "scores.csv").set_index("file")
    assert table["eta"].tolist() == [0, 0.25, 1] and set(table["n"]) == {9}
    # Rows of before are still there, those of eta = 0.5 too, which this run did not ask for.
    assert len(scores) == 4 * 9 + 6 and scores.loc[rows.index].equals(rows)


def test_a_run_stopped_while_scoring_goes_on(copy, run, monkeypatch):
    folder, flags = copy("Semantic_Categories")
    whole = (folder / "scores.csv").read_bytes()
    (folder / "scores.csv").unlink()
    call, calls = HPSv2.__call__, []

    def interrupted(self, images, prompts):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, images, prompts)

    monkeypatch.setattr(HPSv2, "__call__", interrupted)
    flags = (*flags, "--scoring-batch-size", 4)
    code, _, err = run("Semantic_Categories", *flags)
    assert code == 130 and "the same command goes on" in err and "Traceback" not in err
    assert len(pd.read_csv(folder / "scores.csv")) == 8
    code, _, err = run("Semantic_Categories", *flags)
    assert code == 0 and calls == [4, 4, 4, 4], err
    again = pd.read_csv(folder / "scores.csv")
    assert again.drop(columns=["pickscore", "hpsv2"]).equals(
        pd.read_csv(io.BytesIO(whole)).drop(columns=["pickscore", "hpsv2"])
    )
    assert np.abs(again["hpsv2"] - pd.read_csv(io.BytesIO(whole))["hpsv2"]).max() < 1e-5


def test_two_processes_make_one_set_of_tables(finished, tmp_path):
    """Without a GPU they are a CPU run without being told so."""
    flags = ("--demo", "--output-dir", "out", *TINY["Ablation_experiment"], "--limit", 2, "--scoring-batch-size", 3)
    done = start_two("Ablation_experiment", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fluctuation.csv") == 1
    whole, shared = (pd.read_csv(f / "scores.csv") for f in (finished[0] / "Ablation_experiment", tmp_path / "out"))
    assert shared["file"].tolist() == whole["file"].tolist()
    assert np.abs(shared["pickscore"] - whole["pickscore"]).max() < 0.05
    assert {read_record(p)["batch_size"] for p in (tmp_path / "out/eta-0").glob("*.png")} == {3}
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file()) == FILES["Ablation_experiment"]


def test_other_settings_are_an_error_until_overwritten_and_then_scored_anew(copy, run):
    folder, flags = copy("Semantic_Categories")
    old = pd.read_csv(folder / "scores.csv").set_index("file")
    code, _, err = run("Semantic_Categories", *flags, "--guidance-scale", 3)
    assert code == 2 and "guidance_scale 5.0, this run has 3.0" in err and "--overwrite" in err
    code, _, err = run("Semantic_Categories", *flags, "--guidance-scale", 3, "--overwrite")
    assert code == 0, err
    new = pd.read_csv(folder / "scores.csv").set_index("file")
    assert (
        new.index.equals(old.index) and (new["image"] != old["image"]).all() and (new["pickscore"] != old["pickscore"]).all()
    )


def test_other_judges_score_anew(copy, run, finished):
    folder, flags = copy("Ablation_experiment")
    shutil.copytree(ROOT / "assets/demo/pickscore", "judge")
    code, _, err = run("Ablation_experiment", *flags, "--pickscore", "judge", "--score-only")
    assert code == 0, err
    old, new = (pd.read_csv(f / "scores.csv") for f in (finished[0] / "Ablation_experiment", folder))
    assert (new["scored_by"] != old["scored_by"]).all() and np.abs(new["pickscore"] - old["pickscore"]).max() < 1e-4


def test_score_only_scores_what_is_there(copy, run, monkeypatch):
    folder, flags = copy("Ablation_experiment")
    monkeypatch.setattr(module_of("Ablation_experiment"), "load_pipeline", None)
    (folder / "scores.csv").unlink()
    for name in ("eta-0/00004.png", "eta-1/00004.png", "eta-0.5/00001.png"):
        (folder / name).unlink()
    code, out, err = run("Ablation_experiment", *flags, "--score-only")
    assert (
        code == 0 and "21 of 24 images" in out and "the tables are of the 4 images that each of these has: η = 0; η" in out
    ), err
    # Pairs only: images that one side lacks are scored, and left out of the tables.
    scores = pd.read_csv(folder / "scores.csv")
    assert len(scores) == 21 and pd.read_csv(folder / "fluctuation.csv")["n"].tolist() == [4, 4]
    table = pd.read_csv(folder / "eta.csv")
    common = scores[~scores["seed"].isin([1, 4])].groupby("variant")["hpsv2"].mean()
    common = common.drop("redraw-1").tolist()
    assert table["n"].tolist() == [4, 4, 4] and table["hpsv2"].tolist() == pytest.approx(common)
    shutil.rmtree(folder / "eta-0.5")
    code, out, err = run("Ablation_experiment", *flags, "--score-only")
    assert code == 0 and pd.read_csv(folder / "eta.csv")["eta"].tolist() == [0, 1], err
    for name in ("00000", "00002", "00003", "00005"):
        (folder / f"eta-1/{name}.png").unlink()
    code, _, err = run("Ablation_experiment", *flags, "--score-only")
    assert code == 0 and pd.read_csv(folder / "eta.csv")["n"].tolist() == [1, 1], err
    (folder / "eta-1/00001.png").unlink()
    code, out, err = run("Ablation_experiment", *flags, "--score-only")
    assert code == 0 and pd.read_csv(folder / "eta.csv")["eta"].tolist() == [0], err
    code, _, err = run("Ablation_experiment", *flags[:-1], "nothing", "--score-only")
    assert code == 2 and "no images of this study in nothing" in err


def test_a_missing_side_is_said(copy, run):
    folder, flags = copy("Human_Preference_compare")
    shutil.rmtree(folder / "base-dipo-3")
    code, _, err = run("Human_Preference_compare", *flags, "--score-only")
    assert code == 2 and "no images in Human_Preference_compare/base-dipo-3, which the tables need" in err
    folder, flags = copy("Semantic_Categories")
    for i in range(6):
        (folder / ("dipo-3" if i % 2 else "diffusion-dpo-5") / f"{i:05d}.png").unlink()
    code, _, err = run("Semantic_Categories", *flags, "--score-only")
    assert code == 2 and "no image is there on every side yet" in err


def test_images_are_scored_in_another_precision_than_they_were_made_in(copy, run):
    folder, flags = copy("Semantic_Categories")
    before = pd.read_csv(folder / "scores.csv")
    code, _, err = run("Semantic_Categories", *flags, "--score-only", "--dtype", "bf16")
    assert code == 0, err
    after = pd.read_csv(folder / "scores.csv")
    assert after["image"].equals(before["image"]) and (after["scored_by"] != before["scored_by"]).all()
    assert 0 < np.abs(after["pickscore"] - before["pickscore"]).max() < 0.5


def test_what_others_left_in_the_folder_stays(copy, run):
    folder, flags = copy("Semantic_Categories")
    (folder / "deep").mkdir()
    theirs = [folder / "grid-mine.png", folder / ".big.iso.part", folder / "deep/.x.png.part", folder / "dipo-3/notes.part"]
    ours = [folder / ".scores.csv.part", folder / "dipo-3/.00003.png.17.part", folder / ".quality.pdf.part"]
    for path in theirs + ours:
        path.touch()
    Image.new("RGB", (8, 8)).save(theirs[0])
    assert run("Semantic_Categories", *flags)[0] == 0
    assert all(p.exists() for p in theirs) and not any(p.exists() for p in ours)
    # A category less: its grid of before does not stay.
    code, _, err = run("Semantic_Categories", *flags, "--prompts", "one.txt", "--score-only")
    assert code == 2 and "one.txt: no such file" in err and (folder / "grid-portrait.png").exists()


def test_odd_categories_keep_their_own_rows(run, tmp_path):
    """Named "all", not named at all, with mathematics in it, or with one file name for two."""
    (tmp_path / "p.csv").write_text('prompt,category\na,all\nb,\nc,$x_$\nd,../x\ne,..-x\n"f, g", all \n')
    flags = ("--demo", *TINY["Semantic_Categories"], "--prompts", "p.csv", "--output-dir", "out")
    code, _, err = run("Semantic_Categories", *flags)
    assert code == 0, err
    table = pd.read_csv("out/categories.csv")
    table = table[table["score"] == "HPSv2"].set_index("category")["n"]
    assert table.to_dict() == {"all": 2, "(none)": 1, "$x_$": 1, "../x": 1, "..-x": 1, "all together": 6}
    grids = sorted(p.name for p in Path("out").glob("*.png"))
    assert grids == ["categories.png", "grid-all.png", "grid-none.png", "grid-x.png", "grid-x_.png", "grid-xx.png"]


def test_speed_ups_compare_like_with_like(copy, run):
    folder, flags = copy("compare_quality")
    Path("rows.yaml").write_text((ROOT / "tests/rows.yaml").read_text().replace("steps: 3", "steps: 4"))
    flags = [*flags[:-3], 2, *flags[-2:], "--batch-size", 3]
    flags[flags.index("--rows") + 1] = "rows.yaml"
    code, out, err = run("compare_quality", *flags)
    assert code == 0, err
    times = [line for line in out.partition("Time on")[2].partition("Wins over")[0].splitlines() if ", " in line]
    shown = {line.split("|")[1].strip(): bool(re.search(r"\d\.\d\dx", line)) for line in times if line.startswith("|")}
    rows = dict.fromkeys(("DIPO, 3 steps", "Diffusion-DPO, 4 steps", "Diffusion-DPO, 6 steps", "Euler, 4 steps"), True)
    assert {name: shown[name] for name in rows} == rows | {"Euler, 4 steps": False}
    table = pd.read_csv(folder / "table1.csv").set_index("variant")
    assert table["batch_size"].to_dict() == {"dipo-3": 6, "diffusion-dpo-4": 6, "diffusion-dpo-6": 6, "euler-4": 3}
    assert np.isnan(table.at["euler-4", "speed_up"]) and table["speed_up"].notna().sum() == 3


def test_the_papers_figures_stand_beside_what_they_are_about(finished):
    rows = cq.study_rows(cq.Settings(eta=0.5, timestep_spacing="leading"))
    assert rows[0].label == "DIPO, 20 steps, η = 0.5" and rows[4].label == "Diffusion-DPO, 500 steps" and len(rows) == 6
    # 3 steps against 4 are no row of the paper's.
    assert pd.read_csv(finished[0] / "compare_quality/table1.csv")["paper_speed_up"].isna().all()
    assert pd.read_csv(finished[0] / "Semantic_Categories/categories.csv")["paper"].isna().all()
    assert pd.read_csv(finished[0] / "Human_Preference_compare/preference.csv")["paper"].isna().all()
    assert "paper's, on other terms" in finished[1]["Ablation_experiment"]


PAPER = {  # docs/paper.md, which has it from the paper's code
    "compare_quality": ("parti", 5.0, 42, True),
    "Ablation_experiment": ("parti", 7.5, 0, False),
    "Semantic_Categories": ("assets/prompts", 7.5, 0, False),
    "Human_Preference_compare": ("parti", 7.5, 77, True),
}


@pytest.mark.parametrize("script", TINY)
def test_paper_sets_the_papers_terms_where_the_default_was_left(script):
    module = module_of(script)

    def settings(**given):
        s = module.Settings(paper=True, **given)
        return completed(s, module.DEMO, module.PAPER_TERMS)

    s = settings()
    assert (s.prompts, s.guidance_scale, s.seed, s.one_seed) == PAPER[script]
    assert s.output_dir == f"generated_images/paper/{script}" and papers(s, module.PAPER_TERMS) == "paper's"
    if script == "compare_quality":
        assert (s.steps, s.baseline_steps) == ((20, 30, 50), (500, 300, 800))
    if script == "Ablation_experiment":
        assert (s.num_inference_steps, s.etas, s.redraws) == (30, (0, 0.2, 0.5, 0.7, 1), 4)
    mine = settings(guidance_scale=3.0)
    assert mine.guidance_scale == 3 and papers(mine, module.PAPER_TERMS) == "paper's, on other terms"
    demo = settings(demo=True)
    assert (demo.prompts, demo.guidance_scale) == ("assets/demo/prompts", PAPER[script][1])
    assert papers(demo, module.PAPER_TERMS) == "paper's, on other terms"
    assert not completed(module.Settings(), module.DEMO, module.PAPER_TERMS).one_seed


def test_one_seed_draws_every_prompt_from_the_same_noise(run):
    flags = (*TINY["Semantic_Categories"], "--demo", "--limit", 1, "--one-seed", "--seed", 5, "--images-per-prompt", 2)
    code, _, err = run("Semantic_Categories", *flags, "--output-dir", "out")
    assert code == 0, err
    scores = pd.read_csv("out/scores.csv")
    assert scores["seed"].tolist() == [5, 6] * 6 and scores["prompt"].nunique() == 3
    assert pd.read_csv("out/categories.csv")["n"].tolist() == [2, 2, 2, 2, 2, 2, 6, 6]


# ------------------------------------------------------------------------------------------- the same work once, and rows


def no_links(*_):
    raise OSError("no links on this disk")


def test_images_that_a_study_beside_has_are_taken(finished, run, tmp_path, monkeypatch):
    """The tuned UNet's images of Table 1 are those of the other studies: hard links where the disk has them, else copies."""
    shutil.copytree(finished[0] / "compare_quality", tmp_path / "studies/table1")
    flags = ("--demo", "--limit", 2, *TINY["Semantic_Categories"][:2], "--baseline-steps", 4)
    code, out, err = run("Semantic_Categories", *flags, "--output-dir", "studies/kinds")
    assert code == 0 and out.startswith("12 of 12 images are in studies/kinds, 12 of them taken from studies beside it"), err
    ours, theirs = Path("studies/kinds/dipo-3/00004.png"), Path("studies/table1/dipo-3/00004.png")
    assert ours.samefile(theirs)
    wins = pd.read_csv("studies/table1/wins.csv").set_index(["sampler", "score"]).loc[("DIPO, 3 steps", "HPSv2")]
    mine = pd.read_csv("studies/kinds/categories.csv").set_index(["category", "score"]).loc[("all", "HPSv2")]
    assert (mine["wins"], mine["difference"]) == (wins["wins"], pytest.approx(wins["difference"]))

    # Folders without scores are not read: they may be anything.
    shutil.copytree("studies/table1", "data/table1", ignore=shutil.ignore_patterns("scores.csv"))
    code, out, err = run("Semantic_Categories", *flags, "--output-dir", "data/kinds")
    assert code == 0 and out.startswith("0 of 12 images are in data/kinds\n"), err

    # What differs in one setting is not taken; nor is anything by the study whose tables are of times.
    code, out, err = run("Semantic_Categories", *flags, "--guidance-scale", 3, "--output-dir", "studies/other")
    assert code == 0 and out.startswith("0 of 12 images are in studies/other\n"), err
    shutil.copytree("studies/table1", "studies/again", ignore=shutil.ignore_patterns("dipo-3"))
    code, out, err = run(
        "compare_quality", *TINY["compare_quality"], "--demo", "--limit", 2, "--output-dir", "studies/again"
    )
    assert code == 0 and out.startswith("18 of 24 images are in studies/again\n"), err
    assert not Path("studies/again/dipo-3/00000.png").samefile(theirs)

    # Replacing ours leaves theirs alone.
    before = theirs.read_bytes()
    flags = (*flags, "--guidance-scale", 3, "--overwrite", "--output-dir", "studies/kinds")
    monkeypatch.setattr(os, "link", no_links)
    code, out, err = run("Semantic_Categories", *flags)
    assert code == 0 and "12 of them taken" in out and read_record(ours)["guidance_scale"] == 3, err
    assert theirs.read_bytes() == before and not ours.samefile("studies/other/dipo-3/00004.png")


def test_a_row_has_its_own_models_guidance_and_timesteps(run, tiny):
    Path("rows.yaml").write_text(
        f"- {{label: Base, dpo_unet: '', steps: 2, guidance_scale: 1}}\n- {{label: Guided, dpo_unet: '', steps: 2}}\n"
        f"- {{label: Mine, dpo_unet: {tiny / 'unet'}, timesteps: [900, 500, 10], steps: [], eta: 0.5}}\n"
    )
    flags = ("--steps", 2, "--baseline-steps", 3, "--demo", "--limit", 1, "--rows", "rows.yaml", "--output-dir", "out")
    code, _, err = run("compare_quality", *flags)
    assert code == 0, err
    base, mine, ours = (read_record(f"out/{name}/00000.png") for name in ("base-2", "mine-3", "dipo-2"))
    assert (base["dpo_unet"], base["guidance_scale"], base["num_inference_steps"]) == ("", 1, 2)
    assert (mine["dpo_unet"], mine["timesteps"], mine["eta"]) == (str(tiny / "unet"), [900, 500, 10], 0.5)
    assert len({r["weights"] for r in (base, mine, ours)}) == 3
    table = pd.read_csv("out/table1.csv").set_index("variant")
    assert table["unet_calls"].to_dict() == {"dipo-2": 4, "diffusion-dpo-3": 6, "base-2": 2, "guided-2": 4, "mine-3": 6}
    # Unguided in truth, not in the record alone.
    assert table["hpsv2"].nunique() == 5 and abs(table.at["base-2", "hpsv2"] - table.at["guided-2", "hpsv2"]) > 0.01
    code, out, err = run("compare_quality", *flags)
    assert code == 0 and out.startswith("15 of 15 images"), err


def test_rows_of_distilled_models_are_what_their_authors_say():
    rows = {row.variant: row for row in study_rows("rows/distilled.yaml")}
    assert len(rows) == 10 and all(row.dpo_unet is None and len(row.dpo_lora) == 1 for row in rows.values())
    assert rows["dmd2-4-step-4"].timesteps == (999, 749, 499, 249) and rows["tcd-4"].eta == 0.3
    assert rows["sdxl-lightning-4-step-4"].timestep_spacing == "trailing" and rows["lcm-lora-8"].guidance_scale == 0
    # They go onto the UNet of the study, besides its own LoRAs.
    row = study_rows("rows/distilled.yaml", dpo_lora=("a/b",))[0]
    assert row.dpo_lora == ("a/b", "ByteDance/Hyper-SD/Hyper-SDXL-8steps-CFG-lora.safetensors")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("label: x", "not a list of rows with labels"),
        ("- {steps: 3}", "not a list of rows with labels ('label'); rows/training_free.yaml shows the form"),
        ("- {label: x, step: 3}", "x: step: 3 cannot be; a row has label, scheduler"),
        ("- {label: x, steps: '3'}", "x: steps: '3' cannot be"),
        ("- {label: x, steps: [a]}", "x: --steps a: use 1 to 1000"),
        ("- {label: x}", "x: give either steps or timesteps"),
        ("- {label: x, steps: []}", "x: give either steps or timesteps"),
        ("- {label: x, timesteps: [1, 2]}", "x: --timesteps 1 2: give numbers from 999 down to 0"),
        ("- {label: x, steps: 2, eta: 3}", "x: --eta 3: use 0"),
        ("- {label: x, steps: 2, scheduler: UNet2DModel}", "x: scheduler UNet2DModel: diffusers has no such class"),
        ("- {label: x, steps: 2, scheduler: UniPCMultistepScheduler, options: {karras: 1}}", "has no karras"),
        ("- {label: x, timesteps: [9, 2], scheduler: UniPCMultistepScheduler}", "does not support custom timestep"),
        ("- {label: x, steps: 500, scheduler: UniPCMultistepScheduler}", "500 leading steps would start at t = 501"),
        ("- {label: x, steps: 2, dpo_lora: [nothing]}", "x: --dpo-lora 'nothing': no such file"),
        ("- {label: dipo, steps: 20}", "'dipo, 20 steps' is there twice"),
        ("- {label: x, steps: 2, timestep_spacing: even}", "x: timestep_spacing: even: use one of leading, trailing"),
        ("- {label: x, steps: 60, timestep_spacing: ays}", "x: timestep_spacing: ays is for 50 steps at most of ddim"),
        ("- {label: x, steps: 2, timestep_spacing: ays, scheduler: EulerDiscreteScheduler}", "ays is for 50 steps"),
        ("- {label: x, steps: 2, eta: 0.5, scheduler: EulerDiscreteScheduler}", "eta 0.5: EulerDiscreteScheduler has none"),
    ],
)
def test_wrong_rows_end_with_one_line(run, rows, said):
    Path("rows.yaml").write_text(rows)
    code, _, err = run("compare_quality", "--demo", "--rows", "rows.yaml", "--output-dir", "out")
    assert code == 2 and err.startswith("error: --rows") and said in err and err.count("\n") == 1, err
    assert not Path("out").exists()


@pytest.mark.parametrize("script", TINY)
def test_a_judge_that_the_demo_lacks_is_said(run, script):
    """Before anything is loaded. None of them runs without a judge."""
    for name, needs in (
        ("clipscore", "--clip"),
        ("imagereward", "--imagereward and --imagereward-tokenizer"),
        ("aesthetic", "--aesthetic and --aesthetic-clip"),
    ):
        code, _, err = run(script, "--demo", "--judges", "hpsv2", name)
        assert (
            code == 2 and err.count("\n") == 1 and f"({name}) needs {needs}: a folder or a hub name; --demo has none" in err
        )
    code, _, err = run(script, "--demo", "--judges", "hpsv2", "hpsv2")
    assert code == 2 and err == "error: --judges hpsv2 hpsv2: give one or more, and none twice\n"


def test_what_is_asked_of_a_demo_is_not_replaced(run):
    """Also where it is what the script does without --demo."""
    names = ("pickscore", "hpsv2", "clipscore", "clipscore_paper")
    code, _, err = run("compare_quality", "--demo", "--score-only", "--output-dir", "none", "--judges", *names)
    assert code == 2 and "CLIPScore, 2.5 cos (clipscore) needs --clip" in err


def test_every_judge_gets_its_columns(copy, run, random_judges):
    """And the tables are theirs, in the order of --judges."""
    folder, flags = copy("compare_quality")
    names = ("imagereward", "hpsv2", "aesthetic")
    paths = [x for n in ("imagereward", "aesthetic") for x in (f"--{n}", random_judges / n)]
    paths += ["--imagereward-tokenizer", random_judges / "bert", "--aesthetic-clip", random_judges / "pickscore"]
    code, out, err = run("compare_quality", *flags, "--judges", *names, *paths, "--score-only")
    assert code == 0 and all(f"| {label} " in out for label in ("ImageReward", "HPSv2", "aesthetic score")), err
    scores = pd.read_csv(folder / "scores.csv")
    columns = ["imagereward", "imagereward_logit", "hpsv2", "hpsv2_logit", "aesthetic"]
    assert scores[columns].notna().all(axis=None)
    np.testing.assert_allclose(scores["imagereward_logit"], scores["imagereward"] * 1.0333394966054072, rtol=1e-5)
    scale = torch.load(ROOT / "assets/demo/hpsv2/HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]["logit_scale"]
    np.testing.assert_allclose(scores["hpsv2_logit"], scores["hpsv2"] * scale.float().exp().item(), rtol=1e-5)
    wins = pd.read_csv(folder / "wins.csv")
    assert list(dict.fromkeys(wins["score"])) == ["ImageReward", "HPSv2", "aesthetic score"]
    before = (folder / "scores.csv").stat().st_mtime_ns
    assert run("compare_quality", *flags, "--judges", *names, *paths, "--score-only")[0] == 0
    assert (folder / "scores.csv").stat().st_mtime_ns == before


def test_clipscore_gets_its_columns(copy, run):
    """Both of its scales, each named."""
    folder, flags = copy("compare_quality")
    judges = ("--judges", "pickscore", "hpsv2", "clipscore", "clipscore_paper", "--clip", "assets/demo/pickscore")
    code, out, err = run("compare_quality", *flags, *judges, "--score-only")
    assert code == 0 and "| CLIPScore, 2.5 cos " in out and "| CLIPScore, (cos + 1) / 2 " in out, err
    scores, table = pd.read_csv(folder / "scores.csv"), pd.read_csv(folder / "table1.csv").set_index("variant")
    assert scores["clipscore_paper"].between(0, 1).all() and scores["clipscore_paper"].nunique() > 6
    assert scores["clipscore"].between(0, 2.5).all() and scores["clipscore"].nunique() > 6
    mean = scores[scores["variant"] == "dipo-3"]["clipscore"].mean()
    assert table.at["dipo-3", "clipscore"] == pytest.approx(mean)
    shutil.rmtree(folder / "diffusion-dpo-4")
    code, _, err = run("compare_quality", *flags, "--score-only")
    assert code == 2 and "no images in compare_quality/diffusion-dpo-4, which the tables need" in err
    shutil.copytree(folder / "diffusion-dpo-6", "only/diffusion-dpo-6")
    only = (*flags[:2], "--baseline-steps", 6, *flags[5:-1], "only", "--score-only")
    code, _, err = run("compare_quality", *only)
    assert code == 2 and "no images of DIPO in only; make them first" in err, err


@pytest.mark.parametrize("script", SAMPLERS)
@pytest.mark.parametrize(("device", "chosen"), [("auto", []), ("cuda", []), ("cuda:1", [torch.device("cuda:1")])])
def test_only_a_numbered_gpu_is_chosen(script, device, chosen, monkeypatch, run):
    """One process alone has the device "cuda", without a number, which torch.cuda.set_device refuses."""
    seen = []

    def far_enough(*_, **__):
        raise cli.UserError("far enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(devices, "PartialState", lambda **_: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(devices, "dtype_for", far_enough)
    for module in (module_of(script), study):
        monkeypatch.setattr(module, "dtype_for", far_enough, raising=False)
    code, _, err = run(script, "--demo", "--device", device, "--output-dir", "out")
    assert code == 2 and "far enough" in err and seen == chosen


@pytest.mark.parametrize("device", ["cuda:1", "auto"])
def test_folders_are_scored_on_the_chosen_gpu(device, monkeypatch, copy, run):
    folder, _ = copy("Semantic_Categories")
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(Scores, "complete", lambda self, records, state, device, size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("compare_quality", "--demo", "--folders", folder / "dipo-3", "--device", device)
    assert seen == ([torch.device("cuda:1")] if device == "cuda:1" else [])


@pytest.mark.gpu
@pytest.mark.parametrize("script", TINY)
def test_a_tiny_demo_on_a_gpu(run, finished, script):
    """Half precision, models moved to the GPU in turn; the scores are near the CPU's in float32."""
    code, _, err = run(script, *TINY[script], "--demo", "--limit", 2, "--device", "cuda", "--output-dir", "out")
    assert code == 0, err
    record = read_record(Path("out") / FOLDERS[script][0] / "00000.png")
    assert record["dtype"] == "fp16" and record["device"] != "cpu" and record["seconds_sampling"] > 0
    ours, theirs = pd.read_csv("out/scores.csv"), pd.read_csv(finished[0] / script / "scores.csv")
    assert ours["file"].equals(theirs["file"]) and np.corrcoef(ours["pickscore"], theirs["pickscore"])[0, 1] > 0.95


@pytest.mark.parametrize("script", TINY)
def test_a_missing_judge_costs_no_images(copy, run, script):
    folder, flags = copy(script)
    (folder / "scores.csv").unlink()
    count = len(list(folder.glob("*/*.png")))
    for flag, value in (("--pickscore", "nobody/nothing"), ("--hpsv2", "nobody/nothing")):
        code, _, err = run(script, *flags, flag, value)
        assert (
            code == 2
            and f"{flag} {value}: " in err
            and "cannot be loaded" in err
            and "fetch it with download_models.py" in err
        )
        assert f"set {flag[2:]} at the top of the script" in " ".join(err.split())
        assert "what is made already is kept" in err and "Traceback" not in err
    assert len(list(folder.glob("*/*.png"))) == count


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("compare_quality", ("--steps", 0), "--steps 0: use 1 to 1000"),
        (
            "compare_quality",
            ("--baseline-steps", 500, 500),
            "--baseline-steps 500 500: give one or more, and none twice",
        ),
        ("compare_quality", ("--rows", "no.yaml"), "--rows no.yaml: no such file"),
        ("compare_quality", ("--margin", 0), "--margin 0.0: use a number above 0"),
        ("compare_quality", ("--folder-prompts", "p.txt"), "--folders: name the folders to score"),
        ("compare_quality", ("--folders", "nothing"), "--folders nothing: no such folder"),
        ("compare_quality", ("--folders",), "--folders: name the folders to score"),
        ("compare_quality", ("--score-only",), "no images of this study"),
        (
            "Ablation_experiment",
            ("--etas", 0, 2),
            "--etas 0.0 2.0: use 0 (DDIM",
        ),
        ("Ablation_experiment", ("--etas", 0.3, 0.30000000000000004), "and none twice"),
        ("Ablation_experiment", ("--redraws", -1), "--redraws -1: use 0 or more"),
        ("Ablation_experiment", ("--num-inference-steps", 0), "--num-inference-steps 0: use 1 to 1000"),
        ("Semantic_Categories", ("--eta", -1), "--eta -1.0: use 0"),
        ("Semantic_Categories", ("--categories", "dogs"), "--categories 'dogs': not in --prompts assets/demo/prompts; its"),
        ("Semantic_Categories", ("--prompts", "nothing.txt"), "--prompts nothing.txt: no such file or folder"),
        ("Semantic_Categories", ("--prompts", "empty.txt"), "holds no prompt"),
        (
            "Semantic_Categories",
            ("--prompts", "bad.csv"),
            "captions or text; its columns are words",
        ),
        (
            "Semantic_Categories",
            ("--prompts", "comma.csv"),
            "a row has more cells than the header; put quotes around prompts",
        ),
        ("Semantic_Categories", ("--prompts", "pickapic", "--pickapic", "nobody/no"), "--prompts pickapic: cannot be read"),
        ("Semantic_Categories", ("--prompts", "hpdv2"), "--prompts hpdv2: cannot be read: the hub is out of reach"),
        ("Semantic_Categories", ("--output-dir", ""), "--output-dir is empty"),
        ("Semantic_Categories", ("--output-dir", "~nosuch/x"), "--output-dir ~nosuch/x: cannot be written to"),
        ("Semantic_Categories", ("--output-dir", "taken"), "taken/dipo-30 cannot be made a folder"),
        (
            "Semantic_Categories",
            ("--prompts", "parti", "--parti", "nobody/no"),
            "parti: cannot be read: the hub is out of",
        ),
        ("Semantic_Categories", ("--grid-prompts", 0), "--grid-prompts 0: use 1 or more"),
        ("Human_Preference_compare", ("--dpo-unet", ""), "--dpo-unet is empty: give the tuned UNet"),
        ("Human_Preference_compare", ("--limit", 0), "--limit 0: use 1 or more"),
        ("Human_Preference_compare", ("--hpsv2-version", "v3"), "--hpsv2-version"),
        ("Human_Preference_compare", ("--scoring-batch-size", 0), "--scoring-batch-size 0: use 1 or more"),
        ("Human_Preference_compare", ("--dtype", "int8"), "--dtype"),
        ("Human_Preference_compare", ("--base-model", "nowhere"), "--base-model 'nowhere': no such folder"),
        ("Human_Preference_compare", ("--output-dir", "bad.csv"), "--output-dir bad.csv: cannot be written to"),
        ("Human_Preference_compare", ("--no-such-flag",), "no-such-flag"),
    ],
)
def test_bad_input_ends_with_one_line(run, tmp_path, script, flags, said):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.csv").write_text("words\nhello\n")
    (tmp_path / "comma.csv").write_text("prompt,category\na cat, sitting,animals\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/dipo-30").touch()
    code, _, err = run(script, "--demo", *flags)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err, err


def test_a_second_run_in_the_same_folder_is_told(run):
    Path("out").mkdir()
    with FileLock("out/.lock"):
        code, _, err = run("Ablation_experiment", "--demo", "--limit", 1, "--output-dir", "out")
    assert code == 2 and "--output-dir out: another run is writing there" in err


def test_both_processes_are_told_of_a_second_run(tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        done = launch_two("Ablation_experiment", "--demo", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("error: --output-dir out: another run is writing there") == 1
    assert 'Ablation_experiment.py", line' not in done.stderr and not list((tmp_path / "out").glob("*/*.png"))


# ---------------------------------------------------------------------------------------------------------- statistics


def test_fluctuation_on_known_cases():
    rng = np.random.default_rng(1)
    index = pd.MultiIndex.from_arrays([[f"p{i}" for i in range(60)], range(60)], names=["prompt", "seed"])
    base = rng.normal(20, 2, 60)

    def columns(effect, noise, together=np.array):
        moves = together(rng.normal(size=(11, 60)))
        return [pd.Series(base + effect * k + noise * moves[k], index) for k in range(11)]

    def fluctuation(columns):
        return ablation.fluctuation(pd.concat(dict(enumerate(columns)), axis=1))

    same = fluctuation([pd.Series(base, index)] * 11)
    assert same["fluctuation"] == 0 and same["p"] == 1
    strong = fluctuation(columns(0.1, 0.05))
    assert strong["fluctuation"] == pytest.approx(100 * 1.0 / (base.mean() + 0.5), rel=0.05) and strong["p"] < 0.001
    # Noise alone: as much as chance gives, and small p values about as often as they say; also where neighbouring etas go
    # together, as pictures do.
    for together in (np.array, functools.partial(np.cumsum, axis=0)):
        alone = [fluctuation(columns(0, 0.1, together)) for _ in range(40)]
        assert np.mean([r["fluctuation"] / r["chance"] for r in alone]) == pytest.approx(1, abs=0.15)
        assert sum(r["p"] < 0.05 for r in alone) <= 6
        if together is np.array:
            # The range of 11 normal means, sd sigma / sqrt(n): 3.173 sd (Tippett 1925).
            expected = 100 * 3.173 * 0.1 / 60**0.5 / base.mean()
            assert np.mean([r["chance"] for r in alone]) == pytest.approx(expected, rel=0.05)
    # Two images of a prompt count as one; one prompt alone says nothing of chance.
    one = pd.MultiIndex.from_arrays([["p", "p"], [0, 1]], names=["prompt", "seed"])
    r = fluctuation([pd.Series([1.0, 3.0], one), pd.Series([2.0, 4.0], one)])
    assert r["n"] == 1 and r["fluctuation"] == pytest.approx(40) and np.isnan(r["p"])
    assert fluctuation([pd.Series([1.0], one[:1]), pd.Series([2.0], one[1:])])["n"] == 0


def test_the_scatter_of_redraws_on_a_known_case():
    """A standard deviation of 0.5 between an image's draws, at a mean of 20: over five means of 1,632 images the range is
    2.326 (Tippett 1925) times 0.5 / sqrt(1632) on average, 0.144 % of the mean; how the images differ does not matter."""
    rng = np.random.default_rng(0)
    draws = 20 + 3 * rng.normal(size=(4000, 1)) + 0.5 * rng.normal(size=(4000, 5))
    r = ablation.redraw_scatter(pd.DataFrame(draws))
    assert r["redrawn_as_paper"] == pytest.approx(100 * 2.326 * 0.5 / 1632**0.5 / 20, rel=0.03)
    assert r["redrawn"] == pytest.approx(100 * np.ptp(draws.mean(axis=0)) / draws.mean())
    assert np.isnan(ablation.redraw_scatter(pd.DataFrame(draws[:, :1]))["redrawn_as_paper"])


def test_kept_advantage_is_the_difference_of_gains():
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_arrays([[f"p{i}" for i in range(30)], range(30)], names=["prompt", "seed"])
    scores = pd.DataFrame(rng.normal(size=(30, 4)), index, columns=list("abcd"))
    n, mean, low, high = human.kept_advantage(scores, *"abcd")
    each = (scores["a"] - scores["b"]) - (scores["c"] - scores["d"])
    assert n == 30 and mean == pytest.approx(each.mean()) and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * each.std() / 30**0.5, rel=0.15)


def test_seconds_are_those_of_full_batches():
    def batch(size, sampling, decoding, device="cpu"):
        return [{"batch_size": size, "seconds_sampling": sampling, "seconds_decoding": decoding, "device": device}] * size

    batches = batch(4, 2.0, 0.1) + batch(4, 4.0, 0.3) + batch(3, 100.0, 9.0) + batch(4, 50.0, 1.0, "other")
    r = cq.image_seconds(pd.DataFrame(batches))
    assert (r["device"], r["batch_size"], r["batches"]) == ("cpu", 4, 2)
    assert r["seconds_sampling"] == 3 and r["seconds_decoding"] == pytest.approx(0.2) and r["seconds"] == pytest.approx(3.2)
    assert r["seconds_low"] == 2 and r["seconds_high"] == 4


# ------------------------------------------------------------------------------------------------------------ pictures


def test_plots_draw_every_row_with_its_interval(finished):
    judges = [PickScore("", ""), HPSv2("", "v2.1")]
    table = pd.read_csv(finished[0] / "compare_quality/table1.csv")
    equal = pd.read_csv(finished[0] / "compare_quality/equivalence.csv")
    rows_file = (str(ROOT / "tests/rows.yaml"),)
    rows = cq.study_rows(cq.Settings(steps=(3,), baseline_steps=(4, 6), rows=rows_file, timestep_spacing="leading"))
    quality = cq.plot_quality(table, equal, rows, judges, rows[1])
    means = pd.read_csv(finished[0] / "Ablation_experiment/eta.csv")
    moved = pd.read_csv(finished[0] / "Ablation_experiment/fluctuation.csv")
    eta = ablation.plot_eta(ablation.Settings(), means, moved, judges)
    for figure, panels, count, n in ((quality, 4, 3, 4), (eta, 2, 1, 3)):
        assert len(figure.axes) == panels
        for axes in figure.axes:
            points = sum(len(c.lines[0].get_xdata()) for c in axes.containers)
            assert points == n and all(c.has_yerr for c in axes.containers)
            assert axes.get_title() and len(axes.containers) == count
