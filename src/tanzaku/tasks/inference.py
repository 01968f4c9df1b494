"""Probabilities of many adapters in one pass through the frozen base, texts of like length together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tanzaku.errors import TanzakuError, listed
from tanzaku.families import Base
from tanzaku.host import host_of, route
from tanzaku.positions import room
from tanzaku.tasks.classification import Split, collate
from tanzaku.tokens import without_cache
from tanzaku.train.passes import CheapPasses
from tanzaku.train.products import ABOVE

WINDOW = 256  # rows that are sorted together: little padding, yet the first results come early


class NotFinite(TanzakuError):
    """Logits of an adapter (`name`) that are no numbers, and at which row, counted from 0."""

    def __init__(self, name: str, row: int, logits: list[float]):
        super().__init__(
            f"adapter {name!r}: the logits of row {row + 1} are {_numbers(logits)}, expected finite numbers"
        )
        self.name, self.row, self.found = name, row, _numbers(logits)


def _numbers(values: list[float]) -> str:
    return listed((f"{value:g}" for value in values), 4)


def probabilities(
    model: PreTrainedModel,
    splits: Mapping[str, Split],
    pad_token_id: int,
    batch_size: int,
    passes: CheapPasses | None = None,
) -> Iterator[dict[str, list[float]]]:
    """For each row, in the order of the splits: by adapter, the probabilities of each label.

    Results come as they are found, some hundred rows at a time, and each adapter's are those it has alone. Adapters
    share passes; one whose method shares no batch (full fine-tuning) has passes to itself. The model is put into eval
    mode; between two rows its route is what it was before.

    Args:
        model: a classifier with the adapters that `splits` names.
        splits: the same rows for every adapter, each encoded as that adapter wants them.
        batch_size: rows of text a step; a pass has so many for each of its adapters.
        passes: of this model, for who calls again and again: they take a while to make.

    Raises:
        TanzakuError: no adapter, one that is not attached, rows that differ in number, or a batch size below 1.
        NotFinite: an adapter gives nothing that could be told apart.
    """
    rows = _number_of_rows(model, splits, batch_size)
    window = window_of(batch_size)
    parts = (range(start, min(start + window, rows)) for start in range(0, rows, window))
    passes = passes or CheapPasses(host_of(model).base)
    return _each(_logits(passes, model, splits, pad_token_id, batch_size, part) for part in parts)


def check_rows(
    base: Base, split: Split, max_length: int, virtual: int = 0, numbers: Sequence[int] | None = None
) -> None:
    """Check that the model has a vector for each token, and a position.

    Args:
        max_length: what the rows were cut at. virtual: tokens that an adapter puts before them.
        numbers: of the rows in their file, counted from 1.

    Raises:
        TanzakuError: it has not; which row, and what to do.
    """

    def where(row: int) -> str:
        return f"{split.source} row {row + 1 if numbers is None else numbers[row]}"

    lengths = [len(example.input_ids) for example in split.examples]
    longest, limit = max(range(len(lengths)), key=lengths.__getitem__), room(base)
    if limit is not None and lengths[longest] + virtual > limit:
        beside = f" and {virtual} virtual ones" if virtual else ""
        fix = f"use --max-length {limit - virtual}" if limit > virtual else "use fewer virtual tokens"
        raise TanzakuError(
            f"{where(longest)} has {lengths[longest]} tokens at max_length {max_length}{beside}, and the model "
            f"{limit} positions; {fix}"
        )
    try:
        known = base.vocab_size
    except TanzakuError:
        return  # no table of tokens
    for row, example in enumerate(split.examples):
        if (highest := max(example.input_ids)) >= known:
            raise TanzakuError(
                f"{where(row)} has token number {highest}, and the model knows {known} tokens: its tokenizer is that "
                "of another model; save the model's own beside it"
            )


def window_of(batch_size: int) -> int:
    """Rows that are computed together: whole batches."""
    return batch_size * max(1, WINDOW // batch_size)


def probabilities_of(
    model: PreTrainedModel, splits: Mapping[str, Split], pad_token_id: int, batch_size: int
) -> dict[str, Tensor]:
    """By adapter, :func:`probabilities` of all rows at once: float64 [rows, labels] on the CPU."""
    found = logits_of(model, splits, pad_token_id, batch_size)
    return {name: logits.double().softmax(-1) for name, logits in found.items()}


def logits_of(
    model: PreTrainedModel, splits: Mapping[str, Split], pad_token_id: int, batch_size: int
) -> dict[str, Tensor]:
    """By adapter, the logits behind :func:`probabilities_of`: float32 [rows, labels] on the CPU, for metrics."""
    rows = _number_of_rows(model, splits, batch_size)
    passes = CheapPasses(host_of(model).base)
    return _logits(passes, model, splits, pad_token_id, batch_size, range(rows))


def _number_of_rows(model: PreTrainedModel, splits: Mapping[str, Split], batch_size: int) -> int:
    if batch_size < 1:
        raise TanzakuError(f"batch_size is {batch_size}, expected at least 1")
    if not splits:
        raise TanzakuError("no adapter to compute with; expected at least one and its rows")
    for name in splits:
        host_of(model).get(name)
    sizes = {name: len(split) for name, split in splits.items()}
    if len({*sizes.values()}) > 1:
        found = listed(f"{size} for {name}" for name, size in sizes.items())
        raise TanzakuError(f"adapters in one pass need the same rows, found {found}")
    if 0 in sizes.values():
        raise TanzakuError("there are no rows; expected at least one")
    return sizes.popitem()[1]


def _each(windows: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, list[float]]]:
    before = 0
    for window in windows:
        for name, logits in window.items():
            if not (finite := logits.isfinite().all(dim=-1)).all():
                at = int((~finite).int().argmax())
                raise NotFinite(name, before + at, logits[at].tolist())
        before += len(next(iter(window.values())))
        lists = [logits.double().softmax(-1).tolist() for logits in window.values()]
        for row in zip(*lists, strict=True):
            yield dict(zip(window, row, strict=True))


# On a function and not on a generator: while a caller holds a row, gradients and the route are the caller's.
@torch.no_grad()
def _logits(
    passes: CheapPasses,
    model: PreTrainedModel,
    splits: Mapping[str, Split],
    pad_token_id: int,
    batch_size: int,
    rows: range,
) -> dict[str, Tensor]:
    """By adapter, fp32 logits [rows, labels] on the CPU, in the order of `rows`."""
    model.eval()
    host = host_of(model)
    takes = inspect.signature(model.forward).parameters
    # A cache of keys and values is for generation; here it would only be a copy of them a layer.
    options = without_cache(host.base)
    lengths = {name: [len(split.examples[row].input_ids) for row in rows] for name, split in splits.items()}
    longest = [max(of_row) for of_row in zip(*lengths.values(), strict=True)]
    order = sorted(range(len(rows)), key=lambda at: longest[at])
    out: dict[str, Tensor] = {}
    for names in _passes(model, lengths):
        # One entry an adapter: a batch of as many rows for each repeats the entries in place, so groups are views.
        with passes, route(model, names):
            for start in range(0, len(order), batch_size):
                at = order[start : start + batch_size]
                batch = collate([splits[name].examples[rows[i]] for name in names for i in at], pad_token_id, False)
                if "token_type_ids" not in takes:
                    batch.pop("token_type_ids", None)
                batch = {key: value.to(model.device) for key, value in batch.items()}
                with passes.reading(
                    batch["input_ids"],
                    lengths=[lengths[name][i] for name in names for i in at],
                    virtual=[host.get(name).virtual for name in names for _ in at],
                    lowest=[ABOVE] * (len(names) * len(at)),  # no gradient is wanted
                    route=host.route,
                ):
                    logits = model(**batch, **options).logits.float().cpu()
                for name, part in zip(names, logits.split(len(at)), strict=True):
                    out.setdefault(name, logits.new_empty(len(rows), logits.shape[-1]))[at] = part
    return {name: out[name] for name in splits}


def _passes(model: PreTrainedModel, lengths: Mapping[str, list[int]]) -> Iterator[list[str]]:
    """Which adapters go through the base together, all that share a batch and have room for one.

    Rows that are cut at different lengths are padded to the longest, and beside another adapter's virtual tokens these
    may be more than the model has positions for, though each adapter alone has room. Then only adapters with rows of
    the same lengths go together.
    """
    host = host_of(model)
    limit = room(host.base)
    shared = [name for name in lengths if host.get(name).method.shares_batch]
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in shared:
        alike.setdefault(tuple(lengths[name]), []).append(name)
    if len(alike) > 1:
        longest, lead = max(map(max, alike)), max(host.get(name).before for name in shared)
        if limit is None or longest + lead <= limit:
            alike = {(): shared}
    yield from alike.values()
    yield from ([name] for name in lengths if name not in shared)
