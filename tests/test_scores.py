"""scores.csv: folders are scored image by image, go on, and bad input ends with one line."""

import json
import os
import shutil
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
import world
from PIL import Image, PngImagePlugin

from dipo import judges, stats
from dipo.cli import UserError
from dipo.files import save_png
from dipo.folders import paired, picture_records
from dipo.grids import save_grids

PROMPTS = [world.caption(s) for s in world.sample_scenes("held_out", 6, 3)]


def make_folder(path, n, seed=0):
    path.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        record = dict.fromkeys(("dpo_unet", "negative_prompt", "timestep_spacing", "diffusers"), "") | {"base_model": "m"}
        record |= {"prompt": PROMPTS[i % 6], "seed": i, "num_inference_steps": 2, "guidance_scale": 1, "eta": 0}
        picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        save_png(path / f"{i:05d}.png", picture, record | {"width": 64, "height": 64})


@pytest.fixture
def score(run, random_judges):
    pick = random_judges / "pickscore"
    flags = ("--pickscore", pick, "--pickscore-processor", pick, "--hpsv2", random_judges / "hpsv2", "--clip", pick)
    return lambda *more: run("compare_quality", *flags, "--device", "cpu", "--scoring-batch-size", 4, *more)


def test_scoring_a_folder_is_continued_and_not_repeated(score, tmp_path, monkeypatch):
    make_folder(tmp_path / "a", 10)
    save_grids(tmp_path / "a", "grid", {"": [tmp_path / "a/00000.png"]}, ["not one of them"])
    call, calls = judges.HPSv2.__call__, []

    def interrupted(self, images, prompts):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, images, prompts)

    monkeypatch.setattr(judges.HPSv2, "__call__", interrupted)
    code, _, err = score("--folders", "a")
    assert code == 130 and "the same command goes on" in err
    assert len(pd.read_csv(tmp_path / "a/scores.csv")) == 8
    code, out, err = score("--folders", "a")
    assert code == 0 and calls == [4, 4, 2, 2], err
    table = pd.read_csv(tmp_path / "a/scores.csv")
    assert table.file.tolist() == [f"{i:05d}.png" for i in range(10)] and table.seed.tolist() == list(range(10))
    assert table[["pickscore", "hpsv2", "clipscore"]].notna().all().all() and "| a        | 6   |" in out
    before = (tmp_path / "a/scores.csv").stat().st_mtime_ns
    assert score("--folders", "a")[0] == 0 and (tmp_path / "a/scores.csv").stat().st_mtime_ns == before and len(calls) == 4
    make_folder(tmp_path / "b", 10, seed=1)
    code, out, err = score("--folders", "a", "b")
    assert code == 0 and "Wins of a over b, same prompts and seeds" in out and "| HPSv2" in out, err
    assert "wins: mean probability" in out
    shutil.copy(tmp_path / "b/00003.png", tmp_path / "a/00010.png")
    assert score("--folders", "a")[0] == 0 and len(pd.read_csv(tmp_path / "a/scores.csv")) == 11


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--folders", "nothing"), "no such folder"),
        (("--folders", "empty"), "--folders empty: no PNG, JPEG or WebP in it"),
        (
            ("--folders", "a", "--pickscore", "nobody/nothing"),
            "--pickscore nobody/nothing: config.json and model.safetensors cannot be loaded",
        ),
        (("--folders", "a", "--hpsv2", "empty"), "--hpsv2 empty: HPS_v2.1_compressed.pt cannot be loaded"),
        (("--folders", "a", "--hpsv2", "evil.pt"), "--hpsv2 evil.pt: HPS_v2.1_compressed.pt cannot be loaded"),
        (("--folders", "a", "--hpsv2-version", "v3"), "--hpsv2-version"),
    ],
)
def test_bad_input_ends_with_one_line(score, tmp_path, flags, said):
    make_folder(tmp_path / "a", 1)
    (tmp_path / "empty").mkdir()

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'harm'}",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    code, _, err = score(*flags)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err
    assert not (tmp_path / "harm").exists()


# -------------------------------------------------------------------------------------------- pictures of other origin

SETTINGS = "Negative prompt: ugly\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64"


def save_picture(path, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def web_ui(text):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    return info


def test_where_the_prompt_of_a_picture_comes_from(tmp_path):
    """Our own record first, then what was given, metadata.jsonl, the text beside it, and the picture itself; all in the
    order of names, numbers by their value."""
    folder = tmp_path / "a"
    make_folder(folder, 1)
    for name in ("2.png", "10.PNG"):
        save_picture(folder / name, pnginfo=web_ui(f"inside {name}\n{SETTINGS}"))
    save_picture(folder / "3.jpeg")
    save_picture(folder / "b.webp")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "b.webp", "text": " of\\nmetadata"}\n{"file_name": "x.png", "text": "y"}\n'
    )
    for name in ("2", "3", "b"):
        (folder / f"{name}.txt").write_bytes(f"beside {name} é\n".encode("latin-1"))
    save_picture(folder / "._2.png")
    (folder / "more.png").mkdir()
    save_grids(folder, "grid", {"": [folder / "2.png"]}, [""])
    records = picture_records(str(folder))
    ours = [PROMPTS[0], "beside 2 é", "beside 3 é", "inside 10.PNG", "of metadata"]
    assert {k: r["prompt"] for k, r in records.items()} == dict(
        zip(["00000.png", "2.png", "3.jpeg", "10.PNG", "b.webp"], ours, strict=True)
    )
    assert records["00000.png"]["seed"] == 0 and "seed" not in records["2.png"]
    given = [{"prompt": f"given {i}", "category": "x"} for i in range(5)]
    records = picture_records(str(folder), given)
    assert [r["prompt"] for r in records.values()] == [PROMPTS[0], "given 1", "given 2", "given 3", "given 4"]
    assert records["2.png"]["category"] == "x"
    with pytest.raises(UserError, match=r"--folder-prompts: 4 prompts for 5 pictures of .*; give one for each"):
        picture_records(str(folder), given[:4])
    # What is ours needs none.
    make_folder(tmp_path / "b", 2)
    assert [r["prompt"] for r in picture_records(str(tmp_path / "b"), given).values()] == PROMPTS[:2]
    (folder / "metadata.jsonl").rename(tmp_path / "metadata.jsonl")
    (folder / "metadata.csv").write_text("file_name,caption,category\nb.webp,of a table,y\n")
    assert picture_records(str(folder))["b.webp"]["prompt"] == "of a table"
    (folder / "metadata.csv").write_text("file,caption\nb.webp,of a table\n")
    with pytest.raises(UserError, match=r"metadata.csv: cannot be read: has no column file_name; each row needs"):
        picture_records(str(folder))


def test_pictures_without_a_prompt_are_named(tmp_path):
    for i in range(5):
        save_picture(tmp_path / f"a/{i}.png", pnginfo=web_ui(f"{'a cat' if i == 1 else ''}\n{SETTINGS}"))
    (tmp_path / "a/3.png").write_bytes(b"none")
    with pytest.raises(UserError) as error:
        picture_records(str(tmp_path / "a"))
    said = f"{tmp_path / 'a'}: 4 of 5 pictures have no prompt: 0.png, 2.png, 3.png (cannot be read), 4.png"
    assert str(error.value) == f"--folders {said}; give --folder-prompts, a metadata.jsonl or a .txt beside each"
    graph = {"1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0]}}}
    graph["2"] = {"class_type": "CLIPTextEncode", "inputs": {"text": ["3", 0]}}
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(graph))
    save_picture(tmp_path / "b/0.png", pnginfo=info)
    with pytest.raises(
        UserError, match=r"1 of 1 pictures have no prompt: 0.png \(its ComfyUI prompt is made by other nodes\)"
    ):
        picture_records(str(tmp_path / "b"))


def test_pictures_of_any_origin_are_scored_and_paired(score, tmp_path):
    """By prompt and the how-manieth picture of it; upright and in RGB, whatever file they come in; anew when the file
    changes. The flag gives the prompts in the order of names."""
    lines = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    pixels = [save_picture(tmp_path / f"a/p{i}.png", i, pnginfo=web_ui(f"{lines[i]}\n{SETTINGS}")) for i in range(3)]
    for i, x in enumerate(pixels):
        exif = Image.Exif()
        exif[274] = 6
        turned = Image.fromarray(np.rot90(x)).convert("RGBA")
        (tmp_path / "b").mkdir(exist_ok=True)
        turned.save(tmp_path / f"b/{9 + i}.webp", exif=exif, lossless=True)
    (tmp_path / "prompts.json").write_text(json.dumps(lines))
    code, out, err = score("--folders", "a", "b", "--folder-prompts", "prompts.json")
    assert code == 0, err
    a, b = (pd.read_csv(tmp_path / x / "scores.csv").sort_values("file", key=lambda f: f.str.len()) for x in "ab")
    assert list(a["prompt"]) == list(b["prompt"]) == lines and a["seed"].isna().all()
    assert list(b["file"]) == ["9.webp", "10.webp", "11.webp"]
    names = ["pickscore", "hpsv2", "clipscore"]
    assert (a[names].to_numpy() == b[names].to_numpy()).all() and a["hpsv2"].nunique() == 3
    assert "Wins of a over b, same prompts, pictures in their order; images of one prompt" in out
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| HPSv2")]
    assert [row[2].strip() for row in rows] == ["3"]
    # Ours have seeds, which others lack.
    make_folder(tmp_path / "c", 2)
    code, out, err = score("--folders", "c", "a")
    assert code == 0 and "Wins of c over a, same prompts, pictures in their order" in out, err
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| HPSv2")]
    assert [row[2].strip() for row in rows] == ["2"]
    # A picture that was exchanged is scored again, and no other.
    old = pd.read_csv(tmp_path / "a/scores.csv").set_index("file")
    save_picture(tmp_path / "a/p1.png", 9, pnginfo=web_ui(f"{lines[1]}\n{SETTINGS}"))
    assert score("--folders", "a")[0] == 0
    new = pd.read_csv(tmp_path / "a/scores.csv").set_index("file")
    assert list(old.index[(old["image"] != new["image"])]) == list(old.index[old["hpsv2"] != new["hpsv2"]]) == ["p1.png"]
    # What cannot be decoded is named.
    data = (tmp_path / "a/p2.png").read_bytes()
    (tmp_path / "a/p2.png").write_bytes(data[:2000])
    code, _, err = score("--folders", "a")
    assert code == 2 and "a/p2.png: cannot be read as a picture (" in err and "Traceback" not in err


def test_pairs_are_by_seed_where_all_have_one():
    images = pd.DataFrame(
        [("a", "p", "7", 1.0), ("a", "p", "3", 2.0), ("b", "p", "3", 5.0), ("b", "q", "4", 6.0), ("c", "p", "", 7.0)],
        columns=["variant", "prompt", "seed", "x"],
    )
    both, alike = paired(images, "a", "b")
    assert stats.wins(both, "a", "b", "x")["difference"] == -3 and alike == "same prompts and seeds"
    both, _ = paired(images, "a", "c")
    assert stats.wins(both, "a", "c", "x")["difference"] == -6 and stats.wins(both, "a", "c", "x")["n"] == 1


def test_scores_of_others_are_not_overwritten(score, tmp_path):
    """Before a judge is loaded."""
    make_folder(tmp_path / "a", 1)
    text = "image,rater,score\n00000.png,me,3\n00000.png,you,4\n"
    (tmp_path / "a/scores.csv").write_text(text)
    code, _, err = score("--folders", "a", "--pickscore", "nobody/nothing")
    assert code == 2 and err == "error: a/scores.csv: not of these scripts, and would be lost; move it away\n"
    assert (tmp_path / "a/scores.csv").read_text() == text


def test_given_prompts_for_pictures_of_ours_captions_in_capitals_and_a_picture_too_large(tmp_path, capsys):
    make_folder(tmp_path / "a", 1)
    given = [{"prompt": "given", "category": ""}]
    assert picture_records(str(tmp_path / "a"), given)["00000.png"]["prompt"] == PROMPTS[0]
    said = "pictures of {} that these scripts made keep the prompts inside them\n"
    assert capsys.readouterr().err == f"warning: --folder-prompts: {said.format(tmp_path / 'a')}"
    save_picture(tmp_path / "b/0.png")
    (tmp_path / "b/0.TXT").write_text("a cat")
    assert picture_records(str(tmp_path / "b"))["0.png"]["prompt"] == "a cat" and capsys.readouterr().err == ""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "b/1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(UserError, match=r"1 of 2 pictures have no prompt: 1.png \(cannot be read\)"):
        picture_records(str(tmp_path / "b"))
