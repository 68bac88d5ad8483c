"""--flip: a pair is mirrored as often as not, both pictures alike, and all else stays what it is without."""

import json

import numpy as np
import pytest
import test_train_dipo
import torch
import world
from PIL import ImageOps
from torch.utils.data import default_collate

import train_dipo as td
from dipo import cache, training
from dipo.pairs import random_draws

pairs_file, train = test_train_dipo.pairs_file, test_train_dipo.train
DRAWS = ((4, 16, 16), 1000, 0.2)


def test_the_other_draws_are_those_of_before():
    """Figures of the version that had no flip."""
    known = {(0, 1, 2): (430, -18.080474657937884, 11.147300687560346), (7, 0, 0, 0, 5): (997, -32.21720919094514, None)}
    for key, (timestep, noise, posterior) in known.items():
        for flip in (False, True):
            draws = random_draws(key, (4, 8, 8), 1000, 0.2, flip)
            assert draws["timestep"] == timestep and draws["noise"].double().sum().item() == pytest.approx(noise, abs=1e-9)
            assert posterior is None or draws["posterior_noise"].double().sum().item() == pytest.approx(posterior, abs=1e-9)
            assert ("mirrored" in draws) == flip


def test_half_of_the_visits_are_mirrored():
    """Within four standard deviations, whatever else is drawn, and in another half of the pairs in the next epoch."""
    many = [[random_draws((3, epoch, i), (4, 2, 2), 1000, 0.5, True) for i in range(4000)] for epoch in (0, 1)]
    mirrored = np.array([[bool(x["mirrored"]) for x in epoch] for epoch in many])
    dropped = np.array([[bool(x["drop_caption"]) for x in epoch] for epoch in many])
    late = np.array([[int(x["timestep"]) > 499 for x in epoch] for epoch in many])
    assert np.all(np.abs(mirrored.mean(1) - 0.5) < 4 * 0.5 / 4000**0.5)
    for other in (mirrored[::-1], dropped, late):
        assert abs((mirrored == other).mean() - 0.5) < 4 * 0.5 / 8000**0.5


@pytest.fixture(scope="module")
def pictures():
    """Two pairs of pictures that are not symmetric."""
    scenes = world.sample_scenes("train", 4, 5)
    return [world.draw(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]


@pytest.mark.parametrize("cached", [False, True])
def test_latents_are_the_vaes_of_mirrored_pictures(demo_pipe, pictures, cached):
    """Both pictures of a pair, and of that pair alone; not the mirrored latents of the pictures."""
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).unflatten(0, (2, 2))
    batch = {"pixels": pixels, "caption": ["a", "b"]}
    random = {"posterior_noise": torch.zeros(2, 2, 4, 16, 16), "drop_caption": torch.tensor([False, False])}
    random["mirrored"] = torch.tensor([False, True])
    if cached:
        rows, shapes = cache.encode_batch(demo_pipe, batch, flip=True)
        assert shapes["moments"] == [2, 2, 8, 16, 16]
        batch = default_collate([cache.read_cached(row, shapes, torch.float32) for row in rows])
    none = training.encode_unconditional(demo_pipe)
    latents, _ = training.prepare_batch(demo_pipe, batch | random, none)

    def encoded(*images):
        with torch.no_grad():
            x = demo_pipe.image_processor.preprocess(list(images))
            return demo_pipe.vae.encode(x).latent_dist.mean * demo_pipe.vae.config.scaling_factor

    a, b, c, d = pictures  # the winners of both pairs come first
    torch.testing.assert_close(latents, encoded(a, ImageOps.mirror(c), b, ImageOps.mirror(d)), atol=1e-4, rtol=1e-4)
    wrong = encoded(c, d).flip(-1)
    assert (latents[[1, 3]] - wrong).abs().amax(dim=(1, 2, 3)).min() > 0.05
    del random["mirrored"]
    if not cached:
        latents, _ = training.prepare_batch(demo_pipe, batch | random, none)
        torch.testing.assert_close(latents, encoded(a, c, b, d), atol=1e-4, rtol=1e-4)


def test_without_flip_a_cache_holds_what_it_held(demo_pipe, pictures):
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).unflatten(0, (2, 2))
    batch = {"pixels": pixels, "caption": ["a", "b"]}
    (plain, shapes), (both, _) = (cache.encode_batch(demo_pipe, batch, flip) for flip in (False, True))
    assert shapes["moments"] == [2, 8, 16, 16]
    for x, y in zip(plain, both, strict=True):
        assert y["moments"].startswith(x["moments"]) and len(y["moments"]) == 2 * len(x["moments"])
        assert x["prompt_embeds"] == y["prompt_embeds"]


def test_caches_and_checkpoints_of_before_are_without_flip(train, tmp_path):
    """They go on with --no-flip and say so; the demo's default is theirs."""
    assert td.Settings().flip and not td.complete(td.Settings(demo=True)).flip
    flags = ("--cache-dir", "cache", "--no-flip", "--max-train-steps")
    assert train("--output-dir", "whole", *flags, 4)[0] == 0
    assert train("--output-dir", "out", *flags, 2)[0] == 0
    for path in (tmp_path / "cache/cache.json", tmp_path / "out/checkpoints/step-0000002/progress.json"):
        note = json.loads(path.read_text())
        for name in ("flip", "relabel", "relabel_margin"):
            del note.get("settings", note)[name]
        path.write_text(json.dumps(note))
    sums = tmp_path / "out/checkpoints/step-0000002/checksums.json"
    changed = {"progress.json": td.checkpoints.checksum(sums.with_name("progress.json"))}
    sums.write_text(json.dumps(json.loads(sums.read_text()) | changed))
    code, _, err = train("--output-dir", "out", "--cache-dir", "cache", "--max-train-steps", 4, "--resume")
    assert code == 2 and "the checkpoint was made with flip False, this run has True" in err
    code, _, err = train("--output-dir", "other", "--cache-dir", "cache", "--max-train-steps", 4)
    assert code == 2 and "--cache-dir cache: made with flip False, not True" in err
    code, _, err = train("--output-dir", "out", *flags, 4, "--resume")
    assert code == 0 and test_train_dipo.same(*(test_train_dipo.weights(tmp_path / x) for x in ("whole", "out"))), err


def test_a_mirrored_pair_is_read_as_any_other(train, tmp_path, monkeypatch):
    """In a run: half of the pairs, whose pictures come as they are and are mirrored on their way to the VAE."""
    seen, encode, prepare = [], training.encode_pictures, training.prepare_batch

    def prepared(pipe, batch, none):
        given = []
        monkeypatch.setattr(training, "encode_pictures", lambda vae, x: given.append(x) or encode(vae, x))
        result = prepare(pipe, batch, none)
        seen.append((batch["pixels"], batch["mirrored"], given[0]))
        return result

    monkeypatch.setattr(training, "prepare_batch", prepared)
    assert train("--output-dir", "out", "--max-train-steps", 3)[0] == 0
    flips = []
    for pixels, mirrored, given in seen:
        for i, flip in enumerate(mirrored.tolist()):
            for k, x in enumerate(given.unflatten(0, (2, -1))[:, i]):
                expected = np.asarray(pixels[i, k])[:, ::-1] if flip else np.asarray(pixels[i, k])
                assert np.array_equal(x, expected)
            flips.append(flip)
    assert len(flips) == 24 and 5 < sum(flips) < 19
