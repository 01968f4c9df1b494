"""Where PEFT's numbers are not what the method means, and Tanzaku's are: each test shows both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from torch import Tensor, nn

import tanzaku as tz
from close import assert_close, close
from interop.oracle import (
    PLAIN,
    PROMPT_LEARNING,
    SOFT_PROMPTS,
    both,
    in_peft,
    logits,
    loss_of,
    method,
    reopened,
    scatter,
    trained_in_peft,
    whole_rows,
)
from models import batch, tiny

VIRTUAL = 3


def alone(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch without its padding."""
    own = given["attention_mask"][row].bool()
    return {key: value[row : row + 1, own] for key, value in given.items()}


@pytest.mark.parametrize("name", SOFT_PROMPTS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@torch.no_grad()
def test_padding_does_not_reach_a_decoders_classifier(kind: str, name: str, tmp_path: Path) -> None:
    """PEFT gives a classifier embeddings, not ids, so it takes the last column for the last token: a pad."""
    ours, theirs = both(kind, "cls", name, tmp_path)
    given = batch(ours, rows=4, length=9, padding="right")
    for row in range(4):
        expected = logits(theirs, alone(given, row))
        assert close(logits(ours, alone(given, row)), expected)
        assert close(logits(ours, given)[row : row + 1], expected)
        padded = bool((given["attention_mask"][row] == 0).any())
        assert close(logits(theirs, given)[row : row + 1], expected) == (not padded)


@pytest.mark.parametrize("name", PROMPT_LEARNING)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_padding_is_no_distance(kind: str, name: str, tmp_path: Path) -> None:
    """What is learned stands before the text. Padding on the left lies between, and in PEFT it takes positions."""
    ours, theirs = both(kind, "lm", name, tmp_path)
    given = batch(ours, rows=3, length=9, padding="left")
    together, theirs_together = (model(**given).logits[:, -9:] for model in (ours, theirs))
    for row, mask in enumerate(given["attention_mask"].bool()):
        expected = logits(theirs, alone(given, row))
        assert close(together[row, mask], expected)
        assert close(theirs_together[row, mask], expected) == bool(mask.all())


@pytest.mark.parametrize("name", SOFT_PROMPTS)
@torch.no_grad()
def test_bert_pools_its_first_token(name: str, tmp_path: Path) -> None:
    """PEFT's BERT pools the first virtual token, which it was never trained to pool, in place of [CLS]."""
    ours, theirs = both("bert", "cls", name, tmp_path)
    given = batch(ours, padding=None)
    states = _states_of(theirs, given)
    head = theirs.base_model.classifier
    pooled = theirs.base_model.bert.pooler.dense
    assert close(logits(theirs, given), head(torch.tanh(pooled(states[:, 0]))))
    assert close(logits(ours, given), head(torch.tanh(pooled(states[:, VIRTUAL]))))
    assert not close(logits(ours, given), logits(theirs, given))


@pytest.mark.parametrize("name", SOFT_PROMPTS)
@torch.no_grad()
def test_roberta_pools_its_first_token(name: str, tmp_path: Path) -> None:
    """As BERT; its head takes the first state by itself."""
    ours, theirs = both("roberta", "cls", name, tmp_path)
    given = batch(ours, padding=None)
    states = _states_of(theirs, given)
    head = theirs.base_model.classifier
    assert close(logits(theirs, given), head(states))
    assert close(logits(ours, given), head(states[:, VIRTUAL:]))
    assert not close(logits(ours, given), logits(theirs, given))


@pytest.mark.parametrize("name", SOFT_PROMPTS)
@torch.no_grad()
def test_roberta_numbers_padding_by_its_ids(name: str, tmp_path: Path) -> None:
    """RoBERTa skips pads when it numbers positions. From PEFT it gets embeddings, which hide the pads on the left."""
    ours, theirs = both("roberta", "cls", name, tmp_path)
    given = batch(ours, rows=3, length=9, padding="left")
    for row in range(3):
        length = int(given["attention_mask"][row].sum())
        expected = _states_of(theirs, alone(given, row))[:, -length:]
        assert close(_states_of(ours, given)[row : row + 1, -length:], expected)
        assert close(_states_of(theirs, given)[row : row + 1, -length:], expected) == (length == 9)


def _states_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Last hidden states; PEFT's have the virtual tokens first."""
    out: Tensor = model(**given, output_hidden_states=True).hidden_states[-1]
    return out


@torch.no_grad()
def test_gpt2s_second_attention_goes_through_the_output_projection(tmp_path: Path) -> None:
    """PEFT adds GPT-2's prompt attention after c_proj, which never projects it; in its LLaMA o_proj does."""
    ours, theirs = both("gpt2", "lm", "llama_adapter", tmp_path)
    given = whole_rows(ours)
    attention = theirs.base_model.model.transformer.h[-1].attn
    seen: list[Tensor] = []
    handle = attention.model.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    added: list[Tensor] = []
    other = attention.register_forward_hook(lambda _m, _a, out: added.append(out[0] - seen[-1]))
    peft_logits = logits(theirs, given)
    handle.remove(), other.remove()
    assert not close(logits(ours, given), peft_logits)

    # With what PEFT leaves out put in, it gives Tanzaku's logits.
    def project(_module: nn.Module, _args: object, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (seen[-1] + added[-1] @ attention.model.c_proj.weight, *out[1:])

    with attention.register_forward_hook(project):
        assert close(logits(theirs, given), logits(ours, given))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_every_layer_of_an_encoder_decoder_has_its_own_prefix(kind: str, tmp_path: Path) -> None:
    """PEFT gives layer i slot 2 i of the doubled list: of an even number of layers half of the slots train nothing."""
    base = tiny(kind, "lm")
    given = batch(base)
    theirs = in_peft(base, "prefix_tuning", PLAIN["prefix_tuning"])
    loss_of(theirs, given).backward()
    adapter = tz.attach(base, method("prefix_tuning", PLAIN["prefix_tuning"]), "a", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.activate(base, "a")
    loss_of(base, given).backward()
    assert _slots_with_gradient(trained_in_peft(theirs)["embedding.weight"]) == [True, True, False, False]
    assert _slots_with_gradient(adapter.trained()[0][1]) == [True] * 4


def _slots_with_gradient(prefix: nn.Parameter) -> list[bool]:
    """Keys and values of two layers: whether any of their numbers has a gradient."""
    assert prefix.grad is not None
    return [bool(part.any()) for part in prefix.grad.chunk(4, dim=1)]


def test_a_sliding_window_does_not_leave_the_prefix_behind(tmp_path: Path) -> None:
    """PEFT's prefix lies in the cache, out of the window of later tokens; here every token attends to it."""
    ours, theirs = both("mistral", "lm", "prefix_tuning", tmp_path, sliding_window=4)
    given = whole_rows(ours)
    for model in (ours, theirs):
        model(**given).logits[:, -1].logsumexp(-1).sum().backward()
    # The last layer's keys and values: what the last token sees of the prefix by itself.
    assert _slots_with_gradient(trained_in_peft(theirs)["embedding.weight"])[2:] == [False, False]
    prefix = dict(ours.named_parameters())["tanzaku.a.prefix.embedding.weight"]
    assert _slots_with_gradient(prefix)[2:] == [True, True]


def test_a_classifiers_llama_adapter_keeps_its_head(tmp_path: Path) -> None:
    """PEFT's file holds no head, so another draw of the classifier predicts otherwise; Tanzaku's file restores it."""
    first = tiny("llama", "cls")
    other = tiny("llama", "cls")
    with torch.no_grad():
        other.score.weight.normal_()
    given = batch(first)
    theirs = in_peft(first, "llama_adapter", PLAIN["llama_adapter"])
    theirs.save_pretrained(tmp_path / "theirs")
    tz.load(first, tmp_path / "theirs", "a")
    tz.activate(first, "a")
    tz.save(first, "a", tmp_path / "ours")
    with torch.no_grad():
        expected = logits(theirs, given)
        assert not close(logits(reopened(other, tmp_path / "theirs"), given), expected)
        assert close(logits(reopened(other, tmp_path / "ours"), given), expected)
        tz.load(other, tmp_path / "ours", "b")
        tz.activate(other, "b")
        assert close(logits(other, given), expected)


def test_a_headless_file_is_no_secret(tmp_path: Path) -> None:
    """A file without a head, such as PEFT's LLaMA-Adapter, loads with a warning that names it."""
    base = tiny("llama", "cls")
    in_peft(base, "llama_adapter", PLAIN["llama_adapter"]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"score\.weight.*model's own"):
        tz.load(base, tmp_path, "a")


@torch.no_grad()
def test_a_soft_prompt_can_share_a_batch_with_the_bare_base(tmp_path: Path) -> None:
    """PEFT prepends to all rows of a batch or to none; here a row's own route decides."""
    ours, theirs = both("llama", "lm", "prompt_tuning", tmp_path)
    given = whole_rows(ours)
    with tz.route(ours, ["a", None, "a", None]):
        mixed = ours(**given).logits
    bare = theirs.get_base_model()(**given).logits
    assert close(mixed[0], theirs(**given).logits[0, VIRTUAL:])
    assert close(mixed[1], bare[1])


def test_a_circular_convolution_has_a_gradient_for_its_input() -> None:
    """PEFT's backward pass of C3A gives another one, so that all below a C3A layer learns something else."""
    module = nn.Linear(16, 16)
    model, x = nn.Sequential(module), torch.randn(3, 16)
    adapter = tz.attach(model, tz.C3A(block_size=8, target_modules=["0"]), "a", seed=0)
    kernel = dict(adapter.trained())["0.c3a_kernel"].detach()
    expected = module.weight + next(layer for _, layer in adapter.at()).delta(module)
    with tz.route(model, ["a"]):
        ours = torch.autograd.functional.jacobian(model, x[0])
    assert_close(ours, expected)
    theirs = torch.autograd.functional.jacobian(lambda x: BlockCircularConvolution.apply(x, kernel) / 16, x[0])
    assert not torch.allclose(theirs, ours - module.weight, atol=1e-3)
