"""How adapters stand: for each layer, and for the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tanzaku.compat.peft.errors import WrongType
from tanzaku.compat.peft.layers import BaseTunerLayer
from tanzaku.compat.peft.owner import Owner
from tanzaku.compat.peft.tuner import BaseTuner
from tanzaku.errors import TanzakuError

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One module with adapters: its path, and what holds for each adapter there."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The whole model; "irregular" is what differs from layer to layer."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """How the adapters of each layer stand.

    Raises:
        TanzakuError: the method changes no layers (prompts and prefixes), or there is no adapter.
    """
    base = _base(model, "get_layer_status()")
    out = []
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        parameters = {
            adapter: list(layer.parameters()) for adapter, layer in module._layers().items() if [*layer.parameters()]
        }
        out.append(
            TunerLayerStatus(
                name=name,
                module_type=module.shown_as,
                enabled=not module.disable_adapters,
                active_adapters=module.active_adapters,
                merged_adapters=module.merged_adapters,
                requires_grad={key: _one(p.requires_grad for p in each) for key, each in parameters.items()},
                available_adapters=sorted(parameters),
                devices={key: sorted({p.device.type for p in each}) for key, each in parameters.items()},
                quantization_backend=None,
            )
        )
    if not out:
        raise TanzakuError("No adapter layers found in the model; wrap it with get_peft_model()")
    return out


def get_model_status(model: Any) -> TunerModelStatus:
    """How the adapters of a model stand.

    Raises:
        TanzakuError: as :func:`get_layer_status`.
    """
    base = _base(model, "get_model_status()")
    layers = get_layer_status(model)
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(set(layer.available_adapters) & set(merged) - set(layer.merged_adapters) for layer in layers)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    flags = {n: [layer.requires_grad[n] for layer in layers if n in layer.requires_grad] for n in names}
    trainable, total = model.get_nb_trainable_parameters()
    return TunerModelStatus(
        base_model_type=type(model.get_base_model()).__name__,
        adapter_model_type=type(base).__name__,
        peft_types={name: config.peft_type.name for name, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one(layer.enabled for layer in layers),
        active_adapters=_same([layer.active_adapters for layer in layers]),
        merged_adapters="irregular" if partly else merged,
        requires_grad={name: _one(each) for name, each in flags.items()},
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, [])}) for n in names},
        quantization_backend=None,
    )


def _base(model: Any, what: str) -> nn.Module:
    base: nn.Module = model.base_model if isinstance(model, Owner) else model  # type: ignore[assignment]
    if isinstance(model, Owner) and not isinstance(base, BaseTuner):
        raise WrongType(
            f"{what} got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported"
        )
    return base


def _one(values: Iterable[Any]) -> bool | Irregular:
    found = set(values)
    return "irregular" if len(found) != 1 else found.pop()


def _same(values: list[list[str]]) -> list[str] | Irregular:
    return values[0] if all(each == values[0] for each in values) else "irregular"
