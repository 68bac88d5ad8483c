"""What would run on a GPU, at full size and without one: under FakeTensorMode tensors on cuda:0 have shape, dtype and device
and no numbers. One on another device, of another dtype or shape, or one whose value is asked for, ends the test."""

import contextlib
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from helpers import SAMPLERS, script
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dipo.batches import Batch
from dipo.models import decode, encode
from dipo.timesteps import subsequence

aten, GPU = torch.ops.aten, torch.device("cuda:0")
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
# Every kind of layer that SDXL's UNet has at its width, once.
THIN = {"layers_per_block": 1, "transformer_layers_per_block": 1}


# ------------------------------------------------------------------------------------------------- a GPU that is not there


def apply(module, f, recurse=True):
    """Module._apply, that of to() and float(), which swaps the tensors of FakeTensorMode and fails."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(f(p.detach()), p.requires_grad and p.is_floating_point())
        m._buffers |= {name: f(x) for name, x in m._buffers.items() if x is not None}
    return module


def pinned(x, device=None):
    """Tensor.pin_memory, which FakeTensorMode lacks."""
    x = x.clone()
    x.is_in_pinned_memory = True
    return x


@pytest.fixture(scope="module")
def cuda():
    """The mode, with what torch leaves out or switches off where there is no CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "_apply", apply)
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        # Or torch.autocast would do nothing.
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        # Tables of a scheduler are made outside.
        yield FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture(autouse=True)
def inside(cuda):
    with cuda:
        yield


class Watch(TorchDispatchMode):
    """Notes what makes the host wait for the GPU (copies that are not asynchronous) and what is float64 there, while on. A
    value that is asked for is DataDependentOutputException."""

    def __init__(self):
        super().__init__()
        self.on, self.waits, self.float64, self.calls = False, [], [], 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = f(*args, **kwargs)
        if self.on:
            self.calls += 1
            results = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.float64 += [f for x in results if x.dtype == torch.float64 and x.device == GPU]
            if self.waits_for(f, args, kwargs, results):
                self.waits.append(f)
        return out

    def waits_for(self, f, args, kwargs, results) -> bool:
        if f == aten.index.Tensor:
            return args[0].device == GPU and any(i is not None and i.device != GPU for i in args[1])
        if f not in (aten._to_copy.default, aten.copy_.default):
            return False
        source = args[f == aten.copy_.default]
        asynchronous = kwargs.get("non_blocking", args[2:] == (True,)) and getattr(source, "is_in_pinned_memory", False)
        return source.device != results[0].device and not asynchronous


class Watched(Batch):
    """A batch that watches from the first step of its loop to the last."""

    def __init__(self, pipe, prompts, side):
        super().__init__(pipe, prompts, list(range(len(prompts))), side, side)
        self.watch = Watch()

    def progress(self, steps):
        self.watch.on = True
        yield from steps
        self.watch.on = False


class Table(np.ndarray):
    """What is known on the host, in place of a tensor of real numbers, which has none here."""

    def double(self):
        return self


# ------------------------------------------------------------------------------------------------------------- the models

SCHEDULER = DDIMScheduler.from_pretrained(ROOT / "assets/configs/sdxl/scheduler")
ALPHA_BAR = SCHEDULER.alphas_cumprod.numpy().astype(np.float64).view(Table)


def real_size(family: str, part: str, **more):
    """A part of a base model on no device, from its configuration."""
    folder = ROOT / "assets/configs" / family
    with torch.device("meta"):
        if part in ("unet", "vae"):
            cls = UNet2DConditionModel if part == "unet" else AutoencoderKL
            return cls.from_config(cls.load_config(folder / part), **more)
        config = transformers.CLIPTextConfig.from_pretrained(folder / part)
        return getattr(transformers, config.architectures[0])(config)


def faked(module: torch.nn.Module, mode: FakeTensorMode, dtype: torch.dtype, device="cpu") -> torch.nn.Module:
    """A module on no device as one of FakeTensorMode."""

    def fake(x):
        return FakeTensor(mode, x.to(dtype) if x.is_floating_point() else x, torch.device(device))

    return apply(module, fake).eval()


@pytest.fixture(scope="module")
def loaded(cuda):
    """A function that has a script's load_pipeline load a family's base model in a dtype, the same one once."""
    pipes = {}

    def load(family, dtype, thin=False, name="hasty_sample", force_upcast=True):
        key = family, dtype, thin, force_upcast
        own = {"unet": THIN if thin else {}, "vae": {"force_upcast": force_upcast}}

        def load_part(cls, flag, path, subfolder, dtype=None, config_of="", **parts):
            if subfolder:
                return made[subfolder]
            tokenizers = {k.replace("text_encoder", "tokenizer"): tokenizer for k in made if k.startswith("text_encoder")}
            more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            more = more if family == "sd15" else {"add_watermarker": False}
            scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
            return cls(**made | parts, **tokenizers, **more, scheduler=scheduler)

        if key not in pipes:
            folder = ROOT / "assets/configs" / family
            tokenizer = transformers.CLIPTokenizer.from_pretrained(ROOT / "assets/configs/tokenizer")
            index = json.loads((folder / "model_index.json").read_text())
            made = {p: real_size(family, p, **own.get(p, {})) for p in index if p in ("unet", "vae") or "encoder" in p}
            made = {p: faked(m, cuda, dtype) for p, m in made.items()}
            module = script(name)
            with pytest.MonkeyPatch.context() as patch, cuda:
                patch.setattr(module, "load_part", load_part)
                patch.setattr(module, "pipeline_class", lambda _: PIPELINES[family])
                pipe = module.load_pipeline(module.Settings(), GPU, dtype)
            pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod = ALPHA_BAR, float(ALPHA_BAR[0])
            pipes[key] = pipe
        return pipes[key]

    return load


def sampled(pipe, name="hasty_sample", eta=1.0, w=5.0, steps=2, side=1024, prompts=("a red fox",), **more):
    """Latents of a script's loop, and what its steps were seen to do."""
    batch = Watched(pipe, [*prompts], side)
    with batch.watch:
        x = script(name).sample(pipe, batch, subsequence(pipe, steps, "leading"), eta, w, **more)
    return x, batch.watch


def check(x, watch, shape):
    assert x.shape == shape and x.dtype == torch.float32 and x.device == GPU
    assert watch.calls and watch.waits == [] and watch.float64 == []


# --------------------------------------------------------------------------------------------------------------- sampling


def test_sdxl_in_fp16_from_prompts_to_pictures(loaded):
    pipe = loaded("sdxl", torch.float16)
    x, watch = sampled(pipe)
    check(x, watch, (1, 4, 128, 128))
    # A VAE that overflows in fp16 runs in float32.
    assert pipe.vae.dtype == torch.float32 and pipe.unet.dtype == torch.float16
    images = decode(pipe.vae, x)
    assert images.shape == (1, 3, 1024, 1024) and images.dtype == torch.float32 and images.device == GPU
