"""Polytropon: a store of skills, each a change of low rank, of which every task learns how much it takes of each.

    y = W x + (1/r) B A x,  A = sum_s w_s A_s,  B = sum_s w_s B_s,  w = g / sum_s g_s,  g = sigmoid(l_task)

In training g is drawn around its task's logits l, for each row and layer anew: sigmoid(l + ln(u / (1 - u))), u uniform
between 0 and 1, so that tasks come to choose. With several splits, blocks of features of x and of y choose each for
itself (multi-head routing).

Ponti et al. 2023, arXiv 2202.13914; multi-head routing: Caccia et al. 2023, arXiv 2211.03831.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tanzaku.core.context import task_ids
from tanzaku.core.delta import WeightDelta, in_full, kaiming
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import Targeted
from tanzaku.models.families import features, weight_of

_LEAST = 1e-12  # PEFT's, beside the sum of what is taken of all skills


class Router(nn.Module):
    """What each task takes of each skill: logits (tasks, splits * skills)."""

    def __init__(self, method: Poly, like: Tensor):
        super().__init__()
        size = (method.n_tasks, method.n_splits * method.n_skills)
        # Nearly alike, so that no skill is any task's at first.
        self.module_logits = trainable(*size, like=like, fill=lambda t: nn.init.uniform_(t, -1e-3, 1e-3))


class PolyDelta(WeightDelta):
    """The skills at one matrix.

    Attributes:
        poly_lora_A: (splits, skills, in / splits, r). poly_lora_B: (splits, skills, r, out / splits).
    """

    def __init__(self, module: nn.Module, method: Poly):
        super().__init__()
        n_in, n_out = features(module)
        weight, r, splits = weight_of(module), method.r, method.n_splits

        def drawn(t: Tensor) -> None:
            for each in t.flatten(0, 1):  # as a linear layer's, (out, in)
                kaiming(each.t())

        self.r = r
        self.poly_lora_A = trainable(splits, method.n_skills, n_in // splits, r, like=weight, fill=drawn)
        self.poly_lora_B = trainable(
            *(splits, method.n_skills, r, n_out // splits), like=weight, fill=None if method.init_weights else drawn
        )
        self.poly_router = Router(method, weight)

    def delta(self, module: nn.Module) -> Tensor:
        taken = self._taken(self.poly_router.module_logits[:1])[0]
        a = torch.einsum("qs,qsdr->qdr", taken, self.poly_lora_A).flatten(0, 1)
        b = torch.einsum("qs,qsrd->rqd", taken, self.poly_lora_B).flatten(1)
        return (a @ b).t() / self.r

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        # Several tasks are as many weights.
        return super().merged(module) if len(self.poly_router.module_logits) == 1 else None

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = self.poly_router.module_logits
        tasks = len(logits)
        ids = torch.zeros(len(y), dtype=torch.long, device=logits.device) if tasks == 1 else task_ids(y, tasks)
        taken = self._taken(self._drawn(logits[ids]) if module.training else logits[ids])

        def change(x: Tensor, y: Tensor) -> Tensor:
            a, b = self.poly_lora_A, self.poly_lora_B
            # Every skill of every token, which is little, and then as much of it as its row takes.
            own = taken.view(len(taken), *[1] * (x.dim() - 2), *a.shape[:2])
            hidden = torch.einsum("...qd,qsdr->...qsr", torch.unflatten(x.to(a.dtype), -1, (len(a), -1)), a)
            z = torch.einsum("...qs,...qsr->...r", own.expand(*hidden.shape[:-1]), hidden)
            added = torch.einsum("...qsr,qsrd->...qd", own[..., None] * z[..., None, None, :], b)
            return y + added.flatten(-2) / self.r

        return in_full(change, self.poly_lora_A, x, y).to(y.dtype)

    def _drawn(self, logits: Tensor) -> Tensor:
        """(rows, splits * skills), whose sigmoids are drawn around those of the logits (a relaxed Bernoulli
        distribution of temperature 1). One number a column: three dimensions would be taken for rows of tokens."""
        tiny = torch.finfo(logits.dtype).eps
        return logits + torch.logit(torch.rand_like(logits), eps=tiny)

    def _taken(self, logits: Tensor) -> Tensor:
        """(rows, splits, skills), how much each takes: of one split and all skills one together."""
        g = torch.sigmoid(logits).view(len(logits), *self.poly_lora_A.shape[:2])
        return g / (g.sum(-1, keepdim=True) + _LEAST)


@dataclass
class Poly(Targeted):
    """Polytropon, with multi-head routing.

    With more than one task, rows say theirs: `tz.route(model, entries, context={"task_ids": (rows,)})`.

    Args:
        r: rank of each skill.
        n_tasks: how many tasks there are. n_skills: how many skills a layer has for them.
        n_splits: into how many blocks features are split that choose skills by themselves; 1: none do.
        init_weights: True starts without a change, False with one at random.
        poly_type: "poly", as in PEFT.
    """

    name = "poly"
    peft_type = "POLY"
    paper = "arXiv 2202.13914"
    summary = "skills of low rank, of which each task learns how much it takes"
    about = About(
        where="query and value projections: y + 1/r B A x, with A and B mixed of n_skills by the row's task",
        parameters="n_skills * (r * (in + out) + n_tasks * n_splits) a matrix",
        cost="as lora of rank n_skills * r",
        choose="for many related tasks at once, of which some have few rows: route rows with their task_ids",
        limits="merges with one task alone; what tasks take is drawn in training, and batches that draw are not packed",
    )
    by_default = False
    mergeable = True
    draws = True
    learning_rate = 1e-3  # that of the authors' program
    # Skills around the 8 of the papers, and a decade each way.
    space = spaces(n_skills=Choice((2, 4, 8)), learning_rate=Range(1e-4, 1e-2, log=True))

    r: int = 8
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    init_weights: bool = True

    def rate_of(self, parameter: str) -> float:
        # The authors' program learns what tasks take at 0.1, beside 1e-3 for the skills.
        return 100.0 if parameter.endswith("module_logits") else 1.0

    def row_data(self) -> Mapping[str, int]:
        return {"task_ids": self.n_tasks} if self.n_tasks > 1 else {}

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        for key in ("r", "n_tasks", "n_skills", "n_splits"):
            self.require(getattr(self, key) > 0, f"{key}={getattr(self, key)}", "1 or more")
        for path, module in self.find_fitting(place.base):
            n_in, n_out = features(module, path)
            fits = not (n_in % self.n_splits or n_out % self.n_splits)
            found = f"n_splits={self.n_splits} at {path}, of {n_in} and {n_out} features"
            self.require(fits, found, "a divisor of both")
            yield path, PolyDelta(module, self)
