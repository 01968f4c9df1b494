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
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, in_full
from tanzaku.core.method import About, AdapterLayer, Place, home, trainable
from tanzaku.core.shared import Frozen, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.models.families import features, weight_of
from tanzaku.support.refs import Ref


class VectorDelta(WeightDelta):
    """`..._lambda_d`, factors of hidden numbers, and `..._lambda_b` (out,), of outputs: what a layer learns beside the
    matrices A and B, of which it reads as many columns and rows as its module has features."""

    def __init__(self, module: nn.Module, method: VectorBased, projection: Frozen):
        super().__init__()
        self.r, self.projection, self.prefix = method.r, Ref(projection), method.name
        self.n_in, self.n_out = features(module)
        weight, init, start = weight_of(module), method.init_weights, method.d_initial
        # Without init_weights PEFT draws the one and leaves the other at one.
        d = (lambda t: t.fill_(start)) if init else nn.init.normal_
        b = trainable(self.n_out, like=weight, fill=None if init else nn.init.ones_)
        self.register_parameter(f"{self.prefix}_lambda_b", b)
        self.register_parameter(f"{self.prefix}_lambda_d", trainable(method.halves * self.r, like=weight, fill=d))

    def learned(self) -> tuple[Tensor, Tensor]:
        """(d, b), the factors of hidden numbers and of outputs."""
        return getattr(self, f"{self.prefix}_lambda_d"), getattr(self, f"{self.prefix}_lambda_b")

    def drawn(self) -> tuple[Tensor, Tensor]:
        """(A, B), a row of A for each of d, and (out, r)."""
        shared, like = reached(self.projection).value(), self.learned()[0]
        a, b = shared[f"{self.prefix}_A"], shared[f"{self.prefix}_B"]
        return a[:, : self.n_in].to(like), b[: self.n_out].to(like)

    def delta(self, module: nn.Module) -> Tensor:
        (a, b), (d, scale) = self.drawn(), self.learned()
        return (scale[:, None] * b) @ (d[: self.r, None] * a[: self.r])

    def rows(self, module: nn.Module) -> int:
        """How many rows of A are read."""
        return self.r

    def hidden(self, h: Tensor) -> Tensor:
        """z, (..., r), of d * (A x), (..., :meth:`rows`)."""
        return h

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        (a, b), (d, scale), rows = self.drawn(), self.learned(), self.rows(module)

        def changed(x: Tensor, y: Tensor) -> Tensor:
            # What is made of tokens is scaled, and not the matrices: those have more numbers, and nobody trains them.
            z = self.hidden(F.linear(self.dropped(module, x, d), a[:rows]) * d[:rows])
            return (y + F.linear(z, b) * scale).to(y.dtype)

        return in_full(changed, d, x, y)


class VeraDelta(VectorDelta):
    """`vera_lambda_d` (r,) and `vera_lambda_b` (out,)."""

    def __init__(self, module: nn.Module, method: VeRA, projection: Frozen):
        super().__init__(module, method, projection)
        self.dropout = method.vera_dropout


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
class VectorBased(TargetedWithBiases):
    """Settings of VeRA and PVeRA.

    Args:
        r: rank of the random matrices; far above LoRA's, since each adds one number a layer.
        projection_prng_key: their seed. save_projection: keep them in files, too; without, whoever reads one draws
            them again, and must have the same torch.
        d_initial: what d starts with.
        init_weights: True starts with b = 0, False with a change at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
    """

    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    targets_by_kind: ClassVar[Any] = {**TargetedWithBiases.targets_by_kind, "phi": ("query", "value")}
    nonzero = ("d_initial",)
    halves: ClassVar[int] = 1  # rows of A for each hidden number

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "a rank of 1 or more")
        self.check_seed("projection_prng_key")
        self.check_bias()
        found = self.find_fitting(place.base)
        n_in, n_out = largest(found)
        generator, like = torch.Generator().manual_seed(self.projection_prng_key), weight_of(found[0][1])
        matrices = {
            f"{self.name}_A": uniform_matrix(self.halves * self.r, n_in, generator=generator),
            f"{self.name}_B": uniform_matrix(n_out, self.r, generator=generator),
        }
        projection = Frozen({name: beside(like, each) for name, each in matrices.items()}, self.save_projection)
        yield "", projection
        for path, module in found:
            yield path, self.layer(module, projection)
        yield from self.biases(place.base, [path for path, _ in found])

    def layer(self, module: nn.Module, projection: Frozen) -> VectorDelta:
        """The adapter layer of one module."""
        raise TypeError(f"{type(self).__name__} defines no layer()")


@dataclass
class VeRA(VectorBased):
    """Vector-based random matrix adaptation.

    Args:
        r, projection_prng_key, save_projection, d_initial, init_weights, fan_in_fan_out: see :class:`VectorBased`.
        vera_dropout: probability of dropping an input of A in training.
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
    own_biases = "vera_only"
    learning_rate = 1e-3  # HF PEFT's method comparison (MetaMathQA, rank 256).
    # From PEFT's rate up, as its factors are few; ranks around the paper's 256 and 1024.
    space = spaces(r=Choice((64, 256, 1024)), learning_rate=Range(1e-3, 1e-1, log=True))

    vera_dropout: float = 0.0

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.check_chance("vera_dropout")
        yield from super().build(place)

    def layer(self, module: nn.Module, projection: Frozen) -> VeraDelta:
        return VeraDelta(module, self, projection)
