"""What would run on a GPU, at full size and without one: under FakeTensorMode tensors on cuda:0 have shape, dtype and device
and no numbers. One on another device, of another dtype or shape, or one whose value is asked for, ends the test."""

import contextlib
import copy
import functools
import itertools
import json

import helpers
import numpy as np
import open_clip
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import PartialState
from conftest import ROOT
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from helpers import SAMPLERS, fresh_accelerator, script, study_rows
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import compare_quality
import train_dipo
from dipo import judges, memory, results, training
from dipo.batches import Batch
from dipo.imagereward import linear_head
from dipo.models import Text, decode
from dipo.pairs import random_draws
from dipo.rows import scheduled
from dipo.timesteps import subsequence

aten, GPU = torch.ops.aten, torch.device("cuda:0")
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
# Every kind of layer that SDXL's UNet has at its width, once.
THIN = {"layers_per_block": 1, "transformer_layers_per_block": 1}


# ------------------------------------------------------------------------------------------------- a GPU that is not there


@torch.no_grad()
def apply(module, f, recurse=True):
    """Module._apply, that of to() and float(), which swaps the tensors of FakeTensorMode and fails."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None and (new := f(p)) is not p:
                m._parameters[name] = torch.nn.Parameter(new, p.requires_grad)
        m._buffers |= {name: f(x) for name, x in m._buffers.items() if x is not None}
    return module


def copied(x, memo):
    """Tensor.__deepcopy__, which reads memory that is not there."""
    new = x.detach().clone()
    memo[id(x)] = torch.nn.Parameter(new, x.requires_grad) if isinstance(x, torch.nn.Parameter) else new
    return memo[id(x)]


def pinned(x, device=None):
    """Tensor.pin_memory, which FakeTensorMode lacks."""
    x = x.clone()
    x.is_in_pinned_memory = True
    return x


def linear(layer, x):
    """Linear.forward, whose dtypes FakeTensorMode does not compare."""
    if x.dtype != layer.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(f"a Linear of type {layer.weight.dtype} was given {x.dtype}")
    return torch.nn.functional.linear(x, layer.weight, layer.bias)


@pytest.fixture(scope="module")
def cuda():
    """The mode, with what torch leaves out or switches off where there is no CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "_apply", apply)
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        patch.setattr(torch.nn.Linear, "forward", linear)
        patch.setattr(FakeTensor, "__deepcopy__", copied, raising=False)
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
    """Notes, while on, what makes the host wait for the GPU (copies that are not asynchronous), what is float64 there, and
    what is computed in half precision outside the UNet. A value that is asked for is an error by itself."""

    def __init__(self):
        super().__init__()
        self.on, self.in_unet, self.calls = False, False, 0
        self.waits, self.float64, self.half = [], [], []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = f(*args, **kwargs)
        if self.on:
            self.calls += 1
            results = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.float64 += [f for x in results if x.dtype == torch.float64 and x.device == GPU]
            arithmetic = f.overloadpacket in (aten.add, aten.sub, aten.mul, aten.div) and not self.in_unet
            self.half += [f for x in results if arithmetic and x.dtype in (torch.float16, torch.bfloat16)]
            if self.waits_for(f, args, kwargs, results):
                self.waits.append(f)
        return out

    def waits_for(self, f, args, kwargs, results) -> bool:
        if f in (aten.index.Tensor, aten.index_put_.default):
            return args[0].device == GPU and any(i is not None and i.device != GPU for i in args[1])
        if f not in (aten._to_copy.default, aten.copy_.default):
            return False
        source, *more = args[f == aten.copy_.default :]
        asynchronous = kwargs.get("non_blocking", more == [True]) and getattr(source, "is_in_pinned_memory", False)
        return source.device != results[0].device and not asynchronous


class Watched(Batch):
    """A batch that watches from the first step of its loop to the last."""

    def __init__(self, pipe, prompts, side):
        super().__init__(pipe, prompts, list(range(len(prompts))), side, side)
        self.watch, self.unet = Watch(), pipe.unet

    def progress(self, steps):
        before = self.unet.register_forward_pre_hook(lambda *_: setattr(self.watch, "in_unet", True))
        after = self.unet.register_forward_hook(lambda *_: setattr(self.watch, "in_unet", False))
        self.watch.on = True
        try:
            yield from steps
        finally:
            self.watch.on = False
            before.remove()
            after.remove()


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


def faked(module: torch.nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> torch.nn.Module:
    """A module on no device as one of FakeTensorMode on the CPU."""

    def fake(x):
        return FakeTensor(mode, x.to(dtype) if x.is_floating_point() else x, torch.device("cpu"))

    return apply(module, fake).eval()


@functools.cache
def text_encoder(family, part, mode, dtype):
    """Nothing changes it."""
    return faked(real_size(family, part), mode, dtype)


@contextlib.contextmanager
def base_model(module, family: str, mode: FakeTensorMode, **more):
    """Inside, a script loads this family's parts. more: what differs in the configuration of its unet or vae."""
    folder = ROOT / "assets/configs" / family

    def load_part(cls, flag, path, subfolder, dtype=None, config_of="", **parts):
        if subfolder:
            return faked(real_size(family, subfolder, **more.get(subfolder, {})), mode, dtype)
        encoders = [p for p in json.loads((folder / "model_index.json").read_text()) if "encoder" in p]
        parts |= {p: text_encoder(family, p, mode, dtype) for p in encoders}
        tokenizer = transformers.CLIPTokenizer.from_pretrained(ROOT / "assets/configs/tokenizer")
        parts |= {p.replace("text_encoder", "tokenizer"): tokenizer for p in encoders}
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        options = options if family == "sd15" else {"add_watermarker": False}
        return cls(**parts, **options, scheduler=SCHEDULER)

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(module, "load_part", load_part)
        patch.setattr(module, "pipeline_class", lambda _: PIPELINES[family])
        yield


@pytest.fixture(scope="module")
def loaded(cuda):
    """A function that has a script's load_pipeline load a family in a dtype, once."""

    @functools.cache
    def load(family, dtype, thin=False, name="hasty_sample"):
        module = script(name)
        with base_model(module, family, cuda, unet=THIN if thin else {}):
            pipe = module.load_pipeline(module.Settings(), GPU, dtype)
        pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod = ALPHA_BAR, float(ALPHA_BAR[0])
        return pipe

    return load


def sampled(pipe, name="hasty_sample", eta=1.0, w=5.0, steps=2, side=1024, prompts=("a red fox",), **more):
    """Latents of a script's loop, and what its steps were seen to do."""
    batch = Watched(pipe, [*prompts], side)
    with batch.watch:
        x = script(name).sample(pipe, batch, subsequence(pipe, steps, "leading"), eta, w, **more)
    return x, batch.watch


def check(x, watch, shape):
    assert x.shape == shape and x.dtype == torch.float32 and x.device == GPU
    assert watch.calls and watch.waits == [] and watch.float64 == [] and watch.half == []


# --------------------------------------------------------------------------------------------------------------- sampling


def test_sdxl_in_fp16_from_prompts_to_pictures(loaded):
    pipe = loaded("sdxl", torch.float16)
    x, watch = sampled(pipe)
    check(x, watch, (1, 4, 128, 128))
    # A VAE that overflows in fp16 runs in float32.
    assert pipe.vae.dtype == torch.float32 and pipe.unet.dtype == torch.float16
    images = decode(pipe.vae, x)
    assert images.shape == (1, 3, 1024, 1024) and images.dtype == torch.float32 and images.device == GPU
    moments = training.encode_pictures(pipe.vae, torch.zeros(1, 1024, 1024, 3, dtype=torch.uint8))
    assert moments.shape == (1, 8, 128, 128) and moments.dtype == torch.float32 and moments.device == GPU


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sd_1_5_from_prompts_to_pictures(loaded, dtype):
    pipe = loaded("sd15", dtype)
    x, watch = sampled(pipe, side=512, prompts=("a red fox", "a lighthouse"))
    check(x, watch, (2, 4, 64, 64))
    images = decode(pipe.vae, x)
    assert pipe.vae.dtype == dtype and images.shape == (2, 3, 512, 512) and images.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_of_any_script_waits_for_the_gpu(loaded, name):
    """Two prompts; in bf16, whose range the VAE stands, and as the scripts load it."""
    pipe = loaded("sdxl", torch.bfloat16, thin=True, name=name)
    assert pipe.vae.dtype == torch.bfloat16
    for eta, w in ((0.0, 1.0), (1.0, 7.5)):
        check(*sampled(pipe, name, eta, w, prompts=("a red fox", "a lighthouse")), (2, 4, 128, 128))


def test_nor_does_one_where_guidance_begins_or_ends(loaded):
    pipe = loaded("sdxl", torch.float16, thin=True)
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    check(*sampled(pipe, steps=4, interval=(0.28, 3.0), negative_prompt="blurry"), (1, 4, 128, 128))
    hook.remove()
    assert rows == [1, 2, 2, 1]


FREE = {row.variant: row for row in study_rows("rows/training_free.yaml") if row.scheduler != "ddim"}
# Waits of their own in every step: two draw noise on the CPU, where images have their seeds; UniPC solves for its weights.
OWN = {"dpm-solver-2m-sde-karras-20": 1, "euler-ancestral-20": 1, "unipc-karras-20": 4}


@pytest.mark.parametrize("name", FREE)
def test_nor_does_one_of_diffusers_schedulers(loaded, cuda, name):
    pipe = loaded("sdxl", torch.float16, thin=True)
    with unset_fake_temporarily():
        scheduler = scheduled(FREE[name], SCHEDULER.config, "leading", 3)
        if FREE[name].scheduler == "EulerDiscreteScheduler":
            # It compares them, on the host where they are.
            scheduler.sigmas = scheduler.sigmas.tolist()
    scheduler.timesteps = FakeTensor(cuda, scheduler.timesteps.to("meta"), GPU)
    batch = Watched(pipe, ["a red fox"], 1024)
    with batch.watch:
        x = compare_quality.sample_by(pipe, batch, scheduler, 0.0, 5.0)
    assert len(batch.watch.waits) <= 3 * OWN.get(name, 0)
    batch.watch.waits.clear()
    check(x, batch.watch, (1, 4, 128, 128))


# ------------------------------------------------------------------------------------------------- what must not go unseen


def test_a_layer_left_on_the_cpu_is_seen(loaded, monkeypatch):
    pipe = loaded("sdxl", torch.float16, thin=True)
    last = copy.copy(pipe.unet.conv_out)
    last._parameters = {k: p.cpu() for k, p in last._parameters.items()}
    monkeypatch.setitem(pipe.unet._modules, "conv_out", last)
    with pytest.raises(RuntimeError, match="cuda:0"):
        sampled(pipe)


def test_weights_of_another_dtype_are_seen(loaded, monkeypatch):
    pipe = loaded("sdxl", torch.float16, thin=True)
    for module, name in ((pipe.unet, "conv_out"), (pipe.unet.time_embedding, "linear_2")):
        layer = copy.copy(getattr(module, name))
        layer._parameters = {k: p.float() for k, p in layer._parameters.items()}
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="type"):
            patch.setitem(module._modules, name, layer)
            sampled(pipe)


def test_guidance_in_half_precision_is_seen(loaded, monkeypatch):
    pipe = loaded("sdxl", torch.float16, thin=True)
    monkeypatch.setattr(Watched, "noise", lambda batch: torch.zeros(batch.shape, dtype=torch.float16, device=GPU))
    _, watch = sampled(pipe)
    assert watch.half


# What it does, and the error or the waits in every step that it must be seen by.
FAULTS = {
    "a value": (lambda x: x * float(x.abs().max()), "_local_scalar_dense"),
    "values": (lambda x: x[x != 0], "nonzero"),
    "noise on the CPU": (lambda x: x + torch.zeros(x.shape), "cuda:0"),
    "a copy to the CPU and back": (lambda x: x.cpu().to(GPU), 2),
    "a copy that is not asynchronous": (lambda x: x + torch.zeros(x.shape).half().pin_memory().to(GPU), 1),
    "a copy of pages that may move": (lambda x: x + torch.zeros(x.shape).half().to(GPU, non_blocking=True), 1),
    "a tensor of numbers": (lambda x: x * torch.tensor([1, 2, 3, 4], device=GPU).view(1, 4, 1, 1), 1),
    "an index of numbers": (lambda x: x[[1, 0]], 1),
    "float64": (lambda x: x.double().half(), 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_loop_is_seen(loaded, name):
    """The UNet's latents go through it in each of three steps."""
    fault, seen = FAULTS[name]
    pipe = loaded("sdxl", torch.float16, thin=True)
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: (fault(inputs[0]), *inputs[1:]))
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        if isinstance(seen, str):
            stack.enter_context(pytest.raises(RuntimeError, match=seen))
        _, watch = sampled(pipe, steps=3)
        assert len(watch.waits) == 3 * seen and bool(watch.float64) == (name == "float64")


# ----------------------------------------------------------------------------------------------------------------- judges


def clip_judge(judge, config, mode, dtype):
    """A judge with a random CLIP of this size, and OpenAI's processor."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(ROOT / "assets/configs/tokenizer")
    with torch.device("meta"):
        judge.model = transformers.CLIPModel(config)
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer)
    faked(judge.model, mode, dtype)

    def processed(**given):
        """It looks at token numbers, on the host where they are."""
        with unset_fake_temporarily():
            out = processor(**given)
        out.data = {k: mode.from_tensor(x) for k, x in out.data.items()}
        return out

    judge.processor = processed
    return judge


def vit_h():
    """laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}
    vision |= {"patch_size": 14, "hidden_act": "gelu"}
    return transformers.CLIPConfig(text_config=text | {"hidden_act": "gelu"}, vision_config=vision, projection_dim=1024)


def pickscore(mode, dtype, folder):
    return clip_judge(judges.PickScore("", ""), vit_h(), mode, dtype)


def clipscore(mode, dtype, folder):
    return clip_judge(judges.CLIPScore(""), transformers.CLIPConfig(), mode, dtype)


def hpsv2(mode, dtype, folder):
    judge, precision = judges.HPSv2("", "v2.1"), {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    judge.model = open_clip.create_model("ViT-H-14", precision=precision).eval()
    judge.size, judge.dtype, tokenize = 224, dtype, open_clip.get_tokenizer("ViT-H-14")

    def known(texts):
        """Token numbers, which the host knows: the last ones end at 5 and 7."""
        ids = tokenize(texts)
        ids.argmax = lambda dim: np.array([5, 7])
        return ids

    judge.tokenize = known
    return judge


def imagereward(mode, dtype, folder):
    """By its own loading, of a checkpoint with the real one's names and shapes."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    sizes |= {"max_position_embeddings": 512, "vocab_size": 30524}
    helpers.save_imagereward(folder / "imagereward", folder / "bert")
    (folder / "imagereward/med_config.json").write_text(json.dumps(helpers.MED | sizes))
    judge = judges.ImageReward(str(folder / "imagereward"), str(folder / "bert"))
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(helpers, "MED", helpers.MED | sizes)
        shapes = helpers.imagereward_shapes(width=1024, depth=24, image_size=224)
        patch.setattr(torch, "load", lambda *_, **__: {k: torch.empty(shape) for k, shape in shapes.items()})
        judge.load(dtype)
    for part in ("image", "text"):
        faked(judge.model[part], mode, dtype)
    faked(judge.model["head"], mode, torch.float32)
    return judge


def aesthetic(mode, dtype, folder):
    judge = judges.Aesthetic("", "")
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    with torch.device("meta"):
        config = transformers.CLIPVisionConfig(**vision, patch_size=14, projection_dim=768)
        vision, head = transformers.CLIPVisionModelWithProjection(config), linear_head(768)
    parts = {"image": faked(vision, mode, dtype), "head": faked(head, mode, torch.float32)}
    judge.model = torch.nn.ModuleDict(parts)
    return judge


# In millions of parameters: CLIP's are those of open_clip's table, ImageReward's and the predictor's their encoders' sum.
JUDGES = {pickscore: 986.1, hpsv2: 986.1, clipscore: 151.3, imagereward: 446.0, aesthetic: 304.0}


@pytest.mark.parametrize("make", JUDGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_judge_of_real_size(cuda, make, dtype, tmp_path):
    with unset_fake_temporarily() if make is imagereward else contextlib.nullcontext():
        judge = make(cuda, dtype, tmp_path)
    assert sum(p.numel() for p in judge.model.parameters()) / 1e6 == pytest.approx(JUDGES[make], rel=0.01)
    judge.model.to(GPU)
    scores = judge([Image.new("RGB", (1024, 1024))] * 3, ["a red cat", "a dog", "a red cat"])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.device.type == "cpu"


# --------------------------------------------------------------------------------------------------------------- training


class Reached(Exception):
    """What backward was called with."""


@pytest.fixture
def accelerator():
    """accelerate's own for bf16 and two batches a step, told that its device is a GPU. Autograd wants one that is there, so
    that the first batch's backward does nothing and the second one's ends the test."""

    def backward(loss):
        if accelerator.sync_gradients:
            raise Reached(loss)

    fresh_accelerator()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    accelerator.state.device = PartialState().device = GPU
    accelerator.backward = backward
    yield accelerator
    fresh_accelerator()


class Stream:
    """Pairs without end, as those of a cache or as pictures, which are watched from the second batch on."""

    def __init__(self, cached: bool, size: int):
        self.cached, self.size, self.watch, self.position = cached, size, Watch(), {}

    def batches(self, n):
        for _ in itertools.count():
            yield [(i,) for i in range(n)], 0, {}
            self.watch.on = True

    def item(self, i):
        latent = (4, self.size // 8, self.size // 8)
        given = {"pixels": torch.zeros(2, self.size, self.size, 3, dtype=torch.uint8), "caption": "a red fox"}
        if self.cached:
            given = {"moments": (2, 2, 8, *latent[1:]), "prompt_embeds": (77, 2048), "pooled_embeds": (1280,)}
            given = {k: torch.zeros(shape, dtype=torch.bfloat16) for k, shape in given.items()}
        return given | random_draws((0, i), latent, 1000, 0.2, flip=True) | {"unreadable": 0}


def trained(s, accelerator, mode, stream, family="sdxl", **more):
    """The loss at which train_dipo.py's loop arrives by its own loading and wrapping, its UNet and its reference."""
    with base_model(train_dipo, family, mode, **more):
        pipe = train_dipo.load_models(s, GPU, s.dtype)
        model, optimizer, reference = train_dipo.wrap(s, pipe, accelerator)
    with pytest.raises(Reached) as reached, stream.watch if stream.cached else contextlib.nullcontext():
        # The first step's check that both models agree asks for a value.
        train_dipo.train(s, accelerator, pipe, model, reference, optimizer, stream, {"step": 1}, [], None)
    return reached.value.args[0], pipe.unet, reference


def training_settings(**more):
    options = {"mixed_precision": "bf16", "train_batch_size": 2, "effective_batch_size": 4, "beta_dpo": 5000.0}
    return train_dipo.Settings(**options | {"num_workers": 0} | more)


def check_loss(loss, unet):
    assert loss.shape == () and loss.dtype == torch.float32 and loss.device == GPU and loss.requires_grad
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(("family", "size", "lora_rank"), [("sdxl", 1024, 0), ("sdxl", 1024, 64), ("sd15", 512, 0)])
def test_a_training_step_at_full_size(accelerator, cuda, family, size, lora_rank):
    """From two pairs of pictures to the loss, in bf16 over float32 weights, or over a LoRA's frozen bf16."""
    accelerator.gradient_accumulation_steps = 1
    dtypes, forward = set(), torch.nn.Conv2d.forward

    def conv(layer, x):
        out = forward(layer, x)
        dtypes.add((layer.weight.dtype, out.dtype))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "forward", conv)
        s = training_settings(effective_batch_size=2, lora_rank=lora_rank)
        loss, unet, reference = trained(s, accelerator, cuda, Stream(False, size), family)
    check_loss(loss, unet)
    frozen = unet if lora_rank else reference
    assert {p.dtype for p in frozen.parameters()} == {torch.float32, torch.bfloat16}
    # What autocast computes in, of the weights in float32 too.
    assert dtypes == {(torch.bfloat16, torch.bfloat16)} | (set() if lora_rank else {(torch.float32, torch.bfloat16)})


@pytest.mark.parametrize("lora_rank", [0, 64])
def test_no_batch_of_cached_pairs_waits_for_the_gpu(accelerator, cuda, lora_rank):
    """The second of a step, in full and as a LoRA; the first one may, and so may the end of the step."""
    stream = Stream(True, 1024)
    loss, unet, _ = trained(training_settings(lora_rank=lora_rank), accelerator, cuda, stream, unet=THIN)
    check_loss(loss, unet)
    assert stream.watch.calls and stream.watch.waits == [] and stream.watch.float64 == []


@pytest.mark.parametrize("lora_rank", [0, 64])
def test_a_forward_pass_keeps_what_memory_predicts(cuda, monkeypatch, lora_rank):
    """In bf16 with autocast, whose rules dipo/memory.py follows on the CPU: the same bytes, at the end and at most."""

    def flash(q, k, v, **_):
        """What a GPU takes for it, which is not there to be asked."""
        return aten._scaled_dot_product_flash_attention(*(x.to(torch.bfloat16) for x in (q, k, v)))[0]

    def kept(device):
        with torch.device("meta"):
            unet = real_size("sdxl", "unet", **THIN)
            if lora_rank:
                training.add_lora(training_settings(lora_rank=lora_rank), unet, torch.bfloat16)
        with unset_fake_temporarily():
            unet = memory.faked(unet if device == GPU else memory.norms_in_float32(unet), cuda)
        unet.to(device)
        given = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((2, 77, 2048), (2, 1280), (2, 6))]
        text = Text(*given).last(2)
        x = torch.zeros(2, 4, 128, 128, dtype=torch.bfloat16, device=device)
        with memory.Tally() as tally, torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            out = unet(x, torch.zeros(2, device=device), **text)[0]
        assert out.requires_grad
        return tally.now, tally.most, tally.flops

    expected = kept(torch.device("cpu"))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)
    assert kept(GPU) == pytest.approx(expected, rel=1e-3)


def test_validation_pictures(accelerator, cuda, tmp_path, monkeypatch):
    """By diffusers' own pipeline, which asks for the values of timesteps: here they are numbers."""
    s, seen = training_settings(), []

    def set_timesteps(scheduler, n, device=None):
        scheduler.num_inference_steps, scheduler.timesteps = n, [967, 34, 1]

    def postprocess(_, images):
        seen.append((tuple(images.shape), images.dtype, images.device))
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(DDIMScheduler, "set_timesteps", set_timesteps)
    monkeypatch.setattr(VaeImageProcessor, "postprocess", postprocess)
    with base_model(train_dipo, "sdxl", cuda, unet=THIN):
        pipe = train_dipo.load_models(s, GPU, s.dtype)
        model, *_ = train_dipo.wrap(s, pipe, accelerator)
        for step in (0, 5):
            results.validate(s, pipe, model, ["a red fox"], accelerator, tmp_path, step)
    assert seen == 2 * [((1, 3, 1024, 1024), torch.float32, GPU)]
    assert sorted(p.name for p in tmp_path.glob("*/*.png")) == ["base-0.png", "step-0000005.png"]
