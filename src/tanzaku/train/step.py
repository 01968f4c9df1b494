"""The shared step: rows of several jobs in one pass through the frozen base, and evaluation."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import adapters
from tanzaku.core.calibration import own_of
from tanzaku.core.dropout import Foreign, JobDropout, JobSlice, foreign_generators, watch
from tanzaku.core.manager import manager_of
from tanzaku.core.method import Method
from tanzaku.core.passes import Passes
from tanzaku.core.positions import room
from tanzaku.core.routing import Entry, Route
from tanzaku.core.survey import odd_dropouts, sees_padding
from tanzaku.engine.accelerations import Accelerations
from tanzaku.engine.memory import Need, bytes_needed
from tanzaku.engine.names import AUTO
from tanzaku.errors import TanzakuError
from tanzaku.methods import METHODS
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.support.seeds import seed_of, seeded
from tanzaku.tasks.decoding import Written
from tanzaku.tasks.inference import Forward
from tanzaku.tasks.task import DECODED, Batch, Example, Records, Split, Task, joined
from tanzaku.train.active_job import ActiveJob
from tanzaku.train.results import Job

FAILURES = (TanzakuError, RuntimeError, ValueError, MemoryError, ArithmeticError, LookupError, TypeError, OSError)
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The arithmetic of a forward pass, by the name it has in the settings."""
    kind = _AUTOCAST[precision]
    return torch.autocast(device.type, kind or torch.bfloat16, enabled=kind is not None)


def is_memory(error: BaseException) -> bool:
    """Whether it tells that there is too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


class SharedStep:
    """Forward and backward passes over one model. A context manager: while entered, its frozen modules are fast.

    Args:
        pad_token_id: what short rows are filled with.
    """

    def __init__(self, model: PreTrainedModel, task: Task, pad_token_id: int):
        self.model, self.task, self.device = model, task, model.device
        task.prepare(model)
        self.forward = Forward(model, task, pad_token_id)
        self.base = Base.of(model)
        self.max_positions = room(self.base)
        self.wanted, self.accelerations = AUTO, Accelerations(self.base)
        self._entered = False
        self._route: tuple[list[Entry], Route] | None = None
        self._checkpointed = False
        self._foreign: list[Foreign] | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> SharedStep:
        self.accelerations.__enter__()
        self._entered = True
        return self

    def uses_weights(self, precision: str) -> bool:
        """Whether this arithmetic multiplies with the frozen weights as they are, and not with casts of them."""
        kind = _AUTOCAST[precision]
        return kind is None or kind == self.accelerations.common.products.kind

    def accelerate(self, wanted: str) -> None:
        """Have these accelerations from now on, as a run's settings name them."""
        if wanted == self.wanted:
            return
        if self._entered:
            # First: they take modules as the model's own code has them, and leave alone those that somebody patched.
            self.accelerations.__exit__()
        self.wanted, self.accelerations = wanted, Accelerations(self.base, wanted)
        if self._entered:
            self.accelerations.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._checkpoint(False)
        if self._route is not None and adapters(self.model):
            manager_of(self.model).switch(None)
        self._route = None
        self.accelerations.__exit__(*error)
        self._entered = False
        for handle in self._handles:
            handle.remove()
        self._handles, self._foreign = [], None
        self._mode(training=False)

    @cached_property
    def drops(self) -> bool:
        """Whether a rate of dropout is set in the model, by its settings or, as heads have it, in a module."""
        rates = (m.p for m in tree.modules(self.model) if isinstance(m, _DropoutNd))
        return _drops(self.base.config.to_dict()) or any(rate > 0 for rate in rates)

    @cached_property
    def of_one_width(self) -> bool:
        """Whether jobs may share a step only where their rows come to the same length: in a model that sees padding
        in spite of the mask, a job's rows are padded as they are when it is alone."""
        return sees_padding(self.base)

    @contextmanager
    def losses(
        self,
        active_jobs: Sequence[ActiveJob],
        batches: Sequence[Sequence[Example]],
        width: int | None = None,
        decoder_width: int = 0,
    ) -> Iterator[list[Tensor]]:
        """The loss of each job on its batch, its method's penalty included. The backward pass belongs inside of the
        block, since checkpointed layers run again in it. With a `width`, rows are padded to so many tokens at least,
        and nothing is packed; what a decoder reads is padded to `decoder_width`."""
        padded = width is not None
        every = [example for batch in batches for example in batch]
        together = self.forward.batch(every, width or 0, decoder_width, [active.adapter for active in active_jobs])
        sizes = [sum(len(example.rows) for example in batch) for batch in batches]
        entries: list[Entry] = [
            active.job.name for active, size in zip(active_jobs, sizes, strict=True) for _ in range(size)
        ]
        self._mode(training=True)
        self._checkpoint(active_jobs[0].job.settings.gradient_checkpointing)
        route = self._routed(entries)
        at, own = _slices(sizes), _slices([len(batch) for batch in batches])
        lead = max(active.virtual for active in active_jobs)
        shares = [
            JobSlice(rows, active.virtual, max(map(_length, batch)), active.dropout_seed)
            for active, batch, rows in zip(active_jobs, batches, at, strict=True)
        ]
        decoded = together.decoder_width or None
        if decoded is not None:
            for share, batch in zip(shares, batches, strict=True):
                share.decoded = max(example.decoder_length for example in batch)
        for active in active_jobs:
            if active.draws is None and self.base.tells_dropout and self.accelerations.packs:
                quiet = not any(map(_may_draw, self._methods_of(active.adapter)))
                active.draws = False if quiet and not self.drops else None
        # The mode costs time at every operation: it is left out where nobody is known to draw.
        drops = any(active.draws is not False for active in active_jobs)
        foreign = self._watched() if drops else []
        dropout = JobDropout(route, shares, together.width, lead, foreign, decoded) if drops else nullcontext()
        # Dropout tells jobs apart by rows.
        packed = not drops and not padded
        with self._reading(together, active_jobs, batches, packed), dropout:
            with autocast(self.device, active_jobs[0].job.settings.precision):
                outputs = self.forward(together)
            sums = self.task.score(outputs, together)
            yield [
                active.loss(sums[some], batch) for active, some, batch in zip(active_jobs, own, batches, strict=True)
            ]
        for active, share in zip(active_jobs, shares, strict=True):
            active.draws = (active.draws or share.drew) if drops else active.draws
            active.left_out = share.left_out

    def _methods_of(self, adapter: Adapter) -> list[Method]:
        """Its own, and those of the adapters that it is made of."""
        manager = manager_of(self.model)
        return [adapter.method, *(manager.get(there).method for there in adapter.method.used().values())]

    def calibrate(
        self, job: Job, adapter: Adapter, examples: Sequence[Example], seen: dict[Hashable, Mapping[str, Any]]
    ) -> None:
        """Let the adapter's method see training rows, before the job's first step. Which rows, and in which order,
        depends on the job's seed alone.

        Args:
            seen: by others in the same rows, and afterwards by this one.
        """
        generator = torch.Generator().manual_seed(seed_of("calibration", job.settings.seed))
        order = torch.randperm(len(examples), generator=generator).tolist()
        size = job.settings.batch_size
        batches = [[examples[row] for row in order[start : start + size]] for start in range(0, len(order), size)]

        def run(rows: Sequence[Example]) -> Tensor:
            together = self.forward.batch(rows, adapters=[adapter])
            own = own_of(together.inputs.get("attention_mask"), decoded=together.inputs.get(DECODED))
            together = replace(together, context={**together.context, **own})
            with autocast(self.device, job.settings.precision):
                outputs = self.forward(together)
            return self.task.score(outputs, together).sum() / sum(row.weight for row in rows)

        self._mode(training=False)
        self._routed([job.name])
        with seeded(seed_of("calibrated", job.settings.seed), [self.device]):
            adapter.method.calibrate(adapter, Passes((partial(run, rows) for rows in batches), seen))

    def _watched(self) -> list[Foreign]:
        """What a step that draws random numbers has to know of the model, and hooks where it needs them."""
        if self._foreign is None:
            self._foreign = foreign_generators(self.model)
            self._handles = watch(self.model, odd_dropouts(self.base))
        return self._foreign

    def need_of(self, active: ActiveJob, widest: int, decoder_width: int = 0) -> Need:
        """What a step of this job needs. It takes the time of a few steps and trains nothing.

        Args:
            widest: tokens of the longest rows of any job, virtual ones included; 0 where this one never shares a step.
            decoder_width: the most tokens that a decoder reads of any, of whatever rows: bytes are counted with as many
                in all of them.
        """
        s = active.job.settings
        rows = self._demanding(active.data.train.examples, s.batch_size)
        probe = None if active.data.probe is None else active.data.probe.rows
        splits = [split for split in (active.data.valid, active.data.test, probe) if split is not None]
        judged = self._demanding([e for split in splits for e in split.examples], s.eval_batch_size)
        decoded = max((example.decoder_length for example in active.data.train.examples), default=0)
        step = self._bytes(active, rows, None, decoded)
        decoded = max((example.decoder_length for split in splits for example in split.examples), default=0)
        judging = bytes_needed(lambda: self._evaluate(active, [judged], decoded), self.device) if judged else 0
        own = active.virtual + _length(rows[-1])
        if not widest:
            return Need(step, max(step, judging), ((own, step), (own, step)), 0)
        # One more than the row has: in a shared step most rows are padded. Positions end somewhere.
        limit = (self.max_positions or widest) - (active.before - active.virtual)
        narrow, wide = min(own + 1, limit), min(max(own + 1, widest), limit)
        each = len(rows[-1].rows)
        less = math.ceil(self._bytes(active, rows[-1:], narrow, decoder_width) / each)
        more = math.ceil(self._bytes(active, rows[-1:], wide, decoder_width) / each) if wide > narrow else less
        # Gradients; and adapters that are computed together are put together first.
        once = 2 * sum(p.numel() * p.element_size() for p in active.trained)
        return Need(step, max(step, judging), ((narrow, less), (wide, more)), once)

    def _bytes(
        self, active: ActiveJob, rows: Sequence[Example], width: int | None = None, decoder_width: int = 0
    ) -> int:
        """Bytes of a step on these rows: alone, or as a part of a batch of `width` tokens a row, in which others train
        something in every layer. Gradients are there already then, and do not count."""
        own = None if width is None else width - active.virtual

        def work() -> None:
            # A neighbour that drops out has all rows padded.
            with self.losses([active], [rows], own, decoder_width) as losses:
                torch.autograd.backward([active.scaled(loss) for loss in losses])

        kept = active.gradients()
        if width is None:
            active.reset_gradients(None)
        else:
            active.reset_gradients([torch.zeros_like(p) for p in active.trained])
        with nullcontext() if width is None else self._wanting():
            needed = bytes_needed(work, self.device)
        active.reset_gradients(kept)
        # In a shared step attention is computed for all rows, and once more for those whose adapter changes it.
        return needed + (0 if width is None else active.twice * max(width, decoder_width))

    def _demanding(self, examples: Sequence[Example], size: int) -> list[Example]:
        """The rows of a batch that needs the most: the longest, but where padding counts not all of one length."""
        order = sorted(examples, key=_tokens)
        rows = order[-size:]
        if size > 1 and rows and not self.accelerations.packs and _length(rows[0]) == _length(rows[-1]):
            shorter = [example for example in order if _length(example) < _length(rows[0])]
            rows = [*shorter[-1:], *rows[-size + 1 :]] if shorter else rows
        return rows

    @contextmanager
    def _wanting(self) -> Iterator[None]:
        """Within the block, gradients are wanted from the embedded tokens on: whatever autograd may keep, it keeps."""
        size = self.base.vocab_size
        tables = [m for m in tree.modules(self.model) if isinstance(m, nn.Embedding) and m.num_embeddings == size]
        handles = [m.register_forward_hook(lambda _m, _args, out: out.requires_grad_()) for m in tables]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def records(self, active: ActiveJob, split: Split) -> Records:
        """Of each row, in the split's order. Rows of like length share a batch."""
        order = sorted(range(len(split)), key=lambda row: (split.examples[row].shared, _length(split.examples[row])))
        size = active.job.settings.eval_batch_size
        batches = [[split.examples[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
        return joined(self._evaluate(active, batches), order)

    def write(self, active_jobs: Sequence[ActiveJob], split: Split, rows_per_step: int = 0) -> dict[str, list[Written]]:
        """By job, what each one's adapter writes for the rows of a split, all of them in one batch of the base.

        Args:
            rows_per_step: of all jobs; each has as many as its settings want where that is less.
        """
        self._mode(training=False)
        settings = active_jobs[0].job.settings
        size = max(1, max(rows_per_step, settings.eval_batch_size) // len(active_jobs))
        with autocast(self.device, settings.precision):
            splits = {active.job.name: split for active in active_jobs}
            return self.forward.write(splits, range(len(split)), min(size, settings.eval_batch_size))

    @torch.no_grad()
    def _evaluate(
        self, active: ActiveJob, batches: Sequence[Sequence[Example]], decoder_width: int = 0
    ) -> list[Records]:
        self._mode(training=False)
        route = self._routed([active.job.name])
        parts = []
        for batch in batches:
            rows = self.forward.batch(batch, 0, decoder_width, [active.adapter])
            with autocast(self.device, active.job.settings.precision):
                owners = [active.adapter] * len(rows.lengths)
                parts.append(self.forward.records(rows, owners, self.accelerations, route))
        return parts

    def _reading(
        self,
        together: Batch,
        active_jobs: Sequence[ActiveJob],
        batches: Sequence[Sequence[Example]],
        packed: bool = True,
    ) -> AbstractContextManager[None]:
        pairs = zip(active_jobs, batches, strict=True)
        owners = [active for active, batch in pairs for example in batch for _ in example.rows]
        assert self._route is not None
        return self.accelerations.batch(
            together, [active.adapter for active in owners], self._route[1] if packed else None
        )

    def _routed(self, entries: list[Entry]) -> Route:
        """Put the route in force; one that is in force already stays, since hooks take time to attach."""
        manager = manager_of(self.model)
        if len(set(entries)) == 1:
            entries = entries[:1]
        if self._route is None or self._route[0] != entries or manager.route is not self._route[1]:
            self._route = (entries, Route.of(entries))
            manager.switch(self._route[1])
        return self._route[1]

    def _mode(self, *, training: bool) -> None:
        if self.model.training == training:
            return
        self.model.train(training)
        for module in tree.modules(self.model):
            # Running statistics are the base's, and the base stays as it is.
            if isinstance(module, _BatchNorm):
                module.eval()

    def _checkpoint(self, wanted: bool) -> None:
        if wanted != self._checkpointed:
            self._checkpointed, self._route = wanted, None  # a route depends on the layers as they are
            if wanted:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
                if hasattr(self.model, "_require_grads_hook"):
                    # For another kind of checkpointing, every embedded token is made to want a gradient.
                    self.model.disable_input_require_grads()
            else:
                self.model.gradient_checkpointing_disable()


def _may_draw(method: Method) -> bool:
    """Whether a method's layers may draw random numbers in training; of one that is not ours nothing is known."""
    return type(method) not in METHODS.values() or method.draws or _drops(method.settings())


def _drops(settings: dict[str, Any]) -> bool:
    """Whether some rate of dropout is set."""
    return any("drop" in key and isinstance(value, float | int) and value > 0 for key, value in settings.items())


def _length(example: Example) -> int:
    return example.length


def _tokens(example: Example) -> tuple[int, int]:
    """Of all rows of an example, and of its longest."""
    return sum(example.lengths), example.length


def _slices(sizes: Sequence[int]) -> list[slice]:
    """Parts of such sizes, one after another."""
    return [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
