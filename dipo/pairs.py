"""Preference pairs as a stream that goes on exactly where it was: pictures, captions and what is random about a visit."""

import copy
import io
import signal
import warnings
from pathlib import Path

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torchdata.stateful_dataloader import StatefulDataLoader

from dipo.cli import UserError


def quiet_data() -> None:
    """No loading bars of the libraries that read, and no advice."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*set_vital.*")


def stream(files: list) -> datasets.IterableDataset:
    return datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train", streaming=True)


def check_usable(rows: datasets.IterableDataset, pairs_of, name: str) -> None:
    """UserError unless at least one pair has two pictures that can be read."""
    if not any(read_pair(pair, 8) for row in rows for pair in pairs_of(row)[0]):
        raise UserError(f"--dataset {name}: no usable pair in it; all are ties or unreadable")


def read_picture(value: bytes | dict, resolution: int) -> np.ndarray:
    """An encoded picture, resized and centre-cropped: uint8 (resolution, resolution, 3). Raises what Pillow raises."""
    with Image.open(io.BytesIO(value["bytes"] if isinstance(value, dict) else value)) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.BILINEAR)
    return np.asarray(fitted)


def stored(picture: bytes | dict | str) -> bytes:
    """The bytes of a picture that dipo.schemas.pairs_of names, out of its file where it is in one."""
    if isinstance(picture, dict) and picture["bytes"] is None:
        with fsspec.open(picture["path"]) as f:
            return f.read()
    if isinstance(picture, str):
        return Path(picture).read_bytes()
    return picture["bytes"] if isinstance(picture, dict) else picture


def read_pair(pair: dict, resolution: int) -> dict | None:
    """A pair of dipo.schemas.pairs_of as {"pixels": uint8 (2, resolution, resolution, 3), the winner first, "caption": str};
    None where a picture cannot be read."""
    try:
        pixels = np.stack([read_picture(stored(pair[k]), resolution) for k in ("winner", "loser")])
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, Image.DecompressionBombError):
        return None
    return {"pixels": torch.from_numpy(pixels), "caption": pair["caption"]}


def random_draws(key: tuple[int, ...], latent_shape: tuple[int, ...], train_timesteps: int, caption_dropout: float) -> dict:
    """What is random about one visit to one pair, from a seed of its own, so that it depends neither on the batch nor on
    the process: timestep (), noise latent_shape, posterior_noise (2, *latent_shape), drop_caption ()."""
    g = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    return {
        "timestep": torch.randint(train_timesteps, (), generator=g),
        "drop_caption": torch.rand((), generator=g) < caption_dropout,
        "noise": torch.randn(latent_shape, generator=g),
        "posterior_noise": torch.randn((2, *latent_shape), generator=g),
    }


class Pairs(torch.utils.data.IterableDataset):
    """The pairs of one process, without end unless epochs says so, shuffled among blocks of shuffle_buffer usable pairs.

    Where the data set has at least as many files as there are processes, each reads its own files. Otherwise all read
    everything and take turns, so that any number of processes makes the same batches.

    state_dict is a position, as JSON: the data set's own state at the start of a block, and how far into the block. On
    resuming that one block is read again. (datasets' own shuffle buffer would lose its contents.)

    rows: a stream with label_0. read: maps a row to an item, None where it cannot be used. draws: maps a key of whole
    numbers to the item's random part. limit: use the first so many pairs only. Items carry ties and unreadable: how many of
    each were left out since the last one.
    """

    def __init__(self, rows, read, draws, seed, shuffle_buffer, rank=0, world=1, limit=None, epochs=None):
        self.read, self.draws, self.seed, self.shuffle_buffer = read, draws, seed, shuffle_buffer
        self.limit, self.epochs = limit, epochs
        own_files = limit is None and rows.num_shards >= world
        self.stream, self.turn, self.turns = (rank, 0, 1) if own_files else (0, rank, world)
        self.rows = rows.shard(world, rank, contiguous=False) if own_files and world > 1 else rows
        self.num_shards = self.rows.num_shards
        self.at = {"epoch": 0, "before": 0, "rows": None, "block": 0, "first": 0, "next": 0, "ties": 0, "unreadable": 0}

    def state_dict(self) -> dict:
        return copy.deepcopy(self.at)

    def load_state_dict(self, state: dict) -> None:
        self.at = copy.deepcopy(state)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, at = info.id if info else 0, self.at
        while self.epochs is None or at["epoch"] < self.epochs:
            used = at["first"] + at["next"] > 0
            for item in self.epoch(worker):
                used = True
                yield item
            if not used:
                return
            at["before"] += at["first"]
            at |= {"epoch": at["epoch"] + 1, "rows": None, "block": 0, "first": 0, "next": 0}

    def epoch(self, worker: int):
        """What is left of the epoch, block by block."""
        at = self.at
        self.rows.set_epoch(at["epoch"])
        if at["rows"] is not None:
            self.rows.load_state_dict(at["rows"])
        rows = iter(self.rows)
        while block := self.read_block(rows):
            order = np.random.default_rng([self.seed, at["epoch"], worker, at["block"]]).permutation(len(block))
            for j in range(at["next"], len(block)):
                at["next"] = j + 1
                if (at["before"] + at["first"] + j) % self.turns != self.turn:
                    continue
                item = self.read(block[order[j] if self.shuffle_buffer > 1 else j])
                if item is None:
                    at["unreadable"] += 1
                    continue
                item |= self.draws((self.seed, at["epoch"], self.stream, worker, at["first"] + j))
                item |= {"ties": at["ties"], "unreadable": at["unreadable"]}
                at["ties"] = at["unreadable"] = 0
                yield item
            first = at["first"] + len(block)
            at |= {"rows": self.rows.state_dict(), "block": at["block"] + 1, "first": first, "next": 0}

    def read_block(self, rows) -> list[dict]:
        """The next usable rows, at most as many as are shuffled together. The first process counts the ties between them,
        once for each block."""
        at, block, ties = self.at, [], 0
        room = self.shuffle_buffer if self.limit is None else min(self.shuffle_buffer, self.limit - at["first"])
        while len(block) < room and (row := next(rows, None)) is not None:
            if row["label_0"] in (0, 1):
                block.append(row)
            else:
                ties += 1
        if at["next"] == 0 and self.turn == 0:
            at["ties"] += ties
        return block


def start_worker(_: int) -> None:
    """Signals are the main process's business, also where a launcher sends them to all. Workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(pairs: Pairs, batch_size: int, num_workers: int | None, device: torch.device) -> StatefulDataLoader:
    """Batches of pairs, read by workers, by default 4 on a GPU and none elsewhere, and no more than the data have files."""
    cuda = device.type == "cuda"
    if num_workers is None:
        num_workers = 4 if cuda else 0
    workers = min(num_workers, pairs.num_shards if pairs.limit is None else 1)
    # Forked workers hang in threads that reading the data has started here before.
    more = {"worker_init_fn": start_worker, "multiprocessing_context": "spawn"} if workers else {}
    return StatefulDataLoader(pairs, batch_size=batch_size, num_workers=workers, pin_memory=cuda, **more)
