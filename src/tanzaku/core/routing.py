"""Rows to adapters: which stack of adapters each row of a batch goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from tanzaku.errors import TanzakuError
from tanzaku.support.context import Local

Entry = str | tuple[str, ...] | None
Stack = tuple[str, ...]
Rows = slice | tuple[int, ...] | None  # None: every row of the batch


@dataclass
class Route:
    """One stack of adapter names a row; `()` is the bare base. A route of one stack fits every batch."""

    stacks: list[Stack]
    index: list[int]
    context: dict[str, Tensor] = field(default_factory=dict, compare=False)  # data of each row, (rows, ...), by name
    _groups: dict[int, list[tuple[int, Rows]]] = field(default_factory=dict, compare=False)
    _unrolled: int | None = field(default=None, compare=False)
    _tokens: tuple[int, ...] = field(default=(), compare=False)  # of each row, where they are rows themselves
    _part_of: tuple[Route, int] | None = field(default=None, compare=False)  # a route, and the number of its stack

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Route:
        """Normalise entries: a name, a tuple that stacks names in order, or None for the bare base."""
        if isinstance(entries, str):
            raise TanzakuError(f"route: found {entries!r}, expected a list with one entry a row, such as [{entries!r}]")
        if not entries:
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
    def at(self) -> int | None:
        """The stack whose adapter layers run just now; None: the base."""
        now = _running.get()
        return now[1] if now is not None and now[0] is self else None

    @property
    def keys(self) -> int | None:
        """Keys of the attention that the adapter layers which run change: its own, without theirs."""
        now = _running.get()
        return now[2] if now is not None and now[0] is self else None

    @property
    def base_runs(self) -> bool:
        """Whether it is the base that runs for one stack, and not its adapter layers."""
        now = _running.get()
        return now is not None and now[3]

    def running(self, number: int, keys: int | None = None, base: bool = False, has_rows: bool = True) -> Running:
        """A block in which the adapter layers of one stack run, or the base for its rows alone.

        Args:
            has_rows: whether the first dimension of what they read counts rows of the batch.
        """
        return Running(*((self, number) if self._part_of is None else self._part_of), keys, base, has_rows)

    def alone(self, number: int) -> Route:
        """The route of one stack, for a batch of its rows alone."""
        return Route([self.stacks[number]], [0], _part_of=(self, number))

    @property
    def has_context(self) -> bool:
        """Whether rows have data now, which a part of a route has with the whole."""
        return bool((self if self._part_of is None else self._part_of[0]).context)

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
        return self._groups_of([self._times(rows)] * len(self.index))

    def of_rows(self, values: Sequence[int], rows: int) -> list[int]:
        """Values of the stacks as those of a batch's rows."""
        if self.uniform:
            return [values[0]] * rows
        return [values[number] for number in self.index for _ in range(self._times(rows))]

    def _times(self, rows: int) -> int:
        if rows % len(self.index):
            raise TanzakuError(
                f"route has {len(self.index)} entries and the batch {rows} rows; "
                "expected as many rows as entries, or a whole multiple"
            )
        return rows // len(self.index)

    def unroll(self, tokens: Sequence[int]) -> None:
        """Until the next call, a batch of sum(`tokens`) rows is one of single tokens: so many of each row, in order.
        Without any, no batch is one."""
        self._tokens = tuple(tokens)
        if self._unrolled is not None:
            self._groups.pop(self._unrolled, None)
            self._unrolled = None
        if self.uniform or not tokens:
            return
        self._unrolled = sum(tokens)
        times = len(tokens) // len(self.index)  # an entry may stand for several rows
        self._groups[self._unrolled] = self._groups_of(
            [sum(tokens[at * times : (at + 1) * times]) for at in range(len(self.index))]
        )

    def unrolled(self, rows: int) -> bool:
        """Whether a batch of so many rows is one of single tokens."""
        return self._unrolled == rows

    def rows_of(self, number: int, rows: int, size: int) -> list[int]:
        """Which of a batch's `rows` each of the `size` rows is that a layer of this stack has before it: its own, maybe
        several times, as beams or as single tokens."""
        times = 0 if self.uniform else self._times(rows)
        own = [row for row in range(rows) if self.uniform or self.index[row // times] == number]
        tokens = self.single_tokens(number, rows, size)
        if tokens is None:
            if not own or size % len(own):
                raise TanzakuError(f"found {size} rows where {len(own)} have data; expected as many, or a multiple")
            tokens = [size // len(own)] * len(own)
        return [row for row, count in zip(own, tokens, strict=True) for _ in range(count)]

    def single_tokens(self, number: int, rows: int, size: int) -> list[int] | None:
        """Where the `size` rows that a layer of this stack has before it are single tokens: how many of each of its own
        of the batch's `rows`."""
        if len(self._tokens) != rows:
            return None
        times = 0 if self.uniform else self._times(rows)
        tokens = [self._tokens[row] for row in range(rows) if self.uniform or self.index[row // times] == number]
        return tokens if sum(tokens) == size else None

    def shares(self, counts: Sequence[int]) -> list[tuple[int, Rows]]:
        """(stack number, its parts) where each row of the batch has so many parts, one after another, maybe none."""
        if len(counts) % len(self.index):
            return self.groups(len(counts))  # which says what is wrong
        times = len(counts) // len(self.index)
        groups = self._groups_of([sum(counts[at * times : (at + 1) * times]) for at in range(len(self.index))])
        return [(n, at) for n, at in groups if at is None or (at if isinstance(at, tuple) else at.stop > at.start)]

    def _groups_of(self, counts: Sequence[int]) -> list[tuple[int, Rows]]:
        """Where each stack's rows are if each entry has so many. A list of numbers and no tensor: nothing here reads
        the batch, so that it can be traced."""
        spans: list[list[slice]] = [[] for _ in self.stacks]
        start = 0
        for number, count in zip(self.index, counts, strict=True):
            own, stop = spans[number], start + count
            if own and own[-1].stop == start:
                own[-1] = slice(own[-1].start, stop)
            else:
                own.append(slice(start, stop))
            start = stop
        # A contiguous group is a view; only scattered rows need a gather.
        return [
            (number, own[0] if len(own) == 1 else tuple(row for span in own for row in range(span.start, span.stop)))
            for number, own in enumerate(spans)
        ]


_Now = tuple[Route, int, int | None, bool, bool]
_running: Local[_Now] = Local("tanzaku_running")


def running_route() -> tuple[Route, int, bool]:
    """The route, the number of the stack whose layers run, and whether they have rows of the batch before them."""
    now = _running.get()
    if now is None:
        raise TypeError("no layer runs for rows of its own: one that reads their data has no batch_key")
    return now[0], now[1], now[4]


class Running:
    """Within the block, the layers of one stack run: dropout is theirs alone. A class, since it is entered often."""

    __slots__ = ("_before", "_now")

    def __init__(self, route: Route, number: int, keys: int | None, base: bool, has_rows: bool):
        self._now = (route, number, keys, base, has_rows)
        self._before: _Now | None = None

    def __enter__(self) -> None:
        self._before = _running.get()
        _running.set(self._now)

    def __exit__(self, *_: object) -> None:
        _running.set(self._before)


def _stack(entry: Entry) -> Stack:
    stack = () if entry is None else (entry,) if isinstance(entry, str) else entry
    if not isinstance(stack, tuple | list) or not all(isinstance(name, str) for name in stack):
        raise TanzakuError(f"route: found the entry {entry!r}, expected a name, a tuple of names or None")
    return tuple(stack)


def take(x: Tensor, rows: Rows) -> Tensor:
    """The rows of a group: the tensor itself, a view, or a gathered copy."""
    if rows is None:
        return x
    return x[rows] if isinstance(rows, slice) else x.index_select(0, torch.tensor(rows, device=x.device))


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
            assert rows is not None
            where = range(out.shape[0])[rows] if isinstance(rows, slice) else rows
            out = out.index_copy(0, torch.tensor(where, device=out.device), part)
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
