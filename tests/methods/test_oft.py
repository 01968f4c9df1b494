"""OFT: rotations are orthogonal, stay where coft allows them, and take sizes that fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.oft import BlockRotation, nearest_divisor


def rotations(model: Any) -> list[BlockRotation]:
    return [layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, BlockRotation)]


@pytest.mark.parametrize(
    ("settings", "exact"),
    [({"use_cayley_neumann": False}, 1e-5), ({"num_cayley_neumann_terms": 40}, 1e-3)],
    ids=["inverse", "series"],
)
def test_blocks_are_orthogonal(settings: dict[str, Any], exact: float) -> None:
    model = tiny("llama")
    tz.attach(model, tz.OFT(oft_block_size=8, init_weights=False, **settings), "x", seed=0)
    for layer in rotations(model):
        turn = layer.turned(torch.eye(32), training=False)
        assert not turn[torch.block_diag(*[torch.ones(8, 8)] * 4) == 0].any()
        assert (turn @ turn.t() - torch.eye(32)).abs().max() < exact
        assert (turn - torch.eye(32)).abs().max() > 0.05


def test_coft_keeps_near_the_identity_after_each_step() -> None:
    model = tiny("llama")
    adapter = tz.attach(model, tz.OFT(oft_block_size=8, coft=True, eps=0.1), "x", seed=0)
    tz.activate(model, "x")
    optimizer = torch.optim.SGD([p for _, p in adapter.trained()], lr=1.0)
    for step in range(3):
        model(**batch(model)).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.method.after_step(adapter, step)
        for layer in rotations(model):
            # Of each block, whose numbers stand twice in it: eps by the root of the number of blocks.
            assert (2**0.5 * layer.oft_R.weight.norm(dim=1)).max() <= 0.1 / 4**0.5 * 1.001
    assert any(layer.oft_R.weight.norm() > 0.05 for layer in rotations(model))


def test_module_dropout_leaves_blocks_as_they_were() -> None:
    model = tiny("llama")
    tz.attach(model, tz.OFT(oft_block_size=2, module_dropout=0.5, init_weights=False), "x", seed=0)
    layer, x = rotations(model)[0], torch.randn(3, 32)
    torch.manual_seed(0)
    same = (layer.turned(x, training=True) == x).view(3, 16, 2).all(-1)
    assert 2 < same[0].sum() < 14 and torch.equal(same, same[:1].expand(3, -1))
    assert not (layer.turned(x, training=False) == x).any()


@pytest.mark.parametrize(("size", "wanted", "divisor"), [(32, 32, 32), (48, 32, 24), (30, 7, 6), (30, 8, 6), (7, 3, 1)])
def test_the_nearest_divisor(size: int, wanted: int, divisor: int) -> None:
    assert nearest_divisor(size, wanted) == divisor


def test_where_a_block_fits_no_input_the_nearest_size_is_taken() -> None:
    model = tiny("llama")
    tz.attach(model, tz.OFT(oft_block_size=32, target_modules=["down_proj"]), "x")
    assert {layer.size for layer in rotations(model)} == {24}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 4}, "r=4 and oft_block_size=32, expected one of the two"),
        ({"oft_block_size": 1}, "blocks of 1"),
        ({"num_cayley_neumann_terms": 0}, "found num_cayley_neumann_terms=0, expected 2 to 100"),
        ({"eps": 0.0}, "eps=0.0"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), tz.OFT(**settings), "x")


def test_a_shared_block_is_one_for_all() -> None:
    model = tiny("llama")
    tz.attach(model, tz.OFT(oft_block_size=8, block_share=True, init_weights=False), "x", seed=0)
    layer, x = rotations(model)[0], torch.randn(3, 8)
    assert len(layer.oft_R.weight) == 1
    together = layer.turned(x.repeat(1, 4), training=False).view(3, 4, 8)
    assert_close(together, together[:, :1].expand(-1, 4, -1))
