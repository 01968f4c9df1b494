"""DeLoRA: the change's size is bounded by lambda, whatever its factors are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.delora import BoundedDelta


def layers(model: torch.nn.Module, **settings: Any) -> list[BoundedDelta]:
    tz.attach(model, tz.DeLoRA(**settings), "x", seed=0)
    return [layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, BoundedDelta)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_bound_is_lambda_times_the_weights_norms(kind: str) -> None:
    model = tiny(kind, "lm")
    (path, _), *_ = tz.attach(model, tz.LoRA(r=1), "other").at()
    layer = layers(model, r=4, delora_lambda=3.0, init_weights=False)[0]
    module = model.get_submodule(path)
    weight = module.weight if kind == "llama" else module.weight.t()
    assert_close(layer.delora_w_norm, weight.norm(dim=0))
    relative = layer.delta(module) / layer.delora_w_norm
    assert 0.5 < relative.norm() <= 3.0
    before = relative.clone()
    layer.delora_A.mul_(100.0)
    layer.delora_B.mul_(0.1)
    assert_close(layer.delta(module) / layer.delora_w_norm, before)


def test_bounds_and_ranks_by_pattern() -> None:
    found = layers(tiny("llama"), r=2, rank_pattern={"v_proj": 5}, lambda_pattern={"v_proj": 7})
    assert {(layer.r, layer.delora_lambda.item()) for layer in found} == {(2, 15.0), (5, 7.0)}
