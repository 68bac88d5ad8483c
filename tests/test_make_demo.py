"""demo/make_demo.py: every stage at a tiny size, and training that goes on where it was stopped."""

import copy
import subprocess
import sys

import make_demo
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionXLPipeline


def test_a_stopped_training_ends_with_the_same_weights(tmp_path):
    torch.manual_seed(0)
    first = torch.nn.Linear(4, 3)
    data = torch.randn(20, 8, 4)

    def train(folder, stop=None):
        folder.mkdir(exist_ok=True)
        module = copy.deepcopy(first)
        ema = make_demo.EMAModel(module.parameters(), decay=0.9)

        def step(i):
            if i == stop:
                raise KeyboardInterrupt
            return module(data[i]).square().mean()

        make_demo.train(folder / "x.pt", {"module": module}, step, 20, 1e-2, 4, ema=ema)
        return [*module.parameters(), *ema.shadow_params]

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop=14)
    assert torch.load(tmp_path / "stopped/x.pt", weights_only=True)["step"] == 12
    again = train(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert not torch.equal(whole[0], first.weight)


def test_all_stages_leave_a_pipeline_that_loads(tmp_path):
    sizes = {"pictures": 64, "text-steps": 2, "vae-steps": 2, "details-steps": 2, "unet-steps": 2}
    flags = [x for name, value in sizes.items() for x in (f"--{name}", str(value))]
    flags += ["--build-dir", str(tmp_path / "build"), "--output-dir", str(tmp_path / "model")]
    stages = ["--stages", "pictures", "text", "vae", "details", "latents", "unet", "export"]
    script = [sys.executable, str(ROOT / "demo/make_demo.py")]
    done = subprocess.run([*script, *flags, *stages], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model", add_watermarker=False)
    assert pipe.tokenizer.pad_token == "<|endoftext|>" and pipe.tokenizer_2.pad_token == "!"
    assert pipe.tokenizer_2.pad_token_id == 0 and len(pipe.tokenizer("a portrait").input_ids) == 4
    saved = torch.load(tmp_path / "build/text.pt", weights_only=True)["encoder0"]
    loaded = pipe.text_encoder.state_dict()
    assert all(torch.equal(loaded[name].half(), weight.half()) for name, weight in saved.items())
    done = subprocess.run([*script, *flags, "--seed", "1", *stages[:2]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "was begun with" in done.stderr
