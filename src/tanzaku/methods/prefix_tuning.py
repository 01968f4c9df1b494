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

from tanzaku.core.method import About, AdapterLayer, AttentionCall, AttentionLayer, Place, home
from tanzaku.core.shared import Shared
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.errors import TanzakuError
from tanzaku.methods.prompt_tuning import PromptLearning, text_ids
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.support.refs import Ref


class Prefix(Shared):
    """All layers' keys and values: (n, layers * 2 * heads * head_dim), direct or through an MLP.

    Args:
        shapes: (heads, head_dim) of each layer's keys and of its values.
    """

    place = "prefix"

    def __init__(self, tokens: int, shapes: list[tuple[int, int]], hidden: int | None, width: int, zero: bool):
        super().__init__()
        self.tokens = tokens
        self.shapes, size = shapes, sum(heads * dim for heads, dim in shapes)
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

    def compute(self) -> tuple[Tensor, ...]:
        """Keys and values of all layers, one after another, 2 * layers tensors of (heads, n, head_dim)."""
        flat, shapes = self(), self.shapes
        if len(set(shapes)) == 1:
            return flat.view(len(flat), len(shapes), *shapes[0]).permute(1, 2, 0, 3).unbind(0)  # type: ignore[no-any-return]
        parts = torch.split(flat, [heads * dim for heads, dim in shapes], dim=1)
        return tuple(part.view(-1, *shape).transpose(0, 1) for part, shape in zip(parts, shapes, strict=True))

    def export(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"prompt_embeddings": self()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict({"embedding.weight": tensors["prompt_embeddings"]})


class PrefixLayer(AttentionLayer):
    """One layer's slice of the prefix.

    Args:
        slot: the layer's number in the prefix.
    """

    def __init__(self, prefix: Prefix, bias: nn.Module | None, slot: int):
        super().__init__()
        self.position_offset, self.slot = prefix.tokens, slot
        self.prefix, self.bias = Ref(prefix), Ref(bias)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (heads, n, head_dim)."""
        prefix = self.prefix()
        if prefix is None:
            raise TanzakuError("this layer was copied without the prefix that all layers share: copy the whole adapter")
        written = prefix.value()
        return written[2 * self.slot], written[2 * self.slot + 1]

    def attend(self, call: AttentionCall) -> Tensor:
        n = self.position_offset
        rows, keys = call.key.shape[0], call.key.shape[2]
        k, v = (x.to(call.key.dtype).expand(rows, -1, -1, -1) for x in self.keys_values())
        # Before flash attention, a model pads its values to the length of its keys.
        v = F.pad(v, (0, call.value.shape[-1] - v.shape[-1]))
        mask, queries = call.mask, call.query.shape[2]
        if mask is None:
            causal = call.options.get("is_causal")
            causal = getattr(call.module, "is_causal", True) if causal is None else causal
            # Flash attention aligns its causal mask with the last key, so it needs none. The others' begins with the
            # first: more keys than queries are a cache that has room left.
            if causal and queries > 1 and "flash" not in call.implementation:
                own = torch.ones(queries, keys, dtype=torch.bool, device=k.device).tril()
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
        holder: Any = self.bias()
        if holder is None:  # a bias that the row's own tokens give: the prefix stands in no relation to them
            return F.pad(bias, (n, 0))
        before = holder.compute_bias(queries, n, device=bias.device, past_seen_tokens=n + keys - queries)
        return torch.cat([before.to(bias).expand(bias.shape[0], -1, -1, -1), bias], dim=-1)


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
    about = About(
        where="keys and values in front of every attention layer",
        parameters="2 * layers * num_virtual_tokens * key width; with projection, the network besides",
        cost="attention over num_virtual_tokens more keys",
        choose="to steer generation, with the model itself left as it is",
        limits="not for layers without attention; does not merge",
    )
    learning_rate = 5e-3  # HF PEFT's method comparison; P-tuning v2 (arXiv 2110.07602): 5e-3 to 2e-2.
    # The paper: 5e-5 with the MLP; P-tuning v2: about 7e-3 without it, and short prefixes for classification.
    space = spaces(num_virtual_tokens=Choice((5, 10, 20, 50)), learning_rate=Range(5e-5, 5e-2, log=True))

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None
    prefix_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        # What the prefix began with is in its tensors.
        return {
            key: value for key, value in config.items() if key not in ("prefix_init_text", "tokenizer_name_or_path")
        }

    def file_type(self, base: Base) -> str:
        # PEFT's reading of an encoder-decoder's prefix leaves half of an even number of layers' slots unused.
        ours = base.encoder_decoder and self.num_transformer_submodules == 1
        return f"TANZAKU_{self.peft_type}" if ours else self.peft_type

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        submodules = self.num_transformer_submodules or 1
        found = base.attention_layers()
        if states := base.structure.remembers:
            raise TanzakuError(
                f"{self.name}: {states[0]} of model type {base.kind!r} begins anew at position 0, which a prefix takes"
            )
        if base.by_columns:
            raise TanzakuError(
                f"{self.name}: {base.by_columns} of model type {base.kind!r} sums up columns by their number, and "
                "a prefix, which takes positions and no columns, would let tokens see what comes after them"
            )
        self.check(base)
        self.num_transformer_submodules = submodules
        self.require(self.init_weights in (None, "zero"), f"init_weights={self.init_weights!r}", "None or 'zero'")
        layers = [(layer.path, base.model.get_submodule(layer.path)) for layer in found]
        shapes = [
            shape for layer in found for shape in ((layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim))
        ]
        size = sum(heads * dim for heads, dim in shapes)
        self.num_layers, self.num_attention_heads = len(layers), found[0].kv_heads
        self.token_dim = size // len(shapes)  # on average, where layers have keys and values of their own size
        self.encoder_hidden_size = self.token_dim if self.encoder_hidden_size is None else self.encoder_hidden_size
        self.require(self.encoder_hidden_size > 0, f"encoder_hidden_size={self.encoder_hidden_size}", "1 or more")
        device = home(next(tree.parameters(base.model)))
        with torch.device(device):
            prefix = self.prefix(shapes)
        if self.prefix_init_text and not self.inference_mode and device.type != "meta":
            self.require(prefix.transform is None, "prefix_init_text with prefix_projection", "one of the two")
            self._start_from_text(base, prefix, layers)
        bias = next((m for _, m in layers if getattr(m, "has_relative_attention_bias", False)), None)
        yield "", prefix
        for number, (path, _) in enumerate(layers):
            # In PEFT's files for encoder-decoders layer i reads slot 2 i, so two layers may share one.
            yield path, PrefixLayer(prefix, bias, slot=number * submodules % len(layers))

    def prefix(self, shapes: list[tuple[int, int]]) -> Prefix:
        """What all layers share, for keys and values of these shapes."""
        projected = self.prefix_projection and not self.inference_mode
        width, zero = cast(int, self.encoder_hidden_size), self.init_weights == "zero"
        return Prefix(self.num_virtual_tokens, shapes, self.token_dim if projected else None, width, zero)

    def initial_ids(self) -> list[int]:
        """(num_virtual_tokens,) ids of the text that the prefix starts from, repeated or cut."""
        ids = text_ids(self, self.prefix_init_text, self.tokenizer_name_or_path, None)
        return (ids * math.ceil(self.num_virtual_tokens / len(ids)))[: self.num_virtual_tokens]

    @torch.no_grad()
    def _start_from_text(self, base: Base, prefix: Prefix, layers: list[tuple[str, nn.Module]]) -> None:
        """Copy the keys and values that the base computes for the text."""
        self.require(not base.encoder_decoder, "prefix_init_text on an encoder-decoder", "a decoder-only model")
        ids = self.initial_ids()
        device = home(next(tree.parameters(base.model)))
        training = base.model.training
        base.model.eval()
        out = base.backbone(input_ids=torch.tensor([ids], device=device), use_cache=True)
        base.model.train(training)
        cache = out.past_key_values
        self.require(cache is not None, "a model without a key-value cache", "a decoder")
        pairs = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # (heads, n, head_dim)
        flat = [x.transpose(0, 1).flatten(1) for pair in pairs for x in pair]
        prefix.restore({"prompt_embeddings": torch.cat(flat, dim=1).to(prefix().dtype)})
