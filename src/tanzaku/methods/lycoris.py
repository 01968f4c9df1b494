"""What LoHa and LoKr share: settings, ranks by pattern, and what training leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta
from tanzaku.core.method import AdapterLayer, Place
from tanzaku.core.targeted import TargetedInLayers, pattern


class LycorisDelta(WeightDelta):
    """A change of which training may leave out rows, or all.

    Attributes:
        rank_dropout: probability of leaving an output feature of the change as it was. rescaled: whether the others
            are scaled up for it. module_dropout: probability of leaving out the whole change for one pass.
    """

    scaling: float = 1.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rescaled: bool = True

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        change = super().added(module, x)
        return change * kept if (kept := self.kept(module, change)) is not None else change

    def kept(self, module: nn.Module, change: Tensor) -> Tensor | None:
        """A factor for each output feature, or for all of them, or None where nothing is left out."""
        kept: Tensor | None = None
        if module.training and self.rank_dropout:
            channels = 1 if isinstance(module, nn.Conv2d) else -1
            kept = self._drawn(change.new_ones(change.shape[channels]), self.rank_dropout)
            if self.rescaled:
                kept = kept / kept.mean().clamp(min=1 / len(kept))
            kept = kept[:, None, None] if channels == 1 else kept
        if module.training and self.module_dropout:
            whole = self._drawn(change.new_ones(1), self.module_dropout)
            kept = whole if kept is None else kept * whole
        return kept

    @staticmethod
    def _drawn(ones: Tensor, p: float) -> Tensor:
        # By torch's dropout, whose random numbers are each job's own.
        return (F.dropout(ones, p) > 0).to(ones.dtype)


@dataclass
class Lycoris(TargetedInLayers):
    """Settings of both.

    Args:
        r: rank. alpha: the change is scaled by alpha / r.
        rank_dropout: probability of leaving an output feature of the change out in training. module_dropout: of
            leaving out all of it for a pass.
        use_effective_conv2d: factorise the change of a convolution without flattening it (FedPara's proposition 3).
        rank_pattern, alpha_pattern: rank or alpha for paths that end with the key or match it.
    """

    kinds = "a linear layer, Conv1D or Conv2d"

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not isinstance(module, nn.Embedding | nn.Conv1d)

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.check_chance("rank_dropout")
        self.check_chance("module_dropout")
        found = self.find_fitting(place.base)
        self.check_patterns(found, self.rank_pattern, self.alpha_pattern)
        for path, module in found:
            r = int(pattern(self.rank_pattern, path, self.r))
            self.require(r > 0, f"r={r} for {path}", "a rank of 1 or more")
            layer = self.layer(module, r)
            layer.scaling = pattern(self.alpha_pattern, path, self.alpha) / r
            layer.rank_dropout, layer.module_dropout = self.rank_dropout, self.module_dropout
            yield path, layer

    def layer(self, module: nn.Module, r: int) -> Any:
        """The adapter layer of one module, by its kind and rank; its scaling and dropout are set after."""
        raise TypeError(f"{type(self).__name__} defines no layer()")


def has_core(module: nn.Module, wanted: bool) -> bool:
    """Whether a change is factorised with a core for the kernel: of a convolution by more than 1 x 1."""
    return wanted and isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)


def from_core(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(out, in, *kernel) of a core (r, r, *kernel) and the factors of outputs (r, out) and inputs (r, in)."""
    return torch.einsum("ijkl,io,jn->onkl", core, left, right)
