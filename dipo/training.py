"""What training does besides the step: checks of its settings, the models of both sides, batches for them, alarms."""

import contextlib
import math
import os
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
import transformers
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, parse_flag_from_env
from accelerate.utils.imports import is_bnb_available, is_wandb_available
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from tqdm import tqdm

from dipo.checks import check_at_least
from dipo.cli import UserError, warn
from dipo.devices import on_cpu
from dipo.losses import STARTS, WITHOUT_REFERENCE
from dipo.models import Text, text_of

CACHED = ("moments", "prompt_embeds", "pooled_embeds")
MAX_SKIPPED = 10


def check_training(s) -> None:
    """Raise UserError for every value that can be judged without data or models."""
    check_at_least(s, max_train_steps=1, effective_batch_size=1, train_batch_size=1, lr_warmup_steps=0, lora_rank=0)
    check_at_least(s, shuffle_buffer=1, num_workers=0, checkpoint_every=1, keep_checkpoints=1, validate_every=0)
    check_at_least(s, max_train_pairs=1, seed=0, resolution=8)
    numbers = ("learning_rate", "beta_dpo", "max_grad_norm", "max_mse_ratio", "lora_alpha", "tflops")
    rules = [(x, getattr(s, x) is None or 0 < getattr(s, x) < math.inf, "use a finite number above 0") for x in numbers]
    mu, tied = s.winner_preserving, s.init_unet and not s.lora_rank and s.loss not in WITHOUT_REFERENCE
    installed = s.optimizer != "adamw8bit" or s.dry_run or is_bnb_available()
    rules += [
        ("weight_decay", 0 <= s.weight_decay < math.inf, "use 0 or more"),
        ("caption_dropout", 0 <= s.caption_dropout < 1, "use 0 (every pair with its caption) to less than 1"),
        ("relabel_margin", 0 <= s.relabel_margin < math.inf, "use 0 or more, in the judge's own units"),
        ("relabel_margin", s.relabel or not s.relabel_margin, "has no scores without a judge; add --relabel pickscore"),
        ("relabel", s.relabel != "clipscore" or s.clip, "there is no model (--clip is empty, as the demo's is); give one"),
        ("mixed_precision", s.mixed_precision != "fp16" or torch.cuda.is_available(), "needs a CUDA GPU; use bf16 or no"),
        ("winner_preserving", mu is None or 0 <= mu <= 1, "use 0 to 1"),
        ("winner_preserving", mu is None or s.loss != "sft", "sft trains on winners only; leave it out"),
        ("reference", s.reference == "init" or tied, "needs --init-unet, a loss that has a reference, and no --lora-rank"),
        ("optimizer", installed, "not installed; pip install bitsandbytes"),
        ("wandb", not s.wandb or is_wandb_available(), "not installed; pip install wandb"),
    ]
    for name, fine, advice in rules:
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: {advice}")


def best_precision(device: str) -> str:
    """The mixed precision that auto stands for on this machine."""
    if on_cpu(device) or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def result_flags(s, name: str) -> str:
    """How hasty_sample.py is told of the result that lies in a folder or on the hub."""
    if not s.lora_rank:
        return f"--dpo-unet {name}"
    return f"--dpo-unet {s.init_unet} --dpo-lora {name}" if s.init_unet else f"--dpo-lora {name}"


def open_accelerator(s, out: Path) -> Accelerator:
    """The processes of this launch. UserError where the batch does not divide, or for what FSDP and DeepSpeed cannot do."""
    steps = accumulation_steps(s.effective_batch_size, s.train_batch_size, int(os.environ.get("WORLD_SIZE", 1)))
    # FSDP would add up whole gradients on each device.
    accumulation = GradientAccumulationPlugin(num_steps=steps, sync_each_batch=parse_flag_from_env("ACCELERATE_USE_FSDP"))
    accelerator = Accelerator(
        cpu=on_cpu(s.device),
        mixed_precision=s.mixed_precision,
        log_with=["tensorboard", "wandb"] if s.wandb else ["tensorboard"],
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / "tensorboard")),
        gradient_accumulation_plugin=accumulation,
        kwargs_handlers=[
            # A process that encodes or writes keeps the others waiting longer than the ten minutes that NCCL would allow.
            InitProcessGroupKwargs(timeout=timedelta(days=1)),
            # Weights cast to half precision, which a forward pass in training uses once, would be kept to its end.
            AutocastKwargs(cache_enabled=False),
            # And all gradients be there twice, once on their way to the other processes.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if in_parts(accelerator) and s.optimizer != "adamw":
        raise UserError(f"--optimizer {s.optimizer}: does not work on weights in parts (FSDP, DeepSpeed); use adamw")
    if in_parts(accelerator) and s.lora_rank:
        raise UserError(f"--lora-rank {s.lora_rank}: has no use for FSDP or DeepSpeed; launch without their configuration")
    return accelerator


def accumulation_steps(effective_batch_size: int, train_batch_size: int, processes: int) -> int:
    """How many batches each device adds up before an optimizer step; UserError where the numbers do not divide."""
    steps, rest = divmod(effective_batch_size, train_batch_size * processes)
    if rest:
        what = f"no multiple of {train_batch_size} pairs per device x {processes} processes"
        raise UserError(f"--effective-batch-size {effective_batch_size}: {what}; use one, or another --train-batch-size")
    return steps


def tell_rates(s, accelerator: Accelerator) -> None:
    """Print what the effective batch and the learning rate are made of, and what to watch, as the loss says little."""
    world = accelerator.num_processes
    times = ", taken as it is (--scale-lr multiplies it by the effective batch)"
    if s.scale_lr:
        times = f" = {s.learning_rate:g} per pair x {s.effective_batch_size} (--no-scale-lr takes it as it is)"
    watch = "has no reference: watch winner_mse and loser_mse in metrics.csv, and validation/"
    if s.loss not in WITHOUT_REFERENCE:
        start = f"at {STARTS[s.loss]:.4g}" if s.loss in STARTS else "at the noise error"
        watch = (
            f"starts {start} and moves little: watch implicit_accuracy (0.5: nothing learned yet) and winner_change (the "
            "winners' noise error less the reference's; it should not grow) in metrics.csv, loss.png, and validation/"
        )
    accelerator.print(
        f"effective batch {s.effective_batch_size} = {s.train_batch_size} per device x {world} "
        f"{'process' if world == 1 else 'processes'} x {accelerator.gradient_accumulation_steps} accumulated\n"
        f"learning rate {s.full_learning_rate:.4g}{times}\n--loss {s.loss} {watch}"
    )


def picture_size(s, pipe: DiffusionPipeline) -> int:
    """Pixels of a picture's side; UserError unless the VAE and all levels of the UNet can halve it."""
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    resolution = s.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    if resolution % multiple:
        raise UserError(f"--resolution {resolution}: must be a multiple of {multiple}")
    return resolution


def add_lora(s, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Freeze the UNet in dtype and add a LoRA in float32, zero at the start. UserError for a target that fits no layer."""
    unet.requires_grad_(False).to(dtype)
    targets, alpha = list(s.lora_targets), s.lora_alpha or s.lora_rank
    names = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"--lora-targets {target}: no layer's name ends so; give to_q to_k to_v to_out.0 or others")
    unet.add_adapter(LoraConfig(r=s.lora_rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)


def make_reference(unet: UNet2DConditionModel, dtype: torch.dtype, norms: torch.dtype) -> UNet2DConditionModel:
    """A frozen copy with its norms in one precision and all else in dtype. With the precision in which the model's own
    norms are computed (float32 under autocast, dtype where FSDP or DeepSpeed cast everything) the two agree to the last
    bit, so that training starts with a loss of ln 2."""
    with torch.device("meta"):
        reference = type(unet).from_config(unet.config).eval()
    for source, copy in zip(unet.modules(), reference.modules(), strict=True):
        kind = norms if isinstance(source, torch.nn.GroupNorm | torch.nn.LayerNorm) else dtype
        for name, p in source.named_parameters(recurse=False):
            setattr(copy, name, torch.nn.Parameter(p.detach().to(kind, copy=True), requires_grad=False))
    return reference


@contextlib.contextmanager
def base_model(accelerator: Accelerator, model: torch.nn.Module, unet: UNet2DConditionModel, reference):
    """The reference model, for what is done inside, without gradients: a UNet of its own or, for None, the model itself,
    whose UNet has a LoRA that is off meanwhile."""
    with torch.no_grad(), autocast(accelerator):
        if reference is not None:
            yield reference
            return
        unet.disable_adapters()
        try:
            yield model
        finally:
            unet.enable_adapters()


def in_parts(accelerator: Accelerator) -> bool:
    """Whether weights or optimizer are spread over the processes."""
    return accelerator.distributed_type in ("FSDP", "DEEPSPEED")


def set_parts(s, accelerator: Accelerator, unet: UNet2DConditionModel) -> None:
    """What those who spread a step over several processes want before they take the UNet."""
    if accelerator.distributed_type == "DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = s.train_batch_size
        config["gradient_clipping"] = s.max_grad_norm
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=s.dtype, reduce_dtype=torch.float32, output_dtype=s.dtype)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    elif accelerator.num_processes > 1:
        # Which DistributedDataParallel takes for the place of the gradients that it exchanges; else it has that besides.
        for p in unet.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None


def autocast(accelerator: Accelerator):
    """A context for forward passes, none with FSDP and DeepSpeed: they cast themselves, and the reference would differ."""
    return contextlib.nullcontext() if in_parts(accelerator) else accelerator.autocast()


def make_optimizer(s, parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if s.optimizer == "adamw":
        fused = parameters[0].device.type == "cuda"
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=s.weight_decay, fused=fused)
    if s.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=lr, weight_decay=s.weight_decay)
    return transformers.Adafactor(parameters, lr=lr, weight_decay=s.weight_decay, scale_parameter=False, relative_step=False)


def schedule(s):
    """A function from the number of a step, the first being 1, to the share of the learning rate that it takes."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # which get_scheduler wants to have
    steps = {"num_warmup_steps": s.lr_warmup_steps, "num_training_steps": s.max_train_steps + 1}
    return get_scheduler(s.lr_scheduler, optimizer, **steps).lr_lambdas[0]


def clip(accelerator: Accelerator, parameters: list[torch.nn.Parameter], max_norm: float) -> float:
    """Scale the gradients down to max_norm. Returns their norm before, over all processes; NaN where nobody knows it."""
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if norm is None:
        return math.nan
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and log variance of the VAE's posterior, (N, 8, H/8, W/8) in its dtype, of uint8 pictures (N, H, W, 3). To bound
    memory, only as many are encoded together as have the area of one SDXL image."""
    x = pixels.to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
    together = max(1, 1024 * 1024 // (x.shape[-2] * x.shape[-1]))
    return torch.cat([vae.encode(pictures).latent_dist.parameters for pictures in x.split(together)])


@torch.no_grad()
def encode_captions(pipe: DiffusionPipeline, captions: list[str]) -> list[torch.Tensor]:
    """The embeddings of B captions, (B, 77, D), and SDXL's pooled ones, (B, P)."""
    options = {"device": pipe.vae.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return list(pipe.encode_prompt(captions, **options)[::2])


def encode_unconditional(pipe: DiffusionPipeline) -> list[torch.Tensor]:
    """The same of the model's unconditional side, B = 1: SDXL's is zeros where its index says so."""
    zeros = getattr(pipe.config, "force_zeros_for_empty_prompt", False)
    return [torch.zeros_like(x) if zeros else x for x in encode_captions(pipe, [""])]


def prepare_batch(pipe: DiffusionPipeline, batch: dict, unconditional: list[torch.Tensor]) -> tuple[torch.Tensor, Text]:
    """What the UNet needs of B pairs, the winners first: latents (2B, 4, H/8, W/8) float32, scaled, and their Text, 2B rows.
    unconditional: the embeddings of a dropped caption."""
    device = pipe.vae.device
    mirrored = batch.get("mirrored")
    noise, drop = (batch[k].to(device, non_blocking=True) for k in ("posterior_noise", "drop_caption"))
    if "moments" in batch:
        moments, *given = (batch[k].to(device, non_blocking=True) for k in CACHED if k in batch)
        if mirrored is not None:
            mirrored = mirrored.to(device, non_blocking=True).long()
            moments = moments[torch.arange(len(moments), device=device), mirrored]
        moments = moments.transpose(0, 1).flatten(0, 1)
    else:
        pixels = batch["pixels"]
        if mirrored is not None:
            pixels = torch.where(mirrored.view(-1, 1, 1, 1, 1), pixels.flip(-2), pixels)
        moments = encode_pictures(pipe.vae, pixels.transpose(0, 1).flatten(0, 1))
        given = encode_captions(pipe, batch["caption"])
    posterior = DiagonalGaussianDistribution(moments.float())
    z = posterior.mean + posterior.std * noise.transpose(0, 1).flatten(0, 1)
    given = [torch.where(drop.view(-1, *[1] * (x.ndim - 1)), y, x) for x, y in zip(given, unconditional, strict=True)]
    text, *pooled = (torch.cat([x, x]) for x in given)
    height, width = (side * pipe.vae_scale_factor for side in z.shape[-2:])
    return z * pipe.vae.config.scaling_factor, text_of(text, *(pooled or [None]), height, width)


def check_start(argument: torch.Tensor) -> None:
    """UserError unless model and reference agree, as they must before the first step. argument: preference_loss's, (B,)."""
    far = argument.detach().abs().mean().item()
    if far > 0.1:
        raise UserError(f"model and reference differ before training, by {far:.3g}; use --mixed-precision bf16 or no")


@torch.no_grad()
def probe(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Copies of up to 8191 evenly spaced weights of each parameter (of this process's part of it)."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return [p.flatten()[:: max(1, p.numel() // 4096)].clone() for p in local]


def check_moved(before, parameters, lr: float, lora: bool, accelerator: Accelerator) -> None:
    """Print which share of the weights a step changed; UserError when none did, a warning when most did not. Zeros are left
    out, as any step changes them, but for a LoRA, half of which starts as zeros. before: probe's."""
    pairs = [(a, b, (a != 0) | lora) for a, b in zip(before, probe(parameters), strict=True)]
    counts = [sum(int(((a != b) & mask).sum()) for a, b, mask in pairs), sum(int(mask.sum()) for *_, mask in pairs)]
    moved, total = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()
    share = f"{100 * moved / total:.1f} % of {total} weights looked at"
    if accelerator.is_main_process:
        tqdm.write(f"the first step, at learning rate {lr:.3g}, moved {share}")
    if not moved:
        # Steps are smaller than the spacing of float32 numbers.
        raise UserError(f"no weight moved at learning rate {lr:.3g}; use --scale-lr, or a larger --learning-rate")
    if moved < 0.4 * total:
        warn("most steps are lost in rounding at this rate, which is that of warm-up")


def check_skipped(in_a_row: int) -> None:
    """UserError when too many steps in a row had no finite loss or gradient, from which on nothing is kept."""
    if in_a_row >= MAX_SKIPPED:
        what = f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row"
        raise UserError(f"{what}; --resume from before with a lower --learning-rate, or train in bf16")


def first_errors(progress: dict, m_w: float, m_l: float) -> tuple[float, float]:
    """The mean errors of winners and losers over the first 10 steps, which stand for the reference's where there is none.
    m_w, m_l: this step's. Keeps what that takes in progress, and in its recent the error of the last steps, their weight
    falling by a tenth with each: from batch to batch it varies too much to be held against the first ones."""
    if math.isfinite(m_w + m_l):
        progress["recent"] = 0.9 * progress.get("recent", (m_w + m_l) / 2) + 0.1 * (m_w + m_l) / 2
        n, first_w, first_l = progress.get("first", (0, 0.0, 0.0))
        if n < 10:
            progress["first"] = n + 1, (n * first_w + m_w) / (n + 1), (n * first_l + m_l) / (n + 1)
    _, *first = progress.get("first", (0, m_w, m_l))
    return tuple(first)


def drift_error(step: int, mse: float, reference_mse: float, max_ratio: float) -> UserError | None:
    """What to raise where the model's noise error is more than max_ratio times the reference's."""
    what = f"step {step}: the noise error {mse:.4f} exceeds {max_ratio:g} times the reference's {reference_mse:.4f}"
    advice = "start again with a lower --learning-rate, or --resume with a larger --max-mse-ratio"
    return UserError(f"{what}; {advice}") if mse > max_ratio * reference_mse else None


def warn_of_displacement(metrics: Path, progress: dict) -> None:
    """Once in a run, a warning where over the last 20 steps the loss is below the first step's and the winners' noise error
    above the reference's, each by more than two standard errors, and the error by more than 1 %, as less comes and goes.
    progress: gets a note of it."""
    table = pd.read_csv(metrics)
    last = table.tail(20)
    if progress.get("displaced") or len(last) < 20 or "winner_change" not in last:
        return
    change = last.winner_change
    share = 100 * change.mean() / (last.winner_mse - change).mean()
    falls = last.loss.mean() < table.loss[0] - 2 * last.loss.sem()
    if falls and share > 1 and change.mean() > 2 * change.sem():
        progress["displaced"] = True
        what = f"the loss falls, but the winners' noise error has grown by {share:.2g} % (likelihood displacement)"
        advice = "use --winner-preserving 0.5, a larger --beta-dpo, or a lower --learning-rate"
        warn(f"{what}; if pictures suffer, {advice}")


@contextlib.contextmanager
def out_of_memory_told(pairs: int):
    """UserError where the GPU's memory runs out with so many pairs at once."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        advice = "use a smaller --train-batch-size, --gradient-checkpointing, --optimizer adafactor, or --lora-rank 64"
        raise UserError(f"the GPU's memory does not hold {pairs} pairs of this size; {advice}") from e
