"""llama.cpp computes from an exported file what transformers and Tanzaku compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tanzaku as tz
from close import GRADIENT, HALF, assert_close
from llama_cpp import (
    PROMPT,
    LlamaCpp,
    byte_level,
    continued,
    log_probabilities,
    sentencepiece_bpe,
    unigram,
    unspoken,
)
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.export.architectures import turn
from tanzaku.export.gguf import export_adapter, export_model
from tanzaku.export.vocabulary import vocabulary_of

GEMMA3 = {"num_hidden_layers": 6, "sliding_window": 4, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama 3": (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 16}},
    ),
    "llama, stretched": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "mistral": ("mistral", {"head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 4}),
    "gemma3": ("gemma3", GEMMA3),
    "gpt2": ("gpt2", {}),
}
_GEMMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_level()


def built(family: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    import models

    kind, overrides = FAMILIES[family]
    if kind in ("gemma", "gemma2"):
        more = {"num_key_value_heads": 2, "query_pre_attn_scalar": 8, "max_position_embeddings": 128}
        monkeypatch.setitem(models.KINDS, kind, (kind, {**_GEMMA, **more}))
    # Two rows more than tokens, as models have that are rounded up.
    return tiny(kind, "lm", vocab_size=len(tokenizer) + 2, bos_token_id=0, eos_token_id=1, pad_token_id=2, **overrides)


def attached(model: PreTrainedModel, method: tz.Method, name: str = "a") -> None:
    tz.attach(model, method, name, seed=0)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in manager_of(model).get(name).trained():
        parameter.data.normal_(std=0.3, generator=generator) if "lora_" in key else None


def check(
    running: LlamaCpp,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str = PROMPT,
    roundings: int = GRADIENT,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """llama.cpp's log-probabilities of all tokens to come next, once they are seen to be transformers' own."""
    expected = log_probabilities(model, tokenizer(text).input_ids)
    spoken = tokenizer.convert_tokens_to_ids("a")
    found = running.log_probabilities(text, len(expected), spoken)
    assert_close(found, expected, roundings, dtype=dtype, at=text)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(family, tokenizer, monkeypatch)
    # llama.cpp looks GELU up in a table of half precision.
    half = FAMILIES[family][0].startswith(("gemma", "gpt2"))
    rounds: dict[str, Any] = {"roundings": HALF, "dtype": torch.float16} if half else {}
    base = export_model(model, tokenizer, tmp_path / "base.gguf", outtype="f32")
    bare = check(LlamaCpp(base), model, tokenizer, **rounds)

    # Every kind of layer, with a scale of its own at some.
    every = tz.LoRA(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True, alpha_pattern={"down_proj": 2.0})
    if family == "gpt2":
        every = tz.LoRA(r=3, target_modules=["c_attn", "c_proj", "c_fc"], rank_pattern={"c_attn": 2})
    attached(model, every)
    tz.activate(model, "a")
    adapter = export_adapter(model, "a", tmp_path / "a.gguf", outtype="f32")
    adapted = LlamaCpp(base, adapter)
    assert (check(adapted, model, tokenizer, **rounds) - bare).abs().max() > 0.1
    expected = continued(model, tokenizer, PROMPT, 8)
    without = unspoken(tokenizer, model.config.vocab_size)
    assert adapted.text(PROMPT, 8, without) == expected

    tz.merge(model, "a")
    merged = LlamaCpp(export_model(model, tokenizer, tmp_path / "merged.gguf", outtype="f32"))
    check(merged, model, tokenizer, **rounds)
    assert merged.text(PROMPT, 8, without) == expected


def test_an_adapter_of_separate_embeddings(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny("llama", "lm", vocab_size=len(tokenizer), tie_word_embeddings=False)
    base = export_model(model, tokenizer, tmp_path / "base.gguf", outtype="f32")
    attached(model, tz.LoRA(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]))
    tz.activate(model, "a")
    adapter = export_adapter(model, "a", tmp_path / "a.gguf", outtype="f32")
    check(LlamaCpp(base, adapter), model, tokenizer)


OUT_TYPES = {
    "f16": {"roundings": 2 * HALF, "dtype": torch.float16},
    "bf16": {"roundings": HALF, "dtype": torch.bfloat16},
    "q8_0": {"roundings": HALF, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize(("outtype", "rounds"), OUT_TYPES.items())
def test_types(outtype: str, rounds: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny("llama", "lm", vocab_size=len(tokenizer))
    base = export_model(model, tokenizer, tmp_path / "base.gguf", outtype=outtype)
    attached(model, tz.LoRA(r=2))
    tz.activate(model, "a")
    adapter = export_adapter(model, "a", tmp_path / "a.gguf", outtype=outtype)
    check(LlamaCpp(base, adapter), model, tokenizer, **rounds)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(base).tensors}
    assert kinds["blk.0.attn_q.weight"] == outtype.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    # A row of 48 is no whole number of blocks of 32.
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if outtype == "q8_0" else outtype.upper())


def test_an_unscaled_adapter_is_kept_bit_for_bit(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny("qwen3", "lm", vocab_size=len(tokenizer))
    attached(model, tz.LoRA(r=4, lora_alpha=16))
    reader = gguf.GGUFReader(export_adapter(model, "a", tmp_path / "a.gguf", outtype="f32"))
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert (said["general.architecture"], said["general.type"]) == ("qwen3", "adapter")
    assert (said["adapter.type"], said["adapter.lora.alpha"]) == ("lora", 16.0)
    written = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    layers = dict(manager_of(model).get("a").at())
    assert len(written) == 2 * len(layers)
    layer = layers["model.layers.1.self_attn.v_proj"]
    assert torch.equal(written["blk.1.attn_v.weight.lora_a"], layer.lora_A.weight)  # type: ignore[union-attr]
    assert torch.equal(written["blk.1.attn_v.weight.lora_b"], layer.lora_B.weight)  # type: ignore[union-attr]


@given(heads=st.integers(1, 4), half=st.integers(1, 4), columns=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_turned_rows_are_pairs(heads: int, half: int, columns: int) -> None:
    rows = torch.arange(heads * 2 * half * columns).view(-1, columns)
    turned = turn(rows, heads)
    for head in range(heads):
        for place in range(half):
            first = head * 2 * half
            assert torch.equal(turned[first + 2 * place], rows[first + place])
            assert torch.equal(turned[first + 2 * place + 1], rows[first + half + place])


# -- tokenizers

TEXTS = [
    PROMPT,
    "It'S 1234567 frogs,  isn't IT?\n\n\t Yes.  ",
    "古池や 蛙飛び込む水の音 🐸",
    " spaces  in   front",
    "thethe hethethe ofrofrog ondpond 3434567 waterter ininini",
    "a<s>b</s> c",
    "",
]
TOKENIZERS = {
    "gpt-2": lambda: byte_level("gpt-2", 400),
    "llama-bpe": lambda: byte_level("llama-bpe", 400),
    "qwen2": lambda: byte_level("qwen2", 400),
    "SentencePiece's BPE, as in Llama 2": lambda: sentencepiece_bpe(prefix=True),
    "SentencePiece's BPE, as in Gemma": lambda: sentencepiece_bpe(prefix=False),
    "SentencePiece's unigram model": unigram,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_are_cut_alike(kind: str, tmp_path: Path) -> None:
    """A random model's prediction depends on every token, so equal predictions mean equal tokens."""
    tokenizer = TOKENIZERS[kind]()
    model = tiny("llama", "lm", vocab_size=len(tokenizer))
    running = LlamaCpp(export_model(model, tokenizer, tmp_path / "base.gguf", outtype="f32"))
    for text in TEXTS if "unigram" not in kind else TEXTS[:1]:
        assert running.tokens(text) == len(tokenizer(text).input_ids), text
        check(running, model, tokenizer, text)


def test_the_pieces_of_a_tokenizer_are_all_there() -> None:
    tokenizer = sentencepiece_bpe(prefix=True)
    made = vocabulary_of(tokenizer, len(tokenizer) + 3)
    assert made.tokens == [*tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), *made.tokens[-3:]]
    assert made.tokens.count("<0x0A>") == 1 and made.types[made.tokens.index("<0x0A>")] == gguf.TokenType.BYTE
    assert made.types[-3:] == [gguf.TokenType.UNUSED] * 3
    assert made.types[tokenizer.eos_token_id] == gguf.TokenType.CONTROL


# -- what is refused


def test_refused_adapters(tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    cases: list[tuple[PreTrainedModel, tz.Method, str]] = [
        (tiny("llama", "cls"), tz.LoRA(r=2), "no classification head"),
        (tiny("llama", "lm"), tz.IA3(), "--merged"),
        (tiny("llama", "lm"), tz.AdaLoRA(), "--merged"),
        (tiny("llama", "lm"), tz.PromptTuning(num_virtual_tokens=2), "cannot be exported"),
        (tiny("llama", "lm", attention_bias=True), tz.LoRA(r=2, bias="lora_only"), "BiasCopy"),
        (tiny("llama", "lm"), tz.LoRA(r=2, modules_to_save=["lm_head"]), "WeightCopy at lm_head"),
        (tiny("qwen2", "lm", tie_word_embeddings=True), tz.LoRA(r=2, target_modules=["embed_tokens"]), "at once"),
        (tiny("opt", "lm"), tz.LoRA(r=2), "expected one of llama, mistral"),
    ]
    for model, method, message in cases:
        attached(model, method)
        with pytest.raises(tz.TanzakuError, match=message):
            export_adapter(model, "a", out)
    with pytest.raises(tz.TanzakuError, match="no adapter named 'b'"):
        export_adapter(model, "b", out)
    with pytest.raises(tz.TanzakuError, match="outtype is 'q4', expected f32"):
        export_adapter(model, "a", out, outtype="q4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "the activation is gelu, and llama.cpp computes silu"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "is dynamic"),
        ("gemma3", {}, "full attention in every 6th layer"),
        ("gemma3", {**GEMMA3, "query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise(
    kind: str, overrides: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny(kind, "lm", vocab_size=len(tokenizer), **overrides)
    with pytest.raises(tz.TanzakuError, match=message):
        export_model(model, tokenizer, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_beyond_a_window_that_llama_cpp_does_not_have(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny("mistral", "lm", vocab_size=len(tokenizer))
    reader = gguf.GGUFReader(export_model(model, tokenizer, tmp_path / "m.gguf"))
    assert reader.fields["llama.context_length"].contents() == 64


def test_tokenizers_that_llama_cpp_does_not_have(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    odd = byte_level()
    split = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, odd.backend_tokenizer.pre_tokenizer])
    with pytest.raises(tz.TanzakuError, match="splits text by"):
        vocabulary_of(odd, 400)
    with pytest.raises(tz.TanzakuError, match="320 tokens and the model's embedding 100 rows"):
        vocabulary_of(tokenizer, 100)
    model = tiny("llama", "lm", vocab_size=len(tokenizer))
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = 1e6
    with pytest.raises(tz.TanzakuError, match="float16's range"):
        export_model(model, tokenizer, tmp_path / "m.gguf", outtype="f16")
    assert list(tmp_path.iterdir()) == []


# -- the embedded model


@pytest.mark.slow
@pytest.mark.product
def test_the_embedded_model(tmp_path: Path) -> None:
    """Gemma 3 270M, as transformers reads its 4-bit file, cuts and continues texts alike in llama.cpp."""
    from transformers import AutoModelForCausalLM

    from tanzaku.models.loading import load_base, read_tokenizer

    model, _ = load_base("embedded", AutoModelForCausalLM, dtype=torch.float32)
    tokenizer = read_tokenizer("embedded")
    # Its weights are half-precision numbers, so nothing is rounded.
    base = export_model(model, tokenizer, tmp_path / "base.gguf", outtype="f16")
    attached(model, tz.LoRA(r=4, target_modules="all-linear", use_rslora=True, rank_pattern={"down_proj": 2}))
    for _, parameter in manager_of(model).get("a").trained():
        parameter.data.mul_(0.05)
    adapter = export_adapter(model, "a", tmp_path / "a.gguf", outtype="f32")
    adapted = LlamaCpp(base, adapter)
    poems = (Path(tz.__file__).parent / "data" / "poems" / "test.tsv").read_text(encoding="utf-8")
    for text in [*poems.splitlines()[:40], "The frog's  pond\n\n\tof 2024:", "<start_of_turn>user\n🐸", " leading"]:
        assert adapted.tokens(text) == len(tokenizer(text).input_ids), text
    for prompt in ("The old pond,", "古池や"):
        said = {}
        for name in (None, "a"):
            tz.activate(model, name)
            ids = torch.tensor([tokenizer(prompt).input_ids])
            out = model.generate(ids, max_new_tokens=12, do_sample=False)
            said[name] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert adapted.text(prompt, 12, []) == said["a"] != said[None]
    del adapted
    tz.merge(model, "a")
    merged = LlamaCpp(export_model(model, tokenizer, tmp_path / "merged.gguf", outtype="f16"))
    assert merged.text(prompt, 12, []) == said["a"]
