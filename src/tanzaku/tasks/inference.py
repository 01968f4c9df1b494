"""Predictions of many adapters in one pass through the frozen base, texts of like length together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import route
from tanzaku.core.manager import base_of, find_manager, manager_of
from tanzaku.core.positions import room
from tanzaku.core.routing import Entry, Route
from tanzaku.core.tokens import without_cache
from tanzaku.engine.accelerations import Accelerations
from tanzaku.errors import TanzakuError, listed
from tanzaku.models.families import Base
from tanzaku.tasks.decoding import Written, decode
from tanzaku.tasks.once import can_be_once, run_once
from tanzaku.tasks.task import LOSS, Batch, Example, Records, Split, Task, joined, take

E = TypeVar("E", str, str | None)  # an adapter; where None is one of them, it is the bare base
WINDOW = 256  # rows that are sorted together: little padding, yet the first results come early


class NotFinite(TanzakuError):
    """What an adapter (`name`) gives that is no number, and at which row, counted from 0."""

    def __init__(self, name: str, row: int, what: str, values: list[float]):
        super().__init__(
            f"adapter {name!r}: the {what} of row {row + 1} are {_numbers(values)}, expected finite numbers"
        )
        self.name, self.row, self.what, self.found = name, row, what, _numbers(values)


def _numbers(values: list[float]) -> str:
    return listed((f"{value:g}" for value in values), 4)


class Forward:
    """A model's passes over rows of a task: what it is given of them, and what is kept of what it gives.

    Args:
        pad_token_id: what short rows are filled with.
    """

    def __init__(self, model: PreTrainedModel, task: Task, pad_token_id: int):
        self.model, self.task, self.pad_token_id = model, task, pad_token_id
        self.positions = room(Base.of(model))
        # What a tokenizer gives that this model's `forward` does not take.
        self.without = frozenset({"token_type_ids"} - inspect.signature(model.forward).parameters.keys())
        # A cache of keys and values is for generation; here it would only be a copy of them a layer.
        self.options = without_cache(Base.of(model))

    def batch(
        self, examples: Sequence[Example], width: int = 0, decoder_width: int = 0, adapters: Sequence[Adapter] = ()
    ) -> Batch:
        """The rows on the model's device, padded to the longest, or to `width` tokens if that is more, and what a
        decoder reads to `decoder_width`.

        Args:
            adapters: those that the rows are routed to. What an encoder and a decoder read then differs in width where
                the model has positions for that: so a tensor's shape tells which of the two has gone into it.
        """
        # Tasks without a decoder's text need not know of its width.
        wide = {"decoder_width": decoder_width} if decoder_width else {}
        found = self.task.collate(examples, self.pad_token_id, width, **wide)
        lead = max((adapter.virtual for adapter in adapters), default=0)
        if found.decoder_width == lead + found.width:
            taken = max((adapter.before - adapter.virtual for adapter in adapters), default=0)
            one, two = found.width, found.decoder_width
            if self.positions is None or taken + two < self.positions:
                found = self.task.collate(examples, self.pad_token_id, one, decoder_width=two + 1)
            elif lead + one < self.positions:
                found = self.task.collate(examples, self.pad_token_id, one + 1, decoder_width=two)
        return found.to(self.model.device, self.without)

    def __call__(self, batch: Batch) -> Any:
        """The model's outputs."""
        manager = find_manager(self.model)
        if manager is not None and (route := manager.route) is not None:
            route.context = batch.context
        return self.task.run(self.model, {**batch.inputs, **self.options})

    def records(
        self, batch: Batch, adapters: Sequence[Adapter | None], accelerations: Accelerations, route: Route | None
    ) -> Records:
        """What metrics and predictions need of each row.

        Args:
            adapters: of each row of the pass; None: it is bare. route: the one in force, by which it may be packed.
        """
        if can_be_once(self.model, batch, adapters):
            return self.task.records(run_once(self.model, self.task, batch, adapters), batch)
        with accelerations.batch(batch, adapters, route):
            return self.task.records(self(batch), batch)

    def write(
        self, splits: Mapping[E, Split], rows: range, batch_size: int, numbers: Sequence[int] = ()
    ) -> dict[E, list[Written]]:
        """By adapter (None: the bare base), what it writes for these rows.

        Args:
            numbers: of all rows, where they are not 0, 1, ...
        """
        assert self.task.decoding is not None
        some = {name: [split.examples[row] for row in rows] for name, split in splits.items()}
        prompts: dict[Entry, list[Sequence[int]]] = {
            name: [self.task.prompt(example) for example in examples] for name, examples in some.items()
        }
        found: dict[Any, list[Written]] = {name: [] for name in splits}
        for each in decode(
            self.model,
            prompts,
            self.task.decoding,
            self.pad_token_id,
            tokenizer=self.task.tokenizer,
            batch_size=batch_size,
            begins=self.task.begins(self.model),
            context=[example.context for example in next(iter(some.values()))],
            numbers=numbers[rows.start : rows.stop] if numbers else rows,
        ):
            found[each.entry].append(each)
        return found


def predictions(
    model: PreTrainedModel,
    task: Task,
    splits: Mapping[str, Split],
    pad_token_id: int,
    batch_size: int,
    accelerations: Accelerations | None = None,
    tasks: Mapping[str, Task] | None = None,
    numbers: Sequence[int] = (),
) -> Iterator[dict[str, Any]]:
    """For each row, in the order of the splits: by adapter, the task's prediction.

    Results come as they are found, some hundred rows at a time, and each adapter's are those it has alone. Adapters
    share passes; one whose method shares no batch (full fine-tuning) has passes to itself. The model is put into eval
    mode; between two rows its route is what it was before.

    Args:
        model: made for the task, with the adapters that `splits` names.
        splits: the same rows for every adapter, each encoded as that adapter wants them.
        batch_size: rows a step; a pass has so many for each of its adapters.
        accelerations: of this model, for who calls again and again: they take a while to make.
        tasks: by adapter, the task with what was chosen for it.
        numbers: of the rows, from 0, which draws go by where text is sampled; 0, 1, ... where nothing is said.

    Raises:
        TanzakuError: no adapter, one that is not attached, rows that differ in number, or a batch size below 1.
        NotFinite: an adapter gives nothing that could be told apart.
    """
    rows = _number_of_rows(model, splits, batch_size)
    window = window_of(batch_size)
    parts = (range(start, min(start + window, rows)) for start in range(0, rows, window))
    forward, fast = Forward(model, task, pad_token_id), accelerations or Accelerations(manager_of(model).base)
    return _each(
        {name: (tasks or {}).get(name, task) for name in splits},
        (_records(forward, fast, splits, batch_size, part, numbers) for part in parts),
    )


def check_rows(
    base: Base,
    split: Split,
    max_length: int,
    adapter: Adapter | None = None,
    numbers: Sequence[int] | None = None,
    task: Task | None = None,
) -> None:
    """Check that the model has a vector for each token, and a position, also for those that it is to write.

    Args:
        max_length: what the rows were cut at. adapter: one that may take positions before them. task: whose rows they
            are, where the model may write.
        numbers: of the rows in their file, counted from 1.

    Raises:
        TanzakuError: it has not; which row, and what to do.
    """

    def where(row: int) -> str:
        return f"{split.source} row {split.number(row) if numbers is None else numbers[row]}"

    before = 0 if adapter is None else adapter.before
    virtual = before if adapter is None or not base.encoder_decoder else adapter.virtual
    lengths = [example.length for example in split.examples]
    longest, limit = max(range(len(lengths)), key=lengths.__getitem__), room(base)
    if limit is not None and lengths[longest] + virtual > limit:
        beside = f" and {virtual} virtual ones" if virtual else ""
        fix = f"use --max-length {limit - virtual}" if limit > virtual else "use fewer virtual tokens"
        raise TanzakuError(
            f"{where(longest)} has {lengths[longest]} tokens at max_length {max_length}{beside}, and the model "
            f"{limit} positions; {fix}"
        )
    writes = task is not None and (task.writes or split.examples[0].target is None)
    if limit is not None and base.encoder_decoder:
        taken, tokens = before - virtual, [example.decoder_length for example in split.examples]
        longest, new = max(range(len(tokens)), key=tokens.__getitem__), 0
        beside = f" and {taken} of a prefix" if taken else ""
        if taken + tokens[longest] > limit:
            raise TanzakuError(
                f"{where(longest)} has a target of {tokens[longest]} tokens{beside}, and the model {limit} positions; "
                f"use --max-target-length {limit - taken}, and --too-long cut"
            )
        if writes and task is not None and task.decoding is not None:
            new = task.decoding.max_new_tokens + max(1, len(task.begins(base.model)))
        if taken + new > limit:
            raise TanzakuError(
                f"{new} tokens of a text that is written{beside} are more than the model's {limit} positions; use "
                f"--max-new-tokens {limit - taken - 1}"
            )
    elif limit is not None and writes and task is not None and task.decoding is not None:
        prompts = [len(task.prompt(example)) for example in split.examples]
        longest, new = max(range(len(prompts)), key=prompts.__getitem__), task.decoding.max_new_tokens
        if (left := limit - virtual - prompts[longest]) < new:
            fix = f"use --max-new-tokens {left}" if left > 0 else "shorten it"
            beside = f" and {virtual} virtual ones" if virtual else ""
            raise TanzakuError(
                f"{where(longest)} has a prompt of {prompts[longest]} tokens{beside}, and with {new} new ones more "
                f"than the model's {limit} positions; {fix}"
            )
    try:
        known = base.vocab_size
    except TanzakuError:
        return  # no table of tokens
    for row, example in enumerate(split.examples):
        if (highest := max(max(ids) for each in example.rows for ids in each.values())) >= known:
            raise TanzakuError(
                f"{where(row)} has token number {highest}, and the model knows {known} tokens: its tokenizer is that "
                "of another model; save the model's own beside it"
            )


def window_of(batch_size: int) -> int:
    """Rows that are computed together: whole batches."""
    return batch_size * max(1, WINDOW // batch_size)


def records_of(
    model: PreTrainedModel,
    task: Task,
    splits: Mapping[E, Split],
    pad_token_id: int,
    batch_size: int,
    accelerations: Accelerations | None = None,
) -> dict[E, Records]:
    """By adapter (None: the bare base), the records behind :func:`predictions`, of all rows at once."""
    rows = _number_of_rows(model, splits, batch_size)
    fast = accelerations or Accelerations(base_of(model))
    return _records(Forward(model, task, pad_token_id), fast, splits, batch_size, range(rows))


@torch.no_grad()
def perplexity_of(model: PreTrainedModel, task: Task, rows: Split, pad_token_id: int, accelerations: str) -> float:
    """That of the bare base on these rows."""
    fast = Accelerations(base_of(model), accelerations)
    found = _passed(Forward(model, task, pad_token_id), fast, {None: rows}, 8, range(len(rows)))
    return perplexity(found[None])


def perplexity(records: Records) -> float:
    """By the losses of rows and what these are sums over."""
    return float(np.exp(np.minimum(LOSS.statistics(records).value(), 700.0)))


def _number_of_rows(model: PreTrainedModel, splits: Mapping[E, Split], batch_size: int) -> int:
    if batch_size < 1:
        raise TanzakuError(f"batch_size is {batch_size}, expected at least 1")
    if not splits:
        raise TanzakuError("no adapter to compute with; expected at least one and its rows")
    for name in splits:
        _adapter(model, name)
    sizes = {len(split) for split in splits.values()}
    if len(sizes) > 1:
        found = listed(f"{len(split)} for {name or 'the base'}" for name, split in splits.items())
        raise TanzakuError(f"adapters in one pass need the same rows, found {found}")
    if 0 in sizes:
        raise TanzakuError("there are no rows; expected at least one")
    return sizes.pop()


def _each(tasks: Mapping[str, Task], windows: Iterator[dict[str, Records]]) -> Iterator[dict[str, Any]]:
    before = 0
    for window in windows:
        for name, records in window.items():
            _check_finite(name, records, before)
        found = [tasks[name].predictions(tasks[name].decided(records)) for name, records in window.items()]
        before += len(found[0])
        for row in zip(*found, strict=True):
            yield dict(zip(window, row, strict=True))


def _check_finite(name: str, records: Records, before: int) -> None:
    for what, column in records.items():
        ragged = isinstance(column, list)  # rows differ in length, and are looked at one by one
        for start, values in enumerate(column if ragged else [column]):
            if isinstance(values, np.ndarray) and not (finite := np.isfinite(values)).all():
                at = start if ragged else int((~finite).nonzero()[0][0])
                raise NotFinite(name, before + at, what, np.ravel(column[at]).tolist())


# On a function and not on a generator: while a caller holds a row, gradients and the route are the caller's.
@torch.no_grad()
def _records(
    forward: Forward,
    accelerations: Accelerations,
    splits: Mapping[E, Split],
    batch_size: int,
    rows: range,
    numbers: Sequence[int] = (),
) -> dict[E, Records]:
    """By adapter, the records of these rows, in their order."""
    task = forward.task
    targets = all(split.examples[rows.start].target is not None for split in splits.values())
    found: dict[E, Records] = {name: {} for name in splits}
    if targets or task.decoding is None:
        found = _passed(forward, accelerations, splits, batch_size, rows)
    if task.decoding is not None and (task.writes or not targets):
        written = forward.write(splits, rows, batch_size, numbers)
        found = {name: task.put(records, written[name]) for name, records in found.items()}
    return found


def _passed(
    forward: Forward, accelerations: Accelerations, splits: Mapping[E, Split], batch_size: int, rows: range
) -> dict[E, Records]:
    """By adapter, the records of passes over these rows."""
    model = forward.model.eval()
    forward.task.prepare(model)
    manager = find_manager(model)
    lengths = {name: [split.examples[row].length for row in rows] for name, split in splits.items()}
    longest = [max(of_row) for of_row in zip(*lengths.values(), strict=True)]
    shared = [max(split.examples[row].shared for split in splits.values()) for row in rows]
    order = sorted(range(len(rows)), key=lambda at: (shared[at], longest[at]))
    found: dict[E, list[Records]] = {name: [] for name in splits}
    for names in _passes(model, lengths):
        # One entry an adapter: a batch of as many rows for each repeats the entries in place, so groups are views.
        # Rows of a table are as many rows of a pass for every adapter, since all have one task.
        with accelerations, nullcontext() if manager is None else route(model, names):
            for start in range(0, len(order), batch_size):
                at = order[start : start + batch_size]
                some = {name: [splits[name].examples[rows[i]] for i in at] for name in names}
                adapters = [_adapter(model, name) for name in names for example in some[name] for _ in example.rows]
                every = [example for name in names for example in some[name]]
                batch = forward.batch(every, adapters=[each for each in adapters if each is not None])
                records = forward.records(batch, adapters, accelerations, None if manager is None else manager.route)
                for place, name in enumerate(names):
                    found[name].append(take(records, slice(place * len(at), (place + 1) * len(at))))
    return {name: joined(parts, order) for name, parts in found.items()}


def _adapter(model: PreTrainedModel, entry: str | None) -> Adapter | None:
    return None if entry is None else manager_of(model).get(entry)


def _passes(model: PreTrainedModel, lengths: Mapping[E, list[int]]) -> Iterator[list[E]]:
    """Which adapters go through the base together, all that share a batch, have room for one and read no padding.

    Rows that are cut at different lengths are padded to the longest, and beside another adapter's virtual tokens these
    may be more than the model has positions for, though each adapter alone has room. Then only adapters with rows of
    the same lengths go together.
    """
    limit, own = room(base_of(model)), {name: _adapter(model, name) for name in lengths}
    shared = [
        name for name, each in own.items() if each is None or (each.method.shares_batch and not each.reads_padding)
    ]
    alike: dict[tuple[int, ...], list[E]] = {}
    for name in shared:
        alike.setdefault(tuple(lengths[name]), []).append(name)
    if len(alike) > 1:
        longest = max(map(max, alike))
        lead = max(0 if (each := own[name]) is None else each.before for name in shared)
        if limit is None or longest + lead <= limit:
            alike = {(): shared}
    yield from alike.values()
    yield from ([name] for name in lengths if name not in shared)
