"""A change of a weight, once for every kind of module: what comes out is what the changed module would return."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from close import assert_close
from tanzaku.core.delta import WeightDelta
from tanzaku.methods.lora_layers import LoraConv2d, LoraDelta, LoraEmbedding


class Plain(WeightDelta):
    """All of the matrix, at random."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.change = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))

    def delta(self, module: nn.Module) -> Tensor:
        return self.change


MODULES = {
    "linear": (lambda: nn.Linear(6, 4), torch.randn(3, 5, 6), (4, 6)),
    "conv1d": (lambda: Conv1D(4, 6), torch.randn(3, 5, 6), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, padding=1, groups=2), torch.randn(3, 4, 8, 8), (6, 2, 3, 3)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), torch.randn(3, 4, 8, 8), (6, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(7, 4), torch.tensor([[1, 2, 6], [0, 0, 3]]), (4, 7)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_outputs_are_those_of_the_merged_module(kind: str) -> None:
    make, x, shape = MODULES[kind]
    module, layer = make(), Plain(shape)
    changed = layer.outputs(module, x, module(x))
    merged = layer.merged(module)
    assert merged is not None
    expected = torch.func.functional_call(module, merged, (x,))
    assert not torch.allclose(expected, module(x))
    assert_close(changed, expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
def test_cheaper_ways_are_the_same_change(kind: str) -> None:
    """LoRA's factors against the whole matrix."""
    make, x, _ = MODULES[kind]
    module = make()
    if isinstance(module, nn.Embedding):
        layer: WeightDelta = LoraEmbedding(module, 2, 0.5, False)
    else:
        layer = (LoraConv2d if isinstance(module, nn.Conv2d) else LoraDelta)(module, 2, 0.5, 0.0, False)
    y = module(x)
    assert_close(layer.outputs(module, x, y), WeightDelta.outputs(layer, module, x, y))


def test_dropout_is_of_what_the_change_reads() -> None:
    module, layer = nn.Linear(6, 4), Plain((4, 6))
    layer.dropout = 0.5
    x = torch.randn(3, 6)
    y = module.train()(x)
    assert not torch.allclose(layer.outputs(module, x, y), layer.outputs(module, x, y))
    module.eval()
    assert_close(layer.outputs(module, x, y), y + x @ layer.change.t())
