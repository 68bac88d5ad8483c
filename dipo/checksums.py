"""Checksums of fetched files: what is damaged or missing, and SHA256SUMS, which `sha256sum -c` reads too."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub.utils.sha import git_hash, sha_fileobj
from tqdm import tqdm

from dipo.cli import UserError, first_line
from dipo.files import write_text


class DownloadError(UserError):
    """Something that could not be fetched, or is damaged."""

    code = 1


class File(NamedTuple):
    path: str
    size: int | None  # in bytes
    checksum: str  # SHA-256 of a large file, git's SHA-1 of a small one: what the hub has


def count(files) -> str:
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"


def damage(folder: Path, file: File) -> str:
    """What is wrong with a file: "" if nothing."""
    path = folder / file.path
    if not path.is_file():
        return "missing"
    if file.size is not None and path.stat().st_size != file.size:
        return f"with {path.stat().st_size} bytes instead of {file.size}"
    # The hub has a SHA-256 of large files only; small ones have what `git hash-object` gives.
    there = sha256(path) if is_sha256(file.checksum) else git_hash(path.read_bytes())
    return "" if there == file.checksum else "with a wrong checksum"


def is_sha256(checksum: str) -> bool:
    return len(checksum) == 64


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, with a bar where that takes a while."""
    bar = {"desc": f"checking {path.name}", "leave": False, "delay": 2}
    with path.open("rb") as file, tqdm.wrapattr(file, "read", path.stat().st_size, **bar) as f:
        return sha_fileobj(f, 1 << 22).hex()


def read_sums(root: Path) -> dict[str, dict[str, str]]:
    """The checksums in root/SHA256SUMS: for each model its files' SHA-256. Raises DownloadError for another kind of file."""
    sums = {}
    try:
        lines = (root / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise DownloadError(f"{root / 'SHA256SUMS'}: cannot be read ({first_line(e)}); delete it and fetch again") from e
    for line in lines:
        if line and not line.startswith("#"):
            checksum, _, path = line.partition("  ")
            name, _, file = path.partition("/")
            # A file outside is none of ours: what is listed here may be deleted when another revision is fetched.
            if not is_sha256(checksum) or not file or file.startswith("/") or ".." in Path(path).parts:
                raise DownloadError(f"{root / 'SHA256SUMS'}: {line[:80]!r} is no checksum; delete the file and fetch again")
            sums.setdefault(name, {})[file] = checksum
    return sums


def write_sums(root: Path, name: str, sums: dict[str, str]) -> None:
    """Put the SHA-256 of a model's files into root/SHA256SUMS. Files of another revision, which it had, are deleted."""
    all_sums = read_sums(root)
    for file in all_sums.pop(name, {}).keys() - sums.keys():
        (root / name / file).unlink(missing_ok=True)
    all_sums |= {name: sums} if sums else {}
    lines = (f"{c}  {n}/{f}\n" for n in sorted(all_sums) for f, c in sorted(all_sums[n].items()))
    write_text(root / "SHA256SUMS", "".join(lines))


def report(folder: Path, sums: dict[str, str] | None) -> bool:
    """Print what is damaged or missing in a model's folder, of which None was never fetched whole. Whether all is well."""
    if sums is None:
        print(f"{folder.name}: not fetched whole")
        return False
    reasons = {file: reason for file, x in sums.items() if (reason := damage(folder, File(file, None, x)))}
    print(f"{folder.name}: {count(sums)}, {len(reasons) or 'none'} damaged or missing")
    for file, reason in reasons.items():
        print(f"    {folder.name}/{file}: {reason}")
    return not reasons
