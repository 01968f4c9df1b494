"""DeLoRA: a low-rank change whose size is bounded and learned apart from its direction.

    y = W x + (lambda / r) sum_i b_i a_i^T (n * x) / (|a_i| |b_i|),  n the norms of W's columns,  b = 0 at first

Bini et al. 2025, arXiv 2503.18225.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tanzaku.core.delta import base_matrix, kaiming
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases, pattern
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.models.families import features, weight_of

_LEAST = 1e-4  # a norm to divide by; what starts at zero stays zero


class BoundedDelta(LowRankDelta):
    """`delora_A` (r, in), `delora_B` (out, r), `delora_lambda` (1,), and the frozen `delora_w_norm` (in,)."""

    delora_w_norm: Tensor

    def __init__(self, module: nn.Module, r: int, size: float, dropout: float, init: bool):
        super().__init__()
        self.r, self.dropout = r, dropout
        n_in, n_out = features(module)
        weight = weight_of(module)
        self.delora_A = trainable(r, n_in, like=weight, fill=kaiming)
        self.delora_B = trainable(n_out, r, like=weight, fill=None if init else kaiming)
        self.delora_lambda = trainable(1, like=weight, fill=lambda t: t.fill_(size))
        norms = torch.ones_like(self.delora_A[0]).detach()
        if not norms.is_meta:
            norms.copy_(base_matrix(module).norm(dim=0))
        self.register_buffer("delora_w_norm", norms)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        a, b = self.delora_A, self.delora_B
        sizes = a.norm(dim=1).clamp(min=_LEAST) * b.norm(dim=0).clamp(min=_LEAST)
        return a * self.delora_w_norm.to(a), b * (self.delora_lambda / self.r / sizes)


@dataclass
class DeLoRA(TargetedWithBiases):
    """Decoupled low-rank adaptation.

    Args:
        r: rank of the change. delora_lambda: the bound of its size at first; it is learned.
        module_dropout: probability of dropping an input in training.
        init_weights: True starts with a change of zero, False at random.
        rank_pattern, lambda_pattern: rank or bound for paths that end with the key or match it.
        bias: "none", "all" or "delora_only": which biases are trained too.
    """

    name = "delora"
    peft_type = "DELORA"
    paper = "arXiv 2503.18225"
    summary = "low-rank change of a bounded size"
    about = About(
        where="query and value projections: y + (lambda / r) B diag(1 / |a_i| |b_i|) A (n * x)",
        parameters="r (in + out) + 1 a matrix",
        cost="as LoRA, and norms of its vectors",
        choose="where LoRA is at the mercy of its learning rate, or trains for long",
        limits="wants rates of 10 to 100 times LoRA's",
    )
    by_default = False
    mergeable = True
    own_biases = "delora_only"
    nonzero = ("delora_lambda",)
    learning_rate = 1e-3  # HF PEFT's method comparison (MetaMathQA, rank 32).
    # PEFT's notes: 1e-3 to 1e-2, and beyond.
    space = spaces(r=Choice((4, 8, 16, 32)), learning_rate=Range(5e-4, 5e-2, log=True))

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.check_chance("module_dropout")
        self.check_bias()
        found = self.find_fitting(place.base)
        self.check_patterns(found, self.rank_pattern, self.lambda_pattern)
        for path, module in found:
            r = int(pattern(self.rank_pattern, path, self.r))
            self.require(r > 0, f"r={r} for {path}", "a rank of 1 or more")
            size = float(pattern(self.lambda_pattern, path, self.delora_lambda))
            yield path, BoundedDelta(module, r, size, self.module_dropout, self.init_weights)
        yield from self.biases(place.base, [path for path, _ in found])
