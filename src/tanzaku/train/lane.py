"""One job under way: its adapter, optimizer, schedule, data order and figures. It never touches another job's."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from tanzaku.errors import TanzakuError
from tanzaku.host import Adapter
from tanzaku.tasks.classification import class_weights, epoch_batches
from tanzaku.tasks.prepare import ClassificationData
from tanzaku.train.results import EpochRecord, Job, JobResult

# What transformers' Trainer spares from weight decay, by the parameter's name.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


class Diverged(TanzakuError):
    """The loss of a job is no number any more."""


class Lane:
    """A job in training. The shared step gives it a loss; it answers with its own optimizer step."""

    def __init__(self, job: Job, adapter: Adapter, data: ClassificationData, result: JobResult, device: torch.device):
        self.job, self.adapter, self.data, self.result = job, adapter, data, result
        s = job.settings
        self.trained = [p for _, p in adapter.trained()]
        self.optimizer = _optimizer(adapter, job, self.trained)
        per_epoch = math.ceil(len(data.train) / s.batch_size)
        self.steps_per_epoch = math.ceil(per_epoch / s.accumulation)
        self.steps = self.steps_per_epoch * s.epochs
        warmup = int(s.warmup) if s.warmup >= 1 else math.ceil(s.warmup * self.steps)
        name = "constant_with_warmup" if s.schedule == "constant" else s.schedule
        self.schedule = get_scheduler(name, self.optimizer, num_warmup_steps=warmup, num_training_steps=self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16")
        labels = [e.label for e in data.train.examples if e.label is not None]
        self.weights: Tensor | None = None
        if s.class_weights:
            self.weights = class_weights(labels, len(data.labels)).to(device)
        self.generator = torch.Generator()
        self.epoch, self.step = 0, 0
        self.best: dict[str, Tensor] | None = None
        self._waited = 0
        self._pending = 0
        self._losses: list[float] = []
        self._began = time.monotonic()
        self._batches = self._epochs()
        adapter.method.prepare(adapter, self.steps)

    def _epochs(self) -> Iterator[tuple[list[int], int, bool]]:
        """(rows of a batch, batches that share its optimizer step, whether the epoch ends), to the last epoch."""
        s = self.job.settings
        lengths = [len(e.input_ids) for e in self.data.train.examples]
        for epoch in range(s.epochs):
            # Seeding by epoch makes the order of any epoch independent of what came before it.
            self.generator.manual_seed(s.seed + epoch)
            batches = epoch_batches(
                lengths,
                s.batch_size,
                shuffle=s.shuffle,
                group_by_length=s.group_by_length,
                generator=self.generator,
            )
            for at, rows in enumerate(batches):
                first = at - at % s.accumulation
                yield rows, min(s.accumulation, len(batches) - first), at == len(batches) - 1

    def next_batch(self) -> list[int]:
        """Row numbers of the next batch."""
        rows, self._share, self._epoch_ends = next(self._batches)
        return rows

    def loss(self, task_loss: Tensor) -> Tensor:
        """What to differentiate: the task's loss with the method's penalty, shared over accumulated batches.

        Raises:
            Diverged: it is no finite number.
        """
        penalty = self.adapter.method.penalty(self.adapter)
        loss = task_loss if penalty is None else task_loss + penalty
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(
                f"loss became {value} at step {self.step + 1} of {self.steps} (epoch {self.epoch + 1}): "
                "lower the learning rate"
            )
        self._losses.append(value)
        return self.scaler.scale(loss / self._share)

    def backward_done(self) -> bool:
        """Step the optimizer if its share of batches is complete; tells whether an epoch ended."""
        self._pending += 1
        if self._pending == self._share:
            self._pending = 0
            if self.job.settings.max_grad_norm:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.trained, self.job.settings.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            self.step += 1
            self.adapter.method.after_step(self.adapter, self.step)
            self.optimizer.zero_grad(set_to_none=True)
        return self._epoch_ends

    def end_epoch(self, valid: dict[str, float]) -> EpochRecord:
        """Close an epoch with its validation figures; keeps the best weights where they are wanted."""
        self.epoch += 1
        record = EpochRecord(
            epoch=self.epoch,
            train_loss=sum(self._losses) / len(self._losses),
            learning_rate=float(self.schedule.get_last_lr()[0]),
            valid=valid,
            seconds=time.monotonic() - self._began,
        )
        self._losses, self._began = [], time.monotonic()
        self.result.epochs.append(record)
        self.result.steps = self.step
        self._judge(record)
        return record

    def _judge(self, record: EpochRecord) -> None:
        s = self.job.settings
        value = record.valid.get(s.metric, math.nan)
        sign = -1 if s.metric == "loss" else 1
        best = self.result.best_epoch
        before = None if best is None else self.result.epochs[best - 1].valid.get(s.metric, math.nan)
        if not math.isnan(value) and (before is None or sign * value > sign * before):
            self.result.best_epoch = record.epoch
            self._waited = 0
            if s.restore_best:
                self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.adapter.trained()}
        else:
            self._waited += 1

    @property
    def last_loss(self) -> float:
        return self._losses[-1] if self._losses else math.nan

    @property
    def finished(self) -> bool:
        s = self.job.settings
        return self.epoch >= s.epochs or (s.patience is not None and self._waited >= s.patience)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the weights of the best epoch, where they were kept."""
        if self.best is not None and self.result.best_epoch != self.epoch:
            for name, parameter in self.adapter.trained():
                parameter.copy_(self.best[name])
            self.result.restored_epoch = self.result.best_epoch


def _optimizer(adapter: Adapter, job: Job, trained: list[nn.Parameter]) -> torch.optim.AdamW:
    s = job.settings
    named = adapter.trained()
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if not _NO_DECAY.search(n)], "weight_decay": s.weight_decay},
        {"params": [p for n, p in named if _NO_DECAY.search(n)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=s.learning_rate,
        betas=(s.adam_beta1, s.adam_beta2),
        eps=s.adam_epsilon,
        fused=all(p.is_floating_point() for p in trained),
    )
