"""A frozen model and the adapters attached to it: attach, route, activate, count, detach."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tanzaku.core.method import AttentionStrip, Method, Strip, TokenStrip, offloaded
from tanzaku.core.programs import serve
from tanzaku.core.routing import Entry, Route
from tanzaku.core.sites import InForce, Sites
from tanzaku.core.survey import of_use
from tanzaku.core.weights import WeightStrip, copied_in, copy_of
from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.models.heads import left_random, untold
from tanzaku.support.seeds import seeded

MERGED = "_tanzaku_merged"  # a model's record of the adapters that are folded into its weights


class Adapter(nn.Module):
    """One adapter: a method's settings and its strips, which stand in the tree below it by the paths of their sites."""

    def __init__(self, name: str, method: Method, strips: list[tuple[str, Strip]], base: Base):
        super().__init__()
        self.name, self.method, self.base = name, method, base
        self._strips: list[tuple[str, Strip]] = []
        self._wanted: dict[str, bool] | None = None  # while nothing of it requires gradients: what does otherwise
        self._guards: list[Any] = []
        self.followed: torch.device | None = None  # where the model was when the strips were last moved to their sites
        for path, strip in strips:
            self.add(path, strip)

    def add(self, path: str, strip: Strip, *, first: bool = False) -> None:
        """Hang one more strip; `first`, so that what others do at the site is done to what it computes."""
        strip.trained = any(p.requires_grad for p in strip.parameters())
        tree.hang(self, path or ("prompt" if isinstance(strip, TokenStrip) else "weights"), strip)
        self._strips.insert(0 if first else len(self._strips), (path, strip))

    @property
    def paths(self) -> list[str]:
        """The paths of the sites."""
        return [path for path, _ in self._strips]

    def at(self) -> Iterator[tuple[str, Strip]]:
        """(path, strip) in the order they were hung."""
        yield from self._strips

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the path of their site, each once; none is the adapter's own beside its strips'."""
        seen: set[int] = set()
        if not recurse:
            return
        for path, strip in self.at():
            for name, parameter in strip.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield ".".join(part for part in (prefix, path, name) if part), parameter

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that training changes, whether the adapter is in force just now or not."""
        wanted = self._wanted
        if wanted is None:
            return [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        flags = {id(p): wanted.get(name, False) for name, p in self._in_tree()}
        return [(name, p) for name, p in self.named_parameters() if flags[id(p)]]

    def _in_tree(self) -> Iterator[tuple[str, nn.Parameter]]:
        # By the path of their site two strips may have parameters of one name.
        return super().named_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guards": []}

    @torch.inference_mode(False)
    def require_gradients(self, wanted: bool) -> None:
        """Let all that is trained require gradients, or nothing of it. What a program froze stays so.

        Autograd would pass over a parameter that requires none when a backward pass reaches it. A pass that was
        computed before is an error then.
        """
        if wanted and self._wanted is not None:
            for guard in self._guards:
                guard.remove()
            self._guards = []
            flags, self._wanted = self._wanted, None
            for name, parameter in self._in_tree():
                parameter.requires_grad_(flags.get(name, False))
        elif not wanted and self._wanted is None:
            self._wanted = {name: p.requires_grad for name, p in self._in_tree()}
            for _, parameter in self._in_tree():
                if parameter.requires_grad:
                    node = get_gradient_edge(parameter).node
                    self._guards.append(node.register_prehook(partial(_late, self.name)))
                parameter.requires_grad_(False)

    @property
    def virtual(self) -> int:
        """Tokens that it puts before a row's own."""
        return sum(strip.num_virtual_tokens for _, strip in self.at() if isinstance(strip, TokenStrip))

    @property
    def before(self) -> int:
        """Positions that it takes before a row's first token."""
        offsets = (strip.position_offset for _, strip in self.at() if isinstance(strip, AttentionStrip))
        return self.virtual + max(offsets, default=0)


def _late(name: str, gradients: Any) -> None:
    raise TanzakuError(f"a backward pass reaches {name!r}, which is not active any more; activate it again before it")


class Host:
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
        merged = getattr(self.model.__dict__.get(MERGED), "names", ())
        if twice := [name for name in adapters if name in merged]:
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
        for adapter in adapters.values():
            self._follow_device(adapter)
        stacks = [[at for name in stack for at in adapters[name].at()] for stack in route.stacks]
        force = InForce(self.base, route, stacks)
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
        for path, strip in adapter.at():
            there = self.base.device(path)
            for parameter in strip.parameters():
                if parameter.is_meta and there is not None and there.type != "meta":
                    raise TanzakuError(
                        f"the tensors of {adapter.name!r} were moved off with the base (offloaded); offload the base "
                        "first, then attach or load the adapter"
                    )
                if there is not None and parameter.device != there:
                    strip.to(there)
                    break


def host_of(model: nn.Module) -> Host:
    """The host of a model that has adapters, or a clear error."""
    host = _find(model)
    if host is None:
        raise TanzakuError(f"{type(model).__name__} has no adapter; attach one with tanzaku.attach first")
    return host


def _find(model: nn.Module) -> Host | None:
    place = model._modules.get(tree.PLACE)
    return cast(Host, place.__dict__["host"]) if isinstance(place, tree.Adapters) else None


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
    host = _find(model)
    fresh = host is None
    if fresh and hasattr(model, tree.PLACE):
        raise TanzakuError(
            f"{type(model).__name__} has something of its own named {tree.PLACE!r}, where adapters stand"
        )
    host = host or Host(model)
    if name in host.adapters:
        raise TanzakuError(f"an adapter named {name!r} is attached already; detach it first or choose another name")
    # Building notes the family's defaults in the settings: the caller's own object may go to another model yet.
    method = copy.deepcopy(method)
    method.check_finite()
    with _at_home(host.base), seeded(seed, (p.device for p in model.parameters())):
        strips = [*method.build(host.base)]
        strips += _extra(host.base, method, strips)
    if not strips:
        raise TanzakuError(f"{method.name} found no site in {type(model).__name__}")
    named = str(getattr(method, "target_modules", None)).lower() != "all-linear"
    adapter = Adapter(name, method, of_use(host.base, strips, named), host.base)
    adapter.train(model.training)
    adapter.require_gradients(False)
    _say_what_stays_random(adapter)
    if fresh:
        for parameter in tree.parameters(model):
            parameter.requires_grad_(False)
        model._modules[tree.PLACE] = host.tree
        serve(model, host)
    host.adapters[name] = adapter
    return adapter


@contextmanager
def _at_home(base: Base) -> Iterator[None]:
    """Where parameters are made within the block for an offloaded base: on the CPU; they follow their sites later."""
    offloaded.set(torch.device("cpu") if base.offloaded else None)
    try:
        yield
    finally:
        offloaded.set(None)


def _extra(base: Base, method: Method, strips: list[tuple[str, Strip]]) -> Iterator[tuple[str, Strip]]:
    """The adapter's own copies of modules, beside the `strips` that it has: see :meth:`Method.copies`."""
    done = copied_in(strips)
    tied: dict[int, Tensor] = {}
    for each in method.copies(base):
        path, module = each.part.path, base.model.get_submodule(each.part.path)
        names = {name: f"{path}.{name}" if path else name for name in each.part.tensors(module)}
        left = [name for name, full in names.items() if full not in done]
        if left:
            done.update(names.values())
            strip = copy_of(module, left, tied if each.tied else None)
            yield path, strip if each.trained else strip.requires_grad_(False)


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
def route(model: nn.Module, entries: Sequence[Entry]) -> Iterator[None]:
    """Send each row of a batch to its own adapters, within the block, in this thread (and task) alone.

    Args:
        model: a model with adapters.
        entries: one a row: an adapter's name, a tuple of names that stack in order, or None for the bare base. A batch
            of a whole multiple of rows expands the route, as beam search does.

    Raises:
        TanzakuError: entries that are no list of such, or an adapter that is not attached; what was in force stays.
    """
    own = Route.of(entries if isinstance(entries, str) else list(entries))
    with host_of(model).routed(own):
        yield


def activate(model: nn.Module, name: Entry) -> None:
    """Send all rows of all batches to `name` (a tuple stacks, None is the bare base), until changed, in all threads.

    Of the attached adapters the active ones alone require gradients and stand in the `state_dict`, as
    `tanzaku.NAME...`. So optimizers, gradient clipping, trainers and checkpoints see them, in the model and in whatever
    holds it.
    """
    host = host_of(model)
    host.set_active(name)
    for each, adapter in host.adapters.items():
        adapter.require_gradients(each in host.active_names)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off (all without a name). With the last one the base is unfrozen and has no hook left."""
    host = host_of(model)
    names = list(host.adapters) if name is None else [host.get(name).name]
    host.mend()
    host.end(names)
    for each in names:
        host.adapters.pop(each).require_gradients(True)
    if not host.adapters:
        host.sites.off()
        del model._modules[tree.PLACE]
        serve(model, None)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(host.requires_grad.get(key, True))


def adapters(model: nn.Module) -> list[str]:
    """Names of the attached adapters."""
    host = _find(model)
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
    base = sum(numbers_in(p) for p in tree.parameters(model))
    frozen_copies = sum(
        p.numel()
        for _, strip in adapter.at()
        if isinstance(strip, WeightStrip) and not strip.trained
        for p in strip.parameters()
    )
    own = sum(p.numel() for _, p in adapter.named_parameters())
    return Count(trainable=sum(p.numel() for _, p in adapter.trained()), total=base + own - frozen_copies)


def numbers_in(parameter: Tensor) -> int:
    # bitsandbytes packs two 4-bit values into each stored byte.
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()
