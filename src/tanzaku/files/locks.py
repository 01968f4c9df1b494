"""Locks on files and directories, which go with the process that has them, however it ends."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Windows has the second in place of the first.
try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

_handles: set[int] = set()


def _let_go() -> None:
    """In a fork: the locks are its parent's, and go with that one alone."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """What is at `path` belongs to this process within the block, unless it gives False: neither the system nor the
    file system has locks, and nobody can tell who else uses it.

    Raises:
        BlockingIOError: it belongs to another process.
        OSError: it cannot be opened.
    """
    file = path if fcntl else _stand_in(path)
    handle = os.open(file, os.O_RDONLY if fcntl else os.O_RDWR | os.O_CREAT, 0o600)
    _handles.add(handle)
    try:
        yield _taken(handle)
    finally:
        if handle in _handles:
            _handles.remove(handle)
            os.close(handle)
        if file != path:
            with suppress(OSError):  # another process has it open
                file.unlink()


def _taken(handle: int) -> bool:
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return bool(fcntl or msvcrt)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(*error.args) from None
        return False


def _stand_in(path: Path) -> Path:
    """The file that is locked in the place of `path` on Windows, which opens no directories, and moves and removes
    nothing that is open."""
    name = hashlib.sha256(os.fsencode(os.path.normcase(path.resolve()))).hexdigest()
    return Path(tempfile.gettempdir()) / f"tanzaku-{name[:32]}.lock"
