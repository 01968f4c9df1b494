"""Activated LoRA: an adapter that is in force from a sequence of tokens on, in every row.

    y_t = W x_t + (alpha / r) B A x_t  from where the last invocation begins, and W x_t before it

What stands before is the base's own, keys and values too, so that a cache of it serves every such adapter.

Greenewald et al. 2025, arXiv 2504.12397.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tanzaku.core import caches
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
            invoked = start < length
            if (caches.length(cache) or 0) > 0:
                before = self._before(cache, rows)
                invoked = invoked | before
                start = start.masked_fill(before, 0)
            vars(cache)[self._note] = invoked
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
        """Whether each row's invocation is among what the cache holds."""
        noted = vars(cache).get(self._note)
        if noted is None or rows % len(noted):
            raise TanzakuError(
                "a cache does not tell where an adapter with alora_invocation_tokens was invoked: give it to the first "
                "pass already, under the same route (past_key_values=DynamicCache())"
            )
        return torch.as_tensor(noted).repeat_interleave(rows // len(noted))  # beams of one text


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
    own = (invoked.tokens if single is None else invoked.own)[torch.tensor(rows, device=device)]
    if single is not None:
        back = torch.tensor([at for count in single for at in range(count, 0, -1)], device=device)
        found = back[:, None] <= own[:, None]
    else:
        found = torch.arange(length, 0, -1, device=device)[None] <= own[:, None]
    return found if y.dim() == 2 else found[..., None]
