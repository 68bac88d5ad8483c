"""The cache of encoded pairs: parquet shards, each with the position in the data, and cache.json about all of them."""

import contextlib
import functools
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from torch.utils.data import default_collate
from tqdm import tqdm

from dipo.checkpoints import ONLY_SETTINGS
from dipo.cli import UserError
from dipo.devices import claimed
from dipo.files import writable_folder, write_text, written_whole
from dipo.judges import judge_of
from dipo.pairs import Pairs, random_draws, read_pair
from dipo.training import CACHED, encode_captions, encode_pictures, picture_size

CACHE_SHARD = 256


def read_note(cache_dir: str) -> dict:
    """What cache.json says; empty without a cache."""
    try:
        return json.loads((Path(cache_dir).expanduser() / "cache.json").read_text()) if cache_dir else {}
    except (OSError, ValueError):
        return {}


def open_pairs(s, rows, find, pipe: DiffusionPipeline, accelerator: Accelerator) -> tuple[Pairs, dict]:
    """This process's pairs, of the cache (filled first, where that is to be done) or of rows themselves, and how many of the
    cache's were left out, by reason. find: dipo.schemas.pairs_of's."""
    resolution = picture_size(s, pipe)
    side, steps = resolution // pipe.vae_scale_factor, pipe.scheduler.config.num_train_timesteps
    latent_shape = (pipe.unet.config.in_channels, side, side)

    def draws(key: tuple[int, ...]) -> dict:
        return random_draws(key, latent_shape, steps, s.caption_dropout, s.flip)

    read, limit, left_out = functools.partial(read_pair, resolution=resolution), s.max_train_pairs, {}
    if s.cache_dir:
        note = filled(s, rows, find, pipe, accelerator, resolution)
        files = sorted(str(path) for path in Path(s.cache_dir).expanduser().glob("*.parquet"))
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        find, read = lambda row: ([row], 0), functools.partial(read_cached, shapes=note["shapes"], dtype=pipe.vae.dtype)
        limit, left_out = None, {k: note["counts"][k] for k in ("ties", "unreadable")}
    rank, world = accelerator.process_index, accelerator.num_processes
    return Pairs(rows, find, read, draws, s.seed, s.shuffle_buffer, rank, world, limit), left_out


def read_cached(row: dict, shapes: dict[str, list[int]], dtype: torch.dtype) -> dict:
    """A row of the cache as tensors of the given shapes."""
    return {k: torch.frombuffer(bytearray(row[k]), dtype=dtype).reshape(shape) for k, shape in shapes.items()}


def filled(s, rows, find, pipe: DiffusionPipeline, accelerator: Accelerator, resolution: int) -> dict:
    """Encode every usable pair once, on all processes. Returns what cache.json then holds. Raises UserError for a cache of
    other data, models or settings, and for one that another run is filling. A finished one is read only, by any number."""
    with contextlib.ExitStack() as stack:
        if not broadcast_object_list([read_note(s.cache_dir).get("complete")])[0]:
            folder = writable_folder(s.cache_dir, "cache-dir")
            stack.enter_context(claimed(folder, accelerator, "cache-dir"))
        note = agreed_note(s, pipe, accelerator, resolution)
        if note.get("complete"):
            return note
        encode_all(s, rows, find, pipe, accelerator, resolution)
        accelerator.wait_for_everyone()
        records = [shard_record(path) for path in folder.glob("*.parquet")]
        counts = {k: sum(x["counts"][k] for x in records) for k in ("pairs", "ties", "unreadable")}
        if not counts["pairs"]:
            raise UserError(f"--dataset {s.dataset}: no usable pair in it ({counts['ties']} ties)")
        note |= {"complete": True, "shapes": next(x["shapes"] for x in records if x["shapes"]), "counts": counts}
        if accelerator.is_main_process:
            write_text(folder / "cache.json", json.dumps(note))
        accelerator.wait_for_everyone()
    return note


def agreed_note(s, pipe: DiffusionPipeline, accelerator: Accelerator, resolution: int) -> dict:
    """What cache.json says, written first where it is not there; UserError where this run is another."""
    wanted = {k: getattr(s, k) for k in ("dataset", "base_model", "vae", "max_train_pairs", *ONLY_SETTINGS)}
    wanted |= {"resolution": resolution, "dtype": str(pipe.vae.dtype)}
    wanted |= {"judge": judge_of(s, s.relabel).source} if s.relabel else {}
    if not read_note(s.cache_dir) and any(Path(s.cache_dir).expanduser().glob("*.parquet")):
        raise UserError(f"--cache-dir {s.cache_dir}: holds other parquet files; give an empty folder")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not read_note(s.cache_dir):
        write_text(Path(s.cache_dir).expanduser() / "cache.json", json.dumps(wanted))
    accelerator.wait_for_everyone()
    note = read_note(s.cache_dir)
    for key, value in wanted.items():
        if (old := note.get(key, ONLY_SETTINGS.get(key))) != value:
            what = f"made with {key} {old!r}, not {value!r}; use that, give another, or delete its cache.json and *.parquet"
            raise UserError(f"--cache-dir {s.cache_dir}: {what}" + " (the scores stay)" * bool(s.relabel))
    if "processes" in note and not note.get("complete"):
        raise UserError(f"--cache-dir {s.cache_dir}: an older version did not finish it; delete it, or give another")
    return note


def encode_all(s, rows, find, pipe: DiffusionPipeline, accelerator: Accelerator, resolution: int) -> None:
    """Write the shards of CACHE_SHARD pairs in the data's order that are not there yet, number k on process k % world, so
    that any number of processes goes on. Pairs that cannot be read are left out."""
    folder, rank = Path(s.cache_dir).expanduser(), accelerator.process_index
    limit = s.max_train_pairs or sys.maxsize  # with one the data are one lane
    pairs = Pairs(rows, find, None, None, s.seed, shuffle_buffer=1, limit=limit)
    read = functools.partial(read_pair, resolution=resolution)
    paths = (folder / f"{k:06d}.parquet" for k in itertools.count())
    if whole := list(itertools.takewhile(Path.exists, paths)):
        pairs.load([shard_record(whole[-1])["position"]])
    bar = tqdm(desc="encoding", unit="pair", initial=CACHE_SHARD * len(whole), total=s.max_train_pairs, disable=rank > 0)
    with bar, ThreadPoolExecutor() as pool:
        for k, (visits, _, position) in enumerate(pairs.batches(CACHE_SHARD), len(whole)):
            # What is left of one epoch: the stream has no end.
            visits = [(block, place) for block, place in visits if block.start["epoch"] == 0]
            path = folder / f"{k:06d}.parquet"
            if visits and k % accelerator.num_processes == rank and not path.exists():
                encoded, shapes = [], None
                for i in range(0, len(visits), 8):
                    items = pool.map(read, [block.pairs[place] for block, place in visits[i : i + 8]])
                    if items := [x for x in items if x is not None]:
                        more, shapes = encode_batch(pipe, default_collate(items), s.flip)
                        encoded += more
                counts = {"pairs": len(encoded), "unreadable": len(visits) - len(encoded)}
                counts["ties"] = sum(block.ties for block, place in visits if place == 0)
                write_shard(path, encoded, {"position": position, "counts": counts, "shapes": shapes})
            bar.update(len(visits))
            if len(visits) < CACHE_SHARD:
                return


def encode_batch(pipe: DiffusionPipeline, batch: dict, flip: bool) -> tuple[list[dict], dict[str, list[int]]]:
    """A row of bytes for each of B pairs, all in the VAE's dtype, and the shapes of what it holds. With flip the moments of
    the pictures as they are, and then of the mirrored ones: a mirrored picture's latents are not the latents mirrored."""
    pixels = batch["pixels"]
    pixels = torch.stack([pixels, pixels.flip(-2)], dim=1) if flip else pixels
    moments = encode_pictures(pipe.vae, pixels.flatten(0, -4)).unflatten(0, pixels.shape[:-3]).cpu()
    text = (x.to(moments.dtype).cpu() for x in encode_captions(pipe, batch["caption"]))
    # SD 1.5 and 2.1 have no pooled embeddings, the last of the columns.
    columns = dict(zip(CACHED, (moments, *text), strict=False))
    # The bytes of bf16, which numpy does not have.
    as_bytes = {k: [row.contiguous().view(torch.uint8).numpy().tobytes() for row in x] for k, x in columns.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*as_bytes.values(), strict=True)]
    return rows, {k: list(x.shape[1:]) for k, x in columns.items()}


def write_shard(path: Path, rows: list[dict], record: dict) -> None:
    """A shard, and with it what it counts and where in the data it ends."""
    schema = pyarrow.schema({k: pyarrow.binary() for k in CACHED}, {"dipo": json.dumps(record)})
    with written_whole(path) as part:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), part)


def shard_record(path: Path) -> dict:
    return json.loads(pyarrow.parquet.read_schema(path).metadata[b"dipo"])
