"""Winner and loser by a judge instead of the data set's labels, scored once in the cache's folder; a killed run goes on."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from PIL import Image
from tqdm import tqdm

from dipo.cache import read_note
from dipo.cli import UserError
from dipo.devices import DTYPES, claimed, dtype_for
from dipo.files import fingerprint, writable_folder, write_text
from dipo.judges import Judge, judge_of
from dipo.pairs import check_usable, stored
from dipo.pictures import UNREADABLE, open_picture
from dipo.schemas import content_key, group_of, layout, open_dataset, ordered, pairs_in, pairs_of, ranks_of
from dipo.stats import win_rate

# Rows of data in a file of scores, pictures that are scored together.
ROWS = 64
BATCH = 16


def open_data(s, accelerator: Accelerator) -> tuple:
    """The data set's rows and what finds the pairs in one, as dipo.schemas.pairs_of says, both None where the cache has all
    of them. With --relabel its judge decides every pair, also of those that have no label or are ties, which the reference
    trainer's --choice_model leaves out. UserError where no pair can be used."""
    if read_note(s.cache_dir).get("complete"):
        return None, None
    rows = open_dataset(s.dataset, s.dataset_split)
    if s.relabel:
        schema = layout(rows, s.dataset, s.dataset_split)
        files = scored(s, rows, partial(group_of, schema=schema), accelerator)
        tell(s, files, accelerator)
        judged = {"scores": scores_of(records_in(files)), "margin": s.relabel_margin}
        find = partial(pairs_in, schema=schema, ranked_pairs=s.ranked_pairs, **judged)
    else:
        find = pairs_of(rows, s.dataset, s.dataset_split, s.ranked_pairs)
    check_usable(rows, find, s.dataset)
    return rows, find


def scored(s, rows, group, accelerator: Accelerator) -> list[Path]:
    """Files of records, one for each row: the keys of its pictures, their scores (None: cannot be read) and the ranks by the
    labels. With max_train_pairs of as many rows as it takes. group: maps a row to caption, pictures and ranks."""
    judge, dtype = judge_of(s, s.relabel), dtype_for("auto", accelerator.device)
    by = [judge.name, judge.source, fingerprint(*judge.weights), dtype, s.dataset, s.dataset_split]
    cache = writable_folder(s.cache_dir, "cache-dir")
    folder = cache / "scores" / hashlib.sha256(json.dumps(by).encode()).hexdigest()[:12]
    with claimed(cache, accelerator, "cache-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        score = partial(score_groups, judge=judge, dtype=DTYPES[dtype], device=accelerator.device)
        score_all(s, rows, group, score, accelerator, folder)
        accelerator.wait_for_everyone()
    judge.model = None
    clear_device_cache(garbage_collection=True)
    return sorted(folder.glob("*.json"))


def score_all(s, rows, group, score, accelerator: Accelerator, folder: Path) -> None:
    """Write the files of scores that are not there yet, each of ROWS rows in the data's order, with the position behind
    them; number k by process k % world, so that any number of processes goes on."""
    rank, world = accelerator.process_index, accelerator.num_processes
    rows, path = rows.shard(1, 0), lambda k: folder / f"{k:06d}.json"
    whole = list(itertools.takewhile(Path.exists, map(path, itertools.count())))
    known, found, begun = scores_of(records_in(whole)), count_pairs(s, whole), len(whole)
    if whole:
        rows.load_state_dict(json.loads(whole[-1].read_text())["position"])
    # Every process has to have looked before the first one writes.
    accelerator.wait_for_everyone()
    stream = iter(rows)
    with tqdm(desc=f"scoring by {s.relabel}", unit="picture", disable=rank > 0) as bar:
        for k in itertools.count(begun):
            if s.max_train_pairs and k % world == 0:
                accelerator.wait_for_everyone()
                found += count_pairs(s, [path(j) for j in range(max(begun, k - world), k)])
                if found >= s.max_train_pairs:
                    return
            part = list(itertools.islice(stream, ROWS))
            if part and k % world == rank and not path(k).exists():
                file = {"records": score([group(row) for row in part], known, bar), "position": rows.state_dict()}
                write_text(path(k), json.dumps(file))
            if len(part) < ROWS:
                return


def score_groups(groups: list[tuple], known: dict, bar: tqdm, judge: Judge, dtype, device) -> list[dict]:
    """The records of groups, after known has got the scores that it lacks."""
    judge.ready(dtype, device)
    records = [{"keys": [content_key(p, caption) for p in pictures], "ranks": ranks} for caption, pictures, ranks in groups]
    named = zip(records, groups, strict=True)
    items = {k: (p, caption) for x, (caption, pictures, _) in named for k, p in zip(x["keys"], pictures, strict=True)}
    todo = [k for k in items if k not in known]
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(todo), BATCH):
            batch = todo[i : i + BATCH]
            images = dict(zip(batch, pool.map(read_image, [items[k][0] for k in batch]), strict=True))
            there = [k for k in batch if images[k]]
            values = judge([images[k] for k in there], [items[k][1] for k in there]).tolist() if there else []
            known |= dict.fromkeys(batch)
            known |= {k: x for k, x in zip(there, values, strict=True) if math.isfinite(x)}
            bar.update(len(batch))
    return [x | {"scores": [known[k] for k in x["keys"]]} for x in records]


def read_image(picture) -> Image.Image | None:
    """A whole picture in RGB, None where it cannot be read."""
    try:
        return open_picture(stored(picture))
    except UNREADABLE:
        return None


def records_in(files: list[Path]) -> Iterator[dict]:
    for path in files:
        yield from json.loads(path.read_text())["records"]


def scores_of(records: Iterable[dict]) -> dict[str, float | None]:
    return {k: score for x in records for k, score in zip(x["keys"], x["scores"], strict=True)}


def count_pairs(s, files: list[Path]) -> int:
    return sum(len(ordered(ranks_of(x["scores"]), s.ranked_pairs, s.relabel_margin)[0]) for x in records_in(files))


def tell(s, files: list[Path], accelerator: Accelerator) -> None:
    """Print how often the judge agrees with the labels, and what the margin drops. UserError where it drops everything."""
    labelled, gaps = [], []
    for x in records_in(files):
        scores, ranks, judged = x["scores"], x["ranks"], ranks_of(x["scores"])
        gaps += [judged[j] - judged[i] for i, j in ordered(judged, s.ranked_pairs)[0] if scores[j] is not None]
        both = [(scores[i], scores[j]) for i, j in ordered(ranks, s.ranked_pairs)[0]]
        labelled += [pair for pair in both if None not in pair]
    close = sum(gap < s.relabel_margin for gap in gaps)
    if gaps and close == len(gaps):
        most = f"all {close} pairs of {s.dataset} differ by less in {s.relabel}, at most by {max(gaps):.4g}"
        raise UserError(f"--relabel-margin {s.relabel_margin:g}: {most}; use a smaller one")
    if labelled:
        agreed = win_rate(*zip(*labelled, strict=True))
        rate, low, high = (100 * agreed[k] for k in ("win_rate", "low", "high"))
        share = f"{rate:.1f} % (95 % interval {low:.1f} to {high:.1f})"
        accelerator.print(f"{s.relabel} agrees with the data set's labels in {share} of {len(labelled)} pairs")
    dropped = f", {close} of them closer than --relabel-margin {s.relabel_margin:g} and left out" * (s.relabel_margin > 0)
    accelerator.print(f"{s.relabel} decides {len(gaps)} pairs{dropped}")
