"""Packed batches: the numbers of the plain, padded model, and nothing left behind."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.routing import Cut, Ragged
from tanzaku.engine import products
from tanzaku.engine.acceleration import Common
from tanzaku.engine.attention import RowAttention
from tanzaku.engine.layout import Layout
from tanzaku.engine.order import ABOVE
from tanzaku.engine.packing import Packing
from tanzaku.engine.skipping import SkipUnneeded
from tanzaku.engine.trim import LastToken
from tanzaku.models.families import Base
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

CPU = torch.device("cpu")
HUNG = {
    "lora": (tz.LoRA(r=2, target_modules="all-linear"), 0),
    "more lora": (tz.LoRA(r=2, target_modules="all-linear"), 0),
    "ia3": (tz.IA3(), 0),
    "prompt": (tz.PromptTuning(num_virtual_tokens=3), 3),
    "prefix": (tz.PrefixTuning(num_virtual_tokens=2), 0),
    "gated": (tz.LlamaAdapter(adapter_layers=1, adapter_len=3), 0),
    "head": (tz.Head(), 0),
}


def adapted(model: PreTrainedModel, names: list[str]) -> list[Any]:
    adapters = [tz.attach(model, HUNG[name][0], name.replace(" ", "-"), seed=n) for n, name in enumerate(names)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters:
            for _, parameter in adapter.trained():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapters


def both(
    model: PreTrainedModel, names: list[str], rows: list[int], width: int | None = None
) -> tuple[list[Any], list[Any], list[int]]:
    """Logits and gradients of rows routed to these adapters, by the plain model and packed; and how many rows each
    layer's norm saw."""
    adapters = adapted(model, names)
    inputs = {key: value[:, :width] for key, value in batch(model, rows=len(rows)).items()}
    entries = [adapters[row].name for row in rows]
    lengths = inputs["attention_mask"].sum(1).tolist()
    virtual = [HUNG[names[row]][1] for row in rows]
    lead = max(virtual)
    base = Base.of(model)
    common = Common(base)
    layout = Layout(
        lead + inputs["input_ids"].shape[1],
        [0] * len(virtual),
        [v + length for v, length in zip(virtual, lengths, strict=True)],
        [-1 for row in rows],  # gradients are needed everywhere
        CPU,
        packed=True,
    )
    trained = [p for adapter in adapters for _, p in adapter.trained()]
    seen: list[int] = []
    found = []
    for packed in (False, True):
        handle = base.attention()[0][1].register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
        )
        with ExitStack() as stack:
            stack.enter_context(tz.route(model, entries))
            if packed:
                route = manager_of(model).route
                members = [
                    stack.enter_context(kind(common)) for kind in (Packing, RowAttention, LastToken, SkipUnneeded)
                ]
                packing = members[0]
                assert isinstance(packing, Packing) and packing.possible and route is not None
                for member in members:
                    stack.enter_context(member.batch(layout, route))
            logits = model(**inputs, use_cache=False).logits
            gradients = torch.autograd.grad(logits.square().sum(), trained, allow_unused=True)
        handle.remove()
        found.append(
            [logits, *(torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True))]
        )
    assert seen == [len(rows), sum(layout.lengths)]
    assert packing.layout is None and not packing._masks  # nothing of a batch is kept
    return found[0], found[1], seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2", "mistral"])
def test_logits_and_gradients_are_those_of_the_padded_batch(kind: str, attention: str) -> None:
    model = tiny(kind, attn_implementation=attention)
    expected, found, _ = both(model, list(HUNG), [0, 0, 1, 2, 3, 4, 5, 6])
    assert any(g.any() for g in expected[1:])
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, GRADIENT)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_rows_of_a_single_token(kind: str, attention: str) -> None:
    model = tiny(kind, attn_implementation=attention)
    expected, found, _ = both(model, list(HUNG), [0, 1, 2, 3, 4, 4, 5, 6], width=1)
    assert_close(list(found), list(expected), GRADIENT)  # some are zero but for rounding: attention to one key


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["lora", "prompt", "prefix", "gated"])
def test_a_window_that_is_shorter_than_the_rows(name: str, attention: str) -> None:
    model = tiny("mistral", sliding_window=3, attn_implementation=attention)
    expected, found, _ = both(model, [name, "ia3"], [0, 1, 0])
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, GRADIENT)
    wide = both(tiny("mistral", sliding_window=50, attn_implementation=attention), [name, "ia3"], [0, 1, 0])[0]
    assert not torch.allclose(wide[0], expected[0])


def test_one_adapter_for_all_rows_and_rows_that_are_scattered() -> None:
    for rows in ([0, 0, 0], [0, 1, 0, 1]):
        expected, found, _ = both(tiny("llama"), ["lora", "prompt"][: max(rows) + 1], rows)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, GRADIENT)


def test_in_the_last_layer_one_token_a_row_asks_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda x, *rest: tokens.append(x.shape[0]) or multiply(x, *rest))
    *_, (rows, own) = both(tiny("llama"), ["prompt"], [0, 0, 0])
    # Forward and backward: keys and values of all tokens, and of one a row queries and what lies behind them.
    first, last = 7, 2
    assert tokens.count(own) == 2 * (first + last) and tokens.count(rows) == 2 * 5


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    both(model, ["lora"], [0, 0])
    tz.detach(model, "lora")
    for path, module in model.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("kind", "head"), [("bert", "cls"), ("gpt2", "cls"), ("llama", "lm"), ("t5", "cls")])
def test_other_models_are_not_packed(kind: str, head: str) -> None:
    assert not Packing(Common(Base.of(tiny(kind, head)))).possible


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=5), st.integers(0, 3))
def test_ragged_rows_come_back_with_their_gradients(rows: list[tuple[int, int]], more: int) -> None:
    starts, lengths = [s for s, _ in rows], [n for _, n in rows]
    width = max(s + n for s, n in rows) + more
    ragged = Ragged.of(width, starts, lengths, CPU)
    x = torch.randn(sum(lengths), 2, requires_grad=True)
    padded = ragged.pad(x)
    token = 0
    for row, (start, length) in enumerate(rows):
        assert_close(padded[row * width + start :][:length], x[token : token + length])
        token += length
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((ragged.pack(padded * 2) * weights).sum(), x)
    assert_close(gradient, 2 * weights)


def test_lowest_layers_make_slices_where_rows_are_sorted_by_them() -> None:
    layout = Layout(4, [0, 0, 0], [3, 4, 2], [0, 1, ABOVE], CPU, packed=True)
    assert layout.places() is None
    assert layout.places(0) == slice(0, 3) and layout.places(1) == slice(0, 7)
    last = layout.places(1, last=True)
    assert isinstance(last, torch.Tensor) and last.tolist() == [2, 6]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=4), st.integers(0, 2), st.randoms())
def test_a_cut_tensor_is_put_together_again(gaps: list[tuple[int, int]], rest: int, random: Random) -> None:
    """Rows of some groups doubled, the others as they are; and each gets its own gradient."""
    groups, at = [], 0
    for gap, size in gaps:
        groups.append(slice(at + gap, at + gap + size))
        at += gap + size
    random.shuffle(groups)
    x = torch.randn(at + rest, 2, requires_grad=True)
    cut = Cut(x, groups)
    for rows, part in zip(groups, cut.parts, strict=True):
        assert torch.equal(part, x[rows])
    factor = torch.ones(at + rest, 1)
    for rows in groups:
        factor[rows] = 2
    y = cut.put([part * 2 for part in cut.parts])
    assert_close(y, x * factor)
    if len(x):
        weights = torch.randn_like(x)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        assert_close(gradient, weights * factor)


def test_a_job_whose_texts_end_with_the_padding_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the end of a text, too: the classifier reads the token before, packed or not."""
    data = task((4, 9, 3), train=6, end=0)
    train = TrainSettings(epochs=1, batch_size=3, learning_rate=0.01)
    found = []
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(Packing, "possible", property(lambda self: False))
        jobs = [Job("lora", tz.LoRA(r=2), train), Job("prompt", tz.PromptTuning(num_virtual_tokens=2), train)]
        results = train_jobs(tiny("llama", num_labels=2), data, jobs, out=tmp_path / str(packed))
        assert all(r.valid is not None for r in results)
        found.append([[r.epochs[0].train_loss, *(r.valid or {}).values()] for r in results])
    assert_close(found[0], found[1], GRADIENT)
