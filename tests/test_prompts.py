"""One reader for every source of prompts."""

import pandas as pd
import pytest
import world
from conftest import ROOT

import Ablation_experiment
from dipo.prompts import by_category, read_prompts


def prompts(categories=(), limit=None, **settings):
    """Pairs of prompt and category as a study takes them."""
    s = Ablation_experiment.Settings(**settings)
    table = by_category(read_prompts(s.prompts, s.parti, s.pickapic), categories, limit, s.prompts)
    return list(table.itertuples(index=False, name=None))


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet", "parti", "folder"])
def test_prompts_from_every_kind_of_file(kind, tmp_path):
    """In the file's own order, whatever its categories."""
    wanted = ["one, two", "Ünï 日本", 'say "hi"']
    path = tmp_path / f"prompts.{kind}"
    if kind == "txt":
        path.write_text("\ufeff" + "\n\n".join(wanted) + "\n  \n", encoding="utf-8")
    elif kind == "parti":
        (tmp_path / "parti").mkdir()
        pd.DataFrame({"Prompt": wanted, "Category": ["x", "x", "y"]}).to_parquet(tmp_path / "parti/train.parquet")
    elif kind == "folder":
        path.mkdir()
        (path / "a.txt").write_text("\n".join(wanted[:2]), encoding="utf-8")
        (path / "b.txt").write_text(wanted[2], encoding="utf-8")
    else:
        table = pd.DataFrame({"id": [1, 2, 3], "Prompt": wanted})
        table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    source = "parti" if kind == "parti" else str(path)
    assert read_prompts(source, parti=str(tmp_path / "parti"))["prompt"].tolist() == wanted


def test_categories_come_in_turn_and_a_larger_limit_only_adds(tmp_path):
    short, long = prompts(limit=2), prompts(limit=5)
    assert len(short) == 6 and long[:6] == short and len(long) == 15
    assert [c for _, c in short] == ["abstract", "landscape", "portrait"] * 2
    assert len(prompts()) == 300 and len({p for p, _ in prompts()}) == 300
    assert {c for _, c in prompts(("portrait",))} == {"portrait"}
    (tmp_path / "p.txt").write_text("one\n\n  two  \nthree\n", encoding="utf-8-sig")
    assert prompts(prompts=str(tmp_path / "p.txt"), limit=2) == [("one", ""), ("two", "")]
    (tmp_path / "p.csv").write_text('Prompt,Category\n"a, b",x\nc,x\nd,y\n')
    assert prompts(prompts=str(tmp_path / "p.csv")) == [("a, b", "x"), ("d", "y"), ("c", "x")]
    table = pd.DataFrame({"prompt": ["a", None, "c"], "category": pd.Categorical(["x", "x", None])})
    table.to_parquet(tmp_path / "p.parquet")
    assert prompts(prompts=str(tmp_path / "p.parquet")) == [("a", "x"), ("c", "")]


def test_prompts_of_the_known_sets(tmp_path, monkeypatch):
    parti = pd.DataFrame({"Prompt": ["a", "b", "c"], "Category": ["X", "Y", "X"], "Challenge": "-", "Note": ""})
    (tmp_path / "parti").mkdir()
    parti.to_csv(tmp_path / "parti/train.csv", index=False)
    assert prompts(prompts="parti", parti=str(tmp_path / "parti")) == [("a", "X"), ("b", "Y"), ("c", "X")]
    assert prompts(prompts="parti", parti=str(tmp_path / "parti"), categories=("X",), limit=1) == [("a", "X")]
    from_pairs = prompts(prompts="pickapic", pickapic=str(ROOT / "assets/demo/pickapic"))
    test = pd.read_parquet(ROOT / "assets/demo/pickapic/test.parquet", columns=["caption"])["caption"]
    assert [p for p, _ in from_pairs] == list(dict.fromkeys(test)) and len(from_pairs) == 100
    monkeypatch.setattr("hpsv2.benchmark_prompts", lambda style: {"anime": ["a", "b"], "photo": ["c"]})
    assert prompts(prompts="hpdv2") == [("a", "anime"), ("c", "photo"), ("b", "anime")]


def test_the_demos_prompts_are_held_out_captions():
    lines = {c: (ROOT / f"assets/demo/prompts/{c}.txt").read_text().splitlines() for c in world.SLOTS}
    scenes = world.sample_scenes("held_out", 117, 1)
    assert lines == {c: [world.caption(x) for x in scenes if x.category == c] for c in world.SLOTS}
