"""RoAd: a module's outputs are turned and scaled in pairs.

    (y_i', y_j') = (c_i y_i - s_i y_j, c_j y_j + s_j y_i),  c = alpha cos(theta), s = alpha sin(theta),
    pairs half a group apart, theta = 0 and alpha = 1 at first

Liao and Monz 2024, arXiv 2409.00119.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from tanzaku.core.delta import lies_turned
from tanzaku.core.method import About, AdapterLayer, ModuleLayer, Place, trainable
from tanzaku.core.routing import in_equal_shares
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedInLayers
from tanzaku.models.families import features, weight_of
from tanzaku.models.quantize import full_weight

_NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}  # a pair of outputs has, of angles and of scales


class PairRotation(ModuleLayer):
    """`road_theta` and `road_alpha`, (out / 2,), (out,) or (2 out,): one number a pair, one an output, or one for each
    of an output's two factors."""

    def __init__(self, module: nn.Module, numbers: int, group: int, init: bool):
        super().__init__()
        self.numbers, self.group = numbers, group
        n_out, weight = features(module)[1], weight_of(module)
        size = n_out * numbers // 2
        turn = None if init else partial(nn.init.normal_, std=0.5)
        scale = nn.init.ones_ if init else partial(nn.init.normal_, mean=1.0, std=0.5)
        self.road_theta = trainable(size, like=weight, fill=turn)
        self.road_alpha = trainable(size, like=weight, fill=scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out,) of what each output keeps of itself, and of what it takes of its partner."""
        theta: Tensor = self.road_theta
        alpha: Tensor = self.road_alpha
        if self.numbers == 1:  # both of a pair, in two halves of a group, have one
            theta, alpha = (t.view(-1, 1, self.group // 2).expand(-1, 2, -1).flatten() for t in (theta, alpha))
        if self.numbers == 4:
            (own, other), (one, two) = (t.view(-1, 2, self.group).unbind(1) for t in (theta, alpha))
            return (one * own.cos()).flatten(), (two * other.sin()).flatten()
        return alpha * theta.cos(), alpha * theta.sin()

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return _turned(y, *self.factors(), self.group)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        return (self.group, self.road_theta.dtype)

    @staticmethod
    def batched_outputs(
        layers: Sequence[PairRotation], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        own, other = (torch.stack(each)[:, None] for each in zip(*(s.factors() for s in layers), strict=True))

        def turned(y: Tensor) -> Tensor:
            return _turned(y.reshape(len(layers), -1, y.shape[-1]), own, other, layers[0].group).view(y.shape)

        return in_equal_shares(sizes, turned, y)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        weight, (own, other) = full_weight(module), self.factors()
        turned = lies_turned(module)
        columns = _turned(weight if turned else weight.t(), own, other, self.group)
        out = {"weight": columns if turned else columns.t()}
        if (bias := module._parameters.get("bias")) is not None:
            out["bias"] = _turned(bias.to(weight.dtype), own, other, self.group)
        return out


def _turned(y: Tensor, own: Tensor, other: Tensor, group: int) -> Tensor:
    """y (..., out), each output turned with the one half a group away."""
    first, second = torch.unflatten(y, -1, (-1, 2, group // 2)).unbind(-2)
    partner = torch.stack([-second, first], dim=-2).flatten(-3)
    return (y * own + partner * other).to(y.dtype)


@dataclass
class RoAd(TargetedInLayers):
    """Rotation adaptation.

    Args:
        variant: "road_1" (a rotation and a scale for each pair), "road_2" (an angle and a scale for each output) or
            "road_4" (two of each).
        group_size: outputs are paired half a group apart; it is even and divides a module's outputs.
        init_weights: True starts with no rotation, False at random.
    """

    name = "road"
    peft_type = "ROAD"
    paper = "arXiv 2409.00119"
    summary = "pairs of a module's outputs, turned and scaled"
    about = About(
        where="outputs of query and value projections, in pairs",
        parameters="out, 2 out or 4 out a matrix",
        cost="two multiplications of each output",
        choose="with few rows, or thousands of adapters in one batch",
        limits="only mixes two outputs; wants high rates",
    )
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    learning_rate = 1e-3  # HF PEFT's method comparison (MetaMathQA, road_2), and its notes.
    # A decade above PEFT's rate; how many numbers a pair has.
    space = spaces(variant=Choice(("road_1", "road_2", "road_4")), learning_rate=Range(5e-4, 2e-2, log=True))

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.variant in _NUMBERS, f"variant={self.variant!r}", "'road_1', 'road_2' or 'road_4'")
        group = self.group_size
        self.require(group > 0 and group % 2 == 0, f"group_size={group}", "an even number, 2 or more")
        for path, module in self.find_fitting(place.base):
            n_out = features(module)[1]
            self.require(n_out % group == 0, f"group_size={group} for {path}", f"a divisor of its {n_out} outputs")
            yield path, PairRotation(module, _NUMBERS[self.variant], group, self.init_weights)
