"""One job under way: its adapter, optimizer, schedule, data order and figures. It never touches another job's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import get_scheduler
from transformers.pytorch_utils import Conv1D

from tanzaku.core.adapter import Adapter
from tanzaku.core.method import AttentionLayer, Method, TokenLayer
from tanzaku.core.weights import BiasCopy, WeightCopy
from tanzaku.engine.memory import Need
from tanzaku.errors import TanzakuError
from tanzaku.models.families import features
from tanzaku.support.seeds import seed_of
from tanzaku.tasks.batches import epoch_batches
from tanzaku.tasks.task import Example, Records, TaskData, metric_named, weighed
from tanzaku.train.results import EpochRecord, Job, JobResult

# What transformers' Trainer spares from weight decay, by the parameter's name.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


class Diverged(TanzakuError):
    """The loss of a job is no number any more."""


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward pass. The loss of an optimizer step is the mean over its rows, however many batches they
    come in: each batch's own mean counts by `share`.
    """

    rows: list[int]
    weight: float  # of its loss in that of the epoch: its rows, or their tokens that have a target
    share: float  # of its weight in that of the optimizer step that it is a part of
    ends_step: bool
    ends_epoch: bool


class ActiveJob:
    """A job in training. The shared step gives it a loss; it answers with its own optimizer step."""

    def __init__(self, job: Job, adapter: Adapter, data: TaskData, result: JobResult, device: torch.device):
        s = job.settings
        self.job, self.adapter, self.result = job, adapter, result
        self.data = weighed(data, s.class_weights, s.focal_gamma)
        self.task = data.task  # with what is chosen for this adapter, in the end
        self.virtual, self.before = adapter.virtual, adapter.before
        self.left_out = False  # whether its last pass may have left out layers by chance
        self.draws: bool | None = None  # whether its forward pass draws random numbers; None: not yet known
        self.trained = [p for _, p in adapter.trained()]
        # Between its steps: weights, two moments, gradients that are not complete and their copies, and the best
        # weights, which are on the CPU. A method that looks at each step keeps two figures of each number (AdaLoRA).
        copies = 2 + 2 * (s.accumulation > 1) + (s.restore_best and device.type == "cpu")
        copies += 2 * (type(job.method).after_step is not Method.after_step)
        self.kept_bytes = copies * _bytes(self.trained) + _bytes(p for _, p in adapter.named_parameters())
        self.need: Need | None = None  # of a step; None where nobody asks
        self.about: dict[str, Any] | None = None  # what its state belongs to, once asked for
        self.held = _held(adapter)
        changed = {path for path, layer in adapter.at() if isinstance(layer, AttentionLayer)}
        self.twice = sum(self.held[path] for path in changed)
        self.optimizer = _optimizer(adapter, job)
        each = max(len(example.others) for example in data.train.examples) + 1
        self.rows = min(s.batch_size, len(data.train)) * each  # of a whole batch in a pass
        self.per_pass = math.ceil(len(data.train) / s.batch_size)  # batches
        self.steps = s.max_steps or math.ceil(self.per_pass / s.accumulation) * s.epochs
        warmup = int(s.warmup) if s.warmup >= 1 else math.ceil(s.warmup * self.steps)
        name = "constant_with_warmup" if s.schedule == "constant" else s.schedule
        self.schedule = get_scheduler(name, self.optimizer, num_warmup_steps=warmup, num_training_steps=self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16")
        self.metric = metric_named(data.task, s.metric)
        self.generator = torch.Generator()
        self.epoch, self.step, self.batch = 0, 0, 0
        self.batches = self._until(s.epochs)
        self.waiting = False  # at a rung
        self.rows_done = 0  # in the last step
        self.best: dict[str, Tensor] | None = None
        self._waited = 0
        self._begun = False  # an optimizer step, of which some batches are done
        self._losses: list[tuple[float, float]] = []  # of the epoch under way, and what each weighs
        self._order = self._epochs()
        self._advance()
        self.seconds = 0.0  # of the epoch under way
        self.records: Records | None = None  # of the validation rows, by the weights as they are
        adapter.method.prepare(adapter, self.steps)

    def _until(self, epoch: int) -> int:
        """Batches before the end of an epoch, counted from 1."""
        s = self.job.settings
        return self.per_pass * epoch if s.max_steps is None else s.max_steps * epoch // s.epochs * s.accumulation

    def _passes(self, batch: int) -> Iterator[list[int]]:
        """The batches of passes over the rows from this one on, without end."""
        s = self.job.settings
        lengths = [e.length for e in self.data.train.examples]
        first, done = divmod(batch, self.per_pass)
        for number in count(first):
            # Seeding by its number makes the order of any pass independent of what came before it.
            self.generator.manual_seed(seed_of("order", s.seed, number))
            batches = epoch_batches(
                lengths,
                s.batch_size,
                shuffle=s.shuffle,
                group_by_length=s.group_by_length,
                generator=self.generator,
            )
            yield from batches[done if number == first else 0 :]

    def _epochs(self) -> Iterator[_Batch]:
        """All batches that are left, to the last epoch."""
        s = self.job.settings
        for epoch in range(self.epoch, s.epochs):
            batches = [*islice(self._passes(self._until(epoch)), self._until(epoch + 1) - self._until(epoch))]
            for first in range(0, len(batches), s.accumulation):
                step = batches[first : first + s.accumulation]
                weights = [self._weight(rows) for rows in step]
                for at, (rows, weight) in enumerate(zip(step, weights, strict=True), 1):
                    ends = at == len(step)
                    yield _Batch(rows, weight, weight / sum(weights), ends, ends and first + at == len(batches))

    def _weight(self, rows: Sequence[int]) -> float:
        return _weight([self.data.train.examples[row] for row in rows])

    def _advance(self) -> None:
        self._next = next(self._order, None)

    @property
    def next_rows(self) -> list[int] | None:
        """The rows it wants to train on next; None after its last batch."""
        return None if self._next is None else self._next.rows

    def examples(self) -> list[Example]:
        """The rows of its next batch."""
        return [self.data.train.examples[row] for row in self.next_rows or ()]

    @property
    def size(self) -> int:
        """Rows that they take in a pass; 0 after the last batch."""
        return sum(len(example.rows) for example in self.examples())

    @property
    def length(self) -> int:
        """Own tokens of the longest of them."""
        return max(example.length for example in self.examples())

    @property
    def decoder_length(self) -> int:
        """The most tokens that an encoder-decoder's decoder reads of any of them; 0: none of its own."""
        return max(example.decoder_length for example in self.examples())

    @property
    def batches_left(self) -> int:
        """Batches until it ends or waits at its next rung."""
        s = self.job.settings
        goal = min((rung for rung in self.job.rungs if rung > self.epoch), default=s.epochs)
        return self._until(goal) - self.batch

    @property
    def dropout_seed(self) -> int:
        """Of the random numbers of its next batch."""
        return seed_of("dropout", self.job.settings.seed, self.batch)

    def loss(self, sums: Tensor, examples: Sequence[Example]) -> Tensor:
        """The mean loss of its rows, by the sum of each (rows,), with the method's penalty."""
        if any(example.factor != 1 for example in examples):
            sums = sums * torch.tensor([example.factor for example in examples], device=sums.device)
        loss = sums.sum() / _weight(examples)
        penalty = self.adapter.method.penalty(self.adapter)
        return loss if penalty is None else loss + penalty

    def check(self, value: float) -> None:
        """Look at the loss of its next batch.

        Raises:
            Diverged: it is no finite number.
        """
        if not math.isfinite(value):
            raise Diverged(
                f"loss became {value} at step {self.step + 1} of {self.steps} (epoch {self.epoch + 1}): "
                "lower the learning rate"
            )

    def accept(self, value: float) -> None:
        """Note the loss of a batch whose backward pass is done."""
        assert self._next is not None
        self._losses.append((value, self._next.weight))
        self.rows_done = self.size

    def spend(self, seconds: float) -> None:
        """Add to the time that the job has taken."""
        self.seconds += seconds
        self.result.seconds += seconds

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate: the batch's share of the loss of its optimizer step."""
        assert self._next is not None
        return self.scaler.scale(loss * self._next.share)

    def gradients(self) -> list[Tensor | None] | None:
        """Copies of what was accumulated so far, or None where nothing was."""
        return [None if p.grad is None else p.grad.clone() for p in self.trained] if self._begun else None

    def reset_gradients(self, kept: list[Tensor | None] | None) -> None:
        """Undo a backward pass that failed half way."""
        for parameter, gradient in zip(self.trained, kept or [None] * len(self.trained), strict=True):
            parameter.grad = gradient

    def backward_done(self) -> bool:
        """Step the optimizer if its share of batches is complete; tells whether an epoch ended.

        Raises:
            TanzakuError: the first backward pass reached nothing of what the method itself has to train.
        """
        batch = self._next
        assert batch is not None
        if self.batch == 0 and not self.left_out:
            self._check_gradients()
        self.batch += 1
        self._begun = not batch.ends_step
        if batch.ends_step:
            self.scaler.unscale_(self.optimizer)
            if norm := self.job.settings.max_grad_norm:
                nn.utils.clip_grad_norm_(self.trained, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            self.step += 1
            self.adapter.method.after_step(self.adapter, self.step)
            self.optimizer.zero_grad(set_to_none=True)
        self._advance()
        return batch.ends_epoch

    def _check_gradients(self) -> None:
        # Some quantised layers compute forward only: then a head would learn, and all else stay as it was drawn.
        own = [(path, s) for path, s in self.adapter.at() if not isinstance(s, WeightCopy)]
        trained = [p for _, layer in own if layer.trained for p in layer.parameters()]
        if trained and all(p.grad is None for p in trained):
            module = self.adapter.base.model.get_submodule(own[0][0])
            kind = type(getattr(module, "weight", None)).__name__
            raise TanzakuError(
                f"no gradient reaches what {self.job.method.name} trains at {own[0][0] or 'the tokens'} "
                f"({type(module).__name__}, {kind}): the base's layers have no backward pass; load it in another format"
            )

    def end_epoch(self, valid: dict[str, float]) -> EpochRecord:
        """Close an epoch with its validation figures; keeps the best weights where they are wanted."""
        self.epoch += 1
        record = EpochRecord(
            epoch=self.epoch,
            train_loss=sum(loss * weight for loss, weight in self._losses) / sum(weight for _, weight in self._losses),
            learning_rate=float(self.schedule.get_last_lr()[0]) / self.optimizer.param_groups[0]["factor"],
            valid=valid,
            seconds=self.seconds,
        )
        self._losses, self.seconds = [], 0.0
        self.result.epochs.append(record)
        self.result.steps = self.step
        self.waiting = self.epoch in self.job.rungs
        self._judge(record)
        return record

    def _judge(self, record: EpochRecord) -> None:
        s = self.job.settings
        value, sign = record.valid.get(s.metric, math.nan), self.metric.sign
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
        return self._losses[-1][0] if self._losses else math.nan

    @property
    def finished(self) -> bool:
        s = self.job.settings
        return self.epoch >= s.epochs or (s.patience is not None and self._waited >= s.patience)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """At the end of an epoch, all that the rest of the run depends on: tensors, and figures fit for JSON.

        Random numbers depend on the seed, the epoch and the batch alone, and an epoch leaves no gradient behind.
        """
        tensors = {f"method.{key}": t for key, t in self.adapter.method.training_state(self.adapter).items()}
        tensors |= {f"best.{name}": t for name, t in (self.best or {}).items()}
        for name, parameter in self.adapter.trained():
            tensors[f"weights.{name}"] = parameter.detach()
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": t for key, t in moments.items()}
        figures = {
            "epochs": [asdict(record) for record in self.result.epochs],
            "best_epoch": self.result.best_epoch,
            "waited": self._waited,
            "step": self.step,
            "seconds": self.result.seconds,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return tensors, figures

    @torch.no_grad()
    def resume(self, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave. This job must be as new."""

        def those(kind: str) -> dict[str, Tensor]:
            start = f"{kind}."
            return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}

        weights, moments = those("weights"), those("optimizer")
        for name, parameter in self.adapter.trained():
            parameter.copy_(weights[name])
            ends = {key: t for key, t in moments.items() if key.partition(".")[2] == name}
            self.optimizer.state[parameter] = {
                key.partition(".")[0]: t.to(parameter.device, copy=True) for key, t in ends.items()
            }
        self.best = {name: t.clone() for name, t in those("best").items()} or None
        self.adapter.method.resume(self.adapter, those("method"))
        self.schedule.load_state_dict(figures["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.scaler.load_state_dict(figures["scaler"])
        self.result.epochs = [EpochRecord(**record) for record in figures["epochs"]]
        self.result.best_epoch, self._waited = figures["best_epoch"], figures["waited"]
        self.result.seconds = figures["seconds"]
        self.epoch = len(self.result.epochs)
        self.step = self.result.steps = figures["step"]
        self.batch = self._until(self.epoch)
        self.waiting = self.epoch in self.job.rungs
        self._order = self._epochs()
        self._advance()

    @torch.no_grad()
    def restore_best(self) -> None:
        """Go back to the weights of the best epoch, where they were kept."""
        if self.best is not None and self.result.best_epoch != self.epoch:
            for name, parameter in self.adapter.trained():
                parameter.copy_(self.best[name])
            self.result.restored_epoch = self.result.best_epoch
            self.records = None


def _held(adapter: Adapter) -> dict[str, int]:
    """Bytes a token, by module, of what an adapter makes autograd keep: inputs and outputs of the modules it is
    attached to. They are parts of tensors that hold all rows of a batch, so those of others
    are kept, too."""
    held: dict[str, int] = {}
    for path, layer in adapter.at():
        module = adapter.base.model.get_submodule(path)
        if isinstance(layer, AttentionLayer):
            held[path] = 4 * adapter.base.hidden_size  # the base's own result, beside the adapter layer's
        elif not isinstance(layer, TokenLayer | BiasCopy) and path:
            sizes = [features(m) for m in module.modules() if hasattr(m, "in_features") or isinstance(m, Conv1D)]
            held[path] = 4 * sum(n_in + n_out for n_in, n_out in sizes)
    return held


def _weight(examples: Sequence[Example]) -> float:
    """What the losses of some rows are the sum over. Factors are no part of it: a batch of one row would undo them."""
    return sum(example.weight for example in examples)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimizer(adapter: Adapter, job: Job) -> torch.optim.AdamW:
    s = job.settings
    rate = cast(float, s.learning_rate)  # a job has one
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in adapter.trained():
        decay, factor = 0.0 if _NO_DECAY.search(name) else s.weight_decay, adapter.method.rate_of(name)
        group = {"params": [], "weight_decay": decay, "lr": rate * factor, "factor": factor}
        groups.setdefault((decay, factor), group)["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=rate,
        betas=(s.adam_beta1, s.adam_beta2),
        eps=s.adam_epsilon,
        fused=True,
    )
