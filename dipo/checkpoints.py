"""What lets a training run go on: whole checkpoints with checksums, metrics.csv row by row, signals."""

import contextlib
import io
import json
import re
import shutil
import signal
import zlib
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dipo.cli import UserError, first_line, warn
from dipo.files import write_text, written_whole

STEP = "step-" + "[0-9]" * 7
# Settings that a resumed run may change; data, model and optimizer have to stay what they were.
MAY_CHANGE = ("output_dir", "resume", "demo", "max_train_steps", "learning_rate", "scale_lr", "beta_dpo", "weight_decay")
MAY_CHANGE += ("max_grad_norm", "checkpoint_every", "keep_checkpoints", "validate_every", "validation_prompts", "device")
MAY_CHANGE += ("max_mse_ratio", "wandb", "save_dtype", "gradient_checkpointing", "lr_warmup_steps", "train_batch_size")
MAY_CHANGE += ("num_workers", "push_to_hub", "winner_preserving", "lr_scheduler", "dry_run", "tflops")
# Where judges lie; the cache knows which one labelled its pairs.
MAY_CHANGE += ("pickscore", "pickscore_processor", "hpsv2", "hpsv2_version", "clip")
# What older versions knew no other of, so that their checkpoints and caches do not say it.
ONLY_SETTINGS = {"dataset_split": "train", "ranked_pairs": "all", "relabel": None, "relabel_margin": 0.0, "flip": False}


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


@contextlib.contextmanager
def full_disk_told(out: Path):
    """UserError where weights cannot be written for want of room: safetensors and torch.save tell that in their own ways."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        if shutil.disk_usage(out).free > 1e8 and not re.search("No space left|quota|inline_container", str(e)):
            raise
        raise UserError(f"{out}: the disk is full; checkpoints are whole, make room and go on with --resume") from e


def save_checkpoint(accelerator: Accelerator, out: Path, progress: dict, position: dict, keep: int) -> None:
    """checkpoints/step-N: weights, optimizer and random state by accelerate, the position in the data of every process,
    progress.json, and a checksum of each file. It gets its name when whole; the oldest beyond keep are removed."""
    folder = out / "checkpoints" / f"step-{progress['step']:07d}"
    part = folder.with_name(f".{folder.name}.part")
    main = accelerator.is_main_process
    if main:
        for left_over in folder.parent.glob("*.part"):
            shutil.rmtree(left_over)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with written_whole(folder) if main else contextlib.nullcontext():
        with full_disk_told(out):
            accelerator.save_state(str(part))
        write_text(part / f"loader-{accelerator.process_index}.json", json.dumps(position))
        accelerator.wait_for_everyone()
        if main:
            write_text(part / "progress.json", json.dumps(progress, indent=1))
            files = {str(p.relative_to(part)): checksum(p) for p in sorted(part.rglob("*")) if p.is_file()}
            write_text(part / "checksums.json", json.dumps(files, indent=1))
    if main:
        for old in sorted(folder.parent.glob(STEP))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def find_checkpoint(out: Path) -> Path | None:
    """The last checkpoint whose files are all there and whole; damaged ones are named on the way."""
    for folder in sorted((out / "checkpoints").glob(STEP), reverse=True):
        try:
            files = json.loads((folder / "checksums.json").read_text())
            bad = [name for name, value in files.items() if checksum(folder / name) != value]
        except (OSError, ValueError) as e:
            bad = [first_line(e)]
        if not bad:
            return folder
        warn(f"{folder} is damaged ({bad[0]}); falling back to the one before")
    return None


def find_progress(s, out: Path, accelerator: Accelerator) -> tuple[str, dict]:
    """The checkpoint to go on from, empty for none, and what is counted over the run. UserError where a resumed run
    differs from its checkpoint in what cannot change, a line for each other difference."""
    found = [str(find_checkpoint(out) or "")] if accelerator.is_main_process else [None]
    checkpoint, world = broadcast_object_list(found)[0], accelerator.num_processes
    if not checkpoint:
        counts = ("step", "pairs", "ties", "unreadable", "skipped", "skipped_in_row")
        return "", dict.fromkeys(counts, 0) | {"processes": world, "settings": asdict(s)}
    if not s.resume:
        raise UserError(f"--output-dir {s.output_dir}: holds {checkpoint}; --resume goes on from it, or give another folder")
    progress = json.loads((Path(checkpoint) / "progress.json").read_text())
    for key, value in json.loads(json.dumps(asdict(s))).items():
        old = progress["settings"].get(key, ONLY_SETTINGS.get(key, value))
        if old == value or key in ("output_dir", "resume") or (key == "cache_dir" and old and value):
            continue
        if key not in MAY_CHANGE:
            raise UserError(f"--resume: the checkpoint was made with {key} {old!r}, this run has {value!r}; use the same")
        accelerator.print(f"{key} is {value!r} from here on; it was {old!r}")
    return checkpoint, progress | {"processes": world}


def count_step(progress: dict, pairs: int, skipped: bool, ties: float, unreadable: float) -> int:
    """Count a step with so many pairs, and how many were left out before it. Returns its number."""
    counts = {"step": 1, "pairs": pairs, "skipped": skipped, "ties": ties, "unreadable": unreadable}
    for key, more in counts.items():
        progress[key] += int(more)
    progress["skipped_in_row"] = progress["skipped_in_row"] + 1 if skipped else 0
    return progress["step"]


def load_checkpoint(accelerator: Accelerator, checkpoint: str) -> list[dict]:
    """Load weights, optimizer and random state, or UserError. Returns each writing process's position in the data."""
    try:
        accelerator.load_state(checkpoint)
    except Exception as e:
        # Among others what torch.load says of a pickle that holds more than weights.
        raise UserError(f"--resume: {checkpoint} cannot be loaded ({first_line(e)[:200]}); delete it, or start anew") from e
    accelerator.step = 0  # a run that ended within an accumulation starts that one anew
    accelerator.print(f"going on from {checkpoint}")
    files = sorted(Path(checkpoint).glob("loader-*.json"), key=lambda p: int(p.stem.removeprefix("loader-")))
    return [json.loads(p.read_text()) for p in files]


def lora_hooks(accelerator: Accelerator, unet) -> None:
    """Have checkpoints hold the LoRA alone instead of the whole frozen UNet with it."""

    def save(models, weights, folder):
        if accelerator.is_main_process:
            save_file(get_peft_model_state_dict(unet), Path(folder) / "lora.safetensors")
        weights.clear()

    def load(models, folder):
        set_peft_model_state_dict(unet, load_file(Path(folder) / "lora.safetensors"))
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def open_metrics(path: Path, step: int) -> None:
    """Leave the whole rows up to the step that a resumed run goes on from, no file for a new run."""
    try:
        text = path.read_text(encoding="utf-8") if step else ""
        table = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]), dtype=str)  # digit by digit as they are
        write_text(path, table[table["step"].astype(int) <= step].to_csv(index=False))
    except (FileNotFoundError, KeyError, ValueError):
        if step and path.exists():
            warn(f"{path} cannot be read; it begins anew at step {step + 1}")
        path.unlink(missing_ok=True)


def add_metrics(path: Path, row: dict) -> None:
    """Add one row; whoever reads the file meanwhile sees whole rows. An older version's file gets the columns it lacks."""
    old = [pd.read_csv(path, dtype=str)] if path.exists() else []
    write_text(path, pd.concat([*old, pd.DataFrame([row]).astype(str)]).to_csv(index=False))


class Signals:
    """Notes the first SIGTERM or Ctrl-C while it is entered; a second one ends the process as usual."""

    def __enter__(self):
        self.received = 0
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        self.received = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def anywhere(self, accelerator: Accelerator) -> int:
        """The signal that any process received, 0 if none did."""
        if accelerator.num_processes == 1:
            return self.received
        heard = torch.tensor([self.received], device=accelerator.device)
        return int(accelerator.gather(heard).max())
