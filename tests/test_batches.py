"""Batches of a run: what is warmed up, what is tried again smaller, and that a study asks for its models' settings once."""

import pytest
import torch

import Ablation_experiment as ablation
from dipo import models

FLAGS = ("Ablation_experiment", "--demo", "--limit", 1, "--batch-size", 2, "--num-inference-steps", 3, "--etas", 0, 0.5, 1)
FLAGS += ("--redraws", 0)
FLAGS += ("--height", 32, "--width", 32, "--device", "cpu", "--output-dir", "out")


@pytest.fixture
def passes(monkeypatch):
    """What the loop was called for: eta, images, and whether that was a warm-up. More images than room do not fit."""
    calls, real, room = [], ablation.sample, [99]

    def sample(pipe, batch, tau, eta, w):
        calls.append((eta, len(batch.prompts), batch.warm_up))
        assert len(tau) == (2 if batch.warm_up else 3)
        if len(batch.prompts) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(pipe, batch, tau, eta, w)

    monkeypatch.setattr(ablation, "sample", sample)
    return calls, room


def test_each_size_is_warmed_up_once_for_all_rows(run, passes):
    calls, _ = passes
    assert run(*FLAGS)[0] == 0
    assert [x for x in calls if x[2]] == [(0, 2, True), (0, 1, True)]
    assert [x for x in calls if not x[2]] == [(eta, n, False) for eta in (0, 0.5, 1) for n in (2, 1)]


def test_what_did_not_fit_once_is_not_tried_again(run, passes):
    calls, room = passes
    room[0] = 1
    code, _, err = run(*FLAGS)
    assert code == 0 and err.count("out of memory: going on with batches of 1") == 1
    assert [x for x in calls if x[1] == 2] == [(0, 2, True)] and sum(not x[2] for x in calls) == 9


def test_models_are_asked_for_their_settings_once(run, monkeypatch):
    real, calls = models.image_size, []
    monkeypatch.setattr(models, "image_size", lambda s: calls.append(1) or real(s))
    assert run(*FLAGS)[0] == 0 and len(calls) == 1
