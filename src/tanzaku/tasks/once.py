"""What the rows of an example begin with, computed once: answers to choose from go on from one prompt.

The prompts of a batch are a pass with a cache, of which each answer gets a copy, and the answers are another pass
behind it. Prompts are padded on the left, as in generation, so that answers stand behind them. This is not for
training, where the backward pass would have to go through the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from tanzaku.core import caches
from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import route
from tanzaku.core.manager import base_of, find_manager
from tanzaku.core.positions import numbering, parameters
from tanzaku.core.survey import sees_padding
from tanzaku.core.tokens import sees_padding as sees_padding_before
from tanzaku.models.families import Base
from tanzaku.tasks.decoding import rows_can_leave
from tanzaku.tasks.task import Batch, Task

if TYPE_CHECKING:
    from tanzaku.engine.text_head import Hidden


def can_be_once(model: PreTrainedModel, batch: Batch, adapters: Sequence[Adapter | None]) -> bool:
    """Whether a batch has rows that begin alike, in a model whose cache can be repeated for them, with adapters that
    treat a token behind a cache as they treat it behind its text.

    Args:
        adapters: of each row; None: it is bare.
    """
    if not all(example.shared and example.others for example in batch.examples):
        return False
    if batch.inputs.keys() != {"input_ids", "attention_mask"} or not batch.examples:
        return False
    each = {id(adapter): adapter for adapter in adapters if adapter is not None}.values()
    if any(adapter.whole_rows or adapter.reads_padding or adapter.method.reads_ends() for adapter in each):
        return False
    base = base_of(model)
    return rows_can_leave(base) and not sees_padding(base)


def run_once(model: PreTrainedModel, task: Task, batch: Batch, adapters: Sequence[Adapter | None]) -> Hidden:
    """What :meth:`Task.run` gives for a batch, as far as the tokens that are not shared are foretold by it: hidden
    states are zero where a row's end, its padding, and all of its prompt but the last token are."""
    from tanzaku.engine.text_head import Hidden

    ends = [0, *accumulate(len(example.rows) for example in batch.examples)]
    prompts = [example.shared for example in batch.examples]
    found: Hidden | None = None
    states = torch.empty(0)
    for group in _groups(base_of(model), prompts):
        rows = [row for at in group for row in range(ends[at], ends[at + 1])]
        own = [place for place, at in enumerate(group) for _ in range(ends[at], ends[at + 1])]  # the prompt of each
        first, then = _halves(batch, rows, [prompts[group[place]] for place in own])
        heads = [own.index(place) for place in range(len(group))]
        kept = {"past_key_values": DynamicCache(config=base_of(model).config), "use_cache": True}
        with _routed(model, batch, adapters, [ends[at] for at in group]):
            asked = task.run(model, {**_placed(model, first.ids[heads], first.mask[heads]), **kept})
        if found is None:
            found = asked
            states = asked.states.new_zeros(*batch.inputs["input_ids"].shape, asked.states.shape[-1])
        states[rows, [prompts[group[place]] - 1 for place in own]] = asked.states[own, -1]
        if not then.ids.shape[1]:
            continue
        caches.select(kept["past_key_values"], own)
        with _routed(model, batch, adapters, rows):
            mask = torch.cat([first.mask, then.mask], dim=1)
            answers = task.run(model, {**_placed(model, then.ids, mask), **kept}).states
        at, place = then.mask.bool().nonzero(as_tuple=True)
        begin = torch.tensor([prompts[group[each]] for each in own], device=at.device)
        states[torch.tensor(rows, device=at.device)[at], begin[at] + place] = answers[at, place]
    assert found is not None
    return Hidden(found.head, states)


@dataclass(frozen=True)
class _Half:
    """Tokens of some rows and which of them are there, both (rows, columns)."""

    ids: Tensor
    mask: Tensor


def _halves(batch: Batch, rows: Sequence[int], prompts: Sequence[int]) -> tuple[_Half, _Half]:
    """Of some rows the prompts, of so many tokens and padded on the left, and what foretells something behind them."""
    ids = batch.inputs["input_ids"]
    lengths = [batch.lengths[row] - 1 for row in rows]  # nothing is foretold by a last token
    width, more = max(prompts), max(end - begin for begin, end in zip(prompts, lengths, strict=True))
    first = _Half(ids.new_zeros(len(rows), width), ids.new_zeros(len(rows), width))
    then = _Half(ids.new_zeros(len(rows), more), ids.new_zeros(len(rows), more))
    for place, (row, begin, end) in enumerate(zip(rows, prompts, lengths, strict=True)):
        first.ids[place, width - begin :] = ids[row, :begin]
        first.mask[place, width - begin :] = 1
        then.ids[place, : end - begin] = ids[row, begin:end]
        then.mask[place, : end - begin] = 1
    return first, then


def _placed(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What a model is given of the last columns of its rows: where each token stands, as in generation."""
    found = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in parameters(model):
        found["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return found


def _groups(base: Base, prompts: Sequence[int]) -> Iterator[list[int]]:
    """Which prompts share a pass: all, where padding before a row changes nothing of it, else those of one length."""
    padded = numbering(base.backbone, base).kind in ("column", "mask", "none") and not sees_padding_before(
        base, last=True
    )
    if padded:
        yield [*range(len(prompts))]
        return
    for length in sorted({*prompts}):
        yield [at for at, each in enumerate(prompts) if each == length]


@contextmanager
def _routed(
    model: PreTrainedModel, batch: Batch, adapters: Sequence[Adapter | None], rows: Sequence[int]
) -> Iterator[None]:
    """Some rows of a batch, each to its own adapter: where there is but one, it has the route already."""
    manager = find_manager(model)
    each: list[Any] = [None if adapter is None else adapter.name for adapter in adapters]
    names = [each[row] for row in rows]
    context = {name: values[list(rows)] for name, values in batch.context.items()}
    if manager is None:
        yield
    elif len({*each}) > 1:
        with route(model, names, context):
            yield
    else:
        if manager.route is not None:
            manager.route.context = context
        yield
