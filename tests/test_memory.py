"""dipo/memory.py: bytes and operations are counted right, and what is predicted is what a run takes."""

import json
import shutil

import pandas as pd
import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from helpers import fresh_accelerator

import train_dipo as td
from dipo import memory
from dipo.cli import UserError
from dipo.models import fitted

# Weights of SDXL's UNet, and of its VAE and text encoders.
UNET, OTHERS = 2_567_463_684, 83_653_863 + 123_060_480 + 694_659_840


def predicted(shards=0, **more):
    """What SDXL needs, of its configurations alone."""
    options = {"mixed_precision": "bf16", "beta_dpo": 5000.0} | more
    return memory.predict(td.Settings(base_model=str(ROOT / "assets/configs/sdxl"), vae="", **options), shards)


@pytest.fixture
def thin(tmp_path):
    """SDXL's UNet with one layer in each block, as settings name it."""
    config = json.loads((ROOT / "assets/configs/sdxl/unet/config.json").read_text())
    config |= {"layers_per_block": 1, "transformer_layers_per_block": 1}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    return {"init_unet": str(tmp_path)}


def test_a_tally_counts_what_is_made_inside_and_alive():
    before = torch.ones(100, 10)
    with memory.Tally() as tally:
        view = before.t()[:5].detach()
        assert tally.now == 0
        x = view @ before
        assert (tally.now, tally.flops) == (4 * 5 * 10, 2 * 5 * 100 * 10)
        y = x + 1
        x.add_(1)
        assert tally.now == 2 * 4 * 5 * 10
        del y
        assert (tally.now, tally.most) == (4 * 5 * 10, 2 * 4 * 5 * 10)
        q = torch.ones(1, 2, 7, 16)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert tally.flops == 2 * 5 * 100 * 10 + 2 * (2 * 2 * 7 * 7 * 16)
    torch.ones(1_000_000)
    assert tally.most < 10_000


RUNS = (
    {"gradient_checkpointing": True, "optimizer": "adafactor", "train_batch_size": 8},
    {"lora_rank": 8},
    {"loss": "sft", "mixed_precision": "bf16", "gradient_checkpointing": True, "train_batch_size": 2},
)


@pytest.mark.parametrize("more", RUNS, ids=str)
def test_what_is_predicted_is_what_the_demo_takes(more, tmp_path, monkeypatch):
    """Of gradients, optimizer and activations the most bytes at once, and the operations, beside the loop's real tensors."""
    fresh_accelerator()
    for name in ("gradient_checkpointing", "optimizer"):
        monkeypatch.setitem(td.DEMO, name, more.get(name, td.DEMO[name]))
    more = {"train_batch_size": 4, "max_train_steps": 2, "max_train_pairs": 32, "lr_warmup_steps": 0} | more
    more |= {"effective_batch_size": 16, "validate_every": 0, "device": "cpu"}
    s = td.Settings(demo=True, output_dir=str(tmp_path), **more)
    tally, train = memory.Tally(), td.train

    def watched(s, accelerator, pipe, *given):
        if s.mixed_precision == "bf16":
            memory.norms_in_float32(pipe.unet)
        with tally:
            return train(s, accelerator, pipe, *given)

    monkeypatch.setattr(td, "train", watched)
    td.main(s)
    need = memory.predict(fitted(td.complete(s)))
    held = need.gradients + need.optimizer + need.activations
    assert held == pytest.approx(tally.most, rel=0.02)
    assert need.flops == pytest.approx(tally.flops / 32, rel=0.01)


def test_sdxl_by_part():
    """Sizes by hand; operations by 6.76 TFLOP for a latent and 4.9 to encode a picture (tests/test_benchmarks.py)."""
    need = predicted(loss="sft", gradient_checkpointing=False)
    assert (need.unet, need.gradients, need.reference) == (4 * UNET, 4 * UNET, 0)
    assert need.vae_and_text_encoders == 2 * OTHERS
    assert need.flops / 1e12 == pytest.approx(2 * (3 * 6.76 + 4.9), rel=0.02)
    # The casts of all weights are kept, too.
    assert 15e9 < need.activations - 2 * UNET < 20e9


def test_full_training_fits_40_gb_at_four_pairs():
    """The reference is in bf16, its norms in float32; most activations are computed twice. The tables of docs/scaling.md
    are those of benchmarks/memory.csv (tests/test_docs.py)."""
    need = predicted(train_batch_size=4, cache_dir="cache")
    assert need.fits == [40, 48, 80, 96, 141] and 2 * UNET < need.reference < 2.01 * UNET
    assert need.flops / 1e12 == pytest.approx(2 * 5 * 6.76, rel=0.05)
    written = pd.read_csv(ROOT / "benchmarks/memory.csv").query("what == 'in full' and at_once == 4").iloc[0]
    assert [round(x / 1e9, 2) for x in need[:-1]] == list(written[[*need._fields[:-1]]])


def test_optimizers(thin):
    """AdamW: two float32 a weight. bitsandbytes 0.50.2's, as measured: two states of 1,638,400 bytes and two of 25,600 for
    1280 x 1280 weights, and two of 400 bytes for 100."""
    sizes = [torch.nn.Parameter(torch.empty(n, device="meta")) for n in (1280 * 1280, 100)]
    assert memory.eight_bit(sizes) == 2 * (1_638_400 + 25_600) + 2 * 400
    adamw, eight_bit = (predicted(optimizer=name, **thin) for name in ("adamw", "adamw8bit"))
    assert adamw.optimizer == pytest.approx(2 * adamw.unet, rel=1e-3)
    assert eight_bit.optimizer == pytest.approx(2.03 / 8 * adamw.optimizer, rel=0.01)
    assert adamw._replace(optimizer=eight_bit.optimizer) == eight_bit


def test_fsdp_takes_a_share(thin):
    """Whole are, in bf16 with gradients, the weights of no block, and two blocks."""
    alone, need = (predicted(n, optimizer="adamw", train_batch_size=8, **thin) for n in (0, 8))
    assert (need.unet, need.gradients, need.optimizer) == (alone.unet // 8, alone.unet // 8, 2 * (alone.unet // 8))
    assert need.reference < alone.reference and need.flops == pytest.approx(alone.flops, rel=0.01)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(thin["init_unet"], subfolder="unet"))
    blocks = [sum(p.numel() for p in m.parameters()) for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    whole = 2 * (alone.unet // 4 - sum(blocks) + 2 * max(blocks))
    # What is kept of a step is less than with autocast, which has norms in float32.
    assert 2 * whole < need.activations < 2 * whole + alone.activations


def test_a_dry_run(run, tmp_path, monkeypatch):
    """0.00448 TFLOP a pair: 250 steps of 64 in half a day at 1.66e-3 TFLOP/s."""
    flags = ("--demo", "--dry-run", "--output-dir", "out", "--tflops", "0.00166", "--optimizer", "adamw8bit")
    code, out, err = run("train_dipo", *flags)
    assert code == 0 and not (tmp_path / "out").exists(), err
    assert "--train-batch-size 64, --mixed-precision bf16, processes: 1" in out and "fits GPUs of 12, 16, 24," in out
    assert "250 steps of 64 pairs take 0.5 days" in out and "unet 0.0238" in out and "optimizer 0.0123" in out
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "unet 0.00298" in memory.told(fitted(td.complete(td.Settings(demo=True))), 8)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed"):
        memory.told(td.Settings(), 8)


def test_text_encoders_without_a_configuration_are_told(tmp_path):
    shutil.copytree(ROOT / "assets/configs/sdxl", tmp_path / "m")
    (tmp_path / "m/text_encoder_2/config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        memory.predict(td.Settings(base_model=str(tmp_path / "m"), vae=""))
