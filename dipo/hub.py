"""Repositories of the Hugging Face hub, fetched file by file: a run that was stopped goes on, every checksum is compared."""

import contextlib
import errno
import os
import shutil
import sys
import time
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from dipo.checksums import DownloadError, File, count, damage, is_sha256, read_sums, sha256, write_sums
from dipo.cli import REPAIRABLE, clean, first_line

FILES_AT_A_TIME = 4
# Seconds before a call that failed for a passing reason is tried again.
WAITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Source:
    repo: str
    revision: str  # a commit, or a branch where no commit is known to us
    files: tuple[str, ...] = ()  # what is fetched; of alternatives with | between, the first that is there
    optional: tuple[str, ...] = ()  # fetched where it is there
    kind: str = "model"  # the hub's word for it: model or dataset


class RepositoryError(DownloadError):
    """What went wrong with one repository; the others are still fetched."""


@contextlib.contextmanager
def noted(failed: list[RepositoryError]):
    """What goes wrong with one repository is printed and added to failed, and the script goes on."""
    try:
        yield
    except RepositoryError as e:
        failed.append(e)
        tqdm.write(f"error: {e}", sys.stderr)


def status_of(e: BaseException) -> int | None:
    return getattr(getattr(e, "response", None), "status_code", None)


def is_passing(e: Exception, transport: bool) -> bool:
    """Whether the same call may well succeed in a while: a busy server or, where transport says so, a broken connection."""
    if status := status_of(e):
        return status in (408, 425, 429) or status >= 500
    broken = isinstance(e, (ConnectionError, TimeoutError)) or "Consistency check" in str(e)
    broken |= type(e).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))
    return transport and broken and not isinstance(e, errors.OfflineModeIsEnabled)


def persist(call, source: Source, transport: bool):
    """call(), tried again after WAITS seconds where its failure may pass. Raises DownloadError."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as e:
            if wait is None or not is_passing(e, transport):
                raise explain(e, source) from e
        time.sleep(wait)


def explain(e: Exception, source: Source) -> DownloadError:
    """What went wrong with a repository, as one line that says what to do."""
    where, said, status = f"{source.repo} at {clean(ENDPOINT)}", first_line(e), status_of(e)
    if isinstance(e, errors.GatedRepoError):
        return RepositoryError(f"{where}: gated; accept its terms on its page, set HF_TOKEN and run this again")
    if isinstance(e, errors.RepositoryNotFoundError):
        return RepositoryError(f"{where}: no such repository, or none that you may read; look at HF_TOKEN and HF_ENDPOINT")
    if isinstance(e, errors.RevisionNotFoundError):
        return RepositoryError(f"{where}: no such revision; take the newest with --revision main")
    if getattr(e, "errno", None) in (*REPAIRABLE, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        what = "put that right and run this again, or give another folder with --output-dir: what has arrived is kept"
        return DownloadError(f"cannot write ({said}); {what}")
    if status in (401, 403):
        return RepositoryError(f"{where}: not allowed ({said}); look at HF_TOKEN, and run this again")
    if isinstance(e, errors.EntryNotFoundError) and not isinstance(e, errors.LocalEntryNotFoundError):
        return RepositoryError(f"{where}: a file is not there ({said}); try --revision main")
    if status or "Consistency check" in said:
        return RepositoryError(f"{where}: cannot be fetched ({said}); run this again later: what has arrived is kept")
    return DownloadError(f"{where}: cannot be fetched ({said}); look at the connection, run this again: it goes on")


def repo_info(source: Source, revision: str, **more):
    """The hub's information on a repository, its sha the commit that revision is now. Raises DownloadError."""
    wanted = {"repo_type": source.kind, "revision": revision, "timeout": 30} | more
    info = persist(lambda: huggingface_hub.HfApi().repo_info(source.repo, **wanted), source, transport=False)
    if not info.sha:
        raise RepositoryError(f"{source.repo} at {clean(ENDPOINT)}: does not say its commit; use another HF_ENDPOINT")
    return info


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit, and the folder they go into."""

    source: Source
    commit: str
    files: list[File]
    folder: Path

    @property
    def size(self) -> int:
        """in bytes"""
        return sum(file.size or 0 for file in self.files)

    @property
    def arrived(self) -> int:
        """How many bytes of it earlier runs have left in the folder."""
        paths = (self.folder / file.path if self.has(file) else self.part(file) for file in self.files)
        return sum(path.stat().st_size for path in paths if path.is_file())

    def has(self, file: File) -> bool:
        """Whether a file is there in its full size."""
        path = self.folder / file.path
        return path.is_file() and path.stat().st_size == file.size

    def part(self, file: File) -> Path:
        """Where a file is until all of it has arrived."""
        return self.folder / ".parts" / f"{file.path.replace('/', '--')}.{file.checksum[:16]}"


def find_snapshot(source: Source, revision: str, folder: Path) -> Snapshot:
    """What to fetch from the commit that revision is now (the source's own if it is empty), with sizes and checksums."""
    info = repo_info(source, revision or source.revision, files_metadata=True)
    there = {f.rfilename: f for f in info.siblings or ()}
    chosen = [file for file in source.optional if file in there]
    for wanted in source.files:
        file = next((name for name in wanted.split("|") if name in there), None)
        if file is None:
            raise RepositoryError(f"{source.repo}@{info.sha}: has no {wanted.replace('|', ' or ')}; try --revision main")
        chosen.append(file)
    files = []
    for name in sorted(chosen):
        checksum = there[name].lfs.sha256 if there[name].lfs else there[name].blob_id
        if not checksum:
            raise RepositoryError(f"{source.repo}: no checksum of {name} from {clean(ENDPOINT)}; use another HF_ENDPOINT")
        files.append(File(name, there[name].size, checksum))
    return Snapshot(source, info.sha, files, folder)


def fetch(snapshot: Snapshot, file: File, bar: tqdm, use_cache: bool = True) -> None:
    """Bring one file into its folder, from the hub's cache or the hub, unless it is there in full size; or DownloadError.
    It goes on where an earlier run stopped. (huggingface_hub's snapshot_download did once; now it begins a file anew.)"""

    def attempt() -> None:
        source, part, target = snapshot.source, snapshot.part(file), snapshot.folder / file.path
        part.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > (file.size or 0):
            part.unlink()
        place = {"repo_type": source.kind, "revision": snapshot.commit}
        cached = huggingface_hub.try_to_load_from_cache(source.repo, file.path, **place)
        if use_cache and isinstance(cached, str):
            shutil.copyfile(cached, part)
            bar.update(part.stat().st_size)
        else:
            # The storage that a redirect leads to gets no token.
            url, headers = huggingface_hub.hf_hub_url(source.repo, file.path, **place), build_hf_headers()
            with part.open("ab") as f:
                told = CallbackIOWrapper(bar.update, f, "write")
                http_get(url, told, resume_size=f.tell(), headers=headers, expected_size=file.size)
        os.replace(part, target)

    if not snapshot.has(file):
        persist(attempt, snapshot.source, transport=True)


def verify(snapshot: Snapshot, bar: tqdm) -> None:
    """Compare files with the hub's checksums and fetch once more what differs. RepositoryError where that does not help."""
    source, folder = snapshot.source, snapshot.folder
    for file in snapshot.files:
        if not damage(folder, file):
            continue
        (folder / file.path).unlink(missing_ok=True)
        fetch(snapshot, file, bar, use_cache=False)
        if reason := damage(folder, file):
            (folder / file.path).unlink(missing_ok=True)
            what = f"{file.path} arrived {reason} and was deleted"
            raise RepositoryError(f"{source.repo}: {what}; run this again, or use a mirror (HF_ENDPOINT)")


def fetch_all(snapshots: list[Snapshot], failed: list[RepositoryError]) -> None:
    """Fetch snapshots, several files at a time, verify them and write their checksums; what goes wrong with one of them is
    printed and added to failed. DownloadError for what stops all of them."""
    size, arrived = sum(s.size for s in snapshots), sum(s.arrived for s in snapshots)
    bar = tqdm(total=size, initial=arrived, desc="fetching", unit="B", unit_scale=True, disable=not snapshots)
    # The threads of this pool are daemons: a connection that hangs holds up neither Ctrl-C nor the end of the script.
    with ThreadPool(FILES_AT_A_TIME) as pool, bar:
        jobs = [[pool.apply_async(fetch, (s, file, bar)) for file in s.files] for s in snapshots]
        for snapshot, files in zip(snapshots, jobs, strict=True):
            with noted(failed):
                complete(snapshot, files, bar)


def complete(snapshot: Snapshot, jobs: list, bar: tqdm) -> None:
    """Wait for the files of a snapshot, verify them and put their checksums into SHA256SUMS. Raises RepositoryError."""
    root, name = snapshot.folder.parent, snapshot.folder.name
    try:
        for job in jobs:
            job.get()
        verify(snapshot, bar)
    except RepositoryError:
        if not all((snapshot.folder / file).is_file() for file in read_sums(root).get(name, {})):
            write_sums(root, name, {})
        raise
    shutil.rmtree(snapshot.folder / ".parts", ignore_errors=True)
    sums = {f.path: f.checksum if is_sha256(f.checksum) else sha256(snapshot.folder / f.path) for f in snapshot.files}
    write_sums(root, name, sums)
    bar.write(f"{name}: {count(sums)} in {snapshot.folder}, with the checksums that the hub gives", sys.stdout)
