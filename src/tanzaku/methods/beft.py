"""BEFT: a bias that is added to value projections, whether they have one or not.

    y = W x + b + d,  d trained, 0 at first

Bias-efficient fine-tuning, arXiv 2509.15974.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, ModuleLayer, Place, trainable
from tanzaku.core.space import Range, spaces
from tanzaku.core.targeted import Targeted
from tanzaku.models.families import features, weight_of


class BiasAdded(ModuleLayer):
    """`beft_bias` (1, out)."""

    def __init__(self, module: nn.Module, path: str, init: bool):
        super().__init__()
        out = features(module, path)[1]
        self.beft_bias = trainable(1, out, like=weight_of(module), fill=None if init else nn.init.normal_)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y + self.beft_bias[0].to(y.dtype)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        bias = cast("Tensor | None", module.bias)
        return None if bias is None else {"bias": bias.detach().float() + self.beft_bias[0].detach()}


@dataclass
class BEFT(Targeted):
    """Bias-efficient fine-tuning.

    Args:
        init_weights: True starts with biases of zero, False at random.
    """

    name = "beft"
    peft_type = "BEFT"
    paper = "arXiv 2509.15974"
    summary = "an added bias at value projections"
    about = About(
        where="value projections: y + d",
        parameters="one number an output of each",
        cost="nothing",
        choose="with a few hundred rows, on models that have no biases, too",
        limits="only shifts; merges where the module has a bias",
    )
    by_default = False
    mergeable = True
    targets: ClassVar[tuple[str, ...]] = ("value",)
    targets_by_kind: ClassVar[Any] = {}
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    learning_rate = 1e-3  # As for biases.
    space = spaces(learning_rate=Range(1e-4, 1e-2, log=True))  # as for biases

    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        for path, module in self.find_fitting(place.base):
            yield path, BiasAdded(module, path, self.init_weights)
