"""HiRA: the change is the weight's own, of embeddings and convolutions, too, and of a rank beyond r."""

from __future__ import annotations

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.core.delta import WeightDelta
from tanzaku.core.manager import manager_of


@torch.no_grad()
def test_a_change_of_high_rank_that_is_zero_where_the_weight_is() -> None:
    model = tiny("llama")
    module = model.model.layers[0].self_attn.q_proj
    module.weight[3:7] = 0.0
    tz.attach(model, tz.HiRA(r=1, init_weights=False, target_modules=["q_proj"]), "x", seed=0)
    layer = next(layer for _, layer in manager_of(model).get("x").at())
    assert isinstance(layer, WeightDelta)
    delta = layer.delta(module)
    assert not delta[3:7].any() and torch.linalg.matrix_rank(delta) > 8


@torch.no_grad()
def test_only_embeddings_that_are_looked_up_are_computed_and_merging_agrees() -> None:
    model = tiny("gemma3", "lm", tie_word_embeddings=False)
    tz.attach(model, tz.HiRA(r=2, init_weights=False, target_modules=["embed_tokens"]), "x", seed=0)
    given = batch(model)
    with tz.route(model, ["x"] * 4):
        expected = model(**given).logits
    assert not torch.allclose(model(**given).logits, expected, atol=1e-2)
    tz.merge(model, "x")
    assert_close(model(**given).logits, expected)


@torch.no_grad()
def test_convolutions() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 4, 1))
    tz.attach(model, tz.HiRA(r=2, init_weights=False, target_modules=["0", "1"]), "x", seed=0)
    x = torch.randn(2, 4, 5, 5)
    with tz.route(model, ["x"]):
        expected = model(x)
    assert not torch.allclose(model(x), expected, atol=1e-2)
    tz.merge(model, "x")
    assert_close(model(x), expected)


def test_mistakes() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(tz.TanzakuError, match="a convolution in 2 groups, expected one group"):
        tz.attach(model, tz.HiRA(target_modules=["0"]), "x")
    with pytest.raises(tz.TanzakuError, match="init_weights='zero', expected true, false or 'gaussian'"):
        tz.attach(tiny("llama"), tz.HiRA(init_weights="zero"), "x")
