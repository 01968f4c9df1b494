"""Methods whose classes are made of the methods themselves: what trains, and what a step makes of it."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import tanzaku.compat.peft as compat
from close import GRADIENT, assert_close
from interop.oracle import CONFIGS, PLAIN, scatter
from models import batch, tiny


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_have_pefts_names_and_train(name: str) -> None:
    base = tiny("llama", "cls", num_labels=2)
    kind = CONFIGS[name].__name__
    inputs = batch(base, padding=None)
    models: dict[str, Any] = {}
    for library in (peft, compat):
        torch.manual_seed(0)
        config = getattr(library, kind)(task_type="SEQ_CLS", **PLAIN[name])
        models[library.__name__] = library.get_peft_model(copy.deepcopy(base), config)
    theirs, ours = models.values()
    trained, expected = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs))
    assert {n: p.shape for n, p in trained.items()} == {n: p.shape for n, p in expected.items()}
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    found = {id(p) for p in ours.parameters() if p.requires_grad}
    assert found == {id(p) for p in trained.values()}
    scatter(list(expected.values()))
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(expected[key])
    labels = torch.arange(len(inputs["input_ids"])) % 2
    losses = []
    for model in (theirs, ours):
        losses.append(model.eval()(**inputs, labels=labels).loss)
        losses[-1].backward()
    assert_close(losses[1], losses[0], GRADIENT)
    gradients = [{n: p.grad for n, p in each.items() if p.grad is not None} for each in (trained, expected)]
    if name != "c3a":  # whose gradient differs on purpose: see tests/interop/test_differences.py
        assert_close(*gradients, GRADIENT)
    assert any(g.any() for n, g in gradients[0].items() if "score" not in n)
