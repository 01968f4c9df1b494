"""What the package's own autograd functions have in common: a gradient written by hand, and none of that gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from tanzaku.errors import TanzakuError


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward pass of a function so that a graph of it is refused.

    torch's decorator of this name lets pass what depends on saved tensors alone, and `torch.autograd.grad` finds its
    way around it where a model has residuals: second derivatives would lack a part, and nobody would know.

    Raises:
        TanzakuError: in the backward pass, if it is run with `create_graph=True`.
    """

    @wraps(backward)
    def once(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise TanzakuError(
                "found a backward pass with create_graph=True, for second derivatives, which adapters that share a "
                "batch and models in training do not have; route one adapter at a time, outside of train_jobs"
            )
        return backward(ctx, *gradients)

    return once
