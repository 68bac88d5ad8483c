"""The demo's annotator, its preference pairs, and the UNet trained on them."""

import io
import json

import annotator
import make_pairs
import numpy as np
import pandas as pd
import pytest
import torch
import world
from conftest import DEMO, ROOT
from diffusers import UNet2DConditionModel
from helpers import latents
from PIL import Image, ImageEnhance

from dipo.judges import HPSv2, PickScore
from dipo.models import decode
from dipo.settings import DEMO_PATHS
from dipo.timesteps import ddim_timesteps

SHIPPED = ROOT / "assets/demo/pickapic"


def drawn(n, seed=0):
    scenes = world.sample_scenes("train", n, seed)
    return [(s, world.caption(s), world.draw(s, np.random.default_rng([seed, i]))) for i, s in enumerate(scenes)]


def test_the_renderers_own_colours_are_right_and_those_of_other_captions_are_not():
    pictures = drawn(60)
    for scene, _, picture in pictures:
        assert min(annotator.rightness(picture, scene).values()) > 0.9, scene
    others = [
        np.mean(list(annotator.rightness(p, s).values()))
        for (_, _, p), (s, _, _) in zip(pictures, pictures[3:], strict=False)
    ]
    assert np.mean(others) < 0.4


def test_vivid_pictures_are_rewarded_and_blotches_cost():
    for _, caption, picture in drawn(30):
        vivid = ImageEnhance.Color(picture).enhance(1.15)
        pale = ImageEnhance.Color(picture).enhance(0.7)
        assert annotator.reward(vivid, caption) > annotator.reward(picture, caption) > annotator.reward(pale, caption)
        assert annotator.reward(picture, caption) == annotator.reward(picture.copy(), caption)
    scene, caption, picture = next(
        x for x in drawn(30) if x[0].category == "portrait" and x[0].colour("background") == "blue"
    )
    blotched = picture.copy()
    blotched.paste((48, 160, 70), (0, 0, 8, 8))
    before, after = (annotator.rightness(x, scene)["background"] for x in (picture, blotched))
    assert before - after == pytest.approx(64 / 160, abs=0.02)


def test_colourfulness_is_hasler_and_suesstrunks():
    """By their formula, pixel by pixel in plain Python."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    rg = [float(r) - float(g) for r, g, _ in pixels.reshape(-1, 3)]
    yb = [(float(r) + float(g)) / 2 - float(b) for r, g, b in pixels.reshape(-1, 3)]

    def mean(x):
        return sum(x) / len(x)

    def variance(x):
        return mean([(v - mean(x)) ** 2 for v in x])

    expected = (variance(rg) + variance(yb)) ** 0.5 + 0.3 * (mean(rg) ** 2 + mean(yb) ** 2) ** 0.5
    assert annotator.colourfulness(Image.fromarray(pixels)) == pytest.approx(expected)
    assert annotator.colourfulness(Image.new("RGB", (8, 8), (90, 90, 90))) == 0


def test_labels_follow_bradley_and_terry():
    rng = np.random.default_rng(0)
    for gap in (-2.0, -0.5, 0.3, 1.5):
        share = np.mean([annotator.label(gap, 0.0, rng) for _ in range(4000)])
        assert share == pytest.approx(1 / (1 + np.exp(-gap)), abs=0.03)
    assert annotator.label(1.0, 1.05, rng) == 0.5


@pytest.mark.parametrize(("file", "split", "rows"), [("train", "train", 3000), ("test", "held_out", 400)])
def test_the_shipped_pairs_are_what_they_say(file, split, rows):
    table = pd.read_parquet(SHIPPED / f"{file}.parquet")
    assert len(table) == rows and {"jpg_0", "jpg_1", "caption", "label_0"} <= set(table.columns)
    captions = {world.caption(s, w) for s in world.scenes(split) for w in range(world.WORDINGS)}
    assert set(table.caption) <= captions and set(table.label_0) == {0.0, 0.5, 1.0}
    for row in table.iloc[:: rows // 40].itertuples():
        for k in (0, 1):
            picture = Image.open(io.BytesIO(getattr(row, f"jpg_{k}")))
            assert picture.format == "JPEG" and picture.size == (64, 64)
            assert annotator.reward(picture, row.caption) == pytest.approx(getattr(row, f"reward_{k}"), abs=0.02)
    gap = (table.reward_0 - table.reward_1).to_numpy()
    tie = np.abs(gap) < annotator.TIE
    assert ((table.label_0 == 0.5).to_numpy() == tie).all() and 0.02 < tie.mean() < 0.2
    expected = 1 / (1 + np.exp(-np.abs(gap[~tie])))
    agree = (gap[~tie] > 0) == (table.label_0[~tie].to_numpy() == 1)
    assert agree.mean() == pytest.approx(expected.mean(), abs=3 * 0.5 / np.sqrt(len(agree)))
    assert {*table.source_0, *table.source_1} == set(make_pairs.SOURCES)


def test_pairs_under_a_caption_are_of_different_pictures():
    s = make_pairs.Settings()
    table = make_pairs.plan(s, "train", 40)
    pairs = make_pairs.choose_pairs(s, table, 40)
    assert len(pairs) == 40 and (pairs["first"] != pairs["second"]).all()
    assert (table.caption[pairs["first"]].to_numpy() == table.caption[pairs["second"]].to_numpy()).all()
    assert len({frozenset(p) for p in pairs.itertuples(index=False)}) == 40
    again = make_pairs.choose_pairs(s, make_pairs.plan(s, "train", 40), 40)
    assert again.equals(pairs)


def test_the_trained_unet_fits_the_demo_pipeline_and_is_preferred(demo_pipe, monkeypatch):
    """The full measurement is demo/measure_dpo.py's: at least 60 % of 300 with 50 steps."""
    base = UNet2DConditionModel.from_pretrained(DEMO / "unet")
    config = [json.loads((p / "config.json").read_text()) for p in (DEMO / "unet", ROOT / DEMO_PATHS["dpo_unet"])]
    assert all(config[0][k] == v for k, v in config[1].items() if not k.startswith("_"))
    scenes = world.sample_scenes("held_out", 18, 11)
    captions = [world.caption(s) for s in scenes]
    rewards = []
    for unet in (base, demo_pipe.unet):
        monkeypatch.setattr(demo_pipe, "unet", unet)
        x = latents(demo_pipe, captions, ddim_timesteps(20, "leading"), seeds=range(18))
        pictures = demo_pipe.image_processor.postprocess(decode(demo_pipe.vae, x))
        rewards.append(np.array([annotator.reward(p, c) for p, c in zip(pictures, captions, strict=True)]))
    assert (rewards[1] > rewards[0]).mean() > 0.6


@pytest.mark.parametrize("judge", ["pickscore", "hpsv2"])
def test_the_shipped_judges_agree_with_the_annotator(judge):
    """demo/make_judges.py measures at least 80 % of the 364 held-out pairs that are no ties."""
    paths = [DEMO_PATHS[name] for name in ("pickscore", "pickscore_processor", "hpsv2")]
    score = PickScore(*paths[:2]) if judge == "pickscore" else HPSv2(paths[2], "v2.1")
    score.load(torch.float32)
    table = pd.read_parquet(SHIPPED / "test.parquet")
    table = table[table.label_0 != 0.5]
    scores = []
    for k in (0, 1):
        pictures = [Image.open(io.BytesIO(x)) for x in table[f"jpg_{k}"]]
        scores.append(score(pictures, table.caption.tolist()).numpy())
    right = (scores[0] > scores[1]) == (table.reward_0 > table.reward_1).to_numpy()
    assert right.mean() > 0.76
