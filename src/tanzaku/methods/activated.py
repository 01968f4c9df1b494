"""Activated LoRA: an adapter that is in force from a sequence of tokens on, in every row.

    y_t = W x_t + (alpha / r) B A x_t  from where the last invocation begins, and W x_t before it

What stands before is the base's own, keys and values too. Where rows go on from a cache that holds an invocation, the
adapter stays in force, also before a further one.

Greenewald et al. 2025, arXiv 2504.12397.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tanzaku.core import caches
from tanzaku.core.places import places
from tanzaku.core.routing import running_route
from tanzaku.core.shared import Shared
from tanzaku.errors import TanzakuError


class Invoked(NamedTuple):
    """How many tokens of each row of a pass the adapter is in force for, counted from the row's end, (rows,); 0 where
    its invocation was not seen. `own`: without padding behind them."""

    tokens: Tensor
    own: Tensor


class Invocation(Shared):
    """Finds where the adapter begins in each row, once a pass. A cache notes which of its rows have it already.

    Args:
        tokens: ids of the invocation.
    """

    place = "invocation"

    def __init__(self, tokens: Sequence[int]):
        super().__init__()
        self.tokens = tuple(tokens)
        self._note = f"_tanzaku_invoked_{uuid.uuid4().hex}"

    def _versions(self) -> tuple[int, ...]:
        return ()  # there is no parameter that it could be older than

    def compute(self) -> Invoked:
        raise TanzakuError(
            "an adapter with alora_invocation_tokens finds them among the ids of a pass's tokens, and was given none"
        )

    @torch.no_grad()
    def compute_of(self, given: Mapping[str, Any]) -> Invoked:
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor):
            return self.compute()
        rows, length = ids.shape
        start = self._last(ids)
        _, cache = caches.held(dict(given))
        if cache is not None:
            virtual = caches.mark_of(cache)
            held = (caches.length(cache) or 0) - (0 if virtual is None else virtual.width)
            # Where each row's invocation begins among all of its tokens; what was cut off a cache does not count.
            begins = torch.where(start < length, start + held, _NEVER)
            if held:
                before = self._before(cache, rows)
                begins = torch.where((begins == _NEVER) & (before < held), before, begins)
                start = torch.where(before < held, 0, start)
            caches.note(cache, self._note, begins)
        tokens = length - start
        mask = given.get("attention_mask")
        ends = torch.full_like(start, length)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            ends = (mask.bool() * torch.arange(1, length + 1, device=ids.device)).amax(1)
        return Invoked(tokens, (ends - start).clamp(min=0))

    def _last(self, ids: Tensor) -> Tensor:
        """Where the last invocation begins in each row; the row's length where there is none."""
        rows, length = ids.shape
        none = torch.full((rows,), length, device=ids.device)
        if length < len(self.tokens):
            return none
        wanted = torch.tensor(self.tokens, device=ids.device)
        found = (ids.unfold(1, len(self.tokens), 1) == wanted).all(-1)
        last = (found * torch.arange(1, found.shape[1] + 1, device=ids.device)).amax(1)
        return torch.where(last > 0, last - 1, none)

    def _before(self, cache: Any, rows: int) -> Tensor:
        """Where each row's invocation begins among what the cache holds."""
        noted = caches.noted(cache, self._note)
        if noted is None or rows % len(noted):
            raise TanzakuError(
                "a cache does not tell where an adapter with alora_invocation_tokens was invoked: give it to the first "
                "pass already, under the same route (past_key_values=DynamicCache())"
            )
        return noted.repeat_interleave(rows // len(noted))  # beams of one text


_NEVER = 2**62  # where an invocation begins that there is none of


def in_force(invoked: Invoked, y: Tensor) -> Tensor:
    """(rows, tokens, 1) of what a layer has before it, (rows, tokens, features): whether the adapter is in force there.
    Tokens that are rows of their own are (tokens, 1, 1).

    Raises:
        TanzakuError: the module does not have the batch's rows before it.
    """
    route, number, has_rows = running_route()
    total = len(invoked.tokens)
    single = route.single_tokens(number, total, len(y))
    rows = route.rows_of(number, total, len(y))
    if not has_rows or (single is None and len({*rows}) < len(rows)):
        raise TanzakuError(
            "an adapter with alora_invocation_tokens is in force for parts of rows, and a module does not have the "
            "batch's rows in its first dimension, as experts have not; expected target_modules outside of it"
        )
    device, length = invoked.tokens.device, 1 if single is not None or y.dim() == 2 else y.shape[1]
    own = invoked.own[torch.tensor(rows, device=device)]
    if single is not None:
        back = torch.tensor([at for count in single for at in range(count, 0, -1)], device=device)
        found = back[:, None] <= own[:, None]
    else:
        if length == 1:  # the last token of a row, be it that which is new, or that which is pooled
            found = own[:, None] > 0
        else:
            at, lengths, _ = places(y)
            found = (at >= 0) & (at >= lengths - own[:, None])
    return found if y.dim() == 2 else found[..., None]
