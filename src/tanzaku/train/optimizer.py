"""AdamW for many small parameters.

An adapter has a hundred matrices of a few thousand numbers, and an optimizer spends longer on starting work for each
than on the work; with eight jobs in a step that is eight times as much. Here small parameters lie one after another in
one tensor, of which each is a view: their norm, their clipping and their update are one operation each.

Loshchilov and Hutter 2017, arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim.adamw import adamw

SMALL = 2**17  # numbers; of a larger parameter the copy of its gradient would cost more than it saves


class FlatAdamW(torch.optim.Optimizer):
    """torch's AdamW with clipping, to rounding.

    A parameter's state has torch's names: step, exp_avg and exp_avg_sq. One that has no gradient is left alone in a
    step. In the first step that they take part in, parameters become views of a common tensor: their `.data` must not
    be exchanged from then on.

    Args:
        groups: parameters, and what is special about them, as torch's optimizers take them.
        max_norm: all gradients are scaled alike so that their common norm is this at most; 0 leaves them as they are.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, max_norm: float = 0.0
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.max_norm = max_norm
        self._flats: dict[tuple[int, ...], list[_Flat]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. The gradients stay, clipped."""
        flats = [(group, flat) for group in self.param_groups for flat in self._flats_of(group["params"])]
        gradients = [flat.gradient() for _, flat in flats]
        if self.max_norm and gradients:
            norm = nn.utils.get_total_norm(gradients)
            scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.device))
        for (group, flat), gradient in zip(flats, gradients, strict=True):
            flat.update(gradient, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._flats.clear()

    def _flats_of(self, parameters: list[nn.Parameter]) -> list[_Flat]:
        present = [p for p in parameters if p.grad is not None]
        key = tuple(map(id, present))
        if key not in self._flats:
            # Where others take part than did before, the tensors are made anew from what the views hold.
            mine = set(map(id, parameters))
            self._flats = {old: flats for old, flats in self._flats.items() if mine.isdisjoint(old)}
            self._flats[key] = [_Flat.of(alike, self.state) for alike in _alike(present, self.state)]
        return self._flats[key]


@dataclass
class _Flat:
    """Parameters that are updated at once: one large one, or views of `weight`."""

    parameters: list[nn.Parameter]
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @classmethod
    def of(cls, parameters: list[nn.Parameter], state: Any) -> _Flat:
        for p in parameters:
            if not state[p]:
                state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        step = state[parameters[0]]["step"].clone()  # it may be shared with some that are not among these
        if len(parameters) == 1:
            (p,) = parameters
            state[p]["step"] = step
            return cls(parameters, p.detach(), state[p]["exp_avg"], state[p]["exp_avg_sq"], step)
        weight = _flat([p.detach() for p in parameters])
        moments = {key: _flat([state[p][key] for p in parameters]) for key in ("exp_avg", "exp_avg_sq")}
        views = [_views(flat, parameters) for flat in (weight, *moments.values())]
        for p, data, exp_avg, exp_avg_sq in zip(parameters, *views, strict=True):
            p.data = data
            state[p] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return cls(parameters, weight, step=step, **moments)

    def gradient(self) -> Tensor:
        """Their gradients in one tensor, of which each parameter's is a view from now on."""
        gradients = [cast(Tensor, p.grad) for p in self.parameters]
        if len(gradients) == 1:
            return gradients[0]
        flat = _flat(gradients)
        for p, view in zip(self.parameters, _views(flat, gradients), strict=True):
            p.grad = view
        return flat

    def update(self, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step of AdamW."""
        beta1, beta2 = group["betas"]
        adamw(
            [self.weight],
            [gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _alike(parameters: Iterable[nn.Parameter], state: Any) -> list[list[nn.Parameter]]:
    """Small parameters of one kind that have taken the same number of steps; each large one by itself."""
    found: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        small = p.numel() <= SMALL and p.is_contiguous()
        steps = float(state[p]["step"]) if state[p] else 0.0
        found.setdefault((p.device, p.dtype, steps) if small else id(p), []).append(p)
    return [*found.values()]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return cast(Tensor, _flatten_dense_tensors(tensors))  # type: ignore[no-untyped-call]


def _views(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Parts of `flat` in the shapes of those it was made of."""
    return cast(Sequence[Tensor], _unflatten_dense_tensors(flat, like))  # type: ignore[no-untyped-call]
