"""PSOFT: a rotation within the plane of the weight's largest directions.

    y = W x + U S (diag(b) R diag(a) - I) V^T x,  U, S, V the r largest of W,  R orthogonal,  all the identity at first

arXiv 2505.11235.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tanzaku.core.delta import base_matrix, without_autocast
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedInLayers
from tanzaku.methods.lora_xs import largest_singular
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.methods.oft import neumann
from tanzaku.methods.turning import cayley, unit
from tanzaku.models.families import features, weight_of


class Core(nn.Module):
    """R: `weight`, the r (r - 1) / 2 numbers above the diagonal of a skew-symmetric matrix, or a whole matrix (r, r),
    with `vector_b` and `vector_a` (r,) for its rows and columns."""

    def __init__(self, like: Tensor, method: PSOFT):
        super().__init__()
        r, noise = method.r, None if method.init_weights else partial(nn.init.normal_, std=0.1)
        if method.psoft_orth:
            self.weight = trainable(r * (r - 1) // 2, like=like, fill=noise)
        else:
            self.weight = trainable(r, r, like=like, fill=lambda t: t.copy_(noise(t) if noise else t).fill_diagonal_(1))
        self.vector_b = trainable(r, like=like, fill=nn.init.ones_) if method.psoft_mag_b else None
        self.vector_a = trainable(r, like=like, fill=nn.init.ones_) if method.psoft_mag_a else None


class PlaneRotation(LowRankDelta):
    """`psoft_R`, between the frozen factors `psoft_down` (r, in) and `psoft_up` (out, r) of the weight. HF PEFT's files
    lack these: of such a file they are computed of the base's weight again, where singular vectors may have other signs
    on another machine, or over a base of another type."""

    found_again = ("psoft_down", "psoft_up")
    psoft_down: Tensor
    psoft_up: Tensor

    def __init__(self, module: nn.Module, method: PSOFT):
        super().__init__()
        r = self.r = method.r
        self.scaling, self.dropout = method.psoft_alpha / r, method.psoft_dropout
        self.orthogonal, self.terms, self.most = method.psoft_orth, method.terms, method.cayley_neumann_eps
        n_in, n_out = features(module)
        weight = weight_of(module)
        self.psoft_R = Core(weight, method)
        down, up = (self.psoft_R.weight.detach().new_zeros(size) for size in ((r, n_in), (n_out, r)))
        if not down.is_meta:
            whole = base_matrix(module)
            u, s, v = largest_singular(whole, r) if method.psoft_svd == "full" else _roughly(whole, method)
            s = s / self.scaling
            root = s.sqrt() if method.ab_svd_init == "pissa_init" else torch.ones_like(s)
            down.copy_(root[:, None] * v)
            up.copy_(u * (s / root))
        self.register_buffer("psoft_down", down)
        self.register_buffer("psoft_up", up)

    def core(self) -> Tensor:
        """diag(b) R diag(a), (r, r), in full precision."""
        numbers, r = self.psoft_R.weight, self.r
        kind = torch.promote_types(numbers.dtype, torch.float32)
        with without_autocast(numbers):
            if self.orthogonal:
                rows, columns = torch.triu_indices(r, r, 1, device=numbers.device)
                above = numbers.new_zeros(r, r, dtype=kind).index_put((rows, columns), numbers.to(kind))
                skew = above - above.t()
                core = cayley(-skew[None])[0] if self.terms is None else neumann(self._within(skew), self.terms)
            else:
                core = numbers.to(kind)
        b, a = self.psoft_R.vector_b, self.psoft_R.vector_a
        core = core if b is None else b[:, None] * core
        scaled: Tensor = core if a is None else core * a
        return scaled

    def _within(self, skew: Tensor) -> Tensor:
        """A matrix of a norm for which the series is near the inverse."""
        if self.most is None:
            return skew
        factor: Tensor = self.most / (skew.norm() + 1e-12)
        return skew * factor.clamp(max=1.0)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        core = self.core()
        return (core - unit(core)) @ self.psoft_down.to(core), self.psoft_up.to(core)


def _roughly(weight: Tensor, method: PSOFT) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values by a randomised method, as its seed draws it."""
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(method.random_seed)
        u, s, v = torch.svd_lowrank(weight, q=method.r, niter=method.psoft_svd_lowrank_niter)
    return u, s, v.t()


@dataclass
class PSOFT(TargetedInLayers):
    """Orthogonal fine-tuning in a principal subspace.

    Args:
        r: size of the rotation. psoft_alpha: has no effect on the start; the factors are divided by psoft_alpha / r.
        psoft_dropout: probability of dropping an input in training.
        ab_svd_init: "psoft_init" gives the singular values to the second factor, "pissa_init" their roots to both.
        psoft_svd, psoft_svd_lowrank_niter, random_seed: "full", or "lowrank" by a randomised method with so many
            iterations.
        psoft_orth: False trains a matrix that need not be orthogonal.
        psoft_mag_b, psoft_mag_a: scale its rows, and its columns.
        use_cayley_neumann, num_cayley_neumann_terms, cayley_neumann_eps: a series of so many terms in place of an
            inverse, for a skew-symmetric matrix of a norm of at most eps.
        init_weights: True starts with the identity, False at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
    """

    name = "psoft"
    peft_type = "PSOFT"
    paper = "arXiv 2505.11235"
    summary = "a rotation of the weight's largest directions"
    about = About(
        where="query and value projections: y + U S (diag(b) R diag(a) - I) V^T x",
        parameters="r (r - 1) / 2 + 2 r a matrix, whatever its size",
        cost="as LoRA; a singular value decomposition of each matrix whenever it is attached",
        choose="for few trained numbers that keep what the model knows",
        limits="changes only what W's largest directions read and write; takes long to attach to large models; its "
        "file holds r (in + out) numbers a matrix beside the trained ones",
    )
    by_default = False
    mergeable = True
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, rank 256), whose default it takes.
    # PEFT's notes: 1e-4 to 5e-3.
    space = spaces(r=Choice((4, 8, 16)), learning_rate=Range(1e-4, 1e-2, log=True))

    r: int = 32
    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    @property
    def terms(self) -> int | None:
        """Terms of the series, or None for an inverse."""
        return self.num_cayley_neumann_terms if self.use_cayley_neumann else None

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        words: dict[str, tuple[Any, ...]] = {
            "ab_svd_init": ("psoft_init", "pissa_init"),
            "psoft_svd": ("full", "lowrank"),
        }
        for name, known in words.items():
            self.require(getattr(self, name) in known, f"{name}={getattr(self, name)!r}", " or ".join(map(repr, known)))
        self.require(self.psoft_alpha > 0, f"psoft_alpha={self.psoft_alpha}", "a number above 0")
        self.require(0 <= self.psoft_svd_lowrank_niter <= 1000, "psoft_svd_lowrank_niter", "0 to 1000")
        terms = self.num_cayley_neumann_terms
        self.require(1 < terms <= 100, f"num_cayley_neumann_terms={terms}", "2 to 100")
        eps = self.cayley_neumann_eps
        self.require(eps is None or eps > 0, f"cayley_neumann_eps={eps}", "a number above 0")
        self.check_chance("psoft_dropout")
        self.check_seed("random_seed")
        for path, module in self.find_fitting(place.base):
            most = min(features(module))
            self.require(1 < self.r <= most, f"r={self.r} for {path}", f"2 to its {most} singular values")
            yield path, PlaneRotation(module, self)
