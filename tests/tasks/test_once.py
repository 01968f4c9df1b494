"""A prompt that answers share, computed once: scores are those of whole rows, in every family and by every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from close import PASS, assert_close
from models import NEEDED, VOCAB, attach, tiny
from tanzaku.methods import METHODS
from tanzaku.tasks import inference
from tanzaku.tasks.choice import RankClassification
from tanzaku.tasks.inference import records_of
from tanzaku.tasks.task import Example, Split
from tiers import in_families

TASK = RankClassification()
# State spaces, and attention with a bias by distance, and one that sees padding, go through as whole rows.
FAMILIES = ["llama", "mistral", "gemma3", "gpt2", "opt"]


def rows() -> Split:
    """Prompts of some lengths, several of one; two to four answers, some of them of one token."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for number, length in enumerate((5, 3, 5, 9, 5, 3, 1)):
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        sizes = [1 + (number + at) % 3 for at in range(2 + number % 3)] if number else [1, 1]
        own = [{"input_ids": prompt + torch.randint(3, VOCAB, (size,), generator=generator).tolist()} for size in sizes]
        names = tuple("abcd"[: len(own)])
        examples.append(Example(own[0], names[number % 2], about=names, others=own[1:], shared=length))
    return Split("rows", examples, [""] * len(examples), 0, "rows")


def scores(model: Any, names: Sequence[str | None], size: int = 3) -> dict[str | None, torch.Tensor]:
    found = records_of(model, TASK, {name: rows() for name in names}, 0, size)
    return {
        name: torch.cat([torch.tensor(row, dtype=torch.float32) for row in each["scores"]])
        for name, each in found.items()
    }


def hung(model: Any, name: str) -> str:
    """Attach a method, and move all that it trains away from where it starts."""
    settings = {"num_virtual_tokens": 3} if name in ("prompt_tuning", "prefix_tuning") else NEEDED.get(name, {})
    adapter = attach(model, METHODS[name].from_settings(settings), name, seed=0)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return name


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches went through once."""
    found: list[int] = []
    run = inference.run_once

    def counted(*args: Any) -> Any:
        found.append(1)
        return run(*args)

    monkeypatch.setattr(inference, "run_once", counted)
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family(kind: str, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of each kind of site in one batch, and the base beside them and alone."""
    model = tiny(kind, "lm")
    alone = scores(model, [None])
    names = [hung(model, name) for name in ("lora", "ia3", "prompt_tuning", "prefix_tuning")]
    found = scores(model, [None, *names])
    assert len(seen) == 2 * 3
    monkeypatch.setattr(inference, "can_be_once", lambda *_: False)
    whole = scores(model, [None, *names])
    assert len(seen) == 2 * 3
    for name, expected in whole.items():
        assert_close(found[name], expected, PASS, at=str(name))
    assert_close(alone[None], whole[None], PASS)


@in_families("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.uses_others])
def test_every_method(name: str, kind: str, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself. What reads more of a row than the token that it changes goes through as whole rows."""
    model = tiny(kind, "lm")
    hung(model, name)
    found = scores(model, [name])[name]
    whole_rows = name in ("reft",)
    assert bool(seen) != whole_rows
    monkeypatch.setattr(inference, "can_be_once", lambda *_: False)
    assert_close(found, scores(model, [name])[name], PASS)


def test_fewer_tokens_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", "lm")
    counts: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _out: counts.append(args[0].numel()))
    scores(model, [None])
    once = sum(counts)
    examples = rows().examples
    # Each prompt once, and of each answer all tokens but the last, padded to the longest of its prompt's length.
    assert (
        sum(example.shared for example in examples)
        < once
        < sum(map(len, (r["input_ids"] for e in examples for r in e.rows)))
    )
    counts.clear()
    monkeypatch.setattr(inference, "can_be_once", lambda *_: False)
    scores(model, [None])
    assert sum(counts) > once, "prompts go through with each of their answers"


def test_a_model_with_a_state_goes_through_as_whole_rows(seen: list[int]) -> None:
    """A cache of it is no keys and values of tokens."""
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)
    torch.manual_seed(0)
    found = scores(MambaForCausalLM(config).eval(), [None])
    assert not seen and found[None].isfinite().all()


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_window_that_is_narrower_than_prompts(kind: str, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind, "lm", sliding_window=4)
    names = [hung(model, name) for name in ("lora", "prompt_tuning")]
    found = scores(model, [None, *names])
    assert seen
    monkeypatch.setattr(inference, "can_be_once", lambda *_: False)
    for name, expected in scores(model, [None, *names]).items():
        assert_close(found[name], expected, PASS, at=str(name))
