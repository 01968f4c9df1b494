"""LoRA-XS: a small matrix between frozen factors of the weight's own singular vectors.

    y = W x + (alpha / r) U S R V^T x,  U, S, V the r largest of W,  R in R^{r x r}, 0 at first

Bałazy et al. 2024, arXiv 2405.17604, who draw R with a deviation of 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tanzaku.core.delta import base_matrix
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedInLayers
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.models.families import features, weight_of


class CoreDelta(LowRankDelta):
    """`lora_xs_R` (r, r), between the frozen `lora_xs_A` (r, in) and `lora_xs_B` (out, r), which files hold: on another
    machine singular vectors may come out with other signs."""

    lora_xs_A: Tensor
    lora_xs_B: Tensor

    def __init__(self, module: nn.Module, r: int, scaling: float, dropout: float, to_fill: bool):
        super().__init__()
        self.r, self.scaling, self.dropout = r, scaling, dropout
        n_in, n_out = features(module)
        weight = weight_of(module)
        self.lora_xs_R = trainable(r, r, like=weight)
        down, up = self.lora_xs_R.detach().new_zeros(r, n_in), self.lora_xs_R.detach().new_zeros(n_out, r)
        if not (to_fill or down.is_meta):
            u, s, v = largest_singular(base_matrix(module), r)
            down.copy_(v)
            up.copy_(u * s)
        self.register_buffer("lora_xs_A", down)
        self.register_buffer("lora_xs_B", up)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        core = self.lora_xs_R
        return core @ self.lora_xs_A.to(core), self.lora_xs_B.to(core)


def largest_singular(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) and V^T (r, in) of the r largest singular values."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :r], s[:r], v[:r]


@dataclass
class LoRAXS(TargetedInLayers):
    """LoRA of extremely few parameters.

    Args:
        r: side of the trained matrix; r * r numbers a module, whatever its size.
        lora_alpha: the change is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input in training.
    """

    name = "lora_xs"
    peft_type = "LORA_XS"
    paper = "arXiv 2405.17604"
    summary = "a small matrix between the weight's own singular vectors"
    about = About(
        where="query and value projections: y + (alpha / r) U S R V^T x",
        parameters="r r a matrix, whatever its size",
        cost="as LoRA; a singular value decomposition of each matrix at the start",
        choose="for very few trained numbers, with one frozen frame for many adapters",
        limits="changes only what W's largest directions read and write; takes long to attach to large models",
    )
    in_peft = False
    by_default = False
    mergeable = True
    nonzero = ("lora_alpha",)
    learning_rate = 1e-3  # HF PEFT's for TinyLoRA in its method comparison, which has the same frame.
    # A decade and more around it; more singular values not every matrix has.
    space = spaces(r=Choice((4, 8, 16)), learning_rate=Range(1e-4, 4e-2, log=True))

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.check_chance("lora_dropout")
        for path, module in self.find_fitting(place.base):
            most = min(features(module))
            self.require(0 < self.r <= most, f"r={self.r} for {path}", f"1 to its {most} singular values")
            yield path, CoreDelta(module, self.r, self.lora_alpha / self.r, self.lora_dropout, self._to_fill)
