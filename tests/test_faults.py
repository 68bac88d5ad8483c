"""Faults, made for real in a process of their own: kill -9 at chosen moments, a full disk, a folder that cannot be written,
files cut short, two runs at once. README.md beside this file has the table of what is kept."""

import csv
import ctypes
import fnmatch
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from helpers import fork, pixels
from PIL import Image
from safetensors import safe_open
from test_train_dipo import FLAGS, pairs_file, same, weights  # noqa: F401

from dipo import judges

SCRIPTS = ("hasty_sample", "train_dipo", "compare_quality", "Ablation_experiment", "Semantic_Categories")
SCRIPTS += ("Human_Preference_compare",)
COMMANDS = {
    "hasty_sample": (
        *("--demo", "--limit", 3, "--batch-size", 1, "--num-inference-steps", 4, "--timestep-spacing", "trailing"),
    ),
    "compare_quality": (
        *("--demo", "--limit", 1, "--batch-size", 2, "--rows", ROOT / "tests/rows.yaml"),
        *("--steps", 2, "--baseline-steps", 3),
    ),
    "Ablation_experiment": (
        "--demo",
        "--limit",
        1,
        "--batch-size",
        2,
        "--num-inference-steps",
        2,
        "--etas",
        0,
        "--redraws",
        1,
    ),
    "Semantic_Categories": ("--demo", "--limit", 1, "--batch-size", 2, "--dipo-steps", 2, "--baseline-steps", 3),
    "Human_Preference_compare": ("--demo", "--limit", 1, "--batch-size", 2, "--dipo-steps", 2, "--baseline-steps", 3),
}


def commands(script: str) -> tuple:
    return (*COMMANDS[script], *(() if script == "hasty_sample" else ("--scoring-batch-size", 3)))


TRAINING = (*FLAGS, "--max-train-steps", 5, "--validation-prompts", ROOT / "assets/demo/prompts.txt", "--resume")


# --------------------------------------------------------------------------------------------- what goes wrong, in there


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_call(module, name: str, n: int) -> None:
    """kill -9 at the n-th call of a function of the script, or of a method such as tqdm.update."""
    owner, calls = module, []
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)

    def counted(*arguments, **more):
        calls.append(1)
        if len(calls) == n:
            die()
        return real(*arguments, **more)

    setattr(owner, last, counted)


def kill_in_scorer(module, n: int) -> None:
    """kill -9 at the n-th batch of the second judge."""
    real, calls = judges.HPSv2.__call__, []

    def counted(self, *batch):
        calls.append(1)
        if len(calls) == n:
            die()
        return real(self, *batch)

    judges.HPSv2.__call__ = counted


def kill_before_rename(module, pattern: str, n: int) -> None:
    """kill -9 when a file is written and would get its name for the n-th time."""
    real, calls = os.replace, []

    def counted(source, target):
        if fnmatch.fnmatch(str(target), pattern):
            calls.append(1)
            if len(calls) == n:
                die()
        return real(source, target)

    os.replace = counted


def kill_in_checkpoint(module, n: int) -> None:
    """kill -9 when the n-th checkpoint is half written: its last file cut short."""
    real, calls = module.Accelerator.save_state, []

    def half(self, folder, *arguments, **more):
        result = real(self, folder, *arguments, **more)
        calls.append(1)
        if len(calls) == n:
            largest = max((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
            os.truncate(largest, largest.stat().st_size // 2)
            die()
        return result

    module.Accelerator.save_state = half


def give_up_rights(module) -> None:
    """Root passes over the permissions of a folder; without this capability it does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if hasattr(libc, "capget") and libc.capget(header, data) == 0:
        for word in (0, 1):
            data[word] &= ~(1 << 1)
        assert libc.capset(header, data) == 0


def record_writes(module, record: str) -> None:
    """Append to a file the names under which files are opened for writing."""
    log = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            if any(c in (mode or "") for c in "wax+") or (not mode and flags & (os.O_WRONLY | os.O_RDWR)):
                os.write(log, f"{path}\n".encode())

    sys.addaudithook(hook)


def begin(script: str, arguments: tuple, folder: Path, fault: tuple):
    """A process of a test; its output comes into the folder."""
    return fork(script, arguments, folder, "", {}, (globals()[fault[0]], *fault[1:]) if fault else ())


@pytest.fixture
def start(tmp_path):
    """start(script, *flags, fault=()) begins a run in a process of its own inside tmp_path/logs."""
    begun = []

    def call(script, *flags, fault=(), logs="logs"):
        (tmp_path / logs).mkdir(exist_ok=True)
        begun.append(begin(script, flags, tmp_path / logs, fault))
        return begun[-1]

    yield call
    for process in begun:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture
def job(start, tmp_path):
    """job(script, *flags, fault=()) waits for such a run; gives its exit code and what it wrote to standard error, without
    progress bars."""

    def call(script, *flags, fault=()):
        process = start(script, *flags, fault=fault)
        process.join(200)
        assert process.exitcode is not None
        err = (tmp_path / "logs/err.log").read_text(encoding="utf-8")
        assert "Traceback" not in err, err
        return process.exitcode, "\n".join(line for line in err.splitlines() if line.startswith(("error", "warning")))

    return call


@pytest.fixture
def training(tiny, pairs_file):  # noqa: F811
    return (*TRAINING, "--base-model", tiny, "--dataset", pairs_file)


def with_flags(flags: tuple, name: str, value) -> tuple:
    """Flags with another value of one of them."""
    at = flags.index(name)
    return (*flags[:at], name, value, *flags[at + 2 :])


def check_whole(folder: Path) -> None:
    """Whatever has its final name can be read to its end."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") or part.endswith(".part") for part in path.relative_to(folder).parts)
        if hidden or path.is_dir():
            continue
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as f:
                assert len({len(row) for row in csv.reader(f, strict=True)}) == 1, path
            assert path.read_bytes().endswith(b"\n")
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                assert all(f.get_tensor(k) is not None for k in f.keys())  # noqa: SIM118


def pictures(folder: Path) -> dict[Path, int]:
    """When each finished image was made."""
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("0*.png")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(script, flags): the folder of a run to which nothing happened, made once. The names that it opened for
    writing are beside it."""
    folder, done = tmp_path_factory.mktemp("undisturbed"), {}

    def make(script, *flags):
        if script not in done:
            done[script] = folder / script
            recorded = ("record_writes", str(folder / f"{script}.writes"))
            process = begin(script, (*flags, "--output-dir", done[script]), folder, recorded)
            process.join(200)
            code = process.exitcode
            process.kill()
            assert code == 0, (folder / "err.log").read_text()
        return done[script]

    return make


def check_same(script: str, got: Path, wanted: Path) -> None:
    """The same images within rounding, and the same scores."""
    assert pictures(got).keys() == pictures(wanted).keys()
    for path in pictures(wanted):
        assert np.abs(pixels(got / path) - pixels(wanted / path)).max() <= 2
    names = [{p.name for p in f.iterdir() if p.is_file()} for f in (got, wanted)]
    assert names[0] == names[1]
    if script != "hasty_sample":
        mine, theirs = (pd.read_csv(f / "scores.csv") for f in (got, wanted))
        assert mine["file"].tolist() == theirs["file"].tolist()
        for score, most in (("pickscore", 0.05), ("hpsv2", 0.005)):
            assert np.abs(mine[score] - theirs[score]).max() < most


# --------------------------------------------------------------------------------------------------------------- kill -9

KILLS = {
    # script, fault, images finished by then (at least), of how many
    "sampling, hasty_sample": ("hasty_sample", ("kill_in_call", "tqdm.update", 7), 1, 3),
    "decoding, hasty_sample": ("hasty_sample", ("kill_in_call", "decode", 3), 1, 3),
    "writing a PNG": ("hasty_sample", ("kill_before_rename", "*/00001.png", 1), 1, 1),
    "writing images.csv": ("hasty_sample", ("kill_before_rename", "*/images.csv", 1), 3, 3),
    "writing the grid": ("hasty_sample", ("kill_before_rename", "*/grid.png", 1), 3, 3),
    "sampling, compare_quality": ("compare_quality", ("kill_in_call", "sample", 5), 2, 9),
    "decoding, Ablation_experiment": ("Ablation_experiment", ("kill_in_call", "decode", 4), 2, 6),
    "scoring, Semantic_Categories": ("Semantic_Categories", ("kill_in_scorer", 2), 6, 6),
    "writing scores.csv": ("Human_Preference_compare", ("kill_before_rename", "*/scores.csv", 2), 12, 12),
    "writing table1.csv": ("compare_quality", ("kill_before_rename", "*/table1.csv", 1), 9, 9),
    "writing a plot": ("Ablation_experiment", ("kill_before_rename", "*/eta.png", 1), 6, 6),
}


@pytest.mark.parametrize("moment", KILLS)
def test_kill_9(moment, job, undisturbed, tmp_path):
    """What has its name is whole, finished images stay untouched, and the same command ends as if nothing had happened."""
    script, fault, least, total = KILLS[moment]
    flags, out = commands(script), tmp_path / "out"
    code, _ = job(script, *flags, "--output-dir", out, fault=fault)
    assert code == -signal.SIGKILL
    check_whole(out)
    before = pictures(out)
    assert least <= len(before) <= total
    if moment in ("scoring, Semantic_Categories", "writing scores.csv"):
        rows = pd.read_csv(out / "scores.csv").set_index("file")
        assert len(rows) == 3
    code, err = job(script, *flags, "--output-dir", out)
    assert code == 0 and not err
    assert before.items() <= pictures(out).items()
    check_same(script, out, undisturbed(script, *flags))
    if moment in ("scoring, Semantic_Categories", "writing scores.csv"):
        assert pd.read_csv(out / "scores.csv").set_index("file").loc[rows.index].equals(rows)


TRAINING_KILLS = {
    "a step": (("kill_in_call", "training.prepare_batch", 8), [2], 3),
    "a checkpoint": (("kill_in_checkpoint", 2), [2], 4),
    "a checkpoint's name": (("kill_before_rename", "*/checkpoints/step-*[0-9]", 2), [2], 4),
    "metrics.csv": (("kill_before_rename", "*/metrics.csv", 4), [2], 3),
    "the result": (("kill_before_rename", "*/unet", 1), [2, 4, 5], 5),
}


@pytest.mark.parametrize("moment", TRAINING_KILLS)
def test_kill_9_in_training(moment, job, undisturbed, training, tmp_path):
    """The checkpoints of before are whole, and --resume gives the undisturbed run's weights to the last bit."""
    fault, checkpoints, rows = TRAINING_KILLS[moment]
    out = tmp_path / "out"
    code, _ = job("train_dipo", *training, "--output-dir", out, fault=fault)
    assert code == -signal.SIGKILL
    check_whole(out)
    assert [int(p.name[5:]) for p in sorted((out / "checkpoints").glob("step-*[0-9]"))] == checkpoints
    assert len(pd.read_csv(out / "metrics.csv")) == rows and not (out / "unet").exists()
    code, err = job("train_dipo", *training, "--output-dir", out)
    assert code == 0 and not err
    whole = undisturbed("train_dipo", *training)
    assert same(weights(whole), weights(out))
    mine, theirs = (pd.read_csv(f / "metrics.csv").drop(columns="pairs_per_second") for f in (out, whole))
    pd.testing.assert_frame_equal(mine, theirs)
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


# ------------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def disk(tmp_path):
    """A file system of its own in memory: disk(size in bytes) sizes it and gives its folder. Root's privilege."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")

    def resize(size: int, more: str = "") -> Path:
        subprocess.run(["mount", "-o", f"remount,size={size}{more}", str(folder)], check=True)
        return folder

    yield resize
    subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """Bytes on a file system of 4 KB pages."""
    return sum(math.ceil(p.stat().st_size / 4096) * 4096 if p.is_file() else 4096 for p in folder.rglob("*"))


@pytest.mark.parametrize("share", [0.5, 0.97])
@pytest.mark.parametrize("script", ["hasty_sample", "Semantic_Categories"])
def test_disk_full(script, share, disk, job, undisturbed, tmp_path):
    """One line; what is finished stays whole, and with more room the same command goes on to the same result."""
    flags = commands(script)
    whole = undisturbed(script, *flags)
    out = disk(int(size_of(whole) * share)) / "out"
    code, err = job(script, *flags, "--output-dir", out)
    assert code == 2 and err.count("\n") == 0 and "No space left on device" in err, err
    check_whole(out)
    before = pictures(out)
    assert len(before) > 0
    disk(100 << 20)
    code, err = job(script, *flags, "--output-dir", out)
    assert code == 0 and before.items() <= pictures(out).items()
    check_same(script, out, whole)


@pytest.mark.parametrize("share", [0.3, 0.97])
def test_disk_full_in_training(share, disk, job, undisturbed, training, tmp_path):
    whole = undisturbed("train_dipo", *training)
    out = disk(int(size_of(whole) * share)) / "out"
    code, err = job("train_dipo", *training, "--output-dir", out)
    assert code == 2 and err.count("error:") == 1 and ("No space left" in err or "the disk is full" in err), err
    check_whole(out)
    disk(100 << 20)
    code, err = job("train_dipo", *training, "--output-dir", out)
    assert code == 0 and same(weights(whole), weights(out)), err


# ------------------------------------------------------------------------------------------------------- no right to write


@pytest.mark.parametrize("script", SCRIPTS)
def test_folder_without_write_permission(script, job, training, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    flags = training if script == "train_dipo" else COMMANDS[script]
    for out in (folder, folder / "inner"):
        code, err = job(script, *flags, "--output-dir", out, fault=("give_up_rights",))
        assert code == 2 and err.count("error:") == 1 and f"--output-dir {out}: cannot be written to" in err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("script", ["hasty_sample", "train_dipo", "compare_quality"])
def test_read_only_file_system(script, disk, job, training):
    folder = disk(1 << 20, ",ro")
    flags = training if script == "train_dipo" else COMMANDS[script]
    code, err = job(script, *flags, "--output-dir", folder / "out")
    assert code == 2 and err.count("error:") == 1 and "cannot be written to" in err


# ------------------------------------------------------------------------------------------------------------ cut files


@pytest.fixture
def again(job, undisturbed, tmp_path):
    """again(script): a copy of a finished folder, and a function that runs its command there once more."""

    def make(script):
        flags = commands(script)
        whole = undisturbed(script, *flags)
        shutil.copytree(whole, tmp_path / "out")
        return tmp_path / "out", whole, lambda *more: job(script, *flags, *more, "--output-dir", tmp_path / "out")

    return make


@pytest.mark.parametrize("where", [0, 1, 0.1, 0.5, -1])
def test_cut_scores(where, again):
    """A scores.csv cut anywhere: whole rows are kept, the others scored anew, and the tables are the same."""
    out, whole, rerun = again("Semantic_Categories")
    size = (out / "scores.csv").stat().st_size
    os.truncate(out / "scores.csv", int(where * size) if isinstance(where, float) else where % size)
    assert rerun() == (0, "")
    check_same("Semantic_Categories", out, whole)


@pytest.mark.parametrize("where", [0.0, 0.9])
def test_cut_pictures(where, again):
    """Cut PNGs in a study are made and scored anew; others are not touched."""
    out, whole, rerun = again("compare_quality")
    path, before = out / "dipo-2/00001.png", pictures(out)
    os.truncate(path, int(path.stat().st_size * where))
    old = pd.read_csv(out / "scores.csv").set_index("file")
    assert rerun() == (0, "")
    changed = {p for p, t in pictures(out).items() if before[p] != t}
    assert changed == {path.relative_to(out)}
    new = pd.read_csv(out / "scores.csv").set_index("file")
    assert set(new.index[new["image"] != old["image"]]) == {"dipo-2/00001.png"}
    check_same("compare_quality", out, whole)


def test_cut_tables_and_grids(again):
    """What is made of images and scores is made again."""
    out, whole, rerun = again("hasty_sample")
    for name in ("images.csv", "grid.png"):
        os.truncate(out / name, 100)
    assert rerun() == (0, "")
    check_whole(out)
    assert (out / "images.csv").read_bytes() == (whole / "images.csv").read_bytes()


@pytest.mark.parametrize("where", [0, 5, 60, 0.5, -2])
def test_cut_metrics(where, job, undisturbed, training, tmp_path):
    """A metrics.csv cut anywhere stops no run: whole rows stay, and more are added."""
    whole, out = undisturbed("train_dipo", *training), tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "metrics.csv"
    size, lines = path.stat().st_size, path.read_text().splitlines()
    os.truncate(path, int(where * size) if isinstance(where, float) else where % size)
    kept = max(path.read_text().count("\n") - 1, 0)
    code, err = job("train_dipo", *with_flags(training, "--max-train-steps", 6), "--output-dir", out)
    assert code == 0 and ("cannot be read" in err) == (kept == 0 and path.exists())
    rows = pd.read_csv(path)
    assert rows["step"].tolist() == [*range(1, kept + 1), 6] and len(lines) == 6
    check_whole(out)


@pytest.mark.parametrize("script", ["hasty_sample", "train_dipo", "Semantic_Categories"])
def test_cut_weights(script, job, training, tmp_path):
    """A model file cut short is named, and nothing is made with it."""
    unet = tmp_path / "unet"
    shutil.copytree(ROOT / "assets/demo/dpo-unet", unet)
    weights_file = unet / "diffusion_pytorch_model.safetensors"
    os.truncate(weights_file, weights_file.stat().st_size // 2)
    flags = (*COMMANDS.get(script, ()), "--dpo-unet", unet)
    if script == "train_dipo":
        base = tmp_path / "base"
        base.mkdir()
        for part in (ROOT / "assets/demo/sdxl").iterdir():
            (base / part.name).symlink_to(unet if part.name == "unet" else part)
        flags = with_flags(training, "--base-model", base)
    code, err = job(script, *flags, "--output-dir", tmp_path / "out")
    assert code == 2 and err.count("error:") == 1 and "cannot be loaded" in err
    assert not list((tmp_path / "out").rglob("*.png"))


# ------------------------------------------------------------------------------------------------- two runs, and readers


@pytest.mark.parametrize("script", ["hasty_sample", "train_dipo", "compare_quality"])
def test_two_runs_in_one_folder(script, start, job, training, tmp_path):
    """The second one ends with a line that says why; the first goes on."""
    longer = {"hasty_sample": ("--num-inference-steps", 300), "compare_quality": ("--baseline-steps", 300)}
    longer |= {"train_dipo": ("--max-train-steps", 300)}
    flags = with_flags(training if script == "train_dipo" else COMMANDS[script], *longer[script])
    first = start(script, *flags, "--output-dir", tmp_path / "out", logs="first")
    sign = {"hasty_sample": "0*.png", "train_dipo": "metrics.csv", "compare_quality": "*/0*.png"}[script]
    until = time.monotonic() + 100
    while not list((tmp_path / "out").glob(sign)):
        assert first.is_alive() and time.monotonic() < until, (tmp_path / "first/err.log").read_text()
        time.sleep(0.02)
    code, err = job(script, *flags, "--output-dir", tmp_path / "out")
    assert code == 2 and err.endswith("another run is writing there; wait for it, or give another") and "\n" not in err
    assert first.is_alive()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_table_or_picture_is_written_under_its_name(script, undisturbed, training):
    """Every CSV and PNG is written aside and renamed, so that a reader sees whole ones only."""
    whole = undisturbed(script, *(training if script == "train_dipo" else commands(script)))
    opened = {Path(line) for line in whole.with_name(f"{script}.writes").read_text().splitlines()}
    opened = {p for p in opened if whole in p.parents and p.parent.suffix != ".part"}
    assert any(p.name.endswith(".csv.part") for p in opened)
    assert not [p for p in opened if p.suffix in (".csv", ".png", ".pdf", ".json", ".yaml", ".md")]


def test_readers_of_metrics_see_whole_rows(start, training, tmp_path):
    """Somebody who reads metrics.csv again and again while it grows."""
    path = tmp_path / "out/metrics.csv"
    flags = with_flags(training, "--max-train-steps", 12)
    process = start("train_dipo", *flags, "--output-dir", tmp_path / "out")
    lengths = []
    while process.is_alive():
        if path.exists():
            text = path.read_text(encoding="utf-8")
            rows = list(csv.reader(text.splitlines()))
            assert text.endswith("\n") and len({len(row) for row in rows}) == 1
            lengths.append(len(rows))
        time.sleep(0.001)
    process.join()
    assert process.exitcode == 0 and lengths == sorted(lengths) and len(set(lengths)) > 5 and lengths[-1] == 13
