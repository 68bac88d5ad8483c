"""Preference pairs as a stream that goes on exactly where it was: pictures, captions and what is random about a visit."""

import collections
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate

from dipo.cli import UserError, first_line
from dipo.pictures import UNREADABLE, open_picture

# Where a block of a lane begins: as many pairs lie before it in this epoch (first) and in all.
START = {"epoch": 0, "block": 0, "first": 0, "before": 0, "rows": None}


def quiet_data() -> None:
    """No loading bars of what reads, and no advice."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()


def check_usable(rows: datasets.IterableDataset, pairs_of, name: str) -> None:
    """UserError unless at least one pair has two pictures that can be read."""
    why = "all are ties"
    for pair in (pair for row in rows for pair in pairs_of(row)[0]):
        try:
            read_pixels(pair, 8)
            return
        except UNREADABLE as e:
            why = f"all are ties or unreadable, one for {first_line(e)}"
    raise UserError(f"--dataset {name}: no usable pair in it; {why}")


def stored(picture: bytes | dict | str) -> bytes:
    """The bytes of a picture that dipo.schemas.pairs_of names, out of its file where it is in one."""
    if isinstance(picture, dict) and picture["bytes"] is None:
        with fsspec.open(picture["path"]) as f:
            return f.read()
    if isinstance(picture, str):
        return Path(picture).read_bytes()
    return picture["bytes"] if isinstance(picture, dict) else picture


def next_row(stream) -> dict | None:
    """The next row, None at the end; UserError for files that are damaged there."""
    try:
        return next(stream, None)
    except Exception as e:
        said = first_line(e)[:200]
        raise UserError(f"--dataset: a file of it is damaged ({said}); fetch it again, and go on with --resume") from e


def read_pixels(pair: dict, resolution: int) -> np.ndarray:
    """A pair's pictures, resized and centre-cropped: uint8 (2, resolution, resolution, 3). Raises what Pillow raises."""
    pictures = (open_picture(stored(pair[k])) for k in ("winner", "loser"))
    return np.stack([ImageOps.fit(x, (resolution, resolution), Image.Resampling.BILINEAR) for x in pictures])


def read_pair(pair: dict, resolution: int) -> dict | None:
    """A pair as {"pixels": uint8 (2, resolution, resolution, 3), winner first, "caption": str}; None where unreadable."""
    try:
        pixels = read_pixels(pair, resolution)
    except UNREADABLE:
        return None
    return {"pixels": torch.from_numpy(pixels), "caption": pair["caption"]}


def random_draws(
    key: tuple[int, ...], latent_shape: tuple[int, ...], train_timesteps: int, caption_dropout: float, flip: bool = False
) -> dict:
    """What is random about one visit to one pair, from a seed of its own, whatever the batch and the process: timestep (),
    noise latent_shape, posterior_noise (2, *latent_shape), drop_caption (), and with flip mirrored (), both pictures'."""
    g = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    draws = {
        "timestep": torch.randint(train_timesteps, (), generator=g),
        "drop_caption": torch.rand((), generator=g) < caption_dropout,
        "noise": torch.randn(latent_shape, generator=g),
        "posterior_noise": torch.randn((2, *latent_shape), generator=g),
    }
    # The last draw, so that the others are what they are without it.
    return draws | {"mirrored": torch.rand((), generator=g) < 0.5} if flip else draws


# Pairs of a lane that are shuffled among each other, where they begin, and the ties between them.
Block = collections.namedtuple("Block", ("pairs", "lane", "start", "ties"))


class Pairs:
    """The order of the pairs, without end, and what one of several processes reads of it.

    The order follows from data, seed, shuffle_buffer and limit alone. Pair number i comes from lane i % count; a lane has
    every count-th of the files and streams them epoch after epoch, shuffled block by block. Process r of world reads the
    pairs with i % world == r, so that a batch of all processes is a run of successive pairs.

    position is JSON: how many pairs lie behind, the count of lanes, the size of a block, and for the lanes that this process
    needs where their last block began. On resuming that one is read again. (datasets' own shuffle buffer would be lost.)

    rows: a stream. pairs_of: maps a row to its pairs and the number of its ties. read: maps a pair to an item, None where it
    cannot be read. draws: maps a key of whole numbers to the item's random part. limit: use the first so many pairs only.
    """

    def __init__(self, rows, pairs_of, read, draws, seed, shuffle_buffer, rank=0, world=1, limit=None):
        self.rows, self.pairs_of, self.read, self.draws = rows, pairs_of, read, draws
        self.seed, self.shuffle_buffer, self.rank, self.world, self.limit = seed, shuffle_buffer, rank, world, limit
        files = rows.num_shards if limit is None else 1
        # Lanes of as many files each, within an eighth: one with half the files would show each of its pairs twice as often.
        count = max(n for n in (1, 2, 4, 8) if files % n == 0 or files >= 8 * n)
        self.position = {"pairs": 0, "count": count, "size": max(16, shuffle_buffer // count), "lanes": {}}

    def load(self, positions: list[dict]) -> None:
        """Go on from what the processes of a run left, in their order, however many they were."""
        positions = positions if "lanes" in positions[0] else [self.old_position(positions)]
        self.position = positions[0] | {"lanes": {k: v for x in positions for k, v in x["lanes"].items()}}

    def old_position(self, states: list[dict]) -> dict:
        """What an older version left: the state of torchdata's StatefulDataLoader, of one process without data workers."""
        if len(states) > 1 or "dataset_state" not in states[0]:
            raise UserError("--resume: several processes or data workers of an older version left this; start anew")
        old = states[0]["dataset_state"]
        lane = {k: old[k] for k in START} | {"before": -old["next"]}
        return {"pairs": 0, "count": 1, "size": self.shuffle_buffer, "lanes": {"0": lane}}

    def batches(self, size: int):
        """For each batch: what this process has to read, as item's arguments; the ties passed, each on one process; the
        position behind it."""
        at, count = self.position["pairs"], self.position["count"]
        shared = math.gcd(self.world, count)
        starts = {n: self.position["lanes"].get(str(n), START) for n in range(self.rank % shared, count, shared)}
        lanes = {n: self.lane(n, start, len(range(n, at, count)) - start["before"]) for n, start in starts.items()}
        while True:
            visits, ties = [], 0
            for i in range(at, at + size * self.world):
                if (n := i % count) in lanes:
                    block, place = next(lanes[n])
                    starts[n] = block.start
                    ties += block.ties if place == 0 and self.rank < shared else 0
                    visits += [(block, place)] if i % self.world == self.rank else []
            at += size * self.world
            yield visits, ties, self.position | {"pairs": at, "lanes": {str(n): start for n, start in starts.items()}}

    def lane(self, n: int, at: dict, place: int):
        """The pairs of lane n from a place in the block that begins at a position on, each as this block and its place."""
        rows, ties = self.rows.shard(self.position["count"], n, contiguous=False), 0
        while True:
            rows.set_epoch(at["epoch"])
            if at["rows"]:
                rows.load_state_dict(at["rows"])
            stream = iter(rows)
            while (block := self.read_block(stream, n, at, ties)).pairs:
                for k in range(place, len(block.pairs)):
                    yield block, k
                first, before = (at[k] + len(block.pairs) for k in ("first", "before"))
                at = at | {"block": at["block"] + 1, "first": first, "before": before, "rows": rows.state_dict()}
                place = ties = 0
            if not at["first"]:
                each = f"file {n + 1} of each {self.position['count']}"
                raise UserError(f"--dataset: no pair with a winner in {each}; leave these files out")
            at, ties = at | {"epoch": at["epoch"] + 1, "block": 0, "first": 0, "rows": None}, block.ties

    def read_block(self, stream, n: int, at: dict, ties: int) -> Block:
        """The pairs of the next rows, none at the end of an epoch, and the ties between them besides those before."""
        pairs, left = [], (self.limit or sys.maxsize) - at["first"]
        while len(pairs) < min(self.position["size"], left) and (row := next_row(stream)) is not None:
            more, tied = self.pairs_of(row)
            pairs, ties = pairs + more, ties + tied
        pairs = pairs[:left]
        order = np.random.default_rng([self.seed, at["epoch"], 0, at["block"]]).permutation(len(pairs))
        return Block([pairs[k] for k in order] if self.shuffle_buffer > 1 else pairs, n, at, ties)

    def item(self, block: Block, place: int) -> dict:
        """A pair with its random part. Where it cannot be read, which unreadable counts, the one before it in the block
        takes its place, so that the others keep theirs."""
        key = (self.seed, block.start["epoch"], block.lane, 0, block.start["first"] + place)
        for k in range(len(block.pairs)):
            if (item := self.read(block.pairs[place - k])) is not None:
                return item | self.draws(key) | {"unreadable": int(k > 0)}
        raise UserError(f"--dataset: no picture can be read in {len(block.pairs)} pairs in a row")


def make_loader(pairs: Pairs, batch_size: int, num_workers: int | None, device: torch.device):
    """Batches of pairs without end, each with the position behind it, read ahead by threads, by default 4 on a GPU and none
    elsewhere, which end when it is closed."""
    cuda, plans = device.type == "cuda", pairs.batches(batch_size)
    threads = num_workers if num_workers is not None else 4 * cuda

    def collate(items: list[dict], ties: int) -> dict:
        batch = default_collate(items) | {"ties": torch.tensor(ties)}
        # Here and not in a thread, which would open the first GPU in every process.
        return {k: x.pin_memory() if cuda and isinstance(x, torch.Tensor) else x for k, x in batch.items()}

    if not threads:
        yield from ((collate([pairs.item(*x) for x in visits], ties), position) for visits, ties, position in plans)
    reader, pool = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)

    def begin() -> tuple[list, int, dict]:
        visits, ties, position = next(plans)
        return [pool.submit(pairs.item, *x) for x in visits], ties, position

    try:
        ahead = collections.deque(reader.submit(begin) for _ in range(1 + 2 * threads // batch_size))
        while True:
            items, ties, position = ahead.popleft().result()
            ahead.append(reader.submit(begin))
            yield collate([x.result() for x in items], ties), position
    finally:
        reader.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)
