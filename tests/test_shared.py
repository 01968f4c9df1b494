"""What several layers of an adapter share: owned once, computed once a pass, never old."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.method import AdapterLayer, ModuleLayer, Place, trainable
from tanzaku.core.shared import Shared
from tanzaku.support.refs import Ref


class Network(Shared):
    """A vector for each layer, of one hidden vector."""

    place = "network"

    def __init__(self, like: Tensor, layers: int):
        super().__init__()
        self.hidden = trainable(4, like=like, fill=nn.init.normal_)
        self.out = trainable(layers, like.shape[0], 4, like=like, fill=nn.init.normal_)
        self.times = 0

    def compute(self) -> Tensor:
        self.times += 1
        return 0.1 * (self.out @ torch.tanh(self.hidden))


class Shifted(ModuleLayer):
    def __init__(self, network: Network, number: int):
        super().__init__()
        self.network, self.number = Ref(network), number

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        network = self.network()
        assert network is not None
        return y + network.value()[self.number].to(y.dtype)


@dataclass
class Hyper(tz.Method):
    """Shifts the values of all layers by what one network writes."""

    name = "hyper"
    peft_type = "HYPER"
    paper = summary = "-"
    target: str = "v_proj"

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        found = base.targets([self.target])
        yield "", (network := Network(found[0][1].weight, len(found)))
        for number, (path, _) in enumerate(found):
            yield path, Shifted(network, number)


def network_of(model: nn.Module) -> Network:
    return next(layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, Network))


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in manager_of(model).get("x").trained() if p.grad is not None}


@pytest.fixture
def model() -> Any:
    model = tiny("llama")
    tz.attach(model, Hyper(modules_to_save=[]), "x", seed=0)
    tz.activate(model, "x")
    return model


def test_it_is_owned_once_and_computed_once_a_pass(model: Any) -> None:
    network = network_of(model)
    names = [name for name, _ in model.named_parameters() if name.startswith("tanzaku.x.network")]
    assert names == ["tanzaku.x.network.hidden", "tanzaku.x.network.out"]
    model(**batch(model))
    assert network.times == 1
    with tz.route(model, ["x", None, "x", None]):
        model(**batch(model))
    assert network.times == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_gradient_is_that_of_all_layers(model: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(model)
    with monkeypatch.context() as patch:
        patch.setattr(Network, "value", Network.compute)  # each layer for itself
        expected = gradients(model, inputs)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert len(expected) == 2
    assert_close(gradients(model, inputs), expected, GRADIENT)


def test_it_is_never_old(model: Any) -> None:
    """After a step of an optimizer, and after a pass without gradients, also where a layer runs outside of a pass."""
    network = network_of(model)
    model(**batch(model))
    assert network.value() is network.value()
    with torch.no_grad():
        network.hidden.add_(1.0)
        assert_close(network.value(), network.compute())
        model(**batch(model))
        assert not network.value().requires_grad
    assert network.value().requires_grad


def test_a_mixed_batch_equals_each_alone(model: Any) -> None:
    tz.attach(model, Hyper(modules_to_save=[]), "y", seed=1)
    inputs = batch(model)
    found = {}
    for name in ("x", "y", None):
        with torch.no_grad(), tz.route(model, [name] * 4):
            found[name] = model(**inputs).logits
    with torch.no_grad(), tz.route(model, ["x", "y", None, "y"]):
        mixed = model(**inputs).logits
    for row, name in enumerate(["x", "y", None, "y"]):
        assert_close(mixed[row], found[name][row])
    assert not torch.allclose(found["x"], found["y"])


def test_an_encoder_has_it_too() -> None:
    model = tiny("t5", "lm")
    tz.attach(model, Hyper(target="v"), "x", seed=0)
    tz.activate(model, "x")
    inputs = batch(model)
    found = gradients(model, {**inputs, "decoder_input_ids": inputs["input_ids"]})
    assert network_of(model).times == 2  # before the encoder, and before the decoder
    assert len(found) == 2
