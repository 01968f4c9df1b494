"""MiSS: one small matrix, repeated along a module's inputs, so that it sees sums of them.

    y = W x + B^T (x_1 + ... + x_n),  x cut into n parts of r numbers,  B in R^{r x out}, 0 at first

Kang et al. 2024 (earlier: Bone), arXiv 2409.15371. With "bat" the change of each block depends on its weight:
W' = W + W B_i + B_i in blocks r x r, which the module's weight is read for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, base_matrix, in_full, kaiming
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.models.families import features, weight_of


class ShardDelta(WeightDelta):
    """`miss_block` (r, out), or (r, mini_r), repeated along the outputs, too."""

    def __init__(self, module: nn.Module, r: int, columns: int, dropout: float, fill: Any):
        super().__init__()
        self.r, self.dropout = r, dropout
        self.n_in, self.n_out = features(module)
        self.miss_block = trainable(r, columns, like=weight_of(module), fill=fill)

    def block(self) -> Tensor:
        """B, (r, out)."""
        return self.miss_block.repeat(1, self.n_out // self.miss_block.shape[1])

    def delta(self, module: nn.Module) -> Tensor:
        return self.block().t().repeat(1, -(-self.n_in // self.r))[:, : self.n_in]

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return in_full(partial(self._changed, module), self.miss_block, x, y)

    def _changed(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = self.dropped(module, x, self.miss_block)
        sums = torch.unflatten(F.pad(x, (0, -self.n_in % self.r)), -1, (-1, self.r)).sum(-2)
        return (y + sums @ self.block()).to(y.dtype)


class BlockAffineDelta(WeightDelta):
    """`miss_block` (out / r, r, r): what each block of the weight, r x r, is multiplied by and added."""

    reads_weight = True

    def __init__(self, module: nn.Module, r: int, fill: Any):
        super().__init__()
        n_out = features(module)[1]
        self.miss_block = trainable(n_out // r, r, r, like=weight_of(module), fill=fill)

    def delta(self, module: nn.Module) -> Tensor:
        weight, r = base_matrix(module), self.miss_block.shape[-1]
        n_out, n_in = weight.shape
        kind = torch.promote_types(self.miss_block.dtype, torch.float32)
        # (in / r, out / r, r, r): a row of blocks of the output has one matrix.
        parts = weight.to(kind).reshape(n_out // r, r, n_in // r, r).permute(2, 0, 1, 3)
        block = self.miss_block.to(kind)
        return (parts @ block + block).permute(1, 2, 0, 3).reshape(weight.shape)


@dataclass
class MiSS(TargetedWithBiases):
    """Matrix shard sharing.

    Args:
        r: rows of the shared matrix.
        miss_dropout: probability of dropping an input in training.
        init_weights: True starts with a change of zero, False at random; "mini" shares mini_r columns among the
            outputs; "bat" makes the change depend on the weight.
        mini_r: columns, with "mini"; they divide the outputs.
        bias: "none", "all" or "miss_only": which biases are trained too.
    """

    name = "miss"
    peft_type = "MISS"
    paper = "arXiv 2409.15371"
    summary = "one small matrix for sums of a module's inputs"
    about = About(
        where="query and value projections: y + B^T (sums of parts of x)",
        parameters="r out a matrix",
        cost="one product of rank r a matrix, and sums",
        choose="in place of LoRA where memory and time are short",
        limits='inputs r apart are seen as one; "bat" is as slow as training full matrices',
    )
    by_default = False
    mergeable = True
    own_biases = "miss_only"
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, r 64), whose default it takes.
    # A decade and a half above PEFT's rate; more rows than that not every matrix has.
    space = spaces(r=Choice((4, 8, 16)), learning_rate=Range(5e-5, 5e-3, log=True))

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        inits, expected = (True, False, "mini", "bat"), "true, false, 'mini' or 'bat'"
        self.require(self.init_weights in inits, f"init_weights={self.init_weights!r}", expected)
        self.require(self.mini_r > 0, f"mini_r={self.mini_r}", "1 or more")
        self.check_chance("miss_dropout")
        self.check_bias()
        fill = kaiming if self.init_weights is False else None
        found = self.find_fitting(place.base)
        for path, module in found:
            n_in, n_out = features(module)
            self.require(0 < self.r <= n_in, f"r={self.r} for {path}", f"1 to its {n_in} inputs")
            if self.init_weights == "bat":
                ok = n_in % self.r == 0 and n_out % self.r == 0
                self.require(ok, f"r={self.r} for {path}", f"a divisor of {math.gcd(n_in, n_out)}, for blocks of r x r")
                yield path, BlockAffineDelta(module, self.r, fill)
                continue
            columns = self.mini_r if self.init_weights == "mini" else n_out
            self.require(n_out % columns == 0, f"mini_r={columns} for {path}", f"a divisor of its {n_out} outputs")
            yield path, ShardDelta(module, self.r, columns, self.miss_dropout, fill)
        yield from self.biases(place.base, [path for path, _ in found])
