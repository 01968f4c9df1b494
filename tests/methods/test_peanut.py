"""PEANuT: its change depends on the weight, and on nothing where the weight is zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.methods.peanut import NetworkDelta


def first(**settings: Any) -> tuple[torch.nn.Module, NetworkDelta]:
    model = tiny("llama")
    adapter = tz.attach(model, tz.PEANuT(**{"r": 4, "init_weights": False, **settings}), "x", seed=0)
    path, layer = next(adapter.at())
    assert isinstance(layer, NetworkDelta)
    return model.get_submodule(path), layer


@torch.no_grad()
def test_a_network_without_depth_reads_each_column_of_the_weight() -> None:
    module, layer = first(scaling=3.0)
    a, b = layer.peanut_A.weight, layer.peanut_B.weight
    assert_close(layer.delta(module), 3 * b @ (a @ module.weight).relu())
    module.weight[:, 5] = 0.0
    assert not layer.delta(module)[:, 5].any()


@torch.no_grad()
def test_layers_between_mirror_each_other() -> None:
    module, layer = first(depth=2, act_fn="tanh")
    first_hidden = (layer.peanut_A.weight @ module.weight).tanh()
    one, two = (encoder.weight for encoder in layer.peanut_encoders)
    three, four = (decoder.weight for decoder in layer.peanut_decoders)
    second = (one @ first_hidden).tanh()
    third = (two @ second).tanh()
    fourth = (three @ third).tanh() + second
    last = (four @ fourth).tanh() + first_hidden
    assert_close(layer.delta(module), layer.peanut_B.weight @ last)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"act_fn": "rel"}, "act_fn='rel', expected one of transformers'"),
        ({"depth": -1}, "depth=-1, expected 0 to 100"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        first(**settings)
