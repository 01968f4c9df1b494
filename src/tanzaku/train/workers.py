"""Worker processes: on CPUs, a scheduler's jobs are shared out among processes that have schedulers of their own.

A step is thousands of operations of some microseconds. Within one process, threads wait for each other at every one of
them, and for Python in between. Processes that each train a part of the jobs need not wait, and Python runs in all of
them at once. The frozen weights are in memory once for all workers: they are forks of the process that has them
(`Forked`), or map one file (:mod:`tanzaku.train.spawned`).

Which job goes to which worker, and on how many threads, depends on the jobs alone and not on who is fast: a run that is
repeated has the same companies, and the same rounding.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar, Protocol

import torch
from transformers import PreTrainedModel

from tanzaku.errors import TanzakuError, listed
from tanzaku.tasks.task import TaskData
from tanzaku.train.results import EpochRecord, Job, JobResult, Observer

_ROWS = 3  # a worker has so many of a step's rows at least: with fewer, the weights are read for too little
_START = 20  # starting the operations of a job's own step takes as long as so many tokens
_LOOK = 0.2  # seconds after which Ctrl-C is seen
_DIES_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG
_SIGKILL = getattr(signal, "SIGKILL", 9)


def can_fork(device: torch.device) -> bool:
    """Whether workers can be forks: on Linux, for a model on the CPU of a machine without CUDA, which forbids them."""
    forks = sys.platform == "linux" and hasattr(os, "fork")
    return device.type == "cpu" and forks and not torch.cuda.is_available()


def suited(jobs: Sequence[Job], rows_per_step: int) -> int:
    """Workers that these jobs should have, on as many threads as torch has."""
    sharing = sum(job.method.shares_batch for job in jobs)
    return max(1, min(torch.get_num_threads(), sharing, rows_per_step // _ROWS))


def parts(jobs: Sequence[Job], costs: Sequence[float], number: int) -> list[list[Job]]:
    """The jobs in so many parts of like cost, each in their order.

    The costliest first to whom has least; then the part that costs most gives a job away, or changes one for another's,
    while that makes it cheaper and no other as dear.
    """
    found: list[list[int]] = [[] for _ in range(number)]
    for at in sorted(range(len(jobs)), key=lambda at: -costs[at]):
        min(found, key=lambda part: sum(costs[at] for at in part)).append(at)
    while _exchanged(found, costs):
        pass
    return [[jobs[at] for at in sorted(part)] for part in found]


def _exchanged(parts: list[list[int]], costs: Sequence[float]) -> bool:
    """Make the costliest part cheaper by the best exchange with another; False where there is none."""
    loads = [sum(costs[at] for at in part) for part in parts]
    most = loads.index(max(loads))
    best, exchange = loads[most], None
    for part, load in zip(parts, loads, strict=True):
        if part is parts[most]:
            continue
        for gone in parts[most]:
            for back in (None, *part):
                less = costs[gone] - (0 if back is None else costs[back])
                if (left := max(loads[most] - less, load + less)) < best:
                    best, exchange = left, (part, gone, back)
    if exchange is None:
        return False
    part, gone, back = exchange
    parts[most].remove(gone)
    part.append(gone)
    if back is not None:
        part.remove(back)
        parts[most].append(back)
    return True


def shares(number: int, workers: int) -> list[int]:
    """Of so many threads or rows, those of each worker: one at least."""
    return [max(1, number // workers + (at < number % workers)) for at in range(workers)]


class Employer(Protocol):
    """A scheduler, as its workers see it: see :class:`tanzaku.train.scheduler.JobScheduler`."""

    model: PreTrainedModel
    data: TaskData
    observer: Observer
    results: dict[str, JobResult]
    queue: deque[Job]
    rows_per_step: int
    room: float
    share: float
    interrupted: bool

    @property
    def waiting(self) -> dict[str, int]: ...
    @property
    def queued(self) -> list[str]: ...
    def __enter__(self) -> Employer: ...
    def __exit__(self, *error: Any) -> None: ...
    def run(self) -> None: ...
    def proceed(self, stopped: Sequence[str] = (), waiting: Sequence[str] = ()) -> None: ...
    def plain(self) -> AbstractContextManager[None]: ...
    def like(self) -> Callable[[PreTrainedModel], Employer]: ...
    def become_worker(
        self, jobs: Sequence[Job], rows: int, room: float, observer: Observer, hand_back: Callable[[Job], None]
    ) -> None: ...


class Crew(ABC):
    """The workers of a scheduler: they take the queued jobs that share batches.

    What they report goes to the scheduler's observer and results. A job that is too large for a worker's share of a
    memory limit comes back into the queue. The jobs of a worker that is killed begin again in a new one, from their
    last state where the run keeps states; a job whose worker is killed a second time ends the run.
    """

    private: ClassVar[int]  # bytes that a worker comes to have for itself, beside those of tensors

    def __init__(self, scheduler: Employer, number: int):
        self.scheduler = scheduler
        sharing = [job for job in scheduler.queue if job.method.shares_batch]
        self.jobs = {job.name: job for job in sharing}
        self.members: list[_Member] = []
        self._begun_again: set[str] = set()
        self._threads = torch.get_num_threads()
        found = parts(sharing, [_cost(job, scheduler) for job in sharing], number)
        try:
            for part, rows in zip(found, shares(scheduler.rows_per_step, number), strict=True):
                self._hire(part, rows, scheduler.room / number - self.private)
        except BaseException:
            self.leave(at_once=True)
            raise
        for job in sharing:
            scheduler.queue.remove(job)

    @abstractmethod
    def _started(self, part: list[Job], rows: int, room: float, pipe: Connection, others: list[Connection]) -> Any:
        """A process that serves these jobs through its end of a pipe. It must not keep the `others` open, if it has
        them.

        Raises:
            OSError: there is no room for another.
        """

    def _hire(self, part: list[Job], rows: int, room: float) -> _Member:
        here, there = multiprocessing.Pipe()
        try:
            process = self._started(part, rows, room, there, [here, *(member.pipe for member in self.members)])
        except BaseException:
            here.close()
            raise
        finally:
            there.close()
        names = [job.name for job in part]
        member = _Member(process, here, names, rows, room, queued=names)
        self.members.append(member)
        return member

    @property
    def waiting(self) -> dict[str, int]:
        """Jobs that wait at a rung, with the epochs they have done."""
        return {name: epoch for member in self.members for name, epoch in member.waiting.items()}

    @property
    def queued(self) -> list[str]:
        """Jobs that no worker has begun yet."""
        return [name for member in self.members for name in member.queued]

    def run(self) -> None:
        """Let all train until every job has ended or waits at a rung.

        Raises:
            KeyboardInterrupt: Ctrl-C; jobs under way have ended as interrupted.
            TanzakuError: a worker is gone, and so is the one that took its place.
        """
        busy = [member for member in self.members if member.jobs]
        each = shares(self._threads, len(busy))
        for member, threads in zip(busy, each, strict=True):
            member.send("run", threads, threads / sum(each))
        try:
            with _deferred_interrupt() as interrupted:
                self._listen(interrupted)
            if any(member.interrupted for member in self.members):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            for member in self.members:
                if member.busy:
                    member.tell("stop")
            self._listen(stopping=True)
            raise

    def proceed(self, stopped: Sequence[str] = (), waiting: Sequence[str] = ()) -> None:
        """As :meth:`JobScheduler.proceed`."""
        for member in self.members:
            if member.waiting:
                member.send("proceed", stopped, waiting)
        self._listen()

    def leave(self, at_once: bool = False) -> None:
        """End the workers. What they have under way is lost."""
        for member in self.members:
            if at_once:
                member.process.kill()
            else:
                member.send("leave")
        for member in self.members:  # they give their memory back side by side
            member.process.join()
            member.pipe.close()

    def _listen(self, interrupted: Sequence[int] = (), stopping: bool = False) -> None:
        """Hear the workers until each has done what it was sent to do."""
        while pipes := {member.pipe: member for member in self.members if member.busy}:
            for pipe in wait(list(pipes), timeout=_LOOK):
                member = pipes[pipe]  # type: ignore[index]
                try:
                    news = member.pipe.recv()
                except (EOFError, OSError):
                    self._lost(member, stopping)
                else:
                    self._hear(member, *news)
            if interrupted:
                raise KeyboardInterrupt

    def _hear(self, member: _Member, what: str, *news: Any) -> None:
        observer, results = self.scheduler.observer, self.scheduler.results
        member.heard = True
        if what == "ready":
            member.busy = False
            member.queued, member.waiting, member.interrupted = news
        elif what == "broken":
            error, text = news
            raise error from _InWorker(text)
        elif what == "back":
            member.jobs.remove(news[0])
            self.scheduler.queue.append(self.jobs[news[0]])
        elif what == "started":
            name, result, steps = news
            results[name] = result
            observer.job_started(self.jobs[name], result, steps)
        elif what == "step":
            name, *figures = news
            observer.step_done(self.jobs[name], *figures)
        elif what == "epoch":
            name, record = news
            results[name].epochs.append(record)
            observer.epoch_done(self.jobs[name], record)
        elif what == "warned":
            observer.warned(news[0])
        else:
            name, result = news
            results[name] = result
            member.jobs.remove(name)
            observer.job_done(self.jobs[name], result)
            member.tell("noted")

    def _lost(self, member: _Member, stopping: bool) -> None:
        """A worker is gone: let another begin its jobs again, unless the run is about to stop."""
        self.members.remove(member)
        member.pipe.close()
        how = member.fate()
        left = {name: self.jobs[name] for name in member.jobs}
        under_way = {name: result for name in left if (result := self.scheduler.results.pop(name, None)) is not None}
        if stopping:
            for name, result in under_way.items():
                result.status, result.error = "interrupted", f"its worker process {how}"
                self.scheduler.results[name] = result
                self.scheduler.observer.job_done(left[name], result)
            return
        if not left:
            return
        advice = "use fewer workers, or one, with which the run is a single process"
        if not (member.heard or member.process.exitcode == -_SIGKILL):
            raise TanzakuError(f"a worker process {how} before it trained{self._why_not_begun()}; or {advice}")
        if twice := [name for name in left if name in self._begun_again]:
            raise TanzakuError(f"a worker process {how}, twice with {listed(twice)}: {advice}")
        self._begun_again |= left.keys()
        self.scheduler.observer.warned(
            f"a worker process {how}; another begins these again, from their last state where there is one: "
            f"{listed(left)}"
        )
        try:
            successor = self._hire(list(left.values()), member.rows, member.room)
        except OSError as error:
            raise TanzakuError(f"a worker process {how}, and no other can be had ({error}): {advice}") from None
        if member.order and member.order[0] == "run":
            successor.send(*member.order)

    def _why_not_begun(self) -> str:
        """What a worker that could not begin may have lacked."""
        return ""


class Forked(Crew):
    """Workers that are forks of the process: nothing is made anew, and weights, their copies and rows are shared."""

    private = 2 * 10**8

    def _started(self, part: list[Job], rows: int, room: float, pipe: Connection, others: list[Connection]) -> Any:
        # Whoever holds an end of a pipe keeps it open: a worker must hold its own alone.
        process = multiprocessing.get_context("fork").Process(
            target=_work_in_fork,
            args=(self.scheduler, part, rows, room, pipe, others, os.getpid()),
            name="tanzaku",
            daemon=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: a worker starts its own
            process.start()
        return process


@dataclass
class _Member:
    """A worker, as the scheduler's process has it. `jobs` are those that have not ended."""

    process: Any
    pipe: Connection
    jobs: list[str]
    rows: int
    room: float
    queued: list[str]
    waiting: dict[str, int] = field(default_factory=dict)
    busy: bool = False
    interrupted: bool = False
    heard: bool = False  # anything
    order: tuple[Any, ...] = ()  # the last one

    def __post_init__(self) -> None:
        self.jobs, self.queued = [*self.jobs], [*self.queued]

    def send(self, *order: Any) -> None:
        """Send it to do something; it is busy until it is ready again."""
        self.busy, self.order = True, order
        self.tell(*order)

    def tell(self, *message: Any) -> None:
        with suppress(OSError):  # it is gone, as whoever listens to it will hear
            self.pipe.send(message)

    def fate(self) -> str:
        """How it ended."""
        self.process.join(10)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return f"{how} (the machine may be out of memory)" if code == -_SIGKILL else how


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Within the block Ctrl-C is noted in the list, and raised nowhere: half of a message may have been read. A second
    one comes through."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    # In another thread it is raised elsewhere. Who ignores it, as what runs in the background of a shell, goes on so.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        if noted:
            before(number, frame)
        noted.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class _InWorker(Exception):
    """Where in a worker its error was raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


# -- in a worker


def _work_in_fork(
    scheduler: Employer,
    part: list[Job],
    rows: int,
    room: float,
    pipe: Connection,
    others: list[Connection],
    parent: int,
) -> None:
    belong_to(parent)
    gc.freeze()  # what the parent has is never collected here, which would copy it
    for other in others:
        other.close()
    # OpenMP's threads are no part of a fork, and the thread that forked would wait for them. A new one gets its own.
    thread = threading.Thread(target=serve, args=(scheduler, part, rows, room, Reporter(pipe)))
    thread.start()
    thread.join()


def belong_to(parent: int) -> None:
    """End with the process that started this one, and leave Ctrl-C to it, who says what it means."""
    with suppress(OSError, TypeError, AttributeError):  # elsewhere than on Linux it is noticed at the next report
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, _SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def serve(scheduler: Employer, part: list[Job], rows: int, room: float, reporter: Reporter) -> None:
    """Train a part of the jobs as the parent says, until it needs this worker no more."""
    try:
        scheduler.become_worker(part, rows, room, reporter, reporter.hand_back)
        while (order := reporter.order())[0] != "leave":
            if order[0] == "run":
                torch.set_num_threads(order[1])
                scheduler.share = order[2]
                scheduler.run()
            else:
                scheduler.proceed(*order[1:])
            reporter.send("ready", scheduler.queued, scheduler.waiting, scheduler.interrupted)
    except BaseException as error:
        reporter.send("broken", _portable(error), traceback.format_exc())


class Reporter:
    """The observer of a worker's scheduler: it passes everything on to the parent."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def job_started(self, job: Job, result: JobResult, steps: int) -> None:
        self.send("started", job.name, result, steps)

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
        self.send("step", job.name, step, steps, loss)
        if self.pipe.poll():
            self._receive()  # "stop": there is nothing else to hear
            raise KeyboardInterrupt

    def epoch_done(self, job: Job, record: EpochRecord) -> None:
        self.send("epoch", job.name, record)

    def job_done(self, job: Job, result: JobResult) -> None:
        self.send("done", job.name, result)
        if self._receive()[0] == "stop":  # and not "noted": what the job depends on must stay
            raise KeyboardInterrupt

    def warned(self, line: str) -> None:
        self.send("warned", line)

    def hand_back(self, job: Job) -> None:
        """A job that is too large for a worker."""
        self.send("back", job.name)

    def order(self) -> Any:
        """What to do next."""
        while (order := self._receive())[0] not in ("run", "proceed", "leave"):
            pass  # it came when the work was done
        return order

    def send(self, *message: Any) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            os._exit(1)  # nobody is left to train for

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error, if it can be sent to another process and read there, or one that says as much."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _cost(job: Job, scheduler: Employer) -> float:
    """What a job takes, in the time of a token."""
    s, train = job.settings, (job.data or scheduler.data).train
    virtual = getattr(job.method, "num_virtual_tokens", 0) if job.method.lengthens_rows else 0
    tokens = sum(virtual + length for example in train.examples for length in example.lengths)
    tokens += sum(example.decoder_length * len(example.rows) for example in train.examples)
    batches = math.ceil(len(train) / s.batch_size)
    passes = s.epochs if s.max_steps is None else s.max_steps * s.accumulation / batches
    return passes * (tokens + _START * batches)
