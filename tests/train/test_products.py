"""Frozen products and norms: the numbers of the modules they stand in for, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tanzaku as tz
from models import batch, tiny
from tanzaku.families import Base
from tanzaku.host import host_of
from tanzaku.train import products
from tanzaku.train.norms import FrozenNorms
from tanzaku.train.products import ABOVE, FrozenProducts, Tokens, lowest_layer

CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[int], list[int], list[int]]:
    """(width, starts, lengths, lowest layers) of a batch."""
    width = draw(st.integers(1, 7))
    rows = draw(st.integers(1, 5))
    starts = [draw(st.integers(0, width - 1)) for _ in range(rows)]
    lengths = [draw(st.integers(1, width - start)) for start in starts]
    return width, starts, lengths, [draw(st.sampled_from([-1, 0, 1, 3, ABOVE])) for _ in range(rows)]


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 4), st.booleans(), st.booleans())
def test_own_tokens_get_the_products_they_would_get(layout: Any, depth: int, bias: bool, onednn: bool) -> None:
    width, starts, lengths, lowest = layout
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=bias).requires_grad_(False)
    x = torch.randn(len(lengths), width, 6, requires_grad=True)
    own = torch.zeros(len(lengths), width, 1)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own[row, start : start + length] = 1
    needed = own * torch.tensor([low <= depth for low in lowest]).view(-1, 1, 1)
    tokens = Tokens(width, starts, lengths, lowest, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_ONEDNN", onednn and products._ONEDNN)
        y = products._Product.apply(x, layer.weight, layer.bias, tokens.places(), tokens.places(depth))
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias) * own)
        gradient = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, x, gradient)
    torch.testing.assert_close(found, gradient @ layer.weight * needed)


@pytest.mark.parametrize(("kind", "head"), [("llama", "cls"), ("gemma3", "cls"), ("bert", "cls"), ("gpt2", "cls")])
def test_a_batch_of_adapters_at_different_layers(kind: str, head: str) -> None:
    """Rows that train the top alone beside rows that train everything: the gradients of the plain model."""
    model = tiny(kind, head)
    base = Base.of(model)
    top = len(base.attention()) - 1
    methods = [tz.LoRA(r=2, layers_to_transform=[top]), tz.Head(), tz.LoRA(r=2), tz.PromptTuning(num_virtual_tokens=2)]
    hung = [tz.attach(model, method, f"a{seed}", seed=seed) for seed, method in enumerate(methods)]
    for adapter in hung:
        for _, parameter in adapter.trained():
            parameter.data += 0.1
    lowest = [lowest_layer(adapter) for adapter in hung]
    assert lowest == [top, ABOVE, 0, -1]
    inputs = batch(model, rows=4)
    lengths = inputs["attention_mask"].sum(1).tolist()
    virtual = [0, 0, 0, 2]
    tokens = Tokens(
        2 + inputs["input_ids"].shape[1],
        [2 - v for v in virtual],
        [v + length for v, length in zip(virtual, lengths, strict=True)],
        lowest,
        CPU,
    )
    trained = [p for adapter in hung for _, p in adapter.trained()]

    def gradients() -> list[torch.Tensor]:
        with tz.route(model, [adapter.name for adapter in hung]):
            loss = model(**inputs).logits.square().sum()
        return [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True)
        ]

    expected = gradients()
    fast = FrozenProducts(base)
    with fast, FrozenNorms(base), fast.reading(tokens):
        found = gradients()
    assert any(g.any() for g in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_weights_that_are_trained_are_left_alone() -> None:
    """An adapter's own copy of a layer gets its gradient."""
    model = tiny("llama")
    adapter = tz.attach(model, tz.LoRA(r=2, modules_to_save=["score", "down_proj"]), "a", seed=0)
    inputs = batch(model, rows=2)
    tz.activate(model, "a")
    width = inputs["input_ids"].shape[1]
    fast = FrozenProducts(host_of(model).base)
    with fast, fast.reading(Tokens(width, [0, 0], [width, width], [0, 0], CPU)):
        model(**inputs).logits.square().sum().backward()
    copies = [p for name, p in adapter.trained() if "down_proj" in name]
    assert len(copies) == 2 and all(p.grad is not None and p.grad.any() for p in copies)


def test_only_plain_linear_layers_are_touched() -> None:
    class Odd(nn.Linear):
        pass

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = Odd(32, 64)
    paths = {id(module) for module, _ in FrozenProducts(Base.of(model)).layers}
    assert id(model.model.layers[0].mlp.up_proj) not in paths and id(model.score) not in paths
    assert id(model.model.layers[0].mlp.down_proj) in paths


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_norms_are_recognised_and_equal(kind: str) -> None:
    model = tiny(kind)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data += 0.3 * torch.randn_like(module.weight)
    norms = FrozenNorms(Base.of(model))
    kinds = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms.norms) == len(kinds) > 0
    for module in kinds:
        module.requires_grad_(False)
        x = torch.randn(3, 5, len(module.weight), requires_grad=True)
        gradient = torch.randn_like(x)
        plain = module(x)
        (expected,) = torch.autograd.grad(plain, x, gradient)
        with norms:
            y = module(x)
            (found,) = torch.autograd.grad(y, x, gradient)
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_of_another_formula_is_left_alone() -> None:
    class StrangeRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    model = tiny("llama")
    before = len(FrozenNorms(Base.of(model)).norms)
    model.model.norm = StrangeRMSNorm()
    assert len(FrozenNorms(Base.of(model)).norms) == before - 1
