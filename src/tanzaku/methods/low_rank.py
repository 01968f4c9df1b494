"""What methods share whose change is a product of two small matrices, whatever they make these of."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, in_full
from tanzaku.methods.lora import low_rank


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
        h = F.linear(self.dropped(module, x, a), a)
        if y.dtype == a.dtype:
            # One fused product reads y once and writes the sum, with no tensor for the scaled change.
            return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=self.scaling).view(y.shape)
        return (y + F.linear(h, b) * self.scaling).to(y.dtype)

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
