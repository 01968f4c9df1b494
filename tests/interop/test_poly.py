"""Polytropon beside HF PEFT's, which wants the task of each row: logits, gradients, draws, and files both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tanzaku as tz
from close import GRADIENT, assert_close, close
from interop.oracle import reopened, scatter, task_of, trained_in_peft, trained_in_tanzaku
from models import batch, tiny
from tanzaku.compat.peft import PolyConfig, get_peft_model

SETTINGS: dict[str, dict[str, Any]] = {
    "one task": {"r": 2, "n_skills": 3},
    "tasks": {"r": 2, "n_tasks": 3, "n_skills": 2},
    "heads": {"r": 4, "n_tasks": 3, "n_skills": 3, "n_splits": 4, "init_weights": False},
}
# PEFT has it for linear layers alone: not for GPT-2's.
BASES = [("llama", "cls"), ("llama", "lm"), ("qwen2", "lm"), ("gemma3", "cls"), ("bert", "cls"), ("t5", "lm")]
TASKS = [2, 0, 1]


def tasks_of(settings: dict[str, Any], rows: int) -> Tensor:
    return torch.tensor((TASKS * rows)[:rows]) % settings.get("n_tasks", 1)


def in_peft(model: PreTrainedModel, settings: dict[str, Any]) -> peft.PeftModel:
    """PEFT's on a copy, away from where it starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = peft.PolyConfig(**settings, task_type=task_of(model))
        theirs = peft.get_peft_model(copy.deepcopy(model), made).eval()
    scatter([p for p in theirs.parameters() if p.requires_grad])
    return theirs


def said(model: nn.Module, given: dict[str, Tensor], tasks: Tensor) -> Tensor:
    """PEFT's logits, of those rows' own tokens."""
    return own(model(**given, task_ids=tasks).logits, given)


def ours(model: nn.Module, name: str, given: dict[str, Tensor], tasks: Tensor) -> Tensor:
    with tz.route(model, [name] * len(tasks), context={"task_ids": tasks}):
        return own(model(**given).logits, given)


def own(out: Tensor, given: dict[str, Tensor]) -> Tensor:
    return out if out.dim() == 2 or "decoder_input_ids" in given else out[given["attention_mask"].bool()]


@torch.no_grad()
@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize(("kind", "head"), BASES)
def test_both_ways(kind: str, head: str, case: str, tmp_path: Path) -> None:
    """A file of PEFT's here, that file written here and read by PEFT, and a file of Tanzaku's own read by PEFT."""
    base, settings = tiny(kind, head), SETTINGS[case]
    fresh, given = copy.deepcopy(base), batch(base, padding="right")
    tasks = tasks_of(settings, len(given["input_ids"]))
    theirs = in_peft(base, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, bare = said(theirs, given, tasks), own(base(**given).logits, given)
    assert not close(expected, bare)
    assert tz.load(base, tmp_path / "theirs", "a").method.name == "poly"
    assert_close(ours(base, "a", given, tasks), expected)
    tz.save(base, "a", tmp_path / "copy")
    assert_close(said(reopened(fresh, tmp_path / "copy"), given, tasks), expected)
    adapter = tz.attach(base, tz.Poly(**settings), "b", seed=3)
    scatter([p for _, p in adapter.trained()])
    found = ours(base, "b", given, tasks)
    assert not close(found, bare) and (settings.get("n_tasks", 1) == 1 or not close(found, said_for_one(base, given)))
    tz.save(base, "b", tmp_path / "ours")
    assert_close(said(reopened(fresh, tmp_path / "ours"), given, tasks), found)


def said_for_one(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """As if all rows were of the first task."""
    return ours(model, "b", given, torch.zeros(len(given["input_ids"]), dtype=torch.long))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("case", SETTINGS)
def test_gradients_and_draws_are_pefts(case: str, training: bool) -> None:
    """With one target the same seed draws the same numbers, so what is drawn in training can be compared too."""
    base, settings = tiny("llama", "cls"), {**SETTINGS[case], "target_modules": ["q_proj", "down_proj"]}
    given = batch(base, rows=5)
    tasks = tasks_of(settings, 5)
    theirs = in_peft(base, settings).train(training)
    adapter = tz.attach(base, tz.Poly(**settings), "a", seed=0)
    mine, peers = trained_in_tanzaku(adapter), trained_in_peft(theirs)
    assert mine.keys() == peers.keys()
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.copy_(peers[key])
    base.train(training)
    tz.activate(base, "a")
    weights = torch.linspace(-1, 1, 3)
    outs = []
    for say in (lambda: ours(base, "a", given, tasks), lambda: said(theirs, given, tasks)):
        torch.manual_seed(5)
        outs.append(say())
        (outs[-1].log_softmax(-1) * weights).mean().backward()
    assert_close(outs[0], outs[1])
    assert all(p.grad is not None and p.grad.any() for p in peers.values())
    assert_close({k: p.grad for k, p in mine.items()}, {k: p.grad for k, p in peers.items()}, GRADIENT)
    assert close(outs[0], ours(base.eval(), "a", given, tasks)) != training


@torch.no_grad()
def test_a_program_of_pefts_names_tasks_in_its_own_way(tmp_path: Path) -> None:
    """`task_ids` of forward and generate, with one adapter, one a row, or off."""
    base, settings = tiny("t5", "lm"), SETTINGS["tasks"]
    theirs = in_peft(base, settings)
    theirs.save_pretrained(tmp_path / "a")
    model = get_peft_model(copy.deepcopy(base), PolyConfig(**settings, task_type="SEQ_2_SEQ_LM")).eval()
    model.load_adapter(str(tmp_path / "a"), "default")
    given = batch(base)
    tasks = tasks_of(settings, len(given["input_ids"]))
    expected = theirs(**given, task_ids=tasks).logits
    assert_close(model(**given, task_ids=tasks).logits, expected)
    names = ["default", "__base__"] * 2
    mixed = model(**given, task_ids=tasks, adapter_names=names).logits
    assert_close(mixed[::2], expected[::2])
    bare = base(**given).logits
    assert not close(expected, bare)
    assert_close(mixed[1::2], bare[1::2])
    with model.disable_adapter():
        assert_close(model(**given, task_ids=tasks).logits, bare)
    asked = {"input_ids": given["input_ids"], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**asked, task_ids=tasks), theirs.generate(**asked, task_ids=tasks))
    # A row's beams are of its task, which PEFT's are not told.
    found = model.generate(**asked, num_beams=3, task_ids=tasks)
    for row in range(len(tasks)):
        one = {**asked, "input_ids": given["input_ids"][[row]]}
        alone = model.generate(**one, num_beams=3, task_ids=tasks[[row]])
        assert torch.equal(found[[row], : alone.shape[1]], alone)
    with pytest.raises(RuntimeError):
        theirs.generate(**asked, num_beams=3, task_ids=tasks)
