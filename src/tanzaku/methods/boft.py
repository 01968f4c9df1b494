"""BOFT: a module's input is turned by a product of sparse orthogonal matrices, laid out as a butterfly, and its output
scaled.

    y = s * (W (R_1 ... R_m x)),  each R_i orthogonal in blocks of features that lie 2^i blocks apart,
    all the identity at first

Liu et al. 2023, arXiv 2311.06243.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tanzaku.core.delta import lies_turned
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.routing import in_equal_shares
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.turning import TurnedInput, blockwise, cayley, some_left_out
from tanzaku.models.families import features, weight_of


class Butterfly(TurnedInput):
    """`boft_R` (factors, blocks, size, size), of which the skew-symmetric part counts, and `boft_s` (out, 1)."""

    edits_output = True

    def __init__(self, module: nn.Module, factors: int, size: int, p: float, init: bool):
        super().__init__()
        n_in, n_out = features(module)
        weight, blocks = weight_of(module), n_in // size
        self.p = p
        self.orders = [order(n_in, blocks // 2**i, size // 2, factors) for i in range(factors)]
        turn = None if init else partial(nn.init.normal_, std=0.1)
        scale = nn.init.ones_ if init else partial(nn.init.normal_, mean=1.0, std=0.1)
        self.boft_R = trainable(factors, blocks, size, size, like=weight, fill=turn)
        self.boft_s = trainable(n_out, 1, like=weight, fill=scale)

    def alike(self) -> Hashable:
        return self.boft_R.shape

    @staticmethod
    def turn(layers: Sequence[Butterfly], x: Tensor, p: float) -> Tensor:
        numbers = torch.stack([layer.boft_R.to(x.dtype) for layer in layers])
        blocks = some_left_out(cayley(0.5 * (numbers - numbers.mT)), p)
        for own, places in zip(reversed(blocks.unbind(1)), reversed(layers[0].orders), strict=True):
            if places is None:
                x = blockwise(x, own)
            else:
                there = torch.tensor(places, device=x.device)
                x = blockwise(x[..., there.argsort()], own)[..., there]
        return x

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.batched_outputs([self], (len(y),), module, x, y)

    @staticmethod
    def batched_outputs(
        layers: Sequence[Butterfly], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        bias = module._parameters.get("bias")
        scale = torch.stack([layer.boft_s.flatten() for layer in layers])[:, None]

        def scaled(y: Tensor) -> Tensor:
            each = y.reshape(len(layers), -1, y.shape[-1])
            each = each * scale if bias is None else (each - bias) * scale + bias
            return each.view(y.shape).to(y.dtype)

        return in_equal_shares(sizes, scaled, y)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        merged = super().merged(module)
        assert merged is not None
        return {"weight": merged["weight"] * (self.boft_s.t() if lies_turned(module) else self.boft_s)}


def order(size: int, blocks: int, half: int, factors: int) -> list[int] | None:
    """Where a factor's blocks take their features from: within each of so many spans of the features, every other piece
    of `half` features first, and then the others. None: in order."""
    if factors == 1:
        return None
    span = size // blocks
    pieces = span // half
    first = [*range(0, pieces, 2), *range(1, pieces, 2)]
    within = [piece * half + at for piece in first for at in range(half)]
    return [start + at for start in range(0, size, span) for at in within]


@dataclass
class BOFT(TargetedWithBiases):
    """Orthogonal butterfly.

    Args:
        boft_block_size: of a block, or 0. boft_block_num: number of blocks, or 0. One of the two is given, and divides
            the module's input.
        boft_n_butterfly_factor: sparse factors of the rotation; more than one mixes features of several blocks, and
            takes a number of blocks that is a multiple of 2^(factors - 1), each of an even size.
        boft_dropout: probability of a block to be left out (the identity) for a pass in training.
        init_weights: True starts with the identity, False at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "boft_only": which biases are trained too.
    """

    name = "boft"
    peft_type = "BOFT"
    paper = "arXiv 2311.06243"
    summary = "a butterfly of small rotations of a module's input, and a scale of its output"
    about = About(
        where="query and value projections: y = s * (W (R x)), R orthogonal, a product of sparse factors",
        parameters="factors in block + out a matrix",
        cost="a product of block size for each factor, and an inverse of each block",
        choose="as OFT, where smaller blocks should reach across all features",
        limits="slower than LoRA; HF PEFT computes more than one factor on GPUs alone",
    )
    by_default = False
    mergeable = True
    own_biases = "boft_only"
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA), whose default it takes.
    # A decade and a half above PEFT's rate; blocks around its default of 4.
    space = spaces(boft_block_size=Choice((2, 4, 8)), learning_rate=Range(5e-5, 5e-3, log=True))

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        size, number, factors = self.boft_block_size, self.boft_block_num, self.boft_n_butterfly_factor
        given = f"boft_block_size={size} and boft_block_num={number}"
        self.require(min(size, number) == 0 < max(size, number), given, "one of the two, and 0 for the other")
        self.require(0 < factors < 32, f"boft_n_butterfly_factor={factors}", "1 or more")
        self.check_chance("boft_dropout")
        self.check_bias()
        found = self.find_fitting(place.base)
        for path, module in found:
            n_in, _ = features(module)
            self.require(n_in % (size or number) == 0, given, f"a divisor of the {n_in} inputs of {path}")
            own = size or n_in // number
            blocks = n_in // own
            if factors > 1:
                found_here = f"{blocks} blocks of {own} for {path}"
                ok = own % 2 == 0 and blocks % 2 ** (factors - 1) == 0
                expected = f"blocks of an even size, and a multiple of {2 ** (factors - 1)} of them"
                self.require(ok, found_here, f"{expected} for boft_n_butterfly_factor={factors}")
            yield path, Butterfly(module, factors, own, self.boft_dropout, self.init_weights)
        yield from self.biases(place.base, [path for path, _ in found])
