"""RoAd: pairs of outputs are turned by angles, and their lengths scaled; biases turn with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.road import PairRotation


def first(model: torch.nn.Module, **settings: Any) -> PairRotation:
    tz.attach(model, tz.RoAd(**{"group_size": 8, **settings}), "x", seed=0)
    layer = next(layer for _, layer in manager_of(model).get("x").at())
    assert isinstance(layer, PairRotation)
    return layer


@torch.no_grad()
def test_a_pair_is_turned_and_scaled() -> None:
    layer = first(tiny("llama"))
    layer.road_theta[1], layer.road_alpha[1] = torch.pi / 2, 3.0
    y = torch.randn(5, 32)
    found = layer.outputs(torch.nn.Linear(1, 1), y, y)
    expected = y.clone()
    expected[:, 1], expected[:, 5] = -3 * y[:, 5], 3 * y[:, 1]  # half a group apart
    assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_biases_turn_with_the_weight_when_merged(variant: str) -> None:
    model = tiny("llama", attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.normal_()
    first(model, variant=variant, init_weights=False)
    given = batch(model)
    with tz.route(model, ["x"] * 4):
        expected = model(**given).logits
    tz.merge(model, "x")
    assert_close(model(**given).logits, expected)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"group_size": 5}, "group_size=5, expected an even number"),
        ({"group_size": 24}, "group_size=24 for .*expected a divisor of its 32 outputs"),
        ({"variant": "road_3"}, "variant='road_3'"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        first(tiny("llama"), **settings)
