"""Super-Tuning: the numbers of the weight that are largest, or smallest, and LoRA beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.methods.supertuning import LargestDelta


def first(**settings: Any) -> tuple[torch.nn.Module, LargestDelta]:
    model = tiny("llama")
    adapter = tz.attach(model, tz.Supertuning(**{"sparsity": 0.9, **settings}), "x", seed=0)
    path, layer = next(adapter.at())
    assert isinstance(layer, LargestDelta)
    return model.get_submodule(path), layer


@torch.no_grad()
@pytest.mark.parametrize("top", [True, False])
def test_which_numbers_change(top: bool) -> None:
    module, layer = first(select_top=top)
    layer.supertuning_values.fill_(1.0)
    chosen = layer.delta(module) != 0
    assert chosen.sum() == int(1024 * (1 - 0.9))
    sizes = module.weight.abs()
    inside, outside = sizes[chosen], sizes[~chosen]
    assert inside.min() >= outside.max() if top else inside.max() <= outside.min()


@torch.no_grad()
def test_lora_beside_them() -> None:
    module, layer = first(r=2, lora_alpha=6.0, init_weights=False)
    low_rank = layer.supertuning_lora_B.weight @ layer.supertuning_lora_A.weight * 3
    assert_close(layer.delta(module), layer.sparse() + low_rank)
    x = torch.randn(5, 32)
    assert_close(layer.added(module, x), x @ layer.delta(module).t())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sparsity": 0.9999}, "expected one that leaves a number to train"),
        ({"sparsity": 1.0}, "sparsity=1.0, expected a share below 1"),
        ({"r": 2}, "r=2 and lora_alpha=None, expected both or neither"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        first(**settings)
