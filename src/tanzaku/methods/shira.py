"""SHiRA: a few numbers of each matrix, at places drawn once, are trained.

    y = (W + S) x,  S zero but at r (in + out) places, and 0 at first

Bhardwaj et al. 2024, arXiv 2406.13175.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, shape_of
from tanzaku.core.method import About, AdapterLayer, Place, home, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedInLayers
from tanzaku.errors import TanzakuError
from tanzaku.models.families import weight_of


class SparseDelta(WeightDelta):
    """`shira_weight` (n,) at `shira_indices` (2, n), rows and columns, which files hold."""

    shira_indices: Tensor

    def __init__(self, module: nn.Module, number: int, seed: int | None, init: bool):
        super().__init__()
        self.shape = shape_of(module)
        weight = weight_of(module)
        self.shira_weight = trainable(number, like=weight, fill=None if init else nn.init.normal_)
        device = home(weight)
        if device.type == "meta":
            indices = torch.empty(2, number, dtype=torch.int32)
        else:
            generator = torch.Generator()  # which draws the same numbers where no seed is given, as in HF PEFT
            generator = generator if seed is None else generator.manual_seed(seed)
            flat = torch.randperm(self.shape[0] * self.shape[1], generator=generator)[:number].sort().values
            indices = torch.stack([flat // self.shape[1], flat % self.shape[1]]).int()
        self.register_buffer("shira_indices", indices.to(device))

    def delta(self, module: nn.Module) -> Tensor:
        rows, columns = self.shira_indices.long()
        return self.shira_weight.new_zeros(self.shape).index_put((rows, columns), self.shira_weight)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        places = tensors["shira_indices"].long()
        sizes = torch.tensor(self.shape, device=places.device)[:, None]
        if bool(((places < 0) | (places >= sizes)).any()):
            raise TanzakuError(f"shira: shira_indices lie outside of a matrix of {self.shape[0]} x {self.shape[1]}")
        super().restore(tensors)


@dataclass
class SHiRA(TargetedInLayers):
    """Sparse high-rank adapter.

    Args:
        r: r (in + out) numbers of a matrix are trained, as many as LoRA has at this rank.
        mask_type: "random"; where they are.
        random_seed: draws where they are; None is one seed, too.
        init_weights: True starts with a change of zero, False at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
    """

    name = "shira"
    peft_type = "SHIRA"
    paper = "arXiv 2406.13175"
    summary = "a few numbers of each matrix, at random places"
    about = About(
        where="query and value projections: y + S x, S with r (in + out) numbers",
        parameters="r (in + out) a matrix",
        cost="a product with the whole change of each matrix",
        choose="where adapters are merged and swapped: few numbers of the base change",
        limits="as slow as training full matrices; files hold the places, too",
    )
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    targets_by_kind: ClassVar[Any] = {**TargetedInLayers.targets_by_kind, "phi": ("query", "value")}
    learning_rate = 3e-4  # HF PEFT's method comparison (MetaMathQA, rank 32).
    # As for LoRA, whose numbers it has; small ranks fit every matrix.
    space = spaces(r=Choice((1, 2, 4)), learning_rate=Range(5e-5, 5e-3, log=True))

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.mask_type == "random", f"mask_type={self.mask_type!r}", "'random'")
        if self.random_seed is not None:
            self.check_seed("random_seed")
        for path, module in self.find_fitting(place.base):
            n_out, n_in = shape_of(module)
            most = n_in * n_out // (n_in + n_out)
            self.require(0 < self.r <= most, f"r={self.r} for {path}", f"1 to {most}, of a matrix of {n_out} x {n_in}")
            yield path, SparseDelta(module, self.r * (n_in + n_out), self.random_seed, self.init_weights)
