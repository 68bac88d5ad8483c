"""Every loss and its gradient against formulas of their own in float64, and each in a run of train_dipo.py."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from helpers import script
from safetensors.torch import load_file

from dipo import losses, training
from dipo.losses import BETAS, LOSSES, STARTS, WITHOUT_REFERENCE, preference_loss

PAIRS, SHAPE = 3, (2, 3, 4)
BETA = {"dpo": 2000.0, "ipo": 300.0, "sft": None, "kto": 300.0, "mapo": 0.1, "dspo": 0.7}


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def plain_loss(name, model, reference, noise, beta):
    """The mean over pairs, one at a time, from the papers' formulas: equation 14 of Wallace et al. 2024 and the others."""
    n = len(noise)

    def error(prediction, row):
        return float(((prediction[row] - noise[row % n]) ** 2).mean())

    gains = [error(reference, row) - error(model, row) for row in range(2 * n)]
    z = max(0.0, sum(gains) / (2 * n))
    total = 0.0
    for i in range(n):
        h = (gains[i] - gains[n + i]) / 2  # the log ratio over beta
        if name == "dpo":
            total -= math.log(sigmoid(beta * h))
        elif name == "ipo":
            total += beta**2 * (h - 1 / (2 * beta)) ** 2
        elif name == "sft":
            total += error(model, i)
        elif name == "kto":
            total += (1 - sigmoid(beta * (gains[i] - z))) / 2 + (1 - sigmoid(-beta * (gains[n + i] - z))) / 2
        elif name == "mapo":
            score = [0.5 * e / (math.exp(0.5 * e) - 1) for e in (error(model, i), error(model, n + i))]
            total += error(model, i) - beta * math.log(sigmoid(1000 * (score[0] - score[1])))
        elif name == "dspo":
            pull = beta * (1 - sigmoid(beta * h))
            total += float((((model - reference)[i] * -pull + model[i] - noise[i]) ** 2).mean())
    return total / n


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((PAIRS, *SHAPE))
    reference = np.concatenate([noise, noise]) + 0.3 * rng.standard_normal((2 * PAIRS, *SHAPE))
    worse = reference + 0.05 * (reference - np.concatenate([noise, noise]))
    return worse + 0.03 * rng.standard_normal(reference.shape), reference, noise


def ours(name, model, reference, noise, beta, mu=None):
    pred = torch.tensor(model, requires_grad=True)
    given = None if name in WITHOUT_REFERENCE else torch.tensor(reference)
    return pred, preference_loss(name, pred, given, torch.tensor(noise).repeat(2, 1, 1, 1), beta, mu)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_agree_with_the_paper_in_float64(name, tensors):
    model, reference, noise = tensors
    pred, (loss, argument, x) = ours(name, *tensors, BETA[name])
    assert loss.item() == pytest.approx(plain_loss(name, *tensors, BETA[name]), rel=1e-10)
    targets = np.concatenate([noise, noise])
    errors = [((p - targets) ** 2).mean((1, 2, 3)) for p in (model, np.where(name in WITHOUT_REFERENCE, targets, reference))]
    np.testing.assert_allclose(torch.stack(x[:4]).detach().flatten(), np.concatenate(errors), rtol=1e-12)
    gap = errors[0] - errors[1]
    expected = -(BETA[name] or 1) / 2 * (gap[:PAIRS] - gap[PAIRS:])
    np.testing.assert_allclose(argument.detach(), expected, rtol=1e-9)
    loss.backward()
    for index in [(0, 0, 0, 0), (2, 1, 2, 3), (3, 1, 2, 0), (5, 0, 1, 3)]:
        moved = []
        for step in (1e-6, -1e-6):
            nudged = model.copy()
            nudged[index] += step
            moved.append(plain_loss(name, nudged, reference, noise, BETA[name]))
        slope = (moved[0] - moved[1]) / 2e-6
        assert pred.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_ktos_mean_gain_is_held_and_not_below_zero(tensors):
    """d loss / d g = -+beta sigma (1 - sigma) / 2B of winners and losers, with z held at the mean gain."""
    model, reference, noise = tensors
    better = reference + 0.2 * (np.concatenate([noise, noise]) - reference) + 0.001 * model
    pred, (loss, _, x) = ours("kto", better, reference, noise, 300.0)
    loss.backward()
    g = torch.cat([x.r_w - x.m_w, x.r_l - x.m_l]).detach()
    assert g.mean() > 0.01
    sign = torch.tensor([1.0] * PAIRS + [-1.0] * PAIRS)
    h = torch.sigmoid(sign * 300.0 * (g - g.mean()))
    slope = (-sign * 300.0 * h * (1 - h) / (2 * PAIRS)).view(-1, 1, 1, 1)
    by_hand = slope * -2 * (torch.tensor(better) - torch.tensor(noise).repeat(2, 1, 1, 1)) / math.prod(SHAPE)
    torch.testing.assert_close(pred.grad, by_hand, rtol=1e-9, atol=1e-15)


def test_two_processes_share_ktos_mean_gain(tensors, monkeypatch):
    """With z of both, the mean of their losses is the loss of one process that holds all their pairs."""
    model, reference, noise = tensors
    better = reference + 0.2 * (np.concatenate([noise, noise]) - reference) + 0.001 * model
    _, (whole, _, x) = ours("kto", better, reference, noise, 300.0)
    gains = (torch.stack([x.r_w - x.m_w, x.r_l - x.m_l])).detach().mean(dim=0)
    parts, own = [], []
    monkeypatch.setattr(losses, "reduce", lambda z, how: own.append(z) or {"mean": gains.mean()}[how])
    for pairs in ([0], [1, 2]):
        rows = [*pairs, *(PAIRS + i for i in pairs)]
        parts.append(ours("kto", better[rows], reference[rows], noise[pairs], 300.0)[1][0].item() * len(pairs))
    assert sum(parts) / PAIRS == pytest.approx(whole.item(), rel=1e-12)
    assert [z.item() for z in own] == pytest.approx([gains[0].item(), gains[1:].mean().item()], rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_each_starts_where_it_should_and_pulls_towards_the_winner(name, tensors):
    _, reference, noise = tensors
    pred, (loss, argument, _) = ours(name, reference, reference, noise, BETAS.get(name))
    if name not in WITHOUT_REFERENCE:
        assert not argument.any()
    if name in STARTS:
        assert loss.item() == pytest.approx(STARTS[name], rel=1e-12)
    loss.backward()
    residual = torch.tensor(reference) - torch.tensor(noise).repeat(2, 1, 1, 1)
    towards = (pred.grad * residual).sum(dim=(1, 2, 3))  # how much a step of descent lowers each error
    assert (towards[:PAIRS] > 0).all()
    assert (towards[PAIRS:] < 0).all() if name not in ("sft", "dspo") else not towards[PAIRS:].any()


def test_beyond_one_dspos_weight_turns_its_gradient_round(tensors):
    _, reference, noise = tensors
    residual = torch.tensor(reference)[:PAIRS] - torch.tensor(noise)
    for beta, sign in ((1.9, 1), (2.1, -1)):
        pred, (loss, *_) = ours("dspo", reference, reference, noise, beta)
        loss.backward()
        assert (sign * (pred.grad[:PAIRS] * residual).sum(dim=(1, 2, 3)) > 0).all()


def test_half_precision_is_computed_in_float32(tensors):
    model, reference, noise = (torch.tensor(x).bfloat16() for x in tensors)
    loss, argument, _ = preference_loss("dpo", model, reference, noise.repeat(2, 1, 1, 1), 5000.0)
    assert loss.dtype == argument.dtype == torch.float32
    expected = plain_loss("dpo", *(x.double().numpy() for x in (model, reference, noise)), 5000.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mu", [0.0, 0.4, 1.0])
def test_winner_preserving_scales_the_losers_gradient_as_far_as_the_winner_allows(mu, tensors):
    model, reference, noise = tensors
    noise, model = noise.copy(), model.copy()
    # A loser that is far off the same way, one the other way, and one that is hardly off.
    for i, times in enumerate((5.0, -5.0, 0.1)):
        model[PAIRS + i] = noise[i] + times * (model[i] - noise[i])
    plain, (loss, *_) = ours("dpo", model, reference, noise, 3.0)
    scaled, (same, *_) = ours("dpo", model, reference, noise, 3.0, mu)
    assert same.item() == loss.item()
    loss.backward()
    same.backward()
    assert torch.equal(plain.grad[:PAIRS], scaled.grad[:PAIRS])
    expected = [min(1, (1 - mu) / 5), 1.0, 1.0 if mu < 0.9 else 0.0]
    for i, scale in enumerate(expected):
        torch.testing.assert_close(scaled.grad[PAIRS + i], scale * plain.grad[PAIRS + i], rtol=1e-9, atol=1e-15)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def train(run, tiny, tmp_path):
    """train(*flags) runs train_dipo.py on the tiny model and 24 of the demo's pairs."""
    pairs = tmp_path / "pairs.parquet"
    pd.read_parquet(ROOT / "assets/demo/pickapic/train.parquet").head(24).to_parquet(pairs)
    flags = ("--vae", "", "--optimizer", "adamw", "--no-scale-lr", "--learning-rate", "1e-3", "--lr-warmup-steps", "0")
    flags += ("--effective-batch-size", "4", "--train-batch-size", "4", "--checkpoint-every", "2", "--save-dtype", "fp32")
    flags += ("--validate-every", "0", "--device", "cpu", "--no-gradient-checkpointing", "--caption-dropout", "0")

    def call(*more):
        return run("train_dipo", "--base-model", tiny, "--dataset", pairs, *flags, *more)

    return call


@pytest.mark.parametrize("name", LOSSES)
def test_each_trains_in_full_and_as_a_lora_and_goes_on_to_the_bit(name, train, tmp_path):
    more = ("--lora-rank", "2") if name in ("ipo", "mapo") else ()
    file = "pytorch_lora_weights.safetensors" if more else "unet/diffusion_pytorch_model.safetensors"
    code, out, err = train("--loss", name, *more, "--output-dir", "whole", "--max-train-steps", 2)
    assert code == 0 and f"--loss {name} " in out, err
    for extra in (("--max-train-steps", 1), ("--max-train-steps", 2, "--resume")):
        code, out, err = train("--loss", name, *more, "--output-dir", "parts", *extra)
        assert code == 0, err
    a, b = (load_file(tmp_path / folder / file) for folder in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    metrics = pd.read_csv(tmp_path / "parts/metrics.csv")
    sides = metrics[["winner_mse", "loser_mse"]]
    np.testing.assert_allclose(sides.mean(axis=1), metrics.model_mse, rtol=1e-5)
    changes = metrics[["winner_change", "loser_change"]]
    np.testing.assert_allclose(changes.mean(axis=1), metrics.model_mse - metrics.reference_mse, rtol=1e-3, atol=1e-7)
    assert not changes.loc[0].any() and changes.loc[1].all()
    if name in WITHOUT_REFERENCE:
        np.testing.assert_allclose(changes.to_numpy(), (sides - sides.expanding().mean()).to_numpy(), rtol=1e-9, atol=1e-12)
    if name in STARTS:
        assert metrics.loss[0] == pytest.approx(STARTS[name], abs=1e-6)
    assert json.loads((tmp_path / "parts/checkpoints/step-0000002/progress.json").read_text())["settings"]["loss"] == name


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_a_reference_holds_none_and_its_card_says_what_it_is(name, train, tmp_path, monkeypatch):
    td, seen = script("train_dipo"), {"forward": 0}
    wrap, forward = td.wrap, td.UNet2DConditionModel.forward

    def watched(*given):
        made = wrap(*given)
        seen["reference"] = made[2]
        return made

    def counted(*given, **more):
        seen["forward"] += 1
        return forward(*given, **more)

    monkeypatch.setattr(td, "wrap", watched)
    monkeypatch.setattr(td.UNet2DConditionModel, "forward", counted)
    code, _, err = train("--loss", name, "--max-train-steps", 1, "--output-dir", "out")
    assert code == 0, err
    assert (seen["reference"] is None) == (name in WITHOUT_REFERENCE)
    assert seen["forward"] == (1 if name in WITHOUT_REFERENCE else 2)
    card = (tmp_path / "out/README.md").read_text()
    assert ("trained with Diffusion-DPO" in card) == (name == "dpo") and (name == "dpo" or f"the loss {name}" in card)


def test_the_winners_error_falls_under_sft_and_a_runaway_is_stopped_without_a_reference(train, tmp_path):
    flags = ("--loss", "sft", "--max-train-steps", 20, "--checkpoint-every", 100)
    code, _, err = train(*flags, "--output-dir", "good", "--learning-rate", "2e-3")
    metrics = pd.read_csv(tmp_path / "good/metrics.csv")
    assert code == 0 and metrics.winner_mse[-5:].mean() < 0.9 * metrics.winner_mse[:5].mean(), err
    # With so large a beta it is the losers' error that mapo makes grow.
    more = (
        "--loss",
        "mapo",
        "--beta-dpo",
        "1e4",
        "--lr-warmup-steps",
        40,
        "--learning-rate",
        "0.1",
        "--max-mse-ratio",
        "1.5",
    )
    code, _, err = train(*flags, *more, "--max-train-steps", 40, "--output-dir", "bad")
    assert code == 2 and "exceeds 1.5 times" in err and "Traceback" not in err


def test_without_a_reference_the_first_steps_stand_for_it_and_single_batches_do_not_count():
    progress, seen = {}, []
    errors = np.random.default_rng(0).uniform(0.03, 0.16, 60)
    for x in errors:
        seen.append(training.first_errors(progress, x, 2 * x))
        assert not training.drift_error(1, progress["recent"], np.mean(seen[-1]), 2.0)
    for k, first in enumerate(seen):
        assert first == pytest.approx((errors[: min(k + 1, 10)].mean(), 2 * errors[: min(k + 1, 10)].mean()), rel=1e-12)
    weights = 0.9 ** np.arange(59, -1, -1) * np.array([1, *[0.1] * 59])
    assert progress["recent"] == pytest.approx(1.5 * (weights * errors).sum(), rel=1e-12)
    assert training.first_errors(progress, math.nan, 1.0) == seen[-1] and math.isfinite(progress["recent"])
    for _ in range(30):
        progress = json.loads(json.dumps(progress))
        r = np.mean(training.first_errors(progress, 0.5, 0.5))
    assert training.drift_error(1, progress["recent"], r, 2.0)


def test_displacement_is_told_once_and_only_where_it_is(tmp_path, capsys):
    wave = np.tile([0.001, -0.001], 20)
    falling, flat = np.linspace(0.69, 0.5, 40), 0.69 + 10 * np.roll(wave, 1)
    told = []
    cases = (falling, wave), (flat, wave + 0.002), (falling, wave - 0.002), (falling, wave + 8e-4), (falling, wave + 0.002)
    for loss, change in cases:
        table = pd.DataFrame({"loss": loss, "winner_mse": 0.1 + change, "winner_change": change})
        table.to_csv(tmp_path / "metrics.csv")
        progress = {}
        training.warn_of_displacement(tmp_path / "metrics.csv", progress)
        told.append(capsys.readouterr().err)
    assert told[:4] == [""] * 4 and "by 2 %" in told[4] and "--winner-preserving" in told[4]
    training.warn_of_displacement(tmp_path / "metrics.csv", progress)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant_with_warmup", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, *((1 + math.cos(math.pi * k / 5)) / 2 for k in range(5))]),
    ],
)
def test_schedules_warm_up_and_end_at_a_step_that_still_moves(name, expected, train, tmp_path):
    code, _, err = train("--lr-scheduler", name, "--lr-warmup-steps", 2, "--max-train-steps", 6, "--output-dir", "out")
    assert code == 0, err
    np.testing.assert_allclose(pd.read_csv(tmp_path / "out/metrics.csv").learning_rate, 1e-3 * np.array(expected), rtol=1e-9)


def test_a_lora_on_other_layers_and_of_another_alpha_is_sampled_as_it_was_trained(train, tiny, tmp_path):
    """What is saved has alpha / rank in it: B is twice the trained one."""
    flags = ("--lora-rank", 2, "--lora-alpha", 4, "--lora-targets", "to_q", "ff.net.2", "--max-train-steps", 2)
    code, _, err = train(*flags, "--output-dir", "out")
    assert code == 0, err
    saved = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert {k.split(".lora")[0].rsplit("attn1.", 1)[-1].rsplit("attn2.", 1)[-1] for k in saved if "attn" in k} == {"to_q"}
    assert any("ff.net.2" in k for k in saved)
    trained = load_file(tmp_path / "out/checkpoints/step-0000002/lora.safetensors")
    ups = [k for k in trained if "lora_B" in k]
    assert ups
    for k in ups:
        other = next(v for name, v in saved.items() if name.endswith(k.replace("lora_B", "lora.up")) or name.endswith(k))
        torch.testing.assert_close(other, 2 * trained[k], rtol=0, atol=0)


def test_a_tuned_unet_is_started_from_and_the_reference_is_it_or_the_base(train, tmp_path):
    code, _, err = train("--output-dir", "first", "--max-train-steps", 2)
    assert code == 0, err
    for reference in ("init", "base"):
        more = ("--init-unet", "first", "--reference", reference, "--max-train-steps", 1, "--output-dir", reference)
        code, _, err = train(*more)
        assert code == 0, err
    init, base = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("init", "base"))
    assert init.loss[0] == pytest.approx(math.log(2), abs=1e-6) and init.winner_change[0] == 0
    # The same pairs: the model's errors are those of the tuned UNet, the reference's the base model's.
    assert init.winner_mse[0] == base.winner_mse[0] and base.winner_change[0] != 0
    assert base.loss[0] != pytest.approx(math.log(2), abs=1e-4)
    first = pd.read_csv(tmp_path / "first/metrics.csv")
    assert base.reference_mse[0] == pytest.approx(first.reference_mse[0], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--loss", "sft", "--winner-preserving", "0"), "--winner-preserving 0.0: sft trains on winners only"),
        (("--winner-preserving", "1.5"), "--winner-preserving 1.5: use 0 to 1"),
        (("--reference", "base"), "--reference base: needs --init-unet"),
        (("--init-unet", "nowhere"), "--init-unet 'nowhere': no such folder"),
        (("--lora-rank", "2", "--lora-targets", "to_x"), "--lora-targets to_x: no layer's name ends so"),
        (("--lora-rank", "2", "--lora-alpha", "0"), "--lora-alpha 0.0: use a finite number above 0"),
        (("--loss", "orpo"), "orpo"),
        (("--lr-scheduler", "polynomial"), "polynomial"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(flags, said, train):
    code, _, err = train(*flags, "--max-train-steps", 1, "--output-dir", "out")
    assert code == 2 and said in err and "Traceback" not in err


def test_8_bit_adamw_goes_on_to_the_bit(train, tmp_path):
    pytest.importorskip("bitsandbytes")
    more = ("--optimizer", "adamw8bit", "--output-dir")
    for folder, extra in (("whole", (2,)), ("parts", (1,)), ("parts", (2, "--resume"))):
        code, _, err = train(*more, folder, "--max-train-steps", *extra)
        assert code == 0, err
    a, b = (load_file(tmp_path / f"{x}/unet/diffusion_pytorch_model.safetensors") for x in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    state = torch.load(tmp_path / "parts/checkpoints/step-0000002/optimizer.bin", weights_only=True)["state"]
    state = [x.get("__bnb_optimizer_quant_state__", x) for x in state.values()]
    assert any(x["state1"].dtype == torch.uint8 for x in state)


def test_without_bitsandbytes_8_bit_is_refused_at_once(monkeypatch):
    td = script("train_dipo")
    monkeypatch.setattr(training, "is_bnb_available", lambda: False)
    with pytest.raises(training.UserError, match="pip install bitsandbytes"):
        training.check_training(td.complete(td.Settings(optimizer="adamw8bit", device="cpu")))
