"""Prompt tuning, P-tuning and prefix tuning: what they add is what the model would compute for it."""

import pytest
import torch
from transformers import DynamicCache, T5Config, T5ForTokenClassification

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of

PROMPTS = [tz.PromptTuning, tz.PTuning, tz.PrefixTuning]


def vectors(model, name="x"):
    ((_, layer),) = [at for at in manager_of(model).get(name).at() if at[0] == ""]
    with torch.no_grad():
        return layer.vectors()


def logits(model, entries, inputs):
    with torch.no_grad(), tz.route(model, entries):
        return model(**inputs).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3", "mistral"])
@pytest.mark.parametrize("method", [tz.PromptTuning(num_virtual_tokens=3), tz.PTuning(num_virtual_tokens=3)], ids=str)
def test_virtual_tokens_are_embeddings_in_front(kind, method):
    """The same logits as with the vectors given as inputs_embeds by hand."""
    model = tiny(kind, "lm")
    inputs = batch(model)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    tz.attach(model, method, "x", seed=0)
    front = vectors(model).expand(4, -1, -1)
    mask = torch.cat([torch.ones(4, 3, dtype=torch.long), inputs["attention_mask"]], 1)
    with torch.no_grad():
        expected = model(inputs_embeds=torch.cat([front, embedded], 1), attention_mask=mask).logits[:, 3:]
    found = logits(model, ["x"] * 4, inputs)
    assert_close(found, expected)
    by_vectors = logits(model, ["x"] * 4, {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]})
    assert_close(by_vectors, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen3"])
def test_a_prefix_is_a_cache_in_front(kind):
    """The same logits as with the prefix given as past keys and values by hand."""
    model = tiny(kind, "lm")
    adapter = tz.attach(model, tz.PrefixTuning(num_virtual_tokens=3), "x", seed=0)
    cache = DynamicCache()
    for layer, (_, adapter_layer) in enumerate([*adapter.at()][1:]):
        keys, values = (t.detach().expand(4, -1, -1, -1).contiguous() for t in adapter_layer.keys_values())
        cache.update(keys, values, layer)
    inputs = batch(model)
    mask = torch.cat([torch.ones(4, 3, dtype=torch.long), inputs["attention_mask"]], 1)
    with torch.no_grad():
        expected = model(inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
    assert_close(logits(model, ["x"] * 4, inputs), expected)


def test_projection_is_the_mlp():
    """With prefix_projection the keys and values are what the MLP writes."""
    model = tiny("llama")
    method = tz.PrefixTuning(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=7)
    adapter = tz.attach(model, method, "x", seed=0)
    prefix = next(adapter.at())[1]
    with torch.no_grad():
        e, (one, _, two) = prefix.embedding.weight, prefix.transform
        flat = two(torch.tanh(one(e)))
        for layer, (_, adapter_layer) in enumerate(at for at in adapter.at() if at[0] not in ("", "score")):
            for half, tensor in enumerate(adapter_layer.keys_values()):
                part = flat.view(2, 2 * 2, 2, 8)[:, 2 * layer + half]
                assert_close(tensor, part.transpose(0, 1))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_a_prefix_from_text(kind, tokenizer):
    """The prefix's keys and values are the model's own for that text, repeated or cut to the prefix's length."""
    model = tiny(kind, "lm")
    settings = {"prefix_init_text": "one two three", "tokenizer_name_or_path": tokenizer}
    adapter = tz.attach(model, tz.PrefixTuning(num_virtual_tokens=4, **settings), "x")
    ids = torch.tensor([[10, 11, 12, 10]])
    cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
    for layer, (_, adapter_layer) in enumerate([*adapter.at()][1:]):
        keys, values = adapter_layer.keys_values()
        assert_close(keys, cache.layers[layer].keys[0])
        assert_close(values, cache.layers[layer].values[0])
    # So the text in front and its prefix give the same logits.
    inputs = batch(model, padding=None)
    whole = torch.cat([ids.expand(4, -1), inputs["input_ids"]], 1)
    with torch.no_grad():
        expected = model(whole).logits[:, 4:]
    assert_close(logits(model, ["x"] * 4, inputs), expected, GRADIENT)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(("tokens", "expected"), [(2, [10, 11]), (3, [10, 11, 14]), (5, [10, 11, 14, 10, 11])])
def test_prompts_from_text(kind, tokens, expected, tokenizer):
    """A prompt that starts from text equals that text in front, cut or repeated."""
    model = tiny(kind, "lm")
    settings = {"prompt_tuning_init_text": "one two five", "tokenizer_name_or_path": tokenizer}
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=tokens, prompt_tuning_init="TEXT", **settings), "x")
    inputs = batch(model, padding=None)
    whole = torch.cat([torch.tensor([expected]).expand(4, -1), inputs["input_ids"]], 1)
    with torch.no_grad():
        plain = model(whole).logits
    assert_close(logits(model, ["x"] * 4, inputs), plain[:, tokens:])


def test_prompts_from_the_vocabulary():
    """SAMPLE_VOCAB starts from vectors of the embedding, drawn by the seed."""
    model = tiny("llama")
    table = model.get_input_embeddings().weight
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tz.attach(model, tz.PromptTuning(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"), name, seed=seed)
    rows = [[(table == v).all(1).nonzero().flatten().tolist() for v in vectors(model, n)] for n in "abc"]
    assert all(found for found in rows[0] + rows[2])
    assert rows[0] == rows[1] != rows[2]


def test_p_tuning_saves_what_its_network_writes(tmp_path):
    """Only the vectors are saved; loaded, they are the adapter's parameters."""
    model = tiny("llama")
    for kind in ("MLP", "LSTM"):
        method = tz.PTuning(num_virtual_tokens=3, encoder_reparameterization_type=kind, encoder_hidden_size=8)
        tz.attach(model, method, kind, seed=0)
        tz.save(model, kind, tmp_path / kind)
        loaded = tz.load(model, tmp_path / kind, f"{kind}-2")
        assert_close(vectors(model, kind), vectors(model, f"{kind}-2"))
        assert "prompt_embeddings" in dict(loaded.named_parameters())


@pytest.mark.parametrize("method", PROMPTS, ids=lambda m: m.name)
def test_too_many_virtual_tokens(method):
    """More than the model has positions is an error when attaching; too long with the text, when running."""
    model = tiny("llama")
    with pytest.raises(tz.TanzakuError, match="200 virtual tokens leave no room in the model's 128 positions"):
        tz.attach(model, method(num_virtual_tokens=200), "x")
    tz.attach(model, method(num_virtual_tokens=125), "x")
    with pytest.raises(tz.TanzakuError, match="128 positions"):
        logits(model, ["x"] * 4, batch(model))
    with pytest.raises(tz.TanzakuError, match="num_virtual_tokens=0, expected 1 or more"):
        tz.attach(model, method(num_virtual_tokens=0), "y")


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (tz.PromptTuning(prompt_tuning_init="TXET"), "prompt_tuning_init='TXET', expected RANDOM, TEXT"),
        (tz.PromptTuning(prompt_tuning_init="TEXT"), "no initial text"),
        (tz.PromptTuning(prompt_tuning_init="TEXT", prompt_tuning_init_text="x"), "no tokenizer_name_or_path"),
        (tz.PTuning(encoder_reparameterization_type="CNN"), "'CNN', expected 'MLP' or 'LSTM'"),
        (tz.PrefixTuning(init_weights="ones"), "init_weights='ones'"),
        (tz.PrefixTuning(prefix_init_text="x"), "no tokenizer_name_or_path"),
    ],
    ids=str,
)
def test_mistakes(method, match):
    """Each says what was found and what was expected."""
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), method, "x")


def test_a_tokenizer_that_is_not_there(tmp_path):
    """A directory without a tokenizer is a clear error, and an empty text too."""
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "one"}
    with pytest.raises(tz.TanzakuError, match="tokenizer"):
        tz.attach(tiny("llama"), tz.PromptTuning(**settings, tokenizer_name_or_path=str(tmp_path)), "x")


@pytest.mark.parametrize("method", [tz.PromptTuning(), tz.PTuning()], ids=str)
def test_images_have_no_virtual_tokens(method):
    """A model that reads no token ids is an error that says so."""
    with pytest.raises(tz.TanzakuError, match="reads no token ids"):
        tz.attach(tiny("vit"), method, "x")


@pytest.mark.parametrize("method", [tz.PromptTuning(num_virtual_tokens=3), tz.PTuning(num_virtual_tokens=3)])
def test_an_encoder_with_a_table_of_its_own(method):
    """T5's tagger: the embedding that the model names is tied to that of its encoder, which is the one that runs."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, num_labels=3)
    model = T5ForTokenClassification(config).eval()
    ids = torch.randint(5, 100, (2, 7))
    base = model(input_ids=ids).logits
    tz.attach(model, method, "a", seed=0)
    with tz.route(model, ["a", None]):
        mixed = model(input_ids=ids).logits
    with tz.route(model, ["a"]):
        alone = model(input_ids=ids[:1]).logits
    assert mixed.shape == base.shape
    assert_close(mixed[1], base[1])
    assert_close(mixed[:1], alone)
    assert not torch.allclose(mixed[0], base[0], atol=1e-3)


@pytest.mark.parametrize("method", [tz.PTuning, lambda **s: tz.PrefixTuning(prefix_projection=True, **s)])
def test_a_network_has_some_width(method):
    with pytest.raises(tz.TanzakuError, match="encoder_hidden_size=0, expected 1 or more"):
        tz.attach(tiny("llama"), method(encoder_hidden_size=0), "x")
