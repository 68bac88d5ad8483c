"""--compile: the same images, only full batches compiled, and no harm where torch.compile fails. Graphs are captured for
real (fullgraph) but run as they are: making code for the whole UNet takes a minute. One test does that for a small one."""

import contextlib
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch._dynamo.utils import counters

import Ablation_experiment as ae
import hasty_sample as hs

FLAGS = ("--demo", "--num-inference-steps", 4, "--timestep-spacing", "trailing", "--limit", 5, "--batch-size", 2)


@pytest.fixture
def captured(monkeypatch):
    """torch.compile without code generation; the modules that were compiled, with their options."""
    compiled, real = [], torch.nn.Module.compile
    torch.compiler.reset()
    counters.clear()

    def compile(self, **options):
        compiled.append((type(self).__name__, options))
        real(self, backend="eager", **{k: v for k, v in options.items() if k != "options"})

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    yield compiled
    torch.compiler.reset()


def devices(folder):
    return pd.read_csv(f"{folder}/images.csv")["device"].tolist()


def test_compiled_images_are_the_same(run, captured):
    assert run("hasty_sample", *FLAGS, "--compile", "off", "--output-dir", "plain")[0] == 0 and not captured
    code, _, err = run("hasty_sample", *FLAGS, "--compile", "on", "--output-dir", "fast")
    assert code == 0 and "warning" not in err, err
    assert captured == [("UNet2DConditionModel", {"options": None, "fullgraph": True, "dynamic": False})]
    for i in range(5):
        a, b = (np.asarray(Image.open(f"{name}/{i:05d}.png")).astype(int) for name in ("plain", "fast"))
        assert np.abs(a - b).max() <= 2
    # The last batch is smaller and runs as before, and so nothing is compiled for it.
    assert counters["stats"]["unique_graphs"] == 1
    assert devices("fast") == ["cpu, compiled"] * 4 + ["cpu"] and devices("plain") == ["cpu"] * 5
    # A run goes on with what was made without it, and the other way round.
    code, out, _ = run("hasty_sample", *FLAGS, "--compile", "off", "--output-dir", "fast")
    assert code == 0 and "5 of 5 images" in out


def test_both_batches_of_a_guidance_interval_are_compiled_in_the_warm_up(run, captured, monkeypatch):
    # The last step alone guides.
    interval = (*FLAGS, "--guidance-interval", 0, 1)
    assert run("hasty_sample", *interval, "--compile", "off", "--output-dir", "plain")[0] == 0
    graphs, real = [], hs.compile_unet

    def compile_unet(*arguments):
        done = real(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])
        return done

    monkeypatch.setattr(hs, "compile_unet", compile_unet)
    assert run("hasty_sample", *interval, "--compile", "on", "--output-dir", "fast")[0] == 0
    assert graphs == [2] and counters["stats"]["unique_graphs"] == 2
    for i in range(5):
        a, b = (np.asarray(Image.open(f"{name}/{i:05d}.png")).astype(int) for name in ("plain", "fast"))
        assert np.abs(a - b).max() <= 2


def test_auto_counts_the_calls_ahead(run, captured, monkeypatch):
    assert run("hasty_sample", *FLAGS, "--output-dir", "few")[0] == 0 and not captured
    monkeypatch.setattr(hs, "COMPILE_FROM", 2 * 4)
    assert run("hasty_sample", *FLAGS, "--output-dir", "many")[0] == 0 and len(captured) == 1
    monkeypatch.setattr(hs, "COMPILE_FROM", 2 * 4 + 1)
    assert run("hasty_sample", *FLAGS, "--output-dir", "fewer")[0] == 0 and len(captured) == 1


def test_where_compiling_fails(run, monkeypatch):
    """A machine without a compiler: auto goes on without, with a warning; on ends with one line."""

    def broken(self, **_):
        def call(*_, **__):
            raise RuntimeError("no C++ compiler")

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    code, _, err = run("hasty_sample", *FLAGS, "--compile", "on", "--output-dir", "on")
    assert code == 2 and "error: --compile on: torch.compile fails here (no C++ compiler); use --compile off" in err
    monkeypatch.setattr(hs, "COMPILE_FROM", 1)
    code, _, err = run("hasty_sample", *FLAGS, "--output-dir", "auto")
    assert code == 0 and err.count("warning: torch.compile fails here (no C++ compiler); going on without") == 1
    assert devices("auto") == ["cpu"] * 5
    # The UNet is what it was before: the same images to the last bit.
    assert run("hasty_sample", *FLAGS, "--compile", "off", "--output-dir", "off")[0] == 0
    for i in range(5):
        a, b = (np.asarray(Image.open(f"{name}/{i:05d}.png")) for name in ("off", "auto"))
        assert np.array_equal(a, b)
    assert run("hasty_sample", *FLAGS, "--compile", "fast")[0] == 2


def test_after_out_of_memory_the_smaller_batch_is_compiled(run, captured, monkeypatch):
    sample = hs.ddim_sample

    def small_memory(*arguments):
        if len(arguments[5]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(*arguments)

    monkeypatch.setattr(hs, "ddim_sample", small_memory)
    code, _, err = run("hasty_sample", *FLAGS, "--compile", "on", "--output-dir", "out")
    assert code == 0 and "going on with batches of 1" in err
    assert devices("out") == ["cpu, compiled"] * 5


def test_auto_compiles_a_smaller_batch_only_if_enough_is_left(run, captured, monkeypatch):
    sample = hs.ddim_sample

    def small_memory(*arguments):
        if len(arguments[5]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(*arguments)

    monkeypatch.setattr(hs, "ddim_sample", small_memory)
    write = hs.tqdm.write
    for enough, device in ((5 * 4, "cpu, compiled"), (5 * 4 + 1, "cpu")):
        # Two full batches of two at first count 2 x 4 calls, five of one 5 x 4.
        monkeypatch.setattr(hs, "COMPILE_FROM", 2 * 4)

        def told(*arguments, enough=enough, **options):
            hs.COMPILE_FROM = enough
            write(*arguments, **options)

        monkeypatch.setattr(hs.tqdm, "write", told)
        assert run("hasty_sample", *FLAGS, "--output-dir", f"out{enough}")[0] == 0
        assert devices(f"out{enough}") == [device] * 5


def test_a_study_compiles_full_batches_of_each_variant(run, captured, monkeypatch):
    flags = ("--demo", "--limit", 1, "--batch-size", 2, "--num-inference-steps", 3, "--etas", 0, 1)
    assert run("Ablation_experiment", *flags, "--output-dir", "plain")[0] == 0 and not captured
    monkeypatch.setattr(ae, "COMPILE_FROM", 2 * 3)
    code, _, err = run("Ablation_experiment", *flags, "--output-dir", "fast")
    assert code == 0 and len(captured) == 1, err
    for variant in ("eta-0", "eta-1"):
        records = [ae.read_record(ae.Path(f"fast/{variant}/{i:05d}.png")) for i in range(3)]
        assert [r["device"] for r in records] == ["cpu, compiled", "cpu, compiled", "cpu"]
    plain, fast = (pd.read_csv(f"{name}/scores.csv") for name in ("plain", "fast"))
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
    """A function of a number of images and of a seed for prompts, gives latents of three steps."""
    config = unet.config
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]

    def sample(batch=2, prompts=1):
        generator = torch.Generator().manual_seed(prompts)
        text = torch.randn(2 * batch, 77, config["cross_attention_dim"], generator=generator)
        embeds = text, torch.randn(2 * batch, pooled, generator=generator)
        seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
        return hs.ddim_sample(unet, demo_pipe.scheduler.alphas_cumprod, [900, 600, 300], *embeds, seeds, 64, 64, 5.0, 0.5)

    return sample


def close(a, b):
    return (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_generated_code_gives_the_same_latents(demo_pipe, small_unet):
    """torch's own code generator."""
    sample = sampler(small_unet, demo_pipe)
    plain, other = sample(), sample(prompts=2)
    pipe = type("Pipe", (), {"unet": small_unet, "vae": demo_pipe.vae})()
    calls = []
    assert hs.compile_unet(pipe, lambda: calls.append(sample()), "on")
    compiled = sample()
    assert close(compiled, plain) and torch.equal(calls[0], compiled) and len(calls) == 2
    assert not torch.equal(plain, compiled), "the compiled call was not used"
    assert close(sample(prompts=2), other) and not close(other, plain)
    with hs.eager():
        assert close(sample(), plain)
    torch.compiler.reset()


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_a_unet_that_cannot_be_compiled_is_as_before(demo_pipe, small_unet, captured, wanted):
    sample = sampler(small_unet, demo_pipe)
    before, processors = sample(), small_unet.attn_processors
    pipe = type("Pipe", (), {"unet": small_unet, "vae": demo_pipe.vae})()

    def fails():
        raise RuntimeError("no C++ compiler")

    with pytest.raises(hs.UserError, match="no C") if wanted == "on" else contextlib.nullcontext():
        assert not hs.compile_unet(pipe, fails, wanted)
    assert small_unet._compiled_call_impl is None and small_unet.attn_processors == processors
    assert small_unet.conv_in.weight.is_contiguous() and torch.equal(sample(), before)


def test_a_compiled_unet_finds_the_text_of_each_batch_in_one_place(demo_pipe, small_unet, captured):
    """CUDA graphs read from fixed addresses, and a batch of another size in between must not move or change them. One graph
    serves all prompts, attention's projections are fused, and nothing of the text is computed within a step."""
    sample = sampler(small_unet, demo_pipe)
    plain = {(batch, prompts): sample(batch, prompts) for batch, prompts in ((2, 1), (2, 2), (1, 3))}
    pipe = type("Pipe", (), {"unet": small_unet, "vae": demo_pipe.vae})()
    assert hs.compile_unet(pipe, sample, "on")
    addresses = set()
    for batch, prompts in ((2, 1), (2, 2), (1, 3), (2, 1)):
        with contextlib.nullcontext() if batch == 2 else hs.eager():
            assert close(sample(batch, prompts), plain[batch, prompts])
        known = small_unet.known_projections[4].values()
        addresses.add(tuple(given.output.data_ptr() for given in known))
    assert len(addresses) == 1 and counters["stats"]["unique_graphs"] == 1
    blocks = [m for m in small_unet.modules() if type(m).__name__ == "Attention"]
    assert blocks and all(m.fused_projections for m in blocks)
    layers = [m.to_kv for m in blocks if m.is_cross_attention]
    assert len(known) == len(layers) and not any(isinstance(layer, hs.Given) for layer in layers)
    calls = []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    with hs.eager():
        sample()
    assert len(calls) == len(layers)
    for hook in hooks:
        hook.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_compiled_images_on_a_gpu(run, dtype):
    flags = (*FLAGS, "--dtype", dtype)
    assert run("hasty_sample", *flags, "--compile", "off", "--output-dir", "plain")[0] == 0
    assert run("hasty_sample", *flags, "--compile", "on", "--output-dir", "fast")[0] == 0
    assert all(d.endswith(", compiled") for d in devices("fast")[:4])
    for i in range(5):
        a, b = (np.asarray(Image.open(f"{name}/{i:05d}.png")).astype(int) for name in ("plain", "fast"))
        assert np.abs(a - b).mean() < 1
