"""Context-aware prompt tuning, which PEFT has for causal language models alone: files, logits, gradients, losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tanzaku as tz
from close import GRADIENT, HALF, assert_close, tolerance
from interop.oracle import logits, reopened, scatter, whole_rows
from models import batch, tiny
from tanzaku.compat import peft as compat

# Two examples, of answers with two tokens each; a token that is of no kind.
CONTEXT: dict[str, Any] = {
    "cpt_token_ids": [5, 9, 11, 7, 8, 12, 6, 9, 13, 14, 3],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 0],
    "cpt_mask": [1] * 11,
}
WIDE = {"opt_projection_epsilon": 8.0, "opt_projection_format_epsilon": 6.0}
DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}


def in_peft(library: Any, base: PreTrainedModel, **settings: Any) -> Any:
    """Either library's model, moved away from where it starts, beyond some of the balls."""
    model = library.get_peft_model(base, library.CPTConfig(task_type="CAUSAL_LM", **CONTEXT, **settings)).eval()
    scatter([p for p in model.parameters() if p.requires_grad])
    return model


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2", "gpt2", "opt", "mistral"])
@torch.no_grad()
def test_both_ways(kind: str, near: bool, tmp_path: Path) -> None:
    """A file of PEFT's here, that file written here and read by PEFT, and a file of Tanzaku's own read by PEFT."""
    base, settings = tiny(kind, "lm"), {} if near else WIDE
    given = batch(base, padding="right")
    theirs = in_peft(peft, tiny(kind, "lm"), **settings)
    expected, bare = logits(theirs, given), logits(base, given)
    assert (expected - bare).abs().max() > 1e-2, "the adapter changes nothing, so nothing was compared"
    theirs.save_pretrained(tmp_path / "theirs")
    assert tz.load(base, tmp_path / "theirs", "a").method.name == "cpt"
    tz.activate(base, "a")
    assert_close(logits(base, given), expected)
    tz.save(base, "a", tmp_path / "copy")
    assert_close(logits(reopened(tiny(kind, "lm"), tmp_path / "copy"), given), expected)
    own = tz.attach(base, tz.CPT(**CONTEXT, **settings), "b", seed=0)
    tz.activate(base, "b")
    start = logits(base, given)
    scatter([p for _, p in own.trained()], seed=3)
    ours = logits(base, given)
    assert (ours - start).abs().max() > 1e-3
    tz.save(base, "b", tmp_path / "ours")
    assert_close(logits(reopened(tiny(kind, "lm"), tmp_path / "ours"), given), ours)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written.keys() <= {*peft.CPTConfig.__dataclass_fields__}
    assert written["num_virtual_tokens"] == 11 and written["cpt_tokens_type_mask"] == CONTEXT["cpt_tokens_type_mask"]


@torch.no_grad()
def test_a_base_in_bf16(tmp_path: Path) -> None:
    base = tiny("llama", "lm").to(torch.bfloat16)
    given = batch(base, padding="right")
    in_peft(peft, tiny("llama", "lm").to(torch.bfloat16), **WIDE).save_pretrained(tmp_path)
    expected = logits(reopened(tiny("llama", "lm").to(torch.bfloat16), tmp_path), given)
    bare = logits(base, given)
    tz.load(base, tmp_path, "a")
    tz.activate(base, "a")
    assert_close(logits(base, given), expected, HALF)
    assert (expected - bare).abs().max() > 2 * tolerance(bare, HALF)


def test_counts_and_names_are_pefts() -> None:
    ours, theirs = (in_peft(library, tiny("llama", "lm")) for library in (compat, peft))
    found, expected = (dict(model.named_parameters()) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    for key, parameter in expected.items():
        assert found[key].requires_grad == parameter.requires_grad, key
        assert_close(found[key], parameter, at=key)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert str(tz.count(ours.get_base_model())).startswith("trainable params: 352 ")
    assert compat.CPTConfig.from_peft_type(**ours.peft_config["default"].to_dict()) == ours.peft_config["default"]


def labelled(padding: str | None, types: bool) -> dict[str, Tensor]:
    """Rows of 9 tokens or fewer, of which the first two are no label."""
    made = batch(tiny("llama", "lm"), padding=padding)
    mask = made.setdefault("attention_mask", torch.ones_like(made["input_ids"]))
    made["labels"] = made["input_ids"].masked_fill((mask == 0) | (mask.cumsum(1) <= 2), -100)
    if types:
        made["input_type_mask"] = (torch.arange(mask.shape[1]) % 9).expand_as(mask) * mask
    return made


def losses(
    library: Any, given: dict[str, Tensor], steps: int = 4, **settings: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The loss of each step, the first gradient, and where a plain loop of AdamW ends."""
    model = in_peft(library, tiny("llama", "lm"), **settings)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.5, eps=1e-2)
    found, first = [], None
    for _ in range(steps):
        loss = model(**{key: value.clone() for key, value in given.items()}).loss
        loss.backward()
        first = parameter.grad.clone() if first is None else first
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    assert first is not None
    return found, first, model.get_prompt(1)[0].detach()


@pytest.mark.parametrize("settings", [{}, {**WIDE, **DECAY}, {**WIDE}], ids=["near", "decay", "wide"])
@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("padding", [None, "right"])
def test_losses_and_training_by_pefts_names(padding: str | None, types: bool, settings: dict[str, Any]) -> None:
    given = labelled(padding, types)
    ours, theirs = losses(compat, given, **settings), losses(peft, given, **settings)
    assert_close(torch.stack(ours[0]), torch.stack(theirs[0]))
    assert theirs[1].abs().sum(1).bool().tolist() == [bool(kind % 4) for kind in CONTEXT["cpt_tokens_type_mask"]]
    assert_close(ours[1], theirs[1], GRADIENT)
    assert_close(ours[2], theirs[2], GRADIENT)


def test_padding_on_the_left_changes_nothing() -> None:
    """PEFT would put it between the context and the text."""
    right = labelled("right", True)
    left = {key: value.clone() for key, value in right.items()}
    for row, length in enumerate(right["attention_mask"].sum(1).tolist()):
        for key, value in right.items():
            left[key][row] = value[row].roll(value.shape[1] - length)
    ours, theirs = losses(compat, left, **WIDE, **DECAY), losses(peft, right, **WIDE, **DECAY)
    assert_close(torch.stack(ours[0]), torch.stack(theirs[0]))


@pytest.mark.parametrize("settings", [WIDE, {**WIDE, **DECAY}], ids=["none", "decay"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt"])
def test_the_loss_of_rows_and_the_penalty_are_pefts_loss(kind: str, settings: dict[str, Any]) -> None:
    """Where each row has as many labels as an answer has tokens, but for the number of answers that there are."""
    base = tiny(kind, "lm")
    given = whole_rows(base)
    given["labels"] = torch.full_like(given["input_ids"], -100)
    given["labels"][:, -2:] = given["input_ids"][:, -2:]
    theirs = in_peft(peft, tiny(kind, "lm"), **settings)
    expected = theirs(**given).loss
    expected.backward()
    adapter = tz.attach(base, tz.CPT(**CONTEXT, **settings), "a", seed=0)
    scatter([p for _, p in adapter.trained()])
    adapter.method.after_step(adapter, 1)
    with tz.route(base, ["a"] * len(given["labels"])):
        rows = base(**given).loss
    penalty = adapter.method.penalty(adapter)
    assert penalty is not None
    ours = rows + penalty
    ours.backward()
    assert_close(ours / 3, expected)
    ((_, parameter),) = adapter.trained()
    gradient = next(p.grad for p in theirs.parameters() if p.requires_grad)
    assert_close(parameter.grad / 3, gradient, GRADIENT)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_generated_tokens_are_pefts(kind: str, tmp_path: Path) -> None:
    base = tiny(kind, "lm")
    given = whole_rows(base)
    theirs = in_peft(peft, tiny(kind, "lm"), **WIDE)
    theirs.save_pretrained(tmp_path)
    tz.load(base, tmp_path, "a")
    tz.activate(base, "a")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(base.generate(**given, **options), theirs.generate(**given, **options))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a task": ({"task_type": "SEQ_CLS"}, r"CPTConfig only supports task_type = CAUSAL_LM\. Found 'SEQ_CLS'"),
    "no task": ({}, r"CPTConfig only supports task_type = CAUSAL_LM\. Found None"),
    "lengths": ({"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2], "cpt_mask": [1]}, "must have the same length"),
}


@pytest.mark.parametrize("settings", [w[0] for w in WRONG.values()], ids=WRONG)
def test_what_pefts_configuration_refuses(settings: dict[str, Any]) -> None:
    message = next(m for s, m in WRONG.values() if s is settings)
    with pytest.raises(tz.TanzakuError, match=message):
        compat.CPTConfig(**settings)
    with pytest.raises(ValueError, match=message.split(r"\. ")[0]):
        peft.CPTConfig(**settings)


def test_a_context_that_nobody_names_is_pefts() -> None:
    """PEFT's default is one token, of the format."""
    ours, theirs = (library.CPTConfig(task_type="CAUSAL_LM") for library in (compat, peft))
    for key in CONTEXT:
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.num_virtual_tokens == theirs.num_virtual_tokens == 1
