"""Attention row by row: torch's own numbers, and nothing of a neighbour's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from close import GRADIENT, assert_close
from tanzaku.engine.attention import row_attention, suits


def one_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(queries, heads, size) by torch's kernel."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask[None, None], scale=scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


ROWS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3)]), st.integers(0, 10**6))
def test_it_is_torchs_attention_of_each_row(rows: list[tuple[int, int]], heads: tuple[int, int], seed: int) -> None:
    """With keys before the queries' own, as a prefix has, and any mask that leaves each query something."""
    generator = torch.Generator().manual_seed(seed)
    kv, groups = heads
    queries, keys = [n for n, _ in rows], [n + before for n, before in rows]
    q = torch.randn(sum(queries), kv * groups, 5, generator=generator, requires_grad=True)
    k, v = (torch.randn(sum(keys), kv, 5, generator=generator, requires_grad=True) for _ in range(2))
    masks = []
    for n, before in rows:
        mask = torch.randn(n, n + before, generator=generator)
        masks.append(mask.masked_fill(mask > 1, -torch.inf))
        masks[-1][:, 0] = 0.0
    found = row_attention(q, k, v, queries, keys, [mask.t().repeat_interleave(groups, dim=1) for mask in masks], 0.3)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), masks, strict=True)
    expected = torch.cat([one_row(*part, 0.3) for part in parts])
    assert_close(found, expected)
    gradient = torch.randn(found.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), gradient),
        torch.autograd.grad(expected, (q, k, v), gradient),
        strict=True,
    ):
        # Of one key the scores have no gradient, but for the rounding of what is multiplied.
        assert_close(a, b, GRADIENT, scale=float(gradient.abs().max()))


def test_a_broken_row_breaks_no_other() -> None:
    q, k, v = (torch.randn(7, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    masks = [torch.zeros(3, 2 * 3), torch.zeros(4, 2 * 4)]
    alone = row_attention(q[:3], k[:3], v[:3], [3], [3], masks[:1], 0.5)
    expected = torch.autograd.grad(alone.sum(), (q, k, v))
    with torch.no_grad():
        q[5], v[6] = torch.nan, torch.inf
    together = row_attention(q, k, v, [3, 4], [3, 4], masks, 0.5)
    assert_close(together[:3], alone)  # how a product rounds depends on where in memory it lies
    assert not together[3:].isfinite().all()
    for a, b in zip(torch.autograd.grad(together[:3].sum(), (q, k, v)), expected, strict=True):
        assert_close(a[:3], b[:3])


@pytest.mark.parametrize(
    ("suited", "changes"),
    [
        (True, {}),
        (True, {"options": {"dropout": 0.0, "sliding_window": 4, "is_causal": True, "scaling": 0.1}}),
        (False, {"keys": 9}),
        (False, {"implementation": "eager"}),
        (True, {"like": torch.zeros(1, 8, dtype=torch.bfloat16)}),
        (False, {"like": torch.zeros(1, 8, dtype=torch.float16)}),
        (False, {"options": {"dropout": 0.1}}),
        (False, {"options": {"is_causal": False}}),
        (False, {"options": {"position_bias": torch.zeros(1)}}),
    ],
)
def test_what_torchs_kernels_are_left(suited: bool, changes: dict[str, object]) -> None:
    given = {"implementation": "sdpa", "keys": 8, "like": torch.zeros(1, 8), "options": {}, **changes}
    assert suits(**given) is suited  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert suits(**given) is suited  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.float16):
        assert not suits(**given)  # type: ignore[arg-type]


def test_half_precision_rounds_no_more_than_torchs_kernel() -> None:
    """Scores stay in full precision, also where autocast would have products in half."""
    full = [torch.randn(12, heads, 16) for heads in (4, 2, 2)]
    half = [x.bfloat16().requires_grad_() for x in full]
    masks = [torch.full((size, size), -torch.inf).triu(1).t().repeat_interleave(2, 1) for size in (5, 7)]
    gradient = torch.randn(12, 4, 16).bfloat16()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return row_attention(q, k, v, [5, 7], [5, 7], masks, 0.5)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split([5, 7]) for x in (q, k, v)), strict=True)
        rows = [[x.transpose(0, 1)[None] for x in part] for part in parts]
        out = [F.scaled_dot_product_attention(*row, is_causal=True, scale=0.5, enable_gqa=True) for row in rows]
        return torch.cat([each[0].transpose(0, 1) for each in out])

    exact = [x.detach().float().requires_grad_() for x in half]
    expected = theirs(*exact)
    reference = [expected.detach(), *torch.autograd.grad(expected, exact, gradient.float())]
    errors: list[list[float]] = []
    for function in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*half)
        assert out.dtype == torch.bfloat16
        found = [out.detach(), *torch.autograd.grad(out, half, gradient)]
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True)])
    for own, torchs in zip(*errors, strict=True):
        assert own <= 1.1 * torchs, errors
