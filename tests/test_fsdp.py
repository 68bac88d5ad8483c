"""train_dipo.py with FSDP on two processes of the CPU: the curve of one process, also resumed, and memory as predicted."""

import os
import re

import pandas as pd
import pytest
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import start_two
from safetensors.torch import load_file

import train_dipo as td
from dipo import memory, training

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def with_fsdp(module):
    """accelerate takes FSDP for GPUs only; torch's own runs on the CPU too. Prints the most bytes that were alive."""
    opened, train = training.open_accelerator, td.train
    os.environ |= FSDP

    def sharded(s, out):
        accelerator = opened(s, out)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        assert accelerator.is_fsdp2
        return accelerator

    def watched(*given):
        with memory.Tally() as tally:
            stopped = train(*given)
        print("most", tally.most)
        return stopped

    training.open_accelerator, td.train = sharded, watched


def test_two_processes_with_fsdp_make_the_curve_of_one_without(tmp_path, run):
    """In float32."""
    flags = ["--demo", "--device", "cpu", "--effective-batch-size", "16", "--max-train-pairs", "32", "--validate-every", "0"]
    flags += ["--learning-rate", "1e-4", "--lr-warmup-steps", "0", "--cache-dir", tmp_path / "cache"]
    code, _, err = run("train_dipo", *flags, "--train-batch-size", "8", "--output-dir", "one", "--max-train-steps", "3")
    assert code == 0, err
    flags += ["--train-batch-size", "4", "--output-dir", tmp_path / "two"]
    processes = {"cwd": tmp_path, "before": (with_fsdp,)}
    first = start_two("train_dipo", *flags, "--max-train-steps", "2", **processes)
    then = start_two("train_dipo", *flags, "--max-train-steps", "3", "--resume", **processes)
    assert first.returncode == then.returncode == 0, first.stderr + then.stderr
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    columns = ["step", "loss", "grad_norm", "winner_mse", "loser_mse"]
    assert two[columns].to_numpy() == pytest.approx(one[columns].to_numpy(), rel=1e-4)
    one, two = (load_file(tmp_path / f"{name}/unet/diffusion_pytorch_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and max((one[k].float() - two[k].float()).abs().max() for k in one) < 1e-3
    # Gradients are never whole, though a step adds up two batches: bytes are as predicted on each process.
    s = td.complete(td.Settings(demo=True, train_batch_size=4, effective_batch_size=16, cache_dir="cache"))
    need = memory.predict(s, 2)
    most = [int(x) for x in re.findall(r"most (\d+)", first.stdout)]
    assert most == pytest.approx([need.gradients + need.optimizer + need.activations] * 2, rel=0.12)
