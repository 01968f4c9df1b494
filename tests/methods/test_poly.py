"""Polytropon: which task takes what, what is drawn for it in training, and bad input."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tanzaku as tz
from close import RUN, assert_close, close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.core.dropout import JobDropout, JobSlice
from tanzaku.core.manager import manager_of
from tanzaku.core.method import Method
from tanzaku.core.routing import Route
from tanzaku.errors import TanzakuError
from tanzaku.methods.poly import PolyDelta
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task


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


def test_training_draws_for_each_row_and_evaluation_draws_nothing() -> None:
    model = tiny("llama")
    opened(model, n_tasks=1)
    tz.activate(model, "x")
    given = {key: value[:1].expand(3, -1) for key, value in batch(model, padding=None).items()}
    state = torch.get_rng_state()
    plain = model(**given).logits
    assert_close(model(**given).logits, plain)
    assert_close(plain[1:], plain[:1].expand(2, -1))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    drawn = model(**given).logits
    assert not close(drawn[0], drawn[1]) and not close(drawn, plain) and not close(model(**given).logits, drawn)


@pytest.mark.parametrize("splits", [1, 4, 8])
def test_a_row_draws_the_same_whatever_shares_the_batch(splits: int) -> None:
    """Also where there are as many blocks as tokens, of which the row has fewer than the batch."""
    model = tiny("llama")
    opened(model, n_splits=splits)
    opened(model, "y", r=3)
    model.train()
    whole = batch(model, rows=5, length=8, padding=None)["input_ids"]

    def said(tokens: int, *counts: tuple[str, int]) -> Tensor:
        entries = [name for name, rows in counts for _ in range(rows)]
        ids = whole[: len(entries), :tokens].clone()
        mask = torch.ones_like(ids)
        ids[:2, 6:], mask[:2, 6:] = 0, 0
        ends = torch.tensor([0, *(rows for _, rows in counts)]).cumsum(0).tolist()
        widths = [6, 8]
        shares = [JobSlice(slice(a, b), 0, widths[n], seed=a) for n, (a, b) in enumerate(pairwise(ends))]
        route = Route.of(entries)
        route.context = {"task_ids": torch.arange(len(entries)) % 3}
        with manager_of(model).routed(route), JobDropout(route, shares, tokens, 0):
            out: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return out[:2]

    assert_close(said(8, ("x", 2), ("y", 3)), said(6, ("x", 2)))


DATA = replace(task((5, 8, 3), train=6), valid=None)


def weights(out: Path, **jobs: tuple[Method, int]) -> dict[str, Tensor]:
    """Those of job `a`, after all have been trained on a model whose batches are packed where nobody draws."""
    settings = TrainSettings(epochs=2, learning_rate=0.002, adam_epsilon=1e-3, batch_size=2)
    made = [
        Job(name, copy.deepcopy(method), settings.model_copy(update={"seed": seed}))
        for name, (method, seed) in jobs.items()
    ]
    results = train_jobs(tiny("llama", num_labels=2), DATA, made, out=out)
    assert [(r.status, r.error) for r in results] == [("done", None)] * len(made)
    return load_file(out / "adapters" / "a" / "adapter_model.safetensors")


def test_a_run_draws_the_same_alone_and_beside_others(tmp_path: Path) -> None:
    drawn = tz.Poly(r=2, n_splits=4, init_weights=False)
    alone = weights(tmp_path / "alone", a=(drawn, 1))
    others = {
        "b": (drawn, 2),
        "c": (tz.LoRA(r=2, lora_dropout=0.3), 3),
        "d": (tz.PromptTuning(num_virtual_tokens=2), 4),
    }
    assert_close(weights(tmp_path / "beside", a=(drawn, 1), **others), alone, 4 * RUN)


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
