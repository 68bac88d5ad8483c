"""scores.csv: folders are scored image by image, go on, and bad input ends with one line."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import world
from PIL import Image

from dipo import judges
from dipo.files import save_png
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
