"""LLaMA-Adapter's mathematics: a gated second attention in the top layers."""

import pytest
import torch

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.methods.llama_adapter import GatedPrompt


def gated(adapter):
    return {path: layer for path, layer in adapter.at() if isinstance(layer, GatedPrompt)}


def test_gates_start_closed_in_the_top_layers():
    """Zero gates, normal prompts, and only as many layers as asked for, counted from the top."""
    model = tiny("llama", num_hidden_layers=3)
    found = gated(tz.attach(model, tz.LlamaAdapter(adapter_len=5, adapter_layers=2), "x"))
    assert list(found) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    for layer in found.values():
        assert not layer.adaption_gate.any()
        assert layer.adaption_prompt.shape == (1, 5, 32) and layer.adaption_prompt.std() > 0.5


def test_the_formula():
    """The layer's own result and g times attention over the prompt's keys and values, without positions or mask."""
    model = tiny("llama")
    adapter = tz.attach(model, tz.LlamaAdapter(adapter_len=5, adapter_layers=2), "x", seed=0)
    layer = gated(adapter)["model.layers.1.self_attn"]
    with torch.no_grad():
        layer.adaption_gate.fill_(0.7)
    attention = model.model.layers[1].self_attn
    seen = {}

    def note(_module, args, kwargs, output):
        seen.setdefault("hidden", kwargs["hidden_states"])
        seen.setdefault("positions", kwargs["position_embeddings"])
        seen.setdefault("results", []).append(output[0])

    handle = attention.register_forward_hook(note, with_kwargs=True)
    inputs = batch(model)
    with torch.no_grad():
        model(**inputs)
        with tz.route(model, ["x"] * 4):
            model(**inputs)
        handle.remove()
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        x = seen["hidden"]
        q = attention.q_proj(x).view(4, 9, 4, 8).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, *seen["positions"])
        k = attention.k_proj(layer.adaption_prompt).view(1, 5, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
        v = attention.v_proj(layer.adaption_prompt).view(1, 5, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
        weights = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, dim=-1)
        second = (weights @ v).transpose(1, 2).reshape(4, 9, 32)
        base, found = seen["results"]
        assert_close(found, base + attention.o_proj(0.7 * second))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"adapter_layers": 3}, "adapter_layers=3, expected 1 to the model's 2"),
        ({"adapter_layers": 0}, "adapter_layers=0"),
        ({"adapter_len": 0, "adapter_layers": 1}, "adapter_len=0, expected 1 or more"),
    ],
    ids=str,
)
def test_mistakes(settings, match):
    """More layers than there are, or none, is an error that says how many there are."""
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), tz.LlamaAdapter(**settings), "x")


@pytest.mark.parametrize("method", [tz.LlamaAdapter(adapter_layers=1), tz.PrefixTuning()], ids=lambda m: m.name)
def test_attention_of_its_own_kind_is_an_error(method):
    """DeBERTa's attention does not go through transformers' interface: an error, at the latest when routed."""
    model = tiny("deberta-v2")
    with pytest.raises(tz.TanzakuError, match="attention interface"):
        tz.attach(model, method, "x")
        with tz.route(model, ["x"] * 4):
            model(**batch(model))
