"""OFT: a module's input, cut into blocks, is turned by one orthogonal matrix a block.

    y = W (R x),  R = diag(R_1, ..., R_r),  R_i the Cayley transform of a skew-symmetric matrix, the identity at first

Qiu et al. 2023, arXiv 2306.07280; on the input and with a series for the inverse: Qiu et al. 2025, arXiv 2506.19847.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Attached, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.low_rank import Low
from tanzaku.methods.turning import TurnedInput, blockwise, cayley, some_left_out, unit
from tanzaku.models.families import features, weight_of


class BlockRotation(TurnedInput):
    """`oft_R.weight` (blocks, size (size - 1) / 2) has each skew-symmetric matrix's numbers above the diagonal.

    Args:
        size: of a block. most: the largest norm of all of them, or None. terms: of the series, or None for an inverse.
    """

    def __init__(
        self, module: nn.Module, size: int, shared: bool, most: float | None, terms: int | None, p: float, init: bool
    ):
        super().__init__()
        self.size, self.most, self.terms, self.p = size, most, terms, p
        blocks = 1 if shared else features(module)[0] // size
        fill = None if init else partial(nn.init.normal_, std=0.1)
        self.oft_R = Low(trainable(blocks, size * (size - 1) // 2, like=weight_of(module), fill=fill))

    def within(self) -> Tensor | float:
        """Factors that take each block to the norm that it may have, (blocks, 1)."""
        if self.most is None:
            return 1.0
        numbers = self.oft_R.weight.detach()
        # Each number stands twice in its matrix.
        norm, most = math.sqrt(2) * numbers.norm(dim=1, keepdim=True), self.most / math.sqrt(len(numbers))
        return torch.where(norm <= most, torch.ones_like(norm), most / norm)

    @torch.no_grad()
    def project(self) -> None:
        """Take the parameters to where they may be."""
        self.oft_R.weight.mul_(self.within())

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Those above the diagonals, as a pass uses them."""
        numbers: Tensor = self.oft_R.weight
        if self.most is not None:  # the projection has no gradient, as if it had come after the last step
            numbers = numbers + (numbers * self.within() - numbers).detach()
        return numbers.to(dtype)

    def alike(self) -> Hashable:
        return (self.size, self.terms, self.oft_R.weight.shape)

    @staticmethod
    def turn(layers: Sequence[BlockRotation], x: Tensor, p: float) -> Tensor:
        size, terms = layers[0].size, layers[0].terms
        numbers = torch.stack([layer.numbers(x.dtype) for layer in layers])
        above = numbers.new_zeros(*numbers.shape[:2], size, size)
        rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
        above[..., rows, columns] = numbers
        skew = above - above.mT
        blocks = cayley(skew) if terms is None else neumann(skew, terms)  # as they stand to the right of a row
        return blockwise(x, some_left_out(blocks, p))


def neumann(skew: Tensor, terms: int) -> Tensor:
    """(I + S) (I - S)^-1 by so many terms of the Neumann series of the inverse, as HF PEFT counts and weighs them:
    I + 2 S + 2 S^2 + ... and the last power once."""
    total = unit(skew).expand_as(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to `wanted`, the smaller of two."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))


@dataclass
class OFT(TargetedWithBiases):
    """Orthogonal fine-tuning.

    Args:
        r: number of blocks, or 0. oft_block_size: their size, or 0. One of the two is given; where it does not divide
            the module's input, the nearest divisor is taken.
        module_dropout: probability of a block to be left out (the identity) for a pass in training.
        coft, eps: keep each block within eps / sqrt(blocks) of the identity.
        block_share: one matrix for all blocks of a module.
        use_cayley_neumann, num_cayley_neumann_terms: a series of so many terms in place of an inverse; the matrices are
            then only nearly orthogonal.
        init_weights: True starts with the identity, False at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "oft_only": which biases are trained too.
    """

    name = "oft"
    peft_type = "OFT"
    paper = "arXiv 2306.07280"
    summary = "orthogonal matrices that turn blocks of a module's input"
    about = About(
        where="query and value projections: y = W (R x), R orthogonal in blocks",
        parameters="in (block - 1) / 2 a matrix",
        cost="a product of block size a matrix, and the blocks are made anew",
        choose="to keep what the model knows: angles between its features stay",
        limits="does not scale: what wants larger or smaller weights it cannot do",
    )
    by_default = False
    mergeable = True
    own_biases = "oft_only"
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, 32 blocks).
    # A decade and a half above PEFT's rate; blocks up to its default.
    space = spaces(oft_block_size=Choice((8, 16, 32)), learning_rate=Range(5e-5, 5e-3, log=True))

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        given = f"r={self.r} and oft_block_size={self.oft_block_size}"
        one = min(self.r, self.oft_block_size) == 0 < max(self.r, self.oft_block_size)
        self.require(one, given, "one of the two, and 0 for the other")
        terms = self.num_cayley_neumann_terms
        self.require(1 < terms <= 100, f"num_cayley_neumann_terms={terms}", "2 to 100")
        self.require(self.eps > 0, f"eps={self.eps}", "a number above 0")
        self.check_chance("module_dropout")
        self.check_bias()
        found = self.find_fitting(place.base)
        for path, module in found:
            n_in, _ = features(module)
            divisor = nearest_divisor(n_in, self.r or self.oft_block_size)
            size = n_in // divisor if self.r else divisor
            self.require(size > 1, f"blocks of {size} for {path}", "2 or more: one number cannot be turned")
            yield (
                path,
                BlockRotation(
                    module,
                    size,
                    shared=self.block_share,
                    most=self.eps if self.coft else None,
                    terms=self.num_cayley_neumann_terms if self.use_cayley_neumann else None,
                    p=self.module_dropout,
                    init=self.init_weights,
                ),
            )
        yield from self.biases(place.base, [path for path, _ in found])

    def after_step(self, adapter: Attached, step: int) -> None:
        if self.coft:
            for _, layer in adapter.at():
                if isinstance(layer, BlockRotation):
                    layer.project()
