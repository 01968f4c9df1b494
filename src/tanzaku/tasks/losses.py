"""Losses that several tasks share."""

from __future__ import annotations

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
