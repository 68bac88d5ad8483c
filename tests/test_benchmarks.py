"""The benchmarks run, on the demo model at a tiny size; and their SDXL with random weights is SDXL."""

import importlib
import sys

import pandas as pd
import pytest
import torch
import transformers
from conftest import ROOT
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

sys.path.append(str(ROOT / "benchmarks"))
import bench_sampling as bs


@torch.no_grad()
def test_random_sdxl_is_sdxl():
    """Parameters and operations of the real ones: 2.567 G and 6.76 TFLOP for a latent of 4x128x128, 10.5 TFLOP to decode and
    4.9 TFLOP to encode 1024x1024 pixels, 123 M and 695 M in the text encoders."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**bs.UNET), AutoencoderKL(**bs.VAE)
        text_1 = transformers.CLIPTextModel(transformers.CLIPTextConfig(**bs.TEXT_1))
        text_2 = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**bs.TEXT_2))
        x, text = torch.zeros(1, 4, 128, 128), torch.zeros(1, 77, 2048)
        conditions = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        step = bs.flops_of(lambda: unet(x, torch.zeros(1), encoder_hidden_states=text, added_cond_kwargs=conditions))
        decode = bs.flops_of(lambda: vae.decoder(x))
        encode = bs.flops_of(lambda: vae.encoder(torch.zeros(1, 3, 1024, 1024)))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (unet, vae, text_1, text_2)]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert (step / 1e12, decode / 1e12, encode / 1e12) == pytest.approx((6.76, 10.5, 4.9), rel=0.02)


TINY = {
    "bench_sampling": ("--steps", 2, "--batch-sizes", 1, 2, "--rounds", 1, "--ways", "pipeline", "ours", "interval"),
    "bench_growth": (
        *("--steps", 1, 2, 3, "--batch-sizes", 1, "--sizes", 32, "--rounds", 1, "--prompts", 500, "--processes"),
    ),
    "bench_training": ("--train-batch-sizes", 2, "--effective-batch-size", 2, "--steps", 2, "--rounds", 1),
}


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs(name, monkeypatch, tmp_path, capfd):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, TINY[name]), "--csv", "rows.csv"])
        module.main()
    table = pd.read_csv("rows.csv")
    assert set(table["device"]) == {"cpu"} and set(table["model"]) == {"demo"}
    assert len(table) == 2 * {"bench_sampling": 6, "bench_growth": 3 + 1 + 1 + 1, "bench_training": 3}[name]
    column = {"bench_sampling": "seconds_per_image", "bench_growth": "value", "bench_training": "pairs_per_second"}[name]
    assert (table[column] > 0).all() and table["torch"].notna().all()
    if name != "bench_growth":
        assert table["share_of_floor"].between(0, 1).all()
    if name != "bench_training":
        with Image.open("rows.png") as image:
            image.load()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ways", "fast"), "'fast'"),
        (("--steps", 0), "--steps (0,): use positive numbers"),
        (("--rounds", 0), "--rounds 0: use positive numbers"),
        (("--batch-sizes", "--csv", ""), "name at least one of each"),
        (("--csv", "nowhere/rows.csv"), "--csv nowhere/rows.csv: no such folder"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(flags, said, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_sampling.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        bs.main()
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_way_that_does_not_fit_is_left_out_and_rows_are_kept(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    real = bs.Ways.call

    def call(self, way, steps, prompts, seed):
        if way == "pipeline" and len(prompts) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if len(prompts) == 3:
            raise KeyboardInterrupt
        return real(self, way, steps, prompts, seed)

    monkeypatch.setattr(bs.Ways, "call", call)
    flags = ("--steps", 1, "--batch-sizes", 1, 2, 3, "--rounds", 1, "--ways", "pipeline", "ours", "--csv", "rows.csv")
    monkeypatch.setattr(sys, "argv", ["bench_sampling.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        bs.main()
    table = pd.read_csv("rows.csv")
    assert list(zip(table["batch_size"], table["way"], strict=True)) == [(1, "pipeline"), (1, "ours"), (2, "ours")]
    assert "pipeline: out of memory at batch 2, left out" in capfd.readouterr().out and stopped.value.code == 130
    assert table["times_pipeline"].isna().tolist() == [False, False, True]
