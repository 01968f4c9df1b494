"""Rows that are a text, or a pair of texts: what tasks that give each row one answer share."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tanzaku.errors import TanzakuError, flag
from tanzaku.tasks.cells import missing, short
from tanzaku.tasks.settings import Override
from tanzaku.tasks.task import Batch, Example, Split, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tanzaku.tasks.data import Table

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one alone; no tokenizer takes it


class TextTask(Task):
    """A task with one answer for each row, which is a text or a pair of texts."""

    text: str
    text_pair: str | None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)

    overrides: ClassVar[Mapping[str, Override]] = {
        "text": Override("TEXT", "column of the text (as in training)"),
        "text_pair": Override("TEXT", "column of a second text"),
    }
    reading = ("text", "text_pair")

    def check_cell(self, value: Any, where: str) -> None:
        if not isinstance(value, str) and not self.blank(value):
            raise TanzakuError(f"{where} is {str(value)[:40]} ({type(value).__name__}), expected text")
        if isinstance(value, str):
            check_characters(value, where)

    def blank(self, value: Any) -> bool:
        return missing(value) or (isinstance(value, str) and not value.strip())

    def have_tokens(self, values: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        if not values:
            return []
        found = tokenizer(list(values), add_special_tokens=False, verbose=False)["input_ids"]
        return [bool(ids) for ids in found]

    @abstractmethod
    def target_of(self, value: Any, where: str) -> Any:
        """The target that a cell names; `where` is its place, for the TanzakuError."""

    def targets_in(self, table: Table, data: Any) -> list[Any]:
        """Each row's target."""
        column = enumerate(table.column(data.label), 1)
        return [self.target_of(value, f"{table.source} row {row}") for row, value in column]

    @abstractmethod
    def target_tensor(self, targets: Sequence[Any]) -> Tensor:
        """The targets of some rows, (rows, ...)."""

    def encode(
        self, table: Table, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, targets: Any = None
    ) -> Split:
        inputs, truncated = encoded(table, self.reads, tokenizer, max_length)
        found = [None] * len(table)
        if targets is not None:
            found = self.targets_in(table, targets)
        examples = self.told([Example(row, target) for row, target in zip(inputs, found, strict=True)], table)
        seconds = None if self.text_pair is None else table.column(self.text_pair)
        return Split(name, examples, table.column(self.text), truncated, table.source, seconds)

    def collate(self, examples: Sequence[Example], pad_token_id: int, width: int = 0, decoder_width: int = 0) -> Batch:
        inputs = padded(examples, pad_token_id, width)
        found = [example.target for example in examples]
        targets = {} if all(target is None for target in found) else {"target": self.target_tensor(_whole(found))}
        return Batch.of(inputs, targets, examples)


def _whole(targets: Sequence[Any]) -> Sequence[Any]:
    if lacking := sum(target is None for target in targets):
        raise TanzakuError(f"{lacking} of {len(targets)} rows have no target; expected one for each, or for none")
    return targets


def encoded(
    table: Table, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """The rows' texts as tokens, special ones included, a pair cut from its longer text; and how many were cut.

    Raises:
        TanzakuError: a row (counted from 1) without text or tokens, or no room for any in `max_length`.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    if max_length < (shortest := special + len(columns)):
        room = f"no room for text beside {special} special tokens"
        raise TanzakuError(f"max_length {max_length} leaves {room}; expected at least {shortest}")
    texts = [texts_of(table, column) for column in columns]
    lengths = [_lengths(table, column, tokenizer) for column in columns]
    cut = {"truncation": "longest_first", "max_length": max_length, "return_attention_mask": False}
    found = tokenizer(*texts, **cut)
    kept = [key for key in ("input_ids", "token_type_ids") if found.get(key)]
    rows = [dict(zip(kept, row, strict=True)) for row in zip(*(found[key] for key in kept), strict=True)]
    return rows, sum(sum(row) + special > max_length for row in zip(*lengths, strict=True))


def texts_of(table: Table, column: str) -> list[str]:
    """A column of texts.

    Raises:
        TanzakuError: a row (counted from 1) without text, or with something that is none.
    """
    values = table.column(column)
    if not values:
        raise TanzakuError(f"{table.source} has no rows; expected at least one")
    for row, value in enumerate(values, 1):
        where = f"{table.source} row {row}: column {column!r}"
        if missing(value):
            raise TanzakuError(f"{where} has no text; fill it in or drop the row")
        if not isinstance(value, str):
            raise TanzakuError(f"{where} is {str(value)[:40]} ({type(value).__name__}), expected text")
        check_characters(value, where)
    return values


def check_places(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """A TanzakuError where a tokenizer does not say which characters each token stands for, which a task goes by."""
    if not tokenizer.is_fast:
        raise TanzakuError(
            f"the tokenizer {type(tokenizer).__name__} does not say where its tokens stand in a text, which task "
            f"{task} needs; expected a model with tokenizer.json"
        )


def check_characters(text: str, where: str) -> None:
    """A TanzakuError where a text holds what is no character."""
    if not text.isascii() and _SURROGATE.search(text):
        raise TanzakuError(f"{where} has half of a surrogate pair, no character; repair the text")


def check_columns(tables: Mapping[str, Table], columns: Mapping[str, str | None], texts: Iterable[str]) -> None:
    """Check that every table has the columns, and texts in those of the names `texts`.

    Raises:
        TanzakuError: what is wrong, and where.
    """
    named = {key: column for key, column in columns.items() if column is not None}
    for table in tables.values():
        for key, column in named.items():
            table.column(column, key)
    for table in tables.values():
        for key in texts:
            if key in named:
                texts_of(table, named[key])


def columns_in(about: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """`text` and `text_pair` of a file that begins its complaints with `where`."""
    text, pair = about.get("text"), about.get("text_pair")
    for key, value in (("text", text), ("text_pair", pair)):
        if not isinstance(value, str) and (key == "text" or value is not None):
            raise TanzakuError(f"{where}{key} is {short(value)}, expected a name; give {flag(key)}")
    return str(text), pair


def _lengths(table: Table, column: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each text before any cut, special ones not counted."""
    texts = table.column(column)
    plain = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    counts = [len(ids) for ids in plain["input_ids"]]
    if 0 in counts:
        row = counts.index(0)
        where = f"{table.source} row {row + 1}: column {column!r}"
        raise TanzakuError(f"{where} is {texts[row][:40]!r}, which gives no tokens; fix or drop the row")
    return counts


def padded(examples: Sequence[Example], pad_token_id: int, width: int = 0) -> dict[str, Tensor]:
    """B rows of examples padded on the right to their longest, or to `width` tokens if that is more.

    Returns:
        The rows' inputs and their `attention_mask`, each int64 [B, T]; `token_type_ids` if all rows have them.
    """
    import torch

    if not examples:
        raise TanzakuError("a batch has no rows; expected at least one")
    own = [row for example in examples for row in example.rows]
    lengths = [length for example in examples for length in example.lengths]
    width = max([width, *lengths])

    def filled(rows: Iterable[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)

    batch = {
        "input_ids": filled((row["input_ids"] for row in own), pad_token_id),
        "attention_mask": filled(([1] * length for length in lengths), 0),
    }
    if all("token_type_ids" in row for row in own):
        batch["token_type_ids"] = filled((row["token_type_ids"] for row in own), 0)
    return batch


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text that is written on, and which characters each stands for: none at the beginning, those of a special
    token that a tokenizer puts there. One at the end is left out: a text that is learnt has its own, and a prompt goes
    on."""
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, offsets, whose = list(found["input_ids"]), list(found["offset_mapping"]), found.sequence_ids()
    while special and text and ids and whose[len(ids) - 1] is None:
        ids.pop()
    return ids, [(0, 0) if whose[at] is None else offsets[at] for at in range(len(ids))]
