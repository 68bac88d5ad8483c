"""A process among others: its device, precision and clock, and the folder that they hold together."""

import contextlib
import re
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from dipo.cli import UserError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def check_device(name: str) -> None:
    """Raise UserError unless name is auto, cpu, mps, cuda or cuda:N and such a device is there."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name!r}: use auto, cuda, cuda:1, mps or cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA GPU is visible to torch here; use --device cpu, or fix the driver")
    if number and int(number) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has GPUs 0 to {torch.cuda.device_count() - 1} only")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU is visible to torch here; use --device cpu")


def on_cpu(name: str) -> bool:
    """Whether a run with this --device is one on the CPU, which several processes have to be told to share work there."""
    return name == "cpu" or not torch.accelerator.is_available()


def start(name: str) -> tuple[PartialState, torch.device]:
    """This process's place among those of an accelerate launch, and its device."""
    # A process that is done early waits for the others longer than the ten minutes that NCCL would allow.
    state = PartialState(cpu=on_cpu(name), timeout=timedelta(days=7))
    if ":" not in name:
        return state, state.device
    torch.cuda.set_device(torch.device(name))
    return state, torch.device(name)


@contextlib.contextmanager
def claimed(folder: Path, state, flag: str = "output-dir"):
    """Hold a folder's lock on the state's main process; UserError on all where another run has it. Its file then goes."""
    lock, taken = FileLock(folder / ".lock", timeout=0), [False]
    if state.is_main_process:
        try:
            lock.acquire()
        except Timeout:
            taken = [True]
    broadcast_object_list(taken)
    if taken[0]:
        raise UserError(f"--{flag} {folder}: another run is writing there; wait for it, or give another")
    try:
        yield
        if state.is_main_process:
            (folder / ".lock").unlink(missing_ok=True)
    finally:
        lock.release()


def dtype_for(name: str, device: torch.device) -> str:
    """fp16, bf16 or fp32: what --dtype says, where it says auto fp16 on a GPU and fp32 on the CPU."""
    automatic = "fp32" if device.type == "cpu" else "fp16"
    return automatic if name == "auto" else name


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def clock(device: torch.device) -> float:
    """Seconds, read when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
