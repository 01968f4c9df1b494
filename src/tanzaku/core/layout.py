"""Where the tokens of each row stand once virtual tokens are among them.

A row of `length` columns becomes one of `width + length`, `width` being the most virtual tokens of any row. Virtual
tokens always stand directly before a row's first token: what counts distances (windows, convolutions, state spaces,
relative positions) sees them where it sees them in that row alone. What is left over is padding, and masked:

    [virtual tokens][text][the row's padding][fillers]    in front: the model's own numbering of columns fits
    [the row's padding][fillers][virtual tokens][text]    at the end: what a cache goes on from is the last column

In front a row without virtual tokens stays as it is, with fillers behind it. Nothing here is read off a tensor: it
runs under fake tensors and torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The order of tokens in rows with virtual ones.

    `real` (rows, width) tells which slots hold a virtual token, aligned to the right: the others are fillers. `order`
    (rows, width + length) has for each new column its source, a slot or behind them a column of the row; `back` (rows,
    length) the new column of each old one. Both are None where all slots simply come first.
    """

    width: int
    length: int
    real: Tensor
    order: Tensor | None
    back: Tensor | None

    @property
    def columns(self) -> int:
        """Of the new rows."""
        return self.length + self.width if self.order is None else self.order.shape[1]

    def join(self, slots: Tensor, own: Tensor) -> Tensor:
        """(rows, width, ...) and (rows, length, ...) as (rows, columns, ...)."""
        x = torch.cat([slots.to(own.dtype), own], dim=1)
        return x if self.order is None else take(x, self.order)

    def replace(self, slots: Tensor, x: Tensor) -> Tensor:
        """`x` (rows, columns or more, ...) with the slots (rows, width, ...) at their places."""
        if self.order is None:
            return torch.cat([slots, x[:, self.width :]], dim=1)
        of_slots, behind = self.of_slots, x[:, self.columns :]
        put = take(slots, self.order.clamp(max=self.width - 1))
        new = torch.where(of_slots.view(*of_slots.shape, *[1] * (x.dim() - 2)), put, x[:, : self.columns])
        return torch.cat([new, behind], dim=1) if behind.shape[1] else new

    @property
    def of_slots(self) -> Tensor:
        """(rows, columns): whether a column is a slot."""
        if self.order is None:
            rows = self.real.shape[0]
            return (torch.arange(self.columns, device=self.real.device) < self.width).expand(rows, -1)
        return self.order < self.width

    def cut(self, x: Tensor, dim: int = 1, rows: int = 0) -> Tensor:
        """A row's own columns, in their old order, of a tensor whose dimension `dim` counts columns (or some more)."""
        if self.back is None:
            return x.narrow(dim, self.width, x.shape[dim] - self.width)
        extra = x.shape[dim] - self.columns
        back = self.back
        if extra:
            behind = torch.arange(self.columns, x.shape[dim], device=back.device).expand(back.shape[0], -1)
            back = torch.cat([back, behind], dim=1)
        return take(x, back, dim, rows)


def in_front(counts: Sequence[int], mask: Tensor | None, length: int, device: torch.device) -> Layout:
    """Rows that begin with their virtual tokens, `counts` of them each; `mask` (rows, length) shows the padding."""
    width, count, real = _slots(counts, device)
    if mask is None and len(set(counts)) == 1:
        return Layout(width, length, real, None, None)
    left = leading(mask) * (count > 0) if mask is not None else 0
    new, old = (torch.arange(n, device=device)[None] for n in (width + length, length))
    own = width + (left + new - count) % length
    order = torch.where(new < count, new + width - count, torch.where(new < count + length, own, new - count - length))
    return Layout(width, length, real, order, count + (old - left) % length)


def at_the_end(counts: Sequence[int], mask: Tensor | None, length: int, device: torch.device, most: int = 0) -> Layout:
    """Rows whose text ends in the last column, after its padding on the left.

    Args:
        most: padding is at most so long, where the mask shows more columns than stood here when virtual tokens came in.
    """
    width, _, real = _slots(counts, device)
    if mask is None:
        return Layout(width, length, real, None, None)
    left = leading(mask).clamp(max=most or length)
    new, old = (torch.arange(n, device=device)[None] for n in (width + length, length))
    order = torch.where(new < left, new + width, torch.where(new < left + width, new - left, new))
    return Layout(width, length, real, order, old + width * (old >= left))


def packed(counts: Sequence[int], positions: Tensor) -> tuple[Layout, Tensor] | None:
    """The layout of rows with several texts, and their positions: each text gets its row's virtual tokens.

    Args:
        positions: (rows, length). A text begins where a position is not one more than the position before, which is how
            transformers tells packed texts apart. They are read, which neither fake tensors nor compiling allows.

    Returns:
        None where each row is one text.
    """
    if bool((positions.diff(dim=1) == 1).all()):
        return None
    width, _, real = _slots(counts, positions.device)
    orders: list[list[int]] = []
    numbers: list[list[int]] = []
    backs: list[list[int]] = []
    for count, row in zip(counts, positions.tolist(), strict=True):
        order: list[int] = []
        number: list[int] = []
        back: list[int] = []
        for column, at in enumerate(row):
            if column == 0 or at != row[column - 1] + 1:
                order += range(width - count, width)
                number += range(at, at + count)
            back.append(len(order))
            order.append(width + column)
            number.append(at + count)
        orders, numbers, backs = [*orders, order], [*numbers, number], [*backs, back]
    longest = max(map(len, orders))
    for order, number in zip(orders, numbers, strict=True):
        # No mask hides what fills a row up: it is a text of its own, which the others do not see.
        fill = longest - len(order)
        order += [width] * fill
        number += range(fill)
    places, returns, given = (torch.tensor(x, device=positions.device) for x in (orders, backs, numbers))
    return Layout(width, positions.shape[1], real, places, returns), given.to(positions)


def leading(mask: Tensor) -> Tensor:
    """(rows, 1): padding before a row's first token."""
    return ((mask != 0).cumsum(1) == 0).sum(1, keepdim=True)


def take(x: Tensor, columns: Tensor, dim: int = 1, rows: int = 0) -> Tensor:
    """Other columns in each row: `columns` (rows, n) along `dim` of a tensor whose dimension `rows` counts rows."""
    shape = [1] * x.dim()
    shape[rows], shape[dim] = columns.shape
    return torch.take_along_dim(x, columns.view(shape), dim)


def _slots(counts: Sequence[int], device: torch.device) -> tuple[int, Tensor, Tensor]:
    count = torch.tensor(counts, device=device)[:, None]
    width = max(counts)
    return width, count, torch.arange(width, device=device)[None] >= width - count
