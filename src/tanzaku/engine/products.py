"""Products with the frozen weights, for the tokens that matter.

Nine tenths of a step are products of hidden states with weights that nobody trains. Three things make them cheaper and
change no result but its rounding:

- Padding is left out: rows of unlike length share a batch, and what stands at padded places is never read. Nor is
  what a decoder classifier's last layer makes of other tokens than the pooled one.
- In the backward pass a row is left out below its lowest adapter: nothing there wants a gradient. A row that trains a
  head alone costs no backward pass, whatever its neighbours need.
- On CPUs, oneDNN multiplies: for the few dozen tokens of a small batch it is 1.5 to 2 times as fast as torch's
  default, forward and backward. Where memory is plentiful it has copies of the weights in its own layout, which it
  otherwise makes at every product: up to another 15% of the products' time, for twice the weights' bytes.

Weights that are trained, as in full fine-tuning, are multiplied by oneDNN too, and nothing is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.routing import Ragged
from tanzaku.engine.memory import free
from tanzaku.engine.trim import last_layer_modules
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.models.heads import heads_above
from tanzaku.support.autograd import once_differentiable

_LAYER = re.compile(r"\.(\d+)\.")


ABOVE = 10**6  # more layers than any model has


def layer_of(path: str) -> int | None:
    """The layer that a module's path names, counted from 0, if it names one."""
    found = _LAYER.search(f".{path}.")
    return int(found[1]) if found else None


def lowest_layer(adapter: Adapter) -> int:
    """The lowest layer in which an adapter trains something: -1 for what may lie before all layers."""
    base = adapter.base
    if base.encoder_decoder:
        return -1  # its two stacks count their layers alike
    trained = [path for path, adapter_layer in adapter.at() if adapter_layer.trained]
    above = heads_above(base.model)
    layers = [layer_of(path) for path in trained if path not in above]
    return min((-1 if layer is None else layer for layer in layers), default=ABOVE)


Places = Tensor | slice | None  # None: all there are


@dataclass
class Tokens:
    """Where the tokens of a batch lie: each row has `width` places, of them `lengths` are its own from `starts` on.

    `lowest` is the layer of each row's lowest adapter; below it the row needs no gradient. Where a batch is `packed`,
    layers see the own tokens of all rows alone, one after another.
    """

    width: int
    starts: Sequence[int]
    lengths: Sequence[int]
    lowest: Sequence[int]
    device: torch.device
    packed: bool = False
    read: Sequence[int] | None = None  # of each row's own tokens, the one that a classifier pools; None: the last
    _found: dict[Any, Places] = field(default_factory=dict)
    _ragged: dict[tuple[int, ...], Ragged] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens) of hidden states."""
        return (sum(self.lengths), 1) if self.packed else (len(self.lengths), self.width)

    @cached_property
    def rows(self) -> Ragged:
        """The own tokens, and the batch as it enters the model."""
        return Ragged.of(self.width, self.starts, self.lengths, self.device)

    def ragged(self, lengths: tuple[int, ...]) -> Ragged | None:
        """Tokens of rows that begin with their own first one and are as long as the longest; None: all are so long."""
        if min(lengths) == max(lengths):
            return None
        if lengths not in self._ragged:
            self._ragged[lengths] = Ragged.short(lengths, self.device)
        return self._ragged[lengths]

    def places(self, depth: int | None = None, last: bool = False) -> Places:
        """The own places in the flattened batch, of rows that need a gradient at `depth` (None: of all).

        Args:
            last: of each row the token alone that is read at the end.
        """
        key = (None if depth is None else max([low for low in self.lowest if low <= depth], default=-2), last)
        if key not in self._found:
            if self.packed:
                firsts = [end - length for end, length in zip(accumulate(self.lengths), self.lengths, strict=True)]
            else:
                firsts = [row * self.width + start for row, start in enumerate(self.starts)]
            spans = [range(first, first + length) for first, length in zip(firsts, self.lengths, strict=True)]
            if last:
                read = [-1] * len(spans) if self.read is None else self.read
                spans = [range(span[at], span[at] + 1) for span, at in zip(spans, read, strict=True)]
            kept = [span for span, low in zip(spans, self.lowest, strict=True) if depth is None or low <= depth]
            self._found[key] = self._short(kept)
        return self._found[key]

    def _short(self, spans: list[range]) -> Places:
        places = [place for span in spans for place in span]
        if len(places) == math.prod(self.shape):
            return None
        if places and places[-1] - places[0] + 1 == len(places):
            return slice(places[0], places[-1] + 1)
        return torch.tensor(places, dtype=torch.long, device=self.device)


class FrozenProducts:
    """While entered, the linear layers of a model's backbone multiply as described above."""

    def __init__(self, base: Base):
        self.tokens: Tokens | None = None
        inside = {id(module) for module in tree.modules(base.backbone)}
        self.layers = [
            # What lies in no layer may lie behind them all, where every gradient passes.
            (module, ABOVE if (layer := layer_of(path)) is None else layer)
            for path, module in tree.named_modules(base.model)
            # A subclass has its own idea of a product, as a quantised weight has, and a patched layer somebody else's.
            if type(module) is nn.Linear and type(module.weight) is nn.Parameter
            if id(module) in inside and "forward" not in module.__dict__
        ]

        # In the last layer only the pooled token asks, and behind its attention only that token is read.
        self.pooled = {id(module) for part in last_layer_modules(base, asking=True) for module in part.modules()}
        self.copies: dict[int, _Copies] = {}

    def __enter__(self) -> FrozenProducts:
        for module, depth in self.layers:
            module.__dict__["forward"] = partial(self._forward, module, depth)
        return self

    def __exit__(self, *_: object) -> None:
        for module, _depth in self.layers:
            module.__dict__.pop("forward", None)
        self.unpack()

    def pack(self, room: float = math.inf) -> int:
        """Have copies of the weights in oneDNN's layout, if they need a quarter of what is left at most. For jobs that
        share the model: then it is frozen.

        Args:
            room: bytes that may be taken, if the machine has them.

        Returns:
            Bytes taken: 0, or twice those of the weights.
        """
        fits = [module for module, _ in self.layers if _by_onednn(module.weight)]
        needed = 2 * sum(module.weight.nbytes for module in fits)
        if self.copies or needed > min(room, free()) / 4:
            return 0
        try:
            self.copies = {id(module): _Copies.of(module.weight) for module in fits}
        except RuntimeError:  # memory went to somebody else meanwhile: products do without, as on other machines
            return 0
        return needed

    def unpack(self) -> int:
        """Do without them again; bytes freed."""
        freed = 2 * sum(copies.weight.nbytes for copies in self.copies.values())
        self.copies = {}
        return freed

    @contextmanager
    def reading(self, tokens: Tokens) -> Iterator[None]:
        """Within the block, batches have their tokens there. It holds for the backward pass too."""
        self.tokens = tokens
        try:
            yield
        finally:
            self.tokens = None

    def _forward(self, module: nn.Linear, depth: int, input: Tensor) -> Tensor:
        x, weight, bias, tokens = input, module.weight, module.bias, self.tokens
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            if trained or weight.dtype != kind:
                return F.linear(x, weight, bias)
            x = x.to(kind)
        if tokens is None or weight.dtype != x.dtype:
            return F.linear(x, weight, bias)
        if trained:
            return _trained(x, weight, bias)
        keep: Places = None
        need: Places = None
        if x.dim() == 3 and x.shape[:2] == tokens.shape:
            last = tokens.packed and id(module) in self.pooled
            keep, need = tokens.places(last=last), tokens.places(depth, last)
        copies = self.copies.get(id(module))
        if copies is not None and not copies.show(weight):
            copies = None
        return cast(Tensor, _Product.apply(x, weight, bias, keep, need, copies))  # type: ignore[no-untyped-call]


@dataclass
class _Copies:
    """A weight W (out, in) of one moment as oneDNN wants it: for x W^T, and for y W in the backward pass."""

    weight: Tensor
    version: int
    forward: Tensor
    backward: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> _Copies:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        return cls(weight, weight._version, reorder(weight), reorder(weight.t()))

    def show(self, weight: Tensor) -> bool:
        """Whether they are of this weight as it is now."""
        return self.weight is weight and self.version == weight._version


class _Product(torch.autograd.Function):
    """x W^T + b at some places, zero at the others; x (..., in), W (out, in), frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: Any, need: Any, copies: _Copies | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.need, ctx.copies = need, copies
        return _at(keep, x, weight if copies is None else copies.forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (weight,) = ctx.saved_tensors  # an error where it was changed in the meantime
        weight = weight.t() if ctx.copies is None else ctx.copies.backward
        return _at(ctx.need, gradients[0], weight, None), None, None, None, None, None


def _trained(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _by_onednn(x):
        return cast(Tensor, _TrainedProduct.apply(x, weight, bias))  # type: ignore[no-untyped-call]
    return F.linear(x, weight, bias)


class _TrainedProduct(torch.autograd.Function):
    """x W^T + b; x (..., in), W (out, in), of which something is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            None if weight is None else multiply(gradient, weight.t(), None),
            None if x is None else multiply(rows.t(), x.reshape(-1, x.shape[-1]).t(), None),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _at(places: Places, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if places is None:
        return multiply(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_zeros(flat.shape[0], weight.shape[0])
    if isinstance(places, slice):
        out[places] = multiply(flat[places], weight, bias)
    elif len(places):
        out.index_copy_(0, places, multiply(flat.index_select(0, places), weight, bias))
    return out.view(*x.shape[:-1], weight.shape[0])


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by the faster of what torch has; x (tokens, in), W (out, in)."""
    if _by_onednn(x):
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor) -> bool:
    return _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


# Where it was measured to be faster: x86 processors. Elsewhere torch's own choice stands.
_ONEDNN = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)
