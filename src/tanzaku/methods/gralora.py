"""GraLoRA: LoRA in a grid of k x k blocks, each with a low-rank change of its own.

    y_j = W_j x + (alpha / r) sum_i B_ji A_ji x_i,  blocks of rank r / k,  B = 0 at first

Jung et al. 2025, arXiv 2505.20355.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, kaiming
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.low_rank import Low
from tanzaku.models.families import features, weight_of


class GridDelta(WeightDelta):
    """`gralora_A` (k, in / k, r) and `gralora_B` (k, r, out / k); with `hybrid_r` also LoRA's two matrices for the
    whole, `gralora_A_general` (hybrid_r, in) and `gralora_B_general` (out, hybrid_r)."""

    def __init__(self, module: nn.Module, method: GraLoRA):
        super().__init__()
        n_in, n_out = features(module)
        weight, k, r, hybrid = weight_of(module), method.gralora_k, method.r, method.hybrid_r
        self.k, self.hybrid, self.dropout = k, hybrid, method.gralora_dropout
        self.scaling = method.alpha / (r + hybrid)
        second = None if method.init_weights else kaiming
        self.gralora_A = trainable(k, n_in // k, r, like=weight, fill=_each_turned)
        self.gralora_B = trainable(k, r, n_out // k, like=weight, fill=second and _each_turned)
        if hybrid:
            self.gralora_A_general = Low(trainable(hybrid, n_in, like=weight, fill=kaiming))
            self.gralora_B_general = Low(trainable(n_out, hybrid, like=weight, fill=second))

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._change(self.dropped(module, x, self.gralora_A))

    def _change(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("...ni,nir->...nr", torch.unflatten(x, -1, (self.k, -1)), self.gralora_A)
        # Each block of inputs gives a part of its r numbers to each block of outputs.
        hidden = torch.unflatten(hidden, -1, (self.k, -1)).transpose(-3, -2).flatten(-2)
        change = torch.einsum("...jr,jro->...jo", hidden, self.gralora_B).flatten(-2)
        if self.hybrid:
            change = change + F.linear(F.linear(x, self.gralora_A_general.weight), self.gralora_B_general.weight)
        return change * self.scaling

    def delta(self, module: nn.Module) -> Tensor:
        n_in, like = features(module)[0], self.gralora_A
        return self._change(torch.eye(n_in, dtype=like.dtype, device=like.device)).t()


def _each_turned(t: Tensor) -> None:
    """Fill each matrix of (k, m, n) as one of (n, m) is."""
    for each in t:
        each.copy_(kaiming(each.new_empty(each.shape[1], each.shape[0])).t())


@dataclass
class GraLoRA(TargetedWithBiases):
    """Granular low-rank adaptation.

    Args:
        r: rank of the whole grid; gralora_k divides it. gralora_k: blocks along either side of a matrix.
        hybrid_r: rank of a LoRA for the whole matrix beside the grid; 0 for none.
        alpha: the change is scaled by alpha / (r + hybrid_r).
        gralora_dropout: probability of dropping an input in training.
        init_weights: True starts with a change of zero, False at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "gralora_only": which biases are trained too.
    """

    name = "gralora"
    peft_type = "GRALORA"
    paper = "arXiv 2505.20355"
    summary = "low-rank changes of the blocks of a grid"
    about = About(
        where="query and value projections, in k x k blocks: y_j + (alpha / r) sum_i B_ji A_ji x_i",
        parameters="r (in + out) a matrix",
        cost="as LoRA's, in more and smaller products",
        choose="in place of LoRA at high ranks: the change's rank is k r",
        limits="k divides inputs, outputs and r",
    )
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    own_biases = "gralora_only"
    nonzero = ("alpha",)
    learning_rate = 2e-4  # HF PEFT's method comparison (MetaMathQA, rank 32).
    # As for LoRA, whose form it has in each block; ranks that two blocks divide.
    space = spaces(r=Choice((4, 8, 16, 32)), learning_rate=Range(5e-5, 5e-3, log=True))

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        k = self.gralora_k
        self.require(k > 0, f"gralora_k={k}", "1 block or more")
        self.require(self.r > 0 and self.r % k == 0, f"r={self.r}", f"a multiple of gralora_k={k}")
        self.require(self.hybrid_r >= 0, f"hybrid_r={self.hybrid_r}", "0 or more")
        self.check_chance("gralora_dropout")
        self.check_bias()
        found = self.find_fitting(place.base)
        for path, module in found:
            n_in, n_out = features(module)
            expected = f"a divisor of {math.gcd(n_in, n_out)}, for {n_in} inputs and {n_out} outputs"
            self.require(n_in % k == 0 and n_out % k == 0, f"gralora_k={k} for {path}", expected)
            yield path, GridDelta(module, self)
        yield from self.biases(place.base, [path for path, _ in found])
