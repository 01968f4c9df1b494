"""Workers that are new processes: where a process cannot be forked, as on Windows and macOS, and beside CUDA.

Each imports torch anew, and the program's main module, as Python's `multiprocessing` has it for "spawn". The model goes
to it in two parts: its storages are written once to a file, which all workers map, so that they are in memory once for
all of them; the rest, its modules and settings, is sent as any argument of a process is. Rows and jobs are sent, too.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tanzaku.train.results import Job
from tanzaku.train.workers import Crew, Employer, Reporter, belong_to, serve


class Spawned(Crew):
    """Workers that start from nothing, with the weights of one file."""

    private = 6 * 10**8

    def __init__(self, scheduler: Employer, number: int):
        self._weights = _Weights()
        try:
            with scheduler.plain():
                self._model = self._weights.taken_from(scheduler.model)
            self._like = scheduler.like()
            super().__init__(scheduler, number)
        except BaseException:
            self._weights.close()
            raise

    def leave(self, at_once: bool = False) -> None:
        super().leave(at_once)
        self._weights.close()

    def _started(self, part: list[Job], rows: int, room: float, pipe: Connection, others: list[Connection]) -> Any:
        process = multiprocessing.get_context("spawn").Process(
            target=_work,
            args=(self._like, self._model, self._weights.path, part, rows, room, pipe, os.getpid()),
            name="tanzaku",
            daemon=True,
        )
        with _deaf():  # to Ctrl-C while it imports, too
            process.start()
        return process

    def _why_not_begun(self) -> str:
        return ': a new process reads the program\'s main module, so put what trains below if __name__ == "__main__":'


def _work(
    like: Callable[[PreTrainedModel], Employer],
    model: bytes,
    weights: Path,
    part: list[Job],
    rows: int,
    room: float,
    pipe: Connection,
    parent: int,
) -> None:
    belong_to(parent)
    with like(_with_weights(model, weights)) as scheduler:
        serve(scheduler, part, rows, room, Reporter(pipe))


@contextmanager
def _deaf() -> Iterator[None]:
    """Within the block Ctrl-C is ignored, which a process started there takes over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# -- a model in two parts


class _Weights:
    """A temporary file of a model's storages. Where the system shows a process's open files, as Linux does, it has no
    other name, and is gone with this process, however that ends."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tanzaku-", ignore_cleanup_errors=True)
        self._handle: int | None = None
        self.path = Path(self._folder.name) / "weights.safetensors"

    def taken_from(self, model: PreTrainedModel) -> bytes:
        """Write the model's storages to the file; the model without them.

        Raises:
            OSError: there is no room for the file.
        """
        rest = io.BytesIO()
        pickler = _WithoutStorages(rest)
        pickler.dump(model)
        storages = {str(at): _bytes_of(storage) for at, storage in enumerate(pickler.storages)}
        try:
            save_file(storages, self.path)
        except SafetensorError as error:
            raise OSError(f"cannot write {self.path}: {error}") from error
        self._handle = os.open(self.path, os.O_RDONLY)
        unnamed = Path(f"/proc/{os.getpid()}/fd/{self._handle}")
        if unnamed.exists():
            self._folder.cleanup()
            self.path = unnamed
        return rest.getvalue()

    def close(self) -> None:
        """Give the file up; workers that are gone mapped it last."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self._folder.cleanup()


class _WithoutStorages(pickle.Pickler):
    """Writes a number for each storage of a tensor, and its type."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.storages: list[torch.UntypedStorage] = []
        self._at: dict[int, int] = {}

    def persistent_id(self, found: Any) -> tuple[int, torch.dtype] | None:
        if not isinstance(found, torch.TypedStorage):
            return None
        storage = found._untyped_storage
        at = self._at.setdefault(storage._cdata, len(self.storages))
        if at == len(self.storages):
            self.storages.append(storage)  # which keeps it, and so its number is no other's
        return at, found.dtype


class _WithStorages(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: list[torch.UntypedStorage]):
        super().__init__(file)
        self.storages = storages

    def persistent_load(self, found: tuple[int, torch.dtype]) -> torch.TypedStorage:
        at, dtype = found
        return torch.TypedStorage(wrap_storage=self.storages[at], dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _with_weights(model: bytes, path: Path) -> PreTrainedModel:
    """The model that `taken_from` took apart, its weights mapped from the file."""
    with safe_open(path, "pt") as file:
        storages = [file.get_tensor(str(at)).untyped_storage() for at in range(len(file.keys()))]
    found: PreTrainedModel = _WithStorages(io.BytesIO(model), storages).load()
    return found


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
