"""Parts of several methods' networks: a matrix with a bias, a layer norm, functions by their names."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tanzaku.core.method import Method, trainable

_WIDEST = 2**16  # of a bottleneck, far beyond any width of a model


def bottleneck_of(method: Method, size: int, factor: float, setting: str = "reduction_factor") -> int:
    """The width of a bottleneck between layers of `size` features, by what a setting divides it by.

    Raises:
        TanzakuError: it is no positive number, or one that makes the bottleneck larger than any model.
    """
    said = f"{setting}={factor}"
    method.require(factor > 0, said, "a number above 0")
    wide = size / factor <= _WIDEST
    method.require(wide, f"{said}, which makes a bottleneck of more than {_WIDEST:,} features", "a larger one")
    return max(1, int(size // factor))


class Projection(nn.Module):
    """x W^T + b."""

    def __init__(self, n_in: int, n_out: int, like: Tensor):
        super().__init__()
        self.weight = trainable(n_out, n_in, like=like)
        self.bias = trainable(n_out, like=like)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """A layer norm of the adapter's own."""

    def __init__(self, size: int, like: Tensor):
        super().__init__()
        self.weight = trainable(size, like=like, fill=nn.init.ones_)
        self.bias = trainable(size, like=like)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


def activation(name: str) -> nn.Module:
    """A function by its name in transformers."""
    return nn.LeakyReLU() if name == "leakyrelu" else cast(nn.Module, ACT2FN[name])


def activations() -> list[str]:
    """Names of the functions that have no parameters."""
    return ["leakyrelu", *(name for name in ACT2FN if name not in ("prelu", "xielu"))]
