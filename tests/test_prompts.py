"""One reader for every source of prompts."""

import json

import pandas as pd
import pytest
import world
from conftest import ROOT

import Ablation_experiment
from dipo.cli import UserError
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


TABLES = {
    "a.tsv": ('\tPrompt\tCategory\n0\ta cat, "fat"\tx\n1\tdogs; two\ty\n', [('a cat, "fat"', "x"), ("dogs; two", "y")]),
    "semicolons.csv": ('Prompts ; Categories\na cat, sitting;x\n"a; b";y\n', [("a cat, sitting", "x"), ("a; b", "y")]),
    "header.csv": ("prompt;note, any, or none\na cat;x\n", [("a cat", "")]),
    "tabs.csv": ("text\tcategory\na, b; c\tx\n", [("a, b; c", "x")]),
    "one.csv": ('prompt\na cat, sitting\n"b, ""c"""\nd; e\n', [("a cat, sitting", ""), ('b, "c"', ""), ("d; e", "")]),
    "blanks.csv": ('id, Caption , category\n1, "a, b", x\n', [("a, b", "x")]),
    "two.csv": ("text,prompt\nno,yes\n", [("yes", "")]),
    "Twice.CSV": ("Prompt,prompt\nyes,no\n", [("yes", "")]),
    "texts.json": ('["a", " ", "b\\nc"]', [("a", ""), ("b c", "")]),
    "objects.json": (
        '[{"Caption": "a", "n": 1}, {"Caption": null}, {"category": "x", "Caption": "b"}]',
        [("a", ""), ("b", "x")],
    ),
    "styles.json": ('{"anime": ["a", "b"], "photo": [{"prompt": "c"}]}', [("a", "anime"), ("b", "anime"), ("c", "photo")]),
    "list.json": ('{"prompts": ["a", "b"], "version": 2}', [("a", ""), ("b", "")]),
    "columns.json": ('{"prompt": {"0": "a", "1": "b"}, "category": {"0": "x", "1": "y"}}', [("a", "x"), ("b", "y")]),
    "lines.jsonl": ('{"text": "a\u2028b", "id": 1}\n\n{"text": "c"}\n', [("a b", ""), ("c", "")]),
    "mixed.json": (
        '[{"prompt": "a"}, {"text": "b"}, {"prompt": null, "caption": "c", "category": "x"}, "d", null]',
        [("a", ""), ("b", ""), ("c", "x"), ("d", "")],
    ),
    "one.json": ('{"prompt": "a, b", "seed": 1}', [("a, b", "")]),
    "gap.json": ('[{"prompt": 1}, {"prompt": null}]', [("1", "")]),
    "images.json": ('{"Text": ["a", "b"], "id": [1, 2]}', [("a", ""), ("b", "")]),
    "lines.json": ('{"prompt": "a"}\n\n{"prompt": "b"}\n', [("a", ""), ("b", "")]),
    "pretty.jsonl": ('[\n {"prompt": "a"},\n {"prompt": "b"}\n]\n', [("a", ""), ("b", "")]),
    "texts.jsonl": ('"a"\n"b, c"\n', [("a", ""), ("b, c", "")]),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_and_json_of_others(name, encoding, tmp_path):
    text, wanted = TABLES[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert list(read_prompts(str(tmp_path / name)).itertuples(index=False, name=None)) == wanted


@pytest.mark.parametrize("kind", ["txt", "csv", "json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with its mark", "latin-1", "cp1252"])
def test_texts_in_every_encoding(encoding, kind, tmp_path, capsys):
    """cp1252 is latin-1 with quotation marks and such where latin-1 has control characters."""
    wanted = {"latin-1": ["un café", "grün, größer"], "cp1252": ["‘café’ – 5 €"]}.get(encoding, ["café", "日本 🎨"])
    lines = {"txt": wanted, "csv": ["prompt", *(f'"{x}"' for x in wanted)], "json": [json.dumps(wanted, ensure_ascii=False)]}
    data = "\r\n".join(lines[kind])
    data = ("\ufeff" + data).encode("utf-16-be") if "mark" in encoding else data.encode(encoding)
    (tmp_path / f"p.{kind}").write_bytes(data)
    assert list(read_prompts(str(tmp_path / f"p.{kind}"))["prompt"]) == wanted
    said = (
        f"warning: {tmp_path}/p.{kind} is not in UTF-8 and was read as cp1252; save it as UTF-8 if letters come out wrong\n"
    )
    assert capsys.readouterr().err == (said if encoding in ("latin-1", "cp1252") else "")


def test_a_quote_that_swallows_rows_is_told(tmp_path, capsys):
    """A prompt may go over lines; one whose quote was forgotten does too."""
    (tmp_path / "p.csv").write_text('id,prompt\n0,a\n1,"5 inch\n2,b\n3,c"\n')
    assert list(read_prompts(str(tmp_path / "p.csv"))["prompt"]) == ["a", "5 inch 2,b 3,c"]
    said = f"warning: {tmp_path}/p.csv: 1 of 2 rows go over several lines; look for a quote that is opened and not closed\n"
    assert capsys.readouterr().err == said


def test_a_folder_holds_files_of_every_kind(tmp_path):
    """As HPDv2's benchmark does: a list for each style."""
    (tmp_path / "anime.json").write_text('["a", "b"]')
    (tmp_path / "mixed.csv").write_text("prompt,category\nc,own\nd,\n")
    (tmp_path / "photo.txt").write_text("e\n")
    (tmp_path / "._photo.txt").write_bytes(b"\0\x05\x16\x07")
    (tmp_path / "notes.md").write_text("no prompt")
    (tmp_path / "folder.txt").mkdir()
    wanted = [("a", "anime"), ("b", "anime"), ("c", "own"), ("d", "mixed"), ("e", "photo")]
    assert list(read_prompts(str(tmp_path)).itertuples(index=False, name=None)) == wanted
    (tmp_path / "other.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match=r"cannot be read: other\.json: holds .*version.*; give a list"):
        read_prompts(str(tmp_path))


UNREADABLE = {
    "words.csv": ("texte;mots\na, b;c\n", "has no column prompt, prompts, .* its columns are texte, mots$"),
    "long.csv": ("a very long line, " * 99, r"its columns are a very long line,.* \.\.\.$"),
    "cells.csv": (
        "prompt;category\na; b;c\n",
        "a row has more cells than the header; put quotes around prompts with semicolons",
    ),
    "later.csv": ("prompt,category\na,b\na, b,c\n", "put quotes around prompts with commas"),
    "open.csv": ('prompt,n\n"a,1\nb,2\n', "a quote is opened and never closed"),
    "empty.csv": ("", "holds no prompt"),
    "numbers.json": ("[1, 2]", r"holds \[1, 2\]; give a list of prompts or of objects"),
    "words.json": ("null", "holds null; give"),
    "text.json": (
        '{"text": ["c"], "animals": ["a"], "people": ["b"]}',
        "text may be a column or a category, as animals is; call it prompt, or something else",
    ),
    "lengths.json": ('{"prompt": ["a", "b"], "category": ["x"]}', "same length"),
    "coco.json": (
        '{"images": [{"id": 1}], "annotations": [{"caption": "a"}]}',
        "images: an object has no prompt, .*, but id$",
    ),
    "row.json": ('[{"prompt": "a"}, {"x": 1, "y": 2}]', "an object has no prompt, prompts, .* or text, but x, y$"),
    "line.jsonl": ('{"text": "a"}\n\n{"text": "b"\n', "line 3: Expecting ',' delimiter at column 13$"),
    "blank.json": ("\n", "holds no prompt"),
    "object.json": ("{}", "holds no prompt"),
    "nested.json": ('{"a": {"b": 1}}', r'holds \{"a": \{"b": 1\}\}; give'),
    "wrapped.json": ('{"prompts": [{"text": "a"}, {"text": "b"}]}', "the column prompts holds more than one text in a row"),
    "lists.json": ('[{"captions": ["a", "b"]}]', "the column captions holds more than one text in a row"),
    "broken.json": ('["a", ', "cannot be read: Expecting value: line 1 column 7"),
    "none.json": ("[]", "holds no prompt"),
    "picture.txt": ("\x89PNG\r\n\x00", "no text in UTF-8, UTF-16 or cp1252"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_says_what_was_found(name, tmp_path):
    text, said = UNREADABLE[name]
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=said) as error:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 350


@pytest.mark.parametrize("source", ["parti", "pickapic", "hpdv2"])
def test_a_hub_out_of_reach_is_said_in_one_line(source):
    with pytest.raises(UserError) as error:
        read_prompts(source, "nobody/parti", "nobody/pairs", "folder-prompts")
    assert str(error.value) == (
        f"--folder-prompts {source}: cannot be read: the hub is out of reach, and its cache has no copy; go online, "
        "or give a file of prompts"
    )


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
    assert lines == {c: [world.caption(x, w) for w in (0, 1) for x in scenes if x.category == c] for c in world.SLOTS}
