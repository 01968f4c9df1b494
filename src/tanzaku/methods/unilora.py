"""Uni-LoRA: all numbers of LoRA's matrices in a model are those of one short vector, each at many places.

    y = W x + B A x,  every number of A and B theta[i] / sqrt(n_i), i drawn once, n_i how often it was drawn

Li et al. 2025, arXiv 2506.00799.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.routing import split
from tanzaku.core.shared import Shared, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.errors import TanzakuError
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.models.families import features, weight_of
from tanzaku.support.refs import Ref


class Theta(Shared):
    """`unilora_theta_d` (length,)."""

    place = "theta"

    def __init__(self, length: int, bound: float | None, like: Tensor):
        super().__init__()
        fill = nn.init.normal_ if bound is None else partial(nn.init.uniform_, a=-bound, b=bound)
        self.unilora_theta_d = trainable(length, like=like, fill=fill)

    def compute(self) -> Tensor:
        return self.unilora_theta_d


class ProjectedDelta(LowRankDelta):
    """Which of theta's numbers each number of A (r, in) and B (out, r) is, and what it is divided by."""

    unilora_indices_A: Tensor
    unilora_indices_B: Tensor
    unilora_scales_A: Tensor
    unilora_scales_B: Tensor

    def __init__(self, method: UniLoRA, theta: Theta, indices: tuple[Tensor, Tensor], scales: Tensor):
        super().__init__()
        self.r, self.dropout, self.theta = method.r, method.unilora_dropout, Ref(theta)
        like, saved = theta.unilora_theta_d.detach(), method.save_indices
        for side, each in zip("AB", indices, strict=True):
            self.register_buffer(f"unilora_indices_{side}", each.to(like.device), persistent=saved)
        for side, each in zip("AB", indices, strict=True):
            self.register_buffer(f"unilora_scales_{side}", scales[each].to(like), persistent=saved)

    def _own(self) -> Tensor:
        return self.unilora_scales_A

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        theta = reached(self.theta).value().to(self.unilora_scales_A.device)
        return (
            theta[self.unilora_indices_A] * self.unilora_scales_A.to(theta),
            theta[self.unilora_indices_B] * self.unilora_scales_B.to(theta),
        )

    def restore(self, tensors: dict[str, Tensor]) -> None:
        theta = self.theta()
        for side in "AB":
            at = tensors[f"unilora_indices_{side}"]
            if theta is not None and bool(((at < 0) | (at >= len(theta.unilora_theta_d))).any()):
                raise TanzakuError(f"unilora: unilora_indices_{side} lie outside of theta")
        super().restore(tensors)


def drawn(count: int, length: int, seed: int) -> Tensor:
    """So many places among `length`, each nearly as often as any other, as HF PEFT draws them."""
    generator = np.random.default_rng(seed)
    rest = count % length
    every = np.repeat(np.arange(length), count // length)
    if rest:
        every = np.concatenate([every, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(every)
    return torch.as_tensor(every, dtype=torch.long)


@dataclass
class UniLoRA(TargetedWithBiases):
    """One vector for all of LoRA. Its start is a small change at random, as the paper has it.

    Args:
        r: rank of the change. theta_d_length: trained numbers of the whole adapter.
        proj_seed: draws which number stands where. save_indices: keep that in files, too; without, whoever reads one
            draws it again.
        unilora_dropout: probability of dropping an input in training.
        init_weights: True starts with numbers from minus to plus init_theta_d_bound, False with normal ones.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "unilora_only": which biases are trained too.
    """

    name = "unilora"
    peft_type = "UNILORA"
    paper = "arXiv 2506.00799"
    summary = "LoRA whose matrices all hold the numbers of one short vector"
    about = About(
        where="query and value projections: y + B A x, B and A of one vector's numbers",
        parameters="theta_d_length for the whole model",
        cost="as LoRA, and the matrices are put together anew",
        choose="for the smallest files: a vector and a seed",
        limits="starts with a small change at random",
    )
    starts_as_base = False
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    own_biases = "unilora_only"
    learning_rate = 1e-3  # Ten times HF PEFT's default in its method comparison, since each number stands for many.
    # From PEFT's 1e-4 up: each number stands for many.
    space = spaces(r=Choice((2, 4, 8)), learning_rate=Range(1e-4, 1e-1, log=True))

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "a rank of 1 or more")
        self.require(self.theta_d_length > 0, f"theta_d_length={self.theta_d_length}", "1 or more")
        self.require(self.init_theta_d_bound > 0, f"init_theta_d_bound={self.init_theta_d_bound}", "a number above 0")
        self.check_chance("unilora_dropout")
        self.check_seed("proj_seed")
        self.check_bias()
        found = self.find_fitting(place.base)
        length = self.theta_d_length
        theta = Theta(length, self.init_theta_d_bound if self.init_weights else None, weight_of(found[0][1]))
        yield "", theta
        sizes = [size for _, module in found for size in features(module)]
        places = drawn(self.r * sum(sizes), length, self.proj_seed)
        scales = torch.bincount(places, minlength=length).clamp(min=1).rsqrt()
        each = iter(split(places, [self.r * size for size in sizes]))
        for path, _ in found:
            indices = next(each).view(self.r, -1), next(each).view(-1, self.r)
            yield path, ProjectedDelta(self, theta, indices, scales)
        yield from self.biases(place.base, [path for path, _ in found])
