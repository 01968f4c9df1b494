"""Text by many adapters and the bare base, token by token, in one batch of the frozen model with one cache.

The engine is transformers' `generate` under a route. Rows that have come to their end leave the batch, and its cache,
once they are half of it; so that no text waits for much longer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tanzaku.core import caches
from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import route
from tanzaku.core.manager import base_of, find_manager, manager_of
from tanzaku.core.positions import parameters, room
from tanzaku.core.routing import Entry
from tanzaku.core.tokens import entrance_of, sees_padding
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.support.seeds import seed_of
from tanzaku.tasks.sampling import Decoding

WINDOW = 64  # rows that are sorted together: little padding, yet the first results come early
_TAIL = 8  # tokens looked at for a stop string beside one for each of its bytes: what some of them begin with

End = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Written:
    """What was written for one prompt.

    Args:
        entry: by whom, as in a route. row: of that entry's prompts, from 0.
        tokens: ids of what was written, without the token that ends a text, and with that in which a stop string ends.
        end: a token that ends texts ("end"), a stop string, or `max_new_tokens` ("length").
    """

    entry: Entry
    row: int
    tokens: list[int]
    end: End

    def text(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> str:
        """As text, without special tokens, up to the first of the stop strings."""
        text = _text(tokenizer, self.tokens)
        return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))]


class NotWritten(TanzakuError):
    """An entry whose scores of the next token are no numbers, and at which of its rows, counted from 0."""

    def __init__(self, entry: Entry, row: int, number: int, tokens: int):
        super().__init__(
            f"{_called(entry)}: the scores of token {tokens + 1} of row {number + 1} are nan, expected numbers"
        )
        self.entry, self.row = entry, row


def decode(
    model: PreTrainedModel,
    prompts: Mapping[Entry, Sequence[Sequence[int]]],
    settings: Decoding,
    pad_token_id: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    begins: Sequence[int] = (),
    context: Sequence[Mapping[str, int]] = (),
    numbers: Sequence[int] = (),
    on_token: Callable[[Entry, int, int], None] | None = None,
) -> Iterator[Written]:
    """Write on from prompts: for each row, in order, what each entry that has the row writes.

    A row is written as its adapter alone would write it, without a batch and without a cache, but for rounding: where
    two tokens are as likely, another may be taken. Its draws depend on the seed and on its number alone, so that
    two adapters have the same luck. Adapters share batches; one whose method shares none, or that has no room beside
    the others' virtual tokens, has batches to itself, and one that reads padding rows of one length. The model is put
    into eval mode; between two results gradients and the route are the caller's.

    In a model whose cache can leave out rows (those of attention alone, and no encoder-decoder), rows that ended leave
    the batch once they are half of it. Others are carried along until all have ended.

    Args:
        model: a causal language model, or an encoder-decoder, whose encoder then reads the prompts.
        prompts: token ids by adapter, stack of adapters (a tuple) or None, the bare base. Entries may have different
            prompts of one row (each its own template), or fewer rows.
        pad_token_id: what short prompts are filled with, on the left (an encoder's on the right).
        tokenizer: for `stop`.
        batch_size: rows a step; a batch has so many for each entry.
        begins: tokens that an encoder-decoder's decoder begins with, which are none of the text; those that the model
            says.
        context: of each row, a number by name that adapters may read.
        numbers: of the rows, from 0, for draws and messages, where rows come in parts (0, 1, ...).
        on_token: called with entry, row and token id as each token is written.

    Raises:
        TanzakuError: a model that writes no text, no prompts, an adapter that is not attached, an empty prompt or one
            with an unknown token, no room for it and `max_new_tokens` in the model's positions, stop strings without a
            tokenizer, or a batch size below 1; while writing, what a method says of the model.
        NotWritten: scores that are no numbers.
    """
    job = _Job(model, settings, pad_token_id, tokenizer, on_token, numbers, context, begins)
    _check(job, prompts, batch_size)
    return _windows(job, prompts, batch_size)


# -- which rows go together


@dataclass
class _Row:
    """One prompt and what is written of it yet."""

    entry: Entry
    row: int
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    end: End | None = None
    rng: np.random.Generator | None = None


@dataclass(frozen=True)
class _Job:
    """What stays the same for all rows."""

    model: PreTrainedModel
    settings: Decoding
    pad: int
    tokenizer: PreTrainedTokenizerBase | None
    on_token: Callable[[Entry, int, int], None] | None
    numbers: Sequence[int]
    context: Sequence[Mapping[str, int]]
    begins: Sequence[int]

    def number(self, row: int) -> int:
        """Which row it is, to draws and messages."""
        return self.numbers[row] if self.numbers else row

    @property
    def base(self) -> Base:
        return base_of(self.model)

    def adapters(self, entry: Entry) -> list[Adapter]:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return [manager_of(self.model).get(name) for name in names]

    def virtual(self, entry: Entry) -> int:
        """Virtual tokens before a row's own."""
        return sum(adapter.virtual for adapter in self.adapters(entry))

    def before(self, entry: Entry) -> int:
        """Positions that are taken before a row's first token."""
        return sum(adapter.before for adapter in self.adapters(entry))


def _windows(job: _Job, prompts: Mapping[Entry, Sequence[Sequence[int]]], batch_size: int) -> Iterator[Written]:
    rows = max(map(len, prompts.values()))
    window = batch_size * max(1, WINDOW // batch_size)
    for start in range(0, rows, window):
        some = range(start, min(start + window, rows))
        found: dict[tuple[int, Entry], Written] = {}
        for entries in _passes(job, prompts):
            for batch in _batches(job, {entry: prompts[entry] for entry in entries}, some, batch_size):
                found |= {(each.row, each.entry): each for each in _write(job, batch)}
        for row in some:
            yield from (found[row, entry] for entry in prompts if (row, entry) in found)


def _passes(job: _Job, prompts: Mapping[Entry, Sequence[Sequence[int]]]) -> Iterator[list[Entry]]:
    """Which entries go through the base together, all that share a batch, have room for one and read no padding.

    A short prompt beside a long one's virtual tokens is as wide as both; where a model counts columns it may not have
    so many, though each entry alone has room.
    """
    alone = [
        entry
        for entry in prompts
        if any(not each.method.shares_batch or each.reads_padding for each in job.adapters(entry))
    ]
    shared = [entry for entry in prompts if entry not in alone]
    if _sees_padding(job.base) and len({*map(job.virtual, shared)}) > 1:
        alone, shared = list(prompts), []
    limit = room(job.base)
    if limit is not None and len(shared) > 1:
        longest = max(len(prompt) for entry in shared for prompt in prompts[entry])
        after = 0 if job.base.encoder_decoder else job.settings.max_new_tokens
        if longest + max(map(job.before, shared)) + after > limit:
            alone, shared = list(prompts), []
    if shared:
        yield shared
    yield from ([entry] for entry in alone)


def _batches(
    job: _Job, prompts: Mapping[Entry, Sequence[Sequence[int]]], rows: range, batch_size: int
) -> Iterator[list[_Row]]:
    """Rows of like length together, and each entry's of a batch next to one another: groups of rows are then views."""
    longest = {row: max((len(some[row]) for some in prompts.values() if row < len(some)), default=0) for row in rows}
    order = sorted((row for row in rows if longest[row]), key=longest.__getitem__)
    padding = _sees_padding(job.base)
    padding = padding or any(adapter.reads_padding for entry in prompts for adapter in job.adapters(entry))
    for start in range(0, len(order), batch_size):
        at = sorted(order[start : start + batch_size])
        batch = [_Row(entry, row, prompts[entry][row]) for entry in prompts for row in at if row < len(prompts[entry])]
        lengths = sorted({len(each.prompt) for each in batch}) if padding else [0]
        yield from ([each for each in batch if not padding or len(each.prompt) == length] for length in lengths)


def _sees_padding(base: Base) -> bool:
    return sees_padding(base, last=not base.encoder_decoder)


# -- one batch


# On a function and not on a generator: while a caller holds a result, gradients and the route are the caller's.
@torch.no_grad()
def _write(job: _Job, rows: list[_Row]) -> list[Written]:
    """Write all rows of a batch to their ends."""
    model, settings, every = job.model.eval(), job.settings, rows
    for row in rows:
        if settings.temperature:
            row.rng = np.random.default_rng(seed_of("decoding", settings.seed, job.number(row.row)))
    inputs = _padded(job, [row.prompt for row in rows])
    if job.begins:
        inputs["decoder_input_ids"] = torch.tensor([[*job.begins]] * len(rows), device=model.device)
    cache: dict[str, Any] = {}
    while True:
        steps = _Steps(job, rows)
        with _routed(job, rows):
            out = model.generate(
                **inputs,
                **cache,
                generation_config=_config(job, settings.max_new_tokens - max(len(row.tokens) for row in rows)),
                stopping_criteria=StoppingCriteriaList([steps]),
                logits_processor=LogitsProcessorList(_processors(job, rows)),
            )
        if all(row.end is not None for row in rows):
            return [Written(row.entry, row.row, row.tokens, row.end or "length") for row in every]
        left = _left(job, rows)
        rows = [rows[at] for at in left]
        caches.select(out.past_key_values, left)
        cache = {"past_key_values": out.past_key_values}
        written = out.sequences.shape[1] - inputs["attention_mask"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, written), value=1)
        inputs = {"input_ids": out.sequences[left], "attention_mask": mask[left]}


def _left(job: _Job, rows: list[_Row]) -> list[int]:
    """Which rows a batch goes on with: those that did not end, and one with the most virtual tokens, since a cache
    keeps so many columns for them."""
    left = [at for at, row in enumerate(rows) if row.end is None]
    counts = [job.virtual(row.entry) for row in rows]
    widest = counts.index(max(counts))
    return left if max(counts[at] for at in left) == counts[widest] else sorted([*left, widest])


def _routed(job: _Job, rows: list[_Row]) -> Any:
    if find_manager(job.model) is None:
        return nullcontext()
    names = list(job.context[0]) if job.context else []
    device = job.model.device
    context = {name: torch.tensor([job.context[row.row][name] for row in rows], device=device) for name in names}
    return route(job.model, [row.entry for row in rows], context)


def _padded(job: _Job, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Prompts as long as the longest, (rows, columns), and their mask."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), job.pad)
    mask = torch.zeros_like(ids)
    for at, prompt in enumerate(prompts):
        # What is written stands in the last columns; what an encoder reads has its positions from the first column on.
        where = slice(0, len(prompt)) if job.base.encoder_decoder else slice(width - len(prompt), width)
        ids[at, where], mask[at, where] = torch.tensor(prompt), 1
    return {"input_ids": ids.to(job.model.device), "attention_mask": mask.to(job.model.device)}


def _config(job: _Job, tokens: int) -> GenerationConfig:
    """Greedy search: draws are made where scores are processed. What stands here is not taken from the checkpoint."""
    return GenerationConfig(
        max_new_tokens=tokens,
        pad_token_id=job.pad,
        decoder_start_token_id=job.begins[0] if job.begins else None,
        use_cache=True,
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        num_beams=1,
        num_return_sequences=1,
        min_length=0,
        min_new_tokens=None if job.model.generation_config.min_new_tokens is None else 0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        guidance_scale=1.0,
        return_dict_in_generate=True,
        output_scores=False,
        output_logits=False,
        output_attentions=False,
        output_hidden_states=False,
    )


def _ends(job: _Job) -> set[int]:
    """Ids of the tokens that end a text, by the checkpoint or the tokenizer."""
    ids = getattr(job.model.generation_config, "eos_token_id", None)
    ids = [*ids] if isinstance(ids, list | tuple) else [ids]
    return {token for token in (*ids, getattr(job.tokenizer, "eos_token_id", None)) if token is not None}


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Steps(StoppingCriteria):  # type: ignore[misc]
    """Takes down each token, and tells when the batch is to be left: when all rows have ended, or half of them where
    rows can leave."""

    def __init__(self, job: _Job, rows: list[_Row]):
        self.job, self.rows, self.left = job, rows, False
        self.ends = _ends(job)
        self.can_leave = rows_can_leave(job.base)
        self.tail = _TAIL + max((len(each.encode()) for each in job.settings.stop), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.left:  # else a step that is taken back
            for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
                if row.end is None:
                    self._take(row, token)
            open_rows = sum(row.end is None for row in self.rows)
            self.left = not open_rows or (self.can_leave and 2 * open_rows <= len(self.rows))
        return torch.full((len(input_ids),), self.left, device=input_ids.device)

    def _take(self, row: _Row, token: int) -> None:
        settings = self.job.settings
        if token in self.ends:
            row.end = "end"
            return
        row.tokens.append(token)
        if self.job.on_token is not None:
            self.job.on_token(row.entry, row.row, token)
        if settings.stop and self.job.tokenizer is not None:
            tail = _text(self.job.tokenizer, row.tokens[-self.tail :])
            if any(each in tail for each in settings.stop):
                row.end = "stop"
                return
        if len(row.tokens) == settings.max_new_tokens:
            row.end = "length"


def rows_can_leave(base: Base) -> bool:
    """Whether a cache of the model holds nothing but keys and values of rows, and the model nothing of them."""
    if base.encoder_decoder or "past_key_values" not in parameters(base.model):
        return False
    if any(hasattr(module, "rope_deltas") for module in tree.modules(base.model)):  # where rows with images are
        return False
    layers = DynamicCache(config=base.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _processors(job: _Job, rows: list[_Row]) -> Iterator[LogitsProcessor]:
    settings = job.settings
    yield _Checked(job, rows)
    if settings.temperature:
        yield TemperatureLogitsWarper(settings.temperature)
        if settings.top_k is not None:
            yield TopKLogitsWarper(settings.top_k)
        if settings.top_p is not None:
            yield TopPLogitsWarper(settings.top_p)
        yield _Draw(rows)


@dataclass(frozen=True)
class _Checked(LogitsProcessor):  # type: ignore[misc]
    """Scores of rows that are being written must be numbers."""

    job: _Job
    rows: list[_Row]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, broken in zip(self.rows, scores.isnan().any(-1).tolist(), strict=True):
            if broken and row.end is None:
                raise NotWritten(row.entry, row.row, self.job.number(row.row), len(row.tokens))
        return scores


@dataclass(frozen=True)
class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each row's scores the one of a token drawn by them, by a number of the row's own."""

    rows: list[_Row]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = scores.double().softmax(-1).cumsum(-1)
        numbers = [0.0 if row.rng is None else row.rng.random() for row in self.rows]
        drawn = torch.tensor(numbers, dtype=below.dtype, device=below.device)[:, None] * below[:, -1:]
        token = torch.searchsorted(below, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


# -- what cannot be written


def _called(entry: Entry) -> str:
    return "the base" if entry is None else f"adapter {entry!r}"


def _check(job: _Job, prompts: Mapping[Entry, Sequence[Sequence[int]]], batch_size: int) -> None:
    model, settings = job.model, job.settings
    if not (callable(getattr(model, "can_generate", None)) and model.can_generate()):
        raise TanzakuError(
            f"{type(model).__name__} writes no text; expected a model that AutoModelForCausalLM or "
            "AutoModelForSeq2SeqLM loads"
        )
    if "input_ids" not in (takes := parameters(entrance_of(job.base))):
        raise TanzakuError(
            f"{type(model).__name__} reads {takes[0]} and no token ids; expected a model that reads text"
        )
    if batch_size < 1:
        raise TanzakuError(f"batch_size is {batch_size}, expected at least 1")
    if settings.stop and job.tokenizer is None:
        raise TanzakuError("stop strings are looked for in text, and no tokenizer was given; pass tokenizer=")
    if not prompts:
        raise TanzakuError("there is nobody to write; expected prompts of at least one adapter, or of None, the base")
    for entry, some in prompts.items():
        job.adapters(entry)
        if not some:
            raise TanzakuError(f"{_called(entry)} has no prompts; expected at least one")
        _check_prompts(job, entry, some)
    rows = max(map(len, prompts.values()))
    if job.numbers and len(job.numbers) < rows:
        raise TanzakuError(f"numbers are of {len(job.numbers)} rows, expected one for each of {rows}")
    if job.context and len(job.context) < rows:
        raise TanzakuError(f"context is of {len(job.context)} rows, expected one for each of {rows}")


def _check_prompts(job: _Job, entry: Entry, prompts: Sequence[Sequence[int]]) -> None:
    base, new = job.base, job.settings.max_new_tokens
    known, limit = base.vocab_size, room(base)
    virtual, before = job.virtual(entry), job.before(entry)
    for row, prompt in enumerate(prompts):
        where = f"{_called(entry)}: the prompt of row {job.number(row) + 1}"
        if not len(prompt):
            raise TanzakuError(f"{where} has no tokens; expected at least one")
        if not 0 <= min(prompt) <= max(prompt) < known:
            odd = next(token for token in prompt if not 0 <= token < known)
            raise TanzakuError(f"{where} has token number {odd}, and the model knows {known} tokens")
        if limit is None:
            continue
        taken = virtual if base.encoder_decoder else before
        beside = f" and {taken} virtual ones" if taken else ""
        if base.encoder_decoder:
            if len(prompt) + taken > limit:
                raise TanzakuError(
                    f"{where} has {len(prompt)} tokens{beside}, and the model {limit} positions; shorten it"
                )
            if (own := max(1, len(job.begins)) + before - virtual + new) > limit:
                raise TanzakuError(
                    f"{_called(entry)}: max_new_tokens is {new}, and the model has {limit - own + new} positions for "
                    "them"
                )
        elif len(prompt) + taken + new > limit:
            left = limit - len(prompt) - taken
            fix = f"max_new_tokens may be {left} at most" if left > 0 else "shorten it"
            raise TanzakuError(
                f"{where} has {len(prompt)} tokens{beside}, and with {new} new ones more than the model's {limit} "
                f"positions; {fix}"
            )
