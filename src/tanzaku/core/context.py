"""Data of a batch's rows that adapter layers read: the features of a picture, the embedding of a task's description.

Whoever runs the model gives it, by `tz.route(model, entries, context={"features": ...})` or in a task's batch. It is
the route's, so that another model, another thread and a checkpointed layer that runs again have their own. A layer asks
for that of the rows that it has before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tanzaku.core.routing import running_route
from tanzaku.errors import TanzakuError, listed


def check_context(data: Mapping[str, Any]) -> dict[str, Tensor]:
    """The data by name, (rows, ...): an entry for each row of the batch.

    Raises:
        TanzakuError: what is no tensor, or is of another number of rows.
    """
    for name, tensor in data.items():
        if not isinstance(tensor, Tensor) or not tensor.dim():
            raise TanzakuError(f"context: found {type(tensor).__name__} for {name!r}, expected a tensor (rows, ...)")
    if len({len(tensor) for tensor in data.values()}) > 1:
        found = listed(f"{len(tensor)} for {name}" for name, tensor in data.items())
        raise TanzakuError(f"context: found rows that differ in number, {found}; expected one entry a row of the batch")
    return dict(data)


def context(name: str, like: Tensor) -> Tensor:
    """What the rows that a layer has before it have under this name: (rows of `like`, ...), one entry for each.

    It is asked for where the layer runs for its own rows: one that reads it has no `batch_key`.

    Raises:
        TanzakuError: nothing was given under that name, or not for these rows, or the module has no rows before it.
    """
    route, number, has_rows = running_route()
    if name not in route.context:
        found = listed(map(repr, route.context)) or "none"
        raise TanzakuError(
            f"an adapter reads {name!r} of each row, and was given {found}: route(model, entries, "
            f"context={{{name!r}: (rows, ...)}})"
        )
    if not has_rows:
        raise TanzakuError(
            f"an adapter reads {name!r} of each row in a module that does not have the batch's rows in its first "
            "dimension, as experts have tokens; expected target_modules outside of it"
        )
    data = route.context[name]
    rows = route.rows_of(number, len(data), like.shape[0])
    if rows == [*range(len(data))]:
        return data
    return data.index_select(0, torch.tensor(rows, device=data.device))


def task_ids(like: Tensor, tasks: int) -> Tensor:
    """Which of so many tasks each row is of that a layer has before it: (rows of `like`,), on its device.

    Raises:
        TanzakuError: rows do not say, or say something else than 0 to `tasks` - 1.
    """
    ids = context("task_ids", like).to(like.device)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TanzakuError(f"task_ids: found {tuple(ids.shape)} of {ids.dtype}, expected a whole number for each row")
    if int(ids.min()) < 0 or int(ids.max()) >= tasks:
        raise TanzakuError(f"task_ids: found {ids.tolist()}, expected 0 to {tasks - 1}")
    return ids
