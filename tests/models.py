"""Tiny random models of many families, and batches for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedModel,
)

import tanzaku as tz
from tanzaku.methods import METHODS
from tanzaku.train.results import Job

VOCAB = 128
_COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_ENCODER = {**_DECODER, "type_vocab_size": 2}
_ROBERTA_IDS = {"pad_token_id": 1, "bos_token_id": 0}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

# Kind -> (model_type, settings beside the common ones). Activations are smooth: a gradient jumps where a ReLU's input
# is zero but for rounding, which is another number on another processor and in another batch.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 64}),
    "gemma3": (
        "gemma3_text",
        {
            **_DECODER,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "phi": ("phi", _DECODER),
    "phi3": ("phi3", _GROUPED),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", _DECODER),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "activation_function": "gelu",
        },
    ),
    "bert": ("bert", _ENCODER),
    "roberta": ("roberta", {**_ENCODER, "max_position_embeddings": 130, **_ROBERTA_IDS}),
    "deberta-v2": (
        "deberta-v2",
        {**_ENCODER, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
    ),
    "t5": (
        "t5",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gelu",
        },
    ),
    "bart": (
        "bart",
        {
            "d_model": 32,
            **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
            "max_position_embeddings": 128,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            **_ROBERTA_IDS,
        },
    ),
    "vit": ("vit", {**_TOWER, "image_size": 16, "patch_size": 8}),
    "clip": ("clip", {"projection_dim": 16}),
    "whisper": (
        "whisper",
        {
            "d_model": 32,
            **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}

_SEQ2SEQ = {"t5", "bart"}
_AUTO = {
    "cls": {
        "vit": AutoModelForImageClassification,
        "clip": AutoModelForImageClassification,
        "whisper": AutoModelForAudioClassification,
    },
    "lm": {
        **dict.fromkeys(_SEQ2SEQ, AutoModelForSeq2SeqLM),
        **dict.fromkeys(("bert", "roberta", "deberta-v2"), AutoModelForMaskedLM),
        "whisper": AutoModelForSpeechSeq2Seq,
    },
    "base": {},
}
_DEFAULT = {"cls": AutoModelForSequenceClassification, "lm": AutoModelForCausalLM, "base": AutoModel}


def config_of(kind: str, **overrides: Any) -> Any:
    """The tiny configuration of a kind; dropout is 0 unless asked for."""
    model_type, settings = KINDS[kind]
    if kind == "clip":
        text = {**_COMMON, **_TOWER, "max_position_embeddings": 64, "projection_dim": 16, "attention_dropout": 0.0}
        vision = {**_TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 16}
        overrides = {
            "text_config": CLIPTextConfig(**text).to_dict(),
            "vision_config": CLIPVisionConfig(**vision).to_dict(),
            **overrides,
        }
    common = {} if kind in ("vit", "clip") else _COMMON
    config = AutoConfig.for_model(model_type, **{**common, **settings, "num_labels": 3, **overrides})
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float) and name not in overrides:
            setattr(config, name, 0.0)
    return config


# What a method needs to fit tiny models, of which many have no bias, where its defaults do not.
NEEDED: dict[str, dict[str, Any]] = {
    "llama_adapter": {"adapter_layers": 1},
    "bitfit": {"bias_scope": "add"},
    "cpt": {"cpt_token_ids": [5, 9, 11, 7]},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 64},
    "miss": {"r": 8},
    "trainable_tokens": {"token_indices": [*range(3, 100, 2)]},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "psoft": {"r": 8},
    "supertuning": {"sparsity": 0.9},
    "vblora": {"vector_length": 8, "num_vectors": 16},
    "waveft": {"n_frequency": 64},
    "fusion": {"adapters": ["lora-a", "miss-a"]},
    "average": {"adapters": ["lora-a", "miss-a"]},
    "xlora": {"adapters": ["lora-a", "lora-b"]},
}

# What methods that are made of others are made of, up to the number or letter at the end of its name.
_PARTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "miss": {"r": 4},
    "ia3": {},
    "bottleneck": {"reduction_factor": 8, "non_linearity": "gelu"},
}


def attach(model: nn.Module, method: tz.Method, name: str = "default", *, seed: int | None = None) -> tz.Adapter:
    """`tz.attach`, after the adapters that the method uses, away from where they start: `lora-a` is a LoRA."""
    for number, each in enumerate(method.uses()):
        if each not in tz.adapters(model):
            kind = each.rpartition("-")[0]
            part = tz.attach(model, METHODS[kind].from_settings(_PARTS[kind]), each, seed=number)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for _, parameter in part.trained():
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return tz.attach(model, method, name, seed=seed)


def saved_parts(model: nn.Module, method: tz.Method, into: Path) -> dict[str, Path]:
    """Directories of the adapters that a method uses, as :func:`attach` makes them."""
    if method.uses():
        attach(model, method, "whole")
        for each in method.uses():
            tz.save(model, each, into / each)
        tz.detach(model)
    return {each: into / each for each in method.uses()}


def with_parts(model: nn.Module, jobs: list[Job], into: Path) -> list[Job]:
    """Jobs with the adapters that their methods use, made on the model and saved below `into`."""
    return [replace(job, uses=saved_parts(model, job.method, into / f"{job.name}-uses")) for job in jobs]


def tiny(kind: str, head: str = "cls", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model in eval mode.

    Args:
        kind: a key of `KINDS`.
        head: "cls" (3 labels), "lm" (causal, masked or conditional generation) or "base".
        overrides: settings of the configuration, and `attn_implementation`.
    """
    loading = {k: overrides.pop(k) for k in ("attn_implementation",) if k in overrides}
    config = config_of(kind, **overrides)
    auto = _AUTO[head].get(kind, _DEFAULT[head])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, **loading)
        lively(model)
    return model.eval()


@torch.no_grad()
def lively(model: nn.Module) -> None:
    """Redraw every weight, so that logits, attention and biases differ visibly from token to token."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            module = model.get_submodule(name.rpartition(".")[0])
            fan_in = parameter[0].numel()
            # An embedding that its model scales starts as much smaller.
            std = 0.5 / float(getattr(module, "embed_scale", 1)) if isinstance(module, nn.Embedding) else fan_in**-0.5
            parameter.normal_(std=std)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def batch(
    model: PreTrainedModel, rows: int = 4, length: int = 9, padding: str | None = "right", seed: int = 0
) -> dict[str, Tensor]:
    """Inputs for `model`: rows of different lengths padded at one side, or full rows without a mask."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    kind = config.model_type
    out: dict[str, Tensor] = {}
    if kind in ("vit", "clip", "clip_vision_model"):
        size = getattr(config, "vision_config", config).image_size
        out["pixel_values"] = torch.randn(rows, 3, size, size, generator=generator)
        if type(model).__name__ != "CLIPModel":
            return out
    if kind == "whisper":
        frames = 2 * config.max_source_positions
        out["input_features"] = torch.randn(rows, config.num_mel_bins, frames, generator=generator)
        if "Audio" not in type(model).__name__:
            out["decoder_input_ids"] = torch.randint(3, VOCAB, (rows, length), generator=generator)
        return out
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        # The first row is full, so that the batch is as long as its longest row.
        for row in range(1, rows):
            short = 1 + row % max(1, length // 2)
            mask[row, slice(length - short, None) if padding == "right" else slice(0, short)] = 0
    ends = mask.cumsum(1).argmax(1)
    if config.is_encoder_decoder and "Classification" in type(model).__name__:
        ids[torch.arange(rows), ends] = config.eos_token_id  # these classifiers read the last end-of-text token
    pad = getattr(config, "text_config", config).pad_token_id
    out["input_ids"] = torch.where(mask.bool(), ids, pad)
    if padding is not None:
        out["attention_mask"] = mask
    if config.is_encoder_decoder and "Classification" not in type(model).__name__:
        out["decoder_input_ids"] = torch.randint(3, VOCAB, (rows, length - 2), generator=generator)
    return out
