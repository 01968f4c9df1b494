"""Going on from a saved adapter, on other rows or for another task: its method, its weights, and its head where what it
tells apart is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.method import Method
from tanzaku.errors import TanzakuError
from tanzaku.storage.store import adapter_dir, checksum, load, method_in, read_about, read_config
from tanzaku.tasks import task_in
from tanzaku.tasks.task import Task


def method_from(path: Path) -> Method:
    """The method of a saved adapter with its settings, to be trained on.

    Raises:
        TanzakuError: there is none, or it is made of other adapters.
    """
    method = method_in(path)
    if method.uses_others:
        raise TanzakuError(f"{path} is an adapter of {method.name}, which is made of others; train such a one anew")
    method.task_type = None  # the run's task is
    return method


def keeps_head(path: Path, task: Task) -> bool:
    """Whether the head in the file gives what the task wants: as many outputs, which mean the same."""
    before = _task_of(path)
    if before is None and not task.model_settings():  # another library's, and the head is the base's own
        return read_config(adapter_dir(path)).get("task_type") in (None, task.peft_type)
    return before is not None and (before.auto_class, before.model_settings()) == (
        task.auto_class,
        task.model_settings(),
    )


def said(path: Path, task: Task) -> str | None:
    """What the user of a run is to know of a head that is not kept."""
    if keeps_head(path, task):
        return None
    before = _task_of(path)
    why = "does not say what it tells apart" if before is None else f"has {before.describe()}"
    head = "with a new head" if task.model_settings() else "without its head"
    return f"goes on from {path} {head}: that one {why}, and these rows have {task.describe()}"


def begin(model: nn.Module, method: Method, name: str, path: Path, task: Task) -> Adapter:
    """Attach an adapter that goes on from the one in `path`; the file's weights, and the task's head.

    Raises:
        TanzakuError: the file is damaged, or was made for another base, or does not fit it.
    """
    return load(model, path, name, method=method, keep_head=keeps_head(path, task))


def described(path: Path) -> dict[str, Any]:
    """What a run keeps of where a job began."""
    return {"adapter": path.name, "sha256": checksum(path)}


def _task_of(path: Path) -> Task | None:
    meta = (read_about(adapter_dir(path)) or {}).get("meta")
    try:
        return task_in(meta, "") if isinstance(meta, dict) else None
    except (TanzakuError, LookupError):
        return None  # what its user wrote by hand
