"""Rows to adapters: which stack of adapters each row of a batch goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        expanded = torch.tensor(self.index).repeat_interleave(rows // len(self.index))
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


def put(base: Tensor, parts: list[tuple[Rows, Tensor]]) -> Tensor:
    """`base` with each group's rows replaced by its part."""
    if not parts:
        return base
    if parts[0][0] is None:
        return parts[0][1]
    if all(isinstance(rows, slice) for rows, _ in parts):
        pieces, at = [], 0
        for rows, part in sorted(parts, key=lambda item: item[0].start):  # type: ignore[union-attr]
            assert isinstance(rows, slice)
            if rows.start > at:
                pieces.append(base[at : rows.start])
            pieces.append(part.to(base.dtype))
            at = rows.stop
        if at < base.shape[0]:
            pieces.append(base[at:])
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    for rows, part in parts:
        where = torch.arange(base.shape[0])[rows] if isinstance(rows, slice) else rows
        assert where is not None
        base = base.index_copy(0, where.to(base.device), part.to(base.dtype))
    return base
