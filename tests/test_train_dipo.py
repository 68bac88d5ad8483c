"""train_dipo.py: the loss, the data, resuming, and every way in which a run can go wrong, on a tiny SDXL."""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import world
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import DEMO, ROOT
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError

import train_dipo as td
from dipo import cache, checkpoints, training
from dipo.pairs import Pairs, make_loader, random_draws, read_pair, read_picture
from dipo.schemas import as_rows, open_dataset, pairs_of


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The demo pipeline with a UNet of 0.3 million random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    for part in DEMO.iterdir():
        if part.name != "unet":
            (folder / part.name).symlink_to(part)
    config = json.loads((DEMO / "unet/config.json").read_text())
    config |= {"block_out_channels": [16, 16, 32], "norm_num_groups": 8, "attention_head_dim": [1, 1, 2]}
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(folder / "unet")
    return folder


def jpeg(image):
    out = io.BytesIO()
    image.save(out, format="JPEG")
    return out.getvalue()


def make_rows(n, seed=0):
    """n pairs of a drawn picture, which wins, and the same in grey; one in eight is a tie and one is unreadable."""
    rows = []
    for i, scene in enumerate(world.sample_scenes("train", n, seed)):
        good = world.draw(scene, np.random.default_rng([seed, i]))
        bad = good.convert("L")
        first_wins = i % 2 == 0
        pair = (good, bad) if first_wins else (bad, good)
        label = 0.5 if i % 8 == 3 else float(first_wins)
        rows.append({"jpg_0": jpeg(pair[0]), "jpg_1": jpeg(pair[1]), "caption": world.caption(scene), "label_0": label})
    rows[5]["jpg_1"] = b"not a picture"
    return rows


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "train.parquet"
    pd.DataFrame(make_rows(40)).assign(url="unused").to_parquet(path)
    return path


@pytest.fixture(scope="session")
def readable_file(tmp_path_factory):
    """The same without the unreadable picture, which would shift what comes after it."""
    path = tmp_path_factory.mktemp("pairs") / "train.parquet"
    pd.DataFrame(make_rows(40)).drop(index=5).to_parquet(path)
    return path


FLAGS = ("--vae", "", "--optimizer", "adamw", "--no-scale-lr", "--learning-rate", "1e-3", "--lr-warmup-steps", "2")
FLAGS += ("--effective-batch-size", "8", "--train-batch-size", "4", "--shuffle-buffer", "16", "--checkpoint-every", "2")
FLAGS += (
    "--validate-every",
    "0",
    "--save-dtype",
    "fp32",
    "--max-mse-ratio",
    "100",
    "--device",
    "cpu",
    "--no-gradient-checkpointing",
)


@pytest.fixture
def train(run, tiny, pairs_file):
    """train("--flag", ...) runs train_dipo.py in this process on the tiny model and pairs."""

    def call(*flags):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        return run("train_dipo", "--base-model", tiny, "--dataset", pairs_file, *FLAGS, *flags)

    return call


def command(tiny, pairs_file, *flags):
    return [str(ROOT / "train_dipo.py"), "--base-model", str(tiny), "--dataset", str(pairs_file), *FLAGS, *map(str, flags)]


def weights(folder):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    return {k: v.clone() for k, v in unet.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------------------------- loss


def plain_loss(model, reference, noise, beta):
    """Wallace et al. 2024, equation 14, pair by pair in numpy float64."""
    total, arguments = 0.0, []
    for i in range(len(noise)):

        def error(prediction, row, i=i):
            return ((prediction[row] - noise[i]) ** 2).mean()

        win, lose = i, len(noise) + i
        inner = (error(model, win) - error(reference, win)) - (error(model, lose) - error(reference, lose))
        arguments.append(-0.5 * beta * inner)
        total += math.log1p(math.exp(-arguments[-1])) if arguments[-1] > -500 else -arguments[-1]
    return total / len(noise), np.array(arguments)


def test_loss_and_gradient_agree_with_a_plain_float64_implementation():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, 4, 5, 6))
    model, reference = (np.concatenate([noise, noise]) + 0.1 * rng.standard_normal((6, 4, 5, 6)) for _ in range(2))
    beta = 2000.0
    expected, arguments = plain_loss(model, reference, noise, beta)
    pred = torch.tensor(model, requires_grad=True)
    loss, argument, m, r = td.dpo_loss(pred, torch.tensor(reference), torch.tensor(noise), beta)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(argument.detach(), arguments, rtol=1e-9)
    np.testing.assert_allclose(m.detach(), ((model - np.tile(noise, (2, 1, 1, 1))) ** 2).mean((1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(r, ((reference - np.tile(noise, (2, 1, 1, 1))) ** 2).mean((1, 2, 3)), rtol=1e-12)
    loss.backward()
    for index in [(0, 0, 0, 0), (2, 3, 4, 5), (3, 1, 2, 0), (5, 0, 4, 4)]:
        moved = [model.copy(), model.copy()]
        moved[0][index] += 1e-6
        moved[1][index] -= 1e-6
        slope = (plain_loss(moved[0], reference, noise, beta)[0] - plain_loss(moved[1], reference, noise, beta)[0]) / 2e-6
        assert pred.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_loss_is_computed_in_float32_and_lower_when_the_winner_is_predicted_better():
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = torch.cat([noise, noise]) + 0.3
    better = torch.cat([noise + 0.29, noise + 0.31])
    loss, argument, *_ = td.dpo_loss(better.bfloat16(), reference.bfloat16(), noise.bfloat16(), 5000)
    assert loss.dtype == torch.float32 and (argument > 0).all() and loss < math.log(2)
    worse, argument, *_ = td.dpo_loss(torch.cat([noise + 0.31, noise + 0.29]), reference, noise, 5000)
    assert worse > math.log(2) and (argument < 0).all()
    assert td.dpo_loss(reference, reference, noise, 5000)[0].item() == pytest.approx(math.log(2))


# ----------------------------------------------------------------------------------------------------------------- data


def test_the_winner_comes_first_whatever_its_column_and_ties_are_dropped(tmp_path):
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    labels = [1.0, 0.0, 0.5, 1.0, 0.0, None]
    rows = [{"jpg_0": jpeg(red), "jpg_1": jpeg(blue), "caption": f"{i}", "label_0": v} for i, v in enumerate(labels)]
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    stream = open_dataset(str(tmp_path))
    stream = as_rows(stream, pairs_of(stream, str(tmp_path)))
    items = list(Pairs(stream, lambda row: read_pair(row, 32), lambda key: {}, 0, 1, epochs=1))
    assert [x["caption"] for x in items] == ["0", "1", "3", "4"]
    for x, label in zip(items, [1, 0, 1, 0], strict=True):
        assert x["pixels"].shape == (2, 32, 32, 3)
        winner, loser = x["pixels"][0, 16, 16], x["pixels"][1, 16, 16]
        assert (winner[0] > 200) == bool(label) and (loser[0] > 200) != bool(label)
    assert sum(x["ties"] for x in items) == 1  # the last row's comes after the last item


def test_one_noise_and_one_timestep_serve_both_pictures_of_a_pair(tiny, monkeypatch, train):
    seen = []

    class Spy(DDPMScheduler):
        def add_noise(self, latents, noise, t):
            seen.append((latents, noise, t))
            return super().add_noise(latents, noise, t)

    monkeypatch.setattr(td, "DDPMScheduler", Spy)
    assert train("--output-dir", "out", "--max-train-steps", "1")[0] == 0
    for latents, noise, t in seen:
        first, second = noise.chunk(2)
        assert torch.equal(first, second) and torch.equal(*t.chunk(2)) and not torch.equal(*latents.chunk(2))
        assert len({tuple(x.flatten()[:4].tolist()) for x in first}) == len(first)
        assert 0.9 < noise.std() < 1.1
    assert len(seen) == 2 and len(torch.cat([t.chunk(2)[0] for _, _, t in seen]).unique()) > 4


def test_latents_are_the_vaes_and_dropped_captions_are_the_pipelines_unconditional_side(demo_pipe):
    picture = world.draw(world.sample_scenes("train", 1, 0)[0], np.random.default_rng(0))
    other = world.draw(world.sample_scenes("train", 2, 3)[1], np.random.default_rng(0))
    caption = world.caption(world.sample_scenes("train", 1, 0)[0])
    pixels = torch.from_numpy(np.stack([np.asarray(picture), np.asarray(other)]))
    batch = {"pixels": torch.stack([pixels, pixels]), "caption": [caption, caption]}
    batch |= {"posterior_noise": torch.zeros(2, 2, 4, 16, 16), "drop_caption": torch.tensor([False, True])}
    text, pooled = training.encode_captions(demo_pipe, [""])
    latents, given = training.prepare_batch(demo_pipe, batch, (text * 0, pooled * 0))
    embeds, pooled = given.prompt_embeds, given.pooled_embeds
    assert given.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 4
    x = demo_pipe.image_processor.preprocess([picture, other])
    with torch.no_grad():
        expected = demo_pipe.vae.encode(x).latent_dist.mean * demo_pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents[[0, 2]], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents[[1, 3]], expected, atol=1e-4, rtol=1e-4)
    positive, negative, pooled_positive, pooled_negative = demo_pipe.encode_prompt(caption)
    for row in (0, 2):
        torch.testing.assert_close(embeds[row], positive[0])
        torch.testing.assert_close(pooled[row], pooled_positive[0])
    for row in (1, 3):
        torch.testing.assert_close(embeds[row], negative[0])
        torch.testing.assert_close(pooled[row], pooled_negative[0])


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Files of 30 numbered rows each, one in ten a tie."""
    folder = tmp_path_factory.mktemp("numbers")
    for k in range(3):
        n = range(30 * k, 30 * k + 30)
        pd.DataFrame({"n": n, "label_0": [0.5 if i % 10 == 9 else 1.0 for i in n]}).to_parquet(folder / f"{k}.parquet")
    return folder


def stream(folder, files=3):
    names = [str(folder / f"{k}.parquet") for k in range(files)]
    return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)


def read_number(row):
    return {"n": row["n"]}


def keep_key(key):
    return {"key": key}


def number_pairs(folder, files=3, read=read_number, **options):
    options = {"seed": 0, "shuffle_buffer": 7, **options}
    return Pairs(stream(folder, files), read, keep_key, **options)


def take(pairs, n):
    return [(x["n"], x["key"]) for x in itertools.islice(pairs, n)]


def test_an_epoch_is_every_usable_pair_once_in_another_order_each_time(numbers):
    got = take(number_pairs(numbers), 162)
    usable = [i for i in range(90) if i % 10 != 9]
    first, second = [n for n, _ in got[:81]], [n for n, _ in got[81:]]
    assert sorted(first) == sorted(second) == usable and first != second and first != usable
    assert len({key for _, key in got}) == 162
    assert take(number_pairs(numbers, seed=1), 81) != got[:81]
    items = list(itertools.islice(number_pairs(numbers), 81))
    assert sum(x["ties"] for x in items) in (8, 9)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 1, "world": 2}, {"rank": 1, "world": 4}, {"limit": 20}, {"shuffle_buffer": 1}]
)
def test_the_stream_goes_on_exactly_where_it_was(numbers, options):
    whole = take(number_pairs(numbers, **options), 60)
    for stop in (1, 2, 6, 7, 8, 19, 26, 27, 28, 40):
        before = number_pairs(numbers, **options)
        head = take(before, stop)
        state = json.loads(json.dumps(before.state_dict()))
        after = number_pairs(numbers, **options)
        after.load_state_dict(state)
        assert head + take(after, 60 - stop) == whole, stop


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_goes_on_exactly_where_it_was(numbers, workers):
    def loader():
        return make_loader(number_pairs(numbers), 4, workers, torch.device("cpu"))

    first = loader()
    batches = iter(first)
    head = [next(batches)["n"].tolist() for _ in range(9)]
    state = json.loads(json.dumps(first.state_dict()))
    rest = [next(batches)["n"].tolist() for _ in range(21)]
    assert len({n for batch in head for n in batch}) == 36
    again = loader()
    again.load_state_dict(state)
    batches = iter(again)
    assert again.state_dict()  # asked for before the first batch, as a run does that is stopped at once
    assert [next(batches)["n"].tolist() for _ in range(21)] == rest


def test_processes_share_one_file_by_turns_and_several_files_as_they_are(numbers):
    alone = take(number_pairs(numbers, files=1), 54)
    two = [take(number_pairs(numbers, files=1, rank=r, world=2), 27) for r in (0, 1)]
    assert [x for both in zip(*two, strict=True) for x in both] == alone
    own = [{n for n, _ in take(number_pairs(numbers, rank=r, world=3), 27)} for r in range(3)]
    assert sorted(set.union(*own)) == [i for i in range(90) if i % 10 != 9] and not own[0] & own[1]


def test_unreadable_pairs_are_skipped_and_counted_and_the_rest_keeps_its_noise(numbers):
    whole = dict(take(number_pairs(numbers), 81))
    some = number_pairs(numbers, read=lambda row: None if row["n"] in (4, 40, 41) else {"n": row["n"]}, epochs=1)
    items = list(some)
    assert sum(x["unreadable"] for x in items) == 3 and len(items) == 78
    assert all(whole[x["n"]] == x["key"] for x in items)


def test_pictures_are_scaled_and_cut_about_their_centre():
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste((0, 0, 255), (100, 0, 200, 100))
    cut = read_picture(jpeg(picture), 64)
    assert cut.shape == (64, 64, 3) and (cut[..., 2] > 200).mean() > 0.95
    assert read_picture({"bytes": jpeg(picture), "path": None}, 8).shape == (8, 8, 3)
    assert read_pair({"winner": jpeg(picture)[:200], "loser": jpeg(picture), "caption": ""}, 8) is None


def test_random_draws_depend_on_their_key_alone():
    a, b, c = (random_draws(key, (4, 8, 8), 1000, 0.2) for key in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["noise"], c["noise"])
    many = [random_draws((7, i), (4, 8, 8), 1000, 0.2) for i in range(2000)]
    t = np.array([int(x["timestep"]) for x in many])
    assert t.min() >= 0 and t.max() <= 999 and abs(t.mean() - 499.5) < 4 * 288.7 / math.sqrt(2000)
    assert abs(np.mean([bool(x["drop_caption"]) for x in many]) - 0.2) < 0.04


# --------------------------------------------------------------------------------------------------------------- models


def predictions(unet, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(s, generator=g) for s in ((4, 4, 16, 16), (4, 77, 256), (4, 160)))
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]]).expand(4, -1)}
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return unet(x, torch.tensor([5, 300, 700, 990]), text, added_cond_kwargs=conditions).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_and_reference_agree_to_the_last_bit_before_training(demo_pipe, dtype):
    unet = UNet2DConditionModel.from_config(demo_pipe.unet.config)
    with torch.no_grad():
        for p in unet.parameters():  # weights that bf16 cannot hold, in the norms too
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    reference = training.make_reference(unet, dtype, torch.float32)
    assert torch.equal(predictions(unet, dtype), predictions(reference, dtype))
    assert not any(p.requires_grad for p in reference.parameters()) and all(p.requires_grad for p in unet.parameters())
    if dtype == torch.bfloat16:
        everything = training.make_reference(unet, dtype, torch.bfloat16)
        assert not torch.equal(predictions(unet, dtype), predictions(everything, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loras_reference_is_the_base_model(tiny, dtype):
    base = UNet2DConditionModel.from_pretrained(tiny / "unet").to(dtype)
    unet = UNet2DConditionModel.from_pretrained(tiny / "unet")
    training.add_lora(unet, 4, dtype)
    expected = predictions(base, torch.bfloat16)
    assert torch.equal(predictions(unet, torch.bfloat16), expected)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(predictions(unet, torch.bfloat16), expected)
    with training.base_model(unet, unet, None) as same_unet:
        assert torch.equal(predictions(same_unet, torch.bfloat16), expected)
    assert [p for p in unet.parameters() if p.requires_grad] == trained


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_a_step_at_the_default_learning_rate_moves_float32_weights_and_not_bf16_ones(tiny, optimizer):
    default = td.Settings(optimizer=optimizer)
    rate = default.learning_rate * default.effective_batch_size
    assert rate == pytest.approx(1.678e-5, rel=1e-3)
    moved = {}
    for dtype, lr in ((torch.float32, rate / default.lr_warmup_steps), (torch.float32, rate), (torch.bfloat16, rate)):
        unet = UNet2DConditionModel.from_pretrained(tiny / "unet").to(dtype)
        parameters = list(unet.parameters())
        before, step = training.probe(parameters), training.make_optimizer(default, parameters, lr)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        step.step()
        after = training.probe(parameters)
        changed = [(a != b).float().mean().item() for a, b in zip(before, after, strict=True) if len(a) > 64]
        moved[dtype, lr] = np.mean(changed)
    # In bf16 most steps are lost, even in a small model whose weights are larger than SDXL's.
    assert list(moved.values())[:2] > [0.9, 0.95] and list(moved.values())[2] < 0.5


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_all_its_results(train, tmp_path, tiny):
    code, out, err = train(
        "--output-dir", "out", "--max-train-steps", "5", "--validate-every", "5", "--keep-checkpoints", "2"
    )
    assert code == 0, err
    assert "effective batch 8 = 4 per device x 1 process x 2 accumulated" in out
    assert re.search(r"the first step, at learning rate 0.0005, moved \d\d", out)
    folder = tmp_path / "out"
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics.step.tolist() == [1, 2, 3, 4, 5] and metrics.loss[0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics.learning_rate.tolist() == [0.0005, 0.001, 0.001, 0.001, 0.001]
    assert (metrics.model_mse[0] == metrics.reference_mse[0]) and metrics.model_mse[4] != metrics.reference_mse[4]
    assert metrics.ties.iloc[-1] == 7 and metrics.unreadable.iloc[-1] == 2  # in an epoch and a part of the next
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-0000004", "step-0000005"]
    assert Image.open(folder / "loss.png").width > 500 and Image.open(folder / "validation/step-0000005.png").width > 500
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["beta_dpo"] == 5000 and settings["steps"] == 5 and settings["effective_learning_rate"] == 0.001
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "diffusion-dpo" in card and '--vae "" --dpo-unet out' in card
    assert list((folder / "tensorboard").rglob("events*"))
    start = UNet2DConditionModel.from_pretrained(tiny / "unet").state_dict()
    assert not same(weights(folder), start)


def test_accumulation_over_one_batch_or_eight_is_the_same_step(train, tmp_path):
    for size in (1, 8):
        flags = ("--max-train-steps", 3, "--train-batch-size", size, "--beta-dpo", "500")
        code, _, err = train("--output-dir", f"b{size}", *flags)
        assert code == 0, err
    one, eight = (pd.read_csv(tmp_path / f"b{size}/metrics.csv") for size in (1, 8))
    np.testing.assert_allclose(one[["loss", "model_mse"]], eight[["loss", "model_mse"]], rtol=1e-4, atol=1e-5)
    assert (one.loss - math.log(2)).abs().iloc[1:].min() > 1e-3  # the curves do something


@pytest.mark.parametrize("lora", [(), ("--lora-rank", "4")])
def test_two_processes_make_the_same_curve_as_one(train, tmp_path, tiny, readable_file, lora):
    lora = (*lora, "--beta-dpo", "500")  # at 5000 these large steps would magnify rounding
    assert train("--output-dir", "one", "--max-train-steps", 6, "--dataset", readable_file, *lora)[0] == 0
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    # Without an accelerator --device auto is the CPU too, where processes have to be told of each other.
    flags = ("--output-dir", tmp_path / "two", "--max-train-steps", 6, "--device", "auto", *lora)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launch + command(tiny, readable_file, *flags), capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "4 per device x 2 processes x 1 accumulated" in done.stdout
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    columns = ["loss", "implicit_accuracy", "model_mse", "reference_mse"]
    np.testing.assert_allclose(one[columns], two[columns], atol=1e-4)
    assert one.ties.tolist() == two.ties.tolist() and (one.loss - math.log(2)).abs().iloc[1:].min() > 1e-3


def test_sigterm_within_an_accumulation_leaves_a_checkpoint_and_nothing_is_lost(train, tmp_path, monkeypatch):
    flags = ("--max-train-steps", 5, "--checkpoint-every", 100)
    assert train("--output-dir", "whole", *flags)[0] == 0
    encode, calls = training.prepare_batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 7:  # the first batch of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(training, "prepare_batch", interrupted)
    code, _, err = train("--output-dir", "stopped", *flags)
    assert code == 143 and "--resume goes on" in err
    assert [p.name for p in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-0000003"]
    code, _, err = train("--output-dir", "stopped", *flags)
    assert code == 2 and "--resume goes on from it" in err
    code, _, err = train("--output-dir", "stopped", *flags, "--resume")
    assert code == 0 and same(weights(tmp_path / "whole"), weights(tmp_path / "stopped")), err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stop_within_the_first_step_and_the_ways_of_a_full_disk(train, tmp_path, monkeypatch):
    encode, save = training.prepare_batch, td.Accelerator.save_state

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return encode(*arguments)

    monkeypatch.setattr(training, "prepare_batch", interrupted)
    code, _, err = train("--output-dir", "out", "--max-train-steps", 2)
    assert code == 130 and "--resume goes on" in err and "Traceback" not in err
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-0000000"]

    monkeypatch.setattr(training, "prepare_batch", encode)
    for error in (
        SafetensorError("Error while serializing: No space left on device"),
        OSError(28, "No space left on device"),
    ):

        def full(*_, error=error):
            raise error

        monkeypatch.setattr(td.Accelerator, "save_state", full)
        code, _, err = train("--output-dir", "out", "--max-train-steps", 2, "--resume")
        assert code == 2 and "the disk is full; checkpoints are whole" in err and "Traceback" not in err
    monkeypatch.setattr(td.Accelerator, "save_state", save)
    assert train("--output-dir", "out", "--max-train-steps", 2, "--resume")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == ["step-0000000", "step-0000002"]
    assert train("--output-dir", "whole", "--max-train-steps", 2)[0] == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(train, tmp_path, damage):
    flags = ("--output-dir", "out", "--max-train-steps", 4)
    assert train(*flags)[0] == 0
    expected = weights(tmp_path / "out")
    last = tmp_path / "out/checkpoints/step-0000004"
    file = last / "model.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        os.truncate(file, 1000)
    elif damage == "missing":
        (last / "optimizer.bin").unlink()
    else:
        (last / "checksums.json").write_text("{")
    shutil.rmtree(tmp_path / "out/unet")
    code, out, err = train(*flags, "--resume")
    assert code == 0 and "step-0000004 is damaged" in err and "going on from out/checkpoints/step-0000002" in out
    assert same(weights(tmp_path / "out"), expected)
    assert checkpoints.find_checkpoint(tmp_path / "out") == last


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "model.safetensors", "custom_checkpoint_0.pkl"])
def test_a_malicious_checkpoint_is_refused(train, tmp_path, name):
    """A checkpoint of other people's, with checksums that fit: its pickles are read as weights, and no code runs."""

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'harm'}",))

    assert train("--output-dir", "out", "--max-train-steps", 2)[0] == 0
    folder = tmp_path / "out/checkpoints/step-0000002"
    assert name.startswith("custom") or (folder / name).exists()
    torch.save({"state": Evil(), "step": Evil()}, folder / name)
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps(sums | {name: checkpoints.checksum(folder / name)}))
    code, _, err = train("--output-dir", "out", "--max-train-steps", 3, "--resume")
    assert not (tmp_path / "harm").exists()
    assert "Traceback" not in err and (code == 0 or (code == 2 and "checkpoints/step-0000002 cannot be loaded" in err))
    assert code == 2 or name.startswith(("random", "custom"))


def test_a_cache_in_the_making_is_one_runs(train, tmp_path):
    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache/.lock"):
        code, _, err = train("--output-dir", "out", "--max-train-steps", 1, "--cache-dir", "cache")
        assert code == 2 and "--cache-dir cache: another run is writing there" in err
    assert train("--output-dir", "out", "--max-train-steps", 1, "--cache-dir", "cache")[0] == 0
    with FileLock(tmp_path / "cache/.lock"):
        assert train("--output-dir", "other", "--max-train-steps", 1, "--cache-dir", "cache")[0] == 0
    (tmp_path / "file").touch()
    code, _, err = train("--output-dir", "third", "--max-train-steps", 1, "--cache-dir", "file/cache")
    assert code == 2 and "--cache-dir file/cache: cannot be written to" in err


def test_a_cache_gives_what_streaming_gives(train, tmp_path, readable_file):
    flags = ("--max-train-steps", 6, "--dataset", readable_file, "--beta-dpo", "500")
    assert train("--output-dir", "streamed", *flags)[0] == 0
    code, _, err = train("--output-dir", "cached", *flags, "--cache-dir", "cache")
    assert code == 0, err
    streamed, cached = (pd.read_csv(tmp_path / f"{name}/metrics.csv") for name in ("streamed", "cached"))
    columns = ["loss", "model_mse", "reference_mse"]
    np.testing.assert_allclose(streamed[columns], cached[columns], atol=1e-4)
    assert (streamed.loss - math.log(2)).abs().iloc[1:].min() > 1e-3
    readable_file.rename(tmp_path / "away.parquet")  # a finished cache needs the data set no more
    try:
        code, _, err = train("--output-dir", "again", *flags, "--cache-dir", "cache")
    finally:
        (tmp_path / "away.parquet").rename(readable_file)
    assert code == 0 and same(weights(tmp_path / "cached"), weights(tmp_path / "again")), err


def test_a_cache_is_finished_after_a_stop_and_refused_for_other_settings(train, tmp_path, monkeypatch):
    assert train("--output-dir", "whole", "--max-train-steps", 1, "--cache-dir", "cache")[0] == 0
    note = json.loads((tmp_path / "cache/cache.json").read_text())
    assert note["complete"] and note["counts"] == {"pairs": 34, "ties": 5, "unreadable": 1}
    monkeypatch.setattr(cache, "CACHE_SHARD", 8)
    encode, calls = cache.encode_pictures, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(cache, "encode_pictures", interrupted)
    flags = ("--output-dir", "again", "--max-train-steps", 1, "--cache-dir", "cache2")
    assert train(*flags)[0] == 130
    shards = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache2").glob("*.parquet")}
    assert len(shards) == 2
    assert train(*flags)[0] == 0
    assert all((tmp_path / "cache2" / name).stat().st_mtime_ns == t for name, t in shards.items())
    assert json.loads((tmp_path / "cache2/cache.json").read_text())["counts"] == note["counts"]
    whole, parts = (
        pd.concat(pd.read_parquet(p) for p in sorted((tmp_path / name).glob("*.parquet"))) for name in ("cache", "cache2")
    )
    assert whole.prompt_embeds.tolist() == parts.prompt_embeds.tolist() and whole.moments.tolist() == parts.moments.tolist()
    code, _, err = train(*flags, "--output-dir", "other", "--max-train-pairs", 9)
    assert code == 2 and "made with max_train_pairs None, not 9" in err


def test_training_on_a_folder_of_pictures(train, tmp_path):
    """And what a way of pairing that is not there says."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i, row in enumerate(make_rows(8, seed=1)):
        for k in ("jpg_0", "jpg_1"):
            (folder / f"{i}-{k}.jpg").write_bytes(row[k])
        rows.append({"prompt": row["caption"], "chosen": f"{i}-jpg_0.jpg", "rejected": f"{i}-jpg_1.jpg"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = train("--output-dir", "out", "--max-train-steps", 1, "--dataset", folder)
    assert code == 0 and "1 steps, 0 ties and 1 unreadable pairs left out" in out, err
    code, _, err = train("--output-dir", "other", "--dataset", folder, "--ranked-pairs", "some")
    assert code == 2 and "'all', 'best-worst'" in err


def test_first_pairs_only(train, tmp_path, readable_file):
    flags = ("--max-train-steps", 4, "--max-train-pairs", 8, "--dataset", readable_file)
    code, _, err = train("--output-dir", "out", *flags)
    assert code == 0, err
    metrics = pd.read_csv(tmp_path / "out/metrics.csv")
    assert metrics.ties.tolist() == [1, 2, 3, 4]  # the same nine rows in each epoch of one step


@pytest.mark.parametrize("flags", [(), ("--dpo-unet", "assets/demo/sdxl/unet")])
def test_a_lora_loads_in_diffusers_and_in_hasty_sample(train, run, tmp_path, tiny, flags):
    code, _, err = train("--output-dir", "lora", "--max-train-steps", 4, "--lora-rank", 4, "--learning-rate", "0.05")
    assert code == 0, err
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").stat().st_size < 2e6 and not (
        tmp_path / "lora/unet"
    ).exists()
    assert max(p.stat().st_size for p in (tmp_path / "lora/checkpoints").rglob("*")) < 4e6
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny, add_watermarker=False)
    base = predictions(pipe.unet)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    trained = predictions(pipe.unet)
    assert (trained - base).abs().max() > 1e-2
    if flags:  # the demo's UNet is of another size
        code, _, err = run("hasty_sample", "--base-model", tiny, "--vae", "", "--dpo-lora", "lora", "--limit", 1, *flags)
        assert code == 2 and "--dpo-lora lora: cannot be loaded" in err
        return
    import hasty_sample as hs

    settings = hs.Settings(base_model=str(tiny), vae="", dpo_unet="", dpo_lora=str(tmp_path / "lora"))
    merged = hs.load_pipeline(settings, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(predictions(merged.unet), trained, atol=2e-4, rtol=1e-4)
    few = ("--base-model", tiny, "--vae", "", "--limit", 1, "--num-inference-steps", 2, "--device", "cpu")
    for name, lora in (("with", ("--dpo-lora", "lora")), ("without", ("--dpo-unet", ""))):
        code, _, err = run("hasty_sample", *few, "--output-dir", name, *lora)
        assert code == 0, err
    a, b = (Image.open(tmp_path / name / "00000.png") for name in ("with", "without"))
    assert np.asarray(a).tobytes() != np.asarray(b).tobytes() and "Lora" in a.info["parameters"]
    code, _, err = run("hasty_sample", *few, "--output-dir", "with", "--dpo-unet", "")
    assert code == 2 and "00000.png was made with" in err


def test_a_lora_run_resumes_exactly(train, tmp_path):
    from safetensors.torch import load_file

    flags = ("--lora-rank", 4, "--optimizer", "adafactor", "--learning-rate", "0.01")
    assert train("--output-dir", "whole", "--max-train-steps", 6, *flags)[0] == 0
    assert train("--output-dir", "parts", "--max-train-steps", 3, *flags)[0] == 0
    assert train("--output-dir", "parts", "--max-train-steps", 6, *flags, "--resume")[0] == 0
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "parts"))
    assert same(a, b)


def test_bf16_compute_over_float32_weights(train, tmp_path):
    code, _, err = train(
        "--output-dir", "out", "--max-train-steps", 2, "--mixed-precision", "bf16", "--gradient-checkpointing"
    )
    assert code == 0, err
    metrics = pd.read_csv(tmp_path / "out/metrics.csv")
    assert metrics.loss[0] == pytest.approx(math.log(2), abs=1e-6) and metrics.model_mse[0] == metrics.reference_mse[0]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out/checkpoints/step-0000002/model.safetensors")
    assert all(v.dtype == torch.float32 for v in saved.values())


# -------------------------------------------------------------------------------------------------- runs that go wrong


def broken_loss(monkeypatch, calls_that_fail):
    loss, calls = td.dpo_loss, itertools.count(1)

    def broken(*arguments):
        value, *rest = loss(*arguments)
        return value * (float("nan") if next(calls) in calls_that_fail else 1), *rest

    monkeypatch.setattr(td, "dpo_loss", broken)


def test_a_non_finite_step_is_skipped_and_counted(train, tmp_path, monkeypatch):
    broken_loss(monkeypatch, {4, 5})
    code, out, err = train("--output-dir", "out", "--max-train-steps", 4, "--checkpoint-every", 1, "--keep-checkpoints", 9)
    assert code == 0, err
    assert "step 2: loss or gradient is not finite" in out and "2 steps skipped" in out
    assert pd.read_csv(tmp_path / "out/metrics.csv").skipped.tolist() == [0, 1, 2, 2]
    from safetensors.torch import load_file

    states = [load_file(tmp_path / f"out/checkpoints/step-000000{k}/model.safetensors") for k in (1, 2, 3, 4)]
    assert same(states[0], states[1]) and same(states[1], states[2]) and not same(states[2], states[3])
    assert all(torch.isfinite(v).all() for v in states[3].values())


def test_ten_non_finite_steps_in_a_row_stop_the_run(train, tmp_path, monkeypatch):
    broken_loss(monkeypatch, set(range(5, 100)))
    code, _, err = train("--output-dir", "out", "--max-train-steps", 40, "--checkpoint-every", 100)
    assert code == 2 and "not finite in 10 steps in a row" in err and "Traceback" not in err
    assert len(pd.read_csv(tmp_path / "out/metrics.csv")) == 12


def test_a_drifting_model_stops_the_run_with_a_checkpoint(train, tmp_path):
    flags = ("--output-dir", "out", "--max-train-steps", 60, "--checkpoint-every", 100, "--learning-rate", "0.05")
    code, _, err = train(*flags, "--max-mse-ratio", "1.5")
    assert code == 2 and "exceeds 1.5 times the reference's" in err and "Traceback" not in err
    assert len(list((tmp_path / "out/checkpoints").iterdir())) == 1


def test_a_rate_that_moves_nothing_is_an_error(train):
    code, _, err = train("--output-dir", "out", "--learning-rate", "1e-30", "--max-train-steps", 2)
    assert code == 2 and "no weight moved in the first step" in err


def test_a_reference_that_differs_from_the_start_is_an_error(train, monkeypatch):
    make = training.make_reference

    def other(*arguments, **options):
        reference = make(*arguments, **options)
        reference.conv_out.bias.data += 0.3
        return reference

    monkeypatch.setattr(training, "make_reference", other)
    code, _, err = train("--output-dir", "out", "--max-train-steps", 2)
    assert code == 2 and "model and reference differ before training" in err


def bad_dataset(folder, kind):
    path = folder / f"{kind}.parquet"
    table = pd.DataFrame(make_rows(8))
    if kind == "column":
        table = table.drop(columns="label_0")
    elif kind == "ties":
        table.label_0 = 0.5
    elif kind == "unreadable":
        table.jpg_0 = b"x"
    if kind == "text":
        path.write_text("no parquet")
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("column", "are none of those known: jpg_0, jpg_1, label_0, caption; "),
        ("ties", "no usable pair in it"),
        ("unreadable", "no usable pair in it"),
        ("text", "cannot be loaded"),
    ],
)
def test_bad_data_end_with_one_line(train, tmp_path, kind, said):
    code, _, err = train("--output-dir", "out", "--max-train-steps", 1, "--dataset", bad_dataset(tmp_path, kind))
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err
    assert not (tmp_path / "out/metrics.csv").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dataset", "no such thing"), "no such file or folder"),
        (("--dataset", "nobody/nothing"), "nobody/nothing: cannot be loaded"),
        (("--base-model", "nobody/nothing"), "--base-model nobody/nothing: cannot be loaded"),
        (("--effective-batch-size", "10", "--train-batch-size", "4"), "use 8 or 12, or --train-batch-size 2 or 5"),
        (("--effective-batch-size", "3", "--train-batch-size", "4"), "use 4, or --train-batch-size 1 or 3"),
        (("--output-dir", "file"), "--output-dir file: cannot be written to"),
        (("--cache-dir", "file"), "--cache-dir file: cannot be written to"),
        (("--weight-decay", "-1"), "--weight-decay -1.0: use 0 or more"),
        (("--validation-prompts", "nothing.txt"), "--validation-prompts nothing.txt: no such file or folder"),
        (("--resolution", "60"), "must be a multiple of 16"),
        (("--beta-dpo", "0"), "use a finite number above 0"),
        (("--caption-dropout", "1"), "use 0 (every pair with its caption)"),
        (("--optimizer", "sgd"), "'adafactor', 'adamw'"),
        (("--mixed-precision", "fp16"), "needs a CUDA GPU"),
        (("--max-train-steps", "0"), "use 1 or more"),
        (("--max-train-steps", "many"), "max-train-steps"),
        (("--wandb",), "pip install wandb"),
    ],
)
def test_bad_settings_end_with_one_line(train, tmp_path, flags, said):
    (tmp_path / "file").write_text("")
    code, _, err = train("--output-dir", "out", "--max-train-steps", 1, *flags)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err, err


def test_a_resumed_run_keeps_what_cannot_change_and_names_what_did(train):
    assert train("--output-dir", "out", "--max-train-steps", 2)[0] == 0
    code, _, err = train("--output-dir", "out", "--max-train-steps", 4, "--resume", "--seed", "1")
    assert code == 2 and "made with seed 0, this run has 1" in err
    code, out, err = train("--output-dir", "out", "--max-train-steps", 4, "--resume", "--beta-dpo", "2000")
    assert code == 0 and "beta_dpo is 2000.0 from here on; it was 5000.0" in out, err


def test_the_defaults_are_the_papers():
    s = td.Settings()
    assert (s.effective_batch_size, s.learning_rate, s.scale_lr, s.beta_dpo) == (2048, 8.192e-9, True, 5000)
    assert (s.max_train_steps, s.lr_warmup_steps, s.dataset) == (1000, 200, "yuvalkirstain/pickapic_v2")
    assert s.base_model == "stabilityai/stable-diffusion-xl-base-1.0" and training.accumulation_steps(2048, 4, 8) == 64


def test_demo_settings_fill_in_where_nothing_was_given():
    s = td.complete(td.Settings(demo=True, beta_dpo=123.0, output_dir="mine"))
    assert s.beta_dpo == 123 and s.dataset == td.DEMO["dataset"] and s.cache_dir == "mine/cache"
    assert s.max_train_steps == td.DEMO["max_train_steps"]


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")])
def test_the_launch_configurations_are_accelerates(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"configs/{name}.yaml"))
    assert config.distributed_type == kind and config.mixed_precision == "bf16"


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--lora-rank", "4")])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_gpu(train, tmp_path, precision, flags):
    flags = ("--device", "auto", "--mixed-precision", precision, "--num-workers", 1, "--learning-rate", "1e-4", *flags)
    code, _, err = train("--output-dir", "out", "--max-train-steps", 6, *flags)
    assert code == 0, err
    metrics = pd.read_csv(tmp_path / "out/metrics.csv")
    assert metrics.loss[0] == pytest.approx(math.log(2), abs=1e-4) and np.isfinite(metrics.loss).all()
    assert (metrics.loss - math.log(2)).abs().iloc[-1] > 1e-4
