"""On CPUs, let oneDNN multiply where it is faster than torch's default; and have copies of weights in its own layout.

Which of them is faster depends on the processor, on the direction of a product and on little else, so it is measured,
once on a machine: two libraries round differently, and a run that goes on after a kill shall round as it did before.
What was found is kept in a small file in the user's cache directory; where there can be none, each process measures.

Copies are made where memory is plentiful, of the weights of frozen layers. Without them oneDNN brings a weight into its
layout at every product.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tanzaku.engine.acceleration import OfProducts
from tanzaku.engine.memory import free
from tanzaku.engine.products import Copies, Directions, Products, fits, multiply
from tanzaku.errors import TanzakuError
from tanzaku.files.writing import written_beside

_MARGIN = 0.95  # of the other's time: what is not faster by more than that is not worth another rounding
_IN, _OUT, _TOKENS, _ROUNDS = 640, 1024, (80, 320), 15
_STEADY = 1.5  # times as long as the fastest round the middle one may take


class OneDNN(OfProducts):
    """Products by oneDNN, forward and backward, each where it is faster."""

    name = "onednn"
    summary = "oneDNN multiplies on CPUs, where it was measured to be faster than torch's default"

    @property
    def possible(self) -> bool:
        return available(self.common.products.kind)

    def __enter__(self) -> Self:
        found = _speeds_of(self.common.products)
        self.common.products.onednn = Directions() if found is None else found.plain
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.common.products.onednn = Directions()


class PrepackedWeights(OfProducts):
    """Copies of frozen weights in oneDNN's layout, for the directions in which it is faster with them."""

    name = "prepacked_weights"
    summary = "oneDNN has copies of frozen weights in its own layout, where memory is plentiful"

    @property
    def possible(self) -> bool:
        return available(self.common.products.kind)

    @cached_property
    def wanted(self) -> Directions:
        """In which directions. It is asked once: a worker on fewer threads has what its parent has."""
        found = _speeds_of(self.common.products)
        return Directions() if found is None else found.prepacked

    def take(self, room: float) -> int:
        """Have copies, if they need a quarter of what is left at most: the weights' bytes for each direction."""
        products, wanted = self.common.products, self.wanted
        if products.copies or not wanted:
            return 0
        layers = [module for module in products.layers if fits(module.weight)]
        needed = (wanted.forward + wanted.backward) * sum(module.weight.nbytes for module in layers)
        if needed > min(room, free()) / 4:
            return 0
        try:
            products.copies = {id(module): Copies.of(module.weight, wanted) for module in layers}
        except RuntimeError:  # memory went to somebody else meanwhile: products do without, as on other machines
            return 0
        return needed

    def free(self) -> int:
        copies, self.common.products.copies = self.common.products.copies, {}
        return sum(each.nbytes for each in copies.values())


def _speeds_of(products: Products) -> Speeds | None:
    """Of the products that a model has; None: oneDNN has none of the kind."""
    return speeds(products.kind) if products.kind is not None and available(products.kind) else None


def available(kind: torch.dtype | None = torch.float32) -> bool:
    """Whether this torch has oneDNN's products of this type, for this processor."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if kind is None or not there:
        return False
    named = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    return named and _multiplies(kind)


@cache
def _multiplies(kind: torch.dtype) -> bool:
    # Torch goes by the processor, and oneDNN also by ONEDNN_MAX_CPU_ISA: whether it has a product, it says when asked.
    if kind == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        multiply(torch.zeros(2, 2, dtype=kind), torch.zeros(2, 2, dtype=kind), None, onednn=True)
    except RuntimeError:
        return False
    return True


# -- what is faster here


@dataclass(frozen=True)
class Times:
    """Milliseconds of the same products: by torch's default, by oneDNN, and by it with weights in its layout."""

    torch: float
    onednn: float
    prepacked: float

    @property
    def plain_pays(self) -> bool:
        return self.onednn < _MARGIN * self.torch

    @property
    def prepacked_pays(self) -> bool:
        """Whether a copy makes products faster than they are without one."""
        return self.prepacked < _MARGIN * (self.onednn if self.plain_pays else self.torch)


@dataclass(frozen=True)
class Speeds:
    """What was measured, of both directions of a product."""

    forward: Times
    backward: Times
    steady: bool = True  # whether rounds took like times; other programs make them differ

    @property
    def total(self) -> float:
        """Milliseconds of both directions, each in the way that is chosen."""
        return sum(min(times.torch, times.onednn, times.prepacked) for times in (self.forward, self.backward))

    @property
    def plain(self) -> Directions:
        return Directions(self.forward.plain_pays, self.backward.plain_pays)

    @property
    def prepacked(self) -> Directions:
        return Directions(self.forward.prepacked_pays, self.backward.prepacked_pays)


def speeds(kind: torch.dtype = torch.float32) -> Speeds:
    """Of this processor, with torch as it is: read from the user's cache, or measured and kept there.

    What was measured beside other programs that took the processor's time is this process's alone.
    """
    return _speeds(kind, torch.get_num_threads())


@cache  # one choice in a process, whatever becomes of the file
def _speeds(kind: torch.dtype, threads: int) -> Speeds:
    name = str(kind).removeprefix("torch.")
    key = f"{processor()}, torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}, {name}"
    kept = _kept()
    found = _read(kept.get(key))
    if found is None:
        found = measured(kind)
        if not found.steady:
            return found
        # No home, no such directory, or a full disk: the next process measures again.
        with contextlib.suppress(OSError, RuntimeError, TanzakuError):
            path = cache_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(path) as beside:
                times = {way: asdict(each) for way, each in (("forward", found.forward), ("backward", found.backward))}
                beside.write_text(json.dumps({**kept, key: times}, indent=1), encoding="utf-8")
    return found


def cache_file() -> Path:
    """Where it is kept. Deleting it has everything measured anew."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tanzaku" / "products.json"


def _kept() -> dict[str, Any]:
    # No home, no file, no text, no JSON, or nested without end: whatever it is, nothing is known.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _read(entry: Any) -> Speeds | None:
    try:
        found = Speeds(Times(**entry["forward"]), Times(**entry["backward"]))
        numbers = [time for times in (found.forward, found.backward) for time in asdict(times).values()]
        return found if all(math.isfinite(number) and number > 0 for number in numbers) else None
    except (TypeError, KeyError, OverflowError):
        return None


def processor() -> str:
    """The processor's name, and on Linux what tells apart those that share one."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if name := about.get("model name"):
            numbers = (f"{key} {about[key]}" for key in ("cpu family", "model", "stepping") if key in about)
            return ", ".join([name, *numbers])
    return platform.processor() or platform.machine()


@torch.no_grad()
def measured(kind: torch.dtype = torch.float32) -> Speeds:
    """Measure it: some tenths of a second. Of several rounds the fastest counts, which other programs disturb least."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_OUT, _IN, generator=generator).to(kind)
    both = Directions(True, True)
    copies = Copies.of(weight, both)
    apart: list[float] = []  # how far the middle of a way's rounds is from the fastest

    def times(weight: Tensor, copy: Tensor | None) -> Times:
        total = {"torch": 0.0, "onednn": 0.0, "prepacked": 0.0}
        for tokens in _TOKENS:
            x = torch.randn(tokens, weight.shape[1], generator=generator).to(kind)
            ways: dict[str, tuple[bool, Tensor | None]] = {
                "torch": (False, None),
                "onednn": (True, None),
                "prepacked": (True, copy),
            }
            seen: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(_ROUNDS):
                for way, (onednn, held) in ways.items():
                    began = time.perf_counter()
                    multiply(x, weight, None, onednn, held)
                    seen[way].append(time.perf_counter() - began)
            for way, spent in seen.items():
                total[way] += 1000 * min(spent)
                apart.append(sorted(spent)[len(spent) // 2] / min(spent))
        return Times(**total)

    forward, backward = times(weight, copies.forward), times(weight.t(), copies.backward)
    return Speeds(forward, backward, steady=sorted(apart)[len(apart) // 2] < _STEADY)
