"""--compile: the same images, only full batches compiled, and no harm where torch.compile fails. Graphs are captured for
real (fullgraph) but run as they are: making code for the whole UNet takes a minute. One test does that for a small one."""

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import PROMPTS, latents, pixels
from torch._dynamo.utils import counters

import hasty_sample
from dipo import compiled
from dipo.files import read_record

FLAGS = ("--demo", "--num-inference-steps", 4, "--timestep-spacing", "trailing", "--limit", 5, "--batch-size", 2)


@pytest.fixture
def captured(monkeypatch):
    """torch.compile without code generation; the modules that were compiled, with their options."""
    modules, real = [], torch.nn.Module.compile
    torch.compiler.reset()
    counters.clear()

    def compile(self, **options):
        modules.append((type(self).__name__, options))
        real(self, backend="eager", **{k: v for k, v in options.items() if k != "options"})

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    yield modules
    torch.compiler.reset()


def devices(folder):
    return pd.read_csv(f"{folder}/images.csv")["device"].tolist()


def test_compiled_images_are_the_same(run, captured):
    assert run("hasty_sample", *FLAGS, "--output-dir", "plain")[0] == 0 and not captured
    code, _, err = run("hasty_sample", *FLAGS, "--compile", "--output-dir", "fast")
    assert code == 0 and "warning" not in err, err
    assert captured == [("UNet2DConditionModel", {"options": None, "fullgraph": True, "dynamic": False})]
    for i in range(5):
        a, b = (pixels(f"{name}/{i:05d}.png") for name in ("plain", "fast"))
        assert np.abs(a - b).max() <= 2
    # The last batch is smaller and runs as before, and so nothing is compiled for it.
    assert counters["stats"]["unique_graphs"] == 1
    assert devices("fast") == ["cpu, compiled"] * 4 + ["cpu"] and devices("plain") == ["cpu"] * 5
    # A run goes on with what was made without it, and the other way round.
    code, out, _ = run("hasty_sample", *FLAGS, "--output-dir", "fast")
    assert code == 0 and "5 of 5 images" in out


def test_both_batches_of_a_guidance_interval_are_compiled_in_the_warm_up(run, captured, monkeypatch):
    # The last step alone guides.
    interval = (*FLAGS, "--guidance-interval", 0, 1)
    assert run("hasty_sample", *interval, "--output-dir", "plain")[0] == 0
    graphs, real = [], hasty_sample.sample

    def sample(pipe, batch, *arguments):
        x = real(pipe, batch, *arguments)
        graphs.append((batch.warm_up, counters["stats"]["unique_graphs"]))
        return x

    monkeypatch.setattr(hasty_sample, "sample", sample)
    assert run("hasty_sample", *interval, "--compile", "--output-dir", "fast")[0] == 0
    # Two warm-ups, as CUDA graphs are recorded in the second, two full batches, and one that is not full.
    assert graphs == [(True, 2), (True, 2), (False, 2), (False, 2), (False, 2)]
    for i in range(5):
        a, b = (pixels(f"{name}/{i:05d}.png") for name in ("plain", "fast"))
        assert np.abs(a - b).max() <= 2


def test_where_compiling_fails(run, monkeypatch):
    """A machine without a compiler: one line, and no image."""

    def broken(self, **_):
        def call(*_, **__):
            raise RuntimeError("no C++ compiler")

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    code, _, err = run("hasty_sample", *FLAGS, "--compile", "--output-dir", "on")
    assert code == 2 and "error: --compile: torch.compile fails here (no C++ compiler); leave it out" in err
    assert not list(Path("on").glob("*.png")) and "Traceback" not in err
    assert run("hasty_sample", *FLAGS, "--output-dir", "on")[0] == 0 and devices("on") == ["cpu"] * 5


def test_after_out_of_memory_the_smaller_batch_is_compiled(run, captured, monkeypatch):
    sample = hasty_sample.sample

    def small_memory(pipe, batch, *arguments):
        if len(batch.prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(pipe, batch, *arguments)

    monkeypatch.setattr(hasty_sample, "sample", small_memory)
    code, _, err = run("hasty_sample", *FLAGS, "--compile", "--output-dir", "out")
    assert code == 0 and "going on with batches of 1" in err
    assert devices("out") == ["cpu, compiled"] * 5


def test_a_study_compiles_full_batches_of_each_row(run, captured):
    flags = ("--demo", "--limit", 1, "--batch-size", 2, "--num-inference-steps", 3, "--etas", 0, 1)
    flags += ("--redraws", 0)
    # Not side by side, where one would take the other's images.
    assert run("Ablation_experiment", *flags, "--output-dir", "as/plain")[0] == 0 and not captured
    code, _, err = run("Ablation_experiment", *flags, "--compile", "--output-dir", "fast")
    assert code == 0 and len(captured) == 1, err
    for variant in ("eta-0", "eta-1"):
        records = [read_record(Path(f"fast/{variant}/{i:05d}.png")) for i in range(3)]
        assert [r["device"] for r in records] == ["cpu, compiled", "cpu, compiled", "cpu"]
    plain, fast = (pd.read_csv(f"{name}/scores.csv") for name in ("as/plain", "fast"))
    assert np.abs(plain["pickscore"] - fast["pickscore"]).max() < 0.05


@pytest.fixture
def small_unet(demo_pipe):
    """A UNet of SDXL's kind with one block of each sort, random weights."""
    config = dict(demo_pipe.unet.config) | {"block_out_channels": [16, 32], "norm_num_groups": 8, "layers_per_block": 1}
    config |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": [1, 2]}
    config |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 1]}
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(config).eval()


def sampler(unet, demo_pipe):
    """A pipeline around a UNet, and a function of a number of images and of a seed for prompts that gives its latents of
    three steps."""
    config = unet.config
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    seed = [1]

    def encode_prompt(prompts, **_):
        generator = torch.Generator().manual_seed(seed[0])
        text = torch.randn(2, len(prompts), 77, config["cross_attention_dim"], generator=generator)
        return (*text, *torch.randn(2, len(prompts), pooled, generator=generator))

    pipe = SimpleNamespace(unet=unet, vae=demo_pipe.vae, scheduler=demo_pipe.scheduler, vae_scale_factor=4)
    pipe.encode_prompt = encode_prompt

    def sample(batch=2, prompts=1):
        seed[0] = prompts
        return latents(pipe, [str(i) for i in range(batch)], [900, 600, 300], 0.5, 5.0, range(batch))

    return pipe, sample


def test_keys_and_values_of_the_prompt_are_computed_once(demo_pipe, monkeypatch):
    """Once for all steps, to the last bit what computing them each time gives; the UNet is as before afterwards, also after
    an error."""
    unet, calls = demo_pipe.unet, []
    layers = [m for m in unet.modules() if type(m).__name__ == "Attention" and m.is_cross_attention]
    before = [(m.to_k, m.to_v) for m in layers]
    hooks = [m.to_k.register_forward_hook(lambda *_: calls.append(1)) for m in layers]

    def sample():
        calls.clear()
        return latents(demo_pipe, PROMPTS, [900, 600, 300, 100], 0.5)

    once = sample()
    assert len(layers) > 1 and len(calls) == len(layers)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(hasty_sample, "sqrt", lambda _: 1 / 0)
        sample()
    assert [(m.to_k, m.to_v) for m in layers] == before
    monkeypatch.setattr(hasty_sample, "projected_once", lambda *_: contextlib.nullcontext())
    assert torch.equal(sample(), once) and len(calls) == 4 * len(layers)
    for hook in hooks:
        hook.remove()


def close(a, b):
    return (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_generated_code_gives_the_same_latents(demo_pipe, small_unet):
    """torch's own code generator."""
    pipe, sample = sampler(small_unet, demo_pipe)
    plain, other = sample(), sample(prompts=2)
    compiled.compile_unet(pipe)
    fast = sample()
    assert close(fast, plain) and torch.equal(sample(), fast)
    assert not torch.equal(plain, fast), "the compiled call was not used"
    assert close(sample(prompts=2), other) and not close(other, plain)
    with torch.compiler.set_stance("force_eager"):
        assert close(sample(), plain)
    torch.compiler.reset()


def test_a_compiled_unet_finds_the_text_of_each_batch_in_one_place(demo_pipe, small_unet, captured):
    """CUDA graphs read from fixed addresses, and a batch of another size in between must not move or change them. One graph
    serves all prompts, attention's projections are fused, and nothing of the text is computed within a step."""
    pipe, sample = sampler(small_unet, demo_pipe)
    plain = {(batch, prompts): sample(batch, prompts) for batch, prompts in ((2, 1), (2, 2), (1, 3))}
    compiled.compile_unet(pipe)
    addresses = set()
    for batch, prompts in ((2, 1), (2, 2), (1, 3), (2, 1)):
        with contextlib.nullcontext() if batch == 2 else torch.compiler.set_stance("force_eager"):
            assert close(sample(batch, prompts), plain[batch, prompts])
        known = small_unet.known_projections[4].values()
        addresses.add(tuple(given.output.data_ptr() for given in known))
    assert len(addresses) == 1 and counters["stats"]["unique_graphs"] == 1
    blocks = [m for m in small_unet.modules() if type(m).__name__ == "Attention"]
    assert blocks and all(m.fused_projections for m in blocks)
    layers = [m.to_kv for m in blocks if m.is_cross_attention]
    assert len(known) == len(layers) and not any(isinstance(layer, compiled.Given) for layer in layers)
    calls = []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    with torch.compiler.set_stance("force_eager"):
        sample()
    assert len(calls) == len(layers)
    for hook in hooks:
        hook.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_compiled_images_on_a_gpu(run, dtype):
    flags = (*FLAGS, "--dtype", dtype)
    assert run("hasty_sample", *flags, "--output-dir", "plain")[0] == 0
    assert run("hasty_sample", *flags, "--compile", "--output-dir", "fast")[0] == 0
    assert all(d.endswith(", compiled") for d in devices("fast")[:4])
    for i in range(5):
        a, b = (pixels(f"{name}/{i:05d}.png") for name in ("plain", "fast"))
        assert np.abs(a - b).mean() < 1
