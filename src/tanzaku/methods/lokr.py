"""LoKr: the Kronecker product of two small matrices, of which the larger may be of low rank.

    y = W x + (alpha / r) (W1 (x) W2) x,  W1 = 0 at first

Yeh et al. 2023, arXiv 2309.14859; earlier, as KronA, Edalati et al. 2022, arXiv 2212.10650.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tanzaku.core.delta import kaiming, shape_of
from tanzaku.core.method import About, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.methods.lycoris import Lycoris, LycorisDelta, from_core, has_core
from tanzaku.models.families import weight_of


def divided(size: int, factor: int) -> tuple[int, int]:
    """(m, n), m n = size: m is `factor` where it divides the size; else the largest divisor that neither n nor a
    positive factor is below."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor <= 0 else min(math.isqrt(size), factor)
    m = next(m for m in range(most, 0, -1) if size % m == 0)
    return m, size // m


class KroneckerDelta(LycorisDelta):
    """W1 is `lokr_w1`, or `lokr_w1_a lokr_w1_b` of rank r; W2 is `lokr_w2`, or `lokr_w2_a lokr_w2_b`, or these around
    a core `lokr_t2` for the kernel."""

    def __init__(self, module: nn.Module, r: int, method: LoKr):
        super().__init__()
        n_out, n_in, *kernel = self.shape = shape_of(module)
        weight, init = weight_of(module), method.init_weights
        (a, b), (c, d) = divided(n_out, method.decompose_factor), divided(n_in, method.decompose_factor)
        self.inner = (a, b, c, d)
        self.rescaled = method.rank_dropout_scale
        self.whole = (not (method.decompose_both and r < max(a, c) / 2), r >= max(b, d) / 2)
        self.core = has_core(module, method.use_effective_conv2d) and not self.whole[1]

        def made(*size: int, fill: Callable[[Tensor], Any] | None = kaiming) -> nn.Parameter:
            return trainable(*size, like=weight, fill=fill)

        # One factor of the product is zero at first: the first, or in LyCORIS' own way the second.
        first, second = None if init is True else kaiming, None if init == "lycoris" else kaiming
        if self.whole[0]:
            self.lokr_w1 = made(a, c, fill=first)
        else:
            self.lokr_w1_a, self.lokr_w1_b = made(a, r, fill=first), made(r, c)
        if self.whole[1]:
            self.lokr_w2 = made(b, d, *kernel, fill=second)
        elif self.core:
            self.lokr_t2 = made(r, r, *kernel)
            self.lokr_w2_a, self.lokr_w2_b = made(r, b), made(r, d, fill=second)
        else:
            self.lokr_w2_a, self.lokr_w2_b = made(b, r), made(r, d * math.prod(kernel), fill=second)

    def factors_of(self) -> tuple[Tensor, Tensor]:
        """W1 (a, c) and W2 (b, d, *kernel)."""
        _, b, _, d = self.inner
        w1 = self.lokr_w1 if self.whole[0] else self.lokr_w1_a @ self.lokr_w1_b
        if self.whole[1]:
            return w1, self.lokr_w2
        if self.core:
            return w1, from_core(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        return w1, (self.lokr_w2_a @ self.lokr_w2_b).view(b, d, *self.shape[2:])

    def delta(self, module: nn.Module) -> Tensor:
        w1, w2 = self.factors_of()
        return torch.kron(w1.view(*w1.shape, *[1] * len(self.shape[2:])), w2) * self.scaling

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            return super().added(module, x)
        # Never the whole matrix: an input, seen as a matrix (c, d), has a small matrix on either side.
        w1, w2 = self.factors_of()
        _, _, c, d = self.inner
        hidden = torch.unflatten(x.to(w1.dtype), -1, (c, d)) @ w2.t()
        change: Tensor = (w1 @ hidden).flatten(-2) * self.scaling
        return change * kept if (kept := self.kept(module, change)) is not None else change


@dataclass
class LoKr(Lycoris):
    """Low-rank Kronecker product.

    Args:
        r, alpha, dropout, use_effective_conv2d, patterns: see :class:`Lycoris`.
        decompose_both: give the smaller matrix a low rank too. decompose_factor: its size, or -1 for two as near to
            square as they can be.
        rank_dropout_scale: scale up what rank_dropout leaves.
        init_weights: True starts with W1 = 0, "lycoris" with W2 = 0, False with a change at random.
    """

    name = "lokr"
    peft_type = "LOKR"
    paper = "arXiv 2309.14859"
    summary = "Kronecker product of two small matrices"
    about = About(
        where="query and value projections: y + (alpha / r) (W1 (x) W2) x",
        parameters="about sqrt(in out) + 2 r sqrt(max(in, out)) a matrix",
        cost="two products, of matrices of the size of the roots",
        choose="for the smallest files with a change of full rank",
        limits="all blocks of the change are multiples of one",
    )
    by_default = False
    mergeable = True
    nonzero = ("alpha",)
    learning_rate = 3e-3  # HF PEFT's method comparison (MetaMathQA, rank 32, factor 4).
    # A decade around PEFT's rate; the rank of the larger factor.
    space = spaces(r=Choice((2, 4, 8, 16, 32)), learning_rate=Range(3e-4, 3e-2, log=True))

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def layer(self, module: nn.Module, r: int) -> KroneckerDelta:
        inits = (True, False, "lycoris")
        self.require(self.init_weights in inits, f"init_weights={self.init_weights!r}", "true, false or 'lycoris'")
        found = f"decompose_factor={self.decompose_factor}"
        self.require(self.decompose_factor == -1 or self.decompose_factor > 0, found, "-1, or 1 or more")
        return KroneckerDelta(module, r, self)
