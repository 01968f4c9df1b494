"""HyperFormer: what the network writes, whose rows have which task, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tanzaku as tz
from close import assert_close, close
from models import batch, tiny
from tanzaku.methods.hyper import Hypernetwork

SMALL: dict[str, Any] = {"reduction_factor": 8, "embedding_dim": 6, "hidden_dim": 8}


def opened(adapter: tz.Adapter) -> Hypernetwork:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in adapter.trained():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    network = next(layer for _, layer in adapter.at() if isinstance(layer, Hypernetwork))
    return network


def logits(model: Any, entries: list[Any], tasks: list[int] | None = None) -> Tensor:
    context = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
    with torch.no_grad(), tz.route(model, entries, context=context):
        found = model(**batch(model, rows=len(entries))).logits
    assert isinstance(found, Tensor)
    return found


def test_an_adapter_is_what_the_network_writes() -> None:
    """Behind a sublayer: y + U g(D y), with D and U of that layer and place."""
    model = tiny("llama", "lm")
    adapter = tz.attach(model, tz.Hyper(num_tasks=1, **SMALL), "hyper", seed=0)
    network = opened(adapter)
    written = network.compute()
    paths = [path for path in adapter.paths if path]
    assert paths[:2] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"] and len(paths) == 4
    x = torch.randn(2, 3, 32)
    for number in (0, 2):
        module = model.get_submodule(paths[number])
        with torch.no_grad():
            y = module(x)
            down, down_bias, up, up_bias = (part[0] for part in written[number])
            expected = y + F.gelu(y @ down.T + down_bias) @ up.T + up_bias
            with tz.route(model, ["hyper"]):
                assert_close(module(x), expected)
    # Two layers' adapters differ, and come of one network: its gradient has to do with both.
    assert not close(written[0].down, written[2].down)


def test_parameters_are_as_many_as_is_said() -> None:
    model = tiny("llama", "lm")
    tz.attach(model, tz.Hyper(num_tasks=3, **SMALL), "hyper")
    e, h, b, w = 6, 8, 4, 32
    heads = e * (b * (2 * w + 1) + w) + b * (2 * w + 1) + w
    assert tz.count(model, "hyper").trainable == e * (3 + 2 + 2) + (3 * e * h + h) + (h * e + e) + heads


def test_each_row_has_its_own_task() -> None:
    """In one batch, beside another adapter and bare rows, as in a batch of its own."""
    model = tiny("llama", "lm")
    opened(tz.attach(model, tz.Hyper(num_tasks=3, **SMALL), "hyper", seed=0))
    tz.attach(model, tz.LoRA(r=2, init_lora_weights=False), "lora", seed=1)
    entries, tasks = ["hyper", "lora", "hyper", None, "hyper"], [2, 0, 0, 1, 1]
    mixed = logits(model, entries, tasks)
    for row in (0, 2, 4):
        with torch.no_grad(), tz.route(model, ["hyper"], context={"task_ids": torch.tensor([tasks[row]])}):
            own = model(**{key: each[[row]] for key, each in batch(model, rows=5).items()}).logits
        assert_close(mixed[[row]], own)
    others = logits(model, entries, [0, 0, 1, 1, 2])
    assert not close(mixed[0], others[0]) and not close(mixed[2], others[2])
    assert_close(mixed[1], others[1])
    assert_close(mixed[3], others[3])


def test_what_one_task_learns_is_not_in_anothers_vector() -> None:
    model = tiny("llama", "lm")
    network = opened(tz.attach(model, tz.Hyper(num_tasks=3, **SMALL), "hyper", seed=0))
    with tz.route(model, ["hyper"] * 2, context={"task_ids": torch.tensor([0, 2])}):
        model(**batch(model, rows=2)).logits.square().sum().backward()
    assert network.tasks.grad is not None
    assert [bool(row.any()) for row in network.tasks.grad] == [True, False, True]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_tasks": 0}, "found num_tasks=0, expected 1 or more"),
        ({"reduction_factor": 0}, "found reduction_factor=0"),
        (
            {"reduction_factor": 1e-9},
            "found reduction_factor=1e-09, which makes a bottleneck of more than [0-9,]+ features",
        ),
        ({"non_linearity": "geluu"}, "found non_linearity='geluu' .did you mean 'gelu'"),
        ({"mh_adapter": False, "output_adapter": False}, "without any adapter"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(tz.TanzakuError, match=says):
        tz.attach(tiny("llama", "lm"), tz.Hyper(**settings), "hyper")


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ({}, "reads 'task_ids' of each row"),
        ({"task_ids": torch.tensor([0, 3])}, r"task_ids: found \[0, 3\], expected 0 to 2"),
        ({"task_ids": torch.tensor([0.0, 1.0])}, "expected a whole number for each row"),
    ],
)
def test_bad_tasks(context: dict[str, Tensor], says: str) -> None:
    model = tiny("llama", "lm")
    tz.attach(model, tz.Hyper(num_tasks=3, **SMALL), "hyper")
    with pytest.raises(tz.TanzakuError, match=says), tz.route(model, ["hyper"] * 2, context=context):
        model(**batch(model, rows=2))
