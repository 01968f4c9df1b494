"""GLoRA: what each form computes, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from interop.oracle import scatter
from models import tiny
from tanzaku.methods.glora import FORMS, ScaledAndShifted


def first(biased: bool = True, **settings: Any) -> tuple[torch.nn.Module, ScaledAndShifted]:
    model = tiny("llama", attention_bias=biased)
    adapter = tz.attach(model, tz.GLoRA(**{"r": 3, **settings}), "x", seed=0)
    path, layer = next(adapter.at())
    assert isinstance(layer, ScaledAndShifted)
    module = model.get_submodule(path)
    if biased:
        torch.nn.init.normal_(module.bias)
    scatter([p for _, p in adapter.trained()])
    return module, layer


def whole(part: Any, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape) if part is None else part.value().expand(shape)


@torch.no_grad()
@pytest.mark.parametrize("d_e", FORMS["config_D_E"])
@pytest.mark.parametrize("c", FORMS["config_C"])
@pytest.mark.parametrize("a_b", FORMS["config_A_B"])
def test_weight_and_bias_are_scaled_and_shifted(a_b: str, c: str, d_e: str) -> None:
    """By the paper's formula, part by part; merged, too."""
    if (a_b, c, d_e) == ("none", "none", "none"):
        with pytest.raises(tz.TanzakuError, match=r"expected a part that learns$"):
            first(config_A_B=a_b, config_C=c, config_D_E=d_e)
        return
    module, layer = first(config_A_B=a_b, config_C=c, config_D_E=d_e)
    w, b = module.weight, module.bias
    parts = {key: whole(getattr(layer, f"glora_{key}"), shape) for key, shape in shapes_of(w).items()}
    weight = w + w * parts["A"] + parts["B"]
    bias = b + b * parts["D"] + parts["E"] + (w @ parts["C"]).squeeze(-1)
    x = torch.randn(5, w.shape[1])
    assert_close(layer.outputs(module, x, module(x)), x @ weight.t() + bias)
    merged = {"weight": w, "bias": b, **(layer.merged(module) or {})}
    assert_close(merged, {"weight": weight, "bias": bias})


def shapes_of(w: torch.Tensor) -> dict[str, tuple[int, ...]]:
    n_out, n_in = w.shape
    return {"A": (n_out, n_in), "B": (n_out, n_in), "C": (n_in, 1), "D": (n_out,), "E": (n_out,)}


def test_without_a_bias_there_is_none_afterwards() -> None:
    module, layer = first(biased=False)
    assert layer.bias_change(module) is None and (layer.merged(module) or {}).keys() == {"weight"}
    with pytest.raises(tz.TanzakuError, match="expected a part that learns and a bias"):
        first(biased=False, config_A_B="none")


def test_mistakes() -> None:
    with pytest.raises(tz.TanzakuError, match="config_C='constant', expected 'lora', 'vector' or 'none'"):
        first(config_C="constant")
    with pytest.raises(tz.TanzakuError, match="bias='all', expected 'none', and config_D_E"):
        first(bias="all")
