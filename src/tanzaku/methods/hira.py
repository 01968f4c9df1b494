"""HiRA: the weight times a low-rank matrix, number by number, so that the change may have the rank of the weight.

    y = W x + (W * (B A)) x,  B = 0 at first

Huang et al. 2025, ICLR 2025 (OpenReview TwJrTz9cRS).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, base_matrix, kaiming, shape_of
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedInLayers, pattern
from tanzaku.models.families import weight_of
from tanzaku.models.quantize import full_weight


class ModulatedDelta(WeightDelta):
    """`hira_A` (r, in, *kernel) and `hira_B` (out, r), with a kernel of one where a convolution has one."""

    reads_weight = True

    def __init__(self, module: nn.Module, r: int, dropout: float, init: Any):
        super().__init__()
        n_out, n_in, *kernel = shape_of(module)
        weight, self.dropout = weight_of(module), dropout
        fill: Any = kaiming
        if init is False:
            fill = nn.init.normal_
        elif init == "gaussian" and not kernel:
            fill = partial(nn.init.normal_, std=1 / r)
        self.hira_A = trainable(r, n_in, *kernel, like=weight, fill=fill)
        self.hira_B = trainable(
            n_out, r, *[1] * len(kernel), like=weight, fill=nn.init.normal_ if init is False else None
        )

    def delta(self, module: nn.Module) -> Tensor:
        low = (self.hira_B.flatten(1) @ self.hira_A.flatten(1)).view(len(self.hira_B), *self.hira_A.shape[1:])
        return base_matrix(module) * low


class ModulatedEmbedding(WeightDelta):
    """`hira_embedding_A` (r, tokens), zero at first, and `hira_embedding_B` (width, r)."""

    reads_weight = True

    def __init__(self, module: nn.Embedding, r: int, init: Any):
        super().__init__()
        a = nn.init.normal_ if init is False else None
        self.hira_embedding_A = trainable(r, module.num_embeddings, like=module.weight, fill=a)
        self.hira_embedding_B = trainable(module.embedding_dim, r, like=module.weight, fill=nn.init.normal_)

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        # Only the rows that are looked up.
        rows = F.embedding(x, self.hira_embedding_A.t()) @ self.hira_embedding_B.t()
        scale = getattr(module, "embed_scale", 1.0)  # some models scale embedded tokens inside of the module
        own = F.embedding(x, full_weight(module))
        return rows * own.to(rows.dtype) * scale

    def delta(self, module: nn.Module) -> Tensor:
        return full_weight(module).t() * (self.hira_embedding_B @ self.hira_embedding_A)


@dataclass
class HiRA(TargetedInLayers):
    """Hadamard high-rank adaptation.

    Args:
        r: rank of the factors. hira_dropout: probability of dropping an input of the change in training.
        init_weights: True (Kaiming-uniform A, zero B), "gaussian" (normal A with deviation 1 / r, zero B) or False
            (both at random).
        rank_pattern: rank for paths that end with the key or match it.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
    """

    name = "hira"
    peft_type = "HIRA"
    paper = "ICLR 2025 (OpenReview TwJrTz9cRS)"
    summary = "low-rank factors of the weight's own numbers"
    about = About(
        where="query and value projections: y + (W * (B A)) x",
        parameters="r (in + out) a matrix",
        cost="the weight is read, changed and multiplied with, for each adapter of a batch",
        choose="for a change of high rank at LoRA's number of parameters",
        limits="as slow as training full matrices; a number of W near zero stays so; wants high rates",
    )
    by_default = False
    mergeable = True
    kinds = "a linear layer, Conv1D, an embedding or a Conv2d"
    learning_rate = 4.5e-3  # HF PEFT's method comparison (MetaMathQA, rank 32).
    # A decade around PEFT's rate, which is above LoRA's, since the change is as small as the weights.
    space = spaces(r=Choice((4, 8, 16, 32)), learning_rate=Range(5e-4, 3e-2, log=True))

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not isinstance(module, nn.Conv1d)

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        inits, expected = (True, False, "gaussian"), "true, false or 'gaussian'"
        self.require(self.init_weights in inits, f"init_weights={self.init_weights!r}", expected)
        self.check_chance("hira_dropout")
        found = self.find_fitting(place.base)
        self.check_patterns(found, self.rank_pattern)
        for path, module in found:
            r = int(pattern(self.rank_pattern, path, self.r))
            self.require(r > 0, f"r={r} for {path}", "a rank of 1 or more")
            if isinstance(module, nn.Embedding):
                yield path, ModulatedEmbedding(module, r, self.init_weights)
                continue
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            self.require(groups == 1, f"{path}, a convolution in {groups} groups", "one group")
            yield path, ModulatedDelta(module, r, self.hira_dropout, self.init_weights)
