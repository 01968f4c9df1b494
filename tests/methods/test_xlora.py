"""X-LoRA: what the gate is asked, whose tokens take what, texts that go on from caches, what is trained, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tanzaku as tz
from close import assert_close, close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.errors import TanzakuError
from tanzaku.methods.xlora import Gate

PARTS = {"p1": tz.LoRA(r=2), "p2": tz.LoRA(r=3), "p3": tz.LoRA(r=1)}


def model_with(kind: str = "llama", head: str = "lm", name: str = "x", **settings: Any) -> Any:
    model = tiny(kind, head)
    for number, (part, method) in enumerate(PARTS.items()):
        if part not in tz.adapters(model):
            scatter([p for _, p in tz.attach(model, copy.deepcopy(method), part, seed=number).trained()], seed=number)
    attached(model, name, **settings)
    return model


def attached(model: Any, name: str, seed: int = 7, **settings: Any) -> Gate:
    adapter = tz.attach(model, tz.XLora(adapters=list(PARTS), **settings), name, seed=seed)
    scatter([p for _, p in adapter.trained()], seed=seed)
    return next(layer for _, layer in adapter.at() if isinstance(layer, Gate))


def logits(model: Any, entries: list[Any], **given: Tensor) -> Tensor:
    given = given or batch(model, rows=len(entries))
    with torch.no_grad(), tz.route(model, entries):
        out = model(**given).logits
    assert isinstance(out, Tensor)
    return out


@torch.no_grad()
def test_a_gate_that_asks_for_one_adapter_is_that_adapter() -> None:
    model = model_with()
    gate = next(layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, Gate))
    last = gate.internal_xlora_classifier["layers"]["0"]
    last.weight.zero_()
    for number, part in enumerate(PARTS):
        last.bias.copy_(torch.full((3,), -60.0).index_fill(0, torch.tensor(number), 60.0))
        given = batch(model, rows=2, padding=None)
        assert_close(logits(model, ["x"] * 2, **given), logits(model, [part] * 2, **given), 2**9)


@torch.no_grad()
def test_the_gate_reads_the_bare_base() -> None:
    """A token's share is the softmax of the gate's outputs for its own last hidden state in the base."""
    model = model_with()
    gate = next(layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, Gate))
    given = batch(model, rows=3, padding="left")
    with tz.route(model, [None]):
        hidden = model(**given, output_hidden_states=True).hidden_states[-1]
    logits(model, ["x"] * 3, **given)
    last = gate.internal_xlora_classifier["layers"]["0"]
    expected = (hidden @ last.weight.T + last.bias).softmax(-1)
    table = gate.value().table[:, :, 0]
    for row, mask in enumerate(given["attention_mask"].bool()):
        assert_close(table[row, : int(mask.sum())], expected[row, mask])
        assert not table[row, int(mask.sum()) :].any()


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_rows_are_isolated(kind: str) -> None:
    """Beside bare rows, one of its own parts, virtual tokens and another gate, whatever the padding."""
    model = model_with(kind)
    attached(model, "y", seed=9, layerwise_scalings=True, top_k_lora=2)
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=3), "prompt", seed=1)
    entries = ["x", "prompt", "y", None, "p1", "x"]
    given = batch(model, rows=6, padding="right")
    mixed = logits(model, entries, **given)
    for row, entry in enumerate(entries):
        own = logits(model, [entry], **{key: value[[row]] for key, value in given.items()})
        mask = given["attention_mask"][row].bool() if mixed.shape[1] == given["input_ids"].shape[1] else slice(None)
        assert_close(mixed[row][mask], own[0][mask], at=str(entry))
    assert not close(mixed[0], mixed[5])


@torch.no_grad()
def test_a_text_may_come_in_pieces() -> None:
    """With a cache, the bare base has one of its own beside it: each token takes what it takes in the whole text."""
    model = model_with()
    ids = batch(model, rows=2, length=9, padding=None)["input_ids"]
    whole = logits(model, ["x"] * 2, input_ids=ids)
    cache, parts = DynamicCache(), []
    with tz.route(model, ["x"] * 2):
        for piece in ids.split([4, 1, 3, 1], dim=1):
            parts.append(model(input_ids=piece, past_key_values=cache).logits)
    assert_close(torch.cat(parts, 1), whole)
    # What is cut off the one is cut off the other.
    cache.crop(-4)
    with tz.route(model, ["x"] * 2):
        again = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    assert_close(again, whole[:, 5:])
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(-1)
    with tz.route(model, ["x"]):
        last = model(input_ids=ids[1:, 8:], past_key_values=copy.deepcopy(cache)).logits
    assert_close(last, whole[1:, 8:])


@torch.no_grad()
def test_a_text_goes_on_beside_virtual_tokens_of_other_rows() -> None:
    """Which a cache holds, too; and no mask says how many there are."""
    model = model_with()
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=3), "prompt", seed=0)
    ids = batch(model, rows=2, length=9, padding=None)["input_ids"]
    cache = DynamicCache(config=model.config.get_text_config())
    with tz.route(model, ["x", "prompt"]):
        parts = [model(input_ids=piece, past_key_values=cache).logits for piece in ids.split([5, 1, 3], dim=1)]
    with tz.route(model, ["x"]):
        assert_close(torch.cat(parts, 1)[:1], model(input_ids=ids[:1]).logits)


@torch.no_grad()
def test_a_cache_that_was_begun_without_it_is_refused() -> None:
    model = model_with()
    ids = batch(model, rows=2, length=6, padding=None)["input_ids"]
    cache = DynamicCache()
    with tz.route(model, ["p1"] * 2):
        model(input_ids=ids[:, :4], past_key_values=cache)
    with tz.route(model, ["x"] * 2), pytest.raises(TanzakuError, match="tokens that were read without it"):
        model(input_ids=ids[:, 4:], past_key_values=cache)
    # Nor may another route go on in between.
    cache = DynamicCache()
    for entry, piece in zip(("x", "p1"), ids.split([2, 2, 2], dim=1), strict=False):
        with tz.route(model, [entry] * 2):
            model(input_ids=piece, past_key_values=cache)
    with tz.route(model, ["x"] * 2), pytest.raises(TanzakuError, match="tokens that were read without it"):
        model(input_ids=ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_and_without_a_cache(kind: str, options: dict[str, Any]) -> None:
    model = model_with(kind)
    given = batch(model, rows=3, length=6, padding="left")
    given.pop("decoder_input_ids", None)
    found = []
    for use_cache in (True, False):
        with tz.route(model, ["x", "p2", "x"]):
            found.append(
                model.generate(
                    **given, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0, **options
                )
            )
    assert torch.equal(*found)


def test_the_gate_alone_is_trained() -> None:
    model = model_with(xlora_depth=2, xlora_size=8)
    tz.activate(model, "x")
    model(**batch(model)).logits.square().mean().backward()
    trained = dict(manager_of(model).get("x").trained())
    assert all("classifier" in name for name in trained) and all(p.grad.any() for p in trained.values())
    assert not any(p.grad is not None for part in PARTS for _, p in manager_of(model).get(part).trained())


def test_dropout_of_the_gate_is_drawn_once_a_pass() -> None:
    """A checkpointed layer that runs again has the numbers of its first run, also where it asks the gate anew."""
    model = model_with(xlora_depth=3, xlora_size=8, xlora_dropout_p=0.5)
    tz.activate(model, "x")
    given = batch(model)
    found = []
    for reentrant in (None, False, True):
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**given).logits.square().mean().backward()
        trained = dict(manager_of(model).get("x").trained())
        found.append({name: p.grad.clone() for name, p in trained.items()})
        for p in trained.values():
            p.grad = None
    assert_close(found[1], found[0], 2**9)
    assert_close(found[2], found[0], 2**9)


@torch.no_grad()
def test_a_file_brings_its_adapters(tmp_path: Path) -> None:
    model, other = model_with(), tiny("llama", "lm")
    tz.save(model, "x", tmp_path / "x")
    expected = logits(model, ["x"] * 2)
    tz.load(other, tmp_path / "x", "mine")
    assert_close(logits(other, ["mine"] * 2), expected)
    tz.detach(other, "mine")
    assert tz.adapters(other) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"xlora_depth": 0}, "xlora: found xlora_depth=0, expected 1 or more"),
        ({"xlora_dropout_p": 1.0}, "xlora: found xlora_dropout_p=1.0, expected a probability below 1"),
        ({"softmax_temperature": 0.0}, "xlora: found softmax_temperature=0.0, expected more than 0"),
        ({"top_k_lora": 4}, "xlora: found top_k_lora=4, expected None, or 1 to 3"),
        ({"scaling_pass_value": 0.5}, "xlora: found scaling_pass_value=0.5, expected 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(TanzakuError, match=expected):
        model_with(**settings)


@pytest.mark.parametrize("part", [tz.MiSS(r=4), tz.LoRA(r=2, use_dora=True)], ids=["miss", "dora"])
def test_other_adapters_are_refused(part: tz.Method) -> None:
    model = tiny("llama", "lm")
    for name, method in {"a": tz.LoRA(r=2), "b": part}.items():
        tz.attach(model, method, name)
    with pytest.raises(TanzakuError, match=r"xlora: found 'b', of .*, expected adapters of lora without use_dora"):
        tz.attach(model, tz.XLora(adapters=["a", "b"]), "x")


def test_a_module_by_itself_has_no_text() -> None:
    model = model_with()
    with tz.route(model, ["x"]), pytest.raises(TanzakuError, match="expected a pass of the whole model"):
        model.model.layers[0].self_attn.q_proj(torch.randn(1, 3, 32))
