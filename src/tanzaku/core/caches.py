"""Caches whose first entries are virtual tokens.

Whoever counts a text by its cache, as generate() does when it goes on from an earlier turn, must not count virtual
tokens. Such a cache therefore gives the length of the text; the model itself is handed a :func:`whole` view of the same
layers, which gives their own. A model that reads the cache under another route, and would miscount, gets an error.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache

from tanzaku.errors import TanzakuError

# Names that models have for a cache, and for the outputs that hold one.
NAMES = ("past_key_values", "cache_params", "state")

_MARK = "_tanzaku_virtual"


@dataclass(frozen=True)
class Virtual:
    """What stands in a cache before the text: virtual tokens of each of the route's entries (none: the text cannot go
    on), the most of any, and how many columns of text were read together with them."""

    counts: tuple[int, ...]
    width: int
    read: int


def held(given: dict[str, Any]) -> tuple[str | None, Any]:
    """(name, cache) that a model is given, or (None, None)."""
    return next(((name, given[name]) for name in NAMES if given.get(name) is not None), (None, None))


def length(cache: Any) -> int | None:
    """Tokens that a cache holds, virtual ones too; 0 where nothing was read yet, None where it does not tell."""
    if not isinstance(cache, Cache):
        return None
    cache = whole(cache)
    try:
        return int(cache.get_seq_length())
    except ValueError:  # state spaces alone count nothing
        return None if cache.has_previous_state() else 0


def mark_of(cache: Any) -> Virtual | None:
    """What :func:`mark` noted at a cache."""
    return getattr(cache, "__dict__", {}).get(_MARK)


def mark(cache: Any, counts: Sequence[int], width: int, read: int) -> None:
    """Note at a cache that it begins with virtual tokens."""
    if isinstance(cache, Cache):
        mark = Virtual(tuple(counts), width, read)
        # At the object: its class stays what others compare it with. A partial can be copied and pickled with it.
        vars(cache).update({name: partial(_guarded, cache, name) for name in _UPDATES})
        vars(cache).update({_MARK: mark, "get_seq_length": partial(_text_length, cache)})


def whole(cache: Any) -> Any:
    """The same layers, their length counted with the virtual tokens."""
    if mark_of(cache) is None:
        return cache
    view = copy.copy(cache)
    for name in (_MARK, "get_seq_length", *_UPDATES):
        vars(view).pop(name, None)
    return view


def select(cache: Any, rows: Sequence[int]) -> None:
    """Leave only these rows in a cache, in this order, with what is noted of them.

    One with the most virtual tokens must be among them: the cache keeps so many columns.
    """
    cache.batch_select_indices(torch.tensor(rows))
    if (mark := mark_of(cache)) is not None and len(mark.counts) > 1:
        counts = tuple(mark.counts[row] for row in rows)
        vars(cache)[_MARK] = replace(mark, counts=counts if len(set(counts)) > 1 else counts[:1])


def note(cache: Any, name: str, values: Tensor) -> None:
    """Keep a number of each row, (rows,), with a cache: it follows its rows where these are reordered or repeated."""
    kept = vars(cache)
    kept[name] = values
    kept[_NOTED] = {*kept.get(_NOTED, ()), name}
    _follow(cache)


def noted(cache: Any, name: str) -> Tensor | None:
    """What :func:`note` kept."""
    return cast("Tensor | None", vars(cache).get(name))


_NOTED = "_tanzaku_noted"
_REORDERS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
_UPDATES = ("update", "update_conv_state", "update_recurrent_state")


def _text_length(cache: Any, layer_idx: int = 0) -> int:
    held = int(type(cache).get_seq_length(cache, layer_idx))
    return max(held - int(vars(cache)[_MARK].width), 0)


def _guarded(cache: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    if length(cache) == 0:  # it was emptied
        return getattr(whole(cache), name)(*args, **kwargs)
    raise TanzakuError(
        f"a cache that begins with {vars(cache)[_MARK].width} virtual tokens is read without them: go on under the "
        "route that it was begun under, or begin the text with a new cache"
    )


_BESIDE = "_tanzaku_beside"


def beside(cache: Any) -> Any:
    """A cache of the bare base for the text that a cache holds, whose rows and length follow it.

    Raises:
        TanzakuError: some of the text was read without it.
    """
    kept = getattr(cache, "__dict__", {})
    own = kept.get(_BESIDE)
    if own is not None and int(own.get_seq_length()) == int(cache.get_seq_length()):
        return own
    if own is not None or not isinstance(cache, Cache) or length(cache) != 0:
        raise TanzakuError(
            "an adapter runs the bare base before each pass, and the cache holds tokens that were read without it: "
            "begin the text with a new, empty cache under this route, or pass use_cache=False"
        )
    own = kept[_BESIDE] = copy.deepcopy(cache)
    _follow(cache)
    return own


def _follow(cache: Any) -> None:
    """What is done to a cache's rows is done to all that is kept with it."""
    for name in (*_REORDERS, "crop", "reset"):
        if hasattr(cache, name):
            vars(cache)[name] = partial(_followed, cache, name)


def _followed(cache: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    kept = vars(cache)
    if _BESIDE in kept:
        getattr(kept[_BESIDE], name)(*args, **kwargs)
    for each in kept.get(_NOTED, ()) if name in _REORDERS else ():
        values, (by,) = kept[each], (*args, *kwargs.values())
        if name == "batch_repeat_interleave":
            kept[each] = values.repeat_interleave(by)
        else:
            kept[each] = values[by.to(values.device) if isinstance(by, Tensor) else by]
    return getattr(type(cache), name)(cache, *args, **kwargs)
