"""Gated feed-forwards: the numbers of the modules they stand in for, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tanzaku as tz
from close import GRADIENT, RUN, assert_close
from models import batch, tiny
from tanzaku.engine.acceleration import Common
from tanzaku.engine.gates import FrozenGates
from tanzaku.models.families import Base


def mlps(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("MLP")]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2", "mistral"])
def test_they_are_recognised_and_equal(kind: str) -> None:
    model = tiny(kind).requires_grad_(False)
    gates = FrozenGates(Common(Base.of(model)))
    assert [module for module, _ in gates.gates] == mlps(model) != []
    for module in mlps(model):
        for part in module.children():
            if isinstance(part, nn.Linear):
                part.weight *= 20  # beyond the range in which every activation is nearly linear
        x = torch.randn(3, 5, module.gate_proj.in_features, requires_grad=True)
        plain = module(x)
        gradient = torch.randn_like(plain)
        (expected,) = torch.autograd.grad(plain, x, gradient)
        with gates:
            y = module(x)
            (found,) = torch.autograd.grad(y, x, gradient)
        assert_close(y, plain)
        assert_close(found, expected, GRADIENT)
        assert "forward" not in module.__dict__


def test_extreme_numbers_make_no_nan() -> None:
    model = tiny("gemma3").requires_grad_(False)
    (module, *_) = mlps(model)
    gates = FrozenGates(Common(Base.of(model)))
    for size in (1e4, -1e4, 0.0):
        x = torch.full((1, module.gate_proj.in_features), size, requires_grad=True)
        found = []
        for fast in (False, True):
            if fast:
                gates.__enter__()
            y = module(x)
            found.append((y, *torch.autograd.grad(y.sum(), x)))
        gates.__exit__()
        for a, b in zip(*found, strict=True):
            assert_close(b, a, RUN)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_two_tensors_are_kept_for_the_backward_pass(kind: str) -> None:
    model = tiny(kind).requires_grad_(False)
    (module, *_) = mlps(model)
    x = torch.randn(3, 5, module.gate_proj.in_features, requires_grad=True)
    wide: list[torch.Tensor] = []

    def note(kept: torch.Tensor) -> torch.Tensor:
        if kept.shape == (3, 5, module.gate_proj.out_features):
            wide.append(kept)
        return kept

    with FrozenGates(Common(Base.of(model))), torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        module(x)
    assert len(wide) == 2


def test_other_activations_and_other_modules_are_left_alone() -> None:
    model = tiny("llama")
    first, second = mlps(model)
    first.act_fn = nn.GELU()  # its exact form, by the error function
    second.dropout = nn.Dropout(0.1)
    assert FrozenGates(Common(Base.of(model))).gates == []
    assert FrozenGates(Common(Base.of(tiny("bert")))).gates == []
    assert FrozenGates(Common(Base.of(tiny("llama").bfloat16()))).gates == []


def test_adapters_inside_are_still_called() -> None:
    model = tiny("llama")
    adapter = tz.attach(model, tz.LoRA(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]), "lora", seed=0)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn_like(parameter))
    inputs = batch(model)
    with tz.route(model, ["lora"] * len(inputs["input_ids"])):
        expected = model(**inputs).logits
        trained = [p for _, p in adapter.trained() if p.dim() == 2]
        gradients = torch.autograd.grad(expected.square().sum(), trained, allow_unused=True)
        with FrozenGates(Common(Base.of(model))) as gates:
            assert len(gates.gates) == 2
            found = model(**inputs).logits
            assert_close(found, expected, GRADIENT)
            for a, b in zip(
                torch.autograd.grad(found.square().sum(), trained, allow_unused=True), gradients, strict=True
            ):
                assert_close(a, b, RUN)
