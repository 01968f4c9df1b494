"""C3A: blocks are circulant, and sizes fit."""

from __future__ import annotations

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.c3a import CirculantDelta


def first(method: tz.C3A) -> tuple[torch.nn.Module, CirculantDelta]:
    model = tiny("llama")
    tz.attach(model, method, "x", seed=0)
    path, layer = next(manager_of(model).get("x").at())
    assert isinstance(layer, CirculantDelta)
    return model.get_submodule(path), layer


@torch.no_grad()
def test_each_block_is_its_kernel_turned_row_by_row() -> None:
    module, layer = first(tz.C3A(block_size=8))
    delta = layer.delta(module).view(4, 8, 4, 8).transpose(1, 2)
    for row in range(8):
        assert_close(delta[:, :, row] * 32, layer.c3a_kernel.roll(row, -1))


STARTS = [("xavier_uniform", (6 / 64) ** 0.5), ("kaiming_uniform", 32**-0.5), (True, 0.0)]


@torch.no_grad()
@pytest.mark.parametrize(("init", "most"), STARTS)
def test_starts(init: bool | str, most: float) -> None:
    kernel = first(tz.C3A(block_size=8, init_weights=init))[1].c3a_kernel
    assert 0.8 * most <= kernel.abs().max() <= most


@pytest.mark.parametrize("block", [0, 5, 64])
def test_mistakes(block: int) -> None:
    with pytest.raises(tz.TanzakuError, match=f"block_size={block} for .*expected a divisor of 32, for 32 inputs"):
        first(tz.C3A(block_size=block))
