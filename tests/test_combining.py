"""Combining adapters beside what HF PEFT's oracle says of it (tests/interop): properties, copies and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tanzaku as tz
from close import GRADIENT, assert_close, close
from models import batch, tiny
from tanzaku.core.delta import WeightDelta
from tanzaku.core.manager import manager_of
from tanzaku.merging.combine import HOW


@torch.no_grad()
def attached(model: nn.Module, name: str, method: tz.Method, seed: int = 0) -> tz.Adapter:
    adapter = tz.attach(model, method, name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def deltas(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    found = [(path, layer) for path, layer in manager_of(model).get(name).at() if isinstance(layer, WeightDelta)]
    return {path: layer.delta(model.get_submodule(path)).detach() for path, layer in found}


def pair(**more: Any) -> nn.Module:
    model = tiny("llama", "lm")
    attached(model, "a", tz.LoRA(r=2, **more), 1)
    attached(model, "b", tz.LoRA(r=2, **more), 2)
    return model


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
    rslora=st.booleans(),
    how=st.sampled_from(["cat", "svd"]),
)
def test_exact_rules_are_the_weighted_sum(ranks: list[int], data: st.DataObject, rslora: bool, how: str) -> None:
    """Whatever the ranks, scalings, signs and targets; adapters without a site there do not count."""
    model = tiny("llama", "lm")
    weights = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=len(ranks), max_size=len(ranks)))
    names = [f"n{i}" for i in range(len(ranks))]
    for i, (name, r) in enumerate(zip(names, ranks, strict=True)):
        targets = data.draw(st.lists(st.sampled_from(["q_proj", "v_proj", "down_proj"]), min_size=1, unique=True))
        layers = data.draw(st.sampled_from([None, [0], [1]]))
        method = tz.LoRA(r=r, lora_alpha=3, target_modules=targets, layers_to_transform=layers, use_rslora=rslora)
        attached(model, name, method, i)
    more = {"svd_rank": sum(ranks)} if how == "svd" else {}
    tz.combine(model, names, "new", weights=weights, how=how, **more)
    expected: dict[str, torch.Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        for path, delta in deltas(model, name).items():
            expected[path] = expected.get(path, 0) + weight * delta
    found = deltas(model, "new")
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        assert_close(found[path], delta, GRADIENT)


def test_the_parts_and_the_callers_draws_stay() -> None:
    model = pair()
    before = {name: p.clone() for each in "ab" for name, p in manager_of(model).get(each).named_parameters()}
    state = torch.get_rng_state()
    tz.combine(model, ["a", "b"], "new", how="dare_ties", density=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    tz.combine(model, ["a", "b"], "again", how="dare_ties", density=0.5, seed=3)
    tz.combine(model, ["a", "b"], "other", how="dare_ties", density=0.5, seed=4)
    after = {name: p for each in "ab" for name, p in manager_of(model).get(each).named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    new, again, other = (deltas(model, name) for name in ("new", "again", "other"))
    assert_close(again, new)
    assert not any(close(other[path], delta) for path, delta in new.items())


@pytest.mark.parametrize("copies", ["a", "b", "mean"])
def test_heads(copies: str) -> None:
    """Two heads are an error as in PEFT, unless it is said what to take."""
    model = tiny("llama", "cls")
    for seed, name in enumerate("ab"):
        attached(model, name, tz.LoRA(r=2), seed)
    with pytest.raises(tz.TanzakuError, match=r"a, b each have their own score.*copies='a'.*'mean'"):
        tz.combine(model, ["a", "b"], "new")
    assert tz.adapters(model) == ["a", "b"]
    tz.combine(model, ["a", "b"], "new", weights=[3, 1], copies=copies)

    def head(name: str) -> torch.Tensor:
        return dict(manager_of(model).get(name).named_parameters())["score.weight"]

    expected = 0.75 * head("a") + 0.25 * head("b") if copies == "mean" else head(copies)
    assert_close(head("new"), expected)
    with tz.route(model, ["new", None, "a", "new"]):
        assert model(**batch(model)).logits.isfinite().all()


def test_a_copy_that_one_alone_has_is_taken() -> None:
    model = tiny("llama", "lm")
    attached(model, "a", tz.LoRA(r=2), 1)
    attached(model, "b", tz.LoRA(r=2, modules_to_save=["lm_head"]), 2)
    tz.combine(model, ["a", "b"], "new", weights=[0.5, 0.1])
    own = dict(manager_of(model).get("new").named_parameters())
    assert torch.equal(own["lm_head.weight"], dict(manager_of(model).get("b").named_parameters())["lm_head.weight"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "how": ({"how": "tie"}, r"how='tie' \(did you mean 'ties'\?\)"),
    "no density": ({"how": "ties"}, "needs density"),
    "density": ({"how": "ties", "density": 0.0}, "density=0.0, expected a share above 0"),
    "density unused": ({"how": "svd", "density": 0.5}, "no use of density"),
    "rank unused": ({"how": "cat", "svd_rank": 2}, "no use of svd_rank"),
    "sign": ({"how": "ties", "density": 0.5, "majority_sign_method": "most"}, "'most'"),
    "sign unused": ({"how": "cat", "majority_sign_method": "frequency"}, "no use of majority_sign_method"),
    "rank": ({"how": "svd", "svd_rank": 0}, "svd_rank=0"),
    "clamp": ({"how": "svd", "svd_clamp": 2.0}, "svd_clamp=2.0"),
    "driver": ({"how": "svd", "svd_driver": "gesvd"}, "decomposition failed"),
    "weights": ({"weights": [1.0]}, "1 weights for 2 adapters"),
    "nan": ({"weights": [1.0, float("nan")]}, "finite"),
    "copies": ({"copies": "c"}, "copies='c'"),
    "taken": ({"name": "a"}, "attached already"),
    "unknown": ({"adapters": ["a", "bb"]}, "no adapter named 'bb'"),
    "none": ({"adapters": []}, "found no adapters"),
    "one": ({"adapters": ["a"], "how": "ties", "density": 0.5}, "one adapter for how='ties'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    """One line that says what to do, and no adapter more than before."""
    model = pair()
    with pytest.raises(tz.TanzakuError, match=message) as error:
        tz.combine(model, **{"adapters": ["a", "b"], "name": "new", **arguments})
    assert "\n" not in str(error.value) and tz.adapters(model) == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        (tz.LoRA(r=2), tz.IA3(), {}, "methods lora, ia3, expected one"),
        (tz.LoRA(r=2), tz.LoRA(r=3), {}, "ranks 2, 3"),
        (tz.LoRA(r=2), tz.AdaLoRA(init_r=2, target_r=1), {}, "methods lora, adalora"),
        (tz.AdaLoRA(init_r=2, target_r=1), tz.AdaLoRA(init_r=2, target_r=1), {}, "adalora has no rule"),
        (tz.PromptTuning(num_virtual_tokens=2), tz.PromptTuning(num_virtual_tokens=2), {}, "prompt_tuning has no rule"),
        (tz.IA3(), tz.IA3(), {"how": "svd"}, "how='svd' for ia3"),
        (
            tz.IA3(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
            tz.IA3(target_modules=["down_proj"], feedforward_modules=[]),
            {},
            "input by one adapter and at its output by another",
        ),
        (tz.LoRA(r=2, bias="all"), tz.LoRA(r=2), {}, "biases, which have no rule"),
        (
            tz.LoRA(r=2, rank_pattern={"q_proj": 4}),
            tz.LoRA(r=2, rank_pattern={"v_proj": 4}),
            {},
            "ranks 2, 4; .*q_proj",
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_does_not_go_together(first: tz.Method, second: tz.Method, options: dict[str, Any], message: str) -> None:
    model = tiny("llama", "lm", attention_bias=True)
    attached(model, "a", first, 1)
    attached(model, "b", second, 2)
    with pytest.raises(tz.TanzakuError, match=message):
        tz.combine(model, ["a", "b"], "new", **options)
    assert tz.adapters(model) == ["a", "b"]


def test_the_rules_by_hand() -> None:
    """TIES and DARE on numbers small enough to follow."""
    from tanzaku.merging.combine import _Rule

    x, y = torch.tensor([4.0, -1.0, 3.0, 0.5]), torch.tensor([-2.0, -3.0, 5.0, 0.1])
    ties = _Rule("ties", 0.5, "total", None)
    # The larger two of each: (4, 0, 3, 0) and (0, -3, 5, 0); signs +, -, +, +; means of those that agree.
    assert_close(ties([x, y], [1.0, 1.0]), torch.tensor([4.0, -3.0, 4.0, 0.0]))
    dare = _Rule("dare_linear", 0.25, "total", torch.Generator().manual_seed(0))
    ones = dare([torch.ones(100_000)], [1.0])
    assert set(ones.unique().tolist()) == {0.0, 4.0} and float(ones.mean()) == pytest.approx(1, abs=0.03)
    assert set(HOW) >= {"linear", "cat", "svd", "ties", "dare_ties_svd", "magnitude_prune_svd"}
