"""Small classification tasks that can be learned, for tiny models."""

from __future__ import annotations

import torch

from models import VOCAB
from tanzaku.tasks.classification import Example, Labels, Split
from tanzaku.tasks.prepare import ClassificationData


def rows(number: int, lengths: tuple[int, ...], seed: int) -> Split:
    """Rows whose label hangs on their last token."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(number):
        ids = torch.randint(3, VOCAB, (lengths[row % len(lengths)],), generator=generator).tolist()
        examples.append(Example(ids, None, int(ids[-1] > VOCAB // 2)))
    return Split("rows", examples, [""] * number, 0, "rows")


def task(lengths: tuple[int, ...] = (5, 9, 3, 7), *, train: int = 10, test: int = 0) -> ClassificationData:
    """Two labels; 9 validation rows."""
    held_out = rows(test, lengths, 2) if test else None
    return ClassificationData(rows(train, lengths, 0), rows(9, lengths, 1), held_out, Labels(("a", "b")), 0)
