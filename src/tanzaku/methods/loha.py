"""LoHa: the elementwise product of two low-rank matrices, whose rank may be the square of theirs.

    y = W x + (alpha / r) ((B1 A1) * (B2 A2)) x,  A2 = 0 at first

Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098; as an adapter: Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tanzaku.core.delta import kaiming, shape_of
from tanzaku.core.method import About, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.methods.lycoris import Lycoris, LycorisDelta, from_core, has_core
from tanzaku.models.families import weight_of


class HadamardDelta(LycorisDelta, LowRankDelta):
    """`hada_w1_a`, `hada_w2_a` (out, r) and `hada_w1_b`, `hada_w2_b` (r, in), where in counts a convolution's kernel;
    with cores `hada_t1`, `hada_t2` (r, r, *kernel) the former are (r, out).

    Attributes:
        in_factors: the change is computed as one of rank r * r, and no matrix of (out, in) is made: where that has
            fewer numbers.
    """

    def __init__(self, module: nn.Module, r: int, core: bool, init: bool):
        super().__init__()
        n_out, n_in, *kernel = self.shape = shape_of(module)
        weight = weight_of(module)

        def made(*size: int, fill: Callable[[Tensor], Any] | None = kaiming) -> nn.Parameter:
            return trainable(*size, like=weight, fill=fill)

        self.core, self.r = core, r * r
        self.in_factors = not kernel and self.r * (n_out + n_in) < n_out * n_in
        left, right = ((r, n_out), (r, n_in)) if core else ((n_out, r), (r, n_in * math.prod(kernel)))
        self.hada_w1_a, self.hada_w1_b = made(*left), made(*right)
        self.hada_w2_a, self.hada_w2_b = made(*left), made(*right, fill=None if init else kaiming)
        if core:
            self.hada_t1, self.hada_t2 = made(r, r, *kernel), made(r, r, *kernel)

    def delta(self, module: nn.Module) -> Tensor:
        if self.core:
            first = from_core(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            second = from_core(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        else:
            first, second = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return (first * second * self.scaling).view(self.shape)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """(r * r, in) and (out, r * r): every row, or column, of one factor times every one of the other's (the
        Khatri-Rao product), since sum_k b_ik a_kj * sum_l d_il c_lj = sum_kl (b_ik d_il) (a_kj c_lj)."""
        a = (self.hada_w1_b[:, None] * self.hada_w2_b).flatten(0, 1)
        b = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)
        return a, b

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        layer = LowRankDelta if self._in_factors(module) else LycorisDelta
        return layer.outputs(self, module, x, y)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        return super().batch_key(module) if self._in_factors(module) else None

    def _in_factors(self, module: nn.Module) -> bool:
        # What is left out is left out of the whole change.
        return self.in_factors and not (module.training and (self.rank_dropout or self.module_dropout))


@dataclass
class LoHa(Lycoris):
    """Low-rank Hadamard product.

    Args:
        r, alpha, dropout, use_effective_conv2d, patterns: see :class:`Lycoris`.
        init_weights: True starts with a change of zero, False with one at random.
    """

    name = "loha"
    peft_type = "LOHA"
    paper = "arXiv 2108.06098"
    summary = "elementwise product of two low-rank changes"
    about = About(
        where="query and value projections: y + (alpha / r) ((B1 A1) * (B2 A2)) x",
        parameters="2 r (in + out) a matrix",
        cost="as lora of rank r * r, or, where that is more, the whole change of each matrix and a product with it",
        choose="for a change of rank up to r * r from few numbers, as image models are tuned",
        limits="where r * r (in + out) is above in * out, as slow as training full matrices",
    )
    by_default = False
    mergeable = True
    nonzero = ("alpha",)
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, rank 32).
    # As for LoRA's ranks, around PEFT's rate: a product of four factors moves slower than one of two.
    space = spaces(r=Choice((2, 4, 8, 16, 32)), learning_rate=Range(5e-5, 5e-3, log=True))

    init_weights: bool = True

    def layer(self, module: nn.Module, r: int) -> HadamardDelta:
        return HadamardDelta(module, r, has_core(module, self.use_effective_conv2d), self.init_weights)
