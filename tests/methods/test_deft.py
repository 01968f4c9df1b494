"""DEFT: what is taken away of an output, and what is written in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.methods.deft import ReplacedDirections


def first(**settings: Any) -> tuple[torch.nn.Module, ReplacedDirections]:
    model = tiny("llama", attention_bias=True)
    adapter = tz.attach(model, tz.DEFT(**{"r": 3, **settings}), "x", seed=0)
    path, layer = next(adapter.at())
    assert isinstance(layer, ReplacedDirections)
    module = model.get_submodule(path)
    torch.nn.init.normal_(module.bias)
    return module, layer


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"decomposition_method": "qr"}, {"decomposition_method": "qr", "alpha": 6.0}], ids=str
)
def test_at_first_it_writes_what_it_takes_away(settings: dict[str, Any]) -> None:
    module, layer = first(**settings)
    x = torch.randn(5, 32)
    y = module(x)
    assert_close(layer.outputs(module, x, y), y)
    layer.deft_R.zero_()
    assert not torch.allclose(layer.outputs(module, x, y), y, atol=1e-4)
    assert_close(layer.outputs(module, x, y), x @ (module.weight + layer.delta(module)).t() + module.bias)


@torch.no_grad()
def test_without_writing_the_directions_are_gone_and_biases_stay() -> None:
    module, layer = first(para=True, decomposition_method="qr")
    x = torch.randn(5, 32)
    q, _ = layer.directions()
    left = layer.outputs(module, x, module(x)) - module.bias
    assert (left @ q).abs().max() < 1e-5 < (x @ module.weight.t() @ q).abs().max()
    assert "deft_R" not in layer.export()


def test_mistakes() -> None:
    with pytest.raises(tz.TanzakuError, match="decomposition_method='svd', expected 'relu' or 'qr'"):
        first(decomposition_method="svd")
