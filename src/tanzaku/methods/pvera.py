"""PVeRA: VeRA whose hidden numbers are drawn in training, with a mean and a variance of their own for each token.

    y = W x + b * B z,  z = m + exp(v / 2) * e,  m = d_m * (A_m x),  v = d_v * (A_v x),  e ~ N(0, 1)

A_m, A_v and B are random and shared by all layers, and b = 0 at first. Outside of training z is its mean m: the same
as VeRA of A_m and B.

Fillioux et al. 2025, arXiv 2512.07703.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place
from tanzaku.core.shared import Frozen
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.methods.vera import VectorBased, VectorDelta


class PVeraDelta(VectorDelta):
    """`pvera_lambda_d` (2 r,), factors of the means and then of the logarithms of the variances, and `pvera_lambda_b`
    (out,)."""

    def __init__(self, module: nn.Module, method: PVeRA, projection: Frozen):
        super().__init__(module, method, projection)
        self.dropout = method.pvera_dropout

    def rows(self, module: nn.Module) -> int:
        return 2 * self.r if module.training else self.r

    def hidden(self, h: Tensor) -> Tensor:
        if h.shape[-1] == self.r:
            return h
        mean, log_variance = h.chunk(2, dim=-1)
        deviation = (0.5 * log_variance).exp()
        return mean + deviation * torch.randn_like(deviation)


@dataclass
class PVeRA(VectorBased):
    """Probabilistic vector-based random matrix adaptation.

    Args:
        r, projection_prng_key, save_projection, d_initial, init_weights, fan_in_fan_out: see :class:`VectorBased`.
        pvera_dropout: probability of dropping an input of A in training.
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
    draws = True
    halves = 2
    own_biases = "pvera_only"
    learning_rate = 3e-3  # HF PEFT's method comparison (MetaMathQA).
    # Rates as for VeRA; ranks of PEFT's comparison.
    space = spaces(r=Choice((64, 128, 256, 512)), learning_rate=Range(1e-3, 1e-1, log=True))

    pvera_dropout: float = 0.0
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(
            not self.sample_at_inference,
            "sample_at_inference=True",
            "False: what is drawn for a row outside of training would be another each time",
        )
        self.check_chance("pvera_dropout")
        yield from super().build(place)

    def layer(self, module: nn.Module, projection: Frozen) -> PVeraDelta:
        return PVeraDelta(module, self, projection)
