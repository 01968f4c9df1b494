"""Which rows come together, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tanzaku.errors import TanzakuError

_MEGA_BATCH = 50  # batches sorted by length together: little padding, yet much of the order stays random


def epoch_batches(
    lengths: Sequence[int],
    batch_size: int,
    *,
    shuffle: bool,
    group_by_length: bool,
    generator: torch.Generator,
) -> list[list[int]]:
    """Row numbers of each batch of one epoch; every row once, and only one batch may be short.

    Shuffled rows come as ``torch.randperm(n, generator=generator)`` gives them, which is the order of torch's
    RandomSampler in the first epoch from that generator state. ``group_by_length`` then sorts within runs of
    50 batches, longest first, and draws a new order of the batches (not without ``shuffle``).
    """
    if batch_size < 1:
        raise TanzakuError(f"batch_size is {batch_size}, expected at least 1")
    n = len(lengths)
    order = torch.randperm(n, generator=generator).tolist() if shuffle else list(range(n))
    if group_by_length:
        mega = _MEGA_BATCH * batch_size
        runs = [sorted(order[i : i + mega], key=lambda row: -lengths[row]) for i in range(0, n, mega)]
        order = [row for run in runs for row in run]
    batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    if group_by_length and shuffle:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches
