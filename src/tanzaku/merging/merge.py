"""Folding an adapter into the base's weights, and taking it out again: written once, for all methods that can."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import activate, detach
from tanzaku.core.manager import MERGED, manager_of
from tanzaku.core.method import ModuleLayer
from tanzaku.core.shared import Shared
from tanzaku.core.weights import OwnWeights, WeightCopy, trained_copies
from tanzaku.errors import TanzakuError, listed
from tanzaku.models import tree
from tanzaku.models.quantize import check_readable, drop_traces, full_weight, plain, plain_module, quantised

_NOTEWORTHY = 0.01


@dataclass(frozen=True)
class Rounding:
    """What rounding to the base's types took from an adapter's change: for each tensor that it changes, the norm of
    (stored - exact) over the norm of (exact - base).

    Args:
        mean: over the tensors. worst: the greatest, of the tensor `at`. dtype: the type that took it.
    """

    mean: float
    worst: float
    at: str
    dtype: str

    def __str__(self) -> str:
        if self.worst == 0:
            return "nothing of the change was lost to rounding"
        return (
            f"rounding to {self.dtype} lost {self.mean:.2%} of the change of a tensor (at most {self.worst:.2%}, of "
            f"{self.at})"
        )


@dataclass
class _Merged:
    names: tuple[str, ...]
    rounding: Rounding
    undo: list[Callable[[], None]] | None = field(repr=False)  # None: merged for good


@torch.no_grad()
def merge(
    model: nn.Module, name: str | tuple[str, ...] = "default", *, dequantize: bool = False, keep: bool = True
) -> nn.Module:
    """Fold adapter `name` (a tuple stacks) into the base's weights, in place, until :func:`unmerge`.

    The model then computes for every row, without hooks, what rows routed to the adapter computed; a route in force
    ends, or the adapter would count twice. Sums are in fp32 and are rounded once, to the type of the base's weight;
    :func:`rounding` tells what that took, and more than a hundredth of the change is a warning.

    Args:
        dequantize: of a base that is quantised by bitsandbytes or torchao, make a plain one, in the type of its other
            weights: a change as small as an adapter's would be lost in the steps of quantised weights.
        keep: hold the weights that change, for :func:`unmerge`. Without them the merge is for good: no second copy is
            held, and the adapter is detached.

    Raises:
        TanzakuError: the method is no change of weights, an adapter is merged already, a changed weight is quantised
            or tied to another that the adapter leaves alone, or a value is out of its type's range. Nothing has
            changed then.
    """
    manager = manager_of(model)
    names = (name,) if isinstance(name, str) else name
    stack = [manager.get(each) for each in names]
    for adapter in stack:
        if not adapter.method.mergeable:
            raise TanzakuError(
                f"{adapter.method.name} is no change of weights, so {adapter.name!r} cannot be merged; keep it as an "
                "adapter (tanzaku predict, tz.load)"
            )
    _check_order(stack)
    if (record := _record(model)) is not None and record.undo is not None:
        raise TanzakuError(f"{', '.join(record.names)!r} is merged already; unmerge it first")
    if manager.route is not None:
        # Of every context: the adapter would count twice there, too.
        manager.end(list(manager.adapters))
        activate(model, None)
    dtype = _dtype(model) if dequantize else None
    if dequantize:
        check_readable(model)
    if not keep:
        # Nothing can be taken back, so all of it is seen to be possible before any of it is done.
        for adapter in stack:
            for _ in _changes(model, adapter, dtype):
                pass
    undo: list[Callable[[], None]] = []
    lost: dict[str, float] = {}
    types = set()
    trained = trained_copies(at for adapter in stack for at in adapter.at())
    try:
        for full, value in (c for adapter in stack for c in _changes(model, adapter, dtype, trained)):
            path, _, key = full.rpartition(".")
            module = model.get_submodule(path)
            before = full_weight(module, path) if key == "weight" else _tensor(model, full).float()
            if dtype is not None and quantised(module):
                undo.append(_replace(model, path, dtype))
            parameter = _tensor(model, full)
            value = value.view(parameter.shape)
            stored = value.to(parameter.dtype)
            lost[full] = _lost(before, value, stored)
            types |= {parameter.dtype} if lost[full] else set()
            if keep:
                # The old tensor is put aside and not copied: both ways are an exchange.
                undo.append(partial(_put, model, full, parameter.data))
                parameter.data = stored
            else:
                parameter.copy_(stored)
                undo.clear()
        if dtype is not None:
            for path in [path for path, module in tree.named_modules(model) if quantised(module)]:
                back = _replace(model, path, dtype)
                undo += [back] if keep else []
            undo.append(drop_traces(model))
    except BaseException:
        _back(undo)
        raise
    at = max(lost, key=lost.__getitem__)
    kinds = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
    taken = Rounding(sum(lost.values()) / len(lost), lost[at], at, kinds)
    model.__dict__[MERGED] = _Merged(names, taken, undo if keep else None)
    if taken.mean > _NOTEWORTHY:
        warnings.warn(f"merging {name!r}: {taken}; load the base in float32 to keep it", stacklevel=2)
    for each in () if keep else names:
        detach(model, each)
    return model


def _check_order(stack: Sequence[Adapter]) -> None:
    """Raise an error where merging one adapter after another is not what their stack computes: a pass changes what a
    module reads before anything else, shows every adapter the base's own weight, and adds to copies of it."""
    below: dict[str, tuple[Adapter, ModuleLayer]] = {}
    for adapter in stack:
        here = {path: layer for path, layer in adapter.at() if isinstance(layer, ModuleLayer)}
        copied = {
            _full(path, key) for path, layer in adapter.at() if isinstance(layer, WeightCopy) for key in layer.own
        }
        for path, (other, layer) in below.items():
            again = here.get(path)
            turned = again is not None and (layer.edits_input or again.reads_weight)
            if turned or _full(path, "weight") in copied:
                raise TanzakuError(
                    f"merge: {other.name!r} and {adapter.name!r} both change {path}, and one after the other they "
                    "would not be what rows of both compute; merge one of them, or keep both in a route"
                )
        below |= {path: (adapter, layer) for path, layer in here.items()}


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Give the base back its own weights, bit for bit, quantised ones too.

    Raises:
        TanzakuError: no adapter is merged, or it was merged with `keep=False`.
    """
    record = _record(model)
    if record is None:
        raise TanzakuError(f"no adapter is merged into this {type(model).__name__}")
    if record.undo is None:
        raise TanzakuError(f"{', '.join(record.names)!r} was merged for good (keep=False); load the base again")
    _back(record.undo)
    del model.__dict__[MERGED]
    return model


def rounding(model: nn.Module) -> Rounding:
    """What rounding took from the change that was merged last.

    Raises:
        TanzakuError: no adapter is merged.
    """
    record = _record(model)
    if record is None:
        raise TanzakuError(f"no adapter is merged into this {type(model).__name__}")
    return record.rounding


def _changes(
    model: nn.Module, adapter: Adapter, dtype: torch.dtype | None, trained: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """(name, value in full precision) of every tensor that the adapter changes, computed one by one.

    Args:
        dtype: of what takes the place of quantised weights; None: they are an error.
        trained: names of tensors of which some adapter of the stack has a trained copy: one that is only kept yields.
    """
    tied = _names_of_one_tensor(model)
    copies = [(path, s) for path, s in adapter.at() if isinstance(s, WeightCopy)]
    own = {_full(path, key): tensor for path, s in copies for key, tensor in s.tensors.items()}
    changed = {_full(path, "weight") for path, s in adapter.at() if isinstance(s, ModuleLayer)} | set(own)
    done: set[int] = set()
    merged: set[str] = set()
    for path, layer in adapter.at():
        if isinstance(layer, Shared):  # what others read is in what they change
            continue
        module = model.get_submodule(path)
        new: dict[str, Tensor] | None = None
        if any(p.is_meta for p in tree.parameters(module)):
            raise TanzakuError(
                f"{adapter.method.name}: {path or 'the model'} is not in memory (offloaded, or on the meta device), so "
                "nothing can be merged into it; load the base whole"
            )
        if isinstance(layer, WeightCopy):
            new = {k: t for k, t in layer.tensors.items() if layer.trained or _full(path, k) not in trained}
            if not new:
                continue
        elif isinstance(layer, ModuleLayer | OwnWeights):
            new = layer.merged(module)
        if not new:
            raise TanzakuError(f"{adapter.method.name}: {path} ({type(module).__name__}) cannot be merged")
        if dtype is None and "weight" in new and quantised(module):
            raise TanzakuError(
                f"{adapter.method.name}: {path} is quantised ({type(cast(Tensor, module.weight)).__name__}), so a "
                "change would be lost in its steps; merge into a plain base with merge(..., dequantize=True)"
            )
        for key, value in new.items():
            full = _full(path, key)
            whole = isinstance(layer, WeightCopy)
            # Tied weights stay one tensor only where the adapter's own copies of them are one, too.
            alike = {_full(each, key) for each in getattr(layer, "ties", ())}
            if alike and any(name in merged for name in tied.get(full, ())):
                continue  # it was changed under another name
            merged.add(full)
            others = [name for name in tied.get(full, ()) if name != full and not (whole and own.get(name) is value)]
            others = [name for name in others if name not in alike]
            if others:
                left = [name for name in others if name not in changed]
                how = "leaves as it is" if left else "changes to other values"
                raise TanzakuError(
                    f"{adapter.method.name}: {full} is tied to {listed(left or others)}, which {adapter.name!r} {how}, "
                    "so it cannot be merged; untie them first (tie_word_embeddings=False)"
                )
            if whole and id(value) in done:  # the same tensor under its second name
                continue
            done.add(id(value))
            parameter = _tensor(model, full)
            kind = parameter.dtype if plain(parameter) else cast(torch.dtype, dtype)
            most = max(map(abs, torch.stack(torch.aminmax(value)).tolist())) if value.numel() else 0.0
            if value.is_floating_point() and not most <= torch.finfo(kind).max:
                wide = torch.finfo(kind).max > 1e38
                fix = "its numbers are too large: train it anew" if wide else "load the base in float32 or bfloat16"
                raise TanzakuError(
                    f"{adapter.method.name}: {full} would hold {most:.3g}, expected at most "
                    f"{torch.finfo(kind).max:.3g} in {kind}; {fix}"
                )
            # An adapter layer's own weights stay its own, and may be trained on.
            yield full, value.detach().clone() if whole else value.detach()


def _full(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _lost(before: Tensor, exact: Tensor, stored: Tensor) -> float:
    if stored.dtype == exact.dtype:
        return 0.0
    change = (exact - before.view(exact.shape)).norm()
    missed = (stored.to(exact.dtype) - exact).norm()
    return float(missed / change) if change else float(bool(missed))


def _replace(model: nn.Module, path: str, dtype: torch.dtype) -> Callable[[], None]:
    """Put a plain module in the place of a quantised one; returns what takes that back."""
    parent, _, last = path.rpartition(".")
    owner, old = model.get_submodule(parent), model.get_submodule(path)
    setattr(owner, last, plain_module(old, dtype, path))
    return partial(setattr, owner, last, old)


def before_merging(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors that a merged adapter has changed, by name."""
    record = _record(model)
    steps = (record.undo or []) if record is not None else []
    # Of a stack, what the first adapter changed was the base's own.
    back = reversed(steps)
    return {step.args[1]: step.args[2] for step in back if isinstance(step, partial) and step.func is _put}


def _put(model: nn.Module, key: str, value: Tensor) -> None:
    _tensor(model, key).data = value


def _tensor(model: nn.Module, key: str) -> Tensor:
    """A parameter or a buffer by its name."""
    path, _, last = key.rpartition(".")
    module = model.get_submodule(path)
    found = module._parameters.get(last, module._buffers.get(last))
    if found is None:
        raise TanzakuError(
            f"{key} is no tensor of its {type(module).__name__}, which computes it (a parametrization), so nothing can "
            "be merged into it; make it plain first, as by torch.nn.utils.parametrize.remove_parametrizations"
        )
    return found


def _back(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def _record(model: nn.Module) -> _Merged | None:
    return cast("_Merged | None", model.__dict__.get(MERGED))


def _dtype(model: nn.Module) -> torch.dtype:
    """The type of a quantised model's other weights."""
    return next((p.dtype for _, p in tree.named_parameters(model) if plain(p)), torch.float32)


def _names_of_one_tensor(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter -> all names of that tensor: several where weights are tied."""
    names: dict[int, list[str]] = {}
    # The class's own method: an active adapter's parameters are no part of the base.
    for name, parameter in tree.named_parameters(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: same for same in names.values() for name in same}
