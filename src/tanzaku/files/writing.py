"""Writing files and directories that are never half, and numbers as JSON has them."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanzaku.errors import TanzakuError
from tanzaku.files.locks import held

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, brought to the disk and renamed to `path` at the end: a reader finds the old file or the new
    one, never a half.

    Raises:
        TanzakuError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        to_disk(beside)
        beside.replace(path)
    except OSError as error:
        raise TanzakuError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


_NEW, _OLD = ".saving", ".old"


@contextmanager
def directory_beside(target: Path) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of the directory `target` at the end, whatever that held: at
    any moment there is the old one or the new one, whole. What a kill has left beside it is cleared away.

    Raises:
        OSError: it cannot be written; what is there stays as it is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    _clear(target)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_NEW, dir=target.parent))
    try:
        with held(beside):  # as long as this process lives, nobody clears it away
            yield beside
            for path in beside.rglob("*"):
                to_disk(path)
            to_disk(beside)
            beside.chmod(0o755)
            replace_directory(beside, target)
            to_disk(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_directory(new: Path, target: Path) -> None:
    """Put directory `new` in the place of `target`; the old one is at `new` then, or gone."""
    if not target.exists():
        new.rename(target)
        return
    if _exchanged(new, target):
        return
    # Where the system cannot exchange two names, there is a moment without the target: see `recover`.
    old = new.with_suffix(_OLD)
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(new: Path, target: Path) -> bool:
    exchange, here = 2, -100
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # Windows has no library of that kind, others have no such function
        return False
    return bool(renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0)


def recover(target: Path) -> None:
    """Put back the directory that a kill left under another name, in the middle of :func:`replace_directory`."""
    if not target.exists():
        for old in _left(target, _OLD):
            old.rename(target)
            return


def _clear(target: Path) -> None:
    """Remove what killed processes have left beside the directory."""
    for old in _left(target, _OLD):
        shutil.rmtree(old, ignore_errors=True)
    for new in _left(target, _NEW):
        with suppress(OSError), held(new) as ours:  # somebody is still writing it, or has just renamed it
            if ours:
                shutil.rmtree(new, ignore_errors=True)


def _left(target: Path, suffix: str) -> list[Path]:
    """Directories that were made beside the target, under the names that tempfile gives."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}{re.escape(suffix)}")
    with suppress(OSError):
        return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    return []


def to_disk(path: Path) -> None:
    """Bring what was written to a file, or the names in a directory, to the disk: renaming may overtake it else."""
    windows = os.name == "nt"  # which does so for files alone, and only through a handle that may write
    try:
        handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    except PermissionError:
        if windows:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_FOREIGN = {
    rb"version https://git-lfs": "a pointer of Git LFS in the file's place; fetch the file with git lfs pull",
    rb"\s*<(!doctype html|html|head|body)\b": "a web page, perhaps one that asks to sign in; download the file itself",
    rb"%PDF-": "a PDF document, which is not read",
    rb"\x89PNG|GIF8[79]a|\xff\xd8\xff": "an image, which is not read",
    rb"SQLite format 3\0": "an SQLite database; export its table as CSV",
    rb"\x28\xb5\x2f\xfd": "packed with Zstandard; unpack it",
    rb"BZh[1-9]1AY&SY": "packed with bzip2; unpack it",
    rb"\xfd7zXZ\0": "packed with xz; unpack it",
    rb"7z\xbc\xaf\x27\x1c": "packed with 7-Zip; unpack it",
    rb"\x80[\x03-\x05]": "a Python pickle, which is never read, since it may run code",
}


def foreign(head: bytes) -> str:
    """What a file is by its first bytes, where that is nothing that is read, and the fix; else nothing."""
    found = (what for pattern, what in _FOREIGN.items() if re.match(pattern, head.removeprefix(b"\xef\xbb\xbf"), re.I))
    return next(found, "")


def check_kind(path: Path) -> None:
    """A TanzakuError where a file is plainly something else: a web page, a pointer of Git LFS, an archive."""
    with suppress(OSError), path.open("rb") as file:
        if what := foreign(file.read(64)):
            raise TanzakuError(f"{path} is {what}")


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room on a disk, in whatever way a library says it."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def finite(value: Any) -> Any:
    """The value with null for every number that JSON has not: nan and the infinities."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of them in the memory of another, as safetensors has it."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        memory = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return out
