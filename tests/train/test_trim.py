"""Skipping what a classifier never reads changes neither logits nor gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.engine.acceleration import Common
from tanzaku.engine.layout import Layout
from tanzaku.engine.order import ABOVE
from tanzaku.engine.trim import LastToken, last_layer_modules, pooled_columns
from tanzaku.models.families import Base

METHODS = {
    "lora": tz.LoRA(r=2, target_modules="all-linear"),
    "prompt_tuning": tz.PromptTuning(num_virtual_tokens=3),
    "prefix_tuning": tz.PrefixTuning(num_virtual_tokens=3),
    "ia3": tz.IA3(),
    "llama_adapter": tz.LlamaAdapter(adapter_layers=1, adapter_len=3),
}


def padded(model: PreTrainedModel, given: dict[str, torch.Tensor], virtual: list[int]) -> Layout:
    """Where the tokens of rows are that have so many virtual ones before them."""
    ids = given["input_ids"]
    rows, width = ids.shape
    columns = pooled_columns(Base.of(model), ids)
    assert columns is not None
    read = [before + column for before, column in zip(virtual, columns, strict=True)]
    lengths = [before + width for before in virtual]
    return Layout(max(virtual) + width, [0] * rows, lengths, [ABOVE] * rows, ids.device, read=read)


# Texts are padded on the right in training, which virtual tokens count on.
@pytest.mark.parametrize(("method", "padding"), [*((m, "right") for m in METHODS), ("lora", "left"), ("ia3", "left")])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
def test_logits_and_gradients_are_the_same(kind: str, method: str, padding: str) -> None:
    model = tiny(kind)
    adapter = tz.attach(model, METHODS[method], "a", seed=0)
    with torch.no_grad():
        for _, p in adapter.trained():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    given = batch(model, padding=padding)
    pooled = LastToken(Common(manager_of(model).base))
    virtual = adapter.virtual
    seen = []
    with tz.route(model, ["a", None, "a", "a"]):
        for trim in (False, True):
            if trim:
                with pooled.batch(padded(model, given, [virtual, 0, virtual, virtual]), None):
                    logits = model(**given, use_cache=False).logits
            else:
                logits = model(**given, use_cache=False).logits
            logits.pow(2).sum().backward()
            seen.append([logits, *(p.grad for _, p in adapter.trained())])
            for _, p in adapter.trained():
                p.grad = None
    for whole, less in zip(*seen, strict=True):
        assert_close(less, whole, GRADIENT)


def test_the_last_feed_forward_sees_one_token_a_row() -> None:
    model = tiny("llama")
    given = batch(model)
    lengths = []
    base = Base.of(model)
    last_layer_modules(base)[-1].register_forward_hook(lambda m, args, y: lengths.append(y.shape[1]))
    with LastToken(Common(base)).batch(padded(model, given, [0] * 4), None):
        model(**given)
    model(**given)
    assert lengths == [1, given["input_ids"].shape[1]]


@pytest.mark.parametrize(("kind", "head"), [("bert", "cls"), ("gpt2", "cls"), ("llama", "lm")])
def test_other_models_are_left_alone(kind: str, head: str) -> None:
    assert last_layer_modules(Base.of(tiny(kind, head))) == []
