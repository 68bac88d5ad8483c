"""The benchmarks run, on the demo model at a tiny size; and their SDXL with random weights is SDXL."""

import sys

import pandas as pd
import pytest
import torch
from conftest import DEMO, ROOT
from PIL import Image

# demo/ has a common.py too: each of both is for the scripts beside it.
of_demo = sys.modules.pop("common", None)
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    import bench_growth
    import bench_memory
    import bench_sampling
    import bench_training

    common = sys.modules.pop("common")
if of_demo:
    sys.modules["common"] = of_demo


@torch.no_grad()
def test_random_sdxl_is_sdxl():
    """Parameters and operations of the real ones: 2.567 G and 6.76 TFLOP for a latent of 4x128x128, 10.5 TFLOP to decode and
    4.9 TFLOP to encode 1024x1024 pixels, 123 M and 695 M in the text encoders."""
    pipe = common.random_sdxl(torch.device("meta"), torch.float32)
    with torch.device("meta"):
        step = common.unet_flops(pipe.unet, 1)
        decode = common.flops_of(lambda: pipe.vae.decoder(torch.zeros(1, 4, 128, 128)))
        encode = common.flops_of(lambda: pipe.vae.encoder(torch.zeros(1, 3, 1024, 1024)))
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    sizes = [sum(p.numel() for p in m.parameters()) for m in parts]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert (step / 1e12, decode / 1e12, encode / 1e12) == pytest.approx((6.76, 10.5, 4.9), rel=0.02)
    assert common.native_size(pipe) == 1024 and pipe.scheduler.config.beta_end == 0.012


TINY = {
    bench_sampling: ("--steps", 2, "--batch-sizes", 1, 2, "--rounds", 1, "--ways", "pipeline", "ours", "interval"),
    bench_growth: (
        *("--steps", 1, 2, 3, "--batch-sizes", 1, "--sizes", 32, "--rounds", 1, "--prompts", 500, "--processes"),
    ),
    bench_training: ("--train-batch-sizes", 2, "--effective-batch-size", 2, "--steps", 2, "--rounds", 1),
}


@pytest.mark.parametrize("module", TINY, ids=lambda module: module.__name__)
def test_a_benchmark_runs(module, run):
    name = module.__name__
    for _ in range(2):
        code, _, err = run(name, *TINY[module], "--csv", "rows.csv")
        assert code == 0, err
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


def test_memory_by_part_and_what_a_run_took(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_memory, "TRAINING", {"LoRA of rank 64": ({"lora_rank": 64}, 0)})
    flags = ("--base-model", "assets/demo/sdxl", "--pairs", 2, "--images", 3, "--measured", "--csv", "rows.csv")
    code, _, err = run("bench_memory", *flags)
    assert code == 0, err
    table = pd.read_csv("rows.csv").set_index("what")
    assert list(table["at_once"]) == [3, 3, 3, 2] and (table["fits"] == 12).all() and (table["total"] > 0).all()
    half, full = (bench_memory.sampling(str(DEMO), 3, dtype, dtype) for dtype in ("fp16", "fp32"))
    assert (2 * half.unet, half.flops) == (full.unet, full.flops)
    assert full.activations == pytest.approx(2 * half.activations, rel=0.05)
    [(_, pairs, settings)] = bench_memory.runs(bench_memory.Settings(measured=(2,)), torch.device("cpu"), tmp_path)
    assert pairs == settings.train_batch_size == 2 and 0 <= bench_memory.took(settings) < 3e9


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
def test_what_a_user_gets_wrong_is_one_line(flags, said, run):
    code, _, err = run("bench_sampling", *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_way_that_does_not_fit_is_left_out_and_rows_are_kept(run, monkeypatch):
    real = bench_sampling.Ways.call

    def call(self, way, steps, prompts, seed):
        if way == "pipeline" and len(prompts) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if len(prompts) == 3:
            raise KeyboardInterrupt
        return real(self, way, steps, prompts, seed)

    monkeypatch.setattr(bench_sampling.Ways, "call", call)
    flags = ("--steps", 1, "--batch-sizes", 1, 2, 3, "--rounds", 1, "--ways", "pipeline", "ours", "--csv", "rows.csv")
    code, out, _ = run("bench_sampling", *flags)
    table = pd.read_csv("rows.csv")
    assert list(zip(table["batch_size"], table["way"], strict=True)) == [(1, "pipeline"), (1, "ours"), (2, "ours")]
    assert "pipeline: out of memory at batch 2, left out" in out and code == 130
    assert table["times_pipeline"].isna().tolist() == [False, False, True]
