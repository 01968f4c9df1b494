"""TinyLoRA: LoRA-XS, whose small matrix is a sum of fixed random ones: a few numbers for a whole model.

    y = W x + U S^(1/2) (sum_i v_i P_i) S^(1/2) V^T x,  U, S, V the r largest of W,  v in R^u, 0 at first

arXiv 2602.04118.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import base_matrix, shape_of
from tanzaku.core.method import About, AdapterLayer, Place, home, trainable
from tanzaku.core.shared import Shared, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.methods.lora_xs import largest_singular
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.models.families import weight_of
from tanzaku.support.refs import Ref


class TinyVectors(Shared):
    """`tinylora_v`, one vector (u,) for each group of modules."""

    place = "tinylora_vectors"

    def __init__(self, groups: int, u: int, init: Any, bound: float, like: Tensor):
        super().__init__()
        fill = None if init is True else lambda t: t.uniform_(-bound, bound)
        self.tinylora_v = nn.ParameterList([trainable(u, like=like, fill=fill) for _ in range(groups)])

    def compute(self) -> list[Tensor]:
        return list(self.tinylora_v)


class TinyDelta(LowRankDelta):
    """The frozen `tinylora_A` (r, in), `tinylora_B` (out, r), and `tinylora_P` (u, r, r), of the module's number."""

    tinylora_A: Tensor
    tinylora_B: Tensor
    tinylora_P: Tensor

    def __init__(self, module: nn.Module, method: TinyLoRA, vectors: TinyVectors, group: int, number: int):
        super().__init__()
        self.vectors, self.group, self.dropout = Ref(vectors), group, method.tinylora_dropout
        # An embedding's matrix is (tokens, width): what is looked up stands to the left.
        turned, sizes = isinstance(module, nn.Embedding), shape_of(module)
        sizes = sizes[::-1] if turned else sizes
        self.r = r = min(method.r, *sizes)
        weight, like = weight_of(module), vectors.tinylora_v[0].detach()
        device = home(weight)
        down, up = like.new_zeros(r, sizes[1], device=device), like.new_zeros(sizes[0], r, device=device)
        if not (method._to_fill or down.is_meta):
            whole = base_matrix(module)
            u, s, v = largest_singular(whole.t() if turned else whole, r)
            down.copy_(s.sqrt()[:, None] * v)
            up.copy_(u * s.sqrt())
        generator = torch.Generator().manual_seed(method.projection_seed + number)
        random = torch.normal(0.0, 1 / r**0.5, (method.u, r, r), generator=generator)
        self.register_buffer("tinylora_A", down)
        self.register_buffer("tinylora_B", up)
        self.register_buffer("tinylora_P", random.to(down), persistent=method.save_projection)

    def core(self) -> Tensor:
        """sum_i v_i P_i, (r, r)."""
        v = reached(self.vectors).value()[self.group]
        return torch.einsum("i,ijk->jk", v.to(self.tinylora_P.device), self.tinylora_P.to(v.dtype))

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        core = self.core()
        return core @ self.tinylora_A.to(core), self.tinylora_B.to(core)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(module, nn.Embedding):
            return super().outputs(module, x, y)
        a, b = self.matrices(module)
        scale = getattr(module, "embed_scale", 1.0)  # some models scale embedded tokens inside of the module
        looked_up = F.dropout(F.embedding(x, b), self.dropout, module.training)
        change: Tensor = looked_up @ a * cast(Any, scale)
        return (y + change).to(y.dtype)

    def delta(self, module: nn.Module) -> Tensor:
        delta = super().delta(module)
        return delta.t() if isinstance(module, nn.Embedding) else delta

    def batch_key(self, module: nn.Module) -> Hashable | None:
        return None if isinstance(module, nn.Embedding) else super().batch_key(module)


@dataclass
class TinyLoRA(TargetedWithBiases):
    """LoRA down to one number.

    Args:
        r: singular vectors of each module's weight. u: trained numbers of each vector v.
        weight_tying: 0 gives each module a vector of its own, 1 one to all of them, and what lies between to groups.
        projection_seed: of the random matrices. save_projection: keep them in files, too; without, whoever reads one
            draws them again, and must have the same torch.
        init_weights: True starts with v = 0, "uniform" (or False) from minus to plus init_v_bound.
        tinylora_dropout: probability of dropping an input in training.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "tinylora_only": which biases are trained too.
    """

    name = "tinylora"
    peft_type = "TINYLORA"
    paper = "arXiv 2602.04118"
    summary = "a few numbers that weigh random changes of the weight's own directions"
    about = About(
        where="query and value projections: y + U S^(1/2) (sum_i v_i P_i) S^(1/2) V^T x",
        parameters="u a matrix, or u for the whole model with weight_tying=1",
        cost="as LoRA; a singular value decomposition of each matrix at the start",
        choose="for the fewest trained numbers that there are, as reinforcement learning may need",
        limits="learns little from examples; takes long to attach to large models",
    )
    by_default = False
    mergeable = True
    kinds = "a linear layer, Conv1D or an embedding"
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    own_biases = "tinylora_only"
    learning_rate = 1e-3  # HF PEFT's method comparison (MetaMathQA, u 64).
    # A decade around PEFT's rate; so few numbers bear high ones.
    space = spaces(u=Choice((16, 64, 256)), learning_rate=Range(1e-4, 1e-1, log=True))

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not isinstance(module, nn.Conv1d | nn.Conv2d)

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "1 singular vector or more")
        self.require(self.u > 0, f"u={self.u}", "1 number or more")
        self.require(0 <= self.weight_tying <= 1, f"weight_tying={self.weight_tying}", "0 to 1")
        self.require(self.init_v_bound >= 0, f"init_v_bound={self.init_v_bound}", "0 or more")
        inits, expected = (True, False, "uniform"), "true, false or 'uniform'"
        self.require(self.init_weights in inits, f"init_weights={self.init_weights!r}", expected)
        self.check_chance("tinylora_dropout")
        self.check_seed("projection_seed")
        self.check_bias()
        found = self.find_fitting(place.base)
        groups = max(1, round(len(found) * (1 - self.weight_tying)))
        size = max(1, len(found) // groups)
        like = weight_of(found[0][1])
        vectors = TinyVectors(groups, self.u, self.init_weights, self.init_v_bound, like)
        yield "", vectors
        for number, (path, module) in enumerate(found):
            yield path, TinyDelta(module, self, vectors, min(number // size, groups - 1), number)
        yield from self.biases(place.base, [path for path, _ in found])
