"""A run's directory and its results.json, rewritten whole whenever a candidate ends: a kill loses nothing finished."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanzaku import __version__
from tanzaku.errors import TanzakuError

if TYPE_CHECKING:
    from tanzaku.tasks.prepare import ClassificationData
    from tanzaku.train.results import EpochRecord, Job, JobResult, Observer

RESULTS, ADAPTERS = "results.json", "adapters"


def command_of(out: Path) -> str | None:
    """The command whose run the directory holds, or None where it holds none."""
    try:
        found = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found.get("command")) if isinstance(found, dict) and "tanzaku" in found else None


def prepare_out(out: Path, overwrite: bool) -> None:
    """Make the directory and write to it once, before anything slow is loaded.

    Raises:
        TanzakuError: it holds something already, or cannot be written.
    """
    try:
        if out.exists() and not out.is_dir():
            raise TanzakuError(f"{out} is a file; expected a directory for the run, so choose another --out")
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise TanzakuError(f"{out} is not empty; choose another --out or pass --overwrite")
            if command_of(out) is None:
                raise TanzakuError(f"{out} holds files but no run, so --overwrite spares it; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise TanzakuError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None


def clear(out: Path) -> None:
    """Remove an earlier run; files of other names stay."""
    (out / RESULTS).unlink(missing_ok=True)
    shutil.rmtree(out / ADAPTERS, ignore_errors=True)


def data_record(data: ClassificationData) -> dict[str, Any]:
    """Rows and cut texts of each split, and the labels in the order of their ids."""
    return {
        "rows": {split.name: len(split) for split in data.splits()},
        "truncated": {split.name: split.truncated for split in data.splits()},
        "labels": list(data.labels.names),
    }


class Record:
    """Listens to a run on behalf of results.json, and passes on what it hears."""

    def __init__(self, out: Path, about: dict[str, Any], began: float, listener: Observer):
        self.out, self.about, self.began, self.listener = out, about, began, listener
        self.results: list[JobResult] = []
        self.stopped = False

    def write(self) -> None:
        """Write results.json beside itself, then rename."""
        content = {
            "tanzaku": __version__,
            **self.about,
            "seconds": round(time.monotonic() - self.began, 3),
            "jobs": [result.to_json() for result in self.results],
        }
        beside = self.out / f".{RESULTS}.partial"
        try:
            text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
            beside.write_text(text, encoding="utf-8")
            beside.replace(self.out / RESULTS)
        except OSError as error:
            raise TanzakuError(
                f"cannot write {self.out / RESULTS}: {error.strerror or error}; "
                f"finished adapters are in {self.out / ADAPTERS}"
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def job_started(self, job: Job, result: JobResult, steps: int) -> None:
        self.listener.job_started(job, result, steps)

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
        self.listener.step_done(job, step, steps, loss)

    def epoch_done(self, job: Job, record: EpochRecord) -> None:
        self.listener.epoch_done(job, record)

    def job_done(self, job: Job, result: JobResult) -> None:
        self.results.append(result)
        self.stopped = self.stopped or result.status == "interrupted"
        self.write()
        self.listener.job_done(job, result)


def finite(value: Any) -> Any:
    """The value with null for every number that JSON has not: nan and the infinities."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
