"""A frozen model and the adapters hung on it: attach, route, activate, count, detach."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.families import Base
from tanzaku.method import AttentionStrip, Method, Strip, TokenStrip
from tanzaku.routing import Entry, Route
from tanzaku.sites import Sites
from tanzaku.weights import WeightStrip, copy_of

_HOST = "_tanzaku_host"


class Adapter(nn.Module):
    """One adapter: a method's settings and the strips it hung, by path. It is no part of the base's module tree."""

    def __init__(self, name: str, method: Method, strips: list[tuple[str, Strip]], base: Base):
        super().__init__()
        self.name, self.method, self.base = name, method, base
        self.paths = [path for path, _ in strips]
        self.strips = nn.ModuleList([strip for _, strip in strips])
        self.followed: torch.device | None = None  # where the model was when the strips were last moved to their sites

    def at(self) -> Iterator[tuple[str, Strip]]:
        """(path, strip) in the order they were hung."""
        for path, strip in zip(self.paths, self.strips, strict=True):
            yield path, cast(Strip, strip)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the path of their site, each once."""
        seen: set[int] = set()
        for path, strip in self.at():
            for name, parameter in strip.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}" if path else name, parameter

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that an optimizer shall see."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    @property
    def virtual(self) -> int:
        """Tokens that it puts before a row's own."""
        return sum(strip.num_virtual_tokens for _, strip in self.at() if isinstance(strip, TokenStrip))

    @property
    def before(self) -> int:
        """Positions that it takes before a row's first token."""
        offsets = (strip.position_offset for _, strip in self.at() if isinstance(strip, AttentionStrip))
        return self.virtual + max(offsets, default=0)


class Host:
    """The frozen model, its adapters and the route in force."""

    def __init__(self, model: nn.Module):
        self.base = Base.of(model)
        self.adapters: dict[str, Adapter] = {}
        self.sites = Sites(self.base)
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.active: Entry = None

    @property
    def model(self) -> nn.Module:
        return self.base.model

    def get(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise TanzakuError(
                f"no adapter named {name!r}{nearest(name, self.adapters)}; "
                f"attached are {listed(self.adapters) or 'none'}"
            )
        return self.adapters[name]

    def switch(self, route: Route | None) -> None:
        """Put `route` in force, or none."""
        if route is None:
            self.sites.off()
            return
        adapters = {name: self.get(name) for name in route.adapters}
        if not route.uniform:
            for name, adapter in adapters.items():
                if not adapter.method.shares_batch:
                    raise TanzakuError(
                        f"{name!r} ({adapter.method.name}) changes every weight: its rows cannot share a batch with "
                        "others; route it alone"
                    )
        for adapter in adapters.values():
            self._follow_device(adapter)
        self.sites.on(route, [[at for name in stack for at in adapters[name].at()] for stack in route.stacks])

    def _follow_device(self, adapter: Adapter) -> None:
        # The model may have moved since the adapter was attached; an adapter follows its site.
        here = _device(self.model)
        if here is not None and adapter.followed == here:
            return
        adapter.followed = here
        for path, strip in adapter.at():
            there = _device(self.model.get_submodule(path) if path else self.model)
            if there is not None and any(p.device != there for p in strip.parameters()):
                strip.to(there)


def _device(module: nn.Module) -> torch.device | None:
    tensor = next(module.parameters(), None)
    return None if tensor is None else tensor.device


def host_of(model: nn.Module) -> Host:
    """The host of a model that has adapters, or a clear error."""
    host = model.__dict__.get(_HOST)
    if host is None:
        raise TanzakuError(f"{type(model).__name__} has no adapter; attach one with tanzaku.attach first")
    return cast(Host, host)


def attach(model: nn.Module, method: Method, name: str = "default", *, seed: int | None = None) -> Adapter:
    """Hang a new adapter on `model` and freeze the base. The model's tree, tensors and dtypes stay as they are.

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
    host = model.__dict__.get(_HOST)
    fresh = host is None
    host = host or Host(model)
    if name in host.adapters:
        raise TanzakuError(f"an adapter named {name!r} is attached already; detach it first or choose another name")
    # Building notes the family's defaults in the settings: the caller's own object may go to another model yet.
    method = copy.deepcopy(method)
    method.check_finite()
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        strips = [*method.build(host.base), *_extra(host.base, method)]
    if not strips:
        raise TanzakuError(f"{method.name} found no site in {type(model).__name__}")
    adapter = Adapter(name, method, strips, host.base)
    host.adapters[name] = adapter
    if fresh:
        model.__dict__[_HOST] = host
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    return adapter


def _extra(base: Base, method: Method) -> Iterator[tuple[str, Strip]]:
    """The adapter's own copies of whole modules: what `modules_to_save` names, and a classifier's fresh head."""
    heads = [] if method.covers_head else base.head_names()
    # PEFT writes both of its names for a head, whichever the model has.
    names = [n for n in method.modules_to_save or [] if n in heads or not (heads and n in ("classifier", "score"))]
    if method.trains_head and method.modules_to_save != []:
        names += heads
    done: set[str] = set()
    for name in names:
        found = [(p, m) for p, m in base.model.named_modules() if p == name or p.endswith("." + name)]
        if not found:
            raise TanzakuError(
                f"modules_to_save: {name!r} matches no module of {type(base.model).__name__}"
                f"{nearest(name, [p.rsplit('.', 1)[-1] for p, _ in base.model.named_modules()])}"
            )
        for path, module in found:
            if path not in done:
                done.add(path)
                yield path, copy_of(module)
    for path in heads:
        if path not in done:
            # It is not trained, but it was drawn at random: without it the adapter could not be used again.
            strip = copy_of(base.model.get_submodule(path))
            yield path, strip.requires_grad_(False)


@contextmanager
def route(model: nn.Module, entries: Sequence[Entry]) -> Iterator[None]:
    """Send each row of a batch to its own adapters, within the block.

    Args:
        model: a model with adapters.
        entries: one a row: an adapter's name, a tuple of names that stack in order, or None for the bare base. A batch
            of a whole multiple of rows expands the route, as beam search does.
    """
    host = host_of(model)
    before = host.sites.route
    host.switch(Route.of(list(entries)))
    try:
        yield
    finally:
        # An adapter of the route before may have been detached meanwhile: that route has ended.
        still = before is not None and host.adapters.keys() >= set(before.adapters)
        host.switch(before if still else None)


def activate(model: nn.Module, name: Entry) -> None:
    """Send all rows of all batches to `name` (a tuple stacks, None is the bare base), until changed.

    While an adapter is active, `model.parameters()` also yields its parameters, so that optimizers, gradient clipping
    and trainers see them; the module tree and the state_dict stay the base's.
    """
    host = host_of(model)
    if name is None:
        host.switch(None)
    else:
        host.switch(Route.everywhere(name))
    host.active = name
    _show_parameters(host)


def _show_parameters(host: Host) -> None:
    model = host.model
    for attribute in ("named_parameters", "named_children"):
        model.__dict__.pop(attribute, None)
    names = [host.active] if isinstance(host.active, str) else list(host.active or ())
    if not names:
        return
    shown: list[nn.Module] = []

    def tree() -> nn.Module:
        # Made when it is first asked for: switching between adapters to predict asks for nothing.
        if not shown:
            shown.append(nn.ModuleDict({name: _Shown(host.adapters[name]) for name in names}))
        return shown[0]

    def named_parameters(
        self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from type(self).named_parameters(self, prefix, recurse, remove_duplicate)
        if recurse:
            for name, parameter in tree().named_parameters():
                yield f"{prefix}.{_SHOWN}.{name}" if prefix else f"{_SHOWN}.{name}", parameter

    def named_children(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield from type(self).named_children(self)
        yield _SHOWN, tree()

    model.__dict__["named_parameters"] = types.MethodType(named_parameters, model)
    model.__dict__["named_children"] = types.MethodType(named_children, model)


_SHOWN = "tanzaku"


class _Shown(nn.Module):
    """An adapter's parameters as a tree named after its sites, for code that walks a model's children."""

    def __init__(self, adapter: Adapter):
        super().__init__()
        for name, parameter in adapter.named_parameters():
            node: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = cast(nn.Module, node._modules[part])
            node.register_parameter(last, parameter)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off (all without a name). With the last one the base is unfrozen and has no hook left."""
    host = host_of(model)
    names = list(host.adapters) if name is None else [host.get(name).name]
    gone = set(names)
    current = host.active if isinstance(host.active, tuple) else (host.active,)
    if gone & set(current):
        host.active = None
        _show_parameters(host)
    if host.sites.route is not None and gone & set(host.sites.route.adapters):
        host.switch(None)
    for each in names:
        del host.adapters[each]
    if not host.adapters:
        host.sites.off()
        del model.__dict__[_HOST]
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(host.requires_grad.get(key, True))


def adapters(model: nn.Module) -> list[str]:
    """Names of the attached adapters."""
    host = model.__dict__.get(_HOST)
    return list(host.adapters) if host is not None else []


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
    host = host_of(model)
    adapter = host.get(name)
    base = sum(numbers_in(p) for _, p in type(model).named_parameters(model))
    frozen_copies = sum(
        p.numel()
        for _, strip in adapter.at()
        if isinstance(strip, WeightStrip)
        for p in strip.parameters()
        if not p.requires_grad
    )
    own = sum(p.numel() for _, p in adapter.named_parameters())
    return Count(trainable=sum(p.numel() for _, p in adapter.trained()), total=base + own - frozen_copies)


def numbers_in(parameter: Tensor) -> int:
    # bitsandbytes packs two 4-bit values into each stored byte.
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()
