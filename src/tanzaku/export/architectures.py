"""The model families that llama.cpp knows and that are exported here: what of a config is written, what is refused.

llama.cpp fixes much of a family in its code: the activation, the pattern of sliding windows, the scale of attention. A
config that says otherwise would run there without a word and compute something else, so it is an error here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor

from tanzaku.errors import TanzakuError, nearest

_SILU = ("silu", "swish")
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` of transformers is written for llama.cpp."""

    arch: MODEL_ARCH
    activations: tuple[str, ...] = _SILU
    turned: bool = False  # rotary pairs lie side by side in llama.cpp and half a head apart in transformers
    shifted: bool = False  # norms multiply by 1 + weight in transformers and by the weight in llama.cpp
    tied_only: bool = False  # llama.cpp reads no output matrix beside the embedding
    period: int | None = None  # every so many layers one attends to everything, the others to a window
    wide: int | None = None  # the number of layers at which llama.cpp scales queries by hidden / heads

    @property
    def name(self) -> str:
        return str(gguf.MODEL_ARCH_NAMES[self.arch])

    def write(self, writer: GGUFWriter, config: Any) -> None:
        """Write the hyperparameters of `config`; an error where llama.cpp would compute another model."""
        self._check(config)
        if self.arch is MODEL_ARCH.GPT2:
            _write_gpt2(writer, config)
            return
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_context_length(self._context(config))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        self._write_rope(writer, config)
        if self.period is not None:
            writer.add_sliding_window(config.sliding_window)
        if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
            writer.add_attn_logit_softcapping(cap)
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            writer.add_final_logit_softcapping(cap)

    def tensor(self, config: Any, name: str, tensor: Tensor) -> Tensor:
        """A weight of transformers as llama.cpp has it; `tensor` is (out, in), (out,) or B of a low-rank change."""
        if self.turned and (found := re.search(r"\.([qk])_proj\.", f"{name}.")):
            heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
            return turn(tensor, heads)
        if self.shifted and name.endswith("norm.weight"):
            return tensor.float() + 1
        return tensor

    def extra(self, config: Any) -> Iterator[tuple[str, Tensor]]:
        """Tensors that llama.cpp reads and transformers computes: the frequencies of Llama 3's rotary embedding."""
        rope = _rope(config)[0]
        if rope.get("rope_type") == "llama3":
            yield "rope_freqs.weight", _llama3_factors(config, rope)

    def _check(self, config: Any) -> None:
        kind = config.model_type
        found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        found = found or getattr(config, "activation_function", None)
        _same(kind, "the activation", found, self.activations)
        if self.tied_only:
            _same(kind, "tie_word_embeddings", config.tie_word_embeddings, (True,))
        if getattr(config, "use_bidirectional_attention", False):
            _same(kind, "use_bidirectional_attention", True, (False,))
        if self.period is not None:
            layers = [
                "full_attention" if (i + 1) % self.period == 0 else "sliding_attention"
                for i in range(config.num_hidden_layers)
            ]
            if list(config.layer_types) != layers:
                raise TanzakuError(
                    f"{kind}: found layer_types {list(config.layer_types)[: self.period + 1]} ..., and llama.cpp has "
                    f"full attention in every {self.period}th layer; this model cannot be exported"
                )
            head_dim = config.head_dim
            wide = config.num_hidden_layers == self.wide
            scale = config.hidden_size // config.num_attention_heads if wide else head_dim
            _same(kind, "query_pre_attn_scalar", config.query_pre_attn_scalar, (scale,))

    def _context(self, config: Any) -> int:
        """Positions that llama.cpp shall take. It has no window in these families: beyond one it would differ."""
        window = None
        if self.period is None and "sliding_attention" in (
            getattr(config, "layer_types", None) or ["sliding_attention"]
        ):
            window = getattr(config, "sliding_window", None)
        return int(min(config.max_position_embeddings, window or math.inf))

    def _write_rope(self, writer: GGUFWriter, config: Any) -> None:
        rope, local = _rope(config)
        writer.add_rope_freq_base(rope["rope_theta"])
        if local is not None:
            _same(config.model_type, "the rotary embedding of sliding layers", local.get("rope_type"), ("default",))
            writer.add_rope_freq_base_swa(local["rope_theta"])
        kind = rope.get("rope_type", "default")
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif kind != "default":
            _same(config.model_type, "the rotary embedding", kind, ("default", "linear", *(["llama3"] * self.turned)))


_LLAMA = Architecture(MODEL_ARCH.LLAMA, turned=True)
_GEMMA = {"activations": _GELU_TANH, "shifted": True}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "gemma": Architecture(MODEL_ARCH.GEMMA, tied_only=True, **_GEMMA),  # type: ignore[arg-type]
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, tied_only=True, period=2, wide=46, **_GEMMA),  # type: ignore[arg-type]
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, period=6, wide=62, **_GEMMA),  # type: ignore[arg-type]
    "gpt2": Architecture(MODEL_ARCH.GPT2, activations=_GELU_TANH),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a config, or an error with the list of those that can be exported."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise TanzakuError(
            f"a {config.model_type!r} model cannot be exported to GGUF{nearest(config.model_type, ARCHITECTURES)}; "
            f"expected one of {', '.join(ARCHITECTURES)}"
        )
    return found


def turn(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to pairs, as llama.cpp rotates them; (heads * dim, ...)."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _same(kind: str, what: str, found: Any, expected: tuple[Any, ...]) -> None:
    if found not in expected:
        said = " or ".join(str(each) for each in expected)
        raise TanzakuError(f"{kind}: {what} is {found}, and llama.cpp computes {said}; this model cannot be exported")


def _rope(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The rotary embedding of all layers, or of those with full and with sliding attention."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention")
    return rope, None


def _llama3_factors(config: Any, rope: dict[str, Any]) -> Tensor:
    """What each frequency is divided by, (head_dim / 2,), read off transformers' own computation."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double()
    dim = 2 * scaled.numel()
    plain = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors: Tensor = plain / scaled
    return factors.float()


def _write_gpt2(writer: GGUFWriter, config: Any) -> None:
    for name, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        _same("gpt2", name, getattr(config, name), (usual,))
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
