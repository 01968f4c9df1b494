"""HRA: a module's input is reflected at r learned planes, one after another.

    y = W (H_1 ... H_r x),  H_i = I - 2 u_i u_i^T / |u_i|^2,  planes in pairs at first, which undo each other

Yuan et al. 2024, arXiv 2405.17484.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import kaiming
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.turning import TurnedInput
from tanzaku.models.families import features, weight_of


class Reflections(TurnedInput):
    """`hra_u` (in, r), a plane's normal a column."""

    def __init__(self, module: nn.Module, r: int, orthogonal: bool, paired: bool):
        super().__init__()
        self.orthogonal = orthogonal
        n_in, _ = features(module)
        self.hra_u = trainable(n_in, r, like=weight_of(module), fill=_in_pairs if paired else kaiming)

    def alike(self) -> Hashable:
        return (self.orthogonal, self.hra_u.shape)

    @staticmethod
    def turn(layers: Sequence[Reflections], x: Tensor, p: float) -> Tensor:
        # r reflections are one change of rank r, I - U T U^T (the compact WY form): two products instead of 2 r.
        u: Tensor = torch.stack([layer.hra_u.to(x.dtype) for layer in layers])
        if layers[0].orthogonal:
            u = torch.linalg.qr(u)[0]
            return x - 2 * (x @ u) @ u.mT
        u = F.normalize(u, dim=1)
        r = u.shape[2]
        # T is the inverse of a triangular matrix, half of the identity with U^T U above it.
        inverse = torch.triu(u.mT @ u, 1) + 0.5 * torch.eye(r, dtype=u.dtype, device=u.device)
        within: Tensor = torch.linalg.solve_triangular(inverse, u.mT, upper=True)  # T U^T
        return x - x @ within.mT @ u.mT


def _in_pairs(t: Tensor) -> Any:
    half = kaiming(t.new_empty(t.shape[0], t.shape[1] // 2))
    return t.copy_(half.repeat_interleave(2, dim=1))


@dataclass
class HRA(TargetedWithBiases):
    """Householder reflection adaptation.

    Args:
        r: number of reflections. An even number starts as the identity, an odd one at random.
        apply_GS: make the planes orthogonal to each other (by Gram and Schmidt); starts at random, since planes in
            pairs cannot be.
        init_weights: True starts with planes in pairs, which change nothing, False at random.
        bias: "none", "all" or "hra_only": which biases are trained too.
    """

    name = "hra"
    peft_type = "HRA"
    paper = "arXiv 2405.17484"
    summary = "reflections of a module's input"
    about = About(
        where="query and value projections: y = W (H_1 ... H_r x)",
        parameters="r in a matrix",
        cost="two products of rank r a matrix",
        choose="between LoRA and OFT: few numbers, and angles between features stay",
        limits="does not scale: what wants larger or smaller weights it cannot do",
    )
    by_default = False
    mergeable = True
    own_biases = "hra_only"
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, rank 32), whose default it takes.
    # Two decades above PEFT's rate, since lengths cannot grow; numbers around its default of 8.
    space = spaces(r=Choice((2, 4, 8, 16, 32)), learning_rate=Range(5e-5, 1e-2, log=True))

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "1 reflection or more")
        self.check_bias()
        found = self.find_fitting(place.base)
        paired = self.init_weights and self.r % 2 == 0 and not self.apply_GS
        for path, module in found:
            n_in, _ = features(module)
            self.require(not self.apply_GS or self.r <= n_in, f"r={self.r} for {path}", f"{n_in} or less with apply_GS")
            yield path, Reflections(module, self.r, self.apply_GS, paired)
        yield from self.biases(place.base, [path for path, _ in found])
