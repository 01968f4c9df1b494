"""VeRA: one pair of frozen random matrices for all layers, of which each learns two vectors of factors.

    y = W x + b * B (d * (A x)),  A, B random and shared,  b = 0 at first

Kopiczko et al. 2023, arXiv 2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place, home, trainable
from tanzaku.core.shared import Frozen, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.models.families import features, weight_of
from tanzaku.support.refs import Ref


class VeraDelta(LowRankDelta):
    """`vera_lambda_d` (r,) and `vera_lambda_b` (out,), factors of the matrices that all layers read a part of."""

    def __init__(self, module: nn.Module, method: VeRA, projection: Frozen):
        super().__init__()
        self.r, self.dropout, self.projection = method.r, method.vera_dropout, Ref(projection)
        self.n_in, n_out = features(module)
        weight, init, start = weight_of(module), method.init_weights, method.d_initial
        # Without init_weights PEFT draws the one and leaves the other at one.
        d = (lambda t: t.fill_(start)) if init else nn.init.normal_
        self.vera_lambda_b = trainable(n_out, like=weight, fill=None if init else nn.init.ones_)
        self.vera_lambda_d = trainable(self.r, like=weight, fill=d)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        shared = reached(self.projection).value()
        d, b = self.vera_lambda_d, self.vera_lambda_b
        return d[:, None] * shared["vera_A"][:, : self.n_in].to(d), b[:, None] * shared["vera_B"][: len(b)].to(b)


def uniform_matrix(*size: int, generator: torch.Generator) -> Tensor:
    """A matrix (out, in) of uniform numbers, of the variance that keeps that of a rectified input (He et al. 2015)."""
    bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(size[1]))
    return torch.empty(*size).uniform_(-bound, bound, generator=generator)


def largest(found: Sequence[tuple[str, nn.Module]]) -> tuple[int, int]:
    """(in, out) of a matrix that each of the modules' fits into."""
    n_in, n_out = zip(*(features(module, path) for path, module in found), strict=True)
    return max(n_in), max(n_out)


def beside(like: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that was drawn on the CPU, where and in the precision in which adapters are made beside `like`."""
    return tensor.to(home(like), like.dtype if like.dtype == torch.float64 else torch.float32)


@dataclass
class VeRA(TargetedWithBiases):
    """Vector-based random matrix adaptation.

    Args:
        r: rank of the random matrices; far above LoRA's, since each adds one number a layer.
        projection_prng_key: their seed. save_projection: keep them in files, too; without, whoever reads one draws
            them again, and must have the same torch.
        vera_dropout: probability of dropping an input of A in training.
        d_initial: what d starts with.
        init_weights: True starts with b = 0, False with a change at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "vera_only": which biases are trained too.
    """

    name = "vera"
    peft_type = "VERA"
    paper = "arXiv 2310.11454"
    summary = "vectors that scale random matrices which all layers share"
    about = About(
        where="query and value projections: y + b * B (d * (A x)), with one random A and B for all",
        parameters="out + r a matrix",
        cost="two products of rank r a matrix; r is large",
        choose="for thousands of adapters, each a few kilobytes without its projection",
        limits="slower than LoRA of like quality, since its rank is higher",
    )
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    targets_by_kind: ClassVar[Any] = {**TargetedWithBiases.targets_by_kind, "phi": ("query", "value")}
    own_biases = "vera_only"
    nonzero = ("d_initial",)
    learning_rate = 1e-3  # HF PEFT's method comparison (MetaMathQA, rank 256).
    # From PEFT's rate up, as its factors are few; ranks around the paper's 256 and 1024.
    space = spaces(r=Choice((64, 256, 1024)), learning_rate=Range(1e-3, 1e-1, log=True))

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "a rank of 1 or more")
        self.check_chance("vera_dropout")
        self.check_seed("projection_prng_key")
        self.check_bias()
        found = self.find_fitting(place.base)
        n_in, n_out = largest(found)
        generator, like = torch.Generator().manual_seed(self.projection_prng_key), weight_of(found[0][1])
        matrices = {
            "vera_A": uniform_matrix(self.r, n_in, generator=generator),
            "vera_B": uniform_matrix(n_out, self.r, generator=generator),
        }
        projection = Frozen({name: beside(like, each) for name, each in matrices.items()}, self.save_projection)
        yield "", projection
        for path, module in found:
            yield path, VeraDelta(module, self, projection)
        yield from self.biases(place.base, [path for path, _ in found])
