"""transformers' own adapter loading, and PEFT's Auto classes, on files of Tanzaku's: the same logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import tanzaku as tz
from close import assert_close
from interop.oracle import PLAIN, PROMPT_LEARNING, method, scatter
from models import batch, tiny
from tiers import in_families

# (family, head) -> transformers' Auto class, PEFT's.
BASES: dict[tuple[str, str], tuple[Any, Any]] = {
    ("llama", "cls"): (AutoModelForSequenceClassification, peft.AutoPeftModelForSequenceClassification),
    ("qwen2", "lm"): (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM),
    ("gpt2", "lm"): (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM),
    ("bert", "cls"): (AutoModelForSequenceClassification, peft.AutoPeftModelForSequenceClassification),
    ("t5", "lm"): (AutoModelForSeq2SeqLM, peft.AutoPeftModelForSeq2SeqLM),
    ("vit", "cls"): (AutoModelForImageClassification, peft.AutoPeftModel),
    ("llama", "base"): (AutoModel, peft.AutoPeftModelForFeatureExtraction),
}
INJECTED: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "lora_alpha": 5},
    "adalora": PLAIN["adalora"],
    "ia3": {},
}


def said(model: Any, given: dict[str, Tensor]) -> Tensor:
    out = model(**given)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


def saved(kind: str, head: str, name: str, settings: dict[str, Any], folder: Path) -> tuple[PreTrainedModel, Any, Any]:
    """A base in `folder`/base, an adapter in `folder`/a; the base loaded anew, inputs, and what the adapter says."""
    tiny(kind, head).save_pretrained(folder / "base")
    auto = BASES[kind, head][0]
    base = auto.from_pretrained(folder / "base").eval()
    fresh = copy.deepcopy(base)
    given = batch(base, padding=None)
    scatter([p for _, p in tz.attach(base, method(name, settings), "a", seed=0).trained()])
    tz.save(base, "a", folder / "a")
    bare = said(base, given)
    tz.activate(base, "a")
    expected = said(base, given)
    assert (expected - bare).abs().max() > 1e-2, "the adapter changes nothing, so nothing was compared"
    return fresh, given, expected


CASES = [
    pytest.param(kind, head, name, settings, id=f"{kind}-{head}-{name}")
    for kind, head in BASES
    for name, settings in INJECTED.items()
]


@in_families(("kind", "head", "name", "settings"), CASES)
@torch.no_grad()
def test_load_adapter(kind: str, head: str, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """`model.load_adapter`, under a name of its own, and `from_pretrained` of the adapter's directory."""
    model, given, expected = saved(kind, head, name, settings, tmp_path)
    model.load_adapter(str(tmp_path / "a"), adapter_name="poems")
    model.set_adapter("poems")
    assert model.active_adapters() == ["poems"]
    assert_close(said(model, given), expected)
    again = BASES[kind, head][0].from_pretrained(tmp_path / "a").eval()
    assert_close(said(again, given), expected)


@in_families(
    ("kind", "head", "name", "settings"),
    [
        *CASES,
        *[
            pytest.param(kind, "lm", name, PLAIN[name], id=f"{kind}-lm-{name}")
            for kind in ("qwen2", "gpt2")
            for name in PROMPT_LEARNING
        ],
    ],
)
@torch.no_grad()
def test_peft_finds_the_base_itself(kind: str, head: str, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """AutoPeftModel reads the base's directory, its class and the task from the adapter's settings."""
    _, given, expected = saved(kind, head, name, settings, tmp_path)
    given = {**given, "attention_mask": torch.ones_like(given["input_ids"])} if "input_ids" in given else given
    found = BASES[kind, head][1].from_pretrained(tmp_path / "a").eval()
    # PEFT's logits have the virtual tokens, too.
    assert_close(said(found, given)[:, -expected.shape[1] :], expected)
    assert peft.PeftConfig.from_pretrained(tmp_path / "a").base_model_name_or_path == str(tmp_path / "base")


@torch.no_grad()
def test_two_adapters_in_one_model_of_transformers(tmp_path: Path) -> None:
    """Files of two adapters, loaded side by side and switched, say what each says here; so does one added by PEFT."""
    model, given, first = saved("qwen2", "lm", "lora", {"r": 2}, tmp_path)
    base = copy.deepcopy(model)
    scatter([p for _, p in tz.attach(base, tz.LoRA(r=3, target_modules=["up_proj"]), "b", seed=1).trained()], seed=2)
    tz.save(base, "b", tmp_path / "b")
    tz.activate(base, "b")
    second = said(base, given)
    model.load_adapter(str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    for name, expected in (("a", first), ("b", second), ("a", first)):
        model.set_adapter(name)
        assert_close(said(model, given), expected)


@torch.no_grad()
def test_an_adapter_added_and_saved_by_transformers_loads_here(tmp_path: Path) -> None:
    """`add_adapter` and `save_pretrained` of a plain transformers model write a file that Tanzaku reads."""
    base = tiny("qwen2", "lm")
    model = copy.deepcopy(base)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), adapter_name="poems")
    scatter([p for n, p in model.named_parameters() if "lora_" in n])
    model.save_pretrained(tmp_path)
    given = batch(base)
    tz.load(base, tmp_path, "a")
    tz.activate(base, "a")
    assert_close(said(base, given), said(model, given))
