"""Root-mean-square norms with frozen weights, in a third of the operations.

    y = x / sqrt(mean(x^2) + eps) * w

Model files write this in half a dozen operations, and autograd answers with a dozen: on a small batch a fifth of a step
goes there. Here it is one function with a backward pass written by hand; the results differ by rounding. It takes the
place of those modules alone whose own result it was seen to give.

Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tanzaku.core.quiet import quiet
from tanzaku.engine.acceleration import Acceleration, Common
from tanzaku.models import tree
from tanzaku.support.autograd import once_differentiable

_TYPES = (torch.float32, torch.bfloat16)


class FrozenNorms(Acceleration):
    """While entered, the norms of a model's backbone compute as described above."""

    name = "norms"
    summary = "an RMS norm with a frozen weight is one function with its own backward pass"

    def __init__(self, common: Common):
        super().__init__(common)
        self.norms = [
            (module, known)
            for module in tree.modules(self.base.backbone)
            if "forward" not in module.__dict__ and (known := _known(module)) is not None
        ]

    @property
    def possible(self) -> bool:
        return bool(self.norms)

    def __enter__(self) -> Self:
        for module, (eps, shift) in self.norms:
            weight = cast(Tensor, module.weight)
            module.__dict__["forward"] = partial(
                _forward, module, torch.tensor(eps, device=weight.device), weight, (weight.float() + shift).detach()
            )
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for module, _known in self.norms:
            module.__dict__.pop("forward", None)


def _known(module: nn.Module) -> tuple[float, float] | None:
    """(eps, what is added to the weight) of an RMS norm, found by trying; None for anything else."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1:
        return None
    if len(module._parameters) != 1 or weight.dtype not in _TYPES or weight.is_meta or not isinstance(eps, float):
        return None
    full = weight.detach().float()
    # Small numbers show eps, which large ones would hide.
    probe = torch.linspace(-1, 1, len(full), device=full.device)
    probe = torch.stack([probe, 1e-3 * probe])
    with torch.no_grad(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own norm tells of types that differ
        expected = module(probe)
        for shift in (0.0, 1.0):
            if torch.allclose(_normed(probe, full + shift, full.new_tensor(eps)), expected, rtol=1e-4, atol=1e-6):
                return eps, shift
    return None


def _forward(module: nn.Module, eps: Tensor, weight: Tensor, factor: Tensor, x: Tensor) -> Tensor:
    # An adapter may have put a weight of its own there.
    if module.weight is not weight or weight.requires_grad or x.dtype != weight.dtype:
        return cast(Tensor, type(module).forward(module, x))
    return _normed(x, factor, eps)


def _normed(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    return cast(Tensor, _Norm.apply(x, weight, eps))  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    """x (..., features), maybe in bf16; weight (features), frozen, and eps, a number, in fp32, as the arithmetic is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        full = x.float()
        size = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        scale = torch.addcmul(eps, size, size, value=1 / x.shape[-1]).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (full * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        through = gradients[0].float() * weight
        full = x.float()
        along = torch.linalg.vecdot(through, full, dim=-1).unsqueeze(-1)
        along.mul_(scale.pow(3))
        return through.mul_(scale).addcmul_(full, along, value=-1 / x.shape[-1]).to(x.dtype), None, None
