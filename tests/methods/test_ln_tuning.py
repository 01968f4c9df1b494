"""LN tuning: which norms, and that what they compute is the norm with the adapter's gain."""

from __future__ import annotations

import peft
import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3", "t5", "bart", "bert", "opt"])
def test_every_norm_of_the_backbone_is_tuned(kind: str) -> None:
    model = tiny(kind, "base")
    expected = [path for path, m in model.named_modules() if type(m).__name__.endswith("Norm")]
    tz.attach(model, tz.LNTuning(), "x")
    assert sorted(path for path, _ in manager_of(model).get("x").at()) == sorted(expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_targets_are_pefts_where_it_has_some(kind: str) -> None:
    model = tiny(kind, "lm")
    adapter = tz.attach(model, tz.LNTuning(), "x")
    theirs = peft.get_peft_model(tiny(kind, "lm"), peft.LNTuningConfig())
    assert tz.count(model, "x").trainable == theirs.get_nb_trainable_parameters()[0]
    assert set(adapter.method.settings()["target_modules"]) == set(theirs.peft_config["default"].target_modules)


def test_the_norm_has_the_adapters_gain() -> None:
    model, twin = tiny("llama"), tiny("llama")
    adapter = tz.attach(model, tz.LNTuning(), "x")
    with torch.no_grad():
        for path, layer in adapter.at():
            if path != "score":
                layer.ln_tuning_layers["weight"].add_(0.5)
                twin.get_submodule(path).weight.add_(0.5)
        with tz.route(model, ["x", None, "x", None]):
            found = model(**batch(model)).logits
        assert_close(found[::2], twin(**batch(model)).logits[::2])
        assert not torch.allclose(found[1::2], twin(**batch(model)).logits[1::2])


def test_a_target_that_is_no_norm() -> None:
    with pytest.raises(tz.TanzakuError, match=r"ln_tuning: found .*q_proj, a Linear, expected a norm with a gain that"):
        tz.attach(tiny("llama"), tz.LNTuning(target_modules=["q_proj"]), "x")
