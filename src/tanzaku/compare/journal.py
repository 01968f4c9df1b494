"""What a run has finished, on disk: a kill at any moment loses nothing that is here, and leaves nothing half.

Every file is written beside, brought to the disk and renamed. A job's adapter is there before its record is, so a
record vouches for all that it names.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from tanzaku.errors import TanzakuError
from tanzaku.files.writing import written_beside
from tanzaku.support.versions import VERSION

STATE = "state"


class Journal:
    """The `state` folder of a run. `jobs` has the records of jobs that ended, by name."""

    def __init__(self, out: Path):
        self.folder = out / STATE
        self.search = self.folder / "search.db"
        self.states = self.folder / "under_way"  # of jobs that have not ended
        self.jobs: dict[str, dict[str, Any]] = {}
        self.spent = 0.0  # seconds of earlier sittings
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of all sittings."""
        return self.spent + time.monotonic() - self._began

    def begin(self, about: dict[str, Any]) -> None:
        """Write down what the run is: its command and recipe, checksums of its rows and base."""
        (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        _write(self.folder / "run.json", {"tanzaku": VERSION, **about})

    def about(self) -> dict[str, Any]:
        """What the run is, as it was begun.

        Raises:
            TanzakuError: the folder holds no run that could go on, or one of another version.
        """
        found, out = _read(self.folder / "run.json"), self.folder.parent
        if found is None:
            raise TanzakuError(f"{out} holds no run to resume; leave --resume out to begin one")
        if (begun := found.get("tanzaku")) != VERSION:
            raise TanzakuError(
                f"--resume: {out} was begun with tanzaku {begun}, and this is {VERSION}: go on with that version, "
                "or begin anew with --overwrite"
            )
        return found

    def go_on(self) -> None:
        """Read what was finished before."""
        for path in sorted((self.folder / "jobs").glob("*.json")):
            record = _read(path)
            # Anything else in the folder is not ours; a record of ours was renamed into place and is whole.
            if record is not None and record.get("name") == path.stem:
                self.jobs[path.stem] = record
        self.spent = max((record.get("spent", 0.0) for record in self.jobs.values()), default=0.0)

    def keep(self, record: dict[str, Any]) -> None:
        """Write down a job that ended."""
        record = {**record, "spent": round(self.seconds, 3)}
        _write(self.folder / "jobs" / f"{record['name']}.json", record)
        self.jobs[record["name"]] = record

    def kept(self, name: str) -> dict[str, Any] | None:
        """Something else that was kept under a name, if it was."""
        return _read(self.folder / f"{name}.json")

    def keep_as(self, name: str, content: dict[str, Any]) -> None:
        """Keep something else, such as the figures of the test rows."""
        _write(self.folder / f"{name}.json", content)


def _write(path: Path, content: dict[str, Any]) -> None:
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None
