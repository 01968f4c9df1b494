"""The same weights in, the same logits and gradients out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import GRADIENT, HALF, PASS, assert_close
from interop.oracle import (
    CONFIGS,
    PLAIN,
    copy_trained,
    in_peft,
    inputs,
    logits,
    loss_of,
    method,
    scatter,
    trained_in_peft,
    trained_in_tanzaku,
)
from models import tiny

CASES = {
    **{name: (name, PLAIN[name]) for name in CONFIGS if name != "c3a"},  # see test_differences.py
    "lora-wide": ("lora", {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"}),
    "lora-embedding": ("lora", {"r": 2, "target_modules": ["embed_tokens", "o_proj"]}),
    "lora-norm": ("lora", {"r": 2, "modules_to_save": ["input_layernorm", "score"]}),
    "adalora-wide": ("adalora", {**PLAIN["adalora"], "init_r": 3, "target_modules": "all-linear"}),
    "p-tuning-lstm": (
        "p_tuning",
        {**PLAIN["p_tuning"], "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2},
    ),
    "prefix-projected": ("prefix_tuning", {**PLAIN["prefix_tuning"], "prefix_projection": True}),
    "ia3-feedforward": ("ia3", {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}),
    "llama-adapter-all": ("llama_adapter", {"adapter_layers": 2, "adapter_len": 5}),
}


def assert_same_step(name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Logits and gradients of both sides in one step are one.

    Weights are copied by name, and the two sets of names must be one: neither side trains what the other does not.
    """
    base = tiny("llama", "cls").to(dtype)
    given = inputs(base, name)
    peft_model = in_peft(base, name, settings)
    adapter = tz.attach(base, method(name, settings), "a", seed=0)
    scatter([p for _, p in adapter.trained()])
    copy_trained(adapter, peft_model)
    theirs, ours = trained_in_peft(peft_model), trained_in_tanzaku(adapter)
    tz.activate(base, "a")
    for model in (base, peft_model):
        loss_of(model, given).backward()
    half = dtype == torch.bfloat16
    with torch.no_grad():
        assert_close(logits(base, given), logits(peft_model, given), HALF if half else PASS)
    # PEFT's copy of the head is of the base's type.
    mine, expected = ({key: p.grad.to(dtype) for key, p in trained.items()} for trained in (ours, theirs))
    for key, gradient in expected.items():
        assert gradient.any(), f"the gradient of {key} is zero, so nothing was compared"
    assert_close(mine, expected, HALF if half else GRADIENT)


@pytest.mark.parametrize(("name", "settings"), CASES.values(), ids=CASES)
def test_gradients_are_pefts(name: str, settings: dict[str, Any]) -> None:
    assert_same_step(name, settings)


@pytest.mark.parametrize("settings", [{"r": 2}, {"r": 4, "target_modules": "all-linear"}], ids=["plain", "wide"])
def test_a_base_in_bf16(settings: dict[str, Any]) -> None:
    """Adapters are in fp32 on both sides."""
    assert_same_step("lora", settings, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_dropout_is_off_in_eval_mode(name: str) -> None:
    assert_same_step(name, {**PLAIN[name], "lora_dropout": 0.9})


def test_dropout_of_the_prompt_encoder_is_off_in_eval_mode() -> None:
    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2, "encoder_dropout": 0.9}
    assert_same_step("p_tuning", {**PLAIN["p_tuning"], **lstm})


def test_one_dropout_draw_is_pefts() -> None:
    """With one target the same seed draws the same mask, so training mode can be compared too."""
    base = tiny("llama", "cls")
    given = inputs(base, "lora")
    settings = {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj", "down_proj"]}
    peft_model = in_peft(base, "lora", settings).train()
    adapter = tz.attach(base, method("lora", settings), "a")
    scatter([p for _, p in adapter.trained()])
    copy_trained(adapter, peft_model)
    tz.activate(base, "a")
    base.train()
    outs = []
    for model in (base, peft_model):
        torch.manual_seed(5)
        outs.append(logits(model, given))
    assert_close(outs[0], outs[1])
    assert not torch.allclose(outs[0], logits(base.eval(), given), atol=1e-3)
