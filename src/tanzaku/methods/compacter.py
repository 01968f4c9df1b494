"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products, of which one factor is all layers' own.

    W = sum_i A_i (x) (s_i t_i),  A (n, n, n) shared by all layers, s_i (in / n, rank) and t_i (rank, out / n) of each

Karimi Mahabadi et al. 2021, arXiv 2106.04647. Compacter++ has one adapter a layer, behind the feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.shared import Shared
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.methods.bottleneck import BottleneckAdapter, BottleneckLayer, without_inert
from tanzaku.models.families import weight_of
from tanzaku.support.refs import Ref


class Rule(Shared):
    """A, the factors (n, n, n) that all layers share."""

    place = "rule"
    hub = "shared_parameters"

    def __init__(self, n: int, like: Tensor):
        super().__init__()
        self.phm_rule = trainable(n, n, n, like=like)

    def compute(self) -> Tensor:
        return self.phm_rule


class KroneckerProjection(nn.Module):
    """x H + b, H = sum_i A_i (x) W_i, (in, out); W_i are products of two of low rank, or whole."""

    def __init__(self, how: Compacter, n_in: int, n_out: int, like: Tensor):
        super().__init__()
        n = how.phm_dim
        self.n_in, self.n_out = n_in, n_out
        self.rule: Ref[Rule] = Ref(how._rule)
        self.phm_rule = None if how._rule is not None else trainable(n, n, n, like=like)
        self.W_left = self.W_right = self.W = None
        if how.factorized_phm_W:
            self.W_left = trainable(n, n_in // n, how.phm_rank, like=like)
            self.W_right = trainable(n, how.phm_rank, n_out // n, like=like)
        else:
            self.W = trainable(n, n_in // n, n_out // n, like=like)
        self.b = trainable(n_out, like=like) if how.phm_bias else None

    def matrix(self) -> Tensor:
        """(in, out)."""
        shared = self.rule()
        rule = self.phm_rule if shared is None else shared.value()
        own = self.W if self.W_left is None else torch.bmm(self.W_left, cast(Tensor, self.W_right))
        return torch.einsum("nab,ncd->acbd", rule, own).reshape(self.n_in, self.n_out)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix()
        return y if self.b is None else y + self.b


STYLES: dict[str, dict[str, Any]] = {
    "compacter": {"mh_adapter": True, "original_ln_before": False},
    "compacter++": {"mh_adapter": False, "original_ln_before": True},
}


@dataclass
class Compacter(BottleneckAdapter):
    """Compacter and Compacter++.

    Args:
        style: "compacter", after attention and feed-forward, or "compacter++", after feed-forward alone.
        phm_dim: n, which divides the layer's width; the bottleneck's is the next multiple. phm_rank: of s_i t_i.
        shared_phm_rule: A is one for all layers; False: each matrix has its own. learn_phm: it is trained.
        factorized_phm_W: s_i t_i; False: a whole matrix in their place.
        phm_bias: b. phm_c_init, phm_init_range: A is drawn "normal" with this deviation, or "uniform" in (-1, 1).
        hypercomplex_nonlinearity: how s_i and t_i are drawn: "glorot-uniform", "glorot-normal", or "normal" with
            phm_init_range.
        mh_adapter, cross_adapter, output_adapter, reduction_factor, non_linearity, original_ln_before,
        original_ln_after, ln_before, ln_after, residual_before_ln, adapter_residual_before_ln, is_parallel, scaling,
        use_gating, dropout, leave_out, drop_layers: as of :class:`BottleneckAdapter`.
        init_weights: kept for that library's files.
    """

    name = "compacter"
    peft_type = "COMPACTER"
    paper = "arXiv 2106.04647"
    summary = "bottleneck adapters of Kronecker products that share a factor"
    about = About(
        where="what attention and the feed-forward of each layer add to the residual stream",
        parameters="n^3 + adapters * (2 * rank * (width + bottleneck) + width + bottleneck)",
        cost="as a bottleneck, and products that make its matrices",
        choose="for adapters of a bottleneck's kind with few numbers",
        limits="starts slowly, with products of very small numbers; cannot be merged",
    )
    # The paper's own for T5, found among 3e-2, 3e-3, 3e-4 and 3e-5.
    learning_rate = 3e-3
    # The paper's reduction of 32, and more room; its learning rates.
    space = spaces(reduction_factor=Choice((8, 32)), learning_rate=Range(3e-4, 3e-2, log=True))

    styles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        style: {"non_linearity": "gelu", "reduction_factor": 32, **more} for style, more in STYLES.items()
    }

    style: str = "compacter"
    phm_dim: int = 4
    phm_rank: int = 1
    phm_bias: bool = True
    phm_c_init: str = "normal"
    phm_init_range: float = 1e-4
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    shared_phm_rule: bool = True
    factorized_phm_W: bool = True

    _rule = cast("Rule | None", None)

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if config.get("architecture") is not None or not config.get("phm_layer"):
            return None
        none = {"phm_layer": True, "factorized_phm_rule": False, "shared_W_phm": False}
        given = {key: value for key, value in config.items() if key not in none or value != none[key]}
        return without_inert(given)

    def to_hub(self) -> dict[str, Any] | None:
        settings = super().to_hub()
        assert settings is not None
        return {**settings, "phm_layer": True}

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.phm_dim > 0, f"phm_dim={self.phm_dim}", "1 or more")
        self.require(self.phm_init_range > 0, f"phm_init_range={self.phm_init_range}", "above 0")
        self.require(self.phm_rank > 0, f"phm_rank={self.phm_rank}", "1 or more")
        self.require(self.phm_c_init in _RULES, f"phm_c_init={self.phm_c_init!r}", " or ".join(map(repr, _RULES)))
        drawn = self.hypercomplex_nonlinearity
        self.require(drawn in _DRAWN, f"hypercomplex_nonlinearity={drawn!r}", " or ".join(map(repr, _DRAWN)))
        self._rule = None
        if self.shared_phm_rule:
            out = place.base.model.get_submodule(place.base.sublayers()[0].out)
            self._rule = Rule(self.phm_dim, weight_of(out))
            self._draw_rule(self._rule.phm_rule)
            yield "", self._rule
        try:
            yield from super().build(place)
        finally:
            self._rule = None

    def width(self, number: int, size: int) -> int:
        return -(-super().width(number, size) // self.phm_dim) * self.phm_dim

    def projection(self, n_in: int, n_out: int, like: Tensor) -> nn.Module:
        n = self.phm_dim
        self.require(
            n_in % n == 0 and n_out % n == 0,
            f"phm_dim={n} for a matrix {n_in} x {n_out}",
            "a divisor of both its sides",
        )
        return KroneckerProjection(self, n_in, n_out, like)

    def _draw_rule(self, rule: nn.Parameter) -> None:
        rule.requires_grad_(self.learn_phm)
        with torch.no_grad():
            if self.phm_c_init == "uniform":
                nn.init.uniform_(rule, -1, 1)
            else:
                nn.init.normal_(rule, std=self.phm_init_range)

    @torch.no_grad()
    def draw(self, layer: BottleneckLayer) -> None:
        for part in (cast(KroneckerProjection, layer.down), cast(KroneckerProjection, layer.up)):
            if part.phm_rule is not None:
                self._draw_rule(part.phm_rule)
            for weight in (part.W_left, part.W_right, part.W):
                for each in () if weight is None else weight:
                    _DRAWN[self.hypercomplex_nonlinearity](each, self.phm_init_range)
        if layer.gate is not None:
            nn.init.normal_(layer.gate.weight, std=0.02)


_RULES = ("normal", "uniform")
_DRAWN: dict[str, Any] = {
    "glorot-uniform": lambda each, _: nn.init.xavier_uniform_(each),
    "glorot-normal": lambda each, _: nn.init.xavier_normal_(each),
    "normal": lambda each, std: nn.init.normal_(each, std=std),
}
