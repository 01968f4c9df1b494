"""Products of a model's linear layers, which several accelerations make cheaper: here they meet.

Nine tenths of a step are products of hidden states with weights that nobody trains. Each of the accelerations says in
:class:`Products` what it wants: that tokens are left out (`skipping.py`, `trim.py`), or who multiplies (`onednn.py`).
Weights that are trained, as in full fine-tuning, are multiplied by the faster library too, and nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.engine.layout import Layout, Places
from tanzaku.engine.order import Order
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.support.autograd import once_differentiable


@dataclass(frozen=True)
class Directions:
    """Whether something is done in products of the forward pass, x W^T, and of the backward pass, g W."""

    forward: bool = False
    backward: bool = False

    def __bool__(self) -> bool:
        return self.forward or self.backward


@dataclass(frozen=True)
class Copies:
    """A weight W (out, in) of one moment in oneDNN's layout, for x W^T and for g W; None: there is no such copy."""

    weight: Tensor
    version: int
    forward: Tensor | None
    backward: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, wanted: Directions) -> Copies:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        forward = reorder(weight) if wanted.forward else None
        return cls(weight, weight._version, forward, reorder(weight.t()) if wanted.backward else None)

    @property
    def nbytes(self) -> int:
        """Of the copies; a tensor in oneDNN's layout does not tell its own."""
        return self.weight.nbytes * ((self.forward is not None) + (self.backward is not None))

    def show(self, weight: Tensor) -> bool:
        """Whether they are of this weight as it is now."""
        return self.weight is weight and self.version == weight._version


class Products:
    """The linear layers of a model's backbone. While somebody holds them, they multiply as is said here.

    `skips`: padding is left out, and in the backward pass rows that need no gradient. `pooled`: ids of layers that work
    on the token alone that is read at the end. `onednn`: products that oneDNN computes. `copies`: weights in its
    layout, by the layer's id, with which it computes products in any case.
    """

    def __init__(self, base: Base, order: Order):
        self.order = order
        inside = {id(module) for module in tree.modules(base.backbone)}
        self.layers = [
            module
            for module in tree.modules(base.model)
            # A subclass has its own idea of a product, as a quantised weight has, and a patched layer somebody else's.
            if type(module) is nn.Linear and type(module.weight) is nn.Parameter
            if id(module) in inside and "forward" not in module.__dict__
        ]
        self.layout: Layout | None = None
        self.skips = False
        self.pooled: set[int] = set()
        self.onednn = Directions()
        self.copies: dict[int, Copies] = {}
        self._holders = 0

    @property
    def kind(self) -> torch.dtype | None:
        """The type of the weights that oneDNN could multiply; None: there are none."""
        return next((module.weight.dtype for module in self.layers if fits(module.weight)), None)

    def hold(self) -> None:
        """Have the layers multiply as is said here, until it is released as often as it was held."""
        self._holders += 1
        if self._holders == 1:
            for module in self.layers:
                module.__dict__["forward"] = partial(self._forward, module)

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            for module in self.layers:
                module.__dict__.pop("forward", None)

    @contextmanager
    def batch(self, layout: Layout) -> Iterator[None]:
        """Within the block, which holds the backward pass too, batches have their tokens there."""
        before, self.layout = self.layout, layout
        try:
            yield
        finally:
            self.layout = before

    def _forward(self, module: nn.Linear, input: Tensor) -> Tensor:
        x, weight, bias, layout = input, module.weight, module.bias, self.layout
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            if trained or weight.dtype != kind:
                return F.linear(x, weight, bias)
            x = x.to(kind)
        if layout is None or weight.dtype != x.dtype:
            return F.linear(x, weight, bias)
        # What is faster was measured with the type that most weights have, and the processor may not know another.
        onednn = self.onednn if fits(x) and x.dtype == self.kind else Directions()
        if trained:
            if onednn:
                return cast(Tensor, _TrainedProduct.apply(x, weight, bias, onednn))  # type: ignore[no-untyped-call]
            return F.linear(x, weight, bias)
        keep: Places = None
        need: Places = None
        at = layout.of(tuple(x.shape[:2])) if x.dim() == 3 else None
        if at is not None:
            last = at.packed and id(module) in self.pooled
            if self.skips or last:
                keep = at.places(last=last)
                need = at.places(self.order.depth(module), last) if self.skips else keep
        copies = self.copies.get(id(module))
        if copies is not None and not copies.show(weight):
            copies = None
        return cast(Tensor, _Product.apply(x, weight, bias, keep, need, onednn, copies))  # type: ignore[no-untyped-call]


def fits(x: Tensor) -> bool:
    """Whether oneDNN's products are for tensors of this kind."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


class _Product(torch.autograd.Function):
    """x W^T + b at some places, zero at the others; x (..., in), W (out, in), frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: Places,
        need: Places,
        onednn: Directions,
        copies: Copies | None,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.need, ctx.onednn = need, onednn.backward
        ctx.copy = None if copies is None else copies.backward
        return _at(keep, x, weight, bias, onednn.forward, None if copies is None else copies.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors  # an error where it was changed in the meantime
        gradient = _at(ctx.need, gradients[0], weight.t(), None, ctx.onednn, ctx.copy)
        return gradient, None, None, None, None, None, None


class _TrainedProduct(torch.autograd.Function):
    """x W^T + b; x (..., in), W (out, in), of which something is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, onednn: Directions) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.onednn = onednn.backward
        return multiply(x, weight, bias, onednn.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            None if weight is None else multiply(gradient, weight.t(), None, ctx.onednn),
            None if x is None else multiply(rows.t(), x.reshape(-1, x.shape[-1]).t(), None, ctx.onednn),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


def _at(places: Places, x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool, copy: Tensor | None) -> Tensor:
    if places is None:
        return multiply(x, weight, bias, onednn, copy)
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_zeros(flat.shape[0], weight.shape[0])
    if isinstance(places, slice):
        out[places] = multiply(flat[places], weight, bias, onednn, copy)
    elif len(places):
        out.index_copy_(0, places, multiply(flat.index_select(0, places), weight, bias, onednn, copy))
    return out.view(*x.shape[:-1], weight.shape[0])


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool, copy: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., out).

    Args:
        x: (..., in). weight: (out, in). bias: (out).
        onednn: whether oneDNN multiplies; else torch does as it likes.
        copy: the weight in oneDNN's layout, with which it does in any case.
    """
    if onednn or copy is not None:
        weight = weight if copy is None else copy
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)
