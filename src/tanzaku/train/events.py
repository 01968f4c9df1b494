"""What happens in a run, as plain records: told to listeners as it happens, and kept in a file, one line each.

| kind | `job` | figures |
|---|---|---|
| `run_started` | null | `command`, `resumed`: whether the run goes on from an earlier sitting |
| `stage` | null | of a comparison: `stage`, `jobs` it has, `done`: how many of them were done before |
| `job_started` | name | `method`, `method_settings`, `train_settings`, `trainable_parameters`, `total_parameters`, `note`; `steps` in all; `step`, `epochs` and `seconds` that were done before |
| `step` | name | `step`, `steps`, `loss` |
| `epoch` | name | those of :class:`tanzaku.train.results.EpochRecord` |
| `job_done` | name | those of :class:`tanzaku.train.results.JobResult`; in the file without `epochs` and `predictions` |
| `note` | null | `text`: what the user should know, in one line |
| `run_done` | null | `status`: done, interrupted or failed; `error`: null, or one line |

A job that goes on from its last state starts again: what the file tells of its steps and epochs beyond the new start
was lost, and comes once more.
"""  # noqa: E501

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tanzaku.errors import TanzakuError
from tanzaku.files.writing import finite
from tanzaku.train.results import EpochRecord, Job, JobResult

EVENTS = "events.jsonl"
_APART = 0.5  # seconds at least between two steps of a job in the file
_LONG = ("epochs", "predictions")  # of the end of a job: events of their own, and in the journal


@dataclass(frozen=True)
class Event:
    """One thing that happened, fit for JSON but for figures that are no number. `time` is in seconds since the epoch
    (UTC)."""

    kind: str
    job: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


Listener = Callable[[Event], None]


class Emitter:
    """Tells listeners what happens, one after another, in their order; it is a scheduler's observer.

    Where a listener raises, those after it are not told, and the run ends: who keeps finished jobs comes first.
    """

    def __init__(self, *listeners: Listener):
        self.listeners = list(listeners)

    def emit(self, kind: str, job: str | None = None, **figures: Any) -> None:
        """Tell of something that has happened now."""
        event = Event(kind, job, figures)
        for listener in self.listeners:
            listener(event)

    @contextmanager
    def run(self, command: str, resumed: bool) -> Iterator[dict[str, Any]]:
        """Within the block there is a run. Its end has the `status` and `error` that the block puts into the record it
        is given, or those of what it raises."""
        ending: dict[str, Any] = {"status": "done", "error": None}
        self.emit("run_started", command=command, resumed=resumed)
        try:
            yield ending
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            ending = {"status": "interrupted", "error": None} if stopped else {"status": "failed", "error": reason[0]}
            raise
        finally:
            self.emit("run_done", **ending)

    # -- the scheduler's observer

    def job_started(self, job: Job, result: JobResult, steps: int) -> None:
        self.emit(
            "job_started",
            job.name,
            method=result.method,
            method_settings=result.method_settings,
            train_settings=result.train_settings,
            trainable_parameters=result.trainable_parameters,
            total_parameters=result.total_parameters,
            note=result.note,
            steps=steps,
            step=result.steps,
            epochs=len(result.epochs),
            seconds=result.seconds,
        )

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
        self.emit("step", job.name, step=step, steps=steps, loss=loss)

    def epoch_done(self, job: Job, record: EpochRecord) -> None:
        self.emit("epoch", job.name, **asdict(record))

    def job_done(self, job: Job, result: JobResult) -> None:
        self.emit("job_done", job.name, **result.to_json())

    def warned(self, line: str) -> None:
        self.emit("note", text=line)


class EventLog:
    """The file of a run's events: a listener that adds a line for each, and a context manager that opens the file.

    A run that goes on adds to what is there. Of a job's steps two a second are written at most. Where the file cannot
    be written, as on a full disk, that is said once, and the run goes on without it: nothing depends on it.

    Args:
        say: shows a line to the user.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path, self.say = path, say
        self._file: IO[bytes] | None = None
        self._steps: dict[str | None, float] = {}  # when a step of each job was last written

    def __enter__(self) -> EventLog:
        try:
            cut_off = _cut_off(self.path)
            self._file = self.path.open("ab")
            if cut_off:
                self._write(b"\n")
        except OSError as error:
            self._give_up(error)
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        if self._file is None or (event.kind == "step" and not self._due(event)):
            return
        figures = event.figures
        if event.kind == "job_done":
            figures = {key: value for key, value in figures.items() if key not in _LONG}
        record = {"kind": event.kind, "time": round(event.time, 3), "job": event.job, **finite(dict(figures))}
        try:
            self._write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except OSError as error:
            self._give_up(error)

    def complete(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the ends of jobs, by name, that have ended but for a line here: a kill came between."""
        if self._file is None:
            return
        told = {e.job for e in read_events(self.path) if e.kind == "job_done" and e.figures["status"] != "interrupted"}
        for name in records.keys() - told:
            self(Event("job_done", name, records[name]))

    def _due(self, event: Event) -> bool:
        if event.time - self._steps.get(event.job, 0.0) < _APART:
            return False
        self._steps[event.job] = event.time
        return True

    def _write(self, line: bytes) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()

    def _give_up(self, error: OSError) -> None:
        self._close()
        self.say(f"cannot write {self.path}: {error.strerror or error}; the run goes on without it")

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written is still to be flushed
                self._file.close()
            self._file = None


def read_events(path: Path) -> list[Event]:
    """The events in a run's file, in their order. Lines that a kill or a full disk cut off are left out.

    Raises:
        TanzakuError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TanzakuError(f"cannot read {path}: {error.strerror or error}; expected the {EVENTS} of a run") from None
    return [event for line in lines if (event := _read(line)) is not None]


def _read(line: bytes) -> Event | None:
    with suppress(ValueError, LookupError, TypeError):
        record = json.loads(line)
        kind, when, job = record.pop("kind"), float(record.pop("time")), record.pop("job")
        return Event(kind, job, record, when)
    return None


def _cut_off(path: Path) -> bool:
    """Whether the file's last line has no end."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"
