"""Small classification tasks that can be learned, for tiny models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models import VOCAB
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.task import Batch, Example, Split, TaskData


def rows(number: int, lengths: tuple[int, ...], seed: int, end: int | None = None) -> Split:
    """Rows whose label depends on their last token; `end` is put behind it, for models that pool there."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(number):
        ids = torch.randint(3, VOCAB, (lengths[row % len(lengths)],), generator=generator).tolist()
        label = int(ids[-1] > VOCAB // 2)
        examples.append(Example({"input_ids": ids + ([] if end is None else [end])}, label))
    return Split("rows", examples, [""] * number, 0, "rows")


def task(
    lengths: tuple[int, ...] = (5, 9, 3, 7), *, train: int = 10, test: int = 0, end: int | None = None, pad: int = 0
) -> TaskData:
    """Two labels; 9 validation rows."""
    held_out = rows(test, lengths, 2, end) if test else None
    two = Classification(("a", "b"))
    return TaskData(rows(train, lengths, 0, end), rows(9, lengths, 1, end), held_out, two, pad)


def labelled(labels: Sequence[int]) -> list[Example]:
    """Rows of one token, by their labels' ids."""
    return [Example({"input_ids": [5]}, label) for label in labels]


def as_transformers(batch: Batch) -> dict[str, Tensor]:
    """The inputs and labels of transformers' classifiers."""
    return {**batch.inputs, "labels": batch.targets["target"]}
