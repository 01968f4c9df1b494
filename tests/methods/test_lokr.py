"""LoKr: sizes of the factors, and that its two small products are those of the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.core.delta import WeightDelta
from tanzaku.core.manager import manager_of
from tanzaku.methods.lokr import divided


@pytest.mark.parametrize("factor", [-1, 2, 3, 5, 8, 100])
def test_sizes_are_divided_as_pefts_are(factor: int) -> None:
    for size in range(1, 200):
        assert divided(size, factor) == factorization(size, factor)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"r": 2}, {"r": 1, "decompose_both": True, "decompose_factor": 8}, {"r": 16}], ids=str
)
def test_small_products_are_the_whole_matrix(settings: dict[str, Any]) -> None:
    model = tiny("llama")
    tz.attach(model, tz.LoKr(**settings, init_weights=False, target_modules=["up_proj", "v_proj"]), "x", seed=0)
    for path, layer in manager_of(model).get("x").at():
        if isinstance(layer, WeightDelta):
            module, x = model.get_submodule(path), torch.randn(3, 5, 32)
            assert isinstance(module, nn.Linear)
            assert_close(layer.added(module, x), x @ layer.delta(module).t())


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"init_weights": "lora"}, "'lycoris'"), ({"decompose_factor": 0}, "decompose_factor=0, expected -1")],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), tz.LoKr(**settings), "x")
