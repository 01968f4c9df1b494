"""LLaMA-Adapter: a second attention over learned prompts, opened by a gate that starts at zero.

    Attention(q, k, v) + g * softmax(q (W_k p)^T / sqrt(d)) (W_v p),  g = 0 at first, in the top layers

The prompts p go through the layer's own frozen key and value projections. Zhang et al. 2023, arXiv 2303.16199.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.families import Base, Family, weight_of
from tanzaku.method import AttentionCall, AttentionStrip, Method, Strip, trainable
from tanzaku.methods.prefix_tuning import kv_shape
from tanzaku.sites import quiet
from tanzaku.space import Choice, Range, spaces


class GatedPrompt(AttentionStrip):
    """One layer's prompt (1, n, hidden) and gate (1,)."""

    def __init__(self, base: Base, module: nn.Module, length: int):
        super().__init__()
        family = base.family or Family(lora=())
        self.family = family
        self.heads, self.head_dim = kv_shape(base)
        first = getattr(module, family.fused or family.key)
        like = weight_of(first)
        self.adaption_prompt = trainable(1, length, base.hidden_size, like=like, fill=nn.init.normal_)
        self.adaption_gate = trainable(1, like=like)

    def keys_values(self, module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt, each (1, kv_heads, n, head_dim), by the layer's own projections."""
        family = self.family
        with quiet():
            if family.fused:
                both = getattr(module, family.fused)(self.adaption_prompt.to(dtype))
                k, v = self._split(both)
            else:
                prompt = self.adaption_prompt.to(dtype)
                k, v = getattr(module, family.key)(prompt), getattr(module, family.value)(prompt)
                k, v = (x.view(1, x.shape[1], self.heads, self.head_dim).transpose(1, 2) for x in (k, v))
            norm = getattr(module, family.key_norm, None) if family.key_norm else None
            return (norm(k) if norm is not None else k), v

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        n = fused.shape[1]
        if self.family.fused == "query_key_value":  # GPT-NeoX: query, key, value lie together in each head
            _, k, v = fused.view(1, n, self.heads, 3 * self.head_dim).transpose(1, 2).chunk(3, dim=-1)
            return k, v
        width = self.heads * self.head_dim
        k, v = fused[..., -2 * width : -width], fused[..., -width:]
        shape = (1, n, self.heads, self.head_dim)
        return k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)

    def attend(self, call: AttentionCall) -> Tensor:
        own = call.run()
        q = call.query
        rows, heads, queries, head_dim = q.shape
        k, v = self.keys_values(call.module, q.dtype)
        scaling = call.options.get("scaling")
        scaling = head_dim**-0.5 if scaling is None else scaling
        # Query heads that share a key-value head are folded into the query dimension: no repeated keys.
        folded = q.reshape(rows, self.heads, heads // self.heads * queries, head_dim)
        scores = torch.matmul(folded, k.transpose(2, 3)) * scaling
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        second = torch.matmul(weights, v).reshape(rows, heads, queries, head_dim).transpose(1, 2)
        return (own + self.adaption_gate * second).to(own.dtype)


@dataclass
class LlamaAdapter(Method):
    """LLaMA-Adapter, on any model whose attention goes through transformers' attention interface.

    As in PEFT, a classifier's head is not trained along unless `modules_to_save` names it; it is saved all the same.

    Args:
        adapter_len: learned prompts a layer. adapter_layers: how many layers, counted from the top.
        target_modules: last name of the attention modules; None takes the family's.
    """

    name = "llama_adapter"
    peft_type = "ADAPTION_PROMPT"
    paper = "arXiv 2303.16199"
    summary = "gated attention over learned prompts in the top layers"
    trains_head = False
    # The authors' 9e-3 with 10 prompts a layer. How many layers there are to adapt depends on the model.
    space = spaces(adapter_len=Choice((5, 10, 20)), learning_rate=Range(5e-4, 5e-2, log=True))

    adapter_len: int = 10
    adapter_layers: int = 8
    target_modules: str | None = None

    def build(self, base: Base) -> Iterator[tuple[str, Strip]]:
        self.require(self.adapter_len > 0, f"adapter_len={self.adapter_len}", "1 or more")
        layers = base.attention()
        self.require(
            0 < self.adapter_layers <= len(layers),
            f"adapter_layers={self.adapter_layers}",
            f"1 to the model's {len(layers)}",
        )
        if self.target_modules is None:
            self.target_modules = base.family.attention if base.family else "self_attn"
        for path, module in layers[-self.adapter_layers :]:
            family = base.family or Family(lora=())
            self.require(
                hasattr(module, family.fused or family.key),
                f"{path} without a {family.fused or family.key}",
                "the key and value projections of a known model family",
            )
            yield path, GatedPrompt(base, module, self.adapter_len)
