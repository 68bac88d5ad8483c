"""train_dipo.py: the loss, the data, resuming, and every way in which a run can go wrong, on a tiny SDXL."""

import collections
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import world
import yaml
from conftest import ROOT
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from filelock import FileLock
from helpers import start_two
from PIL import Image
from safetensors import SafetensorError

import train_dipo as td
from dipo import cache, checkpoints, training
from dipo.cli import UserError
from dipo.pairs import Pairs, make_loader, next_row, random_draws, read_pair, read_pixels
from dipo.schemas import open_dataset, pairs_of


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
        return run("train_dipo", "--base-model", tiny, "--dataset", pairs_file, *FLAGS, *flags)

    return call


def command(tiny, pairs_file, *flags):
    return [str(ROOT / "train_dipo.py"), "--base-model", str(tiny), "--dataset", str(pairs_file), *FLAGS, *map(str, flags)]


def weights(folder):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    return {k: v.clone() for k, v in unet.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------------------------- data


def test_the_winner_comes_first_whatever_its_column_and_ties_are_dropped(tmp_path):
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    labels = [1.0, 0.0, 0.5, 1.0, 0.0, None]
    rows = [{"jpg_0": jpeg(red), "jpg_1": jpeg(blue), "caption": f"{i}", "label_0": v} for i, v in enumerate(labels)]
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    stream = open_dataset(str(tmp_path))
    find = pairs_of(stream, str(tmp_path))
    pairs = Pairs(stream, find, lambda row: read_pair(row, 32), lambda key: {}, 0, 1)
    visits, ties, _ = next(pairs.batches(4))
    items = [pairs.item(*x) for x in visits]
    assert [x["caption"] for x in items] == ["0", "1", "3", "4"]
    for x, label in zip(items, [1, 0, 1, 0], strict=True):
        assert x["pixels"].shape == (2, 32, 32, 3)
        winner, loser = x["pixels"][0, 16, 16], x["pixels"][1, 16, 16]
        assert (winner[0] > 200) == bool(label) and (loser[0] > 200) != bool(label)
    assert ties == 2


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


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """numbers(k): a stream of the first k of 16 files of 30 numbered rows each, in groups of 7, one in ten a tie."""
    folder = tmp_path_factory.mktemp("numbers")
    names = [str(folder / f"{k:02d}.parquet") for k in range(16)]
    for k, name in enumerate(names):
        n = range(30 * k, 30 * k + 30)
        table = pd.DataFrame({"n": n, "label_0": [0.5 if i % 10 == 9 else 1.0 for i in n]})
        table.to_parquet(name, row_group_size=7)
    load = functools.partial(datasets.load_dataset, "parquet", split="train", streaming=True)
    return functools.cache(lambda files: load(data_files=names[:files]))


def several(row):
    """Up to three pairs of a row, and a tie in every third."""
    return [{"n": 1000 * k + row["n"]} for k in range(row["n"] % 4)], int(row["n"] % 3 == 0)


def read_number(row):
    return {"n": row["n"]}


def by_label(row):
    """A row with a winner as its only pair."""
    return ([row], 0) if row["label_0"] in (0, 1) else ([], 1)


def take(rows, n, batch=1, world=1, workers=0, positions=None, of=by_label, read=read_number, buffer=7, **options):
    """The next n pairs of all processes together, as (n, key), how many were left out, and the positions behind them."""
    got, left_out, behind = [collections.deque() for _ in range(world)], np.zeros(2, int), []
    for rank in range(world):
        draws = lambda key: {"key": torch.tensor(key)}  # noqa: E731
        pairs = Pairs(rows, of, read, draws, seed=3, shuffle_buffer=buffer, rank=rank, world=world, **options)
        if positions:
            pairs.load(json.loads(json.dumps(positions)))
        first = pairs.position["pairs"]
        with contextlib.closing(make_loader(pairs, batch, workers, CPU)) as loader:
            for x, position in itertools.islice(loader, n // (batch * world)):  # noqa: B007
                got[rank] += zip(x["n"].tolist(), map(tuple, x["key"].tolist()), strict=True)
                left_out += [x["ties"], x["unreadable"].sum()]
        behind.append(position)
    return [got[i % world].popleft() for i in range(first, first + n)], left_out.tolist(), behind


def plain_order(rows, n, count, size, of=by_label, limit=None, shuffled=True):
    """The first n pairs and their keys, from lists."""

    def lane(k):
        files = rows.shard(count, k, contiguous=False)
        for epoch in itertools.count():
            files.set_epoch(epoch)  # which gives the files another order
            blocks, first = [[]], 0
            for pairs in [of(row)[0] for row in files]:
                blocks += [[]] if len(blocks[-1]) >= size else []
                blocks[-1] += [x["n"] for x in pairs]
                if limit and sum(map(len, blocks)) >= limit:
                    blocks[-1] = blocks[-1][: limit - sum(map(len, blocks[:-1]))]
                    break
            for number, block in enumerate(blocks):
                order = np.random.default_rng([3, epoch, 0, number]).permutation(len(block))
                for j in range(len(block)):
                    yield block[order[j] if shuffled else j], (3, epoch, k, 0, first + j)
                first += len(block)

    lanes = [lane(k) for k in range(count)]
    return [next(lanes[i % count]) for i in range(n)]


@pytest.mark.parametrize(
    ("files", "count", "size", "options"),
    [
        (1, 1, 16, {}),
        (1, 1, 20, {"buffer": 20, "of": several}),
        (3, 1, 16, {"buffer": 1}),
        (3, 1, 16, {"limit": 20}),
        (3, 1, 16, {"limit": 32, "of": several}),
        (4, 4, 25, {"buffer": 100}),
        (4, 4, 16, {"of": several}),
        (11, 1, 50, {"buffer": 50}),
        (12, 4, 16, {"buffer": 1}),
        (16, 8, 16, {}),
    ],
)
def test_the_order_is_the_same_for_any_number_of_processes(numbers, files, count, size, options):
    n = 240 if files < 4 else 720
    expected = {k: v for k, v in options.items() if k != "buffer"} | {"shuffled": options.get("buffer") != 1}
    order, left_out, _ = take(numbers(files), n, batch=24, **options)
    assert order == plain_order(numbers(files), n, count, size, **expected)
    assert len({key for _, key in order}) == n and left_out[0] > 0
    for processes in (2, 3, 4, 8):
        got, ties, _ = take(numbers(files), n, 24 // processes, processes, **options)
        assert got == order and ties == left_out, processes


def test_an_epoch_is_every_usable_pair_once_in_another_order_each_time(numbers):
    order, (ties, _), _ = take(numbers(3), 162)
    first, second = ([n for n, _ in order[k : k + 81]] for k in (0, 81))
    assert sorted(first) == sorted(second) == [i for i in range(90) if i % 10 != 9] and first != second and ties == 18
    order, (ties, _), _ = take(numbers(16), 432)
    assert sorted(n for n, _ in order) == [i for i in range(480) if i % 10 != 9] and ties == 48
    _, (ties, _), _ = take(numbers(1), 33, of=lambda row: ([row], 0) if row["n"] < 16 else ([], 1))
    assert ties == 28  # those that lie behind the last block of the first and of the second epoch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("files", "options"), [(1, {}), (3, {"buffer": 1}), (3, {"limit": 20}), (4, {"of": several}), (16, {"buffer": 200})]
)
def test_three_resumes_in_a_row_on_other_numbers_of_processes(numbers, files, options, workers):
    """After 15, 31 and 52 pairs: within row groups, within blocks, between rounds of the lanes."""
    whole, left_out, _ = take(numbers(files), 120, **options)
    got, counts, positions = [], np.zeros(2, int), None
    for processes, batch, batches in ((1, 3, 5), (2, 4, 2), (3, 1, 7), (4, 1, 3), (1, 4, 14)):
        n = processes * batch * batches
        more, ties, positions = take(numbers(files), n, batch, processes, workers, positions, **options)
        got, counts = got + more, counts + ties
    assert got == whole and counts.tolist() == left_out


@pytest.mark.parametrize("options", [{}, {"buffer": 1}, {"limit": 20}, {"of": several}])
def test_the_stream_goes_on_from_every_place(numbers, options):
    whole, (ties, _), _ = take(numbers(1), 60, **options)
    for stop in range(1, 60):
        head, (before, _), positions = take(numbers(1), stop, **options)
        rest, (after, _), _ = take(numbers(1), 60 - stop, positions=positions, **options)
        assert head + rest == whole and before + after == ties, stop


def test_what_an_older_version_left_goes_on(numbers):
    """The state of torchdata's loader, of one process without data workers."""
    state = {"epoch": 0, "before": 0, "rows": None, "block": 0, "first": 0, "next": 8, "ties": 0, "unreadable": 0}
    order = np.random.default_rng([3, 0, 0, 0]).permutation(20)
    left = [([0, *range(1, 9), *range(10, 19), 20, 21])[k] for k in order][8:]
    for processes in (1, 2):
        got, _, _ = take(numbers(1), 12, world=processes, positions=[{"dataset_state": state}], buffer=20)
        assert got == [(n, (3, 0, 0, 0, 8 + j)) for j, n in enumerate(left)]
    for states in ([{"dataset_state": state}] * 2, [{"_snapshot": {}}]):
        with pytest.raises(UserError, match="several processes or data workers of an older version"):
            take(numbers(1), 1, positions=states)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_one_before_takes_the_place_of_an_unreadable_pair(numbers, workers):
    whole, _, _ = take(numbers(3), 81)
    block, bad = [n for n, _ in whole[:16]], {whole[0][0], whole[4][0], whole[5][0], 40}
    read = lambda row: None if row["n"] in bad else {"n": row["n"]}  # noqa: E731
    for processes in (1, 3):
        order, (_, unreadable), _ = take(numbers(3), 81, 9, processes, workers, read=read)
        assert unreadable == 4 and [key for _, key in order] == [key for _, key in whole]
        assert [n for n, _ in order[:16]] == [block[-1], *block[1:4], block[3], block[3], *block[6:]]
        assert sum(a != b for a, b in zip(order, whole, strict=True)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_cannot_be_used_are_told_and_no_thread_stays(numbers, workers):
    threads = threading.active_count()
    with pytest.raises(UserError, match="no picture can be read in 16 pairs in a row"):
        take(numbers(3), 30, 4, workers=workers, read=lambda row: None if 16 < row["n"] < 50 else {"n": row["n"]})
    with pytest.raises(UserError, match="no pair with a winner in file 3 of each 4"):
        take(numbers(4), 40, 4, workers=workers, of=lambda row: ([row], 0) if row["n"] // 30 != 2 else ([], 1))
    assert threading.active_count() == threads


def test_pictures_are_scaled_and_cut_about_their_centre():
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste((0, 0, 255), (100, 0, 200, 100))
    pair = {"winner": jpeg(picture), "loser": {"bytes": jpeg(picture), "path": None}}
    cut = read_pixels(pair, 64)[0]
    assert cut.shape == (64, 64, 3) and (cut[..., 2] > 200).mean() > 0.95
    assert read_pixels(pair, 8).shape == (2, 8, 8, 3)
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
    training.add_lora(td.Settings(lora_rank=4), unet, dtype)
    expected = predictions(base, torch.bfloat16)
    assert torch.equal(predictions(unet, torch.bfloat16), expected)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(predictions(unet, torch.bfloat16), expected)
    with training.base_model(td.Accelerator(cpu=True), unet, unet, None) as same_unet:
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


@pytest.mark.parametrize("kind", ["streamed", "LoRA, cached"])
def test_one_then_two_then_one_process_make_the_curve_of_one(train, tmp_path, tiny, kind):
    """Two lanes, ties and a picture that cannot be read in them."""
    (tmp_path / "data").mkdir()
    for k in range(2):
        pd.DataFrame(make_rows(20, seed=k)).to_parquet(tmp_path / f"data/{k}.parquet")
    flags = ("--dataset", tmp_path / "data", "--beta-dpo", "500")  # at 5000 these large steps would magnify rounding
    caches = [()] * 2
    if kind != "streamed":
        flags, caches = (*flags, "--lora-rank", "4"), [("--cache-dir", tmp_path / f"cache{k}") for k in range(2)]
    assert train("--output-dir", "one", "--max-train-steps", 6, *flags, *caches[0])[0] == 0
    flags = (*flags, "--output-dir", tmp_path / "parts")
    assert train(*flags, "--max-train-steps", 2, *caches[0])[0] == 0
    # Without an accelerator --device auto is the CPU too, where processes have to be told of each other.
    more = ("--max-train-steps", 4, "--device", "auto", "--num-workers", 2, "--resume")
    done = start_two("train_dipo", "--base-model", tiny, *FLAGS, *flags, *more, *caches[1], cwd=tmp_path)
    assert done.returncode == 0 and "4 per device x 2 processes x 1 accumulated" in done.stdout, done.stderr
    code, out, err = train(*flags, "--max-train-steps", 6, "--train-batch-size", 2, "--resume", *caches[0])
    assert code == 0 and "train_batch_size is 2 from here on" in out, err
    one, parts = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("one", "parts"))
    columns = ["loss", "implicit_accuracy", "model_mse", "reference_mse", "ties", "unreadable"]
    np.testing.assert_allclose(one[columns], parts[columns], atol=1e-4)
    assert (one.loss - math.log(2)).abs().iloc[1:].median() > 1e-3 and one.ties.iloc[-1] > 4 and one.unreadable.iloc[-1] > 1
    assert json.loads((tmp_path / "parts/checkpoints/step-0000004/progress.json").read_text())["processes"] == 2


def test_sigterm_within_an_accumulation_leaves_a_checkpoint_and_nothing_is_lost(train, tmp_path, monkeypatch):
    flags = ("--max-train-steps", 5, "--checkpoint-every", 100)
    assert train("--output-dir", "whole", *flags)[0] == 0
    encode, calls, threads = training.prepare_batch, [], threading.active_count()

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 7:  # the first batch of the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments)

    monkeypatch.setattr(training, "prepare_batch", interrupted)
    code, _, err = train("--output-dir", "stopped", *flags, "--num-workers", 2)
    assert code == 143 and threading.active_count() == threads and "--resume goes on" in err
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
    # An older version's names. A finished cache needs the data set no more.
    (tmp_path / "cache/000000.parquet").rename(tmp_path / "cache/0000-000000.parquet")
    note = json.loads((tmp_path / "cache/cache.json").read_text())
    (tmp_path / "cache/cache.json").write_text(json.dumps(note | {"processes": 2}))
    readable_file.rename(tmp_path / "away.parquet")
    try:
        code, _, err = train("--output-dir", "again", *flags, "--cache-dir", "cache")
    finally:
        (tmp_path / "away.parquet").rename(readable_file)
    assert code == 0 and same(weights(tmp_path / "cached"), weights(tmp_path / "again")), err


def test_a_cache_is_finished_by_any_number_of_processes_and_refused_for_other_settings(train, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_SHARD", 8)
    flags = ("--output-dir", "out", "--max-train-steps", 1, "--cache-dir", "cache", "--no-flip")
    assert train(*flags)[0] == 0
    note, folder = json.loads((tmp_path / "cache/cache.json").read_text()), tmp_path / "cache"
    assert note["complete"] and note["counts"] == {"pairs": 34, "ties": 5, "unreadable": 1}
    whole = {p.name: p.read_bytes() for p in sorted(folder.glob("*.parquet"))}
    assert list(whole) == [f"{k:06d}.parquet" for k in range(5)]
    encode_all, write_shard, killed = cache.encode_all, cache.write_shard, []

    def by(ranks, world, s, rows, find, pipe, accelerator, resolution):
        for rank in ranks:
            encode_all(s, rows, find, pipe, SimpleNamespace(process_index=rank, num_processes=world), resolution)

    def stopped(path, *rest):
        if path.name == "000002.parquet" and not killed:
            killed.append(path)
            raise KeyboardInterrupt
        write_shard(path, *rest)

    monkeypatch.setattr(cache, "write_shard", stopped)
    for ranks, n, lost in (((1, 0), 2, range(5)), ((0,), 1, ()), ((2, 0, 1), 3, (1, 4))):
        begun = json.dumps({k: v for k, v in note.items() if k not in ("complete", "shapes", "counts")})
        (folder / "cache.json").write_text(begun)
        for k in lost:
            (folder / f"{k:06d}.parquet").unlink()
        monkeypatch.setattr(cache, "encode_all", functools.partial(by, ranks, n))
        before = {p: p.stat().st_mtime_ns for p in folder.glob("*.parquet")}
        assert train(*flags, "--output-dir", f"{n}")[0] == (130 if n == 2 else 0)
        assert all(p.stat().st_mtime_ns == t for p, t in before.items())
        there = {p.name: p.read_bytes() for p in sorted(folder.glob("*.parquet"))}
        assert list(there) == [name for k, name in enumerate(whole) if n != 2 or k in (0, 1, 3)]
        assert there.items() <= whole.items()
    assert json.loads((folder / "cache.json").read_text()) == note
    code, _, err = train(*flags, "--output-dir", "other", "--max-train-pairs", 9)
    assert code == 2 and "made with max_train_pairs None, not 9" in err
    for flag, value in (("ranked_pairs", "best-worst"), ("dataset_split", "test")):
        code, _, err = train(*flags, "--output-dir", "other", f"--{flag.replace('_', '-')}", value)
        assert code == 2 and f"--cache-dir cache: made with {flag} " in err and f"not {value!r}" in err
    # One of a version that had none of these settings is of all pairs of train, by their labels, not mirrored.
    note = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({k: v for k, v in note.items() if k not in cache.ONLY_SETTINGS}))
    assert train(*flags, "--output-dir", "older", "--max-train-steps", 1)[0] == 0
    (folder / "cache.json").write_text(begun.replace("{", '{"processes": 1, ', 1))
    code, _, err = train(*flags, "--output-dir", "other")
    assert code == 2 and "an older version did not finish it" in err


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
        assert code == 2 and "--dpo-lora lora: nothing of it fits the UNet; " in err
        return
    import hasty_sample as hs

    settings = hs.Settings(base_model=str(tiny), vae="", dpo_unet="", dpo_lora=(str(tmp_path / "lora"),))
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
    loss, calls = td.preference_loss, itertools.count(1)

    def broken(*arguments):
        value, *rest = loss(*arguments)
        return value * (float("nan") if next(calls) in calls_that_fail else 1), *rest

    monkeypatch.setattr(td, "preference_loss", broken)


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
    assert code == 2 and "no weight moved at learning rate" in err


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
        ("text", "is no whole parquet file"),
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
        (("--effective-batch-size", "10", "--train-batch-size", "4"), "no multiple of 4 pairs per device x 1 processes"),
        (("--effective-batch-size", "3", "--train-batch-size", "4"), "use one, or another --train-batch-size"),
        (("--output-dir", "file"), "--output-dir file: cannot be written to"),
        (("--output-dir", ""), "--output-dir is empty: give a folder"),
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
    s = td.complete(td.Settings())
    assert (s.effective_batch_size, s.learning_rate, s.scale_lr, s.beta_dpo) == (2048, 8.192e-9, True, 5000)
    assert (s.max_train_steps, s.lr_warmup_steps, s.dataset) == (1000, 200, "yuvalkirstain/pickapic_v2")
    assert s.base_model == "stabilityai/stable-diffusion-xl-base-1.0" and training.accumulation_steps(2048, 4, 8) == 64


def test_a_cache_folder_that_holds_data_is_left_as_it_is(train, pairs_file, tmp_path):
    (tmp_path / "mine").mkdir()
    shutil.copy(pairs_file, tmp_path / "mine")
    code, _, err = train("--cache-dir", "mine", "--output-dir", "out", "--max-train-steps", 1)
    assert code == 2 and "--cache-dir mine: holds other parquet files" in err and "Traceback" not in err
    assert [p.name for p in (tmp_path / "mine").glob("[!.]*")] == [pairs_file.name]


def test_a_file_that_is_damaged_further_on_is_said_in_one_line():
    def rows():
        yield {"caption": "a"}
        raise OSError("Corrupt snappy compressed data.")

    stream = rows()
    assert next_row(stream) == {"caption": "a"}
    with pytest.raises(UserError, match=r"is damaged .Corrupt snappy compressed data.*--resume"):
        next_row(stream)
    assert next_row(iter([])) is None


def test_demo_settings_fill_in_where_nothing_was_given():
    s = td.complete(td.Settings(demo=True, beta_dpo=123.0, output_dir="mine"))
    assert s.beta_dpo == 123 and s.dataset == td.DEMO["dataset"] and s.cache_dir == "mine/cache"
    assert s.max_train_steps == td.DEMO["max_train_steps"]
    betas = {x: td.complete(td.Settings(demo=True, loss=x)).beta_dpo for x in ("dpo", "kto", "mapo", "sft")}
    assert betas == {"dpo": 1000, "kto": 500, "mapo": 0.1, "sft": None}


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
