"""Losses that several tasks share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tanzaku.tasks.task import Batch


def focal(losses: Tensor, batch: Batch) -> Tensor:
    """Cross entropies (rows, ...) as each row's `focal` counts them: times (1 - p) to that power, where p is the
    probability of what is right. 0 leaves them as they are.

    Lin et al. 2017, Focal loss for dense object detection, https://arxiv.org/abs/1708.02002. Its alpha is a weight of
    classes or rows.
    """
    import torch

    powers = [example.focal for example in batch.examples]
    if not any(powers):
        return losses
    wrong = -torch.expm1(-losses)  # 1 - p
    wrong = wrong.clamp_min(torch.finfo(wrong.dtype).tiny)  # of a power below 1 the slope at 0 is infinite
    return losses * wrong ** torch.tensor(powers, device=losses.device).reshape(-1, *[1] * (losses.dim() - 1))


def log_otherwise(losses: Tensor) -> Tensor:
    """log(1 - p) of cross entropies, which are -log p: of numbers near 0 and of large ones alike to their precision.

    Mächler 2012, Accurately computing log(1 - exp(-|a|)), of the R package Rmpfr.
    """
    import torch

    losses = losses.clamp_min(torch.finfo(losses.dtype).tiny)  # p is 1 to rounding: the logarithm is finite
    small = losses < math.log(2)
    # Each branch reads numbers that it is made for: what is not taken must have a gradient, too.
    near = (-torch.expm1(-losses.where(small, torch.ones_like(losses)))).log()
    far = torch.log1p(-torch.exp(-losses.where(~small, torch.ones_like(losses))))
    return torch.where(small, near, far)
