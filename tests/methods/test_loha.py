"""LoHa: convolutions with and without a core, and what training leaves out."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import tanzaku as tz
from close import GRADIENT, assert_close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.core.manager import manager_of


def convolutions(groups: int = 1) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, padding=1, groups=groups), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings"), [("loha", {"r": 2}), ("lokr", {"r": 1}), ("lokr", {"r": 1, "decompose_factor": 2})]
)
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_pefts(name: str, settings: dict[str, Any], core: bool, groups: int) -> None:
    """The same parameters by the same names give the same change; merged it is the same, too."""
    settings = {**settings, "target_modules": ["0", "2"], "use_effective_conv2d": core, "init_weights": False}
    config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[name]
    theirs = peft.get_peft_model(convolutions(groups), config(**settings))
    scatter([p for p in theirs.parameters() if p.requires_grad])
    model = convolutions(groups)
    adapter = tz.attach(model, tz.METHODS[name].from_settings(settings), "x")
    state = {key.replace(".default", ""): value for key, value in theirs.base_model.model.state_dict().items()}
    for path, layer in adapter.at():
        layer.restore({key: state[f"{path}.{key}"] for key in layer.export()})
    x = torch.randn(2, 4, 5, 5)
    expected = theirs(x)
    with tz.route(model, ["x"]):
        assert_close(model(x), expected)
    assert not torch.allclose(model(x), expected, atol=1e-2)
    tz.merge(model, "x")
    assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_rank_dropout_leaves_whole_outputs_out(name: str) -> None:
    model = tiny("llama").train()
    settings = {"r": 2, "rank_dropout": 0.5, "init_weights": False, "target_modules": ["q_proj"]}
    tz.attach(model, tz.METHODS[name].from_settings(settings), "x", seed=0)
    path, layer = next(manager_of(model).get("x").at())
    module, x, zero = model.get_submodule(path), torch.randn(3, 5, 32), torch.zeros(3, 5, 32)
    found = layer.outputs(module, x, zero)
    kept = found[0, 0] != 0
    assert 4 < kept.sum() < 28 and torch.equal(found != 0, kept.expand_as(found))
    factor = len(kept) / kept.sum() if name == "loha" else 1.0  # LoKr scales up if it is told to
    whole = layer.outputs(module.eval(), x, zero)
    assert (whole != 0).all()
    assert_close(found[..., kept], whole[..., kept] * factor)


def test_module_dropout_leaves_the_change_out_for_a_pass() -> None:
    model = tiny("llama").train()
    settings = tz.LoHa(r=2, module_dropout=0.5, init_weights=False, target_modules=["q_proj"], layers_to_transform=[0])
    tz.attach(model, settings, "x", seed=0)
    given, outs = batch(model), []
    with torch.no_grad():
        bare = model(**given).logits
        for seed in range(8):
            torch.manual_seed(seed)
            with tz.route(model, ["x"] * 4):
                outs.append(model(**given).logits)
    same = [torch.allclose(out, bare, atol=1e-6) for out in outs]
    assert any(same) and not all(same)


def test_in_factors_it_is_what_the_whole_matrix_makes() -> None:
    """As it is computed where r * r is small, and as it is where r * r is large; with its gradients."""
    model = tiny("llama")
    tz.attach(model, tz.LoHa(r=3, init_weights=False, target_modules=["v_proj"], layers_to_transform=[0]), "x", seed=0)
    path, layer = next(manager_of(model).get("x").at())
    module, x = model.get_submodule(path), torch.randn(3, 5, 32, requires_grad=True)
    layer.requires_grad_(True)
    found = []
    for in_factors in (True, False):
        assert not in_factors or layer.in_factors
        layer.in_factors = in_factors
        y = layer.outputs(module, x, module(x))
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1:], found[1][1:], GRADIENT)
