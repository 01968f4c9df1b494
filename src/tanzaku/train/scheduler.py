"""The scheduler of jobs: they come from a queue, train together on one frozen model, and leave a result each."""

from __future__ import annotations

import copy
import gc
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import activate, adapters, attach, count, detach
from tanzaku.core.manager import manager_of
from tanzaku.engine.memory import Need, in_use, peak, reset_peak
from tanzaku.engine.precision import precision_for
from tanzaku.errors import TanzakuError
from tanzaku.models.families.structure import block_of
from tanzaku.storage import starts, store
from tanzaku.storage.card import training_record
from tanzaku.tasks.inference import perplexity
from tanzaku.tasks.metrics import interval_of
from tanzaku.tasks.task import Records, Split, Task, TaskData
from tanzaku.train.active_job import ActiveJob, Diverged
from tanzaku.train.executor import Executor, kind_of_workers, number_of_workers
from tanzaku.train.results import EpochRecord, Job, JobResult, Observer
from tanzaku.train.sightings import Sightings
from tanzaku.train.state import States
from tanzaku.train.step import FAILURES, SharedStep, is_memory
from tanzaku.train.texts import Texts
from tanzaku.train.workers import Forked

ROWS_PER_STEP = {"cuda": 32}  # where nothing is said; the processors of a PC are busy with half of that
_SPARE = 1.1  # a batch of several jobs needs a little more than they need alone: parts are put together in copies


class Silent:
    """An observer that shows nothing."""

    def job_started(self, job: Job, result: JobResult, steps: int) -> None: ...

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None: ...

    def epoch_done(self, job: Job, record: EpochRecord) -> None: ...

    def job_done(self, job: Job, result: JobResult) -> None: ...

    def warned(self, line: str) -> None: ...


def train_jobs(
    model: PreTrainedModel,
    data: TaskData,
    jobs: Sequence[Job],
    *,
    out: Path | None = None,
    observer: Observer | None = None,
    meta: dict[str, Any] | None = None,
    rows_per_step: int | None = None,
    memory: int | None = None,
    workers: int | None = None,
    states: Path | None = None,
) -> list[JobResult]:
    """Train every job on the frozen `model`, which is left as it was; one result a job, in their order.

    A job that fails (a bad setting, a loss that is no number) ends alone. Ctrl-C ends the run: jobs that are done
    keep their results, those under way are marked interrupted, those not begun have none.

    Args:
        model: one made for the task, on the device to train on.
        out: a directory; each finished adapter is saved below its `adapters`, with `meta` beside it.
        rows_per_step: most rows of all jobs in one step; None: 16, on a GPU 32. A job's batch is never split.
        memory: most bytes that the process and its workers (on CUDA, torch on the device) may use; None: no limit.
        workers: processes that share the jobs and the frozen weights, for a model on the CPU; None: chosen on Linux
            without CUDA, elsewhere 1. Where there is no fork, a worker reads the program's main module.
        states: a directory for the state of jobs under way, written after each epoch. A job that has one there goes on
            from it; the state of another job of that name is an error.
    """
    with JobScheduler(
        model,
        data,
        out=out,
        observer=observer,
        meta=meta,
        rows_per_step=rows_per_step,
        memory=memory,
        workers=workers,
        states=states,
    ) as scheduler:
        scheduler.add(jobs)
        scheduler.run()
        return [scheduler.results[job.name] for job in jobs if job.name in scheduler.results]


class JobScheduler:
    """Jobs that train together. A context manager: what is still attached at its end is taken off the model.

    `results` has those of all jobs that were begun. `interrupted` tells that Ctrl-C ended the last run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: TaskData,
        *,
        out: Path | None = None,
        observer: Observer | None = None,
        meta: dict[str, Any] | None = None,
        rows_per_step: int | None = None,
        memory: int | None = None,
        workers: int | None = None,
        measure: bool = False,
        states: Path | None = None,
    ):
        self._check(model, data)
        self.model, self.data, self.out = model, data, out
        self.observer: Observer = observer or Silent()
        self.meta = meta or {}
        self.device = model.device
        if rows_per_step is not None and rows_per_step < 1:
            raise TanzakuError(f"rows_per_step is {rows_per_step}, expected at least 1")
        self.rows_per_step = rows_per_step or ROWS_PER_STEP.get(self.device.type, 16)
        if workers is not None and workers < 1:
            raise TanzakuError(f"workers is {workers}, expected at least 1")
        if workers is not None and workers > 1 and kind_of_workers(self.device) is None:
            raise TanzakuError(
                f"workers is {workers}, and on {self.device.type} all jobs train in one process; expected 1"
            )
        self.workers = workers
        self.crew: Executor | None = None  # of other processes
        self._hand_back: Callable[[Job], None] | None = None  # in a worker
        self.share = 1.0  # of the machine's threads
        self.measure = measure or memory is not None
        self.states = None if states is None else States(states)
        self.room: float = float("inf")
        if memory is not None:
            self.room = memory - in_use(self.device)
            if self.room <= 0:
                raise TanzakuError(
                    f"a memory limit of {_size(memory)} is less than the {_size(in_use(self.device))} that are in use "
                    "with the model loaded; allow more"
                )
        self.step = SharedStep(model, data.task, data.pad_token_id)
        self._sightings = Sightings()
        self.queue: deque[Job] = deque()
        self.active_jobs: dict[str, ActiveJob] = {}
        self.results: dict[str, JobResult] = {}
        self.interrupted = False
        self._measured: dict[str, Need] = {}
        self._virtual = self._longest = self._decoded = 0  # tokens, of any job
        self._full = False  # no room for the next in the queue, until another leaves
        self._trackers: dict[str, Accelerator] = {}

    def __enter__(self) -> JobScheduler:
        self.step.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._dismiss(at_once=True)
        for name in list(self.active_jobs):
            self._take_off(name)
        self.step.__exit__(*error)

    def add(self, jobs: Sequence[Job]) -> None:
        """Queue jobs. Those that cannot share a batch come last.

        Raises:
            TanzakuError: two jobs of one name, data for another model, or jobs that differ in accelerations, which are
                the whole model's.
        """
        jobs = [self._settled(job) for job in jobs]
        names = [*self.results, *(job.name for job in self.queue), *(job.name for job in jobs)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise TanzakuError(f"job names must differ, found {', '.join(twice)} twice")
        for job in jobs:
            self._check(self.model, job.data or self.data)
        before = [self.step.wanted] if self.results or self.queue else []
        wanted = [*dict.fromkeys([*before, *(job.settings.accelerations for job in jobs)])]
        if len(wanted) > 1:
            raise TanzakuError(
                f"jobs of one run have accelerations {wanted[0]!r} and {wanted[1]!r}; give all of them the same"
            )
        for each in wanted:
            self.step.accelerate(each)
        for job in jobs:
            self._virtual = max(self._virtual, getattr(job.method, "num_virtual_tokens", 0))
            self._longest = max(self._longest, _longest((job.data or self.data).train))
            self._decoded = max(self._decoded, _decoded((job.data or self.data).train))
        self.queue.extend(jobs)
        self._full = False

    def _settled(self, job: Job) -> Job:
        if job.settings.precision != "auto":
            return job
        weights = self.step.accelerations.common.products.kind
        here = {"precision": precision_for(self.step.device, weights)}
        return replace(job, settings=job.settings.model_copy(update=here))

    def run(self) -> None:
        """Train until every job has ended or waits at a rung."""
        try:
            self._share_out()
            if self.crew is not None:
                self.crew.run()
                if self.crew.waiting:
                    return
                self._dismiss()
            while True:
                self._admit()
                if not (active_jobs := self._picked()):
                    return
                self._train(active_jobs)
        except KeyboardInterrupt:
            self.interrupted = True
            for name in list(self.active_jobs):
                result = self.results[name]
                self._end(self.active_jobs[name], "interrupted", f"stopped by hand after epoch {len(result.epochs)}")
        finally:
            self.model.eval()

    def proceed(self, stopped: Sequence[str] = (), waiting: Sequence[str] = ()) -> None:
        """Let the jobs at a rung go on, but for those `stopped`, which end there, and those still `waiting`."""
        for name, active in list(self.active_jobs.items()):
            if active.waiting and name not in waiting:
                active.waiting = False
                if name in stopped:
                    active.result.predictions = None
                    self._end(active, "stopped")
        if self.crew is not None:
            self.crew.proceed(stopped, waiting)

    @property
    def waiting(self) -> dict[str, int]:
        """Jobs that wait at a rung, with the epochs they have done."""
        own = {name: active.epoch for name, active in self.active_jobs.items() if active.waiting}
        return own if self.crew is None else {**own, **self.crew.waiting}

    @property
    def queued(self) -> list[str]:
        """Jobs that are not begun."""
        own = [job.name for job in self.queue]
        return own if self.crew is None else [*self.crew.queued, *own]

    # -- workers

    def _share_out(self) -> None:
        """Let workers have the queued jobs that share batches, where that is faster."""
        sharing = [job for job in self.queue if job.method.shares_batch]
        number = number_of_workers(sharing, self.rows_per_step, self.device, self.workers)
        kind = kind_of_workers(self.device)
        if number > 1 and kind is not None and self.crew is None and not self.active_jobs:
            if kind is Forked:
                self._arrange(sharing[0])  # here, for all of them
            try:
                self.crew = kind(self, number)
            except OSError as error:
                self.observer.warned(f"no worker processes can be had ({error}): one process trains all")

    def _dismiss(self, at_once: bool = False) -> None:
        if self.crew is not None:
            self.crew.leave(at_once)
            self.crew = None

    def leave(self, at_once: bool = False) -> None:
        """End the workers, if there are any. What they have under way is lost."""
        self._dismiss(at_once)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within the block the model is as it was given, fit to be copied. Nothing may train."""
        self.step.__exit__()
        try:
            yield
        finally:
            self.step.__enter__()

    def like(self) -> Callable[[PreTrainedModel], JobScheduler]:
        """Makes a scheduler of the same rows and settings, of a copy of the model in another process."""
        states = None if self.states is None else self.states.folder
        return partial(JobScheduler, data=self.data, out=self.out, meta=self.meta, measure=self.measure, states=states)

    def become_worker(
        self, jobs: Sequence[Job], rows: int, room: float, observer: Observer, hand_back: Callable[[Job], None]
    ) -> None:
        """In a worker's process: train these jobs, with so many rows a step and bytes of a memory limit.

        Args:
            hand_back: takes a job that needs more.
        """
        self.queue, self.workers, self.observer, self._hand_back = deque(jobs), 1, observer, hand_back
        self.rows_per_step, self.room = rows, room
        self.crew = None  # a fork made in the place of another has them, too

    # -- who takes part

    def _admit(self) -> None:
        """Begin queued jobs while there is room for them."""
        while self.queue and not self._full:
            live = [active for active in self.active_jobs.values() if not active.waiting]
            sharing = [job for job in self.queue if job.method.shares_batch]
            job = sharing[0] if sharing else self.queue[0]
            if live and not (job.method.shares_batch and live[0].job.method.shares_batch):
                return
            # Twice as many rows as fit in a step, so that batches of like length can be found for it.
            if sum(active.rows for active in live) >= 2 * self.rows_per_step:
                return
            if not self._begin(job, alone=not live):
                return

    def _arrange(self, job: Job) -> None:
        """Have the frozen weights multiply faster while jobs share them, where there is plenty of room for it: once for
        all workers that are forks, and for no other."""
        if not job.method.shares_batch:  # and no job after it, and it needs what they take
            self.room += self.step.accelerations.free()
        elif self._hand_back is None and not self.active_jobs and self.step.uses_weights(job.settings.precision):
            self.room -= self.step.accelerations.take(self.room)

    def _begin(self, job: Job, alone: bool) -> bool:
        """Attach a job and take it from the queue; False where there is no room for it now."""
        result = JobResult(
            name=job.name,
            method=job.method.name,
            method_settings=job.method.settings(),
            train_settings=job.settings.model_dump(),
        )
        if not job.method.shares_batch:
            result.note = f"runs alone: {job.method.name} changes every weight"
        try:
            if not self.active_jobs:
                reset_peak(self.device)
            adapter = self._attached(job)
            self._arrange(job)
            if job.init_from is not None:
                result.init_from = starts.described(job.init_from)
            elif adapter.method.calibrates:
                rows = self._rows_of(job)
                self.step.calibrate(job, adapter, rows.examples, self._sightings.of(job, rows))
                self._sightings.keep((each, self._rows_of(each)) for each in self.queue if each is not job)
            result.method_settings = adapter.method.settings()
            numbers = count(self.model, job.name)
            result.trainable_parameters, result.total_parameters = numbers.trainable, numbers.total
            active = ActiveJob(job, adapter, job.data or self.data, result, self.device)
            brought = (manager_of(self.model).get(name) for name in adapter.brought)
            active.kept_bytes += sum(p.numel() * p.element_size() for each in brought for p in each.parameters())
            if self.measure:
                active.need = self._need_of(active)
                result.step_bytes = active.need.step + active.kept_bytes
                attached = [*self.active_jobs.values(), active]
                # What it keeps may leave too little room for a step of one that is there already.
                if not (fits := self._each_fits(attached)):
                    self._sightings.keep(())
                    fits = self._each_fits(attached)
                if not fits and self._hand_back is None:
                    self.room += self.step.accelerations.free()  # a job is worth more than a faster product
                    fits = self._each_fits(attached)
                if not fits:
                    if not alone or len(self.active_jobs):
                        self._take_off(job.name)
                        self._full = True
                        return False
                    if self._hand_back is not None:
                        self._take_off(job.name)
                        self.queue.remove(job)
                        self._hand_back(job)
                        return True
                    raise TanzakuError(
                        f"a step needs {_size(active.kept_bytes + active.need.alone)} beside the model and "
                        f"{_size(self.room)} are left of the memory limit: use gradient_checkpointing, or a smaller "
                        "batch_size, eval_batch_size or max_length"
                    )
            if job.settings.tracker:
                self._trackers[job.name] = self._tracker(job)
        except FAILURES as error:
            self.queue.remove(job)
            self.results[job.name] = result
            result.status, result.error = "failed", _line(error)
            self._take_off(job.name)
            self.observer.job_done(job, result)
            return True
        except BaseException:
            self._take_off(job.name)  # it is attached, but no job yet
            raise
        try:
            if self.states is not None:
                self.states.restore(active)
        except BaseException:
            # No failure of the job: whoever runs it shall choose what becomes of the state.
            self._take_off(job.name)
            raise
        self.queue.remove(job)
        self.active_jobs[job.name], self.results[job.name] = active, result
        self.observer.job_started(job, result, active.steps)
        if active.finished:  # it was cut off between its last epoch and its end
            self._finish([active])
        return True

    def _attached(self, job: Job) -> Adapter:
        """The job's adapter, with those that it uses."""
        method = copy.deepcopy(job.method)
        if job.init_from is not None:
            return starts.begin(self.model, method, job.name, job.init_from, (job.data or self.data).task)
        with store.bringing(self.model, method, job.name) as block:
            for label, folder in job.uses.items():
                block.bring(label, folder)
            return attach(self.model, method, job.name, seed=job.settings.seed)

    def _need_of(self, active: ActiveJob) -> Need:
        # Folds and seeds of one candidate need the same.
        s, method = active.job.settings, active.job.method
        splits = (*active.data.splits(), *_probed(active.data))
        longest = [(_longest(split), _decoded(split)) for split in splits]
        key = json.dumps(
            [
                *(method.name, method.settings(), active.rows, longest),
                *(s.precision, s.gradient_checkpointing, s.accumulation, s.eval_batch_size),
            ],
            default=str,
        )
        if key not in self._measured:
            shares = method.shares_batch and self.room < float("inf")
            widest = self._virtual + self._longest if shares else 0
            self._measured[key] = self.step.need_of(active, widest, self._decoded)
        return self._measured[key]

    def _fits(self, attached: Sequence[ActiveJob], stepping: Sequence[ActiveJob]) -> bool:
        if self.room == float("inf"):
            return True
        # What an adapter and its optimizer keep stays while others step; activations and gradients do not.
        state = sum(active.kept_bytes for active in attached) + self._sightings.bytes
        needs = [(active, active.need) for active in stepping if active.need is not None]
        if len(needs) == 1:
            return state + needs[0][1].alone <= self.room
        rows = {active.job.name: active.size for active in stepping}
        width = max(active.virtual for active in stepping) + max(active.length for active in stepping)
        work = sum(need.beside(rows[active.job.name], width) for active, need in needs)
        width = max(width, max(active.decoder_length for active in stepping))
        work += width * sum(rows[active.job.name] * _held_for_others(active, stepping) for active in stepping)
        return state + _SPARE * work <= self.room

    def _rows_of(self, job: Job) -> Split:
        return (job.data or self.data).train

    def _each_fits(self, attached: Sequence[ActiveJob]) -> bool:
        return all(self._fits(attached, [each]) for each in attached)

    def _picked(self) -> list[ActiveJob]:
        """The jobs of the next step: the one with the most left to do, and those whose rows are of most like length."""
        ready = [active for active in self.active_jobs.values() if not active.waiting]
        if not ready:
            return []
        first = max(ready, key=lambda active: active.batches_left)
        if not first.job.method.shares_batch:
            return [first]
        others = [active for active in ready if active is not first and _goes_with(active, first)]
        if others and (self.step.of_one_width or any(each.adapter.reads_padding for each in (first, *others))):
            others = [active for active in others if _sizes(active) == _sizes(first)]
        picked, rows = [first], first.size
        for active in sorted(others, key=lambda active: _apart(active, first)):
            more, together = active.size, [*picked, active]
            if rows + more > self.rows_per_step or not self._has_positions(together):
                continue
            if self._fits(list(self.active_jobs.values()), together):
                picked = together
                rows += more
        # Neighbours of one kind are computed together, and rows that need no gradient in low layers lie side by side.
        return sorted(
            picked,
            key=lambda active: (
                self.step.accelerations.depth(active.adapter),
                active.job.method.name,
                active.size,
                active.job.name,
            ),
        )

    def _has_positions(self, stepping: Sequence[ActiveJob]) -> bool:
        """Whether the longest prompt and the longest text, which may be different jobs', have room in one batch."""
        before, limit = max(active.before for active in stepping), self.step.max_positions
        longest = max(max(active.length, active.decoder_length) for active in stepping)
        return before == 0 or limit is None or before + longest <= limit

    # -- training

    def _train(self, active_jobs: list[ActiveJob]) -> None:
        """One step of these jobs. Where it fails, parts of it are tried, down to the job that is to blame."""
        began = time.monotonic()
        kept = [active.gradients() for active in active_jobs]
        try:
            trained, failure = self._step(active_jobs), None
        except FAILURES as error:
            # Only what it says is kept: the error itself holds the activations of all rows.
            failure = (_line(error), is_memory(error))
        if failure is not None:
            for active, gradients in zip(active_jobs, kept, strict=True):
                active.reset_gradients(gradients)
            # A job whose loss was no number has ended in the step that failed.
            left = [active for active in active_jobs if active.job.name in self.active_jobs]
            reason, too_large = failure
            if left and too_large and (freed := self.step.accelerations.free()):
                gc.collect()
                self.room += 0 if self._hand_back else freed  # other workers have them still
                self._train(left)
            elif len(active_jobs) == 1 and left:
                self._end(left[0], "failed", reason)
            elif left:
                for part in self._parts(left, too_large):
                    self._train(part)
            return
        ended = []
        for active in trained:
            try:
                if active.backward_done():
                    ended.append(active)
            except FAILURES as error:
                self._end(active, "failed", _line(error))
        seconds, rows = time.monotonic() - began, sum(active.rows_done for active in trained)
        for active in trained:
            active.spend(self.share * seconds * active.rows_done / rows)
            if active.job.name in self.active_jobs:
                self.observer.step_done(active.job, active.step, active.steps, active.last_loss)
        self._end_epochs(ended)

    def _guarded(self, work: Callable[[ActiveJob], None], active: ActiveJob) -> None:
        """Where the work fails, the job ends."""
        try:
            work(active)
        except FAILURES as error:
            self._end(active, "failed", _line(error))

    def _parts(self, active_jobs: list[ActiveJob], too_large: bool) -> list[list[ActiveJob]]:
        """What to try of a step that failed: halves, or where memory was short, parts of half the rows at most."""
        if not too_large:
            half = len(active_jobs) // 2
            return [part for part in (active_jobs[:half], active_jobs[half:]) if part]
        gc.collect()
        self.rows_per_step = max(1, sum(active.size for active in active_jobs) // 2)
        parts: list[list[ActiveJob]] = []
        room = 0
        for active in active_jobs:
            rows = active.size
            if rows > room:
                parts.append([])
                room = self.rows_per_step
            parts[-1].append(active)
            room -= rows
        return parts

    def _step(self, active_jobs: list[ActiveJob]) -> list[ActiveJob]:
        """Forward and backward; tells whose loss was a number. The others have ended."""
        fine: list[ActiveJob] = []
        with self.step.losses(active_jobs, [active.examples() for active in active_jobs]) as losses:
            values = torch.stack([loss.detach().float() for loss in losses]).tolist()
            wanted = []
            for active, loss, value in zip(active_jobs, losses, values, strict=True):
                try:
                    active.check(value)
                except Diverged as error:
                    self._end(active, "failed", str(error))
                    continue
                fine.append(active)
                wanted.append(active.scaled(loss))
            if wanted:
                # Jobs share no parameter, so one backward pass of all losses gives each its own gradient.
                torch.autograd.backward(wanted)
            for active, value in zip(active_jobs, values, strict=True):
                if active in fine:
                    active.accept(value)
        return fine

    def _end_epochs(self, ended: Sequence[ActiveJob]) -> None:
        """Jobs that have come to the end of an epoch, all of them at once."""
        texts = self._texts(ended, "valid", sample=True)
        for active in ended:
            self._guarded(partial(self._end_epoch, texts), active)
        self._finish([active for active in self._live(ended) if active.finished])

    def _live(self, active_jobs: Sequence[ActiveJob]) -> list[ActiveJob]:
        return [active for active in active_jobs if active.job.name in self.active_jobs]

    def _texts(self, active_jobs: Sequence[ActiveJob], which: Literal["valid", "test"], sample: bool = False) -> Texts:
        texts = Texts(self.step, which, sample)
        # What a batch of several would need is not known: under a limit each writes alone.
        return texts if self.room < float("inf") else texts.together(active_jobs, self.rows_per_step, self.share)

    def _end_epoch(self, texts: Texts, active: ActiveJob) -> None:
        began = time.monotonic()
        valid: dict[str, float] = {}
        if active.data.valid is not None:
            active.records = self.step.records(active, active.data.valid)
            valid = texts.figures(active, active.records)
        active.spend(self.share * (time.monotonic() - began))
        record = active.end_epoch(valid)
        if active.job.name in self._trackers:
            figures = {f"valid/{key}": value for key, value in valid.items()}
            self._trackers[active.job.name].log(
                {"train/loss": record.train_loss, "learning_rate": record.learning_rate, **figures}, step=active.step
            )
        if self.states is not None:
            self.states.keep(active)
        self.observer.epoch_done(active.job, record)

    def _finish(self, done: Sequence[ActiveJob]) -> None:
        """The figures and the adapters of jobs that have done their epochs."""
        for active in done:
            self._guarded(ActiveJob.restore_best, active)
        done = self._live(done)
        valid, test = self._texts(done, "valid"), self._texts(done, "test")
        for active in done:
            self._guarded(partial(self._close, valid, test), active)

    def _close(self, valid: Texts, test: Texts, active: ActiveJob) -> None:
        began = time.monotonic()
        self._judge(active, valid, test)
        active.spend(self.share * (time.monotonic() - began))
        if (probe := active.data.probe) is not None:  # no part of what the run costs
            active.result.held_perplexity = perplexity(self.step.records(active, probe.rows))
        if self.out is not None and active.job.save:
            where = Path("adapters") / active.job.name
            rows = {split.name: len(split) for split in active.data.splits()}
            record = training_record(active.result, rows, self.meta.get("files", {}), active.data.probe)
            # Which task a row is of is asked of rows to predict where the adapter reads it.
            spared = {} if active.adapter.method.row_data() else active.data.task.tasks_to_json()
            meta = {key: value for key, value in self.meta.items() if key not in spared}
            meta |= {key: value for key, value in active.task.to_json().items() if key in meta}  # with what was chosen
            if active.result.init_from is not None:
                meta["init_from"] = active.result.init_from
            meta["precision"] = active.job.settings.precision
            store.save(self.model, active.job.name, self.out / where, meta=meta, training=record)
            active.result.adapter = where.as_posix()
        self._end(active, "done")

    def _judge(self, active: ActiveJob, valid: Texts, test: Texts) -> None:
        """Final figures of the weights as they are: the validation rows', and the test rows' where there are some."""
        task = active.data.task
        if active.data.valid is not None:
            if active.records is None:
                active.records = self.step.records(active, active.data.valid)
            active.records = valid.records(active, active.records)
            active.result.valid = task.figures(active.records)
            self._keep(active, active.records)
            active.task = task.chosen(active.records)
        if active.data.test is not None:
            records = active.task.decided(test.records(active, self.step.records(active, active.data.test)))
            self._keep(active, records)
            active.result.test = task.figures(records)
            active.result.test_intervals = intervals(task, records)

    def _keep(self, active: ActiveJob, records: Records) -> None:
        active.result.confusion = active.data.task.confusion(records)
        active.result.by_class = active.task.by_class(records)
        active.result.predictions = active.data.task.predictions(records)

    # -- the end of a job

    def _end(self, active: ActiveJob, status: Any, error: str | None = None) -> None:
        name, result = active.job.name, active.result
        result.status, result.error = status, error
        result.peak_memory_bytes = peak(self.device)
        self._take_off(name)
        self.observer.job_done(active.job, result)
        if self.states is not None and status != "interrupted":
            self.states.forget(name)  # only now: who listens may have written the result down

    def _take_off(self, name: str) -> None:
        self.active_jobs.pop(name, None)
        self._full = False
        if name in self._trackers:
            self._trackers.pop(name).end_training()
        if name in adapters(self.model):
            if len(adapters(self.model)) == 1 + len(manager_of(self.model).get(name).brought):
                activate(self.model, None)
            detach(self.model, name)

    def _tracker(self, job: Job) -> Accelerator:
        accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            log_with=job.settings.tracker,
            project_dir=str(self.out) if self.out else None,
        )
        accelerator.init_trackers(job.name)
        return accelerator

    @staticmethod
    def _check(model: PreTrainedModel, data: TaskData) -> None:
        data.task.check_model(model.config)


def intervals(task: Task, records: Records) -> dict[str, tuple[float, float]]:
    """The 95% intervals of a task's shares of rows, by metric."""
    found = {metric.name: interval_of(metric, records) for metric in task.metrics}
    return {name: interval for name, interval in found.items() if interval is not None}


def _held_for_others(active: ActiveJob, stepping: Sequence[ActiveJob]) -> int:
    """Bytes a token of this job's rows that autograd keeps for the sake of other jobs in the step."""
    held = {path: size for other in stepping for path, size in other.held.items() if path not in active.held}
    layers: Counter[str] = Counter()
    for path, size in held.items():
        layers[block_of(path)] += size
    # Of checkpointed layers, one at a time is computed again.
    return max(layers.values(), default=0) if active.job.settings.gradient_checkpointing else layers.total()


def _goes_with(active: ActiveJob, first: ActiveJob) -> bool:
    """Whether two jobs can be in one pass: autocast and checkpointing are the whole model's."""
    a, b = active.job.settings, first.job.settings
    same = (a.precision, a.gradient_checkpointing) == (b.precision, b.gradient_checkpointing)
    return same and active.job.method.shares_batch


def _line(error: BaseException) -> str:
    reason = str(error).strip().splitlines()
    return reason[0] if reason else type(error).__name__


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _probed(data: TaskData) -> list[Split]:
    return [] if data.probe is None else [data.probe.rows]


def _longest(split: Split) -> int:
    return max((e.length for e in split.examples), default=0)


def _decoded(split: Split) -> int:
    return max((e.decoder_length for e in split.examples), default=0)


def _sizes(active: ActiveJob) -> tuple[int, int, int]:
    """Virtual tokens, and own ones of the longest of its next rows, read by an encoder and by its decoder."""
    return active.virtual, active.length, active.decoder_length


def _apart(active: ActiveJob, first: ActiveJob) -> int:
    """Tokens of padding that rows of one have beside those of the other, by their longest."""
    (virtual, length, decoded), (other, others, theirs) = _sizes(active), _sizes(first)
    return abs(virtual + length - other - others) + abs(decoded - theirs)
