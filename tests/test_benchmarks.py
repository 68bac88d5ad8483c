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
        *("--steps", 1, 2, 3, "--batch-sizes", 1, "--sizes", 32, "--rounds", 1, "--prompts", 1000, "--processes"),
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
    assert len(table) == 2 * {"bench_sampling": 6, "bench_growth": 3 + 1 + 1 + 2, "bench_training": 3}[name]
    column = {"bench_sampling": "seconds_per_image", "bench_growth": "value", "bench_training": "pairs_per_second"}[name]
    assert (table[column] > 0).all() and table["torch"].notna().all()
    if name != "bench_growth":
        assert table["share_of_floor"].between(0, 1).all()
    if name != "bench_training":
        with Image.open("rows.png") as image:
            image.load()
