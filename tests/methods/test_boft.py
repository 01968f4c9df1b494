"""BOFT: the butterfly as HF PEFT lays it out, also with several factors, which PEFT computes on GPUs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.boft import Butterfly, order


def first(**settings: Any) -> Butterfly:
    model = tiny("llama")
    tz.attach(model, tz.BOFT(**settings), "x", seed=0)
    layer = next(layer for _, layer in manager_of(model).get("x").at())
    assert isinstance(layer, Butterfly)
    return layer


@pytest.mark.parametrize(("size", "factors"), [(2, 4), (4, 3), (8, 2)])
def test_features_are_taken_in_pefts_order(size: int, factors: int) -> None:
    theirs: Any = BOFTLayer.block_butterfly_perm
    for i in range(factors):
        expected = theirs(None, 32, 32 // size // 2**i, size // 2, factors - 1)
        assert order(32, 32 // size // 2**i, size // 2, factors) == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_the_rotation_is_the_product_of_its_factors(factors: int) -> None:
    layer = first(boft_n_butterfly_factor=factors, init_weights=False)
    theirs: Any = BOFTLayer
    found = layer.turned(torch.eye(32), training=False)
    whole = torch.eye(32)
    for i in range(factors):
        blocks = theirs.cayley_batch(None, layer.boft_R[i])
        places = theirs.perm2mat(None, torch.arange(32) if layer.orders[i] is None else torch.tensor(layer.orders[i]))
        whole = places @ torch.block_diag(*blocks) @ places.t() @ whole
    assert_close(found, whole)
    assert_close(found @ found.t(), torch.eye(32))
    # Each factor lets twice as many features meet.
    assert int((found.abs() > 1e-6).sum(1).max()) == 4 * 2 ** (factors - 1)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"boft_block_num": 4}, "expected one of the two"),
        ({"boft_block_size": 5}, "expected a divisor of the 32 inputs"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor=0"),
        ({"boft_n_butterfly_factor": 5}, "8 blocks of 4 .*expected blocks of an even size, and a multiple of 16"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        first(**settings)
