"""The table of names: each family's defaults match its models, and positions are numbered as the model numbers them."""

import pytest
import torch

import tanzaku as tz
from models import KINDS, batch, tiny
from tanzaku.families import Base, table
from tanzaku.methods import METHODS

TEXT = [kind for kind in KINDS if kind not in ("vit", "clip", "whisper")]


def head_of(kind):
    return {"clip": "base", "whisper": "lm"}.get(kind, "cls")


def run(model, entries, **inputs):
    with torch.no_grad(), tz.route(model, entries):
        out = model(**inputs)
    return next(out[key] for key in ("logits", "logits_per_text", "last_hidden_state") if key in out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "adalora", "ia3"])
def test_default_targets(kind, name):
    """Every family has defaults for these methods, they match, and they change the logits of routed rows alone."""
    model = tiny(kind, head_of(kind))
    adapter = tz.attach(model, METHODS[name](), "x", seed=0)
    inputs = batch(model)
    base = run(model, [None] * 4, **inputs)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if kind == "clip":  # logits of all pairs: rows are not independent
        assert not torch.allclose(run(model, ["x"] * 4, **inputs), base, atol=1e-3)
        return
    mixed = run(model, ["x", None, "x", None], **inputs)
    assert torch.equal(mixed[[1, 3]], base[[1, 3]])
    assert not torch.allclose(mixed[[0, 2]], base[[0, 2]], atol=1e-3)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("clip", "deberta-v2")])
@pytest.mark.parametrize(
    "method",
    [tz.PrefixTuning(num_virtual_tokens=3), tz.LlamaAdapter(adapter_len=3, adapter_layers=1)],
    ids=lambda m: m.name,
)
def test_attention_sites(kind, method):
    """Attention is found and reached in every family whose attention goes through transformers' interface."""
    model = tiny(kind, head_of(kind))
    adapter = tz.attach(model, type(method).from_settings(method.settings()), "x", seed=0)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    inputs = batch(model)
    base = run(model, [None] * 4, **inputs)
    mixed = run(model, ["x", None, "x", None], **inputs)
    assert torch.equal(mixed[[1, 3]], base[[1, 3]])
    assert not torch.allclose(mixed[[0, 2]], base[[0, 2]], atol=1e-3)
    torch.testing.assert_close(run(model, ["x"] * 4, **inputs)[[0, 2]], mixed[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TEXT)
def test_token_sites(kind):
    """Virtual tokens equal tokens: a prompt of the model's own vectors is that text in front of the row."""
    model = tiny(kind, "lm" if kind in ("t5", "bart") else "cls")
    adapter = tz.attach(model, tz.PromptTuning(num_virtual_tokens=3), "x")
    front = torch.tensor([[7, 8, 9]])
    table_ = model.get_input_embeddings()
    with torch.no_grad():
        dict(adapter.named_parameters())["prompt_embeddings"].copy_(table_(front)[0])
    inputs = batch(model, padding=None)
    whole = torch.cat([front.expand(4, -1), inputs["input_ids"]], 1)
    if kind in ("bert", "roberta", "deberta-v2"):
        # These read the first of the row's own tokens, not the prompt's: compared by what precedes the head.
        with torch.no_grad():
            expected = model.base_model(whole)[0][:, 3:]
            with tz.route(model, ["x"] * 4):
                found = model.base_model(**inputs)[0]
    else:
        expected = run(model, [None] * 4, **{**inputs, "input_ids": whole})
        found = run(model, ["x"] * 4, **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_family_is_a_model_type():
    """Keys of the table are names that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for kind in table():
        assert kind in CONFIG_MAPPING_NAMES or kind in CONFIG_MAPPING, kind


@pytest.mark.parametrize("kind", KINDS)
def test_names_point_at_modules(kind):
    """What the table calls attention, key and value is in the model."""
    base = Base.of(tiny(kind, "base"))
    assert base.family is not None
    for _, attention in base.attention():
        for name in [base.family.fused] if base.family.fused else [base.family.key, base.family.value]:
            assert hasattr(attention, name)
        if base.family.key_norm:
            assert hasattr(attention, base.family.key_norm)


def test_a_model_without_names():
    """A model type the table does not have says what to set."""
    model = tiny("llama")
    model.config.model_type = "unheard-of"
    with pytest.raises(tz.TanzakuError, match=r"no default target_modules for lora on model type 'unheard-of'.*q_proj"):
        tz.attach(model, tz.LoRA(), "x")
    adapter = tz.attach(model, tz.LoRA(target_modules=["q_proj"]), "x")
    assert tz.count(model, "x").trainable == sum(p.numel() for _, p in adapter.trained())
