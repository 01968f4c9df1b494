"""Memory: the peak of a stretch of work, what is in use now, and the exact bytes that a step's tensors hold."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CONTAINER = Path("/sys/fs/cgroup")


def reset_peak(device: torch.device) -> None:
    """Begin a stretch. Where the system cannot forget a peak, :func:`peak` counts from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")


def peak(device: torch.device) -> int:
    """Highest use since :func:`reset_peak`, in bytes: the device's on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        line = next(x for x in _STATUS.read_text(encoding="ascii").splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if resource is None:
        now = psutil.Process().memory_info()
        return int(getattr(now, "peak_wset", now.rss))  # Windows keeps the peak; else what is in use now is known
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def in_use(device: torch.device) -> int:
    """What is in use now, in bytes."""
    return int(torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss)


def free() -> int:
    """What is left of main memory for this process, in bytes, without swapping: the machine's, or a container's."""
    left = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (
            int((_CONTAINER / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current")
        )
        left = min(left, max(limit - used, 0))
    return left


def bytes_needed(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made by `work` hold at once."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    with LiveBytes() as live:
        work()
    return int(live.peak)


@dataclass(frozen=True)
class Need:
    """Bytes that a step of one job needs, beside the frozen base and what the job keeps between steps.

    Args:
        step: a step by itself, on its longest rows. alone: that, or an evaluation, whichever needs more.
        points: two pairs of tokens a row and bytes of one row in a shared step, the narrower first.
        once: bytes in a shared step that do not depend on the rows.
    """

    step: int
    alone: int
    points: tuple[tuple[int, int], tuple[int, int]]
    once: int

    def beside(self, rows: int, width: int) -> float:
        """At most, for `rows` in a step whose rows are all padded to `width` tokens."""
        (narrow, less), (wide, more) = self.points
        # Bytes are a sum of powers of the width, so they lie below the line between two points, and beyond the second
        # grow no faster than the square.
        if width <= narrow:
            one = float(less)
        elif width <= wide:
            one = less + (more - less) * (width - narrow) / (wide - narrow)
        else:
            one = more * (width / wide) ** 2
        return self.once + rows * one


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, counts storage that operations make until nothing refers to it; buffers inside of kernels and
    what was there before do not count. Resident memory moves in steps too coarse to tell two ways of work apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {_key(tensor) for tensor in _tensors((args, *kwargs.values()))}
        out = func(*args, **kwargs)
        for tensor in _tensors((out,)):
            if (key := _key(tensor)) not in self._seen and key not in before:
                storage = tensor.untyped_storage()
                self._seen.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among the arguments or results of an operation, which may be lists of tensors. A weight in oneDNN's layout
    has no storage to tell it by, and none is made in a step; a sparse tensor has its parts'."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided:
                yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
