"""The settings each method is tested with, and the few operations that all laws share.

A law runs over the whole registry. What is true of a method is read off its class and its layers, not off its name.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import tanzaku as tz
from close import GRADIENT, PASS, assert_close
from models import VOCAB, attach, batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.method import Method, TokenLayer
from tanzaku.core.routing import Entry
from tanzaku.methods import METHODS
from tiers import costly

# Method -> variant -> settings. The first variant fits every family; the others are made for the LLaMA classifier.
# Activations are smooth: see models.py.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "default": {"r": 2},
        "dropout": {"r": 2, "lora_dropout": 0.5},
        "all-linear": {"r": 2, "target_modules": "all-linear"},
        "rslora": {"r": 3, "use_rslora": True, "init_lora_weights": "gaussian"},
        "bias-all": {"r": 2, "bias": "all"},
        "modules_to_save": {"r": 2, "modules_to_save": ["score", "down_proj"]},
        "rank_pattern": {"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
        "layers_to_transform": {"r": 2, "layers_to_transform": [1]},
        "embedding": {"r": 2, "target_modules": ["embed_tokens", "v_proj"]},
        "dora": {"r": 2, "use_dora": True},
        "pissa": {"r": 2, "init_lora_weights": "pissa", "lora_alpha": 3},
    },
    "adalora": {
        "default": {"init_r": 3, "target_r": 2},
        "fraction": {"init_r": 2, "target_r": 0.5, "lora_alpha": 16, "target_modules": "all-linear"},
    },
    "prompt_tuning": {"default": {"num_virtual_tokens": 3}, "longer": {"num_virtual_tokens": 7}},
    "p_tuning": {
        "default": {"num_virtual_tokens": 2},
        "lstm": {"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8},
    },
    "prefix_tuning": {
        "default": {"num_virtual_tokens": 3},
        "projection": {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 16},
        "zero": {"num_virtual_tokens": 2, "init_weights": "zero"},
    },
    "p_tuning_v2": {"default": {"num_virtual_tokens": 3}},
    "cartridge": {"default": {"num_virtual_tokens": 3}},
    "multitask_prompt_tuning": {"default": {"num_virtual_tokens": 3}},
    "cpt": {
        "default": {
            "cpt_token_ids": [5, 9, 11, 7],
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            "opt_projection_epsilon": 30.0,
            "opt_projection_format_epsilon": 30.0,
        },
        "near": {
            "cpt_token_ids": [4, 8, 15, 16, 23, 42],
            "cpt_tokens_type_mask": [1, 2, 4, 6, 7, 8],
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": 0.9,
        },
    },
    "ia3": {
        "default": {},
        "feedforward": {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["up_proj", "down_proj"]},
    },
    "llama_adapter": {
        "default": {"adapter_len": 4, "adapter_layers": 1},
        "every-layer": {"adapter_len": 6, "adapter_layers": 2},
    },
    "bitfit": {"default": {"bias_scope": "add"}, "all": {}, "query_up": {"bias_scope": "query_up"}},
    "beft": {"default": {}, "wide": {"target_modules": ["v_proj", "down_proj"]}},
    "bottleneck": {
        "default": {"reduction_factor": 8, "non_linearity": "gelu"},
        "houlsby": {"reduction_factor": 8, "style": "houlsby"},
        "gated": {
            "reduction_factor": 8,
            "non_linearity": "gelu",
            "use_gating": True,
            "ln_before": True,
            "scaling": "learned",
        },
        "invertible": {"reduction_factor": 8, "non_linearity": "gelu", "inv_adapter": "nice"},
        "parallel": {"reduction_factor": 8, "non_linearity": "gelu", "style": "parallel", "mh_adapter": True},
    },
    "compacter": {"default": {"reduction_factor": 4}},
    "reft": {
        "default": {"r": 2, "dropout": 0.0, "prefix_positions": 16},  # so that a classifier's last layer has some to do
        "suffix": {"r": 2, "style": "direft", "prefix_positions": 0, "suffix_positions": 2},
    },
    "hyper": {
        "default": {"reduction_factor": 8, "embedding_dim": 6, "hidden_dim": 8},
        "attention": {"reduction_factor": 8, "embedding_dim": 4, "hidden_dim": 8, "output_adapter": False},
    },
    "text_to_lora": {
        "default": {"r": 2, "embedding_dim": 4, "hidden_dim": 6},
        "described": {
            "r": 3,
            "embedding_dim": 4,
            "hidden_dim": 6,
            "descriptions": [[0.5, -1.0, 0.25]],
            "target_modules": "all-linear",
        },
    },
    "ln_tuning": {"default": {}, "one": {"target_modules": ["post_attention_layernorm"]}},
    "trainable_tokens": {"default": {"token_indices": [*range(3, VOCAB, 2)]}},
    "loha": {"default": {"r": 2}},
    "lokr": {"default": {"r": 2}},
    "vera": {"default": {"r": 6}},
    "pvera": {"default": {"r": 6}},
    "oft": {"default": {"oft_block_size": 8}, "cayley": {"oft_block_size": 8, "use_cayley_neumann": False}},
    "hra": {"default": {"r": 4}},
    "fourierft": {"default": {"n_frequency": 40, "init_weights": True}},
    "c3a": {"default": {"block_size": 8, "init_weights": True}},
    "boft": {"default": {}, "butterfly": {"boft_n_butterfly_factor": 3}},
    "miss": {"default": {"r": 4}, "bat": {"r": 8, "init_weights": "bat"}},
    "shira": {"default": {"r": 2}},
    "hira": {"default": {"r": 2}, "embedding": {"r": 2, "target_modules": ["embed_tokens", "v_proj"]}},
    "randlora": {"default": {"r": 8, "randlora_alpha": 8}},
    "road": {"default": {"group_size": 8}, "road_4": {"group_size": 8, "variant": "road_4"}},
    "waveft": {"default": {"n_frequency": 40, "scaling": 5.0}},
    "gralora": {"default": {"r": 4, "alpha": 4}, "hybrid": {"r": 4, "hybrid_r": 2, "alpha": 4}},
    "delora": {"default": {"r": 2, "delora_lambda": 2.0}},  # its 15 makes much of a rounding in a tiny model
    "vblora": {"default": {"r": 2, "vector_length": 8, "num_vectors": 6, "init_vector_bank_bound": 1.0}},
    "lora_xs": {"default": {"r": 4}},
    "tinylora": {
        "default": {"u": 3},
        "embedding": {"u": 3, "weight_tying": 0.5, "target_modules": ["embed_tokens", "v_proj"]},
    },
    "psoft": {"default": {"r": 4}, "series": {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5}},
    "unilora": {"default": {"r": 2, "theta_d_length": 16, "init_weights": False}},
    "supertuning": {"default": {"sparsity": 0.9}, "lora": {"sparsity": 0.9, "r": 2, "lora_alpha": 4}},
    "peanut": {"default": {"r": 4, "act_fn": "silu"}, "deep": {"r": 4, "depth": 1, "act_fn": "gelu"}},
    "glora": {
        "default": {"r": 2},
        "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        "constants": {"config_A_B": "constant", "config_C": "none"},
    },
    "deft": {"default": {"r": 2}, "qr": {"r": 2, "decomposition_method": "qr", "alpha": 3}},
    "poly": {"default": {"r": 2, "n_skills": 3}, "heads": {"r": 2, "n_skills": 2, "n_splits": 4}},
    "fusion": {
        "default": {"adapters": ["lora-a", "miss-a"]},
        "bottleneck": {"adapters": ["bottleneck-a", "bottleneck-b", "bottleneck-c"], "value": False},
    },
    "average": {
        "default": {"adapters": ["lora-a", "miss-a"]},
        "ia3": {"adapters": ["ia3-a", "ia3-b"], "weights": [2.0, 1.0]},
    },
    "xlora": {  # a gradient of its gate is a sum of large terms that cancel out: a temperature makes less of roundings
        "default": {"adapters": ["lora-a", "lora-b"], "softmax_temperature": 4.0},
        "deep": {"adapters": ["lora-a", "lora-b"], "xlora_depth": 2, "xlora_size": 8, "layerwise_scalings": True},
    },
    "full": {"default": {}},
    "head": {"default": {}},
}

CASES = [(name, variant) for name in METHODS for variant in VARIANTS.get(name, ())]
all_variants = pytest.mark.parametrize(("name", "variant"), CASES, ids=["-".join(case) for case in CASES])
all_methods = pytest.mark.parametrize("name", METHODS)

_TRAINING = ("penalty", "after_step")


@cache
def _acts(name: str) -> Hashable:
    """What a method does in a pass and in training: which kinds of layers it attaches, and what they ask for."""
    layers = set()
    for _, layer in attach(bamboo(), method(name), name).at():
        kind = next(each for each in type(layer).__mro__ if each.__module__.startswith("tanzaku.core."))
        flags = ("edits_input", "edits_output", "reads_call", "reads_places", "whole_rows", "untrimmed")
        layers.add((kind, *(getattr(layer, flag, False) for flag in flags)))
    kind = METHODS[name]
    own = [part for part in _TRAINING if getattr(kind, part) is not getattr(Method, part)]
    return frozenset(layers), kind.shares_batch, *own


@cache
def unlike() -> list[str]:
    """Methods of which none does what an earlier one does: `make test` holds these under every condition that depends
    on what a method does and not on its formula, and `make test-all` every method."""
    first: dict[Hashable, str] = {}
    for name in METHODS:
        first.setdefault(_acts(name), name)
    return list(first.values())


def by_kind(*more: None) -> list[Any]:
    """Every method, of which `make test` has those that are unlike one another, and what else is given."""
    names = unlike()
    return costly([*names, *more], [name for name in METHODS if name not in names])


def all_kinds(test: Any) -> Any:
    """A test of every method, as :func:`by_kind`."""
    return pytest.mark.parametrize("name", by_kind())(test)


KINDS_BESIDE_LLAMA = [
    ("bert", "cls"),
    ("roberta", "cls"),
    ("gpt2", "lm"),
    ("opt", "cls"),
    ("opt", "lm"),
    ("t5", "lm"),
    ("t5", "cls"),
    ("bart", "lm"),
    ("bart", "cls"),
    ("gemma3", "cls"),
    ("gemma3", "lm"),
]


def method(name: str, variant: str = "default") -> Method:
    """A method with its settings for tiny models."""
    return METHODS[name].from_settings(VARIANTS[name][variant])


def bamboo(kind: str = "llama", head: str = "cls", **overrides: Any) -> PreTrainedModel:
    """A fresh tiny model; a LLaMA has biases, so that there are some to train."""
    if kind == "llama":
        overrides = {"attention_bias": True, "mlp_bias": True, **overrides}
    return tiny(kind, head, **overrides)


@torch.no_grad()
def opened(adapter: tz.Adapter, seed: int = 0, noise: float = 0.2) -> tz.Adapter:
    """Move every trained parameter away from where it starts, gates and zero matrices too."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * noise)
    return adapter


def attached(model: PreTrainedModel, name: str, variant: str = "default", as_: str | None = None) -> tz.Adapter:
    """Attach a method under its own name and open it."""
    seed = sum(map(ord, as_ or name))
    return opened(attach(model, method(name, variant), as_ or name, seed=seed), seed)


@cache
def full_bamboo(kind: str = "llama", head: str = "cls", attention: str = "sdpa") -> PreTrainedModel:
    """A model with every method twice, `x` and `x-2`, the second of other settings where the table has some.

    It is shared between tests, which route and compute but change nothing.
    """
    model = bamboo(kind, head, attn_implementation=attention)
    for name, variants in VARIANTS.items():
        attached(model, name)
        attached(model, name, list(variants)[-1] if (kind, head) == ("llama", "cls") else "default", f"{name}-2")
    return model


# One method of every kind of site: outputs, inputs, tokens, keys and values, weights of its own.
OF_EACH_KIND = ("lora", "ia3", "prompt_tuning", "prefix_tuning", "head", "full", None)


def pairs(names: Sequence[str | None]) -> list[Any]:
    """Every method beside one of each kind and beside itself; all other pairs stand in the tier of all."""
    near = [(a, b) for a in names for b in names if a == b or b in OF_EACH_KIND]
    return costly(near, [(a, b) for a in names for b in names if (a, b) not in near])


def sharing() -> list[str]:
    """Methods whose rows may share a batch."""
    return [name for name, m in METHODS.items() if m.shares_batch]


def keeps_shape(adapter: tz.Adapter) -> bool:
    """Whether the adapter adds no token: then other rows keep the very numbers they have without it."""
    return not any(isinstance(layer, TokenLayer) for _, layer in adapter.at())


def starts_as_identity(adapter: tz.Adapter) -> bool:
    """Whether the adapter is made to change nothing at first: it adds neither tokens nor positions."""
    if not adapter.method.starts_as_base:
        return False
    return keeps_shape(adapter) and not any(getattr(layer, "position_offset", 0) for _, layer in adapter.at())


def rows_of(inputs: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    return {key: value[list(rows)] for key, value in inputs.items()}


def logits(model: PreTrainedModel, entries: Iterable[Entry], inputs: dict[str, Tensor]) -> Tensor:
    """Logits under a route; those of padding say nothing and are zero."""
    with tz.route(model, list(entries)):
        return plain_logits(model, inputs)


def plain_logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits under the route in force."""
    out = model(**inputs).logits
    mask = inputs.get("attention_mask")
    if out.dim() == 3 and mask is not None and "decoder_input_ids" not in inputs:
        out = out * mask[..., None]
    return out


def losses(out: Tensor) -> Tensor:
    """A loss a row, whatever the head."""
    scores = out.float() if out.dim() == 3 else out.float()[:, None]
    target = torch.arange(scores.shape[1]) % scores.shape[2]
    return F.cross_entropy(scores.transpose(1, 2), target.expand(len(scores), -1), reduction="none").sum(1)


def gradients(loss: Tensor, adapter: tz.Adapter, retain: bool = False) -> dict[str, Tensor]:
    """The gradient of every trained parameter, zero where the loss does not reach it."""
    names, parameters = zip(*adapter.trained(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=retain)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], deep: int = 1) -> None:
    # A sum of terms of a loss near 1 may be small by itself, as a gate's is, and as inexact as they are.
    assert_close(found, expected, deep * GRADIENT, scale=2**-4, at="gradient of")


def stack_of(entry: Entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def assert_isolated(model: PreTrainedModel, entries: Sequence[Entry], inputs: dict[str, Tensor]) -> None:
    """Every entry's rows in the mixed batch are what they are in a batch of their own: logits, losses, gradients."""
    mixed = logits(model, entries, inputs)
    each = losses(mixed)
    for entry in dict.fromkeys(entries):
        at = [row for row, other in enumerate(entries) if other == entry]
        alone = logits(model, [entry] * len(at), rows_of(inputs, at))
        # What reads a first pass of the base, or what other adapters give, is as inexact as both.
        deep = 2 if any(manager_of(model).get(name).method.uses_others for name in stack_of(entry)) else 1
        assert_close(mixed[at], alone, deep * PASS, scale=2**-4, at=entry)
        alone_losses = losses(alone)
        assert_close(each[at], alone_losses, deep * PASS, at=entry)
        for name in stack_of(entry):
            adapter = manager_of(model).get(name)
            assert_equal_gradients(
                gradients(each[at].sum(), adapter, retain=True),
                gradients(alone_losses.sum(), adapter, retain=True),
                deep,
            )
    for name in {n for e in entries for n in stack_of(e)}:
        others = [r for r, e in enumerate(entries) if e is None or (e != name and name not in e)]
        if others and each[others].requires_grad:
            leak = gradients(each[others].sum(), manager_of(model).get(name), retain=True)
            assert not any(g.any() for g in leak.values()), f"a loss of other rows reaches {name}"


__all__ = [name for name in globals() if not name.startswith("_")]
__all__ += ["batch"]
