"""LLaMA-Adapter: a second attention over learned prompts, opened by a gate that starts at zero.

    Attention(q, k, v) + g * softmax(q (W_k p)^T / sqrt(d)) (W_v p),  g = 0 at first, in the top layers

The prompts p go through the layer's own frozen key and value projections. Zhang et al. 2023, arXiv 2303.16199.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, AttentionCall, AttentionLayer, Method, Place, trainable
from tanzaku.core.quiet import quiet
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import Attention, Base
from tanzaku.models.families.prompt_call import PromptCall, keys_values
from tanzaku.support.refs import Ref


class GatedPrompt(AttentionLayer):
    """One layer's prompt (1, n, width) and gate (1,)."""

    def __init__(self, base: Base, layer: Attention, how: PromptCall, length: int):
        super().__init__()
        self.heads, self.how = layer.kv_heads, how
        module = base.model.get_submodule(layer.of)
        self.source = Ref(None if layer.of == layer.path else module)  # another layer, whose keys and values this has
        like = next(tree.parameters(module))
        self.adaption_prompt = trainable(1, length, how.width, like=like, fill=nn.init.normal_)
        self.adaption_gate = trainable(1, like=like)

    def keys_values(self, module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt, each (1, kv_heads, n, head_dim), by the code of the layer that has them."""
        with quiet():
            return keys_values(self.source() or module, self.how, self.adaption_prompt.to(dtype))

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
        second = torch.matmul(weights, v).reshape(rows, heads, queries, v.shape[-1]).transpose(1, 2)
        return (own + self.adaption_gate * second).to(own.dtype)


@dataclass
class LlamaAdapter(Method):
    """LLaMA-Adapter, on any model whose attention goes through transformers' attention interface.

    As in PEFT, a classifier's head is not trained along unless `modules_to_save` names it; it is saved all the same.

    Args:
        adapter_len: learned prompts a layer. adapter_layers: how many layers, counted from the top; None takes
            8, or all of a model that has fewer.
        target_modules: last name of the attention modules; None takes the model's.
    """

    name = "llama_adapter"
    peft_type = "ADAPTION_PROMPT"
    paper = "arXiv 2303.16199"
    summary = "gated attention over learned prompts in the top layers"
    about = About(
        where="a second attention over learned tokens in the upper layers, through a gate that starts at zero",
        parameters="adapter_layers * (adapter_len * width + 1)",
        cost="a small second attention in these layers",
        choose="for decoders, to start exactly from the base and disturb it little",
        limits="does not merge; not where attention has no query of its own",
    )
    trains_head = False
    learning_rate = 5e-3  # HF PEFT's method comparison; the paper: 9e-3.
    # The authors' 9e-3 with 10 prompts a layer. How many layers there are to adapt depends on the model.
    space = spaces(adapter_len=Choice((5, 10, 20)), learning_rate=Range(5e-4, 5e-2, log=True))

    adapter_len: int = 10
    adapter_layers: int | None = None
    target_modules: str | None = None

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        # PEFT's own has the setting only where it names something.
        return {key: value for key, value in config.items() if key != "modules_to_save" or value}

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        self.require(self.adapter_len > 0, f"adapter_len={self.adapter_len}", "1 or more")
        layers = base.attention_layers()
        if self.adapter_layers is None:
            self.adapter_layers = min(8, len(layers))
        self.require(
            0 < self.adapter_layers <= len(layers),
            f"adapter_layers={self.adapter_layers}",
            f"1 to the model's {len(layers)}",
        )
        if self.target_modules is None:
            known = base.family.attention if base.family else None
            self.target_modules = known or layers[-1].path.rpartition(".")[2]
        for layer in layers[-self.adapter_layers :]:
            module = base.model.get_submodule(layer.path)
            how = layer.prompt
            if how is None:
                raise TanzakuError(
                    f"{self.name}: {layer.path}, a {type(module).__name__}, gives no keys and values of a prompt by "
                    "itself: expected attention whose keys and values are projections of one input"
                )
            yield layer.path, GatedPrompt(base, layer, how, self.adapter_len)
