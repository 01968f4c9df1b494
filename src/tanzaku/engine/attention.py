"""Attention of a few short rows, each over its own tokens alone.

torch's kernels for CPUs work in blocks made for long texts, and on a batch in which every row is as long as the
longest. A row of a few dozen tokens is three small products: here each row of a ragged batch has them at its own
length, forward and backward, and query heads that share keys are one product. It is up to twice as fast where rows are
longer than a block, and what a row gets cannot depend on its neighbours.

What is kept for the backward pass grows with the square of a row's length, as it does not in torch's kernels: rows of
more keys than a head has features are left to them, whose scores would take more memory than their queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self, cast

import torch
from torch import Tensor

from tanzaku.core.routing import split
from tanzaku.engine.acceleration import Acceleration
from tanzaku.models import tree
from tanzaku.support.autograd import once_differentiable


class RowAttention(Acceleration):
    """In packed batches, rows are attended as :func:`row_attention` does it where that suits (`packing.py`)."""

    name = "row_attention"
    summary = "short rows of a packed batch are attended one by one, each over its own tokens"

    @property
    def possible(self) -> bool:
        return all(parameter.device.type == "cpu" for parameter in tree.parameters(self.base.model))

    def __enter__(self) -> Self:
        self.common.attends_rows = True
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.common.attends_rows = False


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Sequence[int],
    keys: Sequence[int],
    masks: Sequence[Tensor],
    scaling: float,
) -> Tensor:
    """softmax(scaling q k^T + mask) v of each row.

    Args:
        query: (sum of `queries`, heads, head_dim), the rows one after another.
        key, value: (sum of `keys`, kv_heads, head_dim).
        masks: of each row, (keys, queries * heads / kv_heads), in fp32, added to the scores: heads that share keys lie
            together.

    Returns:
        As `query`.
    """
    # Half precision has matrix units for far larger products than these: here it would gain nothing, and round scores.
    with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
        parts = (x.float() for x in (query, key, value))
        out = _Rows.apply(*parts, (*queries,), (*keys,), masks, scaling)  # type: ignore[no-untyped-call]
    return cast(Tensor, out.to(query.dtype))


def suits(implementation: str, keys: int, like: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether :func:`row_attention` is what the attention function of this name computes, and the better way.

    Args:
        keys: of the longest row. like: the queries, (..., head_dim). options: what the layer gives the function.
    """
    plain = not options.get("dropout") and options.get("is_causal") in (None, True)
    plain = plain and all(options.get(name) is None for name in ("position_bias", "cache", "softcap"))
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    known = like.device.type == "cpu" and like.dtype in (torch.float32, torch.bfloat16) and kind != torch.float16
    return implementation == "sdpa" and plain and keys <= like.shape[-1] and known


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: tuple[int, ...],
        keys: tuple[int, ...],
        masks: Sequence[Tensor],
        scaling: float,
    ) -> Tensor:
        out = query.new_empty(query.shape)
        heads = key.shape[1]
        kept: list[Tensor] = []
        for q, k, v, mask, o in zip(
            split(query, queries),
            split(key, keys),
            split(value, keys),
            masks,
            split(out, queries),
            strict=True,
        ):
            q, k, v = _by_head(q, heads), _by_head(k, heads), _by_head(v, heads)
            # (keys, queries): there are more queries than keys, and the longer side lies along memory.
            scores = (torch.addmm if heads == 1 else torch.baddbmm)(mask, k, q.mT, alpha=scaling)
            weights = torch.softmax(scores, dim=-2)
            _multiply(weights.mT, v, o, heads)
            kept += (q, k, v, weights)
        ctx.save_for_backward(*kept)
        ctx.sizes, ctx.scaling, ctx.shapes = (queries, keys), scaling, (query.shape, key.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        kept = iter(ctx.saved_tensors)
        gradient, (queries, keys), heads = gradients[0], ctx.sizes, ctx.shapes[1][1]
        to_query, to_key, to_value = (gradient.new_empty(ctx.shapes[i]) for i in (0, 1, 1))
        for g, dq, dk, dv in zip(
            split(gradient, queries),
            split(to_query, queries),
            split(to_key, keys),
            split(to_value, keys),
            strict=True,
        ):
            q, k, v, weights = next(kept), next(kept), next(kept), next(kept)
            g = _by_head(g, heads)
            _multiply(weights, g, dv, heads)
            scores = torch._softmax_backward_data(v @ g.mT, weights, -2, weights.dtype).mul_(ctx.scaling)
            _multiply(scores.mT, k, dq, heads)
            _multiply(scores, q, dk, heads)
        return to_query, to_key, to_value, None, None, None, None


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(tokens, heads * groups, head_dim) as (heads, tokens * groups, head_dim), without the first where it is 1."""
    tokens, _, size = x.shape
    if heads == 1:
        return x.reshape(-1, size)
    return x.reshape(tokens, heads, -1, size).transpose(0, 1).reshape(heads, -1, size)


def _multiply(a: Tensor, b: Tensor, out: Tensor, heads: int) -> None:
    """a b into `out`, which lies as the input of :func:`_by_head` does."""
    if heads == 1:
        torch.mm(a, b, out=out.view(-1, out.shape[-1]))
    else:
        product = torch.bmm(a, b)
        tokens, _, size = out.shape
        out.view(tokens, heads, -1, size).copy_(product.view(heads, tokens, -1, size).transpose(0, 1))
