"""Data of a batch's rows that adapter layers read: the features of a picture, the embedding of a task's description.

Whoever runs the model gives it, by `tz.route(model, entries, context={"features": ...})` or in a task's batch, and a
layer asks for that of the rows that it has before it. A checkpointed layer that runs again has that of its first run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tanzaku.core.routing import running_route
from tanzaku.errors import TanzakuError, listed
from tanzaku.support.context import Local

_given: Local[Mapping[str, Tensor]] = Local("tanzaku_context")


@contextmanager
def giving(data: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, rows have this data.

    Args:
        data: by name, (rows, ...): an entry for each row of the batch.

    Raises:
        TanzakuError: what is no tensor, or is of another number of rows.
    """
    for name, tensor in data.items():
        if not isinstance(tensor, Tensor) or not tensor.dim():
            raise TanzakuError(f"context: found {type(tensor).__name__} for {name!r}, expected a tensor (rows, ...)")
    if len({len(tensor) for tensor in data.values()}) > 1:
        found = listed(f"{len(tensor)} for {name}" for name, tensor in data.items())
        raise TanzakuError(f"context: found rows that differ in number, {found}; expected one entry a row of the batch")
    before = _given.get()
    _given.set(data or None)
    try:
        yield
    finally:
        _given.set(before)


def context(name: str, like: Tensor) -> Tensor:
    """What the rows that a layer has before it have under this name: (rows of `like`, ...), one entry for each.

    It is asked for where the layer runs for its own rows: one that reads it has no `batch_key`.

    Raises:
        TanzakuError: nothing was given under that name, or not for these rows.
    """
    given = _given.get() or {}
    if name not in given:
        found = listed(map(repr, given)) or "none"
        raise TanzakuError(
            f"an adapter reads {name!r} of each row, and was given {found}: route(model, entries, "
            f"context={{{name!r}: (rows, ...)}})"
        )
    data, (route, number) = given[name], running_route()
    rows = route.rows_of(number, len(data), like.shape[0])
    if rows == [*range(len(data))]:
        return data
    return data.index_select(0, torch.tensor(rows, device=data.device))
