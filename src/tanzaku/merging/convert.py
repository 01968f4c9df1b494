"""An adapter of one method as one of another: the nearest change of weights that the other can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import attach, detach
from tanzaku.core.delta import WeightDelta, base_matrix, laid_out
from tanzaku.core.manager import manager_of
from tanzaku.core.method import Method, ModuleLayer
from tanzaku.core.shared import Shared
from tanzaku.core.weights import WeightCopy
from tanzaku.errors import TanzakuError, listed
from tanzaku.merging.combine import fill_copies, targets_of, whole_copies
from tanzaku.merging.merge import before_merging
from tanzaku.methods import METHODS, method_named
from tanzaku.models.families import features


@dataclass(frozen=True)
class Conversion:
    """What came of it.

    Attributes:
        adapter: the new one.
        lost: by the name of a tensor of the base that the first adapter changes, the norm of what is missing of the
            change over the norm of the change; 1 where the other method cannot change such a tensor.
    """

    adapter: Adapter
    lost: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.lost, key=self.lost.__getitem__)
        mean = sum(self.lost.values()) / len(self.lost)
        none = [name for name, share in self.lost.items() if share == 1]
        beside = f"; nothing is left of the changes of {listed(none, 3)}" if none else ""
        return f"{mean:.2%} of a tensor's change was lost (at most {self.lost[worst]:.2%}, of {worst}){beside}"


@torch.no_grad()
def convert(model: nn.Module, name: str, to: str, new: str | None = None, **settings: Any) -> Conversion:
    """Attach an adapter of the method `to` that changes each weight as nearly as it can as adapter `name` does, which
    stays as it is. Matrices are taken from singular value decompositions of what the merged weight has beside the
    base's: of all changes of that rank none is nearer. Copies of whole modules, such as a head, are taken over.

    Args:
        to: a method that can hold any change of a weight: LoRA.
        new: the new adapter's name; `NAME-TO` without it.
        settings: of the new method, such as `r=16`. Sites are those of the first adapter.

    Raises:
        TanzakuError: `name` is no change of weights, `to` can hold none, or bad settings.
    """
    manager = manager_of(model)
    source, kind = manager.get(name), method_named(to)
    if not kind.holds_changes:
        able = listed(each for each, method in METHODS.items() if method.holds_changes)
        raise TanzakuError(f"convert: {to} cannot hold a given change of weights; expected one of {able}")
    if not source.method.mergeable:
        raise TanzakuError(
            f"convert: {source.method.name} is no change of weights, so {name!r} is nothing that {to} could do"
        )
    if before_merging(model):
        raise TanzakuError("convert: found a merged adapter in the base's weights; unmerge it first")
    if strange := sorted(_SITES & settings.keys()):
        raise TanzakuError(f"convert: found {strange[0]}; the sites are those of {name!r}, so leave it out")
    changes, lost = _changes(source)
    if not changes:
        raise TanzakuError(f"convert: {name!r} ({source.method.name}) changes no matrix, which {to} could change")
    method = kind.from_settings({**settings, "target_modules": targets_of([source], list(changes))})
    adapter = beside(source, method, new or f"{name}-{to}")
    try:
        for path, layer in adapter.at():
            if isinstance(layer, WeightDelta):
                module = model.get_submodule(path)
                change = changes[path]()
                layer.hold(module, change)
                norm = change.norm()
                lost[f"{path}.weight"] = float((layer.delta(module) - change).norm() / norm) if norm else 0.0
        take_over(adapter, source)
    except BaseException:
        detach(model, adapter.name)
        raise
    return Conversion(adapter, lost)


_SITES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}


def _changes(source: Adapter) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """What an adapter adds to matrices, by their modules' paths, each computed when it is asked for; and, by name, what
    else it changes."""
    model = source.base.model
    changes: dict[str, Callable[[], Tensor]] = {}
    lost: dict[str, float] = {}
    for path, layer in source.at():
        if isinstance(layer, Shared) or (isinstance(layer, WeightCopy) and path):
            continue
        if isinstance(layer, WeightCopy):
            for full, tensor in layer.tensors.items():
                at, _, last = full.rpartition(".")
                own = model.get_submodule(at)
                if not torch.equal(tensor.to(own.get_parameter(last)), own.get_parameter(last)):
                    if last == "weight" and _matrix(own):
                        changes[at] = partial(_beside, own, tensor)
                    elif not any(part.has(at) for part in source.method.heads(source.base)):
                        lost[full] = 1.0
            continue
        module = model.get_submodule(path)
        merged = layer.merged(module) if isinstance(layer, ModuleLayer) else None
        if not merged:
            raise TanzakuError(f"convert: {source.method.name} at {path} ({type(module).__name__}) cannot be merged")
        for key, value in merged.items():
            if key == "weight" and _matrix(module):
                if path in changes:
                    raise TanzakuError(
                        f"convert: {source.name!r} changes {path} in two ways, of which LoRA would hold one; expected "
                        "an adapter with one layer a module"
                    )
                changes[path] = partial(_merged, layer, module)
            elif not torch.equal(value, cast(Tensor, getattr(module, key)).to(value)):
                lost[f"{path}.{key}"] = 1.0
    heads = source.method.heads(source.base)
    return {path: change for path, change in changes.items() if not any(part.has(path) for part in heads)}, lost


def _matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return True
    try:
        features(module)
    except TanzakuError:
        return False
    return True


def _beside(module: nn.Module, weight: Tensor) -> Tensor:
    """What a weight has beside the module's own, laid out as changes are."""
    base = base_matrix(module)
    return laid_out(module, weight.to(base)) - base


def _merged(layer: Any, module: nn.Module) -> Tensor:
    return _beside(module, layer.merged(module)["weight"])


def beside(source: Adapter, method: Method, name: str) -> Adapter:
    """Attach an adapter with copies of the same whole modules, to be filled with what it takes from another."""
    kept = whole_copies([source])
    method.require(not method.calibrates, "a start from rows", "another: what it draws is overwritten")
    method.modules_to_save = [path for path in kept if path] or None if kept else kept
    return attach(source.base.model, method, name, seed=0)  # what it draws is overwritten


def take_over(adapter: Adapter, source: Adapter) -> None:
    """Give the new adapter's copies of modules the values that the first one has there."""
    if any(isinstance(layer, WeightCopy) and not path for path, layer in source.at()):
        whole = next(layer.tensors for path, layer in source.at() if isinstance(layer, WeightCopy) and not path)
        for path, layer in adapter.at():
            for key, tensor in layer.tensors.items() if isinstance(layer, WeightCopy) else ():
                tensor.copy_(whole[f"{path}.{key}"])
        return
    fill_copies(adapter, [source], [1.0], None)
