"""Super-Tuning: the largest numbers of each matrix are trained, or the smallest, and LoRA beside them.

    y = (W + S) x + (alpha / r) B A x,  S zero but where W's numbers are largest, and 0 at first

arXiv 2607.09287.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, base_matrix, kaiming, shape_of
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Range, spaces
from tanzaku.core.targeted import TargetedInLayers
from tanzaku.errors import TanzakuError
from tanzaku.methods.low_rank import Low
from tanzaku.models.families import weight_of


class LargestDelta(WeightDelta):
    """`supertuning_values` (n,) at `supertuning_indices` (n,) of the flat matrix; beside them LoRA's
    `supertuning_lora_A` and `supertuning_lora_B`, where there is a rank."""

    supertuning_indices: Tensor

    def __init__(self, module: nn.Module, number: int, method: Supertuning):
        super().__init__()
        self.shape, self.dropout = shape_of(module), method.lora_dropout
        weight, init = weight_of(module), method.init_weights
        self.supertuning_values = trainable(number, like=weight, fill=None if init else nn.init.normal_)
        indices = torch.zeros(number, dtype=torch.int32, device=self.supertuning_values.device)
        if not indices.is_meta:
            sizes = base_matrix(module).abs().flatten()
            indices.copy_(sizes.topk(number, largest=method.select_top).indices)
        self.register_buffer("supertuning_indices", indices, persistent=method.save_precomputed_indices)
        self.scaling = 0.0
        if method.r is not None:
            n_out, n_in = self.shape
            self.scaling = (method.lora_alpha or 0.0) / method.r
            self.supertuning_lora_A = Low(trainable(method.r, n_in, like=weight, fill=kaiming))
            self.supertuning_lora_B = Low(trainable(n_out, method.r, like=weight, fill=None if init else kaiming))
        self.low_rank = method.r is not None

    def sparse(self) -> Tensor:
        """S, (out, in)."""
        flat = self.supertuning_values.new_zeros(math.prod(self.shape))
        return flat.index_put((self.supertuning_indices.long(),), self.supertuning_values).view(self.shape)

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        x = x.to(self.supertuning_values.dtype)
        change = F.linear(x, self.sparse())
        if self.low_rank:
            a, b = self.supertuning_lora_A.weight, self.supertuning_lora_B.weight
            change = change + F.linear(F.linear(self.dropped(module, x, a), a), b) * self.scaling
        return change

    def delta(self, module: nn.Module) -> Tensor:
        if not self.low_rank:
            return self.sparse()
        return self.sparse() + self.supertuning_lora_B.weight @ self.supertuning_lora_A.weight * self.scaling

    def restore(self, tensors: dict[str, Tensor]) -> None:
        at = tensors.get("supertuning_indices")
        if at is not None and bool(((at < 0) | (at >= math.prod(self.shape))).any()):
            raise TanzakuError(f"supertuning: supertuning_indices lie outside of a matrix of {self.shape}")
        super().restore(tensors)


@dataclass
class Supertuning(TargetedInLayers):
    """Tuning of the numbers that weigh most.

    Args:
        sparsity: share of a matrix's numbers that stay as they are.
        select_top: True trains the largest, False the smallest.
        r, lora_alpha: rank of a LoRA beside them, and its scale lora_alpha / r; None for none.
        lora_dropout: probability of dropping an input of A in training.
        save_precomputed_indices: keep in files which numbers are trained; without, they are found again, and over a
            base of another type may be others.
        init_weights: True starts with a change of zero, False at random.
    """

    name = "supertuning"
    peft_type = "SUPERTUNING"
    paper = "arXiv 2607.09287"
    summary = "the largest numbers of each matrix"
    about = About(
        where="query and value projections: y + S x, S where W's numbers are largest",
        parameters="(1 - sparsity) in out a matrix, and r (in + out) where r is given",
        cost="a product with the whole change of each matrix",
        choose="where adapters are merged and swapped: few numbers of the base change",
        limits="as slow as training full matrices; files hold the places, too",
    )
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA), whose default it takes.
    # As for SHiRA, from PEFT's rate up.
    space = spaces(sparsity=Range(0.9, 0.99), learning_rate=Range(5e-5, 5e-3, log=True))

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(0 <= self.sparsity < 1, f"sparsity={self.sparsity}", "a share below 1")
        together = (self.r is None) == (self.lora_alpha is None)
        self.require(together, f"r={self.r} and lora_alpha={self.lora_alpha}", "both or neither")
        self.require(self.r is None or self.r > 0, f"r={self.r}", "a rank of 1 or more, or none")
        self.check_chance("lora_dropout")
        for path, module in self.find_fitting(place.base):
            number = int(math.prod(shape_of(module)) * (1 - self.sparsity))
            self.require(number > 0, f"sparsity={self.sparsity} for {path}", "one that leaves a number to train")
            yield path, LargestDelta(module, number, self)
