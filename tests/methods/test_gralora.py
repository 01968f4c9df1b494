"""GraLoRA: each block of the change is of low rank, and all together of a higher one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.gralora import GridDelta


def first(**settings: Any) -> tuple[torch.nn.Module, GridDelta]:
    model = tiny("llama")
    tz.attach(model, tz.GraLoRA(**{"init_weights": False, **settings}), "x", seed=0)
    path, layer = next(manager_of(model).get("x").at())
    assert isinstance(layer, GridDelta)
    return model.get_submodule(path), layer


@torch.no_grad()
def test_blocks_of_a_lower_rank_than_the_whole() -> None:
    module, layer = first(r=4, gralora_k=4)
    delta = layer.delta(module)
    blocks = delta.view(4, 8, 4, 8).transpose(1, 2)
    assert torch.linalg.matrix_rank(blocks).unique().tolist() == [1]
    assert torch.linalg.matrix_rank(delta) == 16  # k times r
    a, b = layer.gralora_A, layer.gralora_B
    # Inputs' block i and outputs' block j share the i-th row of B and the j-th column of A.
    assert_close(blocks[2, 1], torch.outer(b[2, 1], a[1, :, 2]) * layer.scaling)


@torch.no_grad()
def test_one_block_is_lora() -> None:
    module, layer = first(r=4, gralora_k=1, alpha=8)
    assert_close(layer.delta(module), 2 * (layer.gralora_A[0] @ layer.gralora_B[0]).t())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 5}, "r=5, expected a multiple of gralora_k=2"),
        ({"r": 6, "gralora_k": 3}, "gralora_k=3 for .*expected a divisor of 32"),
        ({"hybrid_r": -1}, "hybrid_r=-1"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        first(**settings)
