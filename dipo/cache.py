"""The cache of encoded pairs: parquet shards, each with the position in the data, and cache.json about all of them."""

import contextlib
import functools
import json
from pathlib import Path

import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from tqdm import tqdm

from dipo.cli import UserError
from dipo.devices import claimed
from dipo.files import writable_folder, write_text, written_whole
from dipo.pairs import Pairs, make_loader, random_draws, read_pair, stream
from dipo.training import CACHED, encode_captions, encode_pictures, picture_size

CACHE_SHARD = 256


def read_note(cache_dir: str) -> dict:
    """What cache.json says; empty without a cache."""
    try:
        return json.loads((Path(cache_dir).expanduser() / "cache.json").read_text()) if cache_dir else {}
    except (OSError, ValueError):
        return {}


def open_pairs(s, rows, pipe: DiffusionPipeline, accelerator: Accelerator) -> tuple[Pairs, dict]:
    """This process's pairs, of the cache (filled first, where that is to be done) or of rows themselves, and how many of the
    cache's were left out, by reason."""
    resolution = picture_size(s, pipe)
    side = resolution // pipe.vae_scale_factor
    draws = functools.partial(
        random_draws,
        latent_shape=(pipe.unet.config.in_channels, side, side),
        train_timesteps=pipe.scheduler.config.num_train_timesteps,
        caption_dropout=s.caption_dropout,
    )
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    if not s.cache_dir:
        read = functools.partial(read_pair, resolution=resolution)
        return Pairs(rows, read, draws, s.seed, s.shuffle_buffer, limit=s.max_train_pairs, **place), {}
    note = filled(s, rows, pipe, accelerator, resolution)
    rows = stream(sorted(Path(s.cache_dir).expanduser().glob("*.parquet")))
    read = functools.partial(read_cached, shapes=note["shapes"], dtype=pipe.vae.dtype)
    left_out = {k: note["counts"][k] for k in ("ties", "unreadable")}
    return Pairs(rows, read, draws, s.seed, s.shuffle_buffer, **place), left_out


def read_cached(row: dict, shapes: dict[str, list[int]], dtype: torch.dtype) -> dict:
    """A row of the cache as tensors of the given shapes."""
    return {k: torch.frombuffer(bytearray(row[k]), dtype=dtype).reshape(shape) for k, shape in shapes.items()}


def filled(s, rows, pipe: DiffusionPipeline, accelerator: Accelerator, resolution: int) -> dict:
    """Encode every usable pair once, on all processes. Returns what cache.json then holds. Raises UserError for a cache of
    other data, models or settings, and for one that another run is filling. A finished one is read only, by any number."""
    with contextlib.ExitStack() as stack:
        if not broadcast_object_list([read_note(s.cache_dir).get("complete")])[0]:
            folder = writable_folder(s.cache_dir, "cache-dir")
            stack.enter_context(claimed(folder, accelerator, "cache-dir"))
        note = agreed_note(s, pipe, accelerator, resolution)
        if note.get("complete"):
            return note
        counts, shapes = encode_all(s, rows, pipe, accelerator, resolution)
        totals = accelerator.reduce(torch.tensor(list(counts.values()), device=accelerator.device), "sum").tolist()
        counts = dict(zip(counts, totals, strict=True))
        if not counts["pairs"]:
            raise UserError(f"--dataset {s.dataset}: no usable pair in it ({counts['ties']} ties)")
        note |= {"complete": True, "shapes": shapes, "counts": counts}
        if accelerator.is_main_process:
            write_text(folder / "cache.json", json.dumps(note))
        accelerator.wait_for_everyone()
    return note


def agreed_note(s, pipe: DiffusionPipeline, accelerator: Accelerator, resolution: int) -> dict:
    """What cache.json says, written first where it is not there; UserError where this run is another."""
    wanted = {k: getattr(s, k) for k in ("dataset", "base_model", "vae", "max_train_pairs")}
    wanted |= {"resolution": resolution, "dtype": str(pipe.vae.dtype)}
    world = accelerator.num_processes
    if accelerator.is_main_process and not read_note(s.cache_dir):
        write_text(Path(s.cache_dir).expanduser() / "cache.json", json.dumps(wanted | {"processes": world}))
    accelerator.wait_for_everyone()
    note = read_note(s.cache_dir)
    for key, value in wanted.items():
        if note.get(key) != value:
            raise UserError(f"--cache-dir {s.cache_dir}: made with {key} {note.get(key)!r}, not {value!r}; give another")
    if not note.get("complete") and note["processes"] != world:
        raise UserError(f"--cache-dir {s.cache_dir}: begun by {note['processes']} processes; finish it so, or give another")
    return note


def encode_all(s, rows, pipe: DiffusionPipeline, accelerator: Accelerator, resolution: int) -> tuple[dict, dict]:
    """Write this process's share in shards of CACHE_SHARD pairs, going on behind the last whole one. Returns how many pairs
    were encoded and left out, and the shapes of what a pair's row holds."""
    folder, rank = Path(s.cache_dir).expanduser(), accelerator.process_index
    read = functools.partial(read_pair, resolution=resolution)
    place = {"rank": rank, "world": accelerator.num_processes, "limit": s.max_train_pairs}
    pairs = Pairs(rows, read, lambda key: {}, s.seed, shuffle_buffer=1, epochs=1, **place)
    loader = make_loader(pairs, 8, 0, torch.device("cpu"))
    shards = sorted(folder.glob(f"{rank:04d}-*.parquet"))
    counts, shapes, done = {"pairs": 0, "ties": 0, "unreadable": 0}, None, []
    if shards:
        saved = json.loads(pyarrow.parquet.read_schema(shards[-1]).metadata[b"dipo"])
        loader.load_state_dict(saved["loader"])
        counts, shapes = saved["counts"], saved["shapes"]
    number = len(shards)
    hidden = not accelerator.is_main_process
    bar = tqdm(desc="encoding", unit="pair", initial=counts["pairs"], total=s.max_train_pairs, disable=hidden)
    for batch in loader:
        encoded, shapes = encode_batch(pipe, batch)
        done += encoded
        counts["pairs"] += len(encoded)
        counts["ties"] += int(batch["ties"].sum())
        counts["unreadable"] += int(batch["unreadable"].sum())
        bar.update(len(encoded))
        if len(done) >= CACHE_SHARD:
            write_shard(folder / f"{rank:04d}-{number:06d}.parquet", done, loader.state_dict(), counts, shapes)
            number, done = number + 1, []
    if done:
        write_shard(folder / f"{rank:04d}-{number:06d}.parquet", done, loader.state_dict(), counts, shapes)
    bar.close()
    return counts, shapes


def encode_batch(pipe: DiffusionPipeline, batch: dict) -> tuple[list[dict], dict[str, list[int]]]:
    """A row of bytes for each of B pairs, all in the VAE's dtype, and the shapes of what it holds."""
    pixels = batch["pixels"]
    moments = encode_pictures(pipe.vae, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).cpu()
    text = (x.to(moments.dtype).cpu() for x in encode_captions(pipe, batch["caption"]))
    # SD 1.5 and 2.1 have no pooled embeddings, the last of the columns.
    columns = dict(zip(CACHED, (moments, *text), strict=False))
    # The bytes of bf16, which numpy does not have.
    as_bytes = {k: [row.contiguous().view(torch.uint8).numpy().tobytes() for row in x] for k, x in columns.items()}
    rows = [dict(zip(columns, row, strict=True)) | {"label_0": 1.0} for row in zip(*as_bytes.values(), strict=True)]
    return rows, {k: list(x.shape[1:]) for k, x in columns.items()}


def write_shard(path: Path, rows: list[dict], loader_state: dict, counts: dict, shapes: dict) -> None:
    """A shard, and where in the data it ends."""
    record = json.dumps({"loader": loader_state, "counts": counts, "shapes": shapes})
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({b"dipo": record})
    with written_whole(path) as part:
        pyarrow.parquet.write_table(table, part)
