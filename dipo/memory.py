"""What training takes of a GPU's memory, by part, and how many operations: from configurations alone, on any machine and in
seconds, under torch's FakeTensorMode, whose tensors have shapes and no numbers."""

import math
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from torch.utils.weak import WeakIdKeyDictionary

from dipo import training
from dipo.cli import UserError
from dipo.losses import WITHOUT_REFERENCE, preference_loss
from dipo.models import load_config, load_part, text_of

aten = torch.ops.aten
# torch's, and those of what its attention is called on the CPU.
FORMULAS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
# Sizes of GPUs, what can be used of each of their GB, and what CUDA, its libraries and gaps are taken to need, in bytes.
GPUS, USABLE, RESERVE = (12, 16, 24, 40, 48, 80, 96, 141), 0.94 * 2**30, 1.5e9


class Need(NamedTuple):
    """Bytes on each GPU by part, and operations of a pair."""

    unet: int
    reference: int
    vae_and_text_encoders: int
    gradients: int
    optimizer: int
    activations: int
    flops: float

    @property
    def total(self) -> int:
        return sum(self[:-1])

    @property
    def fits(self) -> list[int]:
        """The GPUs that have so much, by their size."""
        return [size for size in GPUS if self.total + RESERVE <= size * USABLE]


class Tally(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and alive, now and at most, and the operations of matrix products and
    convolutions (a multiplication and an addition are two)."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.flops = 0
        self.storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {storage._cdata for storage in storages((args, kwargs))}
        out = f(*args, **kwargs)
        for storage in storages(out):
            if storage._cdata not in given and storage not in self.storages:
                self.storages[storage] = None
                weakref.finalize(storage, self.let_go, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        if f.overloadpacket in FORMULAS:
            self.flops += FORMULAS[f.overloadpacket](*args, **kwargs, out_val=out)
        return out

    def let_go(self, size: int) -> None:
        self.now -= size


def storages(tree) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def faked(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """A module on no device (meta) as one of FakeTensorMode on the CPU."""
    return module._apply(lambda x: FakeTensor(mode, x, torch.device("cpu")))


def bytes_of(*modules: torch.nn.Module | None) -> int:
    return sum(p.nbytes for m in modules if m is not None for p in m.parameters())


def parts(s) -> tuple[UNet2DConditionModel, AutoencoderKL, list[torch.nn.Module]]:
    """UNet, VAE and text encoders that training would load, in float32 on no device: of their configurations alone."""
    unet = load_config(UNet2DConditionModel, "init-unet", s.init_unet, s.base_model, "unet")
    vae = load_config(AutoencoderKL, "vae", s.vae, s.base_model, "vae")
    index = load_part(DiffusionPipeline, "base-model", s.base_model, "")
    encoders = []
    with torch.device("meta"):
        for part in (part for part in index if part.startswith("text_encoder")):
            # Any class of diffusers reads the configuration of any.
            config = load_part(UNet2DConditionModel, "base-model", s.base_model, part)
            encoders.append(getattr(transformers, index[part][1])(transformers.CLIPTextConfig.from_dict(config)))
        return UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae), encoders


def predict(s, shards: int = 0) -> Need:
    """What train_dipo.py needs on each GPU for a batch that adds to the gradients of those before. shards: how many
    processes FSDP spreads the UNet over. UserError for models whose configuration cannot be had."""
    unet, vae, encoders = parts(s)
    if s.lora_rank:
        training.add_lora(s, unet, s.dtype)
    separate = s.loss not in WITHOUT_REFERENCE and not s.lora_rank
    reference = training.make_reference(unet, s.dtype, s.dtype if shards else torch.float32) if separate else None
    own = [bytes_of(unet), bytes_of(reference), bytes_of(*(m.to(s.dtype) for m in (vae, *encoders)))]
    if s.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    autocast = s.dtype != torch.float32 and not shards
    unet = norms_in_float32(unet) if autocast else unet.to(s.dtype)
    mode = FakeTensorMode()
    unet, vae = faked(unet.train(), mode), faked(vae, mode)
    with mode, Tally() as tally:
        gradients, optimizer = step(s, unet, vae, tally, autocast)
    need = Need(*own, gradients, optimizer, tally.most - gradients - optimizer, tally.flops / s.train_batch_size)
    if s.optimizer == "adamw8bit":
        need = need._replace(optimizer=eight_bit(unet.parameters()))
    return spread(need, unet, shards) if shards else need


def norms_in_float32(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet with norms computed as autocast has them on a GPU, and not on the CPU."""
    for m in unet.modules():
        if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm):
            m.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return unet


def step(s, unet, vae, tally: Tally, autocast: bool) -> tuple[int, int]:
    """The optimizer's step, and a batch as train_dipo.py's loop has it. Returns the bytes of gradients and optimizer."""
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    gradients = tally.now
    # bitsandbytes asks for values.
    known = replace(s, optimizer="adamw") if s.optimizer == "adamw8bit" else s
    optimizer = training.make_optimizer(known, parameters, s.full_learning_rate)
    optimizer.step()
    state = tally.now - gradients

    c, rows, factor = unet.config, 2 * s.train_batch_size, 2 ** (len(vae.config.block_out_channels) - 1)
    size = training.picture_size(s, SimpleNamespace(unet=unet, vae_scale_factor=factor))
    if not s.cache_dir:
        training.encode_pictures(vae, torch.zeros(rows, size, size, 3, dtype=torch.uint8))
    noise = torch.zeros(rows, c.in_channels, size // factor, size // factor)
    pooled = c.addition_embed_type and c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    text = torch.zeros(rows, 77, c.cross_attention_dim, dtype=s.dtype)
    text = text_of(text, text.new_zeros(rows, pooled) if pooled else None, size, size)
    given = noise.to(s.dtype), torch.zeros(rows, dtype=torch.long)
    with torch.autocast("cpu", s.dtype, enabled=autocast, cache_enabled=False):
        with torch.no_grad():
            base = None if s.loss in WITHOUT_REFERENCE else unet(*given, **text.last(rows))[0]
        pred = unet(*given, **text.last(rows))[0]
    preference_loss(s.loss, pred, base, noise, s.beta_dpo, s.winner_preserving)[0].backward()
    return gradients, state


def eight_bit(parameters) -> int:
    """Bytes of bitsandbytes' AdamW: of a weight two, of a block of 256 two float32; few weights stay in float32."""
    sizes = [p.numel() for p in parameters if p.requires_grad]
    return sum(2 * n + 8 * math.ceil(n / 256) if n >= 4096 else 8 * n for n in sizes)


def spread(need: Need, unet: UNet2DConditionModel, shards: int) -> Need:
    """The same with FSDP: a share of weights, gradients and AdamW's state, in float32; whole, in half precision and with
    gradients, what is in no transformer's block, and two of these blocks. At the start there is the whole UNet."""
    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    whole = bytes_of(unet) - bytes_of(*blocks) + 2 * max(map(bytes_of, blocks))
    share = need.unet // shards
    most = max(need.activations + 2 * whole, need.unet - 4 * share)
    return need._replace(unet=share, gradients=share, optimizer=2 * share, activations=most)


def told(s, processes: int) -> str:
    """What --dry-run says: memory by part, the GPUs that have it, operations and time. UserError for DeepSpeed."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("--dry-run: knows FSDP (configs/fsdp.yaml), not DeepSpeed; launch without its configuration")
    # As it was asked for: without GPUs accelerate takes no FSDP.
    need = predict(s, processes if parse_flag_from_env("ACCELERATE_USE_FSDP") else 0)
    held = [f"{k.replace('_', ' ')} {v / 1e9:.3g}" for k, v in need._asdict().items() if k != "flops" and v]
    days = need.flops * s.effective_batch_size * s.max_train_steps / processes / (s.tflops * 1e12) / 86400
    fits = f"GPUs of {', '.join(map(str, need.fits))}" if need.fits else f"no GPU of up to {GPUS[-1]}"
    return (
        f"predicted, not measured: --train-batch-size {s.train_batch_size}, --mixed-precision {s.mixed_precision}, "
        f"processes: {processes}\n{need.total / 1e9:.3g} GB on each: {', '.join(held)}\n"
        f"with {RESERVE / 1e9} GB for CUDA itself fits {fits} GB\n"
        f"{need.flops / 1e12:.3g} TFLOP a pair; {s.max_train_steps} steps of {s.effective_batch_size} pairs take "
        f"{days:.3g} days at {s.tflops:g} TFLOP/s on each (--tflops)"
    )
