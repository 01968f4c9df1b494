"""What methods share whose change is a product of two small matrices, whatever they make these of."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, in_full
from tanzaku.core.routing import in_equal_shares, split
from tanzaku.support.autograd import once_differentiable


class Low(nn.Module):
    """A named holder of one weight, so that files carry PEFT's `lora_A.weight`."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


class LowRankDelta(WeightDelta):
    """scaling B A x at a matrix: two small products a token, and two for several alike adapters together.

    Attributes:
        r: rows of A. scaling: a factor of the change.
    """

    r: int
    scaling: float = 1.0

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """(A, B), (r, in) and (out, r)."""
        raise TypeError(f"{type(self).__name__} defines no matrices()")

    def delta(self, module: nn.Module) -> Tensor:
        a, b = self.matrices(module)
        return b @ a * self.scaling

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return in_full(partial(self._changed, module), self._own(), x, y)

    def _own(self) -> Tensor:
        """One of the layer's tensors; what it trains may be another's."""
        return next(iter((*self.parameters(), *self.buffers())))

    def _changed(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.matrices(module)
        h = self.hidden(module, x, a)
        if y.dtype == a.dtype:
            # One fused product reads y once and writes the sum, with no tensor for the scaled change.
            return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=self.scaling).view(y.shape)
        return (y + F.linear(h, b) * self.scaling).to(y.dtype)

    def hidden(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        """A x, with A the first of :meth:`matrices`."""
        return F.linear(self.dropped(module, x, a), a)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        # Dropout draws for each adapter by itself.
        dropped = self.dropout and module.training
        return None if dropped else (self.r, self.scaling, self._own().dtype)

    @staticmethod
    def batched_outputs(
        layers: Sequence[Any], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        a, b = zip(*(layer.matrices(module) for layer in layers), strict=True)
        return low_rank(x, y, sizes, a, b, layers[0].scaling)


def low_rank(
    x: Tensor,
    y: Tensor,
    sizes: tuple[int, ...],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: float,
    e: Sequence[Tensor] = (),
) -> Tensor:
    """y + scaling * B diag(E) A x of several adapters at once, each for so many rows of x and y.

    Args:
        a: matrices (r, in). b: (out, r). e: (r, 1), or none.
    """
    return in_full(lambda x, y: _low_rank(x, y, sizes, a, b, scaling, e), a[0], x, y)


def _low_rank(
    x: Tensor,
    y: Tensor,
    sizes: tuple[int, ...],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: float,
    e: Sequence[Tensor],
) -> Tensor:
    x = x.to(a[0].dtype)
    plain = x.device.type == "cpu" and y.dtype == x.dtype and not torch.is_autocast_enabled("cpu")
    if plain and min(sizes) < max(sizes):
        a = [one * each for one, each in zip(a, e, strict=True)] if e else a
        return cast(Tensor, _LowRank.apply(x, y, sizes, scaling, *a, *b))  # type: ignore[no-untyped-call]
    # (adapters, r, in) and (adapters, out, r): two batched products for any number of adapters.
    n, all_a, all_b = len(a), torch.stack([*a]), torch.stack([*b])
    all_e = torch.stack([each.view(-1) for each in e]) if e else None

    def changed(x: Tensor, y: Tensor) -> Tensor:
        h = torch.bmm(x.reshape(n, -1, x.shape[-1]), all_a.mT)
        if all_e is not None:
            h = h * all_e[:, None]
        if y.dtype == all_a.dtype:
            return torch.baddbmm(y.reshape(n, -1, y.shape[-1]), h, all_b.mT, alpha=scaling).view(y.shape)
        return (y + torch.bmm(h, all_b.mT).view(y.shape) * scaling).to(y.dtype)

    return in_equal_shares(sizes, changed, x, y)


class _LowRank(torch.autograd.Function):
    """:func:`low_rank` for unequal shares of rows on CPUs, where products are started fast: each adapter has its own.

    Of two matrices in a product the longer side lies along memory, so what has rank r is (r, tokens): it takes half the
    time of a product that writes r numbers a line.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, sizes: tuple[int, ...], scaling: float, *weights: Tensor) -> Tensor:
        a, b = weights[: len(sizes)], weights[len(sizes) :]
        tokens = [size * math.prod(x.shape[1:-1]) for size in sizes]
        x, out = x.reshape(-1, x.shape[-1]), y.clone(memory_format=torch.contiguous_format)
        hidden = []
        for own, changed, down, up in zip(
            split(x, tokens), split(out.view(-1, y.shape[-1]), tokens), a, b, strict=True
        ):
            hidden.append(torch.mm(down, own.t()).mul_(scaling))
            changed.addmm_(hidden[-1].t(), up.t())
        # Where every A is frozen, what they read is not needed again.
        kept = x if any(ctx.needs_input_grad[4 : 4 + len(a)]) else None
        ctx.save_for_backward(kept, *weights, *hidden)
        ctx.tokens, ctx.scaling = tokens, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        n, (x, *kept) = len(ctx.tokens), ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_x = flat.new_empty(len(flat), kept[0].shape[1]) if ctx.needs_input_grad[0] else None
        to_a: list[Tensor | None] = []
        to_b = []
        read = [None] * n if x is None else split(x, ctx.tokens)
        for at, (own, g) in enumerate(zip(read, split(flat, ctx.tokens), strict=True)):
            down, up, hidden = kept[at], kept[n + at], kept[2 * n + at]
            inner = torch.mm(up.t(), g.t()).mul_(ctx.scaling)
            to_a.append(None if own is None else torch.mm(inner, own))
            to_b.append(torch.mm(hidden, g).t())
            if to_x is not None:
                start = sum(ctx.tokens[:at])
                torch.mm(inner.t(), down, out=to_x[start : start + len(g)])
        to_x = None if to_x is None else to_x.view(*gradient.shape[:-1], -1)
        return to_x, gradient, None, None, *to_a, *to_b
