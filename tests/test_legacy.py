"""Folders that older versions left go on: tests/legacy holds some, made when each script was one file (November 2026)."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

import Ablation_experiment as ablation
import hasty_sample
from dipo.files import fingerprint, read_record
from dipo.models import image_settings
from dipo.scores import Scores
from dipo.settings import DEMO_PATHS

LEGACY = ROOT / "tests/legacy"
SMALL = ("--demo", "--num-inference-steps", 3, "--height", 32, "--width", 32, "--device", "cpu", "--output-dir", "out")


@pytest.fixture(autouse=True)
def same_demo():
    """The folders are of the demo's weights as they were then."""
    made = read_record(LEGACY / "hasty_sample/00000.png")["weights"]
    if fingerprint(DEMO_PATHS["base_model"], DEMO_PATHS["dpo_unet"]) != made:
        pytest.skip("the demo model was remade since")


def test_images_of_hasty_sample(run, tmp_path):
    shutil.copytree(LEGACY / "hasty_sample", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in Path("out").glob("0*.png")}
    code, out, err = run("hasty_sample", *SMALL, "--limit", 4)
    assert code == 0 and "3 of 4 images are in out already" in out, err
    assert {name: Path("out", name).read_bytes() for name in before} == before
    table = pd.read_csv("out/images.csv")
    assert len(table) == 4 and table["weights"].nunique() == 1 and (table["seconds_per_image"] > 0).all()
    code, _, err = run("hasty_sample", *SMALL, "--limit", 4, "--guidance-scale", 3)
    assert code == 2 and "guidance_scale 5.0, this run has 3.0" in err


def test_images_and_scores_of_a_study(run, tmp_path, monkeypatch):
    shutil.copytree(LEGACY / "Ablation_experiment", tmp_path / "out")
    before = {p: p.read_bytes() for p in Path("out").rglob("*.*")}
    monkeypatch.setattr(ablation, "load_pipeline", None)
    code, out, err = run("Ablation_experiment", *SMALL, "--limit", 1, "--etas", 0, 1, "--redraws", 0)
    assert code == 0 and out.startswith("6 of 6 images are in out"), err
    for path, content in before.items():
        if path.suffix != ".csv":
            assert path.read_bytes() == content, path
    # Scored once more, for HPSv2's logits, which older versions did not keep.
    for name in ("scores.csv", "eta.csv", "fluctuation.csv"):
        old, new = (pd.read_csv(folder / name) for folder in (LEGACY / "Ablation_experiment", Path("out")))
        pd.testing.assert_frame_equal(new[old.columns], old, rtol=1e-3)
    assert pd.read_csv("out/scores.csv")["hpsv2_logit"].notna().all()
    written = Path("out/scores.csv").stat().st_mtime_ns
    monkeypatch.setattr(Scores, "load_judges", lambda *_: 1 / 0)
    assert run("Ablation_experiment", *SMALL, "--limit", 1, "--etas", 0, 1, "--redraws", 0)[0] == 0
    assert Path("out/scores.csv").stat().st_mtime_ns == written


def test_a_checkpoint_of_train_dipo(run, tmp_path):
    """A LoRA's first two steps; steps 3 and 4 are those that the older version made itself. Its cache is made anew."""
    shutil.copytree(LEGACY / "train", tmp_path / "out")
    old = pd.read_csv("out/metrics.csv", dtype=str)
    flags = ("train_dipo", "--demo", "--lora-rank", 1, "--max-train-steps", 4, "--effective-batch-size", 4)
    flags += ("--train-batch-size", 4, "--checkpoint-every", 2, "--validate-every", 0, "--max-train-pairs", 16)
    code, out, err = run(*flags, "--device", "cpu", "--output-dir", "out", "--resume")
    assert code == 0 and "going on from out/checkpoints/step-0000002" in out, err
    # Its rows stay digit by digit; what it knew nothing of is empty there.
    pd.testing.assert_frame_equal(pd.read_csv("out/metrics.csv", dtype=str)[old.columns].head(2), old)
    metrics = pd.read_csv("out/metrics.csv")
    assert metrics.winner_change.isna().tolist() == [True, True, False, False]
    assert metrics.step.tolist() == [1, 2, 3, 4] and metrics.ties.tolist() == [3] * 4
    # The loss has 500 times the rounding of the errors, which another processor does otherwise: a run of this one's own.
    assert run(*flags, "--device", "cpu", "--output-dir", "whole")[0] == 0
    np.testing.assert_allclose(metrics.loss[2:], pd.read_csv("whole/metrics.csv").loss[2:], atol=1e-5)
    assert (np.abs(metrics.loss[2:] - [0.6932169199, 0.6931555271]) < 2e-5).all()
    np.testing.assert_allclose(metrics.model_mse[2:], [0.1208478585, 0.0636510713], rtol=1e-4)
    np.testing.assert_allclose(metrics.reference_mse[2:], [0.1208479106, 0.0636511669], rtol=1e-4)
    np.testing.assert_allclose(metrics.grad_norm[2:], [53.411064, 13.808915], rtol=1e-2)


def test_fingerprints_are_those_of_before(tmp_path):
    (tmp_path / "m/sub").mkdir(parents=True)
    (tmp_path / "m/a.safetensors").write_bytes(bytes(range(256)) * 300)
    (tmp_path / "m/sub/b.bin").write_bytes(b"weights")
    (tmp_path / "m/config.json").write_text("{}")
    (tmp_path / "one.pt").write_bytes(b"one")
    made = fingerprint(str(tmp_path / "m"), "", "owner/name", str(tmp_path / "one.pt"))
    assert made == "49a7ab684e44"
    (tmp_path / "m/sub/b.bin").write_bytes(b"Weights")
    assert fingerprint(str(tmp_path / "m"), "", "owner/name", str(tmp_path / "one.pt")) != made


def test_a_lora_and_a_vae_count_in_the_order_of_before():
    """hasty_sample.py and the studies have always hashed them in orders of their own."""
    names = {"base_model": DEMO_PATHS["base_model"], "dpo_unet": DEMO_PATHS["dpo_unet"]}
    names |= {"vae": "assets/demo/sdxl/vae"}
    base, unet, vae = names.values()
    lora = "tests/legacy/train/checkpoints/step-0000002/lora.safetensors"
    s = hasty_sample.Settings(**names, dpo_lora=(lora,))
    wanted, _ = hasty_sample.wanted_images(s, ["a"], "fp32")
    assert wanted["00000.png"]["weights"] == fingerprint(base, unet, vae, lora) != fingerprint(base, unet, lora, vae)
    assert image_settings(s, "fp32")["weights"] == fingerprint(base, unet, lora, vae)
    assert wanted["00000.png"]["dpo_lora"] == image_settings(s, "fp32")["dpo_lora"] == lora
