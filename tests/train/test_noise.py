"""Dropout by job: what a mask hangs on, and what it does not."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tanzaku as tz
from tanzaku import noise
from tanzaku.noise import Noise, Share
from tanzaku.routing import Route


def noises(*shares: Share, width: int, lead: int = 0) -> Noise:
    names = [f"j{number}" for number in range(len(shares))]
    entries: list[Any] = [n for n, s in zip(names, shares, strict=True) for _ in range(s.rows.stop - s.rows.start)]
    return Noise(Route.of(entries), shares, width, lead)


def masks(x: Tensor, *shares: Share, width: int, lead: int = 0, p: float = 0.4, calls: int = 1) -> list[Tensor]:
    with noises(*shares, width=width, lead=lead):
        return [F.dropout(x, p) for _ in range(calls)]


def test_a_job_loses_the_same_numbers_in_any_company() -> None:
    """Alone; beside rows before and after; padded further; shifted by other jobs' virtual tokens."""
    [alone] = masks(torch.ones(2, 5, 3), Share(slice(0, 2), 1, 4, seed=7), width=4, lead=1)
    beside = [Share(slice(0, 3), 3, 9, seed=1), Share(slice(3, 5), 1, 4, seed=7), Share(slice(5, 6), 0, 6, seed=2)]
    [among] = masks(torch.ones(6, 12, 3), *beside, width=9, lead=3)
    assert torch.equal(among[3:5, 2:7], alone)
    assert not (alone == 1).any(), "a number is lost or scaled up; virtual tokens' numbers too"
    assert not torch.equal(among[0, 2:7], alone[0])


def test_batches_calls_and_seeds_differ() -> None:
    one, two = masks(torch.ones(1, 8, 8), Share(slice(0, 1), 0, 8, seed=7), width=8, calls=2)
    [other] = masks(torch.ones(1, 8, 8), Share(slice(0, 1), 0, 8, seed=8), width=8)
    assert not torch.equal(one, two) and not torch.equal(one, other)
    [again] = masks(torch.ones(1, 8, 8), Share(slice(0, 1), 0, 8, seed=7), width=8)
    assert torch.equal(one, again)


def test_the_share_of_zeros_and_the_scale() -> None:
    [kept] = masks(torch.ones(4, 50, 50), Share(slice(0, 4), 0, 50, seed=3), width=50, p=0.25)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    [nothing] = masks(torch.ones(1, 4, 4), Share(slice(0, 1), 0, 4, seed=3), width=4, p=1.0)
    [everything] = masks(torch.ones(1, 4, 4), Share(slice(0, 1), 0, 4, seed=3), width=4, p=0.0)
    assert not nothing.any() and everything.all()


def test_torchs_own_generator_is_left_alone_and_nothing_stays_in_force() -> None:
    before = torch.get_rng_state()
    masks(torch.ones(1, 4, 4), Share(slice(0, 1), 0, 4, seed=3), width=4)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="on the way"), noises(Share(slice(0, 1), 0, 4, seed=3), width=4):
        raise RuntimeError("on the way")
    assert noise.mark() is None
    F.dropout(torch.ones(1, 4, 4))
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}], ids=str
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_that_drops_is_attention(options: dict[str, Any], kv_heads: int) -> None:
    """With a probability that drops nothing, the written-out attention is torch's own."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, kv_heads, 5, 8), torch.randn(2, kv_heads, 5, 8)
    kind = options.pop("mask", None) if "mask" in options else None
    mask = None
    if kind:
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        mask = seen if kind == "bool" else torch.zeros(5, 5).masked_fill(~seen, -math.inf)
    given: dict[str, Any] = {"attn_mask": mask, "enable_gqa": kv_heads < 4, **options}
    expected = F.scaled_dot_product_attention(query, key, value, **given)
    with noises(Share(slice(0, 2), 0, 5, seed=1), width=5):
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=1e-9, **given)
        dropped = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, **given)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(dropped, expected)


def test_layers_that_run_again_draw_again_what_they_drew() -> None:
    """In the same thread and in another, as a GPU's backward pass is."""

    def run(x: Tensor) -> Tensor:
        return F.dropout(x * 2, 0.5)

    for threaded in (False, True):
        x = torch.ones(1, 6, 6, requires_grad=True)
        with noises(Share(slice(0, 1), 0, 6, seed=5), width=6):
            y = checkpoint(noise.again(run), x, use_reentrant=False, preserve_rng_state=False)
            later = F.dropout(torch.ones(1, 6, 6), 0.5)
            if threaded:
                thread = threading.Thread(target=y.sum().backward)
                thread.start()
                thread.join()
            else:
                y.sum().backward()
            after = F.dropout(torch.ones(1, 6, 6), 0.5)
        assert x.grad is not None and torch.equal(x.grad, y.detach())
        assert not torch.equal(later, after)  # the count goes on where it was


def test_lstms_draw_for_the_job_they_belong_to() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)
    x = torch.randn(1, 3, 4)
    found = []
    for other in (1, 2):
        mode = noises(Share(slice(0, 1), 0, 3, seed=other), Share(slice(1, 2), 0, 3, seed=9), width=3)
        with mode:
            mode.route.at = 1
            found.append(layer(x)[0])
            mode.route.at = None
    assert torch.equal(found[0], found[1])


def test_what_cannot_be_shared_is_refused() -> None:
    with noises(Share(slice(0, 1), 0, 4, seed=3), width=4), pytest.raises(tz.TanzakuError, match="dropout2d"):
        F.dropout2d(torch.ones(1, 4, 4, 4), training=True)


def test_tables_that_all_rows_share_belong_to_no_job() -> None:
    [table] = masks(torch.ones(1, 11, 3), Share(slice(0, 2), 0, 4, seed=3), width=4)
    assert table.all()
