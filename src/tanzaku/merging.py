"""Folding an adapter into the base's weights, and taking it out again: written once, for all methods that can."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tanzaku.errors import TanzakuError, listed
from tanzaku.host import activate, host_of
from tanzaku.method import ModuleStrip
from tanzaku.weights import WeightStrip

_MERGED = "_tanzaku_merged"


@torch.no_grad()
def merge(model: nn.Module, name: str = "default") -> nn.Module:
    """Fold adapter `name` into the base's weights, in place, until :func:`unmerge`.

    The model then computes for every row, without hooks, what rows routed to the adapter computed; a route in force
    ends, or the adapter would count twice.

    Raises:
        TanzakuError: the method is no change of weights, an adapter is merged already, or a changed weight is tied to
            another that the adapter leaves alone.
    """
    host = host_of(model)
    adapter = host.get(name)
    if not adapter.method.mergeable:
        raise TanzakuError(f"{adapter.method.name} is no change of weights, so {name!r} cannot be merged")
    if _MERGED in model.__dict__:
        raise TanzakuError(f"{model.__dict__[_MERGED][0]!r} is merged already; unmerge it first")
    if host.sites.route is not None:
        activate(model, None)
    names = _names_by_tensor(model)
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
        changed = {f"{path}.{key}" if path else key: value for key, value in new.items()}
        for full, value in changed.items():
            parameter = model.get_parameter(full)
            tied = names[id(parameter)]
            if left := [other for other in tied if other not in changed]:
                _restore(model, before)
                raise TanzakuError(
                    f"{adapter.method.name}: {full} is tied to {listed(left)}, which {name!r} leaves as it is, so it "
                    "cannot be merged; untie them first (tie_word_embeddings=False)"
                )
            # Under one of its names, or a tied weight would be noted again when it is changed already.
            before.setdefault(tied[0], parameter.detach().clone())
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


def _names_by_tensor(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id: several where weights are tied."""
    names: dict[int, list[str]] = {}
    # The class's own method: an active adapter's parameters are no part of the base.
    for name, parameter in type(model).named_parameters(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not (isinstance(weight, Tensor) and weight.is_floating_point())
