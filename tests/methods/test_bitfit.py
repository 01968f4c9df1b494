"""BitFit: which biases are trained, and what models without any are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import zoo

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.weights import WeightCopy


def paths(model: Any) -> list[str]:
    return [path for path, layer in manager_of(model).get("x").at() if not isinstance(layer, WeightCopy)]


def test_all_biases_of_the_model_outside_of_its_head() -> None:
    model = tiny("bert")
    expected = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    tz.attach(model, tz.BitFit(), "x")
    assert set(paths(model)) == expected - {"classifier"}
    assert (
        tz.count(model, "x").trainable
        == sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias") and "tanzaku" not in name)
        + model.classifier.weight.numel()
    )


def test_of_queries_and_the_first_feed_forward_alone() -> None:
    """The subset of the paper: b_q and b_m2."""
    model = tiny("bert")
    tz.attach(model, tz.BitFit(bias_scope="query_up"), "x")
    ends = {".".join(path.split(".")[-2:]) for path in paths(model)}
    assert ends == {"self.query", "intermediate.dense"} and len(paths(model)) == 4


@pytest.mark.parametrize("scope", ["all", "query_up"])
def test_a_model_without_any_is_told_how_to_get_some(scope: str) -> None:
    with pytest.raises(tz.TanzakuError, match=r"bitfit: found a LlamaForCausalLM without a bias.*bias_scope='add'"):
        tz.attach(tiny("llama", "lm"), tz.BitFit(bias_scope=scope), "x")


def test_added_biases_are_added(tmp_path: Path) -> None:
    """The same as a model with biases of these values; they come back from a file, and cannot be merged."""
    model, inputs = tiny("llama", "lm"), None
    inputs = batch(model)
    adapter = tz.attach(model, tz.BitFit(bias_scope="add"), "x")
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.normal_(generator=torch.Generator().manual_seed(0), std=0.1)
        with tz.route(model, ["x"] * 4):
            found = model(**inputs).logits
        twin = tiny("llama", "lm", attention_bias=True, mlp_bias=True)
        twin.load_state_dict({k: v for k, v in model.state_dict().items() if "tanzaku" not in k}, strict=False)
        for path, layer in adapter.at():
            if path:
                twin.get_submodule(path).bias.copy_(layer.bias)
        assert_close(found, twin(**inputs).logits)
        tz.save(model, "x", tmp_path)
        tz.load(model, tmp_path, "y")
        with tz.route(model, ["y"] * 4):
            assert_close(model(**inputs).logits, found)
    with pytest.raises(tz.TanzakuError, match="cannot be merged"):
        tz.merge(model, "x")


@pytest.mark.parametrize(
    ("kind", "path", "why"),
    [("gpt_oss", "mlp.router", "not simply added"), ("recurrent_gemma", "conv_1d", "read past the module")],
)
def test_a_bias_that_is_not_simply_added_is_left_out(kind: str, path: str, why: str) -> None:
    """A router makes scores of it, and a convolution's is read past the module while a cache is filled. LoRA too."""
    for method in (tz.BitFit(), tz.LoRA(r=1, bias="all")):
        model = zoo.NAMES[kind].build()
        with pytest.warns(UserWarning, match=why):
            tz.attach(model, method, "x")
        assert paths(model) and not any(each.endswith(path) for each in paths(model))


@pytest.mark.parametrize("scope", ["add", "query_up"])
@pytest.mark.parametrize(("kind", "fix"), [("mamba", "use another method"), ("resnet", "use bias_scope='all'")])
def test_where_nothing_is_attentions_or_a_feed_forwards_the_fix_is_one_that_there_is(
    kind: str, fix: str, scope: str
) -> None:
    """It has no target_modules that could be set."""
    model = zoo.NAMES[kind].build()
    with pytest.raises(tz.TanzakuError, match=f"knows no role that it could change; {fix}") as caught:
        tz.attach(model, tz.BitFit(bias_scope=scope), "x")
    assert "target_modules" not in str(caught.value)
    if "all" in fix:
        tz.attach(model, tz.BitFit(bias_scope="all"), "x")
