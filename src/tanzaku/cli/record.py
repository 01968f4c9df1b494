"""A run's directory and its results.json, rewritten whole whenever a candidate ends: a kill loses nothing finished."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanzaku.errors import TanzakuError
from tanzaku.files.locks import held
from tanzaku.files.writing import finite, written_beside
from tanzaku.support.versions import VERSION

if TYPE_CHECKING:
    from tanzaku.tasks.task import TaskData
    from tanzaku.train.events import Event

RESULTS, ADAPTERS = "results.json", "adapters"
WRITTEN = (RESULTS, "events.jsonl", "epochs.parquet", "report.html")
STATE, BEGUN = "state", "state/run.json"


def command_of(out: Path) -> str | None:
    """The command whose run the directory holds, done or cut off, or None where it holds none."""
    for name in (RESULTS, BEGUN):
        with suppress(OSError, ValueError):
            found = json.loads((out / name).read_text(encoding="utf-8"))
            if isinstance(found, dict) and "tanzaku" in found:
                return str(found.get("command"))
    # What says it is damaged. Any program may write a results.json, but not beside what only a run does.
    beside = any((out / ADAPTERS).glob("*/tanzaku.json")) or (out / "epochs.parquet").is_file()
    return "damaged" if (out / BEGUN).is_file() or ((out / RESULTS).is_file() and beside) else None


def is_done(out: Path) -> bool:
    """Whether the directory's results.json says that all of its run is done."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        found = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        if found.get("command") == "train":
            return [job.get("status") for job in found.get("jobs", [])] == ["done"]
        return bool(found.get("status") == "done")
    return False


def only_leftovers(out: Path) -> bool:
    """Whether the directory holds nothing but what a run has left that was cut off before it had finished anything."""
    ours = {STATE, ADAPTERS, *WRITTEN, *(f".{name}.partial" for name in WRITTEN)}
    if not (out / BEGUN).is_file() or any(entry.name not in ours for entry in out.iterdir()):
        return False
    # Searches note what they draw before it is trained.
    kept = [path for path in (out / STATE).rglob("*") if path.is_file() and not path.name.startswith((".", "search."))]
    return kept == [out / BEGUN] and not any((out / ADAPTERS).glob("*"))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The directory belongs to this process within the block, and to nobody once the process is gone.

    Raises:
        TanzakuError: it belongs to another process.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(out))
        except BlockingIOError:
            raise TanzakuError(
                f"{out} is in use by another run; wait until it has ended, or choose another --out"
            ) from None
        yield


def prepare_out(out: Path, overwrite: bool) -> None:
    """Make the directory and write to it once, before anything slow is loaded.

    Raises:
        TanzakuError: it holds something already, or cannot be written.
    """
    try:
        if out.exists() and not out.is_dir():
            raise TanzakuError(f"{out} is a file; expected a directory for the run, so choose another --out")
        if out.is_dir() and any(out.iterdir()) and not only_leftovers(out):
            if command_of(out) is None:
                spared = ", so --overwrite spares it" if overwrite else ""
                raise TanzakuError(f"{out} holds files but no run{spared}; choose another --out, or empty it")
            if not overwrite:
                on = ", or go on with --resume" if (out / BEGUN).is_file() else ""
                raise TanzakuError(f"{out} is not empty; choose another --out or pass --overwrite{on}")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise TanzakuError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None


def clear(out: Path) -> None:
    """Remove an earlier run; files of other names stay."""
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    for folder in (ADAPTERS, STATE):
        shutil.rmtree(out / folder, ignore_errors=True)


def data_record(data: TaskData) -> dict[str, Any]:
    """Rows and cut texts of each split, and what the task knows."""
    return {
        "rows": {split.name: len(split) for split in data.splits()},
        "truncated": {split.name: split.truncated for split in data.splits()},
        "dropped": {split.name: split.dropped for split in data.splits()},
        "task": data.task.to_json(),
    }


def write_results(out: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write results.json beside itself, then rename; returns what was written.

    Raises:
        TanzakuError: it cannot be written; finished adapters are in their folder all the same.
    """
    content = {"tanzaku": VERSION, **content}
    try:
        with written_beside(out / RESULTS) as beside:
            beside.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    except TanzakuError as error:
        raise TanzakuError(f"{error}; finished adapters are in {out / ADAPTERS}") from error
    return content


class Record:
    """Keeps results.json: it listens to a run's events, and writes the file whenever a job ends."""

    def __init__(self, out: Path, about: dict[str, Any], began: float):
        self.out, self.about, self.began = out, about, began
        self.jobs: list[Mapping[str, Any]] = []

    def write(self) -> None:
        """Write results.json."""
        seconds = round(time.monotonic() - self.began, 3)
        write_results(self.out, finite({**self.about, "seconds": seconds, "jobs": self.jobs}))

    def __call__(self, event: Event) -> None:
        if event.kind == "job_started":
            self.began -= event.figures["seconds"]  # of earlier sittings
        elif event.kind == "job_done":
            self.jobs.append(event.figures)
            self.write()
