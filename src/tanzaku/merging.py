"""Folding an adapter into the base's weights, and taking it out again: written once, for all methods that can."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tanzaku.errors import TanzakuError
from tanzaku.host import host_of
from tanzaku.method import ModuleStrip
from tanzaku.sites import WeightStrip

_MERGED = "_tanzaku_merged"


@torch.no_grad()
def merge(model: nn.Module, name: str = "default") -> nn.Module:
    """Fold adapter `name` into the base's weights, in place, until :func:`unmerge`.

    The model then computes for every row, without hooks, what rows routed to the adapter computed.

    Raises:
        TanzakuError: the method is no change of weights, or an adapter is merged already.
    """
    host = host_of(model)
    adapter = host.get(name)
    if not adapter.method.mergeable:
        raise TanzakuError(f"{adapter.method.name} is no change of weights, so {name!r} cannot be merged")
    if _MERGED in model.__dict__:
        raise TanzakuError(f"{model.__dict__[_MERGED][0]!r} is merged already; unmerge it first")
    before: dict[str, Tensor] = {}
    for path, strip in adapter.at():
        module = model.get_submodule(path)
        if isinstance(strip, WeightStrip):
            new: dict[str, Tensor] = {key: p.detach() for key, p in strip.own.items()}
        elif isinstance(strip, ModuleStrip) and not _quantised(module) and (merged := strip.merged(module)):
            new = merged
        else:
            _restore(model, before)
            raise TanzakuError(f"{adapter.method.name}: {path} ({type(module).__name__}) cannot be merged")
        for key, value in new.items():
            full = f"{path}.{key}" if path else key
            parameter = model.get_parameter(full)
            before.setdefault(full, parameter.detach().clone())
            parameter.copy_(value.view(parameter.shape))
    model.__dict__[_MERGED] = (name, before)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base back its own weights, bit for bit."""
    if _MERGED not in model.__dict__:
        raise TanzakuError(f"no adapter is merged into this {type(model).__name__}")
    _restore(model, model.__dict__.pop(_MERGED)[1])
    return model


@torch.no_grad()
def _restore(model: nn.Module, before: dict[str, Tensor]) -> None:
    for key, value in before.items():
        model.get_parameter(key).copy_(value)


def _quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not (isinstance(weight, Tensor) and weight.is_floating_point())
