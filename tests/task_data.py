"""Small classification tasks that can be learned, for tiny models."""

from __future__ import annotations

import torch

from models import VOCAB
from tanzaku.tasks.classification import Example, Labels, Split
from tanzaku.tasks.prepare import ClassificationData


def rows(number: int, lengths: tuple[int, ...], seed: int, end: int | None = None) -> Split:
    """Rows whose label hangs on their last token; `end` is put behind it, for models that pool there."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(number):
        ids = torch.randint(3, VOCAB, (lengths[row % len(lengths)],), generator=generator).tolist()
        examples.append(Example(ids + ([] if end is None else [end]), None, int(ids[-1] > VOCAB // 2)))
    return Split("rows", examples, [f"row {row} of {seed}" for row in range(number)], 0, "rows")


def task(
    lengths: tuple[int, ...] = (5, 9, 3, 7), *, train: int = 10, test: int = 0, end: int | None = None, pad: int = 0
) -> ClassificationData:
    """Two labels; 9 validation rows."""
    held_out = rows(test, lengths, 2, end) if test else None
    return ClassificationData(rows(train, lengths, 0, end), rows(9, lengths, 1, end), held_out, Labels(("a", "b")), pad)
