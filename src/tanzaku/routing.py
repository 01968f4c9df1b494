"""Rows to adapters: which stack of adapters each row of a batch goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from tanzaku.errors import TanzakuError

Entry = str | tuple[str, ...] | None
Stack = tuple[str, ...]
Rows = slice | Tensor | None  # None: every row of the batch


@dataclass
class Route:
    """One stack of adapter names a row; `()` is the bare base. A route of one stack fits every batch."""

    stacks: list[Stack]
    index: list[int]
    at: int | None = field(default=None, compare=False)  # the stack whose strips run just now; None: the base
    keys: int | None = field(default=None, compare=False)  # of the attention that they change: its own, without theirs
    _groups: dict[int, list[tuple[int, Rows]]] = field(default_factory=dict)
    _unrolled: int | None = field(default=None, compare=False)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Route:
        """Normalise entries: a name, a tuple that stacks names in order, or None for the bare base."""
        if isinstance(entries, str) or not entries:
            raise TanzakuError(f"route: found {entries!r}, expected a list with one entry a row")
        stacks: list[Stack] = []
        index = []
        for entry in entries:
            stack = _stack(entry)
            if stack not in stacks:
                stacks.append(stack)
            index.append(stacks.index(stack))
        return cls(stacks, index)

    @classmethod
    def everywhere(cls, entry: Entry) -> Route:
        """All rows of any batch through one entry."""
        return cls.of([entry])

    @property
    def uniform(self) -> bool:
        return len(self.stacks) == 1

    @property
    def adapters(self) -> list[str]:
        """Names in the route, each once, in order of appearance."""
        return list(dict.fromkeys(name for stack in self.stacks for name in stack))

    def groups(self, rows: int) -> list[tuple[int, Rows]]:
        """(stack number, its rows) for a batch of `rows`, which must be a whole multiple of the route.

        A multiple expands the route, each entry repeated in place, as beams and `num_return_sequences` do.
        """
        if rows not in self._groups:
            self._groups[rows] = self._split(rows)
        return self._groups[rows]

    def _split(self, rows: int) -> list[tuple[int, Rows]]:
        if self.uniform:
            return [(0, None)]
        if rows % len(self.index):
            raise TanzakuError(
                f"route has {len(self.index)} entries and the batch {rows} rows; "
                "expected as many rows as entries, or a whole multiple"
            )
        return self._groups_of(torch.tensor(self.index).repeat_interleave(rows // len(self.index)))

    def unroll(self, tokens: Sequence[int]) -> None:
        """Until the next call, a batch of sum(`tokens`) rows is one of single tokens: so many of each row, in order."""
        if self.uniform:
            return
        if self._unrolled is not None:
            self._groups.pop(self._unrolled, None)
        self._unrolled = sum(tokens)
        of_entries = torch.tensor(tokens).view(len(self.index), -1).sum(1)  # an entry may stand for several rows
        self._groups[self._unrolled] = self._groups_of(torch.tensor(self.index).repeat_interleave(of_entries))

    def _groups_of(self, expanded: Tensor) -> list[tuple[int, Rows]]:
        groups: list[tuple[int, Rows]] = []
        for number in range(len(self.stacks)):
            at = (expanded == number).nonzero().flatten()
            first, last = int(at[0]), int(at[-1]) + 1
            # A contiguous group is a view; only scattered rows need a gather.
            groups.append((number, slice(first, last) if last - first == len(at) else at))
        return groups


def _stack(entry: Entry) -> Stack:
    stack = () if entry is None else (entry,) if isinstance(entry, str) else entry
    if not isinstance(stack, tuple | list) or not all(isinstance(name, str) for name in stack):
        raise TanzakuError(f"route: found the entry {entry!r}, expected a name, a tuple of names or None")
    return tuple(stack)


def take(x: Tensor, rows: Rows) -> Tensor:
    """The rows of a group: the tensor itself, a view, or a gathered copy."""
    if rows is None:
        return x
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows.to(x.device))


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """So many rows of each, one after another."""
    return torch.split(x, list(sizes))


class Cut:
    """A tensor cut at the rows of several groups, to be put together again with other rows in their place.

    Where the groups are slices it is one split and one concatenation, whose backward passes are one concatenation and
    one split: views would each write a gradient of the whole tensor, most of it zeros.
    """

    def __init__(self, x: Tensor, groups: Sequence[Rows]):
        self.x, self.groups = x, groups
        self._places: list[int] = []  # of the groups among the pieces
        if not all(isinstance(rows, slice) for rows in groups):
            self.parts = [take(x, rows) for rows in groups]
            return
        spans = cast(list[slice], groups)
        sizes: list[int] = []
        places, at = {}, 0
        for i in sorted(range(len(spans)), key=lambda i: spans[i].start):
            if spans[i].start > at:
                sizes.append(spans[i].start - at)
            places[i] = len(sizes)
            sizes.append(spans[i].stop - spans[i].start)
            at = spans[i].stop
        if at < x.shape[0]:
            sizes.append(x.shape[0] - at)
        self._pieces = split(x, sizes) if len(sizes) > 1 else (x,)
        self._places = [places[i] for i in range(len(spans))]
        self.parts = [self._pieces[place] for place in self._places]

    def put(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor with each group's rows replaced by its part."""
        parts = [part.to(self.x.dtype) for part in parts]
        if not parts:
            return self.x
        if self._places:
            pieces = list(self._pieces)
            for place, part in zip(self._places, parts, strict=True):
                pieces[place] = part
            return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if self.groups[0] is None:
            return parts[0]
        out = self.x
        for rows, part in zip(self.groups, parts, strict=True):
            where = torch.arange(out.shape[0])[rows] if isinstance(rows, slice) else rows
            assert where is not None
            out = out.index_copy(0, where.to(out.device), part)
        return out


def put(base: Tensor, parts: list[tuple[Rows, Tensor]]) -> Tensor:
    """`base` with each group's rows replaced by its part."""
    return Cut(base, [rows for rows, _ in parts]).put([part for _, part in parts])


@dataclass(frozen=True)
class Ragged:
    """Rows of unlike length, as tokens one after another and as a padded batch: (tokens, ...) and (rows * width, ...).

    `places` (tokens,) are those of the tokens in the batch; `sources` (rows * width,) the tokens that stand at its
    places, a row's own at padded places too.
    """

    places: Tensor
    sources: Tensor

    @classmethod
    def of(cls, width: int, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Ragged:
        """Rows of `width` places, of which `lengths` hold tokens from `starts` on."""
        places: list[int] = []
        sources: list[int] = []
        token = 0
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            places += range(row * width + start, row * width + start + length)
            own = range(token, token + length)
            sources += [own[0]] * start + [*own] + [own[-1]] * (width - start - length)
            token += length
        return cls(torch.tensor(places, device=device), torch.tensor(sources, device=device))

    @classmethod
    def short(cls, lengths: Sequence[int], device: torch.device) -> Ragged:
        """Rows as long as the longest, that begin with their own first token."""
        return cls.of(max(lengths), [0] * len(lengths), lengths, device)

    def pad(self, x: Tensor) -> Tensor:
        """(tokens, ...) as (rows * width, ...)."""
        return cast(Tensor, _Pad.apply(x, self.places, self.sources))  # type: ignore[no-untyped-call]

    def pack(self, x: Tensor) -> Tensor:
        """(rows * width, ...) as (tokens, ...)."""
        return cast(Tensor, _Pack.apply(x, self.places))  # type: ignore[no-untyped-call]


# Indexing's own backward pass adds up what was taken twice, which takes far longer than to copy. Here each token is
# read at its own place alone: what stands at padded places is never packed again, and gets no gradient.


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, ctx.saved_tensors[0], gradient), None


def in_equal_shares(sizes: tuple[int, ...], together: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """What a function makes of tensors with equal shares of rows, for shares of `sizes`: the shorter ones are filled up
    for the while."""
    if min(sizes) == max(sizes):
        return together(*parts)
    ragged = _ragged(sizes, parts[0].device)
    return ragged.pack(together(*(ragged.pad(part) for part in parts)))


@lru_cache(maxsize=64)
def _ragged(sizes: tuple[int, ...], device: torch.device) -> Ragged:
    return Ragged.short(sizes, device)
