"""The state of a job under way, on disk after each of its epochs: what a run that was cut off goes on from.

One safetensors file a job, its figures as JSON in the header; it is written beside and renamed, so that there is always
one that is whole. A job that goes on ends with the weights of one that nobody cut off: the file has all that they
depend on but for random numbers, which depend on the seed, the epoch and the batch alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tanzaku.errors import TanzakuError
from tanzaku.files.writing import apart, written_beside
from tanzaku.models import tree
from tanzaku.storage.store import checksum as adapter_checksum
from tanzaku.support.versions import VERSION
from tanzaku.tasks.task import TaskData
from tanzaku.train.active_job import ActiveJob

SUFFIX = ".safetensors"
_HEADER = "tanzaku"
_SHARE = 10  # training takes at least so many times as long as writing states does


class States:
    """The folder of a run's states, one file a job.

    Small states are written after every epoch. Writing a large one (of full fine-tuning, three times the model) takes a
    tenth of the time at most: epochs that come sooner are left out. Where the disk has no room, none is written, and
    the job's note says so.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._next: dict[str, float] = {}  # when writing a job's state pays again

    def keep(self, active: ActiveJob) -> None:
        """Write the state of a job that has just closed an epoch, unless that costs too much."""
        name, began = active.job.name, time.monotonic()
        if began < self._next.get(name, 0.0):
            return
        try:
            save_state(active, self.folder)
        except TanzakuError as error:
            # What is lost is the way back to this epoch; the job itself is well.
            active.result.note = "; ".join(filter(None, [active.result.note, f"cannot be resumed: {error}"]))
            self._next[name] = float("inf")
            return
        took = time.monotonic() - began
        if took > 1:
            self._next[name] = began + took + _SHARE * took

    def restore(self, active: ActiveJob) -> bool:
        """See :func:`restore_state`."""
        return restore_state(active, self.folder)

    def forget(self, name: str) -> None:
        """Remove the state of a job that has ended."""
        _path(self.folder, name).unlink(missing_ok=True)


def save_state(active: ActiveJob, folder: Path) -> Path:
    """Write the state of a job that has just closed an epoch, in place of its last one.

    Raises:
        TanzakuError: the disk has no room for it, or cannot be written; the last one stays.
    """
    path = _path(folder, active.job.name)
    tensors, figures = active.state()
    tensors = apart(tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        # The adapter comes after it, and must not find a full disk.
        if free < 2 * size:
            raise TanzakuError(f"its state takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {folder}")
        with written_beside(path) as beside:
            header = {"of": _about(active), "figures": figures}
            save_file(tensors, beside, metadata={_HEADER: json.dumps({**header, "sha256": _sha256(header, tensors)})})
    except (OSError, SafetensorError) as error:
        raise TanzakuError(f"cannot write {path}: {error}") from None
    return path


def restore_state(active: ActiveJob, folder: Path) -> bool:
    """Let a new job go on from its state in the folder; False where there is none.

    Raises:
        TanzakuError: the file is damaged, or is the state of another job: other settings, rows, base or version.
    """
    path = _path(folder, active.job.name)
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            of, figures = header["of"], header["figures"]
            _check_same(path, of, _about(active))
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header.pop("sha256") != _sha256(header, tensors):
            raise ValueError("its checksum is not the one written in it")
        active.resume(tensors, figures)
    except TanzakuError:
        raise
    except (SafetensorError, OSError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TanzakuError(f"{path} is damaged ({reason[0]}); remove it to train {active.job.name!r} anew") from None
    return True


def checksum(data: TaskData) -> str:
    """Of all rows as they were encoded, and the task: other rows or another tokenizer give another."""
    digest = hashlib.sha256(repr((data.task.name, data.task.to_json())).encode())
    for split in data.splits():
        digest.update(split.name.encode())
        for example in split.examples:
            told = [*example.context.items(), *([] if example.factor == 1 else [example.factor])]
            told += [sorted(row.items()) for row in example.others]
            digest.update(repr((sorted(example.inputs.items()), example.target, *told)).encode())
    return digest.hexdigest()


def base_checksum(model: nn.Module) -> str:
    """Of the model's class, and of up to 64 numbers of each of its weights: another base gives another."""
    digest = hashlib.sha256(type(model).__name__.encode())
    # The class's own method: an active adapter's parameters are no part of the base.
    for name, parameter in tree.named_parameters(model):
        digest.update(repr((name, tuple(parameter.shape), str(parameter.dtype))).encode())
        numbers = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
        digest.update(repr(numbers.tolist()).encode())
    return digest.hexdigest()


def _about(active: ActiveJob) -> dict[str, Any]:
    """What a state belongs to, by the words that a refusal uses; read once a job."""
    if active.about is None:
        job = active.job
        about = {
            "version of tanzaku": VERSION,
            "method": job.method.name,
            **job.settings.model_dump(),
            **{f"{job.method.name}.{key}": value for key, value in job.method.settings().items()},
            "base model": base_checksum(active.adapter.base.model),
            "data": checksum(active.data),
            **{f"adapter {label}": adapter_checksum(folder) for label, folder in job.uses.items()},
            **({} if job.init_from is None else {"init_from": adapter_checksum(job.init_from)}),
        }
        active.about = json.loads(json.dumps(about, default=str))
    return active.about


def _sha256(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        bytes_of: Any = tensor.flatten().view(torch.uint8).numpy()  # mypy knows no buffer in it
        digest.update(bytes_of)
    return digest.hexdigest()


def _check_same(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in (*expected, *found):
        if found.get(key) != expected.get(key):
            shown = f" ({found.get(key)!r}, now {expected.get(key)!r})" if key not in ("base model", "data") else ""
            raise TanzakuError(
                f"{path} is the state of a run with another {key}{shown}; go on with what it was begun with, or remove "
                "it to begin anew"
            )


def _path(folder: Path, name: str) -> Path:
    return folder / (name + SUFFIX)
