"""A frozen model, its adapters, and what is in force in it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.in_force import InForce
from tanzaku.core.method import AdapterLayer
from tanzaku.core.routing import Entry, Route
from tanzaku.core.sites import Sites
from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.models import tree
from tanzaku.models.families import Base

MERGED = "_tanzaku_merged"  # a model's record of the adapters that are folded into its weights


class AdapterManager:
    """The frozen model, its adapters and what is in force."""

    def __init__(self, model: nn.Module):
        self.base = Base.of(model)
        self.tree = tree.Adapters(self)
        self.sites = Sites(self.base)
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.active: Entry = None
        self._made: weakref.WeakSet[InForce] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._made = weakref.WeakSet()

    @property
    def model(self) -> nn.Module:
        return self.base.model

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by name."""
        return cast(dict[str, Adapter], self.tree._modules)

    @property
    def active_names(self) -> tuple[str, ...]:
        """Names of the active adapters, in the order that they stack in."""
        return (self.active,) if isinstance(self.active, str) else tuple(self.active or ())

    def get(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise TanzakuError(
                f"no adapter named {name!r}{nearest(name, self.adapters)}; "
                f"attached are {listed(self.adapters) or 'none'}"
            )
        return self.adapters[name]

    @property
    def route(self) -> Route | None:
        """The route that is in force here; None: the bare base."""
        force = self.sites.in_force()
        return None if force is None else force.route

    def _plan(self, route: Route) -> InForce:
        """What a route does, with the hooks that it needs. Nothing is in force by that yet."""
        adapters = {name: self.get(name) for name in route.adapters}
        used = {there: self.get(there) for each in adapters.values() for there in each.method.used().values()}
        merged = getattr(self.model.__dict__.get(MERGED), "names", ())
        if twice := [name for name in {**adapters, **used} if name in merged]:
            raise TanzakuError(
                f"{listed(twice)} is merged into the base's weights and would count twice: unmerge it first, or route "
                "to None, which has it"
            )
        if not route.uniform:
            for name, adapter in adapters.items():
                if not adapter.method.shares_batch:
                    raise TanzakuError(
                        f"{name!r} ({adapter.method.name}) changes every weight: its rows cannot share a batch with "
                        "others; route it alone"
                    )
        for adapter in {**adapters, **used}.values():
            self._follow_device(adapter)
        stacks = [[at for name in stack for at in adapters[name].at()] for stack in route.stacks]
        force = InForce(self.base, route, stacks)
        force.read = [layer for each in used.values() for _, layer in each.at()]
        self.sites.ensure(force)
        self._made.add(force)
        for adapter in adapters.values():
            adapter.require_gradients(True)
        return force

    def switch(self, route: Route | None) -> None:
        """Put `route` in force in this context, whatever is active in the model, or end the context's own."""
        self.sites.put(None if route is None else (self._plan(route),))

    @contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """`route` in force within the block, for this context alone."""
        force, before = self._plan(route), self.sites.here()
        self.sites.put((force,))
        try:
            yield
        finally:
            self.sites.put(before)

    @contextmanager
    def without(self, name: str, layer: AdapterLayer) -> Iterator[None]:
        """Adapter `name` in force within the block, for this context alone, but for one of its layers."""
        adapter = self.get(name)
        self._follow_device(adapter)
        rest = [at for at in adapter.at() if at[1] is not layer]
        force, before = InForce(self.base, Route.everywhere(name), [rest]), self.sites.here()
        self.sites.ensure(force)
        self._made.add(force)
        adapter.require_gradients(True)
        self.sites.put((force,))
        try:
            yield
        finally:
            self.sites.put(before)

    def set_active(self, entry: Entry) -> None:
        """Send all rows of all batches to `entry`, for everybody who has no route of his own."""
        force = None if entry is None else self._plan(Route.everywhere(entry))
        self.mend()
        self.sites.active, self.active = force, entry

    def mend(self) -> None:
        """Give the base its own weights back where a pass was cut short."""
        for site in self.sites.weights.values():
            site.close()

    def end(self, names: Iterable[str]) -> None:
        """End every route, of any context, that has one of these adapters."""
        gone = set(names)
        for force in [*self._made, self.sites.active]:
            if force is not None:
                force.ended |= bool(gone & set(force.route.adapters))
        if gone & set(self.active_names):
            self.sites.active, self.active = None, None

    def _follow_device(self, adapter: Adapter) -> None:
        # Parts of the model may be elsewhere than where the adapter was attached; an adapter follows its site.
        here = next((p.device for p in tree.parameters(self.model)), None)
        if here is not None and adapter.followed == here:
            return
        adapter.followed = here
        for path, layer in adapter.at():
            there = self.base.device(path)
            for parameter in (*layer.parameters(), *layer.buffers()):
                if parameter.is_meta and there is not None and there.type != "meta":
                    raise TanzakuError(
                        f"the tensors of {adapter.name!r} were moved off with the base (offloaded); offload the base "
                        "first, then attach or load the adapter"
                    )
                if there is not None and parameter.device != there:
                    layer.to(there)
                    break


def manager_of(model: nn.Module) -> AdapterManager:
    """The manager of a model that has adapters, or a clear error."""
    manager = find_manager(model)
    if manager is None:
        raise TanzakuError(f"{type(model).__name__} has no adapter; attach one with tanzaku.attach first")
    return manager


def find_manager(model: nn.Module) -> AdapterManager | None:
    """The manager of a model that has adapters."""
    place = model._modules.get(tree.PLACE)
    return cast(AdapterManager, place.__dict__["manager"]) if isinstance(place, tree.Adapters) else None


def base_of(model: nn.Module) -> Base:
    """What is known of a model, with adapters or without."""
    manager = find_manager(model)
    return Base.of(model) if manager is None else manager.base
