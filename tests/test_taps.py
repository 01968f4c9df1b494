"""What layers know of a pass beside their own module, in other people's programs: copies, threads, compiled code."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tanzaku as tz
from close import assert_close, close
from models import batch, tiny

METHODS = {
    "tap": lambda: tz.BottleneckAdapter(style="parallel", mh_adapter=True, reduction_factor=8),
    "places": lambda: tz.ReFT(r=2, prefix_positions=2, suffix_positions=1, dropout=0.0),
}
both = pytest.mark.parametrize("name", METHODS)


def with_two(name: str, kind: str = "llama") -> nn.Module:
    model = tiny(kind, "base")
    for seed, each in enumerate("ab"):
        adapter = tz.attach(model, METHODS[name](), each, seed=seed)
        with torch.no_grad():
            for _, parameter in adapter.trained():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return model


def run(model: nn.Module, entries: list[Any], **inputs: Tensor) -> Tensor:
    with torch.no_grad(), tz.route(model, entries):
        out = model(**inputs).last_hidden_state
    assert isinstance(out, Tensor)
    return out


@both
def test_a_copied_model_has_its_own(name: str) -> None:
    model = with_two(name)
    inputs = batch(model, padding="left")
    expected = run(model, ["a", "b", None, ("a", "b")], **inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.tanzaku.parameters():
                parameter.mul_(2)
        assert_close(run(twin, ["a", "b", None, ("a", "b")], **inputs), expected)
        assert not close(run(model, ["a", "b", None, ("a", "b")], **inputs), expected)
        with torch.no_grad():
            for parameter in model.tanzaku.parameters():
                parameter.div_(2)


@both
def test_threads_do_not_meet(name: str) -> None:
    model = with_two(name)
    given = [batch(model, seed=seed, padding="left") for seed in range(4)]
    entries = [["a"] * 4, ["b"] * 4, ["a", "b", None, "a"], [("b", "a")] * 4]
    expected = [run(model, each, **inputs) for each, inputs in zip(entries, given, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda at: run(model, entries[at], **given[at]), range(4))
            for one, other in zip(found, expected, strict=True):
                assert_close(one, other)


@both
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_compiled_code_is_one_graph(name: str, kind: str) -> None:
    model = with_two(name, kind)
    inputs = batch(model)
    entries = ["a", "b", None, ("a", "b")]
    expected = run(model, entries, **inputs)
    fast = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), tz.route(model, entries):
        for _ in range(2):
            assert_close(fast(**inputs).last_hidden_state, expected)
    with torch.no_grad(), tz.route(model, ["b"] * 4):
        assert_close(fast(**inputs).last_hidden_state, run(model, ["b"] * 4, **inputs))
