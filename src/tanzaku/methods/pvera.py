"""PVeRA: VeRA whose hidden numbers are drawn in training, with a mean and a variance of their own for each token.

    y = W x + b * B z,  z = m + exp(v / 2) * e,  m = d_m * (A_m x),  v = d_v * (A_v x),  e ~ N(0, 1)

A_m, A_v and B are random and shared by all layers, and b = 0 at first. Outside of training z is its mean m: the same
as VeRA of A_m and B.

Fillioux et al. 2025, arXiv 2512.07703.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.shared import Frozen, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.methods.vera import beside, largest, uniform_matrix
from tanzaku.models.families import features, weight_of
from tanzaku.support.refs import Ref


class PVeraDelta(LowRankDelta):
    """`pvera_lambda_d` (2 r,), factors of the means and then of the logarithms of the variances, and `pvera_lambda_b`
    (out,)."""

    def __init__(self, module: nn.Module, method: PVeRA, projection: Frozen):
        super().__init__()
        self.r, self.dropout, self.projection = method.r, method.pvera_dropout, Ref(projection)
        self.n_in, n_out = features(module)
        weight, init, start = weight_of(module), method.init_weights, method.d_initial
        # Without init_weights PEFT draws the one and leaves the other at one.
        d = (lambda t: t.fill_(start)) if init else nn.init.normal_
        self.pvera_lambda_b = trainable(n_out, like=weight, fill=None if init else nn.init.ones_)
        self.pvera_lambda_d = trainable(2 * self.r, like=weight, fill=d)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        b = self.pvera_lambda_b
        shared = reached(self.projection).value()["pvera_B"]
        return self._a(slice(self.r)), b[:, None] * shared[: len(b)].to(b)

    def _a(self, rows: slice) -> Tensor:
        """Rows of A (2 r, in) with their factors."""
        d = self.pvera_lambda_d
        shared: Tensor = reached(self.projection).value()["pvera_A"]
        return d[rows, None] * shared[rows, : self.n_in].to(d)

    def hidden(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        x = self.dropped(module, x, a)
        if not module.training:
            return F.linear(x, a)
        mean, log_variance = F.linear(x, torch.cat([a, self._a(slice(self.r, None))])).chunk(2, dim=-1)
        deviation = (0.5 * log_variance).exp()
        return mean + deviation * torch.randn_like(deviation)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        # Each adapter draws by itself.
        return None if module.training else super().batch_key(module)


@dataclass
class PVeRA(TargetedWithBiases):
    """Probabilistic vector-based random matrix adaptation.

    Args:
        r: rank of the random matrices; far above LoRA's, since each adds two numbers a layer.
        projection_prng_key: their seed. save_projection: keep them in files, too; without, whoever reads one draws
            them again, and must have the same torch.
        pvera_dropout: probability of dropping an input of A in training.
        d_initial: what d starts with.
        init_weights: True starts with b = 0, False with a change at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "pvera_only": which biases are trained too.
        sample_at_inference: False alone, so that what a row gets depends on the row; z is its mean there.
        generator_seed: kept for PEFT's files; a run draws by its own seed, so that jobs can share a step.
    """

    name = "pvera"
    peft_type = "PVERA"
    paper = "arXiv 2512.07703"
    summary = "VeRA whose hidden numbers are drawn in training, around a mean that is learned"
    about = About(
        where="query and value projections: as vera, of numbers drawn around d * (A x) in training",
        parameters="out + 2 r a matrix",
        cost="two products of rank r a matrix and in training a third, of random numbers; r is large",
        choose="in place of vera with few rows: what is drawn keeps it from fitting each of them",
        limits="as vera; steps of training are noisy, and batches that draw are not packed",
    )
    by_default = False
    mergeable = True
    draws = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    targets_by_kind: ClassVar[Any] = {**TargetedWithBiases.targets_by_kind, "phi": ("query", "value")}
    own_biases = "pvera_only"
    nonzero = ("d_initial",)
    learning_rate = 3e-3  # HF PEFT's method comparison (MetaMathQA).
    # Rates as for VeRA; ranks of PEFT's comparison.
    space = spaces(r=Choice((64, 128, 256, 512)), learning_rate=Range(1e-3, 1e-1, log=True))

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "a rank of 1 or more")
        self.require(
            not self.sample_at_inference,
            "sample_at_inference=True",
            "False: what is drawn for a row outside of training would be another each time",
        )
        self.check_chance("pvera_dropout")
        self.check_seed("projection_prng_key")
        self.check_bias()
        found = self.find_fitting(place.base)
        n_in, n_out = largest(found)
        generator, like = torch.Generator().manual_seed(self.projection_prng_key), weight_of(found[0][1])
        matrices = {
            "pvera_A": uniform_matrix(2 * self.r, n_in, generator=generator),
            "pvera_B": uniform_matrix(n_out, self.r, generator=generator),
        }
        projection = Frozen({name: beside(like, each) for name, each in matrices.items()}, self.save_projection)
        yield "", projection
        for path, module in found:
            yield path, PVeraDelta(module, self, projection)
        yield from self.biases(place.base, [path for path, _ in found])
