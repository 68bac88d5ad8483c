"""dipo/memory.py: bytes and operations are counted right, and what is predicted is what a run takes."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

import train_dipo as td
from dipo import memory
from dipo.cli import UserError
from dipo.models import fitted

# Weights of SDXL's UNet, and of its VAE and text encoders.
UNET, OTHERS = 2_567_463_684, 83_653_863 + 123_060_480 + 694_659_840


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """A function that predicts for SDXL of its configurations, without weights, or for one of a layer in each block."""
    folder = tmp_path_factory.mktemp("models")

    def predict(processes=1, sharded=False, thin=False, **more):
        base = folder / f"{thin}"
        if not base.exists():
            shutil.copytree(ROOT / "assets/configs/sdxl", base)
            for part in ("tokenizer", "tokenizer_2"):
                shutil.copytree(ROOT / "assets/configs/tokenizer", base / part)
            config = json.loads((base / "unet/config.json").read_text())
            config |= {"layers_per_block": 1, "transformer_layers_per_block": 1} if thin else {}
            (base / "unet/config.json").write_text(json.dumps(config))
        options = {"mixed_precision": "bf16", "beta_dpo": 5000.0} | more
        return memory.predict(fitted(td.Settings(base_model=str(base), vae="", **options)), processes, sharded)

    return predict


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


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_checkpointing": True, "optimizer": "adafactor", "train_batch_size": 8},
        {"lora_rank": 8},
        {"loss": "sft", "mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_what_is_predicted_is_what_the_demo_takes(more, tmp_path, monkeypatch):
    """Of gradients, optimizer and activations the most bytes at once, and the operations, beside the loop's real tensors."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    monkeypatch.setitem(td.DEMO, "gradient_checkpointing", more.get("gradient_checkpointing", False))
    monkeypatch.setitem(td.DEMO, "optimizer", more.get("optimizer", "adamw"))
    more = {"train_batch_size": 4, "max_train_steps": 2, "max_train_pairs": 32, "lr_warmup_steps": 0} | more
    s = td.Settings(demo=True, output_dir=str(tmp_path), effective_batch_size=16, validate_every=0, device="cpu", **more)
    tally, train = memory.Tally(), td.train

    def as_on_a_gpu(m, inputs):
        if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm) and m.weight.dtype == torch.float32:
            return (inputs[0].float(),)

    def watched(*given):
        with tally, torch.nn.modules.module.register_module_forward_pre_hook(as_on_a_gpu):
            return train(*given)

    monkeypatch.setattr(td, "train", watched)
    td.main(s)
    need = memory.predict(fitted(td.complete(s)))
    held = need.gradients + need.optimizer + need.activations
    assert held == pytest.approx(tally.most, rel=0.02)
    assert need.flops == pytest.approx(tally.flops / 32, rel=0.01)


def test_sdxl_by_part(predicted):
    """Sizes by hand; operations by 6.76 TFLOP for a latent and 4.9 to encode a picture (tests/test_benchmarks.py)."""
    need = predicted(loss="sft", gradient_checkpointing=False)
    assert (need.unet, need.gradients, need.reference) == (4 * UNET, 4 * UNET, 0)
    assert need.vae_and_text_encoders == 2 * OTHERS
    assert need.flops / 1e12 == pytest.approx(2 * (3 * 6.76 + 4.9), rel=0.02)
    # The casts of all weights are kept, too.
    assert 15e9 < need.activations - 2 * UNET < 20e9


def test_full_training_fits_40_gb_at_four_pairs(predicted):
    """With a reference in bf16, whose norms are in float32, and activations computed twice but for a few."""
    need = predicted(train_batch_size=4, cache_dir="cache")
    assert need.fits == [40, 48, 80] and 2 * UNET < need.reference < 2.01 * UNET
    assert need.optimizer < 0.1 * need.unet
    assert need.flops / 1e12 == pytest.approx(2 * 5 * 6.76, rel=0.05)


def test_a_lora_fits_12_gb(predicted):
    need = predicted(lora_rank=64)
    assert need.fits[0] == 12 and need.unet == 2 * UNET + need.gradients and need.reference == 0


def test_optimizers(predicted):
    """AdamW: two float32 a weight. bitsandbytes 0.50.2's, as measured: two states of 1,638,400 bytes and two of 25,600 for
    1280 x 1280 weights, and two of 400 bytes for 100."""
    sizes = [torch.nn.Parameter(torch.empty(n, device="meta")) for n in (1280 * 1280, 100)]
    assert memory.eight_bit(sizes) == 2 * (1_638_400 + 25_600) + 2 * 400
    adamw, eight_bit = (predicted(thin=True, optimizer=name) for name in ("adamw", "adamw8bit"))
    assert adamw.optimizer == pytest.approx(2 * adamw.unet, rel=1e-3)
    assert eight_bit.optimizer == pytest.approx(2.03 / 8 * adamw.optimizer, rel=0.01)
    assert adamw._replace(optimizer=eight_bit.optimizer) == eight_bit


def test_fsdp_takes_a_share(predicted):
    """Whole are, in bf16 with gradients, the weights of no block, and two blocks."""
    alone, need = (predicted(n, n > 1, thin=True, optimizer="adamw", train_batch_size=2) for n in (1, 8))
    assert (need.unet, need.gradients, need.optimizer) == (alone.unet // 8, alone.unet // 8, 2 * (alone.unet // 8))
    assert need.reference == alone.reference and need.flops == pytest.approx(alone.flops, rel=0.01)
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(ROOT / "assets/configs/sdxl/unet")
        unet = UNet2DConditionModel.from_config(config, layers_per_block=1, transformer_layers_per_block=1)
    blocks = [sum(p.numel() for p in m.parameters()) for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    whole = 2 * (alone.unet // 4 - sum(blocks) + 2 * max(blocks))
    # What is kept of a step is less than with autocast, which has norms in float32.
    assert 2 * whole < need.activations < 2 * whole + alone.activations


def test_a_dry_run(run, tmp_path):
    code, out, err = run("train_dipo", "--demo", "--dry-run", "--output-dir", "out", "--tflops", "0.002")
    assert code == 0 and not (tmp_path / "out").exists(), err
    assert "64 pairs at once on 1 GPU, --mixed-precision bf16" in out and "fits GPUs of 12, 16, 24, 40, 48, 80 GB" in out
    # 0.00448 TFLOP a pair
    assert re.search(r"250 steps of 64 pairs take 9:5\d:\d\d at 0.002 TFLOP/s on each", out), out


def test_a_dry_run_knows_no_deepspeed():
    with pytest.raises(UserError, match="DeepSpeed"):
        memory.told(td.Settings(), SimpleNamespace(distributed_type="DEEPSPEED"))
