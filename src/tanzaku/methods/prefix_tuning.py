"""Prefix tuning: learned keys and values in front of every attention layer's own.

    Attention(q, [P_k ; k], [P_v ; v])  at each layer, P trained directly or written by an MLP

The prefix takes positions: a row's first token is numbered after it. Li and Liang 2021, arXiv 2101.00190; without the
MLP it is P-tuning v2, Liu et al. 2021, arXiv 2110.07602.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.families import Base
from tanzaku.method import AttentionCall, AttentionStrip, Strip
from tanzaku.methods.prompt_tuning import PromptLearning, text_ids
from tanzaku.space import Choice, Range, spaces


class Prefix(nn.Module):
    """All layers' keys and values: (n, layers * 2 * heads * head_dim), direct or through an MLP."""

    def __init__(self, tokens: int, size: int, hidden: int | None, width: int, zero: bool):
        super().__init__()
        self.embedding = nn.Embedding(tokens, hidden or size)
        self.transform: nn.Sequential | None = None
        last: nn.Module = self.embedding
        if hidden:
            self.transform = nn.Sequential(nn.Linear(hidden, width), nn.Tanh(), nn.Linear(width, size))
            last = self.transform[-1]
        if zero and self.embedding.weight.device.type != "meta":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self) -> Tensor:
        x = self.embedding.weight
        return x if self.transform is None else cast(Tensor, self.transform(x))


class PrefixStrip(AttentionStrip):
    """One layer's slice of the prefix. The first layer's strip owns it and gives it to the file."""

    def __init__(self, shared: dict[str, Any], layer: int, slot: int, layers: int, heads: int, head_dim: int):
        super().__init__()
        prefix = shared["prefix"]
        self.position_offset = prefix.embedding.num_embeddings
        self.shape = (self.position_offset, layers * 2, heads, head_dim)
        self.slot = slot
        self.prefix = prefix if layer == 0 else None
        # What all layers share is reached past nn.Module's registry: it is the first strip's to train and to save.
        self.__dict__["shared"] = shared

    def refresh(self) -> None:
        if self.prefix is not None:
            self.__dict__["shared"]["written"] = self._write()

    def _write(self) -> tuple[Tensor, ...]:
        """Keys and values of all layers, 2 * layers tensors of (heads, n, head_dim)."""
        flat: Tensor = self.__dict__["shared"]["prefix"]()
        return flat.view(self.shape).permute(1, 2, 0, 3).unbind(0)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (heads, n, head_dim)."""
        written = self.__dict__["shared"].get("written") or self._write()
        return written[2 * self.slot], written[2 * self.slot + 1]

    def attend(self, call: AttentionCall) -> Tensor:
        n = self.position_offset
        rows, keys = call.key.shape[0], call.key.shape[2]
        k, v = (x.to(call.key.dtype).expand(rows, -1, -1, -1) for x in self.keys_values())
        mask, queries = call.mask, call.query.shape[2]
        if mask is None:
            causal = call.options.get("is_causal")
            causal = getattr(call.module, "is_causal", True) if causal is None else causal
            # Flash attention aligns its causal mask with the last key, so it needs none.
            if causal and queries > 1 and "flash" not in call.implementation:
                own = torch.ones(queries, keys, dtype=torch.bool, device=k.device).tril(keys - queries)
                mask = F.pad(own, (n, 0), value=True)[None, None]
        elif mask.dim() == 2:  # flash attention: one number a key
            mask = F.pad(mask, (n, 0), value=1)
        else:
            mask = F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)
        options = dict(call.options)
        if options.get("position_bias") is not None:
            options["position_bias"] = self._with_bias(options["position_bias"], queries, keys)
        key, value = torch.cat([k, call.key], dim=2), torch.cat([v, call.value], dim=2)
        return replace(call, key=key, value=value, mask=mask, options=options).run()

    def _with_bias(self, bias: Tensor, queries: int, keys: int) -> Tensor:
        """Relative positions of the prefix, which lies before the row's own keys."""
        n = self.position_offset
        holder: Any = self.__dict__["shared"]["bias"]
        before = holder.compute_bias(queries, n, device=bias.device, past_seen_tokens=n + keys - queries)
        return torch.cat([before.to(bias).expand(bias.shape[0], -1, -1, -1), bias], dim=-1)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        if self.prefix is not None:
            yield from self.prefix.named_parameters(*args, **kwargs)

    def export(self) -> dict[str, Tensor]:
        if self.prefix is None:
            return {}
        with torch.no_grad():
            return {"prompt_embeddings": self.prefix()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if self.prefix is not None:
            self.prefix.load_state_dict({"embedding.weight": tensors["prompt_embeddings"]})


@dataclass
class PrefixTuning(PromptLearning):
    """Prefix tuning.

    Args:
        num_virtual_tokens: length of the prefix.
        prefix_projection: write the prefix with an MLP of width encoder_hidden_size (None: that of a layer's keys).
        init_weights: "zero" for a prefix of zeros, None for normal random numbers.
        prefix_init_text, tokenizer_name_or_path: start from the keys and values the model computes for this text.
    """

    name = "prefix_tuning"
    peft_type = "PREFIX_TUNING"
    paper = "arXiv 2101.00190"
    summary = "learned keys and values at every attention layer"
    # The paper: 5e-5 with the MLP; P-tuning v2: about 7e-3 without it, and short prefixes for classification.
    space = spaces(num_virtual_tokens=Choice((5, 10, 20, 50)), learning_rate=Range(5e-5, 5e-2, log=True))

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None
    prefix_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def file_type(self, base: Base) -> str:
        # PEFT's reading of an encoder-decoder's prefix leaves half of an even number of layers' slots unused.
        ours = base.encoder_decoder and self.num_transformer_submodules == 1
        return f"TANZAKU_{self.peft_type}" if ours else self.peft_type

    def build(self, base: Base) -> Iterator[tuple[str, Strip]]:
        submodules = self.num_transformer_submodules or 1
        self.check(base)
        self.num_transformer_submodules = submodules
        self.require(self.init_weights in (None, "zero"), f"init_weights={self.init_weights!r}", "None or 'zero'")
        layers = base.attention()
        heads, head_dim = kv_shape(base)
        self.num_layers, self.num_attention_heads, self.token_dim = len(layers), heads, heads * head_dim
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim
        size = len(layers) * 2 * self.token_dim
        projected = self.prefix_projection and not self.inference_mode
        device = next(base.model.parameters()).device
        with torch.device(device):
            prefix = Prefix(
                self.num_virtual_tokens,
                size,
                self.token_dim if projected else None,
                self.encoder_hidden_size,
                self.init_weights == "zero",
            )
        if self.prefix_init_text and not self.inference_mode and device.type != "meta":
            self.require(not projected, "prefix_init_text with prefix_projection", "one of the two")
            self._start_from_text(base, prefix, layers)
        bias = next((m for _, m in layers if getattr(m, "has_relative_attention_bias", False)), None)
        shared = {"prefix": prefix, "bias": bias}
        for number, (path, _) in enumerate(layers):
            # In PEFT's files for encoder-decoders layer i reads slot 2 i, so two layers may share one.
            slot = number * submodules % len(layers)
            yield path, PrefixStrip(shared, number, slot, len(layers), heads, head_dim)

    @torch.no_grad()
    def _start_from_text(self, base: Base, prefix: Prefix, layers: list[tuple[str, nn.Module]]) -> None:
        """Copy the keys and values that the base computes for the text, repeated or cut to the prefix's length."""
        self.require(not base.encoder_decoder, "prefix_init_text on an encoder-decoder", "a decoder-only model")
        ids = text_ids(self, self.prefix_init_text, self.tokenizer_name_or_path, None)
        ids = (ids * math.ceil(self.num_virtual_tokens / len(ids)))[: self.num_virtual_tokens]
        device = next(base.model.parameters()).device
        training = base.model.training
        base.model.eval()
        out = base.backbone(input_ids=torch.tensor([ids], device=device), use_cache=True)
        base.model.train(training)
        cache = out.past_key_values
        self.require(cache is not None, "a model without a key-value cache", "a decoder")
        pairs = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # (heads, n, head_dim)
        flat = [x.transpose(0, 1).flatten(1) for pair in pairs for x in pair]
        prefix.embedding.weight.copy_(torch.cat(flat, dim=1))


def kv_shape(base: Base) -> tuple[int, int]:
    """(key-value heads, head_dim) of the model's attention."""
    c = base.config
    heads = next(
        v
        for k in (
            "num_attention_heads",
            "n_head",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
        )
        if (v := getattr(c, k, None)) is not None
    )
    head_dim = getattr(c, "head_dim", None) or getattr(c, "d_kv", None) or base.hidden_size // heads
    return getattr(c, "num_key_value_heads", None) or heads, head_dim
