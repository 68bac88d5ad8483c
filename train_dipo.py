"""Train Stable Diffusion XL with Diffusion-DPO (Wallace et al. 2024) on pairs of pictures of which people preferred one.

DIPO changes no training objective (README.md says why): the UNet that this script leaves is sampled by DDIM in 20 to 50
steps with hasty_sample.py. The defaults are the paper's: SDXL 1.0, Pick-a-Pic, 2048 pairs a step, beta 5000.

    python train_dipo.py --demo                                          # the small model in assets/demo, without GPU
    python train_dipo.py --output-dir models/dipo --train-batch-size 4   # SDXL in full, four pairs at a time on one GPU
    python train_dipo.py --output-dir models/lora --lora-rank 64         # a LoRA: one UNet in memory instead of two
    python train_dipo.py --output-dir models/kto --loss kto              # another objective, of those in dipo/losses.py
    python train_dipo.py --output-dir models/mine --dataset pictures --relabel pickscore     # pairs of one's own, by a judge
    accelerate launch train_dipo.py --output-dir models/dipo             # all GPUs of this machine
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip 10.0.0.1 \\
        --main_process_port 29500 train_dipo.py --output-dir /shared/dipo      # the same on machine 1 with --machine_rank 1
    accelerate launch --config_file configs/fsdp.yaml train_dipo.py --optimizer adamw --output-dir models/dipo
    accelerate launch --config_file configs/deepspeed_zero2.yaml train_dipo.py --optimizer adamw --output-dir models/dipo
    python train_dipo.py --output-dir models/dipo --resume               # go on after Ctrl-C, SIGTERM or kill -9
    python train_dipo.py --train-batch-size 4 --dry-run                  # will it fit, how long will it take
    python hasty_sample.py --dpo-unet models/dipo                        # sample the result; --dpo-lora for a LoRA

To use other models or data, edit the paths at the top of Settings or pass them as flags. Data are a hub data set, or files
with columns that SCHEMAS in dipo/schemas.py knows: Pick-a-Pic's; prompt, chosen, rejected; HPDv2's, HPDv3's, ImageReward's.

The output folder gets unet/ (or pytorch_lora_weights.safetensors), settings.yaml, README.md (a model card), metrics.csv,
loss.png, validation/ (base above trained, same seeds), TensorBoard's events under tensorboard/, and checkpoints/.
"""

from dataclasses import dataclass
from typing import Literal

from dipo import cli


@dataclass(kw_only=True)
class Settings:
    base_model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """SDXL pipeline to train and to compare with, or one of SD 1.5 or 2.1: a folder, a .safetensors file or a hub name"""
    vae: str = "madebyollin/sdxl-vae-fp16-fix"
    """VAE that stays finite in fp16: a folder, a file or a hub name; empty (and for SD 1.5 and 2.1): the base model's own"""
    init_unet: str = ""
    """UNet to start from, as --dpo-unet of hasty_sample.py takes it; empty: the base model's own"""
    reference: Literal["init", "base"] = "init"
    """the reference model: the UNet that training starts from, or the base model's own"""
    dataset: str = "yuvalkirstain/pickapic_v2"
    """pairs: a hub name, a file (parquet, arrow, tar, jsonl, json), a folder of them, or of pictures alone for --relabel"""
    dataset_split: str = "train"
    """the part to train on; of a folder, the files named so, if there are any"""
    ranked_pairs: Literal["all", "best-worst"] = "all"
    """of several pictures ranked for a prompt: every pair of them, or the best and the worst"""
    relabel: Literal["pickscore", "hpsv2", "clipscore"] | None = None
    """winner and loser of every pair, also of ties, by this judge instead of the data set's labels"""
    relabel_margin: float = 0.0
    """leave pairs out whose scores differ by less, in the judge's own units"""
    # for --relabel: a folder or a hub name of each judge, and which of HPSv2's checkpoints
    pickscore: str = "yuvalkirstain/PickScore_v1"
    pickscore_processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    hpsv2: str = "xswu/HPSv2"
    hpsv2_version: Literal["v2.1", "v2.0"] = "v2.1"
    clip: str = "openai/clip-vit-base-patch32"

    demo: bool = False
    """train the small model of assets/demo on its own pairs, with the settings in DEMO where these are left alone"""
    output_dir: str = "models/dipo-sdxl"
    """where everything goes; on storage that all machines share"""
    resume: bool = False
    """go on from the last whole checkpoint in the output folder, if there is one"""
    dry_run: bool = False
    """say what a GPU's memory has to hold and how long the run would take, and load nothing"""
    tflops: float = 400.0
    """what --dry-run takes a GPU to reach, in 1e12 operations a second; 400 is 40 % of what is stated of an H100 in bf16"""
    cache_dir: str = ""
    """encode pictures and captions once, ahead, into this folder (0.8 MB a pair at 1024 pixels, 1.4 MB with --flip)"""
    max_train_pairs: int | None = None
    """use the first N pairs with a winner only"""

    max_train_steps: int = 1000
    """optimizer steps"""
    effective_batch_size: int = 2048
    """pairs in an optimizer step, over all devices; gradient accumulation follows from it"""
    train_batch_size: int = 1
    """pairs that a device holds at once"""
    learning_rate: float = 8.192e-9
    """per pair where scale_lr is on, else as it is"""
    scale_lr: bool = True
    """multiply the learning rate by the effective batch size, as the reference trainer's --scale_lr does"""
    lr_warmup_steps: int = 200
    """steps of linear warm-up"""
    lr_scheduler: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """the learning rate after warm-up: as it is, or down to 0 at the last step"""
    loss: Literal["dpo", "ipo", "sft", "kto", "mapo", "dspo"] = "dpo"
    """the objective, from dipo/losses.py; sft and mapo need no reference model in memory"""
    beta_dpo: float | None = None
    """strength of the tie to the reference model; default: the loss's own, 5000 for dpo"""
    winner_preserving: float | None = None
    """scale the loser's gradient so that the winner's error does not grow (Diffusion-SDPO): 0, or more, up to 1, for sure"""
    optimizer: Literal["adafactor", "adamw", "adamw8bit"] = "adafactor"
    """adafactor takes little memory; so does adamw8bit, which needs bitsandbytes"""
    weight_decay: float = 0.01
    """decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    caption_dropout: float = 0.2
    """share of pairs trained on the unconditional side, SDXL's zeros (the reference trainer: on an empty caption)"""
    lora_rank: int = 0
    """train a LoRA of this rank instead of all weights; the reference model is then the same UNet without it"""
    lora_alpha: float | None = None
    """the LoRA is multiplied by this over its rank; default: the rank"""
    lora_targets: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    """layers that get a LoRA, by how their names end; to the defaults one may add proj_in proj_out ff.net.0.proj ff.net.2"""
    flip: bool = True
    """mirror a pair as often as not, both pictures alike (the reference trainer: each by itself)"""
    resolution: int | None = None
    """pixels of a side, after resize and centre crop; default: the model's own, 1024 for SDXL, 512 for SD 1.5"""
    mixed_precision: Literal["auto", "bf16", "fp16", "no"] = "auto"
    """of the computation, over float32 weights; auto: bf16 on GPUs that have it, fp16 on others, no on the CPU"""
    gradient_checkpointing: bool = True
    """compute activations twice to save memory"""
    shuffle_buffer: int = 1000
    """pairs that are shuffled among each other, in memory"""
    num_workers: int | None = None
    """threads that read and decode pictures for each device; default: 4 on GPUs, else none"""
    seed: int = 0
    """every random choice follows from it"""
    device: Literal["auto", "cpu"] = "auto"
    """auto: what accelerate finds"""

    checkpoint_every: int = 50
    """steps between checkpoints"""
    keep_checkpoints: int = 3
    """how many of the last ones stay"""
    validate_every: int = 100
    """steps between validation grids; 0: none"""
    validation_prompts: str = ""
    """a .txt with a prompt a line, or what --prompts of hasty_sample.py takes, at most eight; empty: VALIDATION_PROMPTS"""
    max_mse_ratio: float = 2.0
    """stop when the model's noise error exceeds this many times the reference's: it is losing what it knew"""
    wandb: bool = False
    """log to Weights & Biases besides TensorBoard"""
    save_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """precision of the saved UNet or LoRA (checkpoints are always fp32)"""
    push_to_hub: str = ""
    """upload the result to this hub repository, owner/name (private if new)"""

    @property
    def dtype(self) -> "torch.dtype":
        """what is computed in, over float32 weights"""
        return DTYPES.get(self.mixed_precision, torch.float32)

    @property
    def full_learning_rate(self) -> float:
        """the learning rate after warm-up"""
        return self.learning_rate * (self.effective_batch_size if self.scale_lr else 1)


# --help and wrong flags end here, before the seconds that the imports below take.
cli.answer(Settings, __name__, __doc__)

import contextlib
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm

from dipo import checkpoints, losses, memory, training
from dipo.annotate import open_data
from dipo.cache import open_pairs
from dipo.checks import check_models, completed
from dipo.cli import Stopped
from dipo.devices import DTYPES, claimed
from dipo.files import writable_folder
from dipo.losses import preference_loss
from dipo.models import fitted, load_part, pipeline_class, ready
from dipo.pairs import make_loader, quiet_data
from dipo.prompts import read_prompts
from dipo.results import base_pictures, check_upload, plot_metrics, save_result, upload_result, validate

# What --demo uses instead of the defaults above: sizes for 2 CPU cores, chosen by the annotator's reward on training
# captions (demo/measure_dpo.py --split train). At beta 5000 and twice this rate the loss rose above ln 2.
DEMO = {
    "dataset": "assets/demo/pickapic/train.parquet",
    "output_dir": "models/dipo-demo",
    "max_train_steps": 250,
    "effective_batch_size": 64,
    "train_batch_size": 64,
    "learning_rate": 1e-5,
    "scale_lr": False,
    "lr_warmup_steps": 20,
    "optimizer": "adamw",
    "caption_dropout": 0.0,
    "flip": False,  # its pictures are drawn as often one way round as the other
    "gradient_checkpointing": False,
    "checkpoint_every": 25,
    "validate_every": 50,
    "validation_prompts": "assets/demo/prompts.txt",
}
# dpo's was chosen so. ipo's and kto's give a gain the same weight: dpo's and ipo's argument has half of beta.
DEMO_BETAS = {"dpo": 1000.0, "ipo": 1000.0, "kto": 500.0}
VALIDATION_PROMPTS = (
    "a close-up portrait of an old fisherman in a yellow raincoat, soft window light",
    "a lighthouse on a cliff above a stormy sea at dusk",
    "abstract composition of overlapping circles in teal and copper",
    "a red fox reading a newspaper in a train, 35mm photograph",
)


def complete(s: Settings) -> Settings:
    """The settings with what follows from others: the demo's own, and the mixed precision that auto means here."""
    s = completed(s, DEMO)
    if (s.demo or s.relabel) and not s.cache_dir:
        s = replace(s, cache_dir=str(Path(s.output_dir) / "cache"))
    if s.mixed_precision == "auto":
        best = training.best_precision(s.device)
        s = replace(s, mixed_precision="bf16" if s.dry_run and best == "no" else best)
    if s.beta_dpo is None:
        s = replace(s, beta_dpo=(losses.BETAS | (DEMO_BETAS if s.demo else {})).get(s.loss))
    return s


def load_models(s: Settings, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """SDXL (or SD 1.5, 2.1) on the device in dtype, the UNet in float32 but for a LoRA. UserError for what does not load."""
    unet_dtype = dtype if s.lora_rank else torch.float32
    unet = ("init-unet", s.init_unet) if s.init_unet else ("base-model", s.base_model)
    parts = {"unet": load_part(UNet2DConditionModel, *unet, "unet", unet_dtype, s.base_model)}
    if s.vae:
        parts["vae"] = load_part(AutoencoderKL, "vae", s.vae, "vae", dtype, s.base_model)
    pipe = load_part(pipeline_class(s.base_model), "base-model", s.base_model, "", dtype, **parts)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    return ready(pipe, s, device, less="--lora-rank 64")


def wrap(s: Settings, pipe: DiffusionPipeline, accelerator: Accelerator):
    """The UNet as accelerate, FSDP or DeepSpeed have it, its optimizer, the frozen reference (None for LoRA, sft, mapo)."""
    unet, dtype, reference = pipe.unet, s.dtype, None
    if s.lora_rank:
        torch.manual_seed(s.seed)
        training.add_lora(s, unet, dtype)
        checkpoints.lora_hooks(accelerator, unet)
    elif s.loss not in losses.WITHOUT_REFERENCE:
        norms = dtype if training.in_parts(accelerator) else torch.float32
        if s.reference == "base":
            base = load_part(UNet2DConditionModel, "base-model", s.base_model, "unet", torch.float32)
        reference = training.make_reference(unet if s.reference == "init" else base, dtype, norms).to(unet.device)
    unet.train()
    if s.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    training.set_parts(s, accelerator, unet)
    optimizer = training.make_optimizer(s, [p for p in unet.parameters() if p.requires_grad], s.full_learning_rate)
    model, optimizer = accelerator.prepare(unet, optimizer)
    return model, optimizer, reference


def train(s: Settings, accelerator: Accelerator, pipe, model, reference, optimizer, pairs, progress, prompts, out) -> int:
    """The optimizer steps up to max_train_steps. Returns the signal that ended them early, 0 if none did."""
    device, deepspeed = accelerator.device, accelerator.distributed_type == "DEEPSPEED"
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    predicts_v = pipe.scheduler.config.prediction_type == "v_prediction"
    unconditional = training.encode_unconditional(pipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loader, before = make_loader(pairs, s.train_batch_size, s.num_workers, device), training.probe(parameters)
    schedule, with_reference = training.schedule(s), s.loss not in losses.WITHOUT_REFERENCE
    position, size = pairs.position, s.effective_batch_size
    total, done = s.max_train_steps * size, progress["step"] * size
    bar = tqdm(total=total, initial=done, unit="pair", desc="training", disable=not accelerator.is_main_process)
    with bar, contextlib.closing(loader), checkpoints.Signals() as signals:
        while progress["step"] < s.max_train_steps:
            lr = s.full_learning_rate * schedule(progress["step"] + 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            began, sums, left_out = time.perf_counter(), torch.zeros(6, device=device), torch.zeros(2)
            for i in range(accelerator.gradient_accumulation_steps):
                if number := signals.anywhere(accelerator):
                    # What this step has added up is let go; the checkpoint is of its beginning.
                    keep(s, accelerator, out, progress, position)
                    return number
                batch, behind = next(loader)
                latents, text = training.prepare_batch(pipe, batch, unconditional)
                noise, t = (batch[k].to(device, non_blocking=True) for k in ("noise", "timestep"))
                noise, t = torch.cat([noise, noise]), torch.cat([t, t])
                noisy = noise_scheduler.add_noise(latents, noise, t).to(s.dtype)
                target = noise_scheduler.get_velocity(latents, noise, t) if predicts_v else noise
                given, reference_pred = text.last(len(noisy)), None
                with accelerator.accumulate(model):
                    if with_reference:
                        with training.base_model(accelerator, model, pipe.unet, reference) as base:
                            reference_pred = base(noisy, t, **given)[0]
                    preds = model(noisy, t, **given)[0], reference_pred
                    loss, argument, errors = preference_loss(s.loss, *preds, target, s.beta_dpo, s.winner_preserving)
                    if progress["step"] == 0 and i == 0 and with_reference and s.reference == "init":
                        training.check_start(argument)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = training.clip(accelerator, parameters, s.max_grad_norm)
                        # The scaler of fp16 and DeepSpeed leave out such a step by themselves, and have to see it.
                        if math.isfinite(norm) or accelerator.scaler is not None or deepspeed:
                            optimizer.step()
                    # Set to none, gradients would leave the place where the processes exchange them.
                    optimizer.zero_grad(set_to_none=False)
                accuracy = (argument > 0).float() + (argument == 0).float() / 2
                sums += torch.stack([loss, accuracy.mean(), *(x.mean() for x in errors[:4])]).detach()
                left_out += torch.stack([batch["ties"], batch["unreadable"].sum()])

            sums /= accelerator.gradient_accumulation_steps * accelerator.num_processes
            totals = torch.cat([sums, left_out.to(device)])
            loss, accuracy, m_w, m_l, r_w, r_l, ties, bad = accelerator.reduce(totals, "sum").tolist()
            skipped = not math.isfinite(loss) or accelerator.optimizer_step_was_skipped
            skipped |= not math.isfinite(norm) and not deepspeed
            step = checkpoints.count_step(progress, size, skipped, ties, bad)
            position = behind
            if not with_reference:
                r_w, r_l = training.first_errors(progress, m_w, m_l)
            m, r = (m_w + m_l) / 2, (r_w + r_l) / 2
            row = {"loss": loss, "implicit_accuracy": accuracy, "model_mse": m, "reference_mse": r}
            row |= {"winner_mse": m_w, "loser_mse": m_l, "winner_change": m_w - r_w, "loser_change": m_l - r_l}
            row |= {"learning_rate": lr, "grad_norm": norm, "pairs_per_second": size / (time.perf_counter() - began)}
            row |= {k: progress[k] for k in ("skipped", "ties", "unreadable")}
            accelerator.log(row, step=step)
            if accelerator.is_main_process:
                checkpoints.add_metrics(out / "metrics.csv", {"step": step} | row)
            bar.update(size)
            bar.set_postfix_str(f"step {step}, loss {loss:.4f}, accuracy {accuracy:.2f}, mse {m:.4f}, reference's {r:.4f}")
            if skipped and accelerator.is_main_process:
                tqdm.write(f"step {step}: loss or gradient is not finite; step skipped ({progress['skipped']} so far)")
            if not skipped and before is not None and not deepspeed:  # which moves float32 copies
                training.check_moved(before, parameters, lr, s.lora_rank > 0, accelerator)
                before = None
            training.check_skipped(progress["skipped_in_row"])

            last = step >= s.max_train_steps
            drifted = training.drift_error(step, progress.get("recent", m), r, s.max_mse_ratio)
            if s.validate_every and not drifted and (last or step % s.validate_every == 0):
                validate(s, pipe, model, prompts, accelerator, out, step)
            if last or drifted or step % s.checkpoint_every == 0:
                keep(s, accelerator, out, progress, position)
            if drifted:
                raise drifted
    return 0


def keep(s: Settings, accelerator: Accelerator, out: Path, progress: dict, position: dict) -> None:
    """A checkpoint, loss.png up to it, and a warning where the metrics give reason for one."""
    checkpoints.save_checkpoint(accelerator, out, progress, position, s.keep_checkpoints)
    if accelerator.is_main_process and (out / "metrics.csv").exists():
        plot_metrics(out, losses.STARTS.get(s.loss))
        training.warn_of_displacement(out / "metrics.csv", progress)


def release(s: Settings, accelerator: Accelerator, pipe, model, progress: dict, out: Path) -> None:
    """The trained weights in one piece, with all that is known of them."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        summary = {"steps": progress["step"], "effective_learning_rate": s.full_learning_rate}
        summary |= {k: progress[k] for k in ("processes", "pairs", "ties", "unreadable", "skipped")}
        summary |= {f"{m.__name__}_version": str(m.__version__) for m in (torch, diffusers, transformers)}
        with checkpoints.full_disk_told(out):
            save_result(s, out, pipe.unet, weights, summary)
        print(
            f"{out}: {progress['step']} steps, {progress['ties']} ties and {progress['unreadable']} unreadable pairs left "
            f"out, {progress['skipped']} steps skipped; {out / 'metrics.csv'}, {out / 'loss.png'}; sample it with "
            f"hasty_sample.py {'--demo ' * s.demo}{training.result_flags(s, s.output_dir)}"
        )
    accelerator.wait_for_everyone()


def main(s: Settings) -> None:
    s = complete(s)
    training.check_training(s)
    check_models(s)
    prompts = list(VALIDATION_PROMPTS)
    if s.validation_prompts:
        prompts = list(read_prompts(s.validation_prompts, flag="validation-prompts")["prompt"][:8])
    quiet_data()
    out = Path(s.output_dir) if s.dry_run else writable_folder(s.output_dir)
    accelerator = training.open_accelerator(s, out)
    if s.push_to_hub and not s.dry_run and accelerator.is_main_process:
        check_upload(s.push_to_hub)
    s = fitted(s)
    if s.dry_run:
        return accelerator.print(memory.told(s, accelerator.num_processes))
    with claimed(out, accelerator), training.out_of_memory_told(s.train_batch_size):
        checkpoint, progress = checkpoints.find_progress(s, out, accelerator)
        rows, find = open_data(s, accelerator)
        training.tell_rates(s, accelerator)

        pipe = load_models(s, accelerator.device, s.dtype)
        pairs, left_out = open_pairs(s, rows, find, pipe, accelerator)
        model, optimizer, reference = wrap(s, pipe, accelerator)
        same_prompts = checkpoint and progress["settings"]["validation_prompts"] == s.validation_prompts
        if s.validate_every and not (same_prompts and base_pictures(out, prompts)[-1].exists()):
            validate(s, pipe, model, prompts, accelerator, out, step=0)
        if checkpoint:
            pairs.load(checkpoints.load_checkpoint(accelerator, checkpoint))
        progress |= left_out | {"settings": asdict(s)}
        if accelerator.is_main_process:
            checkpoints.open_metrics(out / "metrics.csv", progress["step"])
        config = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(s).items()}
        accelerator.init_trackers("dipo", config, {"tensorboard": {"purge_step": progress["step"] + 1}})
        if progress["step"] >= s.max_train_steps:
            accelerator.print(f"step {progress['step']} is there: nothing to train up to {s.max_train_steps}, saving it")
        stopped = train(s, accelerator, pipe, model, reference, optimizer, pairs, progress, prompts, out)
        if not stopped:
            release(s, accelerator, pipe, model, progress, out)
        accelerator.end_training()
        if s.push_to_hub and not stopped and accelerator.is_main_process:
            upload_result(s, out, progress["step"])
    if stopped:
        raise Stopped(stopped)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__, again="--resume goes on")
