"""Where the tokens of a batch lie, for all that makes a pass cheap by leaving some of them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tanzaku.core.routing import Ragged

Places = Tensor | slice | None  # None: all there are


@dataclass
class Layout:
    """Where the tokens of a batch lie: each row has `width` places, of them `lengths` are its own from `starts` on.

    `lowest` is how deep each row's lowest adapter lies (:mod:`tanzaku.engine.order`); below it the row needs no
    gradient. Where a batch is `packed`, layers see the own tokens of all rows alone, one after another.
    """

    width: int
    starts: Sequence[int]
    lengths: Sequence[int]
    lowest: Sequence[int]
    device: torch.device
    packed: bool = False
    read: Sequence[int] | None = None  # of each row's own tokens, the one that a classifier pools; None: not known
    decoder: Layout | None = None  # of an encoder-decoder that reads other tokens there, of another width
    _found: dict[Any, Places] = field(default_factory=dict)
    _ragged: dict[tuple[int, ...], Ragged] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens) of hidden states."""
        return (sum(self.lengths), 1) if self.packed else (len(self.lengths), self.width)

    def of(self, shape: tuple[int, ...]) -> Layout | None:
        """The layout of hidden states with so many (rows, tokens): of the batch, or of its decoder."""
        return next((each for each in (self, self.decoder) if each is not None and each.shape == shape), None)

    @cached_property
    def rows(self) -> Ragged:
        """The own tokens, and the batch as it enters the model."""
        return Ragged.of(self.width, self.starts, self.lengths, self.device)

    def ragged(self, lengths: tuple[int, ...]) -> Ragged | None:
        """Tokens of rows that begin with their own first one and are as long as the longest; None: all are so long."""
        if min(lengths) == max(lengths):
            return None
        if lengths not in self._ragged:
            self._ragged[lengths] = Ragged.short(lengths, self.device)
        return self._ragged[lengths]

    def places(self, depth: int | None = None, last: bool = False) -> Places:
        """The own places in the flattened batch, of rows that need a gradient at `depth` (None: of all).

        Args:
            last: of each row the token alone that is read at the end; its last one, where that is not known.
        """
        key = (None if depth is None else max([low for low in self.lowest if low <= depth], default=-2), last)
        if key not in self._found:
            if self.packed:
                firsts = [end - length for end, length in zip(accumulate(self.lengths), self.lengths, strict=True)]
            else:
                firsts = [row * self.width + start for row, start in enumerate(self.starts)]
            spans = [range(first, first + length) for first, length in zip(firsts, self.lengths, strict=True)]
            if last:
                read = [-1] * len(spans) if self.read is None else self.read
                spans = [range(span[at], span[at] + 1) for span, at in zip(spans, read, strict=True)]
            kept = [span for span, low in zip(spans, self.lowest, strict=True) if depth is None or low <= depth]
            self._found[key] = self._short(kept)
        return self._found[key]

    def _short(self, spans: list[range]) -> Places:
        places = [place for span in spans for place in span]
        if len(places) == math.prod(self.shape):
            return None
        if places and places[-1] - places[0] + 1 == len(places):
            return slice(places[0], places[-1] + 1)
        return torch.tensor(places, dtype=torch.long, device=self.device)
