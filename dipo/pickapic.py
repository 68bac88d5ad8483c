"""The first usable pairs of a hub data set as parquet files: a run that was stopped goes on, damage is made good."""

import contextlib
import functools
import itertools
import json
from pathlib import Path

from huggingface_hub.errors import RepositoryNotFoundError
from tqdm import tqdm

from dipo.checksums import DownloadError, File, damage, sha256, write_sums
from dipo.cli import UserError
from dipo.files import write_text, written_whole
from dipo.hub import RepositoryError, Source, explain, repo_info

PAIRS_PER_FILE = 500
# 322 GB of training rows (the data set's card) over about 0.96 million of them.
BYTES_PER_PAIR = 340_000


def read_state(folder: Path) -> dict:
    """What earlier runs have of a data set: the repository, its commit, and of each whole file its pairs, its SHA-256 and
    the position in the stream behind it. Empty where that cannot be read."""
    state = {"commit": None, "files": {}}
    with contextlib.suppress(FileNotFoundError, ValueError):
        state |= json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return state


def folder_name(source: Source) -> str:
    return "pickapic" if source.optional else source.repo.replace("/", "--")


def pairs_in(state: dict) -> int:
    return sum(x["pairs"] for x in state["files"].values())


def read_pairs(rows, find, position: dict | None, wanted: int, bar: tqdm):
    """The next wanted rows of a stream behind a position that train_dipo.py can use, in lists of PAIRS_PER_FILE, each with
    the position behind it; fewer where the stream ends. find: of dipo.schemas.pairs_of."""
    from dipo.pairs import read_pair

    def usable():
        left_out = 0
        for row in rows:
            if any(read_pair(pair, 8) for pair in find(row)[0]):
                bar.update()
                yield row
            else:
                left_out += 1
                bar.set_postfix_str(f"{left_out} left out", refresh=False)

    if position:
        rows.load_state_dict(position)
    stream = usable()
    while pairs := list(itertools.islice(stream, min(PAIRS_PER_FILE, wanted))):
        yield pairs, rows.state_dict()
        wanted -= len(pairs)


def save_file(folder: Path, state: dict, file: str, rows: list[dict], features, position: dict | None) -> None:
    """Write rows as parquet and put the file on record: first the one, then the other, each whole at any moment."""
    import datasets

    with written_whole(folder / file) as part:
        datasets.Dataset.from_list(rows, features=features).to_parquet(part)
    state["files"][file] = {"pairs": len(rows) if position else 0, "sha256": sha256(folder / file), "position": position}
    write_text(folder / "state.json", json.dumps(state))


def fetch_pairs(root: Path, source: Source, wanted: int, revision: str) -> None:
    """Stream the first wanted usable pairs into train-00000.parquet and so on in a folder of root, the captions of
    Pick-a-Pic's test set into test_unique.parquet, and checksums into SHA256SUMS. Whole files of earlier runs are kept,
    damaged ones made again. RepositoryError for what is wrong with the data set, DownloadError for disk and connection."""
    name = folder_name(source)
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = read_state(folder)
        if revision or not state["commit"]:
            commit = repo_info(source, revision or source.revision).sha
            if state["commit"] not in (None, commit):
                raise RepositoryError(f"{folder}: holds pairs of commit {state['commit']}; delete it, or omit --revision")
            state |= {"commit": commit, "repo": source.repo}
        stream_into(folder, state, source, wanted)
    except DownloadError as e:
        if isinstance(e.__cause__, RepositoryNotFoundError):
            from dipo.schemas import OTHERS

            raise RepositoryError(f"{e}; {OTHERS}") from e
        raise
    except UserError as e:
        raise RepositoryError(str(e)) from e
    except Exception as e:
        raise explain(e, source) from e
    write_sums(root, name, {file: x["sha256"] for file, x in state["files"].items()})
    pairs = pairs_in(state)
    end = "" if pairs >= wanted else ", all that there are"
    print(f"{name}: {pairs} pairs{end} in {folder}, from commit {state['commit'][:8]}", flush=True)


def open_train(stream, repo: str, commit: str):
    """The rows of the training split, or of the first where there is none of that name, and what finds their pairs."""
    import datasets

    from dipo.schemas import encoded, failure, pairs_of

    try:
        splits = datasets.get_dataset_split_names(repo, revision=commit)
        rows = encoded(stream(split="train" if "train" in splits else splits[0]))
    except (RuntimeError, ValueError) as e:
        # What datasets says of a repository that it has, but cannot read.
        raise UserError(f"--dataset {repo}: {failure(repo, None, e)}") from e
    return rows, pairs_of(rows, repo)


def stream_into(folder: Path, state: dict, source: Source, wanted: int) -> None:
    """Make again what is damaged in the folder, and add to it until it has the wanted pairs or all that there are."""
    import datasets

    datasets.disable_progress_bars()
    files, save = state["files"], functools.partial(save_file, folder, state)
    stream = functools.partial(datasets.load_dataset, source.repo, streaming=True, revision=state["commit"])
    bad = [file for file, x in files.items() if damage(folder, File(file, None, x["sha256"]))]
    if source.optional and ("test_unique.parquet" not in files or "test_unique.parquet" in bad):
        captions = stream(split="test_unique", columns=["caption"])
        save("test_unique.parquet", list(captions), captions.features, None)
    train = sorted(file for file in files if file.startswith("train-"))
    behind = [None, *(files[file]["position"] for file in train)]
    again = {file: position for file, position in zip(train, behind, strict=False) if file in bad}
    more = max(wanted - pairs_in(state), 0)
    with tqdm(total=more + sum(files[file]["pairs"] for file in again), desc=source.repo, unit=" pairs") as bar:
        for file, before in again.items():
            rows, find = open_train(stream, source.repo, state["commit"])
            pairs, position = next(read_pairs(rows, find, before, files[file]["pairs"], bar))
            save(file, pairs, rows.features, position)
        if more:
            rows, find = open_train(stream, source.repo, state["commit"])
            for number, (pairs, position) in enumerate(read_pairs(rows, find, behind[-1], more, bar), len(train)):
                save(f"train-{number:05d}.parquet", pairs, rows.features, position)
    for path in folder.glob("train-[0-9][0-9][0-9][0-9][0-9].parquet"):
        if path.name not in files:
            path.unlink()
