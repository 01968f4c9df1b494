"""Polytropon: which task takes what, what is drawn for it in training, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tanzaku as tz
from close import assert_close, close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.errors import TanzakuError
from tanzaku.methods.poly import PolyDelta


def opened(model: Any, name: str = "x", **settings: Any) -> tz.Adapter:
    adapter = tz.attach(model, tz.Poly(**{"r": 2, "n_tasks": 3, "n_skills": 2, **settings}), name, seed=0)
    scatter([p for _, p in adapter.trained()])
    return adapter


def logits(model: Any, entries: list[Any], tasks: list[int]) -> Tensor:
    with torch.no_grad(), tz.route(model, entries, context={"task_ids": torch.tensor(tasks)}):
        found = model(**batch(model, rows=len(entries))).logits
    assert isinstance(found, Tensor)
    return found


def test_each_row_has_its_own_task() -> None:
    """In one batch, beside another adapter and bare rows, as in a batch of its own."""
    model = tiny("llama", "lm")
    opened(model)
    tz.attach(model, tz.LoRA(r=2, init_lora_weights=False), "lora", seed=1)
    entries, tasks = ["x", "lora", "x", None, "x"], [2, 0, 0, 1, 1]
    mixed = logits(model, entries, tasks)
    for row in (0, 2, 4):
        with torch.no_grad(), tz.route(model, ["x"], context={"task_ids": torch.tensor([tasks[row]])}):
            own = model(**{key: each[[row]] for key, each in batch(model, rows=5).items()}).logits
        assert_close(mixed[[row]], own)
    others = logits(model, entries, [0, 0, 1, 1, 2])
    assert not close(mixed[0], others[0]) and not close(mixed[2], others[2])
    assert_close(mixed[1], others[1])
    assert_close(mixed[3], others[3])


@torch.no_grad()
def test_a_task_takes_skills_by_its_logits() -> None:
    """With one split, whatever lies far below the others is left out, and what is alone is taken whole."""
    model = tiny("llama", "lm")
    layer = next(each for _, each in opened(model).at() if isinstance(each, PolyDelta))
    module = model.model.layers[0].self_attn.q_proj
    layer.poly_router.module_logits.copy_(torch.tensor([[9.0, -60.0], [-60.0, 9.0], [0.0, 0.0]]))
    x = torch.randn(3, 4, 32)
    with tz.route(model, ["x"] * 3, context={"task_ids": torch.arange(3)}):
        added = module(x) - torch.nn.functional.linear(x, module.weight, module.bias)
    a, b = layer.poly_lora_A[0], layer.poly_lora_B[0]
    for row, (own_a, own_b) in enumerate([(a[0], b[0]), (a[1], b[1]), (a.mean(0), b.mean(0))]):
        assert_close(added[row], x[row] @ own_a @ own_b / 2, scale=2**-2)


@torch.no_grad()
def test_splits_choose_by_themselves() -> None:
    model = tiny("llama", "lm")
    layer = next(each for _, each in opened(model, n_splits=2, n_tasks=1).at() if isinstance(each, PolyDelta))
    module = model.model.layers[0].self_attn.q_proj
    layer.poly_router.module_logits.copy_(torch.tensor([[9.0, -60.0, -60.0, 9.0]]))
    x = torch.randn(3, 4, 32)
    with tz.route(model, ["x"]):
        added = module(x) - torch.nn.functional.linear(x, module.weight, module.bias)
    a, b = layer.poly_lora_A, layer.poly_lora_B
    z = x[..., :16] @ a[0, 0] + x[..., 16:] @ a[1, 1]
    assert_close(added, torch.cat([z @ b[0, 0], z @ b[1, 1]], -1) / 2, scale=2**-2)
    assert_close(x @ layer.delta(module).T, added, scale=2**-2)


def test_what_tasks_take_is_learnt_faster() -> None:
    adapter = opened(tiny("llama"))
    rates = {name: adapter.method.rate_of(name) for name, _ in adapter.trained() if "poly" in name}
    assert {rate for name, rate in rates.items() if "router" in name} == {100.0}
    assert {rate for name, rate in rates.items() if "router" not in name} == {1.0}


def test_several_tasks_are_not_merged() -> None:
    model = tiny("llama")
    opened(model)
    with pytest.raises(TanzakuError, match=r"poly: .* cannot be merged"):
        tz.merge(model, "x")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"n_skills": 0}, "poly: found n_skills=0, expected 1 or more"),
        ({"n_splits": 5}, r"poly: found n_splits=5 at .*q_proj, of 32 and 32 features, expected a divisor of both"),
        ({"target_modules": ["embed_tokens"]}, "poly: found model.embed_tokens, a Embedding"),
    ],
)
def test_bad_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(TanzakuError, match=expected):
        tz.attach(tiny("llama"), tz.Poly(**settings), "x")


def test_rows_say_their_task() -> None:
    model = tiny("llama")
    opened(model)
    for tasks, expected in (
        ([0, 3], "task_ids: found .0, 3., expected 0 to 2"),
        (None, "reads 'task_ids' of each row"),
    ):
        context = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
        with pytest.raises(TanzakuError, match=expected), tz.route(model, ["x"] * 2, context=context):
            model(**batch(model, rows=2))
