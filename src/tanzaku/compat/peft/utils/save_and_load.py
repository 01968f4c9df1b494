"""An adapter's tensors by the names that PEFT's files and PEFT's models have for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from tanzaku.compat.peft.config import PeftType, TaskType
from tanzaku.compat.peft.owner import Owner
from tanzaku.core.adapter import Adapter
from tanzaku.core.method import AdapterLayer, AttentionLayer
from tanzaku.core.weights import BiasCopy, WeightCopy
from tanzaku.errors import TanzakuError, listed
from tanzaku.methods.adalora import SvdDelta
from tanzaku.methods.lora_layers import StartedDelta
from tanzaku.methods.lora_parameters import ParameterDelta
from tanzaku.methods.prompt_tuning import PromptLearning
from tanzaku.methods.trainable_tokens import Vectors
from tanzaku.methods.xlora import Gate
from tanzaku.models import tree
from tanzaku.storage.store import entries, read_tensors

__all__ = [
    "PeftType",
    "TaskType",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "in_peft",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def in_peft(adapter: Adapter, path: str, layer: AdapterLayer, name: str) -> str:
    """The name that a parameter of an adapter layer has in a PEFT model."""
    prompt = isinstance(adapter.method, PromptLearning)
    root = "base_model." if prompt else "base_model.model."
    if isinstance(layer, WeightCopy):
        return f"{root}{path}.modules_to_save.{adapter.name}.{name}"
    if prompt:
        return f"prompt_encoder.{adapter.name}.{'embedding.weight' if name == 'prompt_embeddings' else name}"
    if isinstance(layer, AttentionLayer):
        # PEFT keeps one LLaMA-Adapter in a model at a time, and its name out of the parameters'.
        return f"{root}{path}." + ("" if adapter.name == "default" else f"{adapter.name}.") + name
    if isinstance(layer, BiasCopy):  # PEFT trains the layer's own
        targeted = any(p == path and not isinstance(s, BiasCopy | WeightCopy) for p, s in adapter.at())
        return f"{root}{path}.{'base_layer.' if targeted else ''}{name}"
    if isinstance(layer, ParameterDelta):  # of which each wraps the one before it
        *above, first, rest = layer.keys()[name].split(".")
        return ".".join([f"{root}{path}", *above, first, adapter.name, rest])
    first, _, rest = name.partition(".")
    if isinstance(layer, Vectors):  # of tokens, which PEFT has at their embedding
        return f"{root}{name}.{adapter.name}"
    if isinstance(layer, Gate):  # PEFT has one of it in a model
        return f"base_model.{name}"
    if not path:  # what layers share: each has it there, and a walk finds it at the first
        path = next(p for p, s in adapter.at() if p and not isinstance(s, BiasCopy | WeightCopy))
    return f"{root}{path}.{first}.{adapter.name}" + (f".{rest}" if rest else "")


def get_peft_model_state_dict(
    model: Owner,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter by their keys in a file.

    Args:
        state_dict: must be the model's own. unwrap_compiled: `model` may be one that torch.compile made.
        save_embedding_layers: "auto" or False.
    """
    model = getattr(model, "_orig_mod", model)
    if save_embedding_layers not in ("auto", False):
        raise TanzakuError(
            f"get_peft_model_state_dict: found save_embedding_layers={save_embedding_layers!r}, which is not "
            "supported; expected 'auto' or False"
        )
    model._check_same(state_dict or {})
    return {key: tensor for key, (tensor, _) in entries(model._manager.get(adapter_name)).items()}


@torch.no_grad()
def set_peft_model_state_dict(
    model: Owner, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> Any:
    """Give an adapter the tensors of a file, by its keys.

    Raises:
        TanzakuError: a tensor is missing, unexpected or of another shape, or a network writes the prompt.
    """
    adapter = model._manager.get(adapter_name)
    given, own = dict(peft_model_state_dict), entries(adapter)
    config = model.peft_config[adapter_name]
    if config.peft_type == PeftType.P_TUNING or getattr(config, "prefix_projection", False):
        raise TanzakuError(
            f"{adapter_name!r}: the file holds the vectors that a network wrote, and not the network; load it with "
            "load_adapter()"
        )
    for what, keys in {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [key for key in own if key in given and own[key][0].shape != given[key].shape],
    }.items():
        if keys:
            raise TanzakuError(f"{adapter_name!r}: {what} are {listed(keys, 3)}; expected the tensors of its file")
    made: dict[AdapterLayer, dict[str, Tensor]] = {}
    for key, (tensor, layer) in own.items():
        if isinstance(layer, SvdDelta | StartedDelta):  # of which files have what is made of parameters
            name = next(name for name in layer.export() if key.endswith(f".{name}"))
            made.setdefault(layer, {})[name] = given[key]
        else:
            tensor.copy_(given[key])  # a view of the parameter
    for layer, tensors in made.items():
        layer.restore(tensors)
    return _IncompatibleKeys([], [])


def load_peft_weights(model_id: str | Path, device: str | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter's directory.

    Args:
        device: where they shall be; None: the CPU.
    """
    tensors = read_tensors(Path(model_id))
    return tensors if device is None else {key: tensor.to(device) for key, tensor in tensors.items()}


def get_base_model_state_dict(model: Owner) -> dict[str, Tensor]:
    """The base's own tensors, by their names in a model without adapters."""
    return dict(base_tensors(model.get_base_model()))


def set_base_model_state_dict(model: Owner, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Give the base tensors, by their names in a model without adapters.

    Raises:
        TanzakuError: where `strict`, a tensor is missing or unexpected; always one of another shape.
    """
    own = base_tensors(model.get_base_model())
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    shaped = [key for key in state_dict if key in own and own[key].shape != state_dict[key].shape]
    wrong = [("missing", missing), ("unexpected", unexpected)] if strict else []
    for what, keys in [*wrong, ("of another shape", shaped)]:
        if keys:
            raise TanzakuError(f"set_base_model_state_dict: {what} are {listed(keys, 3)}; expected the base's tensors")
    with torch.no_grad():
        for key, tensor in state_dict.items():
            if key in own:
                own[key].copy_(tensor)
    return _IncompatibleKeys(missing, unexpected)


def base_tensors(base: nn.Module) -> dict[str, Tensor]:
    """The base's tensors, without those of adapters."""
    place = f"{tree.PLACE}."
    return {key: tensor for key, tensor in type(base).state_dict(base).items() if not key.startswith(place)}
