"""Classification of texts: labels, encoded rows, batches and the loss."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.tasks.data import Table
from tanzaku.tasks.labels import NUMBER, label_name, missing, plain, spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one alone; no tokenizer takes it
_MEGA_BATCH = 50  # batches sorted by length together: little padding, yet much of the order stays random


@dataclass(frozen=True)
class Labels:
    """The classes; a class's id is its place in ``names``."""

    names: tuple[str, ...]

    @classmethod
    def from_column(cls, values: Iterable[Any], source: str = "the training data") -> Labels:
        """The distinct labels of the training rows: by value when all are numbers, else by text.

        The numbers 1 and 1.0 and the text "1" are one label. A TanzakuError names ``source`` and the row
        without a label, or the only class.
        """
        names = {label_name(value, f"{source} row {row}") for row, value in enumerate(values, 1)}
        if len(names) < 2:
            found = f"only the label {next(iter(names))!r}" if names else "no labels"
            raise TanzakuError(f"{source} has {found}; expected at least two classes to tell apart")
        numbers = all(NUMBER.fullmatch(name) for name in names)
        return cls(tuple(sorted(names, key=lambda name: (float(name) if numbers else 0.0, name))))

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, value: Any, where: str) -> int:
        """The id of a label; ``where`` is its place, as in ``valid.tsv row 7``, for the TanzakuError."""
        name = label_name(value, where)
        if name not in self.names:
            same = next((each for each in self.names if spelling(each) == spelling(name)), None)
            fix = nearest(name, self.names) if same is None else f"; write it {same!r}, as in training"
            known = " ".join(listed(self.names).split())
            raise TanzakuError(f"label {name!r} in {where} is not among the training labels {known}{fix}")
        return self.names.index(name)

    def to_config(self) -> dict[str, Any]:
        """``id2label`` and ``label2id`` as a transformers config has them."""
        ids = dict(enumerate(self.names))
        return {"id2label": ids, "label2id": {name: index for index, name in ids.items()}}


@dataclass(frozen=True)
class Example:
    """One encoded row: token ids with special tokens, not padded; ``label`` is None when there is none."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    label: int | None


@dataclass(frozen=True)
class Split:
    """Encoded rows in file order, their texts, how many rows were cut, and the second texts of pairs."""

    name: str
    examples: list[Example]
    texts: list[str]
    truncated: int
    source: str
    seconds: list[str] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def keys(self) -> list[tuple[str, ...]]:
        """By row, what makes two rows one: their texts but for case, width and white space."""
        columns = [self.texts] if self.seconds is None else [self.texts, self.seconds]
        return [tuple(map(plain, row)) for row in zip(*columns, strict=True)]


def encode_split(
    table: Table,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    text_pair: str | None,
    label: str | None,
    labels: Labels | None,
    max_length: int,
) -> Split:
    """Tokenise the rows of a table.

    Args:
        name: what the split is called, such as ``valid``.
        text, text_pair, label: column names; without ``label`` the rows have none, to be predicted.
        labels: the classes, as the training rows define them; needed with ``label``.
        max_length: rows are cut to this many tokens, special ones included, a pair from its longer text.

    Raises:
        TanzakuError: a column or label that is not there, or a row (counted from 1) without text or tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=text_pair is not None)
    shortest = special + (1 if text_pair is None else 2)
    if max_length < shortest:
        room = f"no room for text beside {special} special tokens"
        raise TanzakuError(f"max_length {max_length} leaves {room}; expected at least {shortest}")
    columns = [text] if text_pair is None else [text, text_pair]
    texts = [texts_of(table, column) for column in columns]
    lengths = [_lengths(table, column, tokenizer) for column in columns]
    cut = {"truncation": "longest_first", "max_length": max_length, "return_attention_mask": False}
    encoded = tokenizer(*texts, **cut)
    types = encoded.get("token_type_ids") or [None] * len(table)
    ids = [None] * len(table) if label is None else _label_ids(table, label, labels)
    return Split(
        name=name,
        examples=[Example(*row) for row in zip(encoded["input_ids"], types, ids, strict=True)],
        texts=texts[0],
        truncated=sum(sum(row) + special > max_length for row in zip(*lengths, strict=True)),
        source=table.source,
        seconds=None if text_pair is None else texts[1],
    )


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
        if _SURROGATE.search(value):
            raise TanzakuError(f"{where} has half of a surrogate pair, no character; repair the text")
    return values


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


def _label_ids(table: Table, label: str, labels: Labels | None) -> list[int]:
    if labels is None:
        raise TanzakuError(f"column {label!r} of {table.source} needs the training labels; give labels too")
    values = enumerate(table.column(label), 1)
    return [labels.encode(value, f"{table.source} row {row}") for row, value in values]


def collate(examples: Sequence[Example], pad_token_id: int, labels: bool = True) -> dict[str, Tensor]:
    """Pad B rows on the right to their longest length T.

    Returns:
        ``input_ids`` and ``attention_mask`` [B, T], ``token_type_ids`` [B, T] if the rows have them, and
        ``labels`` [B] if asked for; all int64.
    """
    if not examples:
        raise TanzakuError("a batch has no rows; expected at least one")
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)

    batch = {
        "input_ids": padded((example.input_ids for example in examples), pad_token_id),
        "attention_mask": padded(([1] * len(example.input_ids) for example in examples), 0),
    }
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    if len(types) == len(examples):
        batch["token_type_ids"] = padded(types, 0)
    if labels:
        ids = [example.label for example in examples if example.label is not None]
        if len(ids) < len(examples):
            raise TanzakuError(f"{len(examples) - len(ids)} of {len(examples)} rows have no label to batch")
        batch["labels"] = torch.tensor(ids, dtype=torch.int64)
    return batch


def epoch_batches(
    lengths: Sequence[int],
    batch_size: int,
    *,
    shuffle: bool,
    group_by_length: bool,
    generator: torch.Generator,
) -> list[list[int]]:
    """Row numbers of each batch of one epoch; every row once, and only one batch may be short.

    Shuffled rows come as ``torch.randperm(n, generator=generator)`` gives them, which is the order of torch's
    RandomSampler in the first epoch from that generator state. ``group_by_length`` then sorts within runs of
    50 batches, longest first, and draws a new order of the batches (not without ``shuffle``).
    """
    if batch_size < 1:
        raise TanzakuError(f"batch_size is {batch_size}, expected at least 1")
    n = len(lengths)
    order = torch.randperm(n, generator=generator).tolist() if shuffle else list(range(n))
    if group_by_length:
        mega = _MEGA_BATCH * batch_size
        runs = [sorted(order[i : i + mega], key=lambda row: -lengths[row]) for i in range(0, n, mega)]
        order = [row for run in runs for row in run]
    batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    if group_by_length and shuffle:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def class_weights(labels: Sequence[int], num_labels: int) -> Tensor:
    """Inverse class frequency n / (k * count), float32 [k]; a class without rows is a TanzakuError."""
    if strange := set(labels) - set(range(num_labels)):
        raise TanzakuError(f"label id {min(strange)} is outside 0 to {num_labels - 1}")
    counts = Counter(labels)
    if empty := [str(label) for label in range(num_labels) if not counts[label]]:
        raise TanzakuError(f"class {listed(empty)} has no rows to weigh; add some or turn weights off")
    return torch.tensor([len(labels) / (num_labels * counts[label]) for label in range(num_labels)])


def classification_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy, in float32, of logits [B, C] and labels [B]; with weights [C], torch's mean."""
    return cross_entropy(logits.float(), labels, weight=weights)
