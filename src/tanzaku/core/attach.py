"""Attach adapters to a frozen model, send rows to them, count and detach them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.context import check_context
from tanzaku.core.manager import AdapterManager, find_manager, manager_of
from tanzaku.core.method import AdapterLayer, Method, Place, offloaded
from tanzaku.core.programs import serve
from tanzaku.core.routing import Entry, Route
from tanzaku.core.survey import of_use
from tanzaku.core.weights import WeightCopy, copied_in, copy_of
from tanzaku.errors import TanzakuError, listed
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.models.heads import left_random, untold
from tanzaku.support.seeds import seeded


@torch.inference_mode(False)
def attach(model: nn.Module, method: Method, name: str = "default", *, seed: int | None = None) -> Adapter:
    """Attach a new adapter to `model` and freeze the base, whose modules, tensors and dtypes stay as they are.

    Its parameters stand in the model's tree below `tanzaku.NAME`. They require gradients once it is in force: activated
    or routed.

    Args:
        model: any transformers model (or another module, with explicit targets), on any device, also "meta".
        method: settings, such as `LoRA(r=1)`.
        name: letters, digits, `_` and `-`; used in routes.
        seed: of the initial weights; without it torch's global generator draws them.

    Raises:
        TanzakuError: bad settings, a target that matches nothing, or a name already taken.
    """
    if not isinstance(method, Method):
        raise TanzakuError(f"attach: found {type(method).__name__}, expected a method such as tanzaku.LoRA(r=8)")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise TanzakuError(f"adapter name {name!r}: expected letters, digits, '_' and '-' only")
    if isinstance(model, torch._dynamo.OptimizedModule):  # which answers for the model, and is none
        model = model._orig_mod
    manager = find_manager(model)
    fresh = manager is None
    if fresh and hasattr(model, tree.PLACE):
        raise TanzakuError(
            f"{type(model).__name__} has something of its own named {tree.PLACE!r}, where adapters stand"
        )
    manager = manager or AdapterManager(model)
    if name in manager.adapters:
        raise TanzakuError(f"an adapter named {name!r} is attached already; detach it first or choose another name")
    # Building notes the family's defaults in the settings: the caller's own object may go to another model yet.
    method = copy.deepcopy(method)
    method.check_values()
    with _at_home(manager.base), seeded(seed, (p.device for p in model.parameters())):
        place = Place(manager.base, {each: manager.get(there) for each, there in method.used().items()})
        layers = [*method.build(place)]
        layers += _extra(manager.base, method, layers)
    if not layers:
        raise TanzakuError(f"{method.name} found no site in {type(model).__name__}")
    named = str(getattr(method, "target_modules", None)).lower() != "all-linear"
    adapter = Adapter(name, method, of_use(manager.base, layers, named), manager.base)
    adapter.train(model.training)
    adapter.require_gradients(False)
    _say_what_stays_random(adapter)
    if fresh:
        for parameter in tree.parameters(model):
            parameter.requires_grad_(False)
        model._modules[tree.PLACE] = manager.tree
        serve(model, manager)
    manager.adapters[name] = adapter
    return adapter


@contextmanager
def _at_home(base: Base) -> Iterator[None]:
    """Where parameters are made within the block for an offloaded base: on the CPU; they follow their sites later."""
    offloaded.set(torch.device("cpu") if base.offloaded else None)
    try:
        yield
    finally:
        offloaded.set(None)


def _extra(base: Base, method: Method, layers: list[tuple[str, AdapterLayer]]) -> Iterator[tuple[str, AdapterLayer]]:
    """The adapter's own copies of modules, beside the `layers` that it has: see :meth:`Method.copies`."""
    done = copied_in(layers)
    tied: dict[int, Tensor] = {}
    for each in method.copies(base):
        path, module = each.part.path, base.model.get_submodule(each.part.path)
        names = {name: f"{path}.{name}" if path else name for name in each.part.tensors(module)}
        left = [name for name, full in names.items() if full not in done]
        if left:
            done.update(names.values())
            layer = copy_of(module, left, tied if each.tied else None)
            yield path, layer if each.trained else layer.requires_grad_(False)


def _say_what_stays_random(adapter: Adapter) -> None:
    model, done = adapter.base.model, copied_in(adapter.at())
    if names := left_random(model, done):
        warnings.warn(
            f"{listed(names, 3)} of this {type(model).__name__} were drawn at random, since its checkpoint has none, "
            f"and the adapter neither trains nor saves them; name their modules in modules_to_save",
            stacklevel=3,
        )
    if paths := untold(model, done):
        warnings.warn(
            f"this {type(model).__name__} is a copy, of which it cannot be told whether its checkpoint had "
            f"{listed(paths, 3)}; the adapter neither trains nor saves them: name them in modules_to_save if they were "
            "drawn at random",
            stacklevel=3,
        )


@contextmanager
def route(model: nn.Module, entries: Sequence[Entry], context: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Send each row of a batch to its own adapters, within the block, in this thread (and task) alone.

    Args:
        model: a model with adapters.
        entries: one a row: an adapter's name, a tuple of names that stack in order, or None for the bare base. A batch
            of a whole multiple of rows expands the route, as beam search does.
        context: what adapters that read data of each row find there, by name: tensors (rows, ...).

    Raises:
        TanzakuError: entries that are no list of such, or an adapter that is not attached; what was in force stays.
    """
    own = Route.of(entries if isinstance(entries, str) else list(entries))
    own.context = check_context(context or {})
    with manager_of(model).routed(own):
        yield


def activate(model: nn.Module, name: Entry) -> None:
    """Send all rows of all batches to `name` (a tuple stacks, None is the bare base), until changed, in all threads.

    Of the attached adapters the active ones alone require gradients and stand in the `state_dict`, as
    `tanzaku.NAME...`. So optimizers, gradient clipping, trainers and checkpoints see them, in the model and in whatever
    holds it. A pass that another thread has under way may see both what was active and what is: where several threads
    compute, each has its own with :func:`route`.
    """
    manager = manager_of(model)
    manager.set_active(name)
    for each, adapter in manager.adapters.items():
        adapter.require_gradients(each in manager.active_names)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off (all without a name), and with it what was attached for it alone, such as the parts of a
    fusion that a file brought along. With the last one the base is unfrozen and has no hook left.

    Raises:
        TanzakuError: another adapter uses it.
    """
    manager = manager_of(model)
    names = list(manager.adapters) if name is None else [name, *manager.get(name).brought]
    used = {
        there: each for each, a in manager.adapters.items() if each not in names for there in a.method.used().values()
    }
    if name in used:
        by = used[name]
        raise TanzakuError(f"{name!r} cannot be detached while {by!r} uses it: detach {by!r} first")
    for each in [each for each in names if each in used]:  # who uses it still has it now
        manager.get(used[each]).brought.append(each)
    names = [each for each in names if each not in used]
    manager.mend()
    manager.end(names)
    for each in names:
        manager.adapters.pop(each).require_gradients(True)
    if not manager.adapters:
        manager.sites.off()
        del model._modules[tree.PLACE]
        serve(model, None)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(manager.requires_grad.get(key, True))


def adapters(model: nn.Module) -> list[str]:
    """Names of the attached adapters."""
    manager = find_manager(model)
    return list(manager.adapters) if manager is not None else []


@dataclass(frozen=True)
class Count:
    """Numbers of parameters: what one adapter trains, and the base with it."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percent:.4f}"


def count(model: nn.Module, name: str = "default") -> Count:
    """Count what `name` trains and all parameters of the base and of it, as HF PEFT counts them."""
    manager = manager_of(model)
    adapter = manager.get(name)
    base = sum(numbers_in(p) for p in tree.parameters(model))
    frozen_copies = sum(
        p.numel()
        for _, layer in adapter.at()
        if isinstance(layer, WeightCopy) and not layer.trained
        for p in layer.parameters()
    )
    own = sum(p.numel() for _, p in adapter.named_parameters())
    own += sum(p.numel() for there in adapter.method.used().values() for _, p in manager.get(there).named_parameters())
    return Count(trainable=sum(p.numel() for _, p in adapter.trained()), total=base + own - frozen_copies)


def numbers_in(parameter: Tensor) -> int:
    # bitsandbytes packs two 4-bit values into each stored byte.
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()
