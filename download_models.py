"""Fetch the models and data that the scripts use into one folder, ready for a machine without network.

    python download_models.py                        # the judges: PickScore and its processor, HPSv2 v2.1, CLIP ViT-B/32
    python download_models.py --all                  # all judges, SDXL base (fp16), the fixed VAE, the DPO UNet, Parti
    python download_models.py --only base-model vae  # these only; --only sd15: SD 1.5 and its DPO UNet
    python download_models.py --only imagereward imagereward-tokenizer aesthetic aesthetic-clip          # two more judges
    python download_models.py --dataset 10000        # the first 10,000 usable pairs of Pick-a-Pic v2, and its test prompts
    python download_models.py --dataset sayakpaul/pickapic_v2_webdataset 10000       # of another data set on the hub
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
import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from dipo import checksums, cli, hub, pickapic
from dipo.checksums import DownloadError
from dipo.cli import UserError
from dipo.hub import Snapshot, Source

TOKENIZER = ("merges.txt", "tokenizer_config.json", "vocab.json")
VOCABULARY = ("merges.txt", "special_tokens_map.json", "vocab.json")
PROCESSOR = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
CLIP = (*PROCESSOR, "model.safetensors|pytorch_model.bin")
BERT = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
MODEL = ("config.json", "model.safetensors")
VAE = ("config.json", "diffusion_pytorch_model.safetensors")


def weights(folder: str, name: str = "diffusion_pytorch_model") -> tuple[str, str]:
    """The files of a part of a pipeline, in half precision where that is there."""
    return f"{folder}/config.json", f"{folder}/{name}.fp16.safetensors|{folder}/{name}.safetensors"


def pipeline(*numbers: str) -> tuple[tuple, tuple]:
    """The files of a pipeline with a tokenizer and a text encoder for each of these endings, and the optional ones."""
    texts = [x for n in numbers for x in (*(f"tokenizer{n}/{f}" for f in TOKENIZER), *weights(f"text_encoder{n}", "model"))]
    files = ("model_index.json", "scheduler/scheduler_config.json", *texts, *weights("unet"), *weights("vae"))
    return files, tuple(f"tokenizer{n}/special_tokens_map.json" for n in numbers)


SOURCES = {
    "pickscore": Source("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", MODEL),
    "pickscore-processor": Source(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c", PROCESSOR, VOCABULARY
    ),
    "hpsv2": Source("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a", ("HPS_v2.1_compressed.pt",)),
    # Of imagereward and aesthetic no commit is known to us. They and this one hold pickles, of which no code is read.
    "imagereward": Source("zai-org/ImageReward", "main", ("ImageReward.pt", "med_config.json")),
    "imagereward-tokenizer": Source("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", BERT),
    "aesthetic": Source("trl-lib/ddpo-aesthetic-predictor", "main", ("aesthetic-model.pth",)),
    "aesthetic-clip": Source("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", MODEL),
    "clip": Source("openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268", CLIP, VOCABULARY),
    "base-model": Source(
        "stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b", *pipeline("", "_2")
    ),
    "vae": Source("madebyollin/sdxl-vae-fp16-fix", "207b116dae70ace3637169f1ddd2434b91b3a8cd", VAE),
    "dpo-unet": Source("mhdang/dpo-sdxl-text2image-v1", "c78eb468a13fb97ccd661e2b9cd4c1c99460b1b2", weights("unet")),
    "parti": Source(
        "nateraw/parti-prompts", "944b156abfdad7627c3221b5ec4f6a6fb060a197", ("PartiPrompts.tsv",), kind="dataset"
    ),
}
# What --only sd15 fetches, without the safety checker; no commit of the UNet is known to us.
SD15 = {
    "sd15": Source("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", *pipeline("")),
    "sd15-dpo-unet": Source("mhdang/dpo-sd1.5-text2image-v1", "main", weights("unet")),
}
JUDGES = ("pickscore", "pickscore-processor", "hpsv2", "clip")
# Streamed, not fetched whole: 335 GB. No commit is known to us; the run keeps to the one that it found first.
PICKAPIC = Source("yuvalkirstain/pickapic_v2", "main", optional=("test_unique",), kind="dataset")
# The settings that take what is fetched here; pickapic's pairs are train_dipo.py's --dataset.
SCRIPTS = {
    "hasty_sample.py": ("base_model", "dpo_unet", "vae", "parti", "pickapic"),
    "train_dipo.py": ("base_model", "vae", "dataset", "pickscore", "pickscore_processor", "hpsv2", "clip"),
    "compare_quality.py": tuple(name.replace("-", "_") for name in (*SOURCES, "pickapic")),
}


@dataclass(kw_only=True)
class Settings:
    output_dir: str = "models"
    """where everything goes, a folder for each model"""
    all: bool = False
    """everything but pairs"""
    only: tuple[Literal[(*SOURCES, *SD15, "pickapic")], ...] | None = None
    """fetch (or, with --check, check) these only"""
    dataset: tuple[int] | tuple[str, int] | None = None
    """N, or NAME N: save the first N usable pairs of Pick-a-Pic v2, or of NAME on the hub, as parquet in its own columns"""
    revision: str = ""
    """a branch, tag or commit instead of those in SOURCES: main is the newest"""
    check: bool = False
    """compare what is there with its checksums, without network"""


def check_flags(s: Settings) -> None:
    """Raises UserError for a command that cannot be meant."""
    if s.dataset and s.dataset[-1] < 1:
        raise UserError(f"--dataset {s.dataset[-1]}: use 1 or more")
    if s.dataset and source_of(s.dataset).repo.count("/") != 1:
        raise UserError(f"--dataset {s.dataset[0]}: not a data set's name on the hub, as owner/name")
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


@contextlib.contextmanager
def output_folder(name: str):
    """The path of that name. DownloadError for what is wrong with it or its disk, and where another run holds its lock."""
    try:
        yield Path(name).expanduser()
    except Timeout:
        raise DownloadError(f"{name}: another run is fetching into it; wait for its end, or use --output-dir") from None
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError) as e:
        raise DownloadError(f"{name}: {cli.first_line(e)}; put that right, or give another folder with --output-dir") from e


def source_of(dataset: tuple[int] | tuple[str, int]) -> Source:
    return PICKAPIC if dataset[:-1] in ((), (PICKAPIC.repo,)) else Source(dataset[0], "main", kind="dataset")


def command(root: Path, *flags: str) -> str:
    place = () if str(root) == Settings.output_dir else ("--output-dir", str(root))
    return shlex.join(["python", "download_models.py", *flags, *place])


def check(root: Path, names: tuple[str, ...]) -> None:
    """Compare what root holds with SHA256SUMS, reporting each model; DownloadError if anything is wrong or missing."""
    sums = checksums.read_sums(root)
    if not sums:
        raise DownloadError(f"{root}: holds nothing that was fetched whole; fetch it with {command(root)}")
    begun = [p.name for p in root.glob("*/") if p.name in (*SOURCES, *SD15, "pickapic") or (p / "state.json").exists()]
    wrong = [name for name in names or sorted({*sums, *begun}) if not checksums.report(root / name, sums.get(name))]
    if not wrong:
        return
    models = [name for name in wrong if name in SOURCES | SD15]
    flags = ["--only", *models] if models else []
    if data := [name for name in wrong if name not in SOURCES | SD15]:
        state = pickapic.read_state(root / data[0])
        repo = [] if data[0] == "pickapic" else [state.get("repo", "NAME")]
        flags += ["--dataset", *repo, str(pickapic.pairs_in(state) or "N")]
    raise DownloadError(f"not as fetched: {', '.join(wrong)}; fetch again with {command(root, *flags)}")


def find_model(root: Path, name: str, revision: str) -> Snapshot:
    """What is to be fetched of a model, which is printed. Raises RepositoryError."""
    snapshot = hub.find_snapshot((SOURCES | SD15)[name], revision, root / name)
    what = f"{checksums.count(snapshot.files)}, {tqdm.format_sizeof(snapshot.size, 'B')}"
    print(f"{name}: {what}, from {snapshot.source.repo}@{snapshot.commit[:8]}", flush=True)
    return snapshot


def check_room(root: Path, snapshots: list[Snapshot], dataset: tuple | None) -> None:
    """Print what is to be fetched and how much room there is for it; DownloadError where that is too little."""
    needed = sum(snapshot.size - snapshot.arrived for snapshot in snapshots)
    if dataset:
        source, wanted = source_of(dataset), dataset[-1]
        name = pickapic.folder_name(source)
        new = max(wanted - pickapic.pairs_in(pickapic.read_state(root / name)), 0)
        print(f"{name}: {wanted} pairs, {new} of them new, from {source.repo}", flush=True)
        needed += new * pickapic.BYTES_PER_PAIR
    free = shutil.disk_usage(root).free
    need, room = (tqdm.format_sizeof(size, "B") for size in (needed, free))
    print(f"to fetch: {need}; free on the disk of {root.absolute()}: {room}", flush=True)
    if needed > free:
        raise DownloadError(f"{root.absolute()}: {need} needed, {room} free; make room, or give another --output-dir")


def print_use(root: Path, dataset: str) -> None:
    """Print the lines that point the scripts to what is in root, train_dipo.py to the pairs in the folder dataset."""
    # Scripts look for relative paths in the current folder and in their own.
    base = root if not root.is_absolute() and Path.cwd() == Path(__file__).resolve().parent else root.absolute()
    there = checksums.read_sums(root)
    names = {name.replace("-", "_"): name for name in (*SOURCES, "pickapic") if name in there} | {"dataset": dataset}
    if "base_model" not in names and "sd15" in there:  # for which the VAE is not
        names |= {"base_model": "sd15", "dpo_unet": "sd15-dpo-unet", "vae": ""}
    paths = {setting: (base / name).as_posix() for setting, name in names.items() if name in there}
    if not paths:
        return
    print("\nTo use them, paste these lines into a script's Settings, below its model paths (a name's last line counts):\n")
    for setting, path in paths.items():
        print(f"    {setting}: str = {json.dumps(path, ensure_ascii=False)}")
    print("\nor give them as flags:\n")
    for script, settings in SCRIPTS.items():
        if flags := [f"--{s.replace('_', '-')} {shlex.quote(paths[s])}" for s in settings if s in paths]:
            print(f"    python {script} {' '.join(flags)}")
    print("\nThe other studies take compare_quality.py's. HF_HUB_OFFLINE=1 keeps all off the network.")


def main(s: Settings) -> None:
    check_flags(s)
    disable_progress_bars()
    default = () if s.dataset else JUDGES
    names = tuple(SOURCES) if s.all else s.only or default
    snapshots, failed = [], []
    with output_folder(s.output_dir) as root:
        if s.check:
            return check(root, s.only or ())
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock", timeout=0):
            for name in dict.fromkeys([*names, *(SD15 if "sd15" in names else ())]):
                with hub.noted(failed):
                    snapshots.append(find_model(root, name, s.revision))
            check_room(root, snapshots, s.dataset)
            hub.fetch_all(snapshots, failed)
            if s.dataset:
                with hub.noted(failed):
                    pickapic.fetch_pairs(root, source_of(s.dataset), s.dataset[-1], s.revision)
            print_use(root, pickapic.folder_name(source_of(s.dataset) if s.dataset else PICKAPIC))
    if failed:
        # Each failure has been printed when it came.
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
