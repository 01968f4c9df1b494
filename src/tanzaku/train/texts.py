"""What adapters write for validation and test rows, where a task has that: those of several jobs in one batch."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tanzaku.tasks.decoding import Written
from tanzaku.tasks.task import LOSS, Records, Split, picked, subset
from tanzaku.train.active_job import ActiveJob
from tanzaku.train.step import FAILURES, SharedStep, is_memory


@dataclass
class Texts:
    """Of one split of each job's rows.

    Args:
        sample: for some of the rows alone, as after an epoch.
    """

    step: SharedStep
    which: Literal["valid", "test"]
    sample: bool = False
    _found: dict[str, list[Written]] = field(default_factory=dict)

    def together(self, active_jobs: Sequence[ActiveJob], rows_per_step: int, share: float) -> Texts:
        """Write for jobs that came here at once, those of one split in one batch. Where that fails, for want of memory
        or by one adapter's fault, each of them writes alone in :meth:`records`.

        Args:
            rows_per_step: of all jobs in a batch. share: of the machine's threads, for the time that it takes.
        """
        alike: dict[Any, list[ActiveJob]] = {}
        for active in active_jobs if self.step.task.writes else ():
            if (split := self._split(active)) is not None:
                alike.setdefault((id(split), active.job.settings.precision), []).append(active)
        for group in alike.values():
            if len(group) == 1:
                continue
            began = time.monotonic()
            try:
                self._found |= self.step.write(group, self._rows(group[0]), rows_per_step)
            except FAILURES as error:
                if is_memory(error):
                    gc.collect()
            for active in group:
                active.spend(share * (time.monotonic() - began) / len(group))
        return self

    def records(self, active: ActiveJob, records: Records) -> Records:
        """The records of the rows with what the job's adapter writes for them."""
        if not self.step.task.writes:
            return records
        found = self._found.get(active.job.name) or self.step.write([active], self._rows(active))[active.job.name]
        split = self._split(active)
        assert split is not None
        return self.step.task.put(picked(records, self._sampled(split)) if self.sample else records, found)

    def figures(self, active: ActiveJob, records: Records) -> dict[str, float]:
        """Figures of a split by its records; those of text by the rows that are written for."""
        task = self.step.task
        known = task.figures(records)
        # A loss that is no number is none, though the sample may not have its row.
        if not task.writes or math.isnan(known[LOSS.name]):
            return known
        return task.figures(self.records(active, records)) | {k: v for k, v in known.items() if not math.isnan(v)}

    def _split(self, active: ActiveJob) -> Split | None:
        split: Split | None = getattr(active.data, self.which)
        return split

    def _rows(self, active: ActiveJob) -> Split:
        split = self._split(active)
        assert split is not None
        return subset(split, self._sampled(split), split.name) if self.sample else split

    def _sampled(self, split: Split) -> list[int]:
        """Rows spread over all."""
        size = min(self.step.task.sample, len(split))
        return [number * len(split) // size for number in range(size)]
