"""LoRA's trainable tokens and target parameters under PEFT's names: parameters, draws, logits, gradients, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tanzaku.compat.peft as compat
from close import GRADIENT, assert_close, close
from interop.oracle import scatter
from methods.test_lora_parameters import ids, made
from models import VOCAB, batch, tiny

SOME = [*range(3, VOCAB, 2)]
TOKENS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (("llama", "cls"), {"trainable_token_indices": SOME}),
    "by name": (("llama", "lm"), {"trainable_token_indices": {"embed_tokens": [5, 9]}}),
    "tied": (("gpt2", "lm"), {"trainable_token_indices": SOME}),
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "mixtral": {"lora_alpha": 3, "target_modules": ["q_proj"]},
    "gpt_oss": {"target_modules": [], "init_lora_weights": False},
    "one": {"target_modules": ["k_proj"]},
}


def given(case: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A base, settings, and inputs with labels."""
    if case in PARAMETERS:
        base, targets = made(case)
        inputs = {"input_ids": ids(), "labels": ids()}
        return base, {"task_type": "CAUSAL_LM", "target_parameters": targets, **PARAMETERS[case]}, inputs
    kind, settings = TOKENS[case]
    base = tiny(*kind)
    inputs = batch(base, padding=None)
    labels = torch.arange(len(inputs["input_ids"])) % 2 if kind[1] == "cls" else inputs["input_ids"]
    task = "SEQ_CLS" if kind[1] == "cls" else "CAUSAL_LM"
    return base, {"task_type": task, **settings}, {**inputs, "labels": labels}


@pytest.mark.parametrize("case", [*TOKENS, *PARAMETERS])
def test_it_is_pefts(case: str, tmp_path: Path) -> None:
    base, settings, inputs = given(case)
    models: dict[Any, Any] = {}
    for library in (peft, compat):
        torch.manual_seed(0)
        models[library] = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(r=2, **settings)).eval()
    theirs, ours = models.values()
    own, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert own.keys() == others.keys()
    assert {n for n, p in own.items() if p.requires_grad} == {n for n, p in others.items() if p.requires_grad}
    assert_close(own, others)  # with one seed, the same first values
    assert ours.state_dict().keys() <= theirs.state_dict().keys()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    scatter([p for p in others.values() if p.requires_grad])
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.requires_grad:
                parameter.copy_(others[name])
    outs = {library: model(**inputs) for library, model in models.items()}
    for out in outs.values():
        out.loss.backward()
    expected = outs[peft].logits
    assert_close(outs[compat].logits, expected)
    assert not close(expected, base(**inputs).logits)
    assert_close(*({n: p.grad for n, p in each.items() if p.grad is not None} for each in (own, others)), GRADIENT)
    for library, model in models.items():
        folder = tmp_path / library.__name__
        model.save_pretrained(folder)
        for reader in models:
            again = reader.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
            assert_close(again(**inputs).logits, expected, at=f"{reader.__name__} of {library.__name__}'s")
    fresh = compat.get_peft_model(copy.deepcopy(base), compat.LoraConfig(r=2, **settings)).eval()
    compat.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(theirs))
    assert_close(fresh(**inputs).logits, expected)
    with ours.disable_adapter():
        assert_close(ours(**inputs).logits, base(**inputs).logits)
    assert_close(ours.merge_and_unload()(**inputs).logits, expected, GRADIENT)
