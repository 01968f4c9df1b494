"""Counts of parameters are PEFT's."""

from __future__ import annotations

import functools

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import tanzaku as tz
from interop.oracle import CONFIGS, PLAIN, config, in_peft, method
from models import tiny
from tiers import in_families


def our_counts(base: torch.nn.Module, name: str, settings: dict[str, object]) -> tuple[int, int]:
    tz.attach(base, method(name, settings), "a")
    numbers = tz.count(base, "a")
    tz.detach(base, "a")
    return numbers.trainable, numbers.total


CASES = {
    **{name: (name, PLAIN[name]) for name in CONFIGS},
    "lora-all-linear": ("lora", {"r": 3, "target_modules": "all-linear"}),
    "lora-embedding": ("lora", {"r": 3, "target_modules": ["embed_tokens"]}),
    "lora-modules": ("lora", {"r": 3, "modules_to_save": ["embed_tokens", "score"]}),
    "lora-patterns": ("lora", {"r": 3, "rank_pattern": {"layers.0.self_attn.q_proj": 7}}),
    "adalora-wide": ("adalora", {"init_r": 5, "target_r": 0.5, "total_step": 10, "target_modules": "all-linear"}),
    "p-tuning-lstm": (
        "p_tuning",
        {**PLAIN["p_tuning"], "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3},
    ),
    "prefix-projected": (
        "prefix_tuning",
        {"num_virtual_tokens": 7, "prefix_projection": True, "encoder_hidden_size": 20},
    ),
    "llama-adapter-all": ("llama_adapter", {"adapter_layers": 2, "adapter_len": 10}),
}


@pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES)
@in_families("kind", ["llama", "mistral"])
def test_a_tiny_classifier(kind: str, name: str, settings: dict[str, object]) -> None:
    base = tiny(kind, "cls")
    if kind == "mistral" and name in ("adalora", "vblora"):
        settings = {"target_modules": ["q_proj", "v_proj"], **settings}  # PEFT has no default there
    expected = in_peft(base, name, settings).get_nb_trainable_parameters()
    assert our_counts(base, name, settings) == expected


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_biases(kind: str, bias: str) -> None:
    """PEFT trains the base's own biases; here the base stays as it is, so their copies are counted beside them."""
    base = tiny(kind, "cls")
    settings = {"r": 2, "bias": bias}
    theirs = in_peft(base, "lora", settings)
    trained = [(n, p) for n, p in theirs.named_parameters() if p.requires_grad and n.endswith(".bias")]
    copied = sum(p.numel() for n, p in trained if ".modules_to_save." not in n)
    trainable, total = theirs.get_nb_trainable_parameters()
    assert our_counts(base, "lora", settings) == (trainable, total + copied)


@functools.cache
def large() -> LlamaForSequenceClassification:
    """The shape of llm-jp-3-1.8b with two labels, without the numbers."""
    with torch.device("meta"):
        return LlamaForSequenceClassification(
            LlamaConfig(
                hidden_size=2048,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=7168,
                vocab_size=99584,
                num_labels=2,
                pad_token_id=4,
            )
        )


# As they are compared on that model.
LARGE = {
    "lora": {"r": 1},
    "adalora": {"init_r": 2, "target_r": 0.5, "total_step": 100},
    "prompt_tuning": {"num_virtual_tokens": 10},
    "p_tuning": {"num_virtual_tokens": 10, "encoder_hidden_size": 128},
    "prefix_tuning": {"num_virtual_tokens": 10},
    "ia3": {},
    "llama_adapter": {"adapter_len": 10, "adapter_layers": 8},
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_classifier_on_the_meta_device(name: str) -> None:
    ours = our_counts(large(), name, LARGE[name])
    with torch.device("meta"):
        base = LlamaForSequenceClassification(large().config)
        theirs = peft.get_peft_model(base, config(base, name, LARGE[name]))
    assert ours == theirs.get_nb_trainable_parameters()


def test_the_line_that_peft_prints(capsys: pytest.CaptureFixture[str]) -> None:
    tz.attach(large(), tz.LoRA(r=1), "a")
    line = str(tz.count(large(), "a"))
    tz.detach(large(), "a")
    assert line == "trainable params: 200,704 || all params: 1,663,870,976 || trainable%: 0.0121"
    with torch.device("meta"):
        base = LlamaForSequenceClassification(large().config)
        peft.get_peft_model(base, config(base, "lora", {"r": 1})).print_trainable_parameters()
    assert capsys.readouterr().out.strip() == line
