"""MiSS: sums of parts of the input, and the variants of the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.core.delta import WeightDelta
from tanzaku.core.manager import manager_of


def first(**settings: Any) -> tuple[torch.nn.Module, Any]:
    model = tiny("llama")
    tz.attach(model, tz.MiSS(**settings), "x", seed=0)
    path, layer = next(manager_of(model).get("x").at())
    assert isinstance(layer, WeightDelta)
    with torch.no_grad():
        layer.miss_block.normal_()
    return model.get_submodule(path), layer


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 5}, {"r": 4, "init_weights": "mini", "mini_r": 8}], ids=str)
def test_inputs_r_apart_are_seen_as_one(settings: dict[str, Any]) -> None:
    module, layer = first(**settings)
    x, r = torch.randn(3, 32), settings["r"]
    found = layer.outputs(module, x, torch.zeros(3, 32))
    assert_close(found, x @ layer.delta(module).t())
    moved = x.clone()
    moved[:, r] += x[:, 0]
    moved[:, 0] = 0.0
    assert_close(layer.outputs(module, moved, torch.zeros(3, 32)), found)


@torch.no_grad()
def test_blocks_of_the_weight_have_a_matrix_a_row() -> None:
    module, layer = first(r=8, init_weights="bat")
    delta, weight = layer.delta(module), module.weight
    for row in range(4):
        for column in range(4):
            at = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            assert_close(delta[at], weight[at] @ layer.miss_block[row] + layer.miss_block[row])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 40}, "r=40 for .*expected 1 to its 32 inputs"),
        ({"r": 5, "init_weights": "bat"}, "expected a divisor of 32, for blocks of r x r"),
        ({"r": 4, "init_weights": "mini", "mini_r": 5}, "mini_r=5 for .*expected a divisor of its 32 outputs"),
        ({"init_weights": "bone"}, "init_weights='bone', expected true, false, 'mini' or 'bat'"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        first(**settings)
