"""Files that are whole at any moment, PNGs with their settings inside, fingerprints of weights."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

from PIL import Image, PngImagePlugin

from dipo.cli import UserError, first_line
from dipo.pictures import UNREADABLE

ROOT = Path(__file__).resolve().parents[1]
# What diffusers and peft call a LoRA; peft's scale stands beside.
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
ADAPTER_CONFIG = "adapter_config.json"


def find_path(name: str) -> Path | None:
    """A file or folder given relative to the current folder or to the scripts'; None where neither exists."""
    try:
        for path in (Path(name).expanduser(), ROOT / name):
            if name and path.exists():
                return path
    except (OSError, RuntimeError):
        pass
    return None


def lora_and_strength(entry: str) -> tuple[str, float]:
    """What of a LoRA's name comes before ":0.8", and that number; 1.0 where there is none, and for a path that has a colon
    itself. Raises UserError for a strength that is no finite number."""
    name, colon, strength = entry.rpartition(":")
    if not colon or find_path(entry):
        return entry, 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--dpo-lora {entry}: {strength!r} is no number; a strength stands behind a colon, as in {name}:0.8")
    return name, value


def lora_names(entries: tuple[str, ...]) -> list[str]:
    """The LoRAs without their strengths, as a fingerprint takes them, with the file that holds peft's scale."""
    names = [lora_and_strength(entry)[0] for entry in entries]
    beside = {n: str(Path(n).with_name(ADAPTER_CONFIG)) for n in names if n.endswith(".safetensors")}
    return names + [config for n, config in beside.items() if Path(n).name == LORA_FILES[1] or find_path(config)]


def lora_file(folder: Path, name: str) -> Path:
    """The LoRA in a folder: the file that diffusers or peft writes, or the only .safetensors in it; UserError otherwise."""
    files = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    known = [files[name] for name in LORA_FILES if name in files]
    if not known and len(files) != 1:
        found = f"several LoRAs ({', '.join(list(files)[:3])}); name one" if files else f"no {' and no '.join(LORA_FILES)}"
        raise UserError(f"--dpo-lora {name}: holds {found}")
    return [*known, *files.values()][0]


@contextlib.contextmanager
def written_whole(path: Path):
    """The path to write a file or folder at; it gets its own name when that is done, so that what has the name is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        if part.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    except Exception:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_csv(path: Path, table) -> Path:
    """A DataFrame as a CSV in whose texts a spreadsheet finds no formula."""
    with written_whole(path) as part:
        table.map(lambda x: csv_text(x) if isinstance(x, str) else x).to_csv(part, index=False)
    return path


def csv_text(text: str) -> str:
    """Text for a cell of a CSV: with an apostrophe in front where a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def writable_folder(name: str, flag: str = "output-dir") -> Path:
    """The folder, made where it is not there; UserError where nothing can be written into it, and for no name."""
    if not name.strip():
        raise UserError(f"--{flag} is empty: give a folder")
    try:
        folder = Path(name).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--{flag} {name}: cannot be written to ({first_line(e)}); give another") from e
    return folder


def infotext(record: dict) -> str:
    """An image's settings in the form that AUTOMATIC1111's web UI writes into PNGs and reads back."""
    model = record["dpo_unet"] or record["base_model"]
    fields = {
        "Steps": record["num_inference_steps"],
        "Sampler": record.get("sampler", "DDIM"),
        "CFG scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": json.dumps(model) if re.search(r"[,:\n]", model) else model,
        "Eta DDIM": f"{record['eta']:g}",
        "Timestep spacing": record["timestep_spacing"],
        "Version": f"DIPO with diffusers {record['diffusers']}",
    }
    lines = [record["prompt"]]
    if record.get("dpo_lora"):
        fields["Lora"] = json.dumps(record["dpo_lora"])
    if record.get("timesteps"):
        fields["Timesteps"] = " ".join(map(str, record["timesteps"]))
    if record.get("guidance_interval"):
        fields["Guidance interval"] = "{:g}-{:g}".format(*record["guidance_interval"])
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in fields.items())])


def save_png(path: Path, image: Image.Image, record: dict) -> None:
    """Write a PNG with its settings: `parameters` for people and web UIs, `dipo` as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", infotext(record))
    info.add_text("dipo", json.dumps(record))
    with written_whole(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def is_whole(path: Path) -> bool:
    """Whether the file is there and ends as a PNG does."""
    try:
        with open(path, "rb") as f:
            f.seek(-12, os.SEEK_END)
            return f.read() == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    except OSError:
        return False


def read_record(path: Path) -> dict | None:
    """The settings inside a finished PNG of ours; None for a file that is missing, cut short or of other origin."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info["dipo"]) if is_whole(path) else None
    except UNREADABLE:
        return None


def finished_images(folder: Path, wanted: dict[str, dict], overwrite: bool) -> dict[str, dict]:
    """The records of those images that are in the folder and were made with the wanted settings, by file. UserError for a
    file of other origin, which would be lost, and for other settings unless overwrite replaces them."""
    done = {}
    for file, settings in wanted.items():
        record = read_record(folder / file)
        if record is None and is_whole(folder / file):
            raise UserError(f"{folder / file} was not made by this script and would be lost; choose another --output-dir")
        what = difference(record, settings) if record else None
        if what and not overwrite:
            raise UserError(f"{folder / file} was made with {what}; choose another --output-dir, or --overwrite replaces it")
        if record and not what:
            done[file] = record
    return done


def difference(record: dict, wanted: dict) -> str | None:
    """The first setting in which a finished image differs from the wanted one, in words; None if none does. A setting that
    is empty and one that an older version did not have are the same."""
    for key, value in wanted.items():
        old = record.get(key)
        if old != value and (old or value):
            return f"{key} {old!r}, this run has {value!r}"
    return None


def fingerprint(*names: str) -> str:
    """A short hash of the weights in model folders: names, sizes and last 64 KiB of files; of the hub the name alone."""
    digest = hashlib.sha256()
    for name in filter(None, names):
        path = find_path(name)
        if path is None:
            digest.update(name.encode())
            continue
        kinds = (".safetensors", ".pt", ".pth", ".bin")
        weights = (f for f in path.rglob("*.*") if f.suffix in kinds or f.name == ADAPTER_CONFIG)
        for file in [path] if path.is_file() else sorted(weights):
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}".encode())
            with open(file, "rb") as f:
                f.seek(max(0, file.stat().st_size - 65536))
                digest.update(f.read())
    return digest.hexdigest()[:12]
