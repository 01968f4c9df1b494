"""AdaLoRA: low-rank changes in the form of a singular value decomposition, their ranks pruned by importance.

    y = W x + (alpha / r) B diag(E) A x,  rows of A and columns of B kept near orthonormal by a penalty

A budget of singular values falls from init_r to target_r a matrix by a cubic schedule; at each allocation the values
with the least importance (sensitivity |w grad w|, smoothed, times its uncertainty) are set to zero, over all matrices.

Zhang et al. 2023, arXiv 2303.10512.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, in_full
from tanzaku.core.method import About, AdapterLayer, Attached, Place, trainable
from tanzaku.core.space import Choice, Range, ends, spaces
from tanzaku.methods.lora import LoRA
from tanzaku.methods.low_rank import low_rank
from tanzaku.models.families import features, weight_of


class SvdDelta(WeightDelta):
    """B diag(E) A at one module; `ranknum` is the rank that divides alpha, and outlives pruning."""

    def __init__(self, module: nn.Module, r: int, alpha: float, dropout: float, init: Any):
        super().__init__()
        n_in, n_out = features(module)
        weight = weight_of(module)

        def small(t: Tensor) -> Any:
            return nn.init.normal_(t, std=0.02 if init else 1.0)

        self.lora_A = trainable(r, n_in, like=weight, fill=small)
        self.lora_B = trainable(n_out, r, like=weight, fill=small)
        self.lora_E = trainable(r, 1, like=weight, fill=None if init else nn.init.normal_)
        self.ranknum = trainable(1, like=weight, fill=lambda t: t.fill_(r)).requires_grad_(False)
        self.scaling = alpha if alpha > 0 else float(r)
        self.dropout, self.r = dropout, r
        self.factor = self.scaling / (r + 1e-5)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return in_full(partial(self._changed, module), self.lora_A, x, y)

    def _changed(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a, b, e = self.lora_A, self.lora_B, self.lora_E
        x = self.dropped(module, x, a)
        # Scaling the few hidden numbers by E is cheaper than scaling the matrix A.
        h = F.linear(x, a) * e.view(-1)
        if y.dtype == a.dtype:
            return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=self.factor).view(y.shape)
        return (y + F.linear(h, b) * self.factor).to(y.dtype)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        dropped = self.dropout and module.training
        return None if dropped else (self.r, self.factor, self.lora_A.dtype)

    @staticmethod
    def batched_outputs(
        layers: Sequence[SvdDelta], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        a, b, e = zip(*((s.lora_A, s.lora_B, s.lora_E) for s in layers), strict=True)
        return low_rank(x, y, sizes, a, b, layers[0].factor, e)

    def delta(self, module: nn.Module) -> Tensor:
        return self.lora_B @ (self.lora_A * self.lora_E) * self.factor

    def export(self) -> dict[str, Tensor]:
        # A pruned value is zero: what is left of the matrices is what the rank pattern keeps.
        keep = self.kept()
        return {
            "lora_A": self.lora_A.detach()[keep],
            "lora_B": self.lora_B.detach()[:, keep],
            "lora_E": self.lora_E.detach()[keep],
        }

    def kept(self) -> Tensor:
        """(r,) boolean: which singular values are left. All of them while none was pruned."""
        keep = cast(Tensor, getattr(self, "mask", None))
        return torch.ones(self.r, dtype=torch.bool, device=self.lora_E.device) if keep is None else keep

    def restore(self, tensors: dict[str, Tensor]) -> None:
        keep = self.kept()
        with torch.no_grad():
            self.lora_A[keep] = tensors["lora_A"].to(self.lora_A)
            self.lora_B[:, keep] = tensors["lora_B"].to(self.lora_B)
            self.lora_E[keep] = tensors["lora_E"].to(self.lora_E)
            self.lora_E[~keep] = 0.0


@dataclass
class AdaLoRA(LoRA):
    """Adaptive budget allocation among low-rank changes.

    Args:
        init_r: rank of every matrix at first. target_r: average rank at the end; a fraction is allowed.
        tinit, tfinal: steps before pruning begins, and after it ends. deltaT: steps between two allocations.
        total_step: optimizer steps of the run; set when training starts if it is None.
        beta1, beta2: smoothing of sensitivity and of uncertainty. orth_reg_weight: weight of the penalty.
    """

    name = "adalora"
    peft_type = "ADALORA"
    paper = "arXiv 2303.10512"
    summary = "low-rank changes whose ranks are pruned by importance"
    about = About(
        where="as LoRA, as y + (alpha / r) P diag(E) Q x, with the rank shared out by importance while it trains",
        parameters="init_r (in + out + 1) a matrix, of which target_r stay on average",
        cost="as LoRA, and a penalty that keeps P and Q orthogonal",
        choose="when it is not known which layers need rank, and there are some hundreds of steps to find out",
        limits="needs a known number of steps; short runs have no time to share out",
    )
    targets_by_kind: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("roberta", "deberta-v2"), ("query", "key", "value", "dense")),
        **dict.fromkeys(("opt", "t5", "bart", "mbart", "whisper"), ("query", "key", "value", "out", "up", "down")),
        "mt5": ("query", "key", "value", "out", "gate", "up", "down"),
        "nemotron_h": ("query", "key", "value", "out"),
    }
    combines_by = None  # singular values of several have no rule
    holds_changes: ClassVar[bool] = False
    learning_rate = 1e-3  # The paper (arXiv 2303.10512, appendix): 5e-4 to 2e-3 on GLUE.
    # The paper: 5e-4 to 2.2e-3 over GLUE, and the budget at the end matters more than the one at first.
    space = spaces(target_r=Choice((1, 2, 4, 8)), learning_rate=Range(1e-4, 1e-2, log=True))

    kinds = "a matrix"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return not isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d)

    target_r: float = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None  # type: ignore[assignment]

    @classmethod
    def open_space(cls, given: Mapping[str, Any]) -> dict[str, Choice | Range]:
        space = super().open_space(given)
        if "target_r" in space:
            below = tuple(r for r in ends(space["target_r"]) if r <= min(ends(given.get("init_r", cls.init_r))))
            space["target_r"] = Choice(below or ends(space["target_r"]))
        return space

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        self.check()
        self.require(self.init_r > 0, f"init_r={self.init_r}", "a rank of 1 or more")
        self.require(0 < self.target_r <= self.init_r, f"target_r={self.target_r}", f"above 0, up to {self.init_r}")
        init = f"init_lora_weights={self.init_lora_weights!r}"
        self.require(
            not self._starts() and not self.calibrates, init, "true or false: B, E and A start at a product of zero"
        )
        for key in ("use_dora", "freeze_a", "alora_invocation_tokens", "trainable_token_indices", "target_parameters"):
            self.require(not getattr(self, key), key, "LoRA, which has it")
        self.require(self.loraplus_lr_ratio == 1, "loraplus_lr_ratio", "LoRA, which has it")
        self.require(self.deltaT > 0, f"deltaT={self.deltaT}", "1 step or more")
        self.require(self.total_step != 0, "total_step=0", "1 step or more, or None")
        self.require(0 < self.beta1 < 1 and 0 < self.beta2 < 1, "beta1 or beta2 outside of (0, 1)", "one inside")
        found = self.find_fitting(base)
        for path, module in found:
            layer = SvdDelta(module, self.init_r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
            if self.rank_pattern and (keep := self.rank_pattern.get(f"{path}.lora_E")) is not None:
                layer.mask = torch.tensor(keep, dtype=torch.bool)
            yield path, layer
        yield from self.biases(base, [path for path, _ in found])

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        # PEFT reads no file without a number, though only a training run uses it; here each sets its own.
        steps = config["total_step"]
        return {**config, "total_step": self.tinit + self.tfinal + 1 if steps is None else steps}

    # -- training

    def prepare(self, adapter: Attached, total_steps: int) -> None:
        if self.total_step is None or self.inference_mode:  # a file's number is that of the run it comes from
            self.total_step = total_steps
        self.require(
            self.tinit < self.total_step - self.tfinal,
            f"tinit={self.tinit} and tfinal={self.tfinal} with {self.total_step} steps",
            "steps left between them",
        )
        self._sensitivity: list[Tensor] = []
        self._uncertainty: list[Tensor] = []

    def training_state(self, adapter: Attached) -> dict[str, Tensor]:
        kinds = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty}
        out = {f"{kind}.{i}": tensor for kind, tensors in kinds.items() for i, tensor in enumerate(tensors)}
        return out | {f"kept.{path}": layer.kept() for path, layer in _at(adapter) if self.rank_pattern}

    def resume(self, adapter: Attached, state: dict[str, Tensor]) -> None:
        def all_of(kind: str) -> list[Tensor]:
            number = sum(key.startswith(f"{kind}.") for key in state)
            return [state[f"{kind}.{i}"].to(_layers(adapter)[0].lora_A.device, copy=True) for i in range(number)]

        self._sensitivity, self._uncertainty = all_of("sensitivity"), all_of("uncertainty")
        for path, layer in _at(adapter):
            if (kept := state.get(f"kept.{path}")) is not None:
                self._set_kept(path, layer, kept.to(layer.lora_E.device))

    def penalty(self, adapter: Attached) -> Tensor | None:
        """orth_reg_weight times the mean of ||A A^T - I|| and ||B^T B - I|| over the matrices."""
        layers = _layers(adapter)
        if self.orth_reg_weight == 0 or not layers:
            return None
        # Matrices of one shape are stacked: a handful of products instead of two a module.
        norms = []
        for group in _same_shape([s.lora_A for s in layers]) + _same_shape([s.lora_B.t() for s in layers]):
            stacked = torch.stack(group)
            gram = stacked @ stacked.transpose(1, 2)
            norms.append((gram - torch.eye(gram.shape[-1]).to(gram)).flatten(1).norm(dim=1))
        return self.orth_reg_weight * torch.cat(norms).mean()

    @torch.no_grad()
    def after_step(self, adapter: Attached, step: int) -> None:
        total = cast(int, self.total_step)
        layers = _layers(adapter)
        if step < total - self.tfinal:
            self._update_importance(layers)
        budget, due = self.budget(step, len(layers))
        if step <= total - self.tfinal:
            if due or step == total - self.tfinal:
                self._prune(adapter, layers, budget)
        else:
            for layer in layers:
                layer.lora_E[~layer.kept()] = 0.0

    def budget(self, step: int, matrices: int) -> tuple[int, bool]:
        """(singular values left over all matrices, whether this step allocates)."""
        total = cast(int, self.total_step)
        start, end = self.init_r * matrices, self.target_r * matrices
        if step <= self.tinit:
            return start, False
        if step > total - self.tfinal:
            return int(end), True
        left = 1 - (step - self.tinit) / (total - self.tfinal - self.tinit)
        return int((start - end) * left**3 + end), step % self.deltaT == 0

    def _update_importance(self, layers: list[SvdDelta]) -> None:
        tensors: list[Tensor] = [t for s in layers for t in (s.lora_A, s.lora_B, s.lora_E)]
        if any(t.grad is None for t in tensors):
            return
        gradients: list[Tensor] = [cast(Tensor, t.grad) for t in tensors]
        now = torch._foreach_abs(cast(Any, torch._foreach_mul)(tensors, gradients))
        if not self._sensitivity:
            self._sensitivity = [torch.zeros_like(t) for t in tensors]
            self._uncertainty = [torch.zeros_like(t) for t in tensors]
        torch._foreach_lerp_(self._sensitivity, now, 1 - self.beta1)
        gap = torch._foreach_abs(torch._foreach_sub(now, self._sensitivity))
        torch._foreach_lerp_(self._uncertainty, gap, 1 - self.beta2)

    def _prune(self, adapter: Attached, layers: list[SvdDelta], budget: int) -> None:
        if not self._sensitivity:
            return
        score = torch._foreach_mul(self._sensitivity, self._uncertainty)
        triplets = [
            score[3 * i + 2].view(-1) + score[3 * i].mean(dim=1) + score[3 * i + 1].mean(dim=0)
            for i in range(len(layers))
        ]
        cut = sum(len(t) for t in triplets) - budget
        if cut <= 0:
            return
        threshold = torch.kthvalue(torch.cat(triplets).cpu(), cut)[0].item()
        for (path, layer), values in zip(_at(adapter), triplets, strict=True):
            self._set_kept(path, layer, values > threshold)
            layer.lora_E[~layer.kept()] = 0.0

    def _set_kept(self, path: str, layer: SvdDelta, kept: Tensor) -> None:
        layer.mask = kept
        self.rank_pattern = {**(self.rank_pattern or {}), f"{path}.lora_E": kept.tolist()}


def _at(adapter: Attached) -> list[tuple[str, SvdDelta]]:
    return [(path, layer) for path, layer in adapter.at() if isinstance(layer, SvdDelta)]


def _layers(adapter: Attached) -> list[SvdDelta]:
    return [layer for _, layer in _at(adapter)]


def _same_shape(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.shape, []).append(tensor)
    return list(groups.values())
