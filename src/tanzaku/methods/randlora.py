"""RandLoRA: a change of full rank, a sum of frozen random products of low rank, whose scales are trained.

    y = W x + (alpha / r) sum_j B_j diag(lambda_j) A diag(gamma_j) x,  A, B_j random and shared,  lambda = 0 at first

Albert et al. 2025, arXiv 2502.00987.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.shared import Frozen, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.methods.vera import beside, largest
from tanzaku.models.families import features, weight_of
from tanzaku.support.refs import Ref


class RandomBases(LowRankDelta):
    """`randlora_lambda` (r, bases) and `randlora_gamma` (bases, min(in, out))."""

    def __init__(self, module: nn.Module, method: RandLoRA, projection: Frozen):
        super().__init__()
        self.projection, self.dropout = Ref(projection), method.randlora_dropout
        self.scaling = method.randlora_alpha / method.r
        self.n_in, self.n_out = features(module)
        few, weight = min(self.n_in, self.n_out), weight_of(module)
        bases = -(-few // method.r)
        self.r = bases * method.r
        start = 1 / max(bases, few) if method.init_weights else 1 / max(self.n_in, self.n_out)
        self.randlora_lambda = trainable(
            method.r, bases, like=weight, fill=None if method.init_weights else nn.init.normal_
        )
        self.randlora_gamma = trainable(bases, few, like=weight, fill=lambda t: t.fill_(start))

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """(A, B), of which lambda scales what A makes of a token: that has fewer numbers than A."""
        gamma = self.randlora_gamma
        shared = reached(self.projection).value()
        bases, few = gamma.shape
        a = shared["randlora_A"][:, :, :few].to(gamma)
        b = shared["randlora_B"][: max(self.n_in, self.n_out), :bases].to(gamma)
        # (rows of A, bases) beside (bases, columns of B): the order in which HF PEFT pairs them, too.
        first, second = (a * gamma).flatten(0, 1), b.flatten(1)
        return (first, second) if few == self.n_in else (second.t(), first.t())

    def hidden(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return super().hidden(module, x, a) * self.randlora_lambda.flatten()

    def delta(self, module: nn.Module) -> Tensor:
        a, b = self.matrices(module)
        return b @ (self.randlora_lambda.flatten()[:, None] * a) * self.scaling

    def batch_key(self, module: nn.Module) -> None:
        # Put together, matrices as large as the module's take longer than products with them one by one.
        return None


def bases(method: RandLoRA, n_in: int, n_out: int) -> dict[str, Tensor]:
    """`randlora_A` (r, 1, few) and `randlora_B` (many, bases, r), of deviation 1, as HF PEFT draws them."""
    few, many, r = min(n_in, n_out), max(n_in, n_out), method.r
    number = -(-few // r)
    generator = torch.Generator().manual_seed(method.projection_prng_key)
    if method.sparse or method.very_sparse:
        share = 1 / (2 * (math.sqrt(few) if method.very_sparse else 3))
        drawn = [torch.rand(size, generator=generator) for size in ((r, 1, few), (many, number, r))]
        a, b = ((each > 1 - share).float() - (each < share).float() for each in drawn)
    else:

        def uniform(*size: int) -> Tensor:
            most = 1 / math.sqrt(size[1] * size[2])
            return torch.empty(size, dtype=torch.bfloat16).uniform_(-most, most, generator=generator)

        a, b = uniform(r, 1, few), torch.cat([uniform(many, 1, r) for _ in range(number)], dim=1)
    return {"randlora_A": a / a.std(), "randlora_B": b / b.std()}


@dataclass
class RandLoRA(TargetedWithBiases):
    """Full-rank adaptation by random bases.

    Args:
        r: rank of each base; smaller ones take more bases and more numbers.
        randlora_alpha: the change is scaled by randlora_alpha / r.
        projection_prng_key: seed of the random matrices. save_projection: keep them in files, too; without, whoever
            reads one draws them again, and must have the same torch.
        sparse, very_sparse: matrices of zeros and of ones with either sign, a third of them, or few, not zero.
        randlora_dropout: probability of dropping an input in training.
        init_weights: True starts with a change of zero, False at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "randlora_only": which biases are trained too.
    """

    name = "randlora"
    peft_type = "RANDLORA"
    paper = "arXiv 2502.00987"
    summary = "scales of random low-rank matrices that add up to full rank"
    about = About(
        where="query and value projections: y + (alpha / r) sum_j B_j diag(lambda_j) A diag(gamma_j) x",
        parameters="n (r + min(in, out)) a matrix, n = min(in, out) / r, rounded up",
        cost="two products of the matrix's smaller side",
        choose="where LoRA's rank is too low, at LoRA's number of parameters",
        limits="slower than LoRA; files hold the random matrices unless save_projection=False",
    )
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    repeats = ("randlora_A", "randlora_B")
    own_biases = "randlora_only"
    nonzero = ("randlora_alpha",)
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, rank 32), whose default it takes.
    # Two decades above PEFT's rate; ranks up to its default, of which smaller ones have more numbers.
    space = spaces(r=Choice((8, 16, 32)), learning_rate=Range(5e-5, 1e-2, log=True))

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "a rank of 1 or more")
        self.check_chance("randlora_dropout")
        self.check_seed("projection_prng_key")
        self.check_bias()
        found = self.find_fitting(place.base)
        like = weight_of(found[0][1])
        drawn = {name: beside(like, tensor) for name, tensor in bases(self, *largest(found)).items()}
        projection = Frozen(drawn, self.save_projection)
        yield "", projection
        for path, module in found:
            yield path, RandomBases(module, self, projection)
        yield from self.biases(place.base, [path for path, _ in found])
