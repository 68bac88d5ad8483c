"""Fetch the models and data that the scripts use into one folder, ready for a machine without network.

    python download_models.py                        # the judges: PickScore and its processor, HPSv2 v2.1, CLIP ViT-B/32
    python download_models.py --all                  # SDXL base (fp16), the fixed VAE, the DPO UNet and Parti prompts too
    python download_models.py --only base-model vae  # these only
    python download_models.py --dataset 10000        # the first 10,000 usable pairs of Pick-a-Pic v2, and its test prompts
    python download_models.py --check                # are all files still what was fetched? Needs no network

Each model gets a folder named after the scripts' flag for it: models/pickscore is for --pickscore. Only the files that the
scripts read are fetched, from the commits in SOURCES. Before anything is fetched you see what, how large and where to; the
run is refused where the disk has no room. Afterwards every file is compared with the checksum that the hub gives for it,
models/SHA256SUMS is written (`sha256sum -c` reads it too), and the lines to paste into the scripts are printed.

A run that was stopped at any moment goes on when the same command is given again. The hub's own variables count: HF_TOKEN
for gated models, HF_ENDPOINT for a mirror, HF_HOME for the cache, out of which files that are there already are taken.
Exit code 1: something could not be fetched or is damaged; 2: the command was wrong.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import huggingface_hub
import tyro
from filelock import FileLock, Timeout
from huggingface_hub import errors
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars
from tqdm import tqdm


@dataclass(frozen=True)
class Source:
    repo: str
    revision: str
    """a commit, or a branch where no commit is known to us; --revision goes before it"""
    files: tuple[str, ...]
    """what is fetched; of alternatives with | between, the first that is there"""
    optional: tuple[str, ...] = ()
    """fetched where it is there"""
    kind: str = "model"
    """the hub's word for it: model or dataset"""


TOKENIZER = ("merges.txt", "tokenizer_config.json", "vocab.json")
PROCESSOR = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
SOURCES = {
    "pickscore": Source(
        "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", ("config.json", "model.safetensors")
    ),
    "pickscore-processor": Source(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        PROCESSOR,
        ("merges.txt", "special_tokens_map.json", "vocab.json"),
    ),
    "hpsv2": Source("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a", ("HPS_v2.1_compressed.pt",)),
    # OpenAI's repository has its weights as a pickle only. compare_quality.py reads tensors from it, and no code.
    "clip": Source(
        "openai/clip-vit-base-patch32",
        "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
        (*PROCESSOR, "model.safetensors|pytorch_model.bin"),
        ("merges.txt", "special_tokens_map.json", "vocab.json"),
    ),
    "base-model": Source(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
        (
            "model_index.json",
            "scheduler/scheduler_config.json",
            *(f"{folder}/{file}" for folder in ("tokenizer", "tokenizer_2") for file in TOKENIZER),
            *(f"{folder}/config.json" for folder in ("text_encoder", "text_encoder_2", "unet", "vae")),
            *(f"{folder}/model.fp16.safetensors" for folder in ("text_encoder", "text_encoder_2")),
            *(f"{folder}/diffusion_pytorch_model.fp16.safetensors" for folder in ("unet", "vae")),
        ),
        ("tokenizer/special_tokens_map.json", "tokenizer_2/special_tokens_map.json"),
    ),
    "vae": Source(
        "madebyollin/sdxl-vae-fp16-fix",
        "207b116dae70ace3637169f1ddd2434b91b3a8cd",
        ("config.json", "diffusion_pytorch_model.safetensors"),
    ),
    "dpo-unet": Source(
        "mhdang/dpo-sdxl-text2image-v1",
        "c78eb468a13fb97ccd661e2b9cd4c1c99460b1b2",
        (
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors|unet/diffusion_pytorch_model.safetensors",
        ),
    ),
    "parti": Source(
        "nateraw/parti-prompts", "944b156abfdad7627c3221b5ec4f6a6fb060a197", ("PartiPrompts.tsv",), kind="dataset"
    ),
}
JUDGES = ("pickscore", "pickscore-processor", "hpsv2", "clip")
# Streamed, not fetched whole: 335 GB. No commit is known to us; the run keeps to the one that it found first.
PICKAPIC = Source("yuvalkirstain/pickapic_v2", "main", (), kind="dataset")
PAIRS_PER_FILE = 500
FILES_AT_A_TIME = 4
FETCHER = "fetcher"
# Seconds before a call that failed for a passing reason is tried again.
WAITS = (1, 2, 4, 8)
# 322 GB of training rows (the data set's card) over about 0.96 million of them.
BYTES_PER_PAIR = 340_000
# The settings that take what is fetched here; pickapic's pairs are train_dipo.py's --dataset.
SCRIPTS = {
    "hasty_sample.py": ("base_model", "dpo_unet", "vae", "parti"),
    "train_dipo.py": ("base_model", "vae", "dataset"),
    "compare_quality.py": (
        *("base_model", "dpo_unet", "vae", "pickscore", "pickscore_processor", "hpsv2", "clip", "parti", "pickapic"),
    ),
}


@dataclass
class Settings:
    output_dir: str = "models"
    """where everything goes, a folder for each model"""
    all: bool = False
    """everything but Pick-a-Pic"""
    only: tuple[Literal[(*SOURCES, "pickapic")], ...] | None = None
    """fetch (or, with --check, check) these only"""
    dataset: int | None = None
    """save the first N usable pairs of Pick-a-Pic v2 (a winner, pictures that can be read) as parquet, in its own columns"""
    revision: str = ""
    """a branch, tag or commit instead of those in SOURCES: main is the newest"""
    check: bool = False
    """compare what is there with its checksums, without network"""


class UserError(Exception):
    """A command that cannot be meant; ends the script with one line and exit code 2."""


class DownloadError(Exception):
    """Something that stops the run; ends it with one line and exit code 1."""


class RepositoryError(DownloadError):
    """The same for one repository; the others are still fetched."""


class File(NamedTuple):
    path: str
    size: int | None
    """in bytes"""
    checksum: str
    """SHA-256 of a large file, git's SHA-1 of a small one: what the hub has"""


# ------------------------------------------------------------------------------------------------------------------ hub


class Again(Exception):
    """The storage refused an address that the hub gave, as it does once the address is some time old."""


def status_of(e: BaseException) -> int | None:
    return getattr(getattr(e, "response", None), "status_code", None)


def is_passing(e: Exception, transport: bool) -> bool:
    """Whether the same call may well succeed in a while: a busy server or, where transport says so, a broken connection."""
    if status := status_of(e):
        return status in (408, 425, 429) or status >= 500
    broken = isinstance(e, (ConnectionError, TimeoutError)) or "Consistency check" in str(e)
    broken |= type(e).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))
    return isinstance(e, Again) or (transport and broken and not isinstance(e, errors.OfflineModeIsEnabled))


def persist(call, source: Source, stop: threading.Event, transport: bool):
    """call(), tried again after WAITS seconds where its failure may pass. Raises DownloadError."""
    for wait in (*WAITS, None):
        try:
            return call()
        except DownloadError:
            raise
        except Exception as e:
            if wait is None or not is_passing(e, transport):
                raise explain(e, source) from e
        if stop.wait(wait):
            raise DownloadError("stopped")


def explain(e: Exception, source: Source) -> DownloadError:
    """What went wrong with a repository, as one line that says what to do."""
    where, said = f"{source.repo} at {clean(ENDPOINT)}", brief(e)
    number, status = getattr(e, "errno", None), status_of(e)
    if isinstance(e, errors.GatedRepoError):
        return RepositoryError(f"{where}: gated; accept its terms on its page, set HF_TOKEN and run this again")
    if isinstance(e, errors.RepositoryNotFoundError):
        return RepositoryError(
            f"{where}: no such repository, or none that you may read; set HF_TOKEN if it is private, and look at HF_ENDPOINT"
        )
    if isinstance(e, errors.RevisionNotFoundError):
        return RepositoryError(f"{where}: no such revision; take the newest with --revision main")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"{source.repo}: the disk is full; make room and run this again: what has arrived is kept")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return DownloadError(f"cannot write ({said}); put that right, or give another folder with --output-dir")
    if status in (401, 403):
        return RepositoryError(f"{where}: not allowed ({said}); look at HF_TOKEN, and run this again")
    if isinstance(e, errors.EntryNotFoundError) and not isinstance(e, errors.LocalEntryNotFoundError):
        return RepositoryError(f"{where}: a file is not there ({said}); try --revision main")
    if status or "Consistency check" in said:
        return RepositoryError(f"{where}: cannot be fetched ({said}); run this again later: what has arrived is kept")
    return DownloadError(
        f"{where}: cannot be fetched ({said}); look at the connection and run this again: what has arrived is kept"
    )


def brief(e: BaseException) -> str:
    return clean(" ".join(str(e).split()) or type(e).__name__)[:200]


def clean(text: str) -> str:
    """Text without the passwords and signatures that addresses can hold."""
    return re.sub(r"(https?://)[^/\s@]*@", r"\1", re.sub(r"(https?://[^\s?]+)\?[^\s,)]*", r"\1", text))


def repo_info(source: Source, revision: str, **more):
    """The hub's information on a repository, its sha the commit that revision is now. Raises DownloadError."""
    call = functools.partial(
        huggingface_hub.HfApi().repo_info, source.repo, repo_type=source.kind, revision=revision, timeout=30, **more
    )
    info = persist(call, source, threading.Event(), transport=False)
    if not info.sha:
        raise RepositoryError(
            f"{source.repo} at {clean(ENDPOINT)}: does not say which commit it has; use another HF_ENDPOINT"
        )
    return info


def find_files(source: Source, revision: str) -> tuple[str, list[File]]:
    """The commit that revision is now, and the files to fetch from it, with sizes in bytes and checksums."""
    info = repo_info(source, revision, files_metadata=True)
    there = {f.rfilename: f for f in info.siblings or ()}
    chosen = [file for file in source.optional if file in there]
    for wanted in source.files:
        file = next((name for name in wanted.split("|") if name in there), None)
        if file is None:
            raise RepositoryError(f"{source.repo}@{info.sha}: has no {wanted.replace('|', ' or ')}; try --revision main")
        chosen.append(file)
    files = []
    for name in sorted(chosen):
        checksum = there[name].lfs.sha256 if there[name].lfs else there[name].blob_id
        if not checksum:
            raise RepositoryError(
                f"{source.repo}: no checksum of {name} from {clean(ENDPOINT)}; use another mirror (HF_ENDPOINT)"
            )
        files.append(File(name, there[name].size, checksum))
    return info.sha, files


class Part(io.FileIO):
    """What has arrived of a file, to be written on; tells a bar, and gives up once it is told to stop."""

    def __init__(self, path: Path, bar: tqdm, stop: threading.Event):
        super().__init__(path, "r+" if path.exists() else "w+")
        self.seek(0, os.SEEK_END)
        self.bar, self.stop = bar, stop

    def write(self, data: bytes) -> int:
        if self.stop.is_set():
            raise DownloadError("stopped")
        self.bar.update(len(data))
        # A raw file may take less than all of it; what is left of a full disk is one such case.
        done = 0
        while done < len(data):
            done += super().write(memoryview(data)[done:])
        return done


def part_path(folder: Path, file: File) -> Path:
    return folder / ".parts" / f"{file.path.replace('/', '--')}.{file.checksum[:16]}"


def fetch(
    source: Source, commit: str, file: File, folder: Path, bar: tqdm, stop: threading.Event, use_cache: bool = True
) -> None:
    """Bring one file into folder, from the hub's cache or the hub, unless it is there in its full size; or DownloadError.

    It goes on where an earlier run stopped. (huggingface_hub's own snapshot_download did once; now it begins a file anew.)
    """
    target, part = folder / file.path, part_path(folder, file)
    if target.is_file() and target.stat().st_size == file.size:
        return
    url = huggingface_hub.hf_hub_url(source.repo, file.path, repo_type=source.kind, revision=commit)

    def get() -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > (file.size or 0):
            part.unlink()
        cached = huggingface_hub.try_to_load_from_cache(source.repo, file.path, revision=commit, repo_type=source.kind)
        if use_cache and isinstance(cached, str):
            shutil.copyfile(cached, part)
            bar.update(part.stat().st_size)
        else:
            found = huggingface_hub.get_hf_file_metadata(url)
            headers, away = build_hf_headers(), urlsplit(found.location)[:2] != urlsplit(url)[:2]
            if away:
                # The token is the hub's business, not that of the storage it sends us to.
                headers.pop("authorization", None)
            with Part(part, bar, stop) as f:
                try:
                    http_get(found.location, f, resume_size=f.tell(), headers=headers, expected_size=file.size)
                except Exception as e:
                    if away and status_of(e) in (401, 403):
                        raise Again(brief(e)) from e
                    raise
        os.replace(part, target)

    persist(get, source, stop, transport=True)


def verify(source: Source, commit: str, files: list[File], folder: Path, bar: tqdm, stop: threading.Event) -> None:
    """Compare files with the hub's checksums and fetch once more what differs. RepositoryError where that does not help."""
    for file in files:
        if not damage(folder, file):
            continue
        (folder / file.path).unlink(missing_ok=True)
        fetch(source, commit, file, folder, bar, stop, use_cache=False)
        if reason := damage(folder, file):
            (folder / file.path).unlink(missing_ok=True)
            raise RepositoryError(
                f"{source.repo}: {file.path} arrived {reason} and was deleted; run this again, or use a mirror (HF_ENDPOINT)"
            )


# ------------------------------------------------------------------------------------------------------------ checksums


def damage(folder: Path, file: File) -> str:
    """What is wrong with a file: "" if nothing."""
    path = folder / file.path
    if not path.is_file():
        return "missing"
    if file.size is not None and path.stat().st_size != file.size:
        return f"with {path.stat().st_size} bytes instead of {file.size}"
    # The hub has a SHA-256 of large files only; small ones have what `git hash-object` gives.
    digest = hashlib.sha256()
    if not is_sha256(file.checksum):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return "" if read_into(digest, path) == file.checksum else "with a wrong checksum"


def is_sha256(checksum: str) -> bool:
    return len(checksum) == 64


def read_into(digest, path: Path) -> str:
    """The digest of a file, in hexadecimal, with a bar where that takes a while."""
    size = path.stat().st_size
    with (
        path.open("rb") as f,
        tqdm(total=size, desc=f"checking {path.name}", unit="B", unit_scale=True, leave=False, delay=2) as bar,
    ):
        while chunk := f.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def read_sums(root: Path) -> dict[str, dict[str, str]]:
    """The checksums in root/SHA256SUMS: for each model its files' SHA-256. Raises DownloadError for another kind of file."""
    sums = {}
    try:
        lines = (root / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise DownloadError(f"{root / 'SHA256SUMS'}: cannot be read ({brief(e)}); delete it and fetch again") from e
    for line in lines:
        if line and not line.startswith("#"):
            checksum, _, path = line.partition("  ")
            name, _, file = path.partition("/")
            # A file outside is none of ours: what is listed here may be deleted when another revision is fetched.
            if not is_sha256(checksum) or not file or file.startswith("/") or ".." in Path(path).parts:
                raise DownloadError(f"{root / 'SHA256SUMS'}: {line[:80]!r} is no checksum; delete the file and fetch again")
            sums.setdefault(name, {})[file] = checksum
    return sums


def write_sums(root: Path, name: str, sums: dict[str, str]) -> None:
    """Put the SHA-256 of a model's files into root/SHA256SUMS, which is whole at any moment. What it had of them and has no
    more, from another revision, is deleted."""
    all_sums = read_sums(root)
    for file in all_sums.pop(name, {}).keys() - sums.keys():
        (root / name / file).unlink(missing_ok=True)
    all_sums |= {name: sums} if sums else {}
    write(root / "SHA256SUMS", "".join(f"{c}  {n}/{f}\n" for n in sorted(all_sums) for f, c in sorted(all_sums[n].items())))


def sha256(path: Path) -> str:
    return read_into(hashlib.sha256(), path)


def write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def check(root: Path, names: tuple[str, ...]) -> None:
    """Compare what root holds with SHA256SUMS, reporting each model; DownloadError if anything is wrong or missing."""
    sums = read_sums(root)
    if not sums:
        raise DownloadError(f"{root}: holds nothing that was fetched whole; fetch it with python {Path(__file__).name}")
    begun = [p.name for p in root.iterdir() if p.name in (*SOURCES, "pickapic") and p.is_dir()]
    wrong = []
    for name in names or sorted({*sums, *begun}):
        if name not in sums:
            print(f"{name}: not fetched whole")
            wrong.append(name)
            continue
        reasons = {f: damage(root / name, File(f, None, c)) for f, c in sums[name].items()}
        reasons = {f: reason for f, reason in reasons.items() if reason}
        print(f"{name}: {count(sums[name])}, {len(reasons) or 'none'} damaged or missing")
        for file, reason in reasons.items():
            print(f"    {name}/{file}: {reason}")
        wrong += [name] if reasons else []
    if wrong:
        models = [n for n in wrong if n != "pickapic"]
        again = f"python {Path(__file__).name}" + (f" --only {' '.join(models)}" if models else "")
        if "pickapic" in wrong:
            again += f" --dataset {pairs_in(read_state(root / 'pickapic')) or 'N'}"
        again += "" if str(root) == Settings.output_dir else f" --output-dir {shlex.quote(str(root))}"
        raise DownloadError(f"not as fetched: {', '.join(wrong)}; fetch again with {again}")


# -------------------------------------------------------------------------------------------------------------- dataset


def is_usable(row: dict) -> bool:
    """Whether a row of Pick-a-Pic has a winner and two pictures that can be read, as train_dipo.py needs."""
    from PIL import Image

    if row["label_0"] not in (0, 1):
        return False
    try:
        for column in ("jpg_0", "jpg_1"):
            with Image.open(io.BytesIO(row[column])) as image:
                image.load()
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return False
    return True


def read_state(folder: Path) -> dict:
    """What earlier runs have of Pick-a-Pic: the commit, and of each whole file its pairs, its SHA-256 and the position in
    the stream behind it. Empty where that cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        named = all(re.fullmatch(r"train-\d{5}\.parquet|test_unique\.parquet", file) for file in state["files"])
        if named and state["commit"] and all(x.keys() == {"pairs", "sha256", "position"} for x in state["files"].values()):
            return state
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {"commit": None, "files": {}}


def pairs_in(state: dict) -> int:
    return sum(x["pairs"] for x in state["files"].values())


def read_pairs(rows, position: dict | None, wanted: int, bar: tqdm):
    """The next wanted usable rows of a stream behind a position, in lists of PAIRS_PER_FILE, each with the position behind
    it; fewer where the stream ends."""
    if position:
        rows.load_state_dict(position)
    pairs, left_out = [], 0
    for row in rows:
        if not is_usable(row):
            left_out += 1
            bar.set_postfix_str(f"{left_out} left out", refresh=False)
            continue
        pairs.append(row)
        wanted -= 1
        bar.update()
        if len(pairs) == PAIRS_PER_FILE or not wanted:
            yield pairs, rows.state_dict()
            pairs = []
        if not wanted:
            return
    if pairs:
        yield pairs, rows.state_dict()


def save_pairs(folder: Path, wanted: int, revision: str) -> dict:
    """Stream the first wanted usable pairs of Pick-a-Pic into folder/train-00000.parquet and so on, and the captions of its
    test set into test_unique.parquet. Whole files of earlier runs are kept, damaged ones made again. Returns the state."""
    import datasets

    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    state = read_state(folder)
    files = state["files"]
    bad = [f for f, x in files.items() if damage(folder, File(f, None, x["sha256"]))]
    if revision or not state["commit"]:
        commit = repo_info(PICKAPIC, revision or PICKAPIC.revision).sha
        if state["commit"] not in (None, commit):
            raise RepositoryError(f"{folder}: holds pairs of commit {state['commit']}; delete it, or leave --revision out")
        state["commit"] = commit
    stream = functools.partial(datasets.load_dataset, PICKAPIC.repo, streaming=True, revision=state["commit"])

    def save(file: str, rows: list[dict], features, position: dict | None) -> None:
        aside = folder / f".{file}.part"
        datasets.Dataset.from_list(rows, features=features).to_parquet(aside)
        os.replace(aside, folder / file)
        files[file] = {"pairs": len(rows) if position else 0, "sha256": sha256(folder / file), "position": position}
        write(folder / "state.json", json.dumps(state))

    if "test_unique.parquet" not in files or "test_unique.parquet" in bad:
        captions = stream(split="test_unique", columns=["caption"])
        save("test_unique.parquet", list(captions), captions.features, None)
    train = sorted(f for f in files if f.startswith("train-"))
    before = dict(zip(train, [None, *(files[f]["position"] for f in train)], strict=False))
    more = max(wanted - pairs_in(state), 0)
    again = [f for f in train if f in bad]
    with tqdm(total=more + sum(files[f]["pairs"] for f in again), desc="Pick-a-Pic", unit=" pairs") as bar:
        for file in again:
            rows = stream(split="train")
            pairs, position = next(read_pairs(rows, before[file], files[file]["pairs"], bar))
            save(file, pairs, rows.features, position)
        if more:
            rows = stream(split="train")
            for pairs, position in read_pairs(rows, files[train[-1]]["position"] if train else None, more, bar):
                save(f"train-{len(files) - 1:05d}.parquet", pairs, rows.features, position)
    for path in folder.glob("train-[0-9][0-9][0-9][0-9][0-9].parquet"):
        if path.name not in files:
            path.unlink()
    return state


# ----------------------------------------------------------------------------------------------------------------- main
def readable(size: float) -> str:
    power, unit = (1e9, "GB") if size >= 1e8 else (1e6, "MB") if size >= 1e5 else (1e3, "kB")
    return f"{size / power:.1f} {unit}"


def count(files) -> str:
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"


def bytes_there(folder: Path, file: File) -> int:
    """How much of a file an earlier run has left."""
    target, part = folder / file.path, part_path(folder, file)
    if target.is_file() and target.stat().st_size == file.size:
        return file.size
    return min(part.stat().st_size, file.size or 0) if part.is_file() else 0


def total(files: list[File]) -> int:
    return sum(f.size or 0 for f in files)


def check_room(root: Path, needed: int) -> None:
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    print(f"to fetch: {readable(needed)}; free on the disk of {root.absolute()}: {readable(free)}", flush=True)
    if needed > free:
        raise DownloadError(
            f"{root.absolute()}: {readable(needed)} needed, {readable(free)} free; make room, or give another folder with "
            "--output-dir"
        )


def fetch_all(root: Path, names: tuple[str, ...], pairs: int, revision: str) -> list[RepositoryError]:
    """Fetch models into root and verify them, then pairs of Pick-a-Pic. Returns what went wrong with single ones."""
    plans, failed = {}, []

    def fails(e: RepositoryError) -> None:
        failed.append(e)
        tqdm.write(f"error: {e}", sys.stderr)

    for name in names:
        try:
            plans[name] = find_files(SOURCES[name], revision or SOURCES[name].revision)
        except RepositoryError as e:
            fails(e)
            continue
        commit, files = plans[name]
        print(f"{name}: {count(files)}, {readable(total(files))}, from {SOURCES[name].repo}@{commit[:8]}", flush=True)
    have = sum(bytes_there(root / name, f) for name, (_, files) in plans.items() for f in files)
    size = sum(total(files) for _, files in plans.values())
    needed = size - have
    if pairs:
        new = max(pairs - pairs_in(read_state(root / "pickapic")), 0)
        print(f"pickapic: {pairs} pairs, {new} of them new, from {PICKAPIC.repo}", flush=True)
        needed += new * BYTES_PER_PAIR
    check_room(root, needed)
    stop, pool = threading.Event(), ThreadPoolExecutor(FILES_AT_A_TIME, thread_name_prefix=FETCHER)
    try:
        with tqdm(total=size, initial=have, desc="fetching", unit="B", unit_scale=True, disable=not plans) as bar:
            jobs = {
                name: [pool.submit(fetch, SOURCES[name], commit, f, root / name, bar, stop) for f in files]
                for name, (commit, files) in plans.items()
            }
            for name, (commit, files) in plans.items():
                try:
                    for job in jobs[name]:
                        job.result()
                    verify(SOURCES[name], commit, files, root / name, bar, stop)
                except RepositoryError as e:
                    fails(e)
                    if not all((root / name / f).is_file() for f in read_sums(root).get(name, {})):
                        write_sums(root, name, {})
                    continue
                shutil.rmtree(root / name / ".parts", ignore_errors=True)
                sums = {f.path: f.checksum if is_sha256(f.checksum) else sha256(root / name / f.path) for f in files}
                write_sums(root, name, sums)
                bar.write(f"{name}: {count(files)} in {root / name}, with the checksums that the hub gives", sys.stdout)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    if pairs:
        try:
            state = save_pairs(root / "pickapic", pairs, revision)
        except RepositoryError as e:
            fails(e)
            return failed
        except DownloadError:
            raise
        except Exception as e:
            raise explain(e, PICKAPIC) from e
        write_sums(root, "pickapic", {file: x["sha256"] for file, x in state["files"].items()})
        have = f"{pairs_in(state)} pairs" + ("" if pairs_in(state) >= pairs else ", all that there are")
        print(f"pickapic: {have} in {root / 'pickapic'}, from commit {state['commit'][:8]}", flush=True)
    return failed


def show_use(root: Path) -> None:
    """Print the lines that point the scripts to what is in root."""
    # Scripts look for relative paths in the current folder and in their own.
    near = not root.is_absolute() and Path.cwd() == Path(__file__).resolve().parent
    base = root if near else root.absolute()
    there = read_sums(root)
    paths = {name.replace("-", "_"): (base / name).as_posix() for name in (*SOURCES, "pickapic") if name in there}
    if "pickapic" in paths:
        paths["dataset"] = paths["pickapic"]
    if not paths:
        return
    print("\nTo use them, paste these lines into a script's Settings, below its model paths (a name's last line counts):\n")
    for setting, path in paths.items():
        print(f"    {setting}: str = {json.dumps(path, ensure_ascii=False)}")
    print("\nor give them as flags:\n")
    for script, settings in SCRIPTS.items():
        if flags := [f"--{s.replace('_', '-')} {shlex.quote(paths[s])}" for s in settings if s in paths]:
            print(f"    python {script} {' '.join(flags)}")
    print("\nThe other studies take compare_quality.py's, but no --clip. HF_HUB_OFFLINE=1 keeps all off the network.")


def run(s: Settings) -> int:
    """What the settings ask for; 1 if a repository failed, which is said by then, else 0. Raises UserError for a wrong
    command, DownloadError for everything else that can happen."""
    if s.dataset is not None and s.dataset < 1:
        raise UserError(f"--dataset {s.dataset}: use 1 or more")
    if s.only == ():
        raise UserError(f"--only: name what to fetch or check: {', '.join(SOURCES)}")
    if s.all and s.only:
        raise UserError("--all and --only: use one of them")
    if "pickapic" in (s.only or ()) and not s.check:
        raise UserError("--only pickapic: fetch it with --dataset N")
    if not s.output_dir.strip():
        raise UserError("--output-dir is empty: give a folder")
    if HF_HUB_OFFLINE and not s.check:
        raise DownloadError("HF_HUB_OFFLINE is set: unset it to fetch; --check needs no network")
    disable_progress_bars()
    names = s.only or (tuple(SOURCES) if s.all else () if s.dataset else JUDGES)
    try:
        root = Path(s.output_dir).expanduser()
        if s.check:
            check(root, s.only or ())
            return 0
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock", timeout=0):
            failed = fetch_all(root, names, s.dataset or 0, s.revision)
            show_use(root)
    except Timeout:
        raise DownloadError(f"{root}: another run is fetching into it; wait for its end, or use --output-dir") from None
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError) as e:
        raise DownloadError(f"{s.output_dir}: {brief(e)}; put that right, or give another folder with --output-dir") from e
    return 1 if failed else 0


# Copied from hasty_sample.parse_settings
def parse_settings(cls, description: str):
    """The settings dataclass from the command line by tyro; what it says of a bad flag, in a box of several lines, becomes
    one line. Exit code 2 then."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, description=description)
    except SystemExit:
        if said.getvalue():
            # Without the frame, bold type and the help that follows.
            text = re.sub(r"\x1b\[[\d;]*m|\[/?bold\]|[\u2500-\u257f]", " ", said.getvalue())
            print("error:", " ".join(text.split()).partition(" Argument helptext:")[0], file=sys.stderr)
        raise


def leave(code: int):
    """Exit; without waiting for connections that may hang, as what they have brought is on the disk."""
    until = time.monotonic() + 2
    while (hanging := any(t.name.startswith(FETCHER) for t in threading.enumerate())) and time.monotonic() < until:
        time.sleep(0.05)
    if hanging:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A folder's name may hold letters that the terminal does not.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    s = parse_settings(Settings, __doc__)
    try:
        leave(run(s))
    except (UserError, DownloadError) as e:
        print(f"error: {e}", file=sys.stderr)
        leave(2 if isinstance(e, UserError) else 1)
    except BrokenPipeError:
        # Whoever read the output has gone; what Python would say of that at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1)
    except KeyboardInterrupt:
        print(f"stopped; what has arrived is in {s.output_dir}, the same command goes on", file=sys.stderr)
        leave(130)


if __name__ == "__main__":
    main()
