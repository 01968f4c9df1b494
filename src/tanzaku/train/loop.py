"""The loop around the shared step: jobs come from a queue, train on one frozen model, and leave a result each."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from tanzaku import store
from tanzaku.errors import TanzakuError
from tanzaku.families import Base
from tanzaku.host import activate, adapters, attach, count, detach, host_of
from tanzaku.routing import Entry, Route
from tanzaku.tasks.classification import Split, classification_loss, collate
from tanzaku.tasks.metrics import classification_metrics, confusion, wilson_interval
from tanzaku.tasks.prepare import ClassificationData
from tanzaku.train.lane import Lane
from tanzaku.train.memory import peak, reset_peak
from tanzaku.train.results import EpochRecord, Job, JobResult, Observer
from tanzaku.train.trim import PooledOnly


class Silent:
    """An observer that shows nothing."""

    def job_started(self, job: Job, result: JobResult, steps: int) -> None: ...

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None: ...

    def epoch_done(self, job: Job, record: EpochRecord) -> None: ...

    def job_done(self, job: Job, result: JobResult) -> None: ...


def train_jobs(
    model: PreTrainedModel,
    data: ClassificationData,
    jobs: Sequence[Job],
    *,
    out: Path | None = None,
    observer: Observer | None = None,
    meta: dict[str, Any] | None = None,
) -> list[JobResult]:
    """Train every job on the frozen `model`, which is left as it was; one result a job, in their order.

    A job that fails (a bad setting, a loss that is no number) ends alone. Ctrl-C ends the run: jobs that are done
    keep their results, the one under way is marked interrupted, those not begun have none.

    Args:
        model: a classifier on the device to train on.
        out: a directory; each finished adapter is saved below its `adapters`, with `meta` beside it.
    """
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise TanzakuError(f"job names must differ, found {', '.join(sorted(names))}")
    if model.config.num_labels != len(data.labels):
        raise TanzakuError(
            f"the model has {model.config.num_labels} labels and the data {len(data.labels)}: "
            f"load it with num_labels={len(data.labels)}"
        )
    return _Run(model, data, out, observer or Silent(), meta or {}).all(jobs)


class _Run:
    def __init__(
        self,
        model: PreTrainedModel,
        data: ClassificationData,
        out: Path | None,
        observer: Observer,
        meta: dict[str, Any],
    ):
        self.model, self.data, self.out, self.observer, self.meta = model, data, out, observer, meta
        self.device = model.device
        self.pooled = PooledOnly(Base.of(model))
        takes = inspect.signature(model.forward).parameters
        self.takes_types = "token_type_ids" in takes
        # A cache of keys and values is for generation; here it would only be a copy of them a layer.
        self.options = {"use_cache": False} if "use_cache" in takes else {}

    def all(self, jobs: Sequence[Job]) -> list[JobResult]:
        results = []
        for job in jobs:
            result = JobResult(
                name=job.name,
                method=job.method.name,
                method_settings=job.method.settings(),
                train_settings=job.settings.model_dump(),
            )
            results.append(result)
            try:
                self._one(job, result)
            except KeyboardInterrupt:
                result.status, result.error = "interrupted", f"stopped by hand after epoch {len(result.epochs)}"
                self.observer.job_done(job, result)
                break
            except (TanzakuError, RuntimeError, ValueError, MemoryError) as error:
                reason = str(error).strip().splitlines()
                result.status, result.error = "failed", reason[0] if reason else type(error).__name__
            finally:
                self._clear(job)
            self.observer.job_done(job, result)
        return results

    def _one(self, job: Job, result: JobResult) -> None:
        reset_peak(self.device)
        began = time.monotonic()
        torch.manual_seed(job.settings.seed)
        adapter = attach(self.model, job.method, job.name, seed=job.settings.seed)
        result.method_settings = adapter.method.settings()
        numbers = count(self.model, job.name)
        result.trainable_parameters, result.total_parameters = numbers.trainable, numbers.total
        lane = Lane(job, adapter, self.data, result, self.device)
        self.observer.job_started(job, result, lane.steps)
        accelerator = self._accelerator(job)
        checkpointed = job.settings.gradient_checkpointing
        if checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            while not lane.finished:
                self._step([lane], accelerator)
            lane.restore_best()
            self._judge(lane, accelerator)
            if self.out is not None:
                self._save(job, result)
        finally:
            if checkpointed:
                self.model.gradient_checkpointing_disable()
            accelerator.end_training()
            result.seconds = time.monotonic() - began
            result.peak_memory_bytes = peak(self.device)

    def _step(self, lanes: list[Lane], accelerator: Accelerator) -> None:
        """One batch of every lane, in one pass through the frozen base; each lane then steps for itself."""
        picked = [lane.next_batch() for lane in lanes]
        entries: list[Entry] = [lane.job.name for lane, rows in zip(lanes, picked, strict=True) for _ in rows]
        examples = [self.data.train.examples[row] for rows in picked for row in rows]
        batch = self._batch(collate(examples, self.data.pad_token_id))
        labels = batch.pop("labels")
        self._mode(training=True)
        host_of(self.model).switch(Route.of(entries) if len(lanes) > 1 else Route.everywhere(lanes[0].job.name))
        # The backward pass is inside too: checkpointed layers run again in it.
        with self.pooled.reading(batch["input_ids"]):
            with accelerator.autocast():
                logits = self.model(**batch, **self.options).logits
            losses, start = [], 0
            for lane, rows in zip(lanes, picked, strict=True):
                at = slice(start, start + len(rows))
                start += len(rows)
                losses.append(lane.loss(classification_loss(logits[at], labels[at], lane.weights)))
            # Adapters share no parameter, so one backward pass of all losses gives each lane its own gradient.
            torch.autograd.backward(losses)
        for lane in lanes:
            epoch_ended = lane.backward_done()
            self.observer.step_done(lane.job, lane.step, lane.steps, lane.last_loss)
            if epoch_ended:
                self._end_epoch(lane, accelerator)

    def _end_epoch(self, lane: Lane, accelerator: Accelerator) -> None:
        valid: dict[str, float] = {}
        if self.data.valid is not None:
            logits = self._logits(lane.job, self.data.valid, accelerator)
            valid = classification_metrics(logits, _labels(self.data.valid))
        record = lane.end_epoch(valid)
        if lane.job.settings.tracker:
            figures = {f"valid/{key}": value for key, value in valid.items()}
            accelerator.log(
                {"train/loss": record.train_loss, "learning_rate": record.learning_rate, **figures}, step=lane.step
            )
        self.observer.epoch_done(lane.job, record)

    def _judge(self, lane: Lane, accelerator: Accelerator) -> None:
        """Final figures: the test split's, or the validation split's confusion where there is no test."""
        split = self.data.test or self.data.valid
        if split is None:
            return
        logits = self._logits(lane.job, split, accelerator)
        labels = _labels(split)
        lane.result.confusion = confusion(logits, labels, len(self.data.labels))
        if self.data.test is not None:
            lane.result.test = classification_metrics(logits, labels)
            right = int((logits.argmax(-1) == labels).sum())
            lane.result.test_interval = wilson_interval(right, len(labels))
            lane.result.predictions = [[round(p, 6) for p in row] for row in logits.double().softmax(-1).tolist()]

    @torch.no_grad()
    def _logits(self, job: Job, split: Split, accelerator: Accelerator) -> Tensor:
        """(rows, labels) in the split's order, fp32 on the CPU. Rows of like length share a batch."""
        self._mode(training=False)
        host_of(self.model).switch(Route.everywhere(job.name))
        order = sorted(range(len(split)), key=lambda row: len(split.examples[row].input_ids))
        out = torch.empty(len(split), len(self.data.labels))
        size = job.settings.eval_batch_size
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = self._batch(collate([split.examples[r] for r in rows], self.data.pad_token_id, labels=False))
            with accelerator.autocast(), self.pooled.reading(batch["input_ids"]):
                out[rows] = self.model(**batch, **self.options).logits.float().cpu()
        return out

    def _batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.takes_types:
            batch.pop("token_type_ids", None)
        return {key: value.to(self.device) for key, value in batch.items()}

    def _mode(self, *, training: bool) -> None:
        if self.model.training == training:
            return
        self.model.train(training)
        for module in self.model.modules():
            # Running statistics are the base's, and the base stays as it is.
            if isinstance(module, _BatchNorm):
                module.eval()

    def _accelerator(self, job: Job) -> Accelerator:
        # accelerate remembers the first precision of a process; candidates may differ in theirs.
        AcceleratorState._reset_state(reset_partial_state=True)
        precision = job.settings.precision
        accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=job.settings.tracker,
            project_dir=str(self.out) if self.out else None,
        )
        if job.settings.tracker:
            accelerator.init_trackers(job.name)
        return accelerator

    def _save(self, job: Job, result: JobResult) -> None:
        assert self.out is not None
        where = Path("adapters") / job.name
        store.save(self.model, job.name, self.out / where, meta=self.meta)
        result.adapter = where.as_posix()

    def _clear(self, job: Job) -> None:
        if job.name in adapters(self.model):
            activate(self.model, None)
            detach(self.model, job.name)
        self.model.eval()


def _labels(split: Split) -> Tensor:
    return torch.tensor([e.label for e in split.examples])
