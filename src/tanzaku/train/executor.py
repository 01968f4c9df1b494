"""Who trains a scheduler's jobs: the scheduler itself, in its process, or workers; and which workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from tanzaku.train.results import Job
from tanzaku.train.spawned import Spawned
from tanzaku.train.workers import Crew, Forked, can_fork, suited


class Executor(Protocol):
    """Trains jobs, of which some wait at rungs. A :class:`tanzaku.train.scheduler.JobScheduler` is one, within the
    process; :class:`Forked` and :class:`Spawned` are others, of several processes."""

    @property
    def waiting(self) -> dict[str, int]:
        """Jobs that wait at a rung, with the epochs they have done."""
        ...

    @property
    def queued(self) -> list[str]:
        """Jobs that are not begun."""
        ...

    def run(self) -> None:
        """Train until every job has ended or waits at a rung."""
        ...

    def proceed(self, stopped: Sequence[str] = (), waiting: Sequence[str] = ()) -> None:
        """Let the jobs at a rung go on, but for those `stopped`, which end there, and those still `waiting`."""
        ...

    def leave(self, at_once: bool = False) -> None:
        """End what the jobs were trained with. What is under way is lost."""
        ...


def kind_of_workers(device: torch.device) -> type[Crew] | None:
    """The workers for a model on this device: forks where the system has them, other processes where it has not or
    beside CUDA, and none on a GPU."""
    if device.type != "cpu":
        return None
    return Forked if can_fork(device) else Spawned


def number_of_workers(jobs: Sequence[Job], rows_per_step: int, device: torch.device, wanted: int | None) -> int:
    """How many workers these jobs get, of those that share batches. Where nobody says, they are forks or none: others
    take seconds to start, and read the program's main module, which must be written for that."""
    sharing = sum(job.method.shares_batch for job in jobs)
    if wanted is None:
        wanted = suited(jobs, rows_per_step) if kind_of_workers(device) is Forked else 1
    return min(wanted, sharing)
