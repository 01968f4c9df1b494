"""Where tokens stand among their row's own, for adapter layers that act at the first or the last ones.

Padding, on either side, takes no place; nor do virtual tokens, of this adapter or of another that shares the batch; nor
does a cache start to count anew. A layer says that it `reads_places`, and asks :func:`places` for those of the tokens
that it has before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tanzaku.core.positions import parameters
from tanzaku.core.routing import running_route, take
from tanzaku.errors import TanzakuError
from tanzaku.support.context import Local


class _Given(NamedTuple):
    """What a stack of layers was given: a mask (rows, columns), tokens in its cache; and, for each stack of the route,
    virtual tokens. `unread`: what else tells where tokens stand, which is not read here."""

    mask: Tensor | None
    past: int
    virtual: tuple[int, ...]
    unread: str = ""


_given: Local[_Given] = Local("tanzaku_given")


def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], virtual: tuple[int, ...]) -> None:
    """Called where a pass enters a stack of layers, behind what puts virtual tokens there."""
    given = {**dict(zip(parameters(module), args, strict=False)), **kwargs}
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    past = cast(Any, cache).get_seq_length() if hasattr(cache, "get_seq_length") else 0
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    unread = "" if mask is None or plain else "a mask of another form than (rows, columns)"
    at = given.get("position_ids")
    if mask is None and isinstance(at, Tensor) and at.dim() == 2 and not torch.compiler.is_compiling():
        # Without a mask positions that start again are further texts in the same row.
        unread = "several texts in one row" if at.shape[1] > 1 and bool((at.diff(dim=1) < 0).any()) else ""
    _given.set(_Given(mask if plain else None, past, virtual, unread))


class Places(NamedTuple):
    """Of tokens (rows, tokens): their places among their row's own, from 0, negative where they are none; and how many
    their rows have (rows, 1). `first`: the pass begins the rows, and does not go on from a cache."""

    at: Tensor
    lengths: Tensor
    first: bool


def places(x: Tensor) -> Places:
    """Of the tokens that a layer has before it, (rows, tokens, features).

    Raises:
        TanzakuError: the tokens are not those that the model was given, as where windows of them are rows.
    """
    route, number, _ = running_route()
    given = _given.get() or _Given(None, 0, (0,) * len(route.stacks))
    if given.unread:
        raise TanzakuError(
            f"an adapter acts at places in a text, and found {given.unread}; expected a mask (rows, columns) and one "
            "text a row"
        )
    if x.dim() != 3:
        raise _refused(x, "(rows, tokens, features)")
    rows, tokens, virtual = x.shape[0], x.shape[1], given.virtual[number]
    if given.mask is None:
        at = (given.past - virtual + torch.arange(tokens, device=x.device)).expand(rows, -1)
        return Places(at, at[:, -1:] + 1, not given.past)
    own = take(given.mask, dict(route.groups(len(given.mask)))[number]) != 0
    if len(own) != rows or own.shape[1] < tokens:
        raise _refused(x, f"{len(own)} rows of up to {own.shape[1]} tokens")
    at = (own.cumsum(1) - 1 - virtual).where(own, -1)
    return Places(at[:, -tokens:], own.sum(1, keepdim=True) - virtual, not given.past)


def _refused(x: Tensor, expected: str) -> TanzakuError:
    return TanzakuError(
        f"an adapter acts at places in a text, and found {' x '.join(map(str, x.shape))} numbers, expected {expected}"
    )
