"""The first usable pairs of Pick-a-Pic, streamed into parquet files: a run that was stopped goes on, damage is made good."""

import contextlib
import functools
import json
import re
from pathlib import Path

from tqdm import tqdm

from dipo.checksums import DownloadError, File, damage, sha256
from dipo.files import write_text, written_whole
from dipo.hub import RepositoryError, Source, explain, repo_info

PAIRS_PER_FILE = 500
# 322 GB of training rows (the data set's card) over about 0.96 million of them.
BYTES_PER_PAIR = 340_000


def read_state(folder: Path) -> dict:
    """What earlier runs have of Pick-a-Pic: the commit, and of each whole file its pairs, its SHA-256 and the position in
    the stream behind it. Empty where that cannot be read."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        named = all(re.fullmatch(r"train-\d{5}\.parquet|test_unique\.parquet", file) for file in state["files"])
        if named and state["commit"] and all(x.keys() == {"pairs", "sha256", "position"} for x in state["files"].values()):
            return state
    return {"commit": None, "files": {}}


def pairs_in(state: dict) -> int:
    return sum(x["pairs"] for x in state["files"].values())


def read_pairs(rows, position: dict | None, wanted: int, bar: tqdm):
    """The next wanted rows of a stream behind a position that train_dipo.py can use, in lists of PAIRS_PER_FILE, each with
    the position behind it; fewer where the stream ends."""
    from dipo.pairs import read_pair

    if position:
        rows.load_state_dict(position)
    pairs, left_out = [], 0
    for row in rows:
        if row["label_0"] not in (0, 1) or read_pair(row, 8) is None:
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


def save_file(folder: Path, state: dict, file: str, rows: list[dict], features, position: dict | None) -> None:
    """Write rows as parquet and put the file on record: first the one, then the other, each whole at any moment."""
    import datasets

    with written_whole(folder / file) as part:
        datasets.Dataset.from_list(rows, features=features).to_parquet(part)
    pairs = len(rows) if position else 0
    state["files"][file] = {"pairs": pairs, "sha256": sha256(folder / file), "position": position}
    write_text(folder / "state.json", json.dumps(state))


def save_pairs(source: Source, folder: Path, wanted: int, revision: str) -> dict:
    """Stream the first wanted usable pairs into folder/train-00000.parquet and so on, and the captions of the test set into
    test_unique.parquet. Whole files of earlier runs are kept, damaged ones made again. Returns the state, as read_state.

    Raises RepositoryError for what is wrong with the data set, DownloadError for the disk and the connection."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = read_state(folder)
        if revision or not state["commit"]:
            commit = repo_info(source, revision or source.revision).sha
            if state["commit"] not in (None, commit):
                raise RepositoryError(f"{folder}: holds pairs of commit {state['commit']}; delete it, or omit --revision")
            state["commit"] = commit
        stream_into(folder, state, source, wanted)
    except DownloadError:
        raise
    except Exception as e:
        raise explain(e, source) from e
    return state


def stream_into(folder: Path, state: dict, source: Source, wanted: int) -> None:
    """Make again what is damaged in the folder, and add to it until it has the wanted pairs or all that there are."""
    import datasets

    datasets.disable_progress_bars()
    files, save = state["files"], functools.partial(save_file, folder, state)
    stream = functools.partial(datasets.load_dataset, source.repo, streaming=True, revision=state["commit"])
    bad = [file for file, x in files.items() if damage(folder, File(file, None, x["sha256"]))]
    if "test_unique.parquet" not in files or "test_unique.parquet" in bad:
        captions = stream(split="test_unique", columns=["caption"])
        save("test_unique.parquet", list(captions), captions.features, None)
    train = sorted(file for file in files if file.startswith("train-"))
    behind = [None, *(files[file]["position"] for file in train)]
    again = {file: position for file, position in zip(train, behind, strict=False) if file in bad}
    more = max(wanted - pairs_in(state), 0)
    with tqdm(total=more + sum(files[file]["pairs"] for file in again), desc="Pick-a-Pic", unit=" pairs") as bar:
        for file, before in again.items():
            rows = stream(split="train")
            pairs, position = next(read_pairs(rows, before, files[file]["pairs"], bar))
            save(file, pairs, rows.features, position)
        if more:
            rows = stream(split="train")
            for pairs, position in read_pairs(rows, behind[-1], more, bar):
                save(f"train-{len(files) - 1:05d}.parquet", pairs, rows.features, position)
    for path in folder.glob("train-[0-9][0-9][0-9][0-9][0-9].parquet"):
        if path.name not in files:
            path.unlink()
