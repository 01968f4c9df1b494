"""What candidates have seen of the same training rows before their first steps: one looks, and the others know."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor

from tanzaku.tasks.task import Split
from tanzaku.train.results import Job

Rows = tuple[int, int, int, str]


class Sightings:
    """Kept while a job waits that will pass over the same rows in the same way."""

    def __init__(self) -> None:
        self._of: dict[Rows, tuple[Split, dict[Hashable, Mapping[str, Any]]]] = {}

    def of(self, job: Job, rows: Split) -> dict[Hashable, Mapping[str, Any]]:
        """What was seen in passes as this job makes them, to be added to."""
        # The split is kept as well: another one could have its id otherwise.
        return self._of.setdefault(_passes(job, rows), (rows, {}))[1]

    def keep(self, jobs: Iterable[tuple[Job, Split]]) -> None:
        """Forget what none of these jobs will ask for, each with its training rows."""
        wanted = {_passes(job, rows) for job, rows in jobs if job.method.calibrates}
        self._of = {key: kept for key, kept in self._of.items() if key in wanted}

    @property
    def bytes(self) -> int:
        """Memory of all that is kept."""
        return sum(_bytes(found) for _, seen in self._of.values() for found in seen.values())


def _passes(job: Job, rows: Split) -> Rows:
    """All that passes over rows depend on: the seed shuffles them."""
    return id(rows), job.settings.seed, job.settings.batch_size, job.settings.precision


def _bytes(looks: Mapping[str, Any]) -> int:
    tensors = [part for look in looks.values() for part in vars(look).values() if isinstance(part, Tensor)]
    return sum(part.numel() * part.element_size() for part in tensors)
