"""The memory of one training step of every method, beside HF PEFT: the peak of the bytes that its tensors hold.

Resident memory moves in steps of a few MiB, too coarse to tell two libraries apart; this is exact and repeats.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.subjects import METHODS, STEPPERS, batch_of, model_for


class LiveBytes(TorchDispatchMode):
    """Within the block, counts storage that operations make until nothing refers to it; buffers inside of kernels and
    what was there before do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := _key(tensor)) not in self._seen and key not in before:
                storage = tensor.untyped_storage()
                self._seen.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def table(batches: tuple[int, ...] = (1, 8)) -> None:
    """Print the Markdown table."""
    warnings.filterwarnings("ignore")
    print("| method | rows | HF PEFT | Tanzaku | ratio |")
    print("|---|---|---|---|---|")
    for method in METHODS:
        base = model_for(method)
        for rows in batches:
            batch, peak = batch_of(rows), {}
            for library, make in STEPPERS.items():
                stepper = make(copy.deepcopy(base), method)
                stepper.step(batch)  # the optimizer's state is made in the first
                with LiveBytes() as live:
                    stepper.step(batch)
                peak[library] = live.peak / 2**20
                del stepper
            ratio = peak["tanzaku"] / peak["peft"]
            print(
                f"| {method} | {rows} | {peak['peft']:.1f} MiB | {peak['tanzaku']:.1f} MiB | {ratio:.2f} |", flush=True
            )
