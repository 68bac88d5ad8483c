"""download_models.py and its part of dipo/ against a hub on the loopback interface (hub.py), by the real huggingface_hub and
datasets."""

import ast
import errno
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import datasets
import helpers
import numpy as np
import pandas as pd
import pytest
from conftest import DEMO, ROOT
from hub import Hub
from PIL import Image
from test_docs import told

import compare_quality as cq
import download_models as dm
import hasty_sample as hs
import train_dipo as td
from dipo import checksums, cli, files, pairs, schemas
from dipo import hub as dipo_hub

REPO = {name: source.repo for name, source in dm.SOURCES.items()}


def small_judges(width: int) -> dict:
    """ImageReward with its tokenizer, and an aesthetic predictor of embeddings so wide; random."""
    repositories = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        helpers.save_imagereward(root / "imagereward", root / "imagereward-tokenizer")
        helpers.save_aesthetic(root / "aesthetic", width)
        for name in ("imagereward", "imagereward-tokenizer", "aesthetic"):
            files = {p.name: p.read_bytes() for p in (root / name).iterdir()}
            repositories[REPO[name]] = files | {"model.safetensors": b"not needed"}
    return repositories


def stand_ins() -> tuple[dict, dict]:
    """Repositories laid out as the real ones, second copies and all, with the demo's models in their files."""
    base, judge = {}, ROOT / "assets/demo/pickscore"
    for path in sorted(p for p in DEMO.rglob("*") if p.is_file()):
        name = path.relative_to(DEMO).as_posix()
        base[name.replace(".safetensors", ".fp16.safetensors")] = path.read_bytes()
    base |= dict.fromkeys(("sd_xl_base_1.0.safetensors", "unet/model.onnx", "unet/diffusion_flax_model.msgpack"), b"huge")
    base |= dict.fromkeys(("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"), b"full precision")
    clip = {p.name: p.read_bytes() for p in judge.iterdir()}
    processor = {name: clip[name] for name in clip if name != "model.safetensors"}
    # The tokenizers library's file, which the real ones have and slow tokenizers do not write.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(judge).backend_tokenizer.to_str().encode()
    processor["tokenizer.json"] = tokenizer
    weights = {"model.safetensors": clip["model.safetensors"], "pytorch_model.bin": b"the same as a pickle"}
    vae = (DEMO / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    unet = ROOT / "assets/demo/dpo-unet"
    hpsv2 = (ROOT / "assets/demo/hpsv2/HPS_v2.1_compressed.pt").read_bytes()
    models = {
        REPO["pickscore"]: {"config.json": clip["config.json"], **weights},
        REPO["pickscore-processor"]: {**processor, "open_clip_pytorch_model.bin": b"not needed"},
        REPO["hpsv2"]: {"HPS_v2.1_compressed.pt": hpsv2, "HPS_v2_compressed.pt": b"the older one"},
        REPO["clip"]: {**processor, **weights, "flax_model.msgpack": b"not needed"},
        REPO["aesthetic-clip"]: {**processor, **weights, "tf_model.h5": b"not needed"},
        **small_judges(json.loads(clip["config.json"])["projection_dim"]),
        REPO["base-model"]: base,
        REPO["vae"]: {
            "config.json": (DEMO / "vae/config.json").read_bytes(),
            "diffusion_pytorch_model.safetensors": vae,
            "diffusion_pytorch_model.bin": b"the same as a pickle",
        },
        REPO["dpo-unet"]: {f"unet/{p.name}": p.read_bytes() for p in unet.iterdir()},
    }
    sd15 = {
        name: data for name, data in base.items() if "_2/" not in name and name != "unet/diffusion_pytorch_model.safetensors"
    }
    models[dm.SD15["sd15"].repo] = sd15 | {"safety_checker/config.json": b"{}", "feature_extractor/x.json": b"{}"}
    models[dm.SD15["sd15-dpo-unet"].repo] = {f"unet/{p.name}": p.read_bytes() for p in unet.iterdir()}
    header = "Prompt\tCategory\tChallenge\tNote\n"
    parti = {"PartiPrompts.tsv": f"{header}a red circle\tAbstract\tBasic\t\na blue house\tOutdoor\tBasic\t\n".encode()}
    return models, {REPO["parti"]: {**parti, "README.md": b"---\nlicense: apache-2.0\n---\n"}}


@pytest.fixture(scope="module")
def repositories():
    return stand_ins()


@pytest.fixture
def hub(repositories, monkeypatch):
    """A fresh hub of the stand-ins, whose commits are those that download_models.py asks for."""
    models, datasets = ({repo: dict(files) for repo, files in kind.items()} for kind in repositories)
    pinned = {source.repo: source.revision for source in dm.SOURCES.values()}
    pinned |= {dm.SD15["sd15"].repo: dm.SD15["sd15"].revision}
    monkeypatch.setattr(Hub, "commit", lambda self, repo: pinned.get(repo) or hashlib.sha1(repo.encode()).hexdigest())
    with Hub(models, datasets) as hub:
        yield hub


def hear_ctrl_c():
    """A suite that runs in the background of a shell has SIGINT ignored, which its children would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def download(hub, tmp_path):
    """download("--all", ...) runs the script as a user does, in its own process, in a folder with a cache of its own;
    returns exit code, output and errors (without progress bars). first: code to run before it."""

    def environment(**more):
        known = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        return known | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "COLUMNS": "200", **more}

    def call(*arguments, wait=True, first="", **more):
        start = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import download_models as dm
from dipo import cli, hub, pickapic
exec({first!r})
cli.run(dm.main, dm.Settings, dm.__doc__)"""
        command = [sys.executable, *(["-c", start] if first else [str(ROOT / "download_models.py")]), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(**more), preexec_fn=hear_ctrl_c, **pipes)
        if not wait:
            return process
        out, err = process.communicate(timeout=100)
        assert "Traceback" not in err, err
        return process.returncode, out, "\n".join(line for line in err.splitlines() if line.startswith(("error", "stopped")))

    return call


def files_in(folder: Path) -> set[str]:
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts)}


# -------------------------------------------------------------------------------------------------------------- fetching


def test_sd15_is_fetched_with_its_dpo_unet(download, tmp_path):
    code, out, err = download("--only", "sd15")
    assert code == 0, err
    folder = tmp_path / "models"
    assert f"hasty_sample.py --base-model {folder / 'sd15'} --dpo-unet {folder / 'sd15-dpo-unet'}" in out
    files = files_in(folder / "sd15")
    assert {
        "model_index.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    } <= files
    assert not any("safety" in f or "_2" in f or "onnx" in f for f in files)
    assert "unet/diffusion_pytorch_model.safetensors" in files_in(folder / "sd15-dpo-unet")
    assert download("--check")[0] == 0
    assert "sd15" not in download("--check", "--only", "vae")[1]


def test_the_judges(download, hub, tmp_path):
    """The default: what the scorers need and nothing else, each file as on the hub, and the way to use it."""
    code, out, err = download()
    assert code == 0 and not err
    for name in dm.JUDGES:
        source = dm.SOURCES[name]
        expected = {part for wanted in source.files for part in wanted.split("|")[:1]}
        expected |= {f for f in source.optional if f in hub.repos["models"][source.repo]}
        assert files_in(tmp_path / "models" / name) == expected
        for file in expected:
            assert (tmp_path / "models" / name / file).read_bytes() == hub.repos["models"][source.repo][file]
        assert f"{source.repo}@{source.revision[:8]}" in out and f'{name.replace("-", "_")}: str = "' in out
    assert {p.name for p in (tmp_path / "models").iterdir()} == {*dm.JUDGES, "SHA256SUMS", ".download.lock"}
    # In order: what and how large, the room, and only then anything is fetched.
    assert out.index("clip: 7 files, 1.91MB") < out.index("to fetch: 5.72MB; free on the disk") < out.index("checksums that")
    first = next(i for i, (_, path, _) in enumerate(hub.requests) if "/resolve/" in path)
    asked = [path for _, path, _ in hub.requests[:first] if "/revision/" in path]
    assert len(asked) == len(dm.JUDGES)


def test_the_commands_of_the_documents(download, pickapic, tmp_path):
    """One after the other, in one process."""
    commands = [flags for name, flags in told() if name == "download_models"]
    assert [] in commands and ["--all"] in commands and commands[-1] == ["--check"]
    run = f"""
for sys.argv[1:] in {commands[:-1]}:
    dm.main(cli.parse(dm.Settings, ""))
sys.argv[1:] = ["--check"]
"""
    code, out, err = download(first=run)
    assert code == 0 and not err and out.count("none damaged or missing") == len(dm.SOURCES | dm.SD15) + 1


def test_a_second_run_fetches_nothing(download, hub, tmp_path):
    """Nor does the first one fetch twice what is named twice."""
    code, out, _ = download("--only", "vae", "vae")
    assert code == 0 and out.count("vae: 2 files, ") == 1 and len(hub.fetched()) == 2
    hub.requests.clear()
    code, out, _ = download("--only", "vae")
    assert code == 0 and hub.fetched() == [] and "to fetch: 0.00B; " in out


def test_sums_are_sha256sums(download, tmp_path):
    """coreutils reads SHA256SUMS, and sees damage."""
    assert download("--only", "vae", "hpsv2")[0] == 0
    sums = tmp_path / "models/SHA256SUMS"
    assert len(sums.read_text().splitlines()) == 3
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    command = ["sha256sum", "--quiet", "-c", "SHA256SUMS"]
    assert subprocess.run(command, cwd=sums.parent, check=False).returncode == 0
    (tmp_path / "models/vae/config.json").write_text("{}")
    assert subprocess.run(command, cwd=sums.parent, check=False, capture_output=True).returncode == 1


def test_newest_revision(download, hub):
    """--revision main goes before the commits of SOURCES; a revision that is not there is said."""
    code, _, err = download("--only", "vae", "--revision", "v9")
    assert code == 1 and err.count("error:") == 1 and "no such revision" in err and "--revision main" in err
    assert download("--only", "vae", "--revision", "main")[0] == 0
    assert any(path.endswith("/revision/main") for _, path, _ in hub.requests)


def test_alternatives(download, hub, tmp_path):
    """OpenAI's CLIP has no safetensors at its commit: the pickle is fetched where there is nothing better, only there."""
    del hub.repos["models"][REPO["clip"]]["model.safetensors"]
    assert download("--only", "clip", "pickscore")[0] == 0
    assert (tmp_path / "models/clip/pytorch_model.bin").exists()
    assert not (tmp_path / "models/pickscore/pytorch_model.bin").exists()


@pytest.mark.parametrize("how", ["kill", "cut", "interrupt"])
def test_goes_on_where_it_was(how, download, hub, tmp_path):
    """Killed, stopped by Ctrl-C or cut off by the network in the middle of a large file: the next run (or, after a cut, this
    one) asks for the rest of it only, and the file is right."""
    name, file = "vae", "diffusion_pytorch_model.safetensors"
    data = hub.repos["models"][REPO[name]][file] = os.urandom(24 << 20)
    folder = tmp_path / "models" / name
    if how == "cut":
        hub.cut[file] = 12 << 20
    else:
        hub.pause = 0.005
        process = download("--only", name, wait=False)
        while not any(p.stat().st_size >= 10 << 20 for p in folder.glob(".parts/*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if how == "kill" else 130)
        assert "Traceback" not in err and not (folder / file).exists()
        hub.pause = 0
        assert download("--check")[0] == 1
    code, out, err = download("--only", name)
    assert code == 0 and not err and (how == "cut" or "to fetch: 14." in out)
    assert (folder / file).read_bytes() == data and not (folder / ".parts").exists()
    asked = [r for method, path, r in hub.requests if method == "GET" and path.startswith("/large")]
    assert len(asked) == 2 and asked[0] is None
    assert int(asked[1].removeprefix("bytes=").split("-")[0]) >= 10 << 20


def test_files_in_the_hubs_cache_are_taken(download, hub, tmp_path):
    """Weights that a script has fetched into HF_HOME before are copied from there."""
    code = f"import huggingface_hub as h; h.snapshot_download({REPO['vae']!r}, revision={dm.SOURCES['vae'].revision!r})"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    hub.requests.clear()
    assert download("--only", "vae")[0] == 0 and hub.fetched() == []
    files, folder = hub.repos["models"][REPO["vae"]], tmp_path / "models/vae"
    assert all((folder / f).read_bytes() == files[f] and not (folder / f).is_symlink() for f in files_in(folder))
    # A damaged copy in the cache does not come back.
    for blob in (tmp_path / "cache").rglob("blobs/*"):
        blob.write_bytes(b"x" + blob.read_bytes()[1:])
    shutil.rmtree(tmp_path / "models")
    assert download("--only", "vae")[0] == 0 and all((folder / f).read_bytes() == files[f] for f in files_in(folder))


def test_token_stays_with_the_hub(download, hub):
    """The storage that large files are redirected to gets no token."""
    assert download("--only", "vae", HF_TOKEN="hf_secret")[0] == 0
    tokens = {path.split("/")[1] == "large": token for path, token in hub.authorizations}
    assert tokens == {False: "Bearer hf_secret", True: None}


# ----------------------------------------------------------------------------------------------------------------- faults


def test_wrong_checksum(download, hub, tmp_path):
    """A mirror that sends other bytes: fetched twice, refused, deleted; the rest is kept, a right mirror completes it."""
    file = "diffusion_pytorch_model.safetensors"
    data = hub.repos["models"][REPO["vae"]][file]
    hub.swap[file] = data[:-1] + bytes([data[-1] ^ 1])
    code, out, err = download("--only", "vae", "hpsv2")
    assert code == 1 and err.count("error:") == 1
    assert REPO["vae"] in err and file in err and "wrong checksum" in err
    assert hub.fetched().count(file) == 2
    assert not (tmp_path / "models/vae" / file).exists() and (tmp_path / "models/vae/config.json").exists()
    assert "hpsv2: 1 file in" in out and "vae: str" not in out
    hub.swap.clear()
    hub.requests.clear()
    code, out, err = download("--only", "vae", "hpsv2")
    assert code == 0 and hub.fetched() == [file] and "vae: str" in out


def test_transient_damage_is_repaired(download, hub, tmp_path):
    """What arrives damaged once is fetched again in the same run, and so is a file that was damaged on the disk."""
    assert download("--only", "vae")[0] == 0
    path = tmp_path / "models/vae/diffusion_pytorch_model.safetensors"
    data, times = path.read_bytes(), path.stat()
    path.write_bytes(data[:-1] + b"!")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, out, err = download("--check")
    assert code == 1 and "diffusion_pytorch_model.safetensors: with a wrong checksum" in out
    assert "error: not as fetched: vae; fetch again with python download_models.py --only vae" in err
    assert download("--only", "vae")[0] == 0 and path.read_bytes() == data
    assert download("--check")[:2] == (0, "vae: 2 files, none damaged or missing\n")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", ["no such repository", "HF_ENDPOINT"]),
        (401, "RepoNotFound", ["no such repository", "HF_TOKEN"]),
        (403, "GatedRepo", ["gated", "accept its terms", "HF_TOKEN"]),
        (401, "", ["HF_TOKEN"]),
        (500, "", ["500", "run this again later"]),
    ],
)
def test_refused(status, code, words, download, hub, tmp_path):
    """One line for the repository that is refused, exit code 1, and the others are there."""
    hub.refuse[REPO["vae"]] = (status, code)
    exit_code, out, err = download("--only", "vae", "hpsv2", first="hub.WAITS = (0.1, 0.1)")
    assert exit_code == 1 and err.count("error:") == 1 and REPO["vae"] in err
    assert all(word in err for word in words), err
    assert (tmp_path / "models/hpsv2/HPS_v2.1_compressed.pt").exists() and "vae" not in out
    asked = [path for _, path, _ in hub.requests if REPO["vae"] in path]
    assert len(asked) == (3 if status == 500 else 1)


@pytest.mark.parametrize("where", ["refuse", "refuse_files", "refuse_storage"])
def test_passing_failures_are_waited_out(where, download, hub, tmp_path):
    """A hub or its storage that is busy for two requests: the run goes on."""
    getattr(hub, where)[REPO["vae"]] = (503, "")
    hub.refusals = 2
    code, _, err = download("--only", "vae", first="hub.WAITS = (0.1, 0.1, 0.1)")
    assert code == 0 and not err and hub.refusals == 0
    assert (tmp_path / "models/vae/config.json").exists()


def test_every_failure_is_said(download, hub, tmp_path):
    """Two repositories fail in different ways, the third is fetched and shown."""
    hub.refuse[REPO["vae"]] = (404, "RepoNotFound")
    hub.refuse_files[REPO["parti"]] = (403, "GatedRepo")
    code, out, err = download("--only", "vae", "parti", "hpsv2", "--dataset", 3)
    assert code == 1 and err.count("error:") == 3 and all(r in err for r in (REPO["vae"], REPO["parti"], dm.PICKAPIC.repo))
    assert "hpsv2: str = " in out and "vae: str" not in out and "parti: str" not in out


def test_what_was_deleted_is_not_shown(download, hub, tmp_path):
    """Damage on the disk, and a mirror that has only wrong bytes: the model's entry goes with its file."""
    file = "diffusion_pytorch_model.safetensors"
    assert download("--only", "vae", "hpsv2")[0] == 0
    (tmp_path / "models/vae" / file).write_bytes(b"short")
    hub.swap[file] = hub.repos["models"][REPO["vae"]][file][::-1]
    code, out, err = download("--only", "vae")
    assert code == 1 and "was deleted" in err and "vae: str" not in out and "hpsv2: str" in out
    # The whole file was announced, as nothing of it could be kept.
    assert any(f"to fetch: 3.0{digit}MB; free" in out for digit in range(10))
    assert checksums.read_sums(tmp_path / "models").keys() == {"hpsv2"}


def test_another_revisions_files_go(download, hub, tmp_path):
    files = hub.repos["models"][REPO["clip"]]
    safetensors = files.pop("model.safetensors")
    assert download("--only", "clip")[0] == 0 and (tmp_path / "models/clip/pytorch_model.bin").exists()
    files["model.safetensors"] = safetensors
    assert download("--only", "clip")[0] == 0
    assert (tmp_path / "models/clip/model.safetensors").exists()
    assert not (tmp_path / "models/clip/pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("there", "vae"), [(("sd15", "vae"), False), (("base-model", "sd15", "vae"), True), (("vae",), True)]
)
def test_sdxls_vae_is_not_recommended_for_sd15(monkeypatch, capsys, there, vae):
    monkeypatch.setattr(checksums, "read_sums", lambda _: {name: {} for name in there})
    dm.print_use(Path("models"), "pickapic")
    said = capsys.readouterr().out
    assert ("--vae" in said) == vae and ("/sd15" in said) == ("base-model" not in there and "sd15" in there)


def test_no_secrets_in_messages():
    said = cli.first_line(OSError("at https://me:secret@host:9/a?X-Signature=abc&b=c, and http://x@y/z (gone)"))
    assert said == "at https://host:9/a, and http://y/z (gone)"


def test_a_stalled_storage_does_not_hold_up_ctrl_c(download, hub, tmp_path):
    hub.pause = 3600
    process = download("--only", "vae", wait=False)
    until = time.monotonic() + 60
    while not any(path.startswith("/large") for _, path, _ in hub.requests):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err


def test_gated_files_need_a_token(download, hub, tmp_path):
    """A gated repository tells what it has and refuses its files, until HF_TOKEN is one that it knows."""
    hub.refuse_files[REPO["vae"]] = (403, "GatedRepo")
    hub.tokens[REPO["vae"]] = "hf_known"
    code, _, err = download("--only", "vae", "hpsv2")
    assert code == 1 and "gated" in err and (tmp_path / "models/hpsv2/HPS_v2.1_compressed.pt").exists()
    assert download("--only", "vae", HF_TOKEN="hf_known")[0] == 0


def test_file_not_there(download, hub):
    del hub.repos["models"][REPO["pickscore"]]["model.safetensors"]
    code, _, err = download("--only", "pickscore")
    assert code == 1 and "has no model.safetensors" in err and "--revision main" in err


def test_no_network(download, hub, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{s.getsockname()[1]}"
    code, _, err = download(HF_ENDPOINT=closed)
    assert code == 1 and err.count("error:") == 1 and closed in err and "look at the connection" in err
    code, _, err = download(HF_HUB_OFFLINE="1")
    assert code == 1 and err == "error: HF_HUB_OFFLINE is set: unset it to fetch; --check needs no network"
    assert hub.requests == []


def test_check_needs_no_network(download, hub, tmp_path):
    code, _, err = download("--check")
    assert code == 1 and err.endswith("holds nothing that was fetched whole; fetch it with python download_models.py")
    assert download("--check", "--output-dir", "x")[2].endswith("fetch it with python download_models.py --output-dir x")
    assert download("--only", "vae", "hpsv2")[0] == 0
    (tmp_path / "models/vae/config.json").unlink()
    (tmp_path / "models/clip").mkdir()
    hub.requests.clear()
    code, out, err = download("--check", HF_HUB_OFFLINE="1")
    assert code == 1 and hub.requests == []
    assert "vae/config.json: missing" in out and "clip: not fetched whole" in out and "hpsv2: 1 file, none damaged" in out
    assert "--only clip vae" in err
    assert download("--check", "--only", "hpsv2")[0] == 0
    (tmp_path / "models").rename(tmp_path / "mödels of mine")
    (tmp_path / "mödels of mine/pickapic").mkdir()
    code, out, err = download("--check", "--output-dir", "mödels of mine", PYTHONIOENCODING="ascii")
    assert code == 1 and "pickapic: not fetched whole" in out
    assert err.endswith("--only clip vae --dataset N --output-dir 'm\\xf6dels of mine'")
    outside = [f"{'0' * 64}  {path}\n".encode() for path in ("vae/../../secret", "vae//etc/passwd")]
    for content in (b"something else\n", b"\xff\xfe\x00", *outside):
        (tmp_path / "mödels of mine/SHA256SUMS").write_bytes(content)
        code, _, err = download("--check", "--output-dir", "mödels of mine")
        assert code == 1 and err.count("error:") == 1 and "delete" in err


@pytest.fixture
def online(monkeypatch):
    """As if HF_HUB_OFFLINE (conftest.py) were not set, for a run in this process that reaches no network."""
    monkeypatch.setattr(dm, "HF_HUB_OFFLINE", False)


def test_no_room(online, monkeypatch, run, tmp_path):
    """Refused before anything is fetched."""
    monkeypatch.setattr(dipo_hub.huggingface_hub, "HfApi", lambda: fake_api(dm.SOURCES["vae"], 3_000_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    monkeypatch.setattr(dipo_hub, "fetch", None)
    code, _, err = run("download_models", "--only", "vae")
    assert code == 1 and "3.00GB needed, 1.00GB free; make room" in err and str(tmp_path / "models") in err
    code, _, err = run("download_models", "--dataset", 10_000)
    assert code == 1 and "3.40GB needed, 1.00GB free" in err


def fake_api(source, size):
    """An API that knows one repository, its files of a size in bytes together."""
    from types import SimpleNamespace as Simple

    files = [Simple(rfilename=f, size=size // len(source.files), lfs=None, blob_id="0" * 40) for f in source.files]
    return Simple(repo_info=lambda *_, **__: Simple(sha="1" * 40, siblings=files))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_disk_full_midway(download, hub, tmp_path):
    """The write of a file fails with ENOSPC: one line; what arrived before stays, and the next run goes on."""
    source = dm.SOURCES["vae"]
    data = hub.repos["models"][source.repo][source.files[1]]
    file = checksums.File(source.files[1], len(data), hashlib.sha256(data).hexdigest())
    part = dipo_hub.Snapshot(source, source.revision, [file], tmp_path / "models/vae").part(file)
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    code, _, err = download("--only", "vae")
    assert code == 1 and err.count("error:") == 1 and "No space left on device" in err and "put that right" in err
    assert (tmp_path / "models/vae/config.json").exists()
    part.unlink()
    hub.requests.clear()
    assert download("--only", "vae")[0] == 0 and hub.fetched() == [source.files[1]]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_folder_that_cannot_be_written(number, online, monkeypatch, run):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr(dipo_hub.huggingface_hub, "HfApi", lambda: fake_api(dm.SOURCES["vae"], 1000))
    monkeypatch.setattr(dipo_hub, "CallbackIOWrapper", refuse)
    code, _, err = run("download_models", "--only", "vae")
    assert code == 1 and err.count("error:") == 1 and "--output-dir" in err.splitlines()[-1]


def test_output_folder_is_a_file(online, run, tmp_path):
    (tmp_path / "models").write_text("")
    for flags in ((), ("--check",), ("--output-dir", "~nobody-of-that-name/x")):
        code, _, err = run("download_models", *flags)
        assert code == 1 and err.count("\n") == 1 and "--output-dir" in err


def test_two_runs_at_once(download, hub, tmp_path):
    hub.pause = 0.02
    first = download("--only", "vae", wait=False)
    while not any("/resolve/" in path for _, path, _ in hub.requests):
        time.sleep(0.02)
    code, _, err = download("--only", "vae")
    assert code == 1 and "another run is fetching into it" in err
    first.communicate(timeout=60)
    assert first.returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("--only", "sdxl"),
        ("--only",),
        ("--all", "--only", "vae"),
        ("--dataset", 0),
        ("--output-dir", ""),
        ("--dataset", "x"),
        ("--dataset", "x", 5),
        ("--dataset", "some/pairs"),
        ("--dataset", "some/pairs", 0),
    ],
)
def test_wrong_commands(arguments, run):
    code, _, err = run("download_models", *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ Pick-a-Pic


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def pickapic(hub):
    """Pick-a-Pic on the hub: 24 rows of train in three files, every fourth a tie, two with a broken picture, and more
    columns than training needs. Returns the usable rows."""
    table = pd.DataFrame(
        {
            "are_different": [i % 4 != 3 for i in range(24)],
            "caption": [f"caption {i}" for i in range(24)],
            "jpg_0": [picture(2 * i) for i in range(24)],
            "jpg_1": [picture(2 * i + 1) for i in range(24)],
            "label_0": [(1.0, 0.0, 1.0, 0.5)[i % 4] for i in range(24)],
            "user_id": range(24),
        }
    )
    table.at[5, "jpg_1"] = table.at[5, "jpg_1"][:100]
    table.at[6, "jpg_0"] = b"no picture"
    files = {f"data/train-{i:05d}-of-00003-abc.parquet": table[8 * i : 8 * i + 8] for i in range(3)}
    files["data/test_unique-00000-of-00001-abc.parquet"] = table[:2].assign(caption=["a cat", "a dog"])
    hub.repos["datasets"][dm.PICKAPIC.repo] = {name: rows.to_parquet(index=False) for name, rows in files.items()}
    return table[(table.label_0 != 0.5) & ~table.index.isin([5, 6])]


def saved_pairs(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(p) for p in sorted(folder.glob("train-*.parquet"))], ignore_index=True)


def test_first_usable_pairs(download, pickapic, hub, tmp_path):
    """The first N rows with a winner and two pictures, in the data set's own columns, in files that train_dipo.py reads."""
    code, out, err = download("--dataset", 10, first="pickapic.PAIRS_PER_FILE = 4")
    folder = tmp_path / "models/pickapic"
    assert code == 0 and not err and "pickapic: 10 pairs in models/pickapic" in out
    assert files_in(tmp_path / "models") == {
        *("SHA256SUMS", "pickapic/state.json", "pickapic/test_unique.parquet"),
        *(f"pickapic/train-0000{i}.parquet" for i in range(3)),
    }
    pd.testing.assert_frame_equal(saved_pairs(folder), pickapic[:10].reset_index(drop=True))
    assert pd.read_parquet(folder / "test_unique.parquet").to_dict("list") == {"caption": ["a cat", "a dog"]}
    rows = list(schemas.open_dataset(str(folder)))
    assert [row["caption"] for row in rows] == pickapic.caption[:10].tolist()
    assert set(rows[0]) == set(schemas.SCHEMAS[0].columns)
    find = schemas.pairs_of(rows, str(folder))
    assert all(pairs.read_pair(pair, 8) is not None for row in rows for pair in find(row)[0])
    assert dm.source_of((dm.PICKAPIC.repo, 5)) == dm.source_of((5,)) == dm.PICKAPIC
    # 10 of the usable rows are in the first two files: the third is not touched.
    assert not any("train-00002" in path and "/resolve/" in path for _, path, _ in hub.requests)
    assert download("--check")[:2] == (0, "pickapic: 4 files, none damaged or missing\n")
    hub.requests.clear()
    code, out, _ = download("--dataset", 8)
    assert code == 0 and "10 pairs in" in out and hub.requests == []


def test_pairs_go_on_after_kill(download, pickapic, tmp_path):
    """Killed when two files of pairs are written and the second is not on record yet: the pairs are those of one run."""
    kill = """
import os
pickapic.PAIRS_PER_FILE, write, calls = 4, pickapic.write_text, []
def killed(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    write(*arguments)
pickapic.write_text = killed
"""
    code, _, _ = download("--dataset", 12, first=kill)
    folder = tmp_path / "models/pickapic"
    assert code == -signal.SIGKILL and len(list(folder.glob("train-*.parquet"))) == 2
    code, _, err = download("--dataset", 12, first="pickapic.PAIRS_PER_FILE = 4")
    assert code == 0 and not err
    pd.testing.assert_frame_equal(saved_pairs(folder), pickapic[:12].reset_index(drop=True))


def test_more_pairs_than_there_are(download, pickapic, hub, tmp_path):
    """A larger N adds to the pairs; where the data set ends, that is said; a damaged file is made anew."""
    first = "pickapic.PAIRS_PER_FILE = 4"
    assert download("--dataset", 6, first=first)[0] == 0
    code, out, _ = download("--dataset", 99, first=first)
    folder = tmp_path / "models/pickapic"
    assert code == 0 and "16 pairs, all that there are" in out and len(pickapic) == 16
    pd.testing.assert_frame_equal(saved_pairs(folder), pickapic.reset_index(drop=True))
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.parquet")}
    for name in ("train-00001.parquet", "test_unique.parquet"):
        with (folder / name).open("ab") as f:
            f.write(b"damage")
    code, out, err = download("--check")
    assert code == 1 and "train-00001.parquet: with a wrong checksum" in out and "--dataset 16" in err
    # Without the hub nothing is lost; with it, the damaged files alone are made again, whatever N says.
    hub.refuse[dm.PICKAPIC.repo] = (404, "RepoNotFound")
    assert download("--dataset", 7, first=first)[0] == 1 and len(list(folder.glob("train-*.parquet"))) == len(stamps) - 1
    hub.refuse.clear()
    assert download("--dataset", 7, first=first)[0] == 0 and download("--check")[0] == 0
    pd.testing.assert_frame_equal(saved_pairs(folder), pickapic.reset_index(drop=True))
    changed = {p.name for p in folder.glob("*.parquet") if p.stat().st_mtime_ns != stamps[p.name]}
    assert changed == {"train-00001.parquet", "test_unique.parquet"}
    code, _, err = download("--dataset", 7, "--revision", "other")
    assert code == 1 and "no such revision" in err
    (folder / "state.json").write_text("{}")
    assert download("--dataset", 3)[0] == 0
    pd.testing.assert_frame_equal(saved_pairs(folder), pickapic[:3].reset_index(drop=True))


def test_missing_data_set(download, hub):
    """The line names others, one of which is then fetched in its own columns; the same run again fetches nothing."""
    code, _, err = download("--dataset", 5)
    assert code == 1 and err.count("error:") == 1 and dm.PICKAPIC.repo in err and "no such repository" in err
    assert "sayakpaul/pickapic_v2_webdataset" in err and "MizzenAI/HPDv3" in err and "kashif/pickascore" in err


def on_hub(hub, repo: str, files: dict):
    hub.repos["datasets"][repo] = files


def test_pairs_of_another_data_set(download, hub, tmp_path):
    """Columns with Image features, in a split of another name; one row of twelve has a broken picture."""
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    )
    rows = [
        {"prompt": f"{i}", **{k: {"bytes": picture(2 * i + j), "path": None} for j, k in enumerate(("chosen", "rejected"))}}
        for i in range(12)
    ]
    rows[3]["rejected"]["bytes"] = b"no picture"
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "all.parquet")
    on_hub(hub, "some/pairs", {"data/validation-00000-of-00001.parquet": (tmp_path / "all.parquet").read_bytes()})
    first = "pickapic.PAIRS_PER_FILE = 4"
    assert download("--dataset", "some/pairs", 3, first=first)[0] == 0
    code, out, err = download("--dataset", "some/pairs", 9, first=first)
    assert code == 0 and not err and "some--pairs: 9 pairs, 6 of them new, from some/pairs" in out
    assert 'dataset: str = "' in out and out.count("some--pairs/") == 0 and "/models/some--pairs\n" in out
    folder = tmp_path / "models/some--pairs"
    assert files_in(folder) == {"state.json", *(f"train-0000{i}.parquet" for i in range(3))}
    got = schemas.open_dataset(str(folder))
    found = [pair for row in got for pair in schemas.pairs_of(got, str(folder))(row)[0]]
    wanted = [row for i, row in enumerate(rows) if i != 3][:9]
    assert [p["caption"] for p in found] == [row["prompt"] for row in wanted]
    assert [p["winner"]["bytes"] for p in found] == [row["chosen"]["bytes"] for row in wanted]
    assert [p["loser"]["bytes"] for p in found] == [row["rejected"]["bytes"] for row in wanted]
    hub.requests.clear()
    assert download("--dataset", "some/pairs", 9)[0] == 0 and hub.requests == []
    (folder / "train-00001.parquet").write_bytes(b"damage")
    code, _, err = download("--check")
    assert code == 1 and err.endswith(
        "not as fetched: some--pairs; fetch again with python download_models.py --dataset some/pairs 9"
    )
    assert download("--dataset", "some/pairs", 9, first=first)[0] == 0 and download("--check")[0] == 0
    assert [row["prompt"] for row in schemas.open_dataset(str(folder))] == [row["prompt"] for row in wanted]


def test_webdataset_on_the_hub(download, hub, tmp_path):
    """Pick-a-Pic's tars are streamed, ties left out."""
    on_hub(hub, "some/tars", {"00000.tar": pickapic_tar(["1.0", "0.5", "0.0", "1.0"])})
    code, out, err = download("--dataset", "some/tars", 5)
    assert code == 0 and not err and "some--tars: 3 pairs, all that there are" in out
    folder = tmp_path / "models/some--tars"
    assert [row["original_prompt.txt"] for row in schemas.open_dataset(str(folder))] == ["0", "2", "3"]


def pickapic_tar(labels: list[str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i, label in enumerate(labels):
            files = {"original_prompt.txt": str(i).encode(), "jpg_0.jpg": picture(2 * i), "jpg_1.jpg": picture(2 * i + 1)}
            for name, data in (files | {"label_0.txt": label.encode()}).items():
                member = tarfile.TarInfo(f"{i}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"train.json": b'[{"prompt": "a", "path1": "x/1.jpg", "path2": "x/2.jpg"}]'},
            "hf download some/data --repo-type dataset",
        ),
        (
            {"data.py": b"# a loading script"},
            "no longer supported, but found data.py); give another --dataset-split, or fetch it (hf",
        ),
        ({"train.jsonl": b'{"text": "a", "url": "b"}\n'}, "its columns (text, url) are none of those known: jpg_0,"),
    ],
)
def test_data_sets_that_cannot_be_streamed(files, said, download, hub):
    on_hub(hub, "some/data", files)
    code, _, err = download("--dataset", "some/data", 5)
    assert code == 1 and err.count("error:") == 1 and said in err


def test_training_on_a_hub_name(hub, tmp_path):
    """open_dataset streams it, and says which split there is, or which others there are."""
    on_hub(hub, "some/tars", {"validation/00000.tar": pickapic_tar(["1.0", "0.0"])})
    code = """
from dipo import cli, schemas
for name, split in (("some/tars", "validation"), ("some/tars", "train"), ("gone/gone", "train")):
    try:
        rows = schemas.open_dataset(name, split)
        find = schemas.pairs_of(rows, name, split)
        print([len(find(row)[0]) for row in rows])
    except cli.UserError as e:
        print(e)
"""
    known = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = known | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    right, split, gone = done.stdout.splitlines()
    assert right == "[1, 1]"
    assert (
        split.startswith("--dataset some/tars: cannot be loaded (") and "validation" in split and "--dataset-split" in split
    )
    assert gone.startswith("--dataset gone/gone: cannot be loaded (") and schemas.OTHERS in gone


# ------------------------------------------------------------------------------------------------------------------- use


def test_settings_of_the_scripts():
    """The flags that are printed are flags of the scripts, and every model of theirs can be fetched."""
    for script, module in (("hasty_sample.py", hs), ("train_dipo.py", td), ("compare_quality.py", cq)):
        defaults = {f.name: f.default for f in fields(module.Settings)}
        repos = {source.repo: name.replace("-", "_") for name, source in dm.SOURCES.items()} | {dm.PICKAPIC.repo: "pickapic"}
        takes = tuple(name for name in defaults if defaults[name] in repos and name != "dataset")
        assert set(takes) == set(dm.SCRIPTS[script]) - {"dataset"}
        assert all(repos[defaults[name]] == name for name in takes)
    assert td.Settings.dataset == dm.PICKAPIC.repo
    for name in STUDIES[1:]:
        names = {f.name for f in fields(importlib.import_module(name).Settings)}
        assert set(dm.SCRIPTS["compare_quality.py"]) <= names


STUDIES = ("compare_quality", "Ablation_experiment", "Semantic_Categories", "Human_Preference_compare")


@pytest.fixture(scope="module")
def everything(repositories, tmp_path_factory):
    """What download_models.py --all leaves, fetched once, and where it is; and what it printed."""
    folder = tmp_path_factory.mktemp("everything")
    models, datasets = repositories
    with Hub(models, datasets) as hub:
        pinned = {source.repo: source.revision for source in dm.SOURCES.values()}
        hub.commit = pinned.get
        known = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, str(ROOT / "download_models.py"), "--all", "--output-dir", str(folder)],
            env=known | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache")},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    # The demo's HPSv2 is smaller than ViT-H-14; its configuration and tokenizer lie beside it, as load_hpsv2 says.
    judge = ROOT / "assets/demo/hpsv2"
    shutil.copy(judge / "demo-hpsv2.json", folder / "hpsv2")
    shutil.copytree(judge / "tokenizer", folder / "hpsv2/tokenizer")
    return folder, done.stdout


def test_all_layout(everything):
    """No second copies: fp16 of the base model, one format of each weight."""
    folder, _ = everything
    base = files_in(folder / "base-model")
    assert {f for f in base if f.endswith(".safetensors")} == {
        *("text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),
    }
    assert not any(f.endswith((".bin", ".onnx", ".msgpack")) for f in files_in(folder))
    assert files_in(folder / "parti") == {"PartiPrompts.tsv"}
    assert set(checksums.read_sums(folder)) == set(dm.SOURCES)


def flags(out: str, script: str) -> list[str]:
    return next(line.split()[2:] for line in out.splitlines() if line.strip().startswith(f"python {script} "))


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach another machine, or to look one up, is recorded and fails."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("no network in this test")

    real = socket.socket.connect
    local = (getattr(socket, "AF_UNIX", None),)
    monkeypatch.setattr(socket.socket, "connect", lambda s, *a: real(s, *a) if s.family in local else refuse(*a))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def test_scripts_use_it_without_network(everything, no_network, run, tmp_path):
    """The printed flags of each script, on what was fetched, with HF_HUB_OFFLINE=1 (conftest.py): not one connection is
    tried, and the base model's files are the fp16 ones."""
    _, out = everything
    size = ("--limit", 1, "--output-dir", "out")
    code, _, err = run(
        "hasty_sample", *flags(out, "hasty_sample.py"), *size, "--num-inference-steps", 2, "--prompts", "parti"
    )
    assert code == 0, err
    assert files.read_record(tmp_path / "out/00000.png")["prompt"] == "a red circle"
    study = ("--steps", 1, 2, "--baseline-steps", 3, "--prompts", "parti", "--limit", 1, "--batch-size", 2)
    study += ("--judges", "pickscore", "hpsv2", "clipscore", "imagereward", "aesthetic")
    code, _, err = run("compare_quality", *flags(out, "compare_quality.py"), *study, "--output-dir", "study")
    assert code == 0, err
    scores = pd.read_csv(tmp_path / "study/scores.csv")
    assert len(scores) == 6 and scores[["pickscore", "hpsv2", "clipscore"]].notna().all(axis=None)
    assert scores[["imagereward_logit", "aesthetic"]].notna().all(axis=None)
    study = ("--etas", 0, 1, "--num-inference-steps", 2, "--prompts", "parti", "--limit", 1)
    code, _, err = run("Ablation_experiment", *flags(out, "compare_quality.py"), *study, "--output-dir", "eta")
    assert code == 0, err
    train = ("--dataset", ROOT / "assets/demo/pickapic/train.parquet", "--max-train-steps", 1, "--effective-batch-size", 2)
    train += ("--output-dir", "trained", "--validate-every", 0)
    code, _, err = run("train_dipo", *flags(out, "train_dipo.py"), *train)
    assert code == 0, err
    assert no_network == []


def test_pasted_lines_work(everything, tmp_path, monkeypatch):
    """What is printed to be pasted, put below the model paths of hasty_sample.py's Settings, changes its defaults."""
    folder, out = everything
    lines = [line for line in out.splitlines() if line.startswith("    ") and ": str = " in line]
    assert len(lines) == len(dm.SOURCES)
    script = (ROOT / "hasty_sample.py").read_text(encoding="utf-8")
    settings = next(x for x in ast.parse(script).body if isinstance(x, ast.ClassDef) and x.name == "Settings")
    paths = [x for x in settings.body if isinstance(x, ast.AnnAssign) and x.target.id in dm.SCRIPTS["hasty_sample.py"]]
    rows = script.splitlines()
    last = max(x.end_lineno for x in paths)
    rows[last:last] = lines
    (tmp_path / "pasted.py").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import pasted

    monkeypatch.setattr(sys, "argv", ["pasted.py"])
    s = cli.parse(pasted.Settings, "")
    assert (s.base_model, s.vae) == (str(folder / "base-model"), str(folder / "vae"))
    monkeypatch.setattr(sys, "argv", ["pasted.py", "--help"])
    with pytest.raises(SystemExit):
        cli.parse(pasted.Settings, "")
