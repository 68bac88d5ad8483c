"""Pairs by a judge instead of labels, and pairs of one's own: winners as a known formula says, and every way to stop."""

import itertools
import json
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import test_train_dipo
import torch
from accelerate import Accelerator
from conftest import ROOT
from helpers import fresh_accelerator, start_two
from PIL import Image
from test_schemas import png

import train_dipo as td
from dipo import annotate, cache
from dipo.cli import UserError
from dipo.judges import PickScore, judge_of
from dipo.pairs import stored
from dipo.pictures import open_picture
from dipo.settings import DEMO_PATHS

pairs_file, train = test_train_dipo.pairs_file, test_train_dipo.train


def red(picture, caption=""):
    """A judge that is known: the mean red of the whole picture, 0 to 255, and the length of its prompt."""
    return np.asarray(picture)[..., 0].mean().item() + len(caption)


@pytest.fixture
def judged(monkeypatch):
    """PickScore is red; the batches that it was given, as (red, caption) of each picture."""
    given = []

    def call(self, images, prompts):
        given.append([(red(x), p) for x, p in zip(images, prompts, strict=True)])
        return torch.tensor([red(x, p) for x, p in zip(images, prompts, strict=True)])

    monkeypatch.setattr(PickScore, "load", lambda self, dtype: setattr(self, "model", torch.nn.Identity()))
    monkeypatch.setattr(PickScore, "__call__", call)
    return given


def wide(left: int, middle: int) -> bytes:
    """A picture of 24 x 8 whose red is left in its outer thirds, which no training crop shows, and middle in between."""
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[..., 0] = left
    pixels[:, 8:16, 0] = middle
    image, out = Image.fromarray(pixels), test_train_dipo.io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def make_rows(n, seed=0):
    """Pick-a-Pic's columns: pictures of random reds, some equal, repeated or not to be read, with labels of any kind."""
    rng = np.random.default_rng(seed)
    reds = 10 * rng.integers(0, 25, (n, 2, 2))
    labels = [(1.0, 0.0, 0.5, None)[i % 4] for i in range(n)]
    rows = [{"jpg_0": wide(*a), "jpg_1": wide(*b), "label_0": x} for (a, b), x in zip(reds.tolist(), labels, strict=True)]
    rows = [row | {"caption": f"caption {i}"} for i, row in enumerate(rows)]
    rows[5] |= {"jpg_1": rows[5]["jpg_0"]}
    rows[6] |= {"jpg_0": b"no picture"}
    rows[30] |= {k: rows[20][k] for k in ("jpg_0", "jpg_1", "caption")}
    return rows


def settings(folder, dataset, **more):
    return td.Settings(dataset=str(dataset), relabel="pickscore", cache_dir=str(folder / "cache"), device="cpu", **more)


def open_data(s):
    """All pairs as (caption, winner's bytes, loser's bytes), and the ties of each row."""
    fresh_accelerator()
    rows, find = annotate.open_data(s, Accelerator(cpu=True))
    found, ties = [], []
    for row in rows:
        pairs, n = find(row)
        found += [(x["caption"], stored(x["winner"]), stored(x["loser"])) for x in pairs]
        ties.append(n)
    return found, ties


def mean_red(data: bytes) -> float:
    return red(open_picture(data))


def once(rows):
    """What a judge has to see of rows: each picture that can be read with its caption, once."""
    content = {(row[k], row["caption"]) for row in rows for k in ("jpg_0", "jpg_1") if row[k] != b"no picture"}
    return sorted((mean_red(data), caption) for data, caption in content)


def expected(rows, margin=0.0):
    """By hand: the redder one of both, of any row, unless they are closer than the margin or alike."""
    pairs = []
    for row in rows:
        a, b = row["jpg_0"], row["jpg_1"]
        if b"no picture" in (a, b):
            pairs.append((row["caption"], *((b, a) if a == b"no picture" else (a, b))))
        elif (gap := mean_red(a) - mean_red(b)) and abs(gap) >= margin:
            pairs.append((row["caption"], *((a, b) if gap > 0 else (b, a))))
    return pairs


@pytest.fixture
def data(tmp_path):
    """40 rows, and their file."""
    rows = make_rows(40)
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet", row_group_size=7)
    return rows, tmp_path / "train.parquet"


# --------------------------------------------------------------------------------------------------------------- winners


def test_the_judge_decides_every_pair_by_whole_pictures(judged, data, tmp_path):
    """Also those of ties and of no label; a margin drops what differs by less, and another one needs no score anew."""
    rows, file = data
    found, ties = open_data(settings(tmp_path, file))
    assert found == expected(rows) and sum(ties) == 40 - len(found) and ties[5] == 1
    crops = [(mean_red(row[k]), open_picture(row[k]).crop((8, 0, 16, 8))) for row in rows[10:] for k in ("jpg_0", "jpg_1")]
    assert sum((whole > 120) != (red(crop) > 120) for whole, crop in crops) > 5  # which of both is seen makes a difference
    assert sorted(x for batch in judged for x in batch) == once(rows)
    judged.clear()
    found, ties = open_data(settings(tmp_path, file, relabel_margin=31.0))
    assert found == expected(rows, 31) and 5 < sum(ties) < 20 and not judged


def test_agreement_and_margin_are_told(judged, data, tmp_path, capsys):
    """Counted by hand; Wilson's interval by its formula."""
    rows, file = data
    open_data(settings(tmp_path, file, relabel_margin=31.0))
    said = capsys.readouterr().out
    labelled = [r for r in rows if r["label_0"] in (0, 1) and b"no picture" not in (r["jpg_0"], r["jpg_1"])]
    gaps = [mean_red(r["jpg_0"]) - mean_red(r["jpg_1"]) for r in labelled]
    agreed = sum((gap > 0) if r["label_0"] else (gap < 0) for gap, r in zip(gaps, labelled, strict=True))
    n, z = len(labelled), 1.959963984540054
    p = agreed / n
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n**2)
    low, high = ((middle + sign * half) / (1 + z * z / n) * 100 for sign in (-1, 1))
    assert 5 < agreed < n - 2 and n == 19 if rows[5]["label_0"] is None else n == 20
    assert f"labels in {100 * p:.1f} % (95 % interval {low:.1f} to {high:.1f}) of {n} pairs" in said
    kept = [x for x in expected(rows, 31) if b"no picture" not in x]
    every = [x for x in expected(rows) if b"no picture" not in x]
    assert f"pickscore decides {len(every)} pairs, {len(every) - len(kept)} of them closer than --relabel-margin 31" in said
    most = max(abs(mean_red(a) - mean_red(b)) for _, a, b in every)
    with pytest.raises(UserError, match=f"all {len(every)} pairs of .* differ by less in pickscore, at most by {most:.4g};"):
        open_data(settings(tmp_path, file, relabel_margin=300.0))


@pytest.mark.parametrize("ranked_pairs", ["all", "best-worst"])
def test_groups_of_four(judged, tmp_path, ranked_pairs, capsys):
    """Ranked lists (HPDv2's), whose ranks say the contrary, and pictures alone in a folder, some of which cannot be read."""
    shades = {"a": (10, 40, 30, 20), "b": (5, 5, 9, 5), "c": (1, 2, None, 3), "d": (None, 7, None, None), "e": (4, 4, 4, 4)}
    rows, own = [], tmp_path / "own"
    own.mkdir()
    for caption, group in shades.items():
        names = [f"{caption}{i}.png" for i in range(4)]
        for name, shade in zip(names, group, strict=True):
            (own / name).write_bytes(b"x" if shade is None else png(shade))
            (own / name).with_suffix(".txt").write_text(caption)
        rows.append({"prompt": caption, "image_path": names, "rank": [i if i else 0.5 for i in (0, 3, 2, 1)]})
    (own / "alone.png").write_bytes(png(3))
    (own / "alone.txt").write_text("alone")
    (tmp_path / "test.json").write_text(json.dumps(rows))
    wanted = {
        "all": {"a": "10 12 13 20 23 30", "b": "20 21 23", "c": "30 31 10 02 12 32", "d": "10 12 13", "e": ""},
        "best-worst": {"a": "10", "b": "23", "c": "30", "d": "10", "e": ""},
    }[ranked_pairs]
    for source in (tmp_path / "test.json", own):
        if source != own:
            for file in own.glob("*.png"):
                (tmp_path / file.name).write_bytes(file.read_bytes())
        found, ties = open_data(settings(tmp_path, source, ranked_pairs=ranked_pairs))
        got = {caption: {(a, b) for c, a, b in found if c == caption} for caption in shades}
        for caption, group in shades.items():
            content = [b"x" if shade is None else png(shade) for shade in group]
            pairs = [(content[int(i)], content[int(j)]) for i, j in wanted[caption].split()]
            assert got[caption] == set(pairs), caption
            assert sum(c == caption for c, *_ in found) == len(pairs)
        assert sum(ties) == {"all": 3 + 0 + 3 + 6, "best-worst": 1}[ranked_pairs]
    said = capsys.readouterr().out
    assert said.count("agrees with") == 1 and "1 of 6 prompts have one picture only and are left out" in said


def test_the_demos_judge(tmp_path):
    """Winners are those of PickScore itself, one picture at a time."""
    paths = {k: DEMO_PATHS[k] for k in ("pickscore", "pickscore_processor")}
    s = settings(tmp_path, ROOT / "assets/demo/pickapic/test.parquet", max_train_pairs=20, **paths)
    fresh_accelerator()
    rows, find = annotate.open_data(s, Accelerator(cpu=True))
    judge = PickScore(*paths.values())
    judge.load(torch.float32)
    pairs = [pair for row in itertools.islice(rows, 40) for pair in find(row)[0]]
    for pair in pairs:
        won, lost = (judge([open_picture(stored(pair[k]))], [pair["caption"]]).item() for k in ("winner", "loser"))
        assert won > lost - 1e-5
    assert len(pairs) > 35


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "clipscore"])
def test_the_judge_is_the_one_that_is_named(name):
    paths = {"pickscore": "a", "pickscore_processor": "b", "hpsv2": "c", "hpsv2_version": "v2.0", "clip": "d"}
    judge = judge_of(td.Settings(**paths), name)
    assert (judge.name, judge.source) == (name, {"pickscore": "a b", "hpsv2": "c v2.0", "clipscore": "d"}[name])


# -------------------------------------------------------------------------------------------------------------- stopping


def files(folder):
    return {p.name: p.read_text() for p in sorted((folder / "cache/scores").glob("*/*.json"))}


def test_killed_at_any_moment_it_scores_nothing_twice(judged, data, tmp_path, monkeypatch):
    """Whether the judge or the writing of a file is cut off: files that are there are whole, and stay."""
    rows, file = data
    monkeypatch.setattr(annotate, "ROWS", 4)
    monkeypatch.setattr(annotate, "BATCH", 3)
    (tmp_path / "whole").mkdir()
    undisturbed = open_data(settings(tmp_path / "whole", file))
    call, write, s = PickScore.__call__, annotate.write_text, settings(tmp_path, file)
    for stop in (2, 5, 9):
        judged.clear()

        def stopped(self, images, prompts, stop=stop):
            if len(judged) == stop:
                raise KeyboardInterrupt
            return call(self, images, prompts)

        before = files(tmp_path)
        monkeypatch.setattr(PickScore, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            open_data(s)
        assert files(tmp_path).items() >= before.items()
    kept = files(tmp_path)
    assert 2 < len(kept) < 8

    def torn(path, text):
        path.with_name(f".{path.name}.part").write_text(text[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(PickScore, "__call__", call)
    monkeypatch.setattr(annotate, "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        open_data(s)
    monkeypatch.setattr(annotate, "write_text", write)
    assert files(tmp_path) == kept
    judged.clear()
    assert open_data(s) == undisturbed and files(tmp_path).keys() == files(tmp_path / "whole").keys()
    assert sorted(x for batch in judged for x in batch) == once(rows[4 * len(kept) :])
    judged.clear()
    assert open_data(s) == undisturbed and not judged


@pytest.mark.parametrize("turns", [(1, 0), (2, 0, 1)])
def test_any_number_of_processes_shares_the_rows(judged, data, tmp_path, monkeypatch, turns):
    """One after the other, in any order: each writes its own files, which are those of one process."""
    _, file = data
    monkeypatch.setattr(annotate, "ROWS", 4)
    (tmp_path / "whole").mkdir()
    undisturbed, score_all = open_data(settings(tmp_path / "whole", file)), annotate.score_all
    judged.clear()

    def by(s, rows, group, score, accelerator, folder):
        for rank in turns:
            process = SimpleNamespace(process_index=rank, num_processes=len(turns), wait_for_everyone=lambda: None)
            before = files(tmp_path)
            score_all(s, rows, group, score, process, folder)
            assert all(int(name[:6]) % len(turns) == rank for name in files(tmp_path).keys() - before.keys())

    monkeypatch.setattr(annotate, "score_all", by)
    assert open_data(settings(tmp_path, file)) == undisturbed
    one, several = (files(folder) for folder in (tmp_path / "whole", tmp_path))
    assert one.keys() == several.keys() and len(one) == 10
    assert all(json.loads(one[k])["records"] == json.loads(several[k])["records"] for k in one)


def test_a_limit_scores_no_more_than_it_takes(judged, data, tmp_path, monkeypatch):
    rows, file = data
    monkeypatch.setattr(annotate, "ROWS", 4)
    found, _ = open_data_first(settings(tmp_path, file, max_train_pairs=9, relabel_margin=31.0), 9)
    assert found == expected(rows, 31)[:9]
    n = len(files(tmp_path))
    assert len(expected(rows[: 4 * n], 31)) >= 9 > len(expected(rows[: 4 * (n - 1)], 31))


def open_data_first(s, n):
    """The first n pairs."""
    fresh_accelerator()
    rows, find = annotate.open_data(s, Accelerator(cpu=True))
    found = ((x["caption"], stored(x["winner"]), stored(x["loser"])) for row in rows for x in find(row)[0])
    return list(itertools.islice(found, n)), find


def test_data_that_change_while_they_are_scored_are_told(judged, data, tmp_path):
    rows, file = data
    _, find = open_data_first(settings(tmp_path, file), 1)
    with pytest.raises(UserError, match="the data changed while they were scored"):
        find(rows[0] | {"caption": "another"})


def test_two_processes_make_the_labels_of_one(tiny, tmp_path):
    """For real, with a limit, at which the processes wait for each other."""
    flags = ("--demo", "--relabel", "pickscore", "--ranked-pairs", "best-worst", "--max-train-steps", 1, "--device", "cpu")
    flags += ("--effective-batch-size", 4, "--train-batch-size", 2, "--max-train-pairs", 70, "--validate-every", 0)
    done = start_two("train_dipo", *flags, "--base-model", tiny, "--output-dir", tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("pickscore agrees with the data set's labels in ") == 1, done.stderr
    s = td.complete(td.Settings(demo=True, relabel="pickscore", max_train_pairs=70, output_dir=str(tmp_path / "one")))
    (tmp_path / "one").mkdir()
    one, _ = open_data_first(s, 70)
    records = {}
    for name in ("one", "two"):
        texts = files(tmp_path / name)
        records[name] = [x for text in texts.values() for x in json.loads(text)["records"]]
        assert len(texts) == 2  # of 64 rows each
    assert len(one) == 70
    for a, b in zip(records["one"], records["two"], strict=False):
        assert a["keys"] == b["keys"] and np.allclose(a["scores"], b["scores"], atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ whole runs


def test_a_resumed_run_makes_the_weights_of_one_that_was_not_stopped(judged, train, tmp_path):
    """And its cache is of that judge and margin alone."""
    flags = ("--relabel", "pickscore", "--relabel-margin", "0.5", "--max-train-steps")
    assert train("--output-dir", "whole", *flags, 4)[0] == 0
    assert train("--output-dir", "out", *flags, 2)[0] == 0
    code, _, err = train("--output-dir", "out", *flags, 4, "--resume")
    assert code == 0 and test_train_dipo.same(*(test_train_dipo.weights(tmp_path / x) for x in ("whole", "out"))), err
    note = json.loads((tmp_path / "out/cache/cache.json").read_text())
    assert note["relabel"] == "pickscore" and note["judge"].startswith("yuvalkirstain/PickScore_v1 ")
    assert note["counts"] == {"pairs": 39 - note["counts"]["ties"], "ties": note["counts"]["ties"], "unreadable": 1}
    given = {k: note[k] for k in ("dataset", "base_model", "vae", *cache.ONLY_SETTINGS)} | {"cache_dir": "out/cache"}
    process = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    pipe = SimpleNamespace(vae=SimpleNamespace(dtype=torch.float32))
    for changed, said in (
        ({}, None),
        ({"relabel_margin": 0.25}, "relabel_margin 0.5, not 0.25"),
        ({"relabel": None}, "relabel 'pickscore', not None"),
        ({"pickscore": "mine"}, "judge 'yuvalkirstain/PickScore_v1 laion.*', not 'mine laion"),
    ):
        told = pytest.raises(UserError, match=f"made with {said}.*delete its cache.json") if said else nullcontext()
        with told:
            assert cache.agreed_note(td.Settings(**given | changed), pipe, process, note["resolution"])["complete"]


def test_from_prompts_to_a_tuned_model(run, tmp_path):
    """The README's three commands, at a tiny size."""
    (tmp_path / "prompts.txt").write_text("\n".join(td.read_prompts("assets/demo/prompts.txt")["prompt"][:3]))
    steps = ("--demo", "--num-inference-steps", 2, "--device", "cpu")
    code, _, err = run("hasty_sample", *steps, "--prompts", "prompts.txt", "--images-per-prompt", 2, "--output-dir", "own")
    assert code == 0, err
    few = ("--effective-batch-size", 2, "--train-batch-size", 2, "--max-train-steps", 2, "--validate-every", 0)
    tune = ("train_dipo", "--demo", "--dataset", "own", *few, "--device", "cpu", "--output-dir", "tuned")
    code, _, err = run(*tune)
    assert code == 2 and "nobody has said which of its pictures are better; --relabel pickscore does" in err
    code, out, err = run(*tune, "--relabel", "pickscore")
    assert code == 0 and "pickscore decides 3 pairs\n" in out and "agrees" not in out, err
    code, _, err = run("hasty_sample", *steps, "--dpo-unet", "tuned", "--limit", 1, "--output-dir", "after")
    assert code == 0 and (tmp_path / "after/00000.png").exists(), err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--relabel-margin", "0.5"), "--relabel-margin 0.5: has no scores without a judge; add --relabel pickscore"),
        (("--relabel", "hpsv2", "--relabel-margin", "-1"), "--relabel-margin -1.0: use 0 or more"),
        (("--relabel", "hpsv2", "--relabel-margin", "nan"), "--relabel-margin nan: use 0 or more"),
        (("--relabel", "clipscore", "--clip", ""), "--relabel clipscore: there is no model"),
        (("--relabel", "aesthetic"), "invalid choice 'aesthetic'"),
        (("--relabel", "pickscore", "--pickscore", "nobody/nothing"), "--pickscore nobody/nothing: config.json and "),
        (("--relabel", "hpsv2", "--hpsv2", "nobody/nothing"), "--hpsv2 nobody/nothing: HPS_v2.1_compressed.pt cannot be"),
        (("--relabel", "pickscore", "--cache-dir", "file"), "--cache-dir file: cannot be written to"),
        (("--dataset", "single"), "no prompt has two pictures; use hasty_sample.py --images-per-prompt 2"),
        (
            ("--dataset", "silent"),
            "--dataset silent: 2 of 2 pictures have no prompt: 0.png, 1.png; give a metadata.jsonl or",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(train, tmp_path, flags, said):
    (tmp_path / "file").touch()
    for folder, prompts in (("single", ("a", "b")), ("silent", ())):
        (tmp_path / folder).mkdir()
        for i in range(2):
            (tmp_path / folder / f"{i}.png").write_bytes(png(50 * i))
        if prompts:
            lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(prompts)]
            (tmp_path / folder / "metadata.jsonl").write_text("\n".join(lines))
    code, _, err = train("--output-dir", "out", "--max-train-steps", 1, *flags)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and said in re.sub(r"\s+", " ", lines[0]) and "Traceback" not in err, err
