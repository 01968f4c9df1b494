"""Reading what a stranger may have written: however odd it is, the answer is an error of one line, and soon."""

from __future__ import annotations

import errno
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tanzaku.errors import TanzakuError, TooLarge

_SPARE = 64 * 2**20  # numbers that any adapter may draw to begin with


def is_there(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        TanzakuError: something else has its name, which cannot be read, or never ends: a pipe, a device, a folder, or a
            link to nothing.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise TanzakuError(f"{path} is a link to {path.readlink()}, which is not there; expected a file") from None
        return False
    except OSError as error:
        loop = "a link that leads back to itself" if error.errno == errno.ELOOP else error.strerror or error
        raise TanzakuError(f"{path} cannot be read: {loop}; expected a file") from None
    if not stat.S_ISREG(mode):
        what = next((name for kind, name in _KINDS.items() if stat.S_IFMT(mode) == kind), "no file")
        link = f"a link to {path.resolve()}, " if path.is_symlink() else ""
        raise TanzakuError(f"{path} is {link}{what}; expected a file")
    return True


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}


@contextmanager
def from_file(path: Path) -> Iterator[None]:
    """Whatever goes wrong within the block is the file's fault.

    Raises:
        TanzakuError: in place of any error.
    """
    try:
        yield
    except TanzakuError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise TanzakuError(f"{path} describes no adapter: {type(error).__name__}: {reason}") from error


class Allowance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, new tensors have at most so many numbers together, and a little to spare.

    A rank of a billion is refused before its memory is asked for.
    """

    def __init__(self, numbers: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = numbers + _SPARE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args else None
        if isinstance(size, list | tuple) and all(isinstance(n, int) for n in size):  # as in zeros, empty, randn
            self.left -= math.prod(size)
            if self.left < 0:
                raise TooLarge(size)
        return func(*args, **(kwargs or {}))
