"""Score finished images with PickScore, HPSv2 and CLIPScore.

    python compare_quality.py --score-only generated_images/sdxl               # what hasty_sample.py left there
    python compare_quality.py --score-only generated_images/a generated_images/b --demo

Every PNG that carries its prompt inside (as those of hasty_sample.py do) gets a row in scores.csv beside it; a run that was
stopped goes on where it was, and images that have their scores are left alone. The terminal shows each folder's means with
n and 95 % intervals and, for two folders with the same prompts and seeds, both sides of the win rates.

Scales: PickScore is 100 times a cosine at its trained scale (near 22), HPSv2 a cosine (near 0.28), CLIPScore 2.5 times a
cosine, 0 at the least (near 0.66). To use other models, edit the paths at the top of Settings or pass them as flags.
"""

import contextlib
import io
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import huggingface_hub
import huggingface_hub.errors
import numpy as np
import open_clip
import pandas as pd
import scipy.stats
import torch
import torchvision.transforms.v2.functional as TF
import transformers
import tyro
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, CLIPModel


@dataclass
class Settings:
    pickscore: str = "yuvalkirstain/PickScore_v1"
    """PickScore's CLIP model: a folder or a hub name"""
    pickscore_processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """its processor: a folder or a hub name"""
    hpsv2: str = "xswu/HPSv2"
    """HPSv2's checkpoint: a .pt file, a folder or a hub name that holds it"""
    clip: str = "openai/clip-vit-base-patch32"
    """CLIPScore's CLIP model and processor: a folder or a hub name; empty: no CLIPScore"""

    score_only: tuple[str, ...] = ()
    """folders of images to score"""
    demo: bool = False
    """use the demo's own judges in assets/demo, which know its pictures only; no CLIPScore"""
    hpsv2_version: str = "v2.1"
    """v2.1 or v2.0"""
    batch_size: int = 16
    """images scored together"""
    dtype: str = "auto"
    """fp16, bf16, fp32, or auto: fp16 on a GPU, fp32 on the CPU"""
    device: str = "auto"
    """cuda, cuda:1, mps, cpu, or auto: the first of these that is there"""


DEMO_JUDGES = {
    "pickscore": "assets/demo/pickscore",
    "pickscore_processor": "assets/demo/pickscore",
    "hpsv2": "assets/demo/hpsv2",
    "clip": "",
}
# The files that hpsv2.utils.hps_version_map names.
HPSV2_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
# Hessel et al. 2021, section 3: what captions start with.
CLIPSCORE_PREFIX = "A photo depicts "
# Copied from hasty_sample.DTYPES
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# Copied from hasty_sample.UserError
class UserError(Exception):
    """Something that the user can put right; ends the script with one line and exit code 2."""


# ------------------------------------------------------------------------------------------------------------- settings


# Copied from hasty_sample.find_path
def find_path(name: str) -> Path | None:
    """A file or folder given relative to the current folder or to this script's; None where neither exists."""
    try:
        for path in (Path(name).expanduser(), Path(__file__).resolve().parent / name):
            if name and path.exists():
                return path
    except (OSError, RuntimeError):
        pass
    return None


# Copied from hasty_sample.first_line
def first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


# Copied from hasty_sample.root_cause
def root_cause(e: BaseException) -> BaseException:
    """The first of the hub's own errors among those that led to an exception; the exception itself if there is none."""
    links = [e]
    for link in links:
        if isinstance(link, (huggingface_hub.errors.EntryNotFoundError, huggingface_hub.errors.HfHubHTTPError)):
            return link
        links += [x for x in (link.__cause__, link.__context__) if x is not None and x not in links]
    return e


# Copied from hasty_sample.quiet_libraries
def quiet_libraries() -> None:
    """No loading bars and no advice between our own lines, and no report of a variant that is tried and not there."""
    diffusers.utils.logging.set_verbosity(diffusers.logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)


def check_settings(s: Settings) -> None:
    """Raise UserError for every value that can be judged without loading a model."""
    if not s.score_only:
        raise UserError("--score-only: give the folders of images to score")
    for folder in s.score_only:
        if not find_path(folder) or not find_path(folder).is_dir():
            raise UserError(f"--score-only {folder}: no such folder; give one that hasty_sample.py made images in")
    if s.hpsv2_version not in HPSV2_FILES:
        raise UserError(f"--hpsv2-version {s.hpsv2_version!r}: use one of {', '.join(HPSV2_FILES)}")
    if s.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {s.dtype!r}: use auto, {', '.join(DTYPES)}")
    if s.batch_size < 1:
        raise UserError(f"--batch-size {s.batch_size}: use 1 or more")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", s.device):
        raise UserError(f"--device {s.device!r}: use auto, cuda, cuda:1, mps or cpu")
    if s.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {s.device}: no CUDA GPU is visible to torch here; use --device cpu, or fix the driver")


def pick_device(name: str) -> torch.device:
    """The named device; for auto the first of cuda, mps and cpu that is there."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


# Copied from hasty_sample.device_name
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# -------------------------------------------------------------------------------------------------------------- scorers


@contextlib.contextmanager
def loading(flag: str, name: str):
    """UserError instead of whatever goes wrong while a scorer's weights are loaded."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"--{flag} {name}: cannot be loaded ({first_line(root_cause(e))[:200]}); fetch it with download_models.py, or "
            "try --demo; images that are made already are kept"
        ) from e


def load_pickscore(s: Settings, device: torch.device, dtype: torch.dtype):
    """PickScore (Kirstain et al. 2023): a function of N images (PIL) and their N prompts that gives scores (N,), float32,
    the model's scale times the cosine of image and text."""
    with loading("pickscore", s.pickscore):
        model = CLIPModel.from_pretrained(
            str(find_path(s.pickscore) or s.pickscore), torch_dtype=dtype, use_safetensors=True
        )
    with loading("pickscore-processor", s.pickscore_processor):
        processor = AutoProcessor.from_pretrained(str(find_path(s.pickscore_processor) or s.pickscore_processor))
    return clip_scorer(model.eval().to(device), processor, lambda cosine: model.logit_scale.exp().float() * cosine)


def load_clipscore(s: Settings, device: torch.device, dtype: torch.dtype):
    """CLIPScore (Hessel et al. 2021): 2.5 times the cosine of image and "A photo depicts" prompt, 0 where that is negative;
    a function as load_pickscore's."""
    with loading("clip", s.clip):
        path = str(find_path(s.clip) or s.clip)
        # OpenAI's repository has no safetensors on its main branch; torch.load reads its weights only, no code.
        model = CLIPModel.from_pretrained(path, torch_dtype=dtype)
        processor = AutoProcessor.from_pretrained(path)
    return clip_scorer(model.eval().to(device), processor, lambda cosine: 2.5 * cosine.clamp(min=0), CLIPSCORE_PREFIX)


def clip_scorer(model: CLIPModel, processor, of_cosine, prefix: str = ""):
    """The scoring function of a transformers CLIP model; of_cosine turns cosines (N,) into scores."""

    @torch.inference_mode()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pixels = processor(images=[x.convert("RGB") for x in images], return_tensors="pt").pixel_values
        unique = list(dict.fromkeys(prompts))
        texts = [prefix + p for p in unique]
        text = processor(text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(model.device)
        out = model(**text, pixel_values=pixels.to(model.device, model.dtype))
        rows = torch.tensor([unique.index(p) for p in prompts], device=model.device)
        return of_cosine((out.image_embeds.float() * out.text_embeds.float()[rows]).sum(dim=-1)).cpu()

    return score


def load_hpsv2(s: Settings, device: torch.device, dtype: torch.dtype):
    """HPSv2 (Wu et al. 2023): a function as load_pickscore's that gives the cosine of image and prompt. The model is
    open_clip's ViT-H-14 with the checkpoint's weights, or the one whose configuration lies beside it, as the demo's does."""
    with loading("hpsv2", s.hpsv2):
        path, file = find_path(s.hpsv2), HPSV2_FILES[s.hpsv2_version]
        if path is None:
            path = Path(huggingface_hub.hf_hub_download(s.hpsv2, file))
        elif path.is_dir():
            if not (path / file).exists():
                raise UserError(f"--hpsv2 {s.hpsv2}: no {file} in it; fetch it with download_models.py")
            path = path / file
        name, tokenizer = "ViT-H-14", None
        if config := next(path.parent.glob("*-hpsv2.json"), None):
            open_clip.add_model_config(config)
            name, tokenizer = config.stem, transformers.CLIPTokenizer.from_pretrained(path.parent / "tokenizer")
        precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = open_clip.create_model(name, precision=precision)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        model.load_state_dict(weights)
        model = model.eval().to(device)
        tokenize = open_clip.get_tokenizer(name) if tokenizer is None else None
    size = model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size

    @torch.inference_mode()
    def score(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        pixels = torch.stack([hpsv2_pixels(x, size) for x in images]).to(device, dtype)
        unique = list(dict.fromkeys(prompts))
        if tokenize is not None:
            ids = tokenize(unique)
        else:
            ids = tokenizer(unique, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(ids.to(device), normalize=True)
        rows = torch.tensor([unique.index(p) for p in prompts], device=device)
        return (image.float() * text.float()[rows]).sum(dim=-1).cpu()

    return score


def hpsv2_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """hpsv2's own preprocessing, which resizes the tensor, not the picture: float32 (3, size, size)."""
    x = TF.to_dtype(TF.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)
    x = TF.center_crop(TF.resize(x, [size], TF.InterpolationMode.BICUBIC, antialias=True), [size, size])
    return TF.normalize(x, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))


# ----------------------------------------------------------------------------------------------------------- statistics


def mean_interval(values) -> tuple[float, float, float]:
    """Mean of n values and its 95 % bootstrap interval (percentiles, 9,999 resamples, seeded); both ends are the mean where
    all values are equal or n is 1."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return (x.mean(),) * 3
    low, high = scipy.stats.bootstrap((x,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return x.mean(), float(low), float(high)


def win_rate(a, b) -> dict[str, float]:
    """How often a exceeds b, for n pairs: n, wins, losses, ties; share of wins and of losses among all n with the wins' 95 %
    Wilson interval; and the two-sided binomial p of wins against losses, ties left out."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    n, wins, losses = len(a), int((a > b).sum()), int((a < b).sum())
    interval = scipy.stats.binomtest(wins, n).proportion_ci(method="wilson")
    p = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    counts = {"n": n, "wins": wins, "losses": losses, "ties": n - wins - losses}
    return counts | {
        "win_rate": wins / n,
        "loss_rate": losses / n,
        "low": interval.low,
        "high": interval.high,
        "p": float(p),
    }


# -------------------------------------------------------------------------------------------------------------- scoring


# Copied from hasty_sample.is_whole
def is_whole(path: Path) -> bool:
    """Whether the file is there and ends as a PNG does."""
    try:
        with open(path, "rb") as f:
            f.seek(-12, os.SEEK_END)
            return f.read() == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    except OSError:
        return False


# Copied from hasty_sample.read_record
def read_record(path: Path) -> dict | None:
    """The settings inside a finished PNG of ours; None for a file that is missing, cut short or of other origin."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info["dipo"]) if is_whole(path) else None
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def score_folder(s: Settings, folder: Path, scorers: dict) -> pd.DataFrame:
    """scores.csv of a folder: file, prompt, seed and a column for each scorer, a row for each image, written batch by batch.
    Rows of images that are there already with all these columns and the same prompt are kept."""
    path = folder / "scores.csv"
    records = {p.name: r for p in sorted(folder.glob("[0-9]" * 5 + "*.png")) if (r := read_record(p))}
    if not records:
        raise UserError(f"--score-only {folder}: no image with its prompt inside; make some with hasty_sample.py")
    columns = ["file", "prompt", "seed", *scorers, "scored_by"]
    by = json.dumps({"pickscore": s.pickscore, "hpsv2": f"{s.hpsv2} {s.hpsv2_version}", "clip": s.clip})
    rows = {}
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            table = pd.read_csv(path, dtype={"file": str, "prompt": str}, keep_default_na=False)
            if list(table.columns) == columns:
                rows = {r["file"]: r for r in table.to_dict("records")}
    current = {name: r for name, r in rows.items() if name in records and r["scored_by"] == by}
    rows = {name: r for name, r in current.items() if r["prompt"] == records[name]["prompt"]}
    todo = [name for name in records if name not in rows]
    for start in tqdm(range(0, len(todo), s.batch_size), desc=f"scoring {folder}", disable=not todo):
        names = todo[start : start + s.batch_size]
        prompts = [records[n]["prompt"] for n in names]
        images = [Image.open(folder / n) for n in names]
        scores = {k: score(images, prompts).tolist() for k, score in scorers.items()}
        for i, name in enumerate(names):
            figures = {k: v[i] for k, v in scores.items()}
            rows[name] = {"file": name, "prompt": prompts[i], "seed": records[name]["seed"]} | figures | {"scored_by": by}
        table = pd.DataFrame([rows[n] for n in records if n in rows], columns=columns)
        table.to_csv(folder / ".scores.csv.part", index=False)
        os.replace(folder / ".scores.csv.part", path)
    return pd.DataFrame([rows[n] for n in records], columns=columns)


def compare(s: Settings) -> None:
    """Score the folders and print their means, and win rates where there are two."""
    if s.demo:
        default = Settings()
        s = replace(s, **{k: v for k, v in DEMO_JUDGES.items() if getattr(s, k) == getattr(default, k)})
    check_settings(s)
    quiet_libraries()
    device = pick_device(s.device)
    dtype = DTYPES[s.dtype if s.dtype != "auto" else "fp32" if device.type == "cpu" else "fp16"]
    scorers = {"pickscore": load_pickscore(s, device, dtype), "hpsv2": load_hpsv2(s, device, dtype)}
    if s.clip:
        scorers["clipscore"] = load_clipscore(s, device, dtype)
    tables = {folder: score_folder(s, find_path(folder), scorers) for folder in s.score_only}
    for folder, table in tables.items():
        for name in scorers:
            mean, low, high = mean_interval(table[name])
            print(f"{folder}: {name} {mean:.4f} ({low:.4f} to {high:.4f}), n = {len(table)}")
    if len(tables) == 2:
        a, b = s.score_only
        both = tables[a].merge(tables[b], on=["prompt", "seed"])
        for name in scorers if len(both) else ():
            r = win_rate(both[f"{name}_x"], both[f"{name}_y"])
            print(
                f"{name}: {a} wins {100 * r['win_rate']:.1f} % ({100 * r['low']:.1f} to {100 * r['high']:.1f}), {b} wins "
                f"{100 * r['loss_rate']:.1f} %, {r['ties']} ties, n = {r['n']} pairs of prompt and seed, p = {r['p']:.2g}"
            )


# ----------------------------------------------------------------------------------------------------------------- main


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
            print("error:", " ".join(re.sub(r"[^\x20-\x7e]+", " ", said.getvalue()).split()), file=sys.stderr)
        raise


def main() -> None:
    s = parse_settings(Settings, __doc__)
    try:
        compare(s)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; scores so far are kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
