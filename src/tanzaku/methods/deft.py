"""DEFT: a few directions of a module's output are taken away, and written anew.

    y = W x - Q P^T W x + (alpha / r) Q R x,  Q (out, r), P = relu(Q) or Q orthonormal,  R = P^T W at first

Kumar et al. 2025, arXiv 2509.22793; without R: PaRa, ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, base_matrix, without_autocast
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedWithBiases
from tanzaku.models.families import features, weight_of


class ReplacedDirections(WeightDelta):
    """`deft_P` (out, r), and `deft_R` (r, in) unless directions are only taken away."""

    reads_weight = True

    def __init__(self, module: nn.Module, r: int, method: DEFT):
        super().__init__()
        n_in, n_out = features(module)
        weight = weight_of(module)
        self.qr, self.dropout = method.decomposition_method == "qr", method.deft_dropout
        self.scaling = method.alpha / r if method.alpha else 1.0
        self.deft_P = trainable(n_out, r, like=weight, fill=partial(nn.init.normal_, std=0.02))
        self.writes = not method.para
        if self.writes:
            random = partial(nn.init.normal_, std=0.02 * method.init_scale)
            self.deft_R = trainable(r, n_in, like=weight, fill=None if method.init_weights else random)
            if method.init_weights and not (method._to_fill or self.deft_R.is_meta):
                with torch.no_grad():
                    self.deft_R.copy_(self.directions()[1].t() @ base_matrix(module) / self.scaling)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Q and P, (out, r), in full precision."""
        numbers = self.deft_P.to(torch.promote_types(self.deft_P.dtype, torch.float32))
        if not self.qr:
            return numbers, numbers.relu()
        q = torch.linalg.qr(numbers)[0]
        return q, q

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # What is taken away is read off the module's own output, so that its weight may be quantised.
        bias = module._parameters.get("bias")
        with without_autocast(y):
            q, p = self.directions()
            product = y.to(q.dtype) if bias is None else y.to(q.dtype) - bias.to(q.dtype)
            hidden = -(product @ p)
            if self.writes:
                hidden = hidden + F.linear(self.dropped(module, x, q), self.deft_R.to(q.dtype)) * self.scaling
            return (y + F.linear(hidden, q)).to(y.dtype)

    def delta(self, module: nn.Module) -> Tensor:
        q, p = self.directions()
        hidden = -(p.t() @ base_matrix(module))
        return q @ (hidden + self.deft_R * self.scaling if self.writes else hidden)


@dataclass
class DEFT(TargetedWithBiases):
    """Decompositional efficient fine-tuning.

    Args:
        r: directions. decomposition_method: "relu", or "qr" for orthonormal ones.
        alpha: what is written is scaled by alpha / r; None for no scale.
        para: only take directions away (PaRa), which starts with a change at random.
        init_weights: True starts by writing what is taken away, False at random, with a deviation of 0.02 init_scale.
        deft_dropout: probability of dropping an input of R in training.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "deft_only": which biases are trained too.
    """

    name = "deft"
    peft_type = "DEFT"
    paper = "arXiv 2509.22793"
    summary = "directions of a module's output taken away and written anew"
    about = About(
        where="query and value projections: y - Q P^T W x + (alpha / r) Q R x",
        parameters="r (in + out) a matrix; r out with para",
        cost="three products of rank r a matrix",
        choose="for new concepts that should replace what the model had there, as in image models",
        limits="trains with what it takes away, which may be what the model knew",
    )
    by_default = False
    mergeable = True
    own_biases = "deft_only"
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, rank 32), whose default it takes.
    # As for LoRA, whose numbers it has.
    space = spaces(r=Choice((2, 4, 8, 16)), learning_rate=Range(5e-5, 5e-3, log=True))

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        given = f"decomposition_method={self.decomposition_method!r}"
        self.require(self.decomposition_method in ("relu", "qr"), given, "'relu' or 'qr'")
        self.require(self.r > 0, f"r={self.r}", "1 direction or more")
        self.require(self.init_scale >= 0, f"init_scale={self.init_scale}", "0 or more")
        self.check_chance("deft_dropout")
        self.check_bias()
        found = self.find_fitting(place.base)
        for path, module in found:
            yield path, ReplacedDirections(module, min(self.r, features(module)[1]), self)
        yield from self.biases(place.base, [path for path, _ in found])
