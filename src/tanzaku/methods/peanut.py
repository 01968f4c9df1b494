"""PEANuT: a small network reads the weight and writes its change.

    y = W x + scaling D(W)^T x,  D(W) = f(... f(W^T A^T)) B^T, with layers between that mirror each other;  B = 0 first

Zhong et al. 2024, arXiv 2410.01870.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, base_matrix, kaiming
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedInLayers
from tanzaku.methods.low_rank import Low
from tanzaku.methods.parts import activation, activations
from tanzaku.models.families import features, weight_of


class NetworkDelta(WeightDelta):
    """`peanut_A` (r, out) and `peanut_B` (out, r) with `peanut_encoders` and `peanut_decoders` (r, r) between them."""

    reads_weight = True

    def __init__(self, module: nn.Module, method: PEANuT):
        super().__init__()
        n_out, weight, r = features(module)[1], weight_of(module), method.r
        self.scaling, self.activation = method.scaling, method.act_fn
        self.peanut_A = Low(trainable(r, n_out, like=weight, fill=kaiming))
        self.peanut_B = Low(trainable(n_out, r, like=weight, fill=None if method.init_weights else kaiming))
        for name in ("peanut_encoders", "peanut_decoders"):
            layers = (Low(trainable(r, r, like=weight, fill=kaiming)) for _ in range(method.depth))
            self.add_module(name, nn.ModuleList(layers))

    def delta(self, module: nn.Module) -> Tensor:
        act = activation(self.activation)
        a, encoders, decoders = self.peanut_A.weight, self.peanut_encoders, self.peanut_decoders
        hidden: Tensor = act(F.linear(base_matrix(module).t().to(a.dtype), a))
        before = []
        for encoder in encoders:  # type: ignore[union-attr]
            before.append(hidden)
            hidden = act(F.linear(hidden, encoder.weight))
        for decoder in decoders:  # type: ignore[union-attr]
            hidden = act(F.linear(hidden, decoder.weight)) + before.pop()
        return F.linear(hidden, self.peanut_B.weight).t() * self.scaling


@dataclass
class PEANuT(TargetedInLayers):
    """Adaptation by a network that reads the weights.

    Args:
        r: width of the network. depth: layers of it on either side, beside the first and the last.
        act_fn: its activation, by transformers' names. scaling: a factor of the change.
        init_weights: True starts with a change of zero, False at random.
    """

    name = "peanut"
    peft_type = "PEANUT"
    paper = "arXiv 2410.01870"
    summary = "a change that a small network makes of the weight"
    about = About(
        where="query and value projections: y + scaling B f(A W) x",
        parameters="2 r out + 2 depth r^2 a matrix",
        cost="the weight is read, changed and multiplied with, for each adapter of a batch",
        choose="for a change that depends on the weight, beyond low rank in what it reads",
        limits="as slow as training full matrices; more to tune",
    )
    by_default = False
    mergeable = True
    nonzero = ("scaling",)
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, rank 32), whose default it takes.
    # From PEFT's rate up, as LoRA's.
    space = spaces(r=Choice((4, 8, 16, 32)), learning_rate=Range(5e-5, 5e-3, log=True))

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "a width of 1 or more")
        self.require(0 <= self.depth <= 100, f"depth={self.depth}", "0 to 100")
        self.require(
            self.act_fn in activations(), f"act_fn={self.act_fn!r}", "one of transformers', such as 'relu' or 'gelu'"
        )
        for path, module in self.find_fitting(place.base):
            yield path, NetworkDelta(module, self)
