"""Building what a file describes: however odd its settings are, the answer is an error of one line, and soon."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tanzaku.errors import TanzakuError

_SPARE = 64 * 2**20  # numbers that any adapter may draw to begin with


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
                raise TanzakuError(f"its settings ask for a tensor of {' x '.join(map(str, size))} numbers: too large")
        return func(*args, **(kwargs or {}))
