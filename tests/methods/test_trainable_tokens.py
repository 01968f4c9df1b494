"""Vectors of some tokens: alone and beside LoRA, at the embedding and at what is tied to it, as in HF PEFT."""

import pytest
import torch

import tanzaku as tz
from close import assert_close
from interop.oracle import both, inputs, logits, reopened, scatter
from models import VOCAB, batch, tiny

SOME = [*range(3, VOCAB, 2)]
LORA = {
    "tied": ("llama", "lm", {"r": 2, "trainable_token_indices": SOME}, {"tie_word_embeddings": True}),
    "by-name": ("llama", "cls", {"r": 2, "trainable_token_indices": {"embed_tokens": SOME}}, {}),
    "scaled": ("gemma3", "cls", {"r": 2, "trainable_token_indices": SOME}, {}),
    "gpt2": ("gpt2", "lm", {"r": 2, "trainable_token_indices": SOME}, {}),
}


@pytest.mark.parametrize(("kind", "head", "settings", "config"), LORA.values(), ids=LORA)
def test_beside_lora_as_in_peft(kind, head, settings, config, tmp_path):
    base, theirs = both(kind, head, "lora", tmp_path / "theirs", settings, **config)
    given = inputs(base, "lora")
    expected = logits(theirs, given)
    assert_close(logits(base, given), expected)
    tz.save(base, "a", tmp_path / "ours")
    tz.merge(base, "a")
    assert_close(logits(base, given), expected)
    tz.unmerge(base)
    tz.detach(base)
    assert (logits(base, given) - expected).abs().max() > 0.1
    assert_close(logits(reopened(base, tmp_path / "ours"), given), expected)


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("t5", True), ("bart", True)])
def test_merged_with_all_that_is_tied(kind, tied):
    """One tensor under several names is changed once."""
    model = tiny(kind, "lm", tie_word_embeddings=tied)
    adapter = tz.attach(model, tz.TrainableTokens(token_indices=[9, 5]), "a", seed=0)
    assert sum(p.numel() for _, p in adapter.trained()) == 2 * model.get_input_embeddings().weight.shape[1]
    scatter([p for _, p in adapter.trained()])
    given = batch(model)
    given["input_ids"][:, 1] = torch.tensor([5, 9, 5, 9])
    tz.activate(model, "a")
    expected, bare = logits(model, given), model.get_output_embeddings().weight.clone()
    tz.merge(model, "a")
    assert_close(logits(model, given), expected)
    changed = (model.get_output_embeddings().weight != bare).any(1).nonzero()[:, 0].tolist()
    assert changed == ([5, 9] if tied else [])


@torch.no_grad()
def test_texts_without_the_tokens_are_the_base_s():
    """Bit for bit, but where the head is tied: there the tokens' own logits are others."""
    model = tiny("llama", "lm")
    scatter([p for _, p in tz.attach(model, tz.TrainableTokens(token_indices=[5, 9]), "a", seed=0).trained()])
    given = batch(model)
    ids = given["input_ids"]
    ids[(ids == 5) | (ids == 9)] = 11
    ids[0, 2] = 9
    bare = model(**given).logits
    with tz.route(model, ["a"] * 4):
        found = model(**given).logits
    assert torch.equal(found[1:], bare[1:]) and torch.equal(found[0, :2], bare[0, :2])
    assert not torch.allclose(found[0, 2:], bare[0, 2:], atol=1e-3)


def test_a_start_at_random():
    model = tiny("llama", "lm")
    own = model.get_input_embeddings().weight[[5, 9]]
    for init, same in ((True, True), (False, False)):
        settings = tz.TrainableTokens(token_indices=[5, 9], init_weights=init)
        ((_, vectors),) = tz.attach(model, settings, f"a{init}", seed=0).trained()
        assert torch.equal(vectors, own) == same


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (tz.TrainableTokens(), "no token_indices, expected ids of one token or more"),
        (tz.TrainableTokens(token_indices=[5, VOCAB]), f"expected ids from 0 to {VOCAB - 1}, each once"),
        (tz.TrainableTokens(token_indices=[5, 5]), f"expected ids from 0 to {VOCAB - 1}, each once"),
        (tz.TrainableTokens(token_indices=[5], target_modules=["q_proj"]), "a Linear, expected an embedding of tokens"),
        (tz.LoRA(trainable_token_indices=[5], target_modules=["embed_tokens"]), "expected one of them"),
        (tz.LoRA(trainable_token_indices={"embed_token": [5]}), "did you mean 'embed_tokens'"),
        (tz.AdaLoRA(trainable_token_indices=[5]), "adalora: found trainable_token_indices, expected LoRA"),
    ],
)
def test_what_is_refused(method, match):
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama", "lm"), method, "a")
