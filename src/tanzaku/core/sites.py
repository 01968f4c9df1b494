"""The three sites of a frozen model: what runs there is what the route in force says.

Everything an adapter does to a model passes through here. Modules are reached by forward (pre-)hooks, attention by
transformers' attention interface, virtual tokens by the backbone's inputs. Nothing in the model is replaced.

A hook is hung when a route first needs it and stays until the last adapter goes. It holds no module, no adapter and no
route: it asks, each time it runs, what is in force where it runs. So routes of several threads do not meet, a
copy of the model follows its own adapters, and code that was compiled for one route is guarded against another.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tanzaku.core import noise
from tanzaku.core.method import AttentionCall, AttentionStrip, ModuleStrip, Strip, TokenStrip
from tanzaku.core.routing import Cut, Route, Rows, put, take
from tanzaku.core.rows import Entrance, Places, Split, SplitSite, rows_at
from tanzaku.core.survey import Key, replaced, tensors
from tanzaku.core.tokens import VirtualTokens
from tanzaku.core.weights import WeightStrip, rows_in, rows_put
from tanzaku.errors import TanzakuError, listed
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.models.families.prompt_call import catch
from tanzaku.models.families.trace import PREFIX
from tanzaku.support.context import Local


def guard_hooks(config: Any) -> None:
    """Have compiled code guard that a module has no hooks: layers share their code, and some have hooks while others
    have none. Torch's settings are each thread's own, so what all threads begin with is set, where torch has that."""
    try:
        config._config["skip_nnmodule_hook_guards"].default = False
    except (AttributeError, LookupError, TypeError):  # private: another torch may keep its settings otherwise
        config.skip_nnmodule_hook_guards = False


guard_hooks(torch._dynamo.config)

# One list of strips per stack of the route, in stacking order.
Plan = list[list[Any]]


class InForce:
    """What one route does at every site of a model. It is made once and not changed after, so threads may share it.

    Args:
        stacks: for each stack of the route, (path, strip) in stacking order.
    """

    def __init__(self, base: Base, route: Route, stacks: list[list[tuple[str, Strip]]]):
        self.route, self.stacks = route, stacks
        self.ended = False  # one of its adapters is gone
        self.before: dict[str, Plan] = {}
        self.after: dict[str, Plan] = {}
        self.weights: dict[str, Plan] = {}
        self.attention: dict[str, Plan] = {}
        tokens: Plan = [[] for _ in stacks]
        for number, stack in enumerate(stacks):
            for path, strip in stack:
                if isinstance(strip, TokenStrip):
                    tokens[number].append(strip)
                    continue
                for plans in self._plans_of(strip):
                    plans.setdefault(path, [[] for _ in stacks])[number].append(strip)
        if not route.uniform and "" in self.weights:
            names = dict.fromkeys(name for strips in self.weights[""] for strip in strips for name in strip.own)
            raise TanzakuError(
                f"{listed(names, 3)} of the whole model are an adapter's own: its rows cannot share a batch with others"
            )
        self.shared = [
            s for plan in self.attention.values() for strips in plan for s in strips if isinstance(s, AttentionStrip)
        ]
        self.shared = [strip for strip in self.shared if type(strip).refresh is not AttentionStrip.refresh]
        placed = [any(isinstance(s, TokenStrip | AttentionStrip) for _, s in stack) for stack in stacks]
        self.tokens = None
        if any(placed):
            self.tokens = VirtualTokens(base, route, tokens, [_offset(stack) for stack in stacks], placed)
        self.token_hooks: set[tuple[str, str, str]] = set()
        sites = [*self.before, *self.after, *self.weights, *self.attention]
        self.places = None if route.uniform else Places(base, route, sites)
        self._base = base
        self._alone: dict[int, InForce] = {}

    def alone(self, number: int) -> InForce:
        """What is done to the rows of one stack in a batch of their own, inside of the backbone."""
        if number not in self._alone:
            inside = [(path, strip) for path, strip in self.stacks[number] if not isinstance(strip, TokenStrip)]
            self._alone[number] = InForce(self._base, self.route.alone(number), [inside])
        return self._alone[number]

    def groups(self, path: str, x: Tensor, returned: bool) -> tuple[int, list[tuple[int, Rows]]]:
        """(dimension that counts rows, the rows of each stack) for a tensor of a site."""
        if self.places is None:
            # What is drawn for a job's rows lies as it does where others are beside them.
            dim = 0 if noise.mark() is None else rows_at(self._base, path, x.dim(), returned)
            return dim, self.route.groups(x.shape[dim] if x.dim() else 1)
        return self.places.groups(path, x, returned)

    def _plans_of(self, strip: Strip) -> Iterator[dict[str, Plan]]:
        if isinstance(strip, ModuleStrip):
            if strip.edits_input:
                yield self.before
            if strip.edits_output:
                yield self.after
        else:
            yield self.weights if isinstance(strip, WeightStrip) else self.attention

    @property
    def whole(self) -> WeightStrip | None:
        """The copy of all weights, if the route has one."""
        plan = self.weights.get("")
        return plan[0][-1] if plan else None

    def spans(self, plan: Plan, groups: list[tuple[int, Rows]], x: Tensor, module: nn.Module) -> list[_Span]:
        """Which strips work on which rows of `x`. Neighbours with a strip each, of one kind and shape, are one span."""
        spans: list[_Span] = []
        last: Any = None
        for number, rows_of_it in groups:
            strips, at = plan[number], cast(Any, rows_of_it)
            if not strips:
                continue
            for strip in strips:
                strip.check_here(x)
            shape = strips[0].alike(module) if len(strips) == 1 and isinstance(at, slice) else None
            kind = None if shape is None else (type(strips[0]), shape)
            if kind is None:
                spans.append(_Span(number, at, strips))
            elif kind == last and spans[-1].rows.stop == at.start:
                before = spans[-1]
                sizes = (*before.sizes, at.stop - at.start)
                spans[-1] = _Span(None, slice(before.rows.start, at.stop), [*before.strips, *strips], sizes)
            else:
                spans.append(_Span(None, at, strips, (at.stop - at.start,)))
            last = kind
        return spans

    def attend(self, path: str, plan: Plan, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """The result of an attention layer for a batch of rows, with what the strips of `plan` make of it."""
        size = call.query.shape[0]
        groups = self.route.groups(size) if self.places is None else self.places.of_rows(path, call.query)
        if groups[0][1] is None:
            return (self.changed(plan, 0, call), None) if plan[0] else call.base_result()
        bare, weights = None, None
        mark = noise.mark()
        if not all(self.stacks[number] for number, _ in groups) or (mark is not None and not all(plan)):
            # The base's own call over the whole batch keeps bare rows bit for bit what they are without adapters.
            bare, weights = call.base_result()
        parts = []
        for number, rows in groups if bare is not None else _joined(groups, plan):
            if plan[number]:
                noise.rewind(mark, number)
                parts.append((rows, self.changed(plan, number, _rows_of(call, rows))))
            elif bare is None:
                parts.append((rows, _rows_of(call, rows).run()))
        if bare is None:
            bare = call.query.new_empty(call.query.shape[0], *parts[0][1].shape[1:])
        return put(bare, parts), weights

    def changed(self, plan: Plan, number: int, call: AttentionCall) -> Tensor:
        """The result for rows of one stack, whose strips change it."""
        for strip in plan[number]:
            strip.check_here(call.query)
        with self.route.running(number, call.key.shape[2]):
            return _stacked(plan[number], call).run()


class _Span(NamedTuple):
    """Strips that one after another change these rows; `number` None: each changes its own, so many `sizes` of them."""

    number: int | None
    rows: Any
    strips: list[Any]
    sizes: tuple[int, ...] = ()


# Ids of the parameters whose gradients each DDP shares between processes.
_shared: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()

# What is in force here, by the number of the model's sites; a model that is not named has what is active in it.
_routes: Local[Mapping[int, InForce | None]] = Local("tanzaku_routes")


class _Nothing(dict[int, Any]):
    """In force everywhere: nothing."""

    def get(self, key: int, default: Any = None) -> None:
        return None


_NOTHING = _Nothing()


@contextmanager
def quiet() -> Iterator[None]:
    """Run modules of the base without what adapters do there."""
    before = _routes.get()
    _routes.set(_NOTHING)
    try:
        yield
    finally:
        _routes.set(before)


class Sites:
    """The hooks of one model, and what is in force in it."""

    _numbers = itertools.count()

    def __init__(self, base: Base):
        self.base = base
        self.active: InForce | None = None  # for everybody who has no route of his own
        self.weights: dict[str, WeightSite] = {}
        self._kept: dict[tuple[str, ...], list[RemovableHandle]] = {}
        self._reset()

    def _reset(self) -> None:
        self._number = next(Sites._numbers)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_number", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is another model: routes of the first are not its own.
        self.__dict__.update(state)
        self._reset()

    # -- what is in force

    def in_force(self) -> InForce | None:
        """What is in force where this runs."""
        routes = _routes.get()
        force = self.active if routes is None else routes.get(self._number, self.active)
        return None if force is None or force.ended else force

    def here(self) -> tuple[InForce | None] | None:
        """The route of this context, if it has one of its own."""
        routes = _routes.get()
        return (routes[self._number],) if routes is not None and self._number in routes else None

    def put(self, here: tuple[InForce | None] | None) -> None:
        """Give this context a route of its own, or take it away: then it has what is active."""
        routes = dict(_routes.get() or {})
        if here is None:
            routes.pop(self._number, None)
        else:
            routes[self._number] = here[0]
        _routes.set(routes or None)

    # -- hooks

    def ensure(self, force: InForce) -> None:
        """Hang the hooks that a route needs and that are not there yet."""
        with self._lock:
            kept = self._kept
            wanted = [
                *(("before", path, "forward_pre", ModuleSite, "before") for path in force.before),
                *(("after", path, "forward", ModuleSite, "after") for path in force.after),
            ]
            fresh = False
            for key, path, kind, site, method in wanted:
                module = self.base.model.get_submodule(path)
                if not self._hangs((key, path), module):
                    fresh = True
                    kept[key, path] = [_register(module, kind, getattr(site(self, path), method), with_kwargs=True)]
            for path in force.weights:
                if not self._hangs(("weights", path), self.base.model.get_submodule(path)):
                    fresh = True
                    self.weights[path] = WeightSite(self, path)
                    kept["weights", path] = self.weights[path].hang()
            for path in force.attention:
                if ("attention", path) not in kept:
                    fresh = True
                    self._hang_attention(path)
                    kept["attention", path] = []
            if ("processes",) not in kept and dist.is_available() and dist.is_initialized():
                fresh = True
                kept[("processes",)] = [_register(self.base.model, "forward_pre", self._check_shared)]
            if force.places is not None:
                fresh |= self._hang_splits(force.places)
            if force.attention and ("entrance",) not in kept:
                kept[("entrance",)] = [_register(self.base.entrance, "forward_pre", self._enter)]
            if force.tokens is not None:
                paths = {id(module): path for path, module in tree.named_modules(self.base.model)}
                for module, kind, function in force.tokens.hooks():
                    place = (paths[id(module)], kind, function.__name__)
                    force.token_hooks.add(place)
                    if place not in kept:
                        fresh = True
                        # A pass that fails ends, too.
                        options = {"always_call": True} if kind == "forward" else {}
                        kept[place] = [_register(module, kind, TokenSite(self, *place), with_kwargs=True, **options)]
            if fresh:
                forget_compiled()

    def _hangs(self, key: tuple[str, ...], module: nn.Module) -> bool:
        """Whether a hook is there, and still at the module that has its path: somebody may have put another there."""
        hung = self._kept.get(key)
        if hung and not (hung[0].id in module._forward_hooks or hung[0].id in module._forward_pre_hooks):
            for handle in self._kept.pop(key):
                handle.remove()
        return key in self._kept

    def _hang_splits(self, places: Places) -> bool:
        """Hang what a batch of several adapters needs to know its rows."""
        fresh = ("batch",) not in self._kept
        if fresh:
            entrance, model = Entrance(self), self.base.model
            self._kept[("batch",)] = [
                _register(model, "forward_pre", entrance, with_kwargs=True, prepend=True),
                _register(model, "forward", entrance.leave, always_call=True),
            ]
        for path in places.around:
            if ("split", path) not in self._kept:
                fresh, site, module = True, SplitSite(self, path), self.base.model.get_submodule(path)
                self._kept["split", path] = [
                    _register(module, "forward_pre", site.enter, with_kwargs=True),
                    _register(module, "forward", site.leave, with_kwargs=True, always_call=True, prepend=True),
                ]
        return fresh

    def off(self) -> None:
        """Remove every hook."""
        self.active = None
        self.put(None)
        for handle in (handle for handles in self._kept.values() for handle in handles):
            handle.remove()
        for module in tree.modules(self.base.model):
            if module.__dict__.pop(_ATTEND, None) is not None:
                config = cast(Any, module.config)
                own = str(config._attn_implementation).removeprefix(PREFIX)
                config._attn_implementation_internal = own
        self._kept, self.weights = {}, {}
        forget_compiled()

    def _hang_attention(self, path: str) -> None:
        module = self.base.model.get_submodule(path)
        if getattr(module, "config", None) is None:
            raise TanzakuError(
                f"{path} of {type(self.base.model).__name__} does not go through transformers' attention interface"
            )
        module.__dict__[_ATTEND] = AttentionSite(self, path)

    def _check_shared(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Under DDP, which shares the gradients of what required them when it was made, and of nothing else."""
        force, around = self.in_force(), DistributedDataParallel._active_ddp_module
        if force is None or around is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if around not in _shared:
            buckets = around.reducer._get_zeros_like_grad_buckets()
            _shared[around] = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
        shared = _shared[around]
        for names, stack in zip(force.route.stacks, force.stacks, strict=True):
            if any(p.requires_grad and id(p) not in shared for _, strip in stack for p in strip.parameters()):
                raise TanzakuError(
                    f"DistributedDataParallel was made while {listed(names)} was not active, so processes would not "
                    "share its gradients: activate it, then wrap the model again"
                )

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """At the backbone's entrance: what a pass needs before its first layer."""
        force = self.in_force()
        if force is None or not force.attention:
            return
        for path in force.attention if self.base.whole else ():
            # Whoever sets another implementation, also in between, gets it from behind ours.
            config = cast(Any, self.base.model.get_submodule(path).config)
            own = (config._attn_implementation or "eager").removeprefix(PREFIX)
            register(own)
            if config._attn_implementation != PREFIX + own:
                config._attn_implementation_internal = PREFIX + own
        for strip in force.shared:
            strip.refresh()


def _register(module: nn.Module, kind: str, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    return cast(RemovableHandle, getattr(module, f"register_{kind}_hook")(hook, **options))


def forget_compiled() -> None:
    """Compiled code guards what it reads, and not which hooks there are: it is compiled again."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()


class ModuleSite:
    """The hooks of one module whose input or output is changed."""

    def __init__(self, sites: Sites, path: str):
        self.sites, self.path = sites, path

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        force = self.sites.in_force()
        plan = None if force is None else force.before.get(self.path)
        if force is None or plan is None:
            return None
        key, x = self._read(module, args, kwargs)
        dim, groups = force.groups(self.path, x, returned=False)
        spans = force.spans(plan, groups, x, module)
        cut = Cut(x.transpose(0, dim) if dim else x, [span.rows for span in spans])
        parts = []
        for span, part in zip(spans, cut.parts, strict=True):
            if span.number is None:
                part = type(span.strips[0]).inputs_together(span.strips, span.sizes, module, part)
            else:
                with force.route.running(span.number):
                    for strip in span.strips:
                        part = strip.inputs(module, part)
            parts.append(part)
        changed = cut.put(parts)
        changed = changed.transpose(0, dim).contiguous() if dim else changed  # models take views of it
        return ((changed, *args[1:]), kwargs) if key == _FIRST else replaced((args, kwargs), {key: changed})

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        force = self.sites.in_force()
        plan = None if force is None else force.after.get(self.path)
        if force is None or plan is None:
            return None
        key, y = ((), output) if isinstance(output, Tensor) else self._first(module, "returns", output)
        dim, groups = force.groups(self.path, y, returned=True)
        spans = force.spans(plan, groups, y, module)
        at = [span.rows for span in spans]
        cut = Cut(y.transpose(0, dim) if dim else y, at)
        parts, read, split = [], None, None
        for i, (span, part) in enumerate(zip(spans, cut.parts, strict=True)):
            if read is None and not all(strip.reads_call for strip in span.strips):
                _, x = self._read(module, args, kwargs)
                read = Cut(x.transpose(0, dim) if dim else x, at).parts
            if span.number is None:
                assert read is not None
                part = type(span.strips[0]).outputs_together(span.strips, span.sizes, module, read[i], part)
                parts.append(part)
                continue
            with force.route.running(span.number):
                for strip in span.strips:
                    if strip.reads_call:
                        if split is None and force.places is not None:
                            split = Split(force, self.path, args, kwargs)
                        given = (args, kwargs) if split is None else split.of(span.number)
                        part = strip.outputs_of(module, *given, part)
                    else:
                        assert read is not None
                        part = strip.outputs(module, read[i], part)
            parts.append(part)
        changed = cut.put(parts)
        changed = changed.transpose(0, dim).contiguous() if dim else changed  # models take views of it
        return changed if key == () else replaced(output, {key: changed})

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key, Tensor]:
        if args and isinstance(args[0], Tensor):
            return _FIRST, args[0]
        return self._first(module, "reads", (args, kwargs))

    def _first(self, module: nn.Module, does: str, value: Any) -> tuple[Key, Tensor]:
        found = next(tensors(value), None)
        if found is None:
            raise TanzakuError(f"{self.path} ({type(module).__name__}) {does} no tensor, which an adapter could change")
        return found


_FIRST: Key = (0, 0)  # the first argument that has no name


class _Lock:
    """A lock that copies and pickles as one that nobody holds."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return (_Lock, ())

    def owned(self) -> bool:
        """Whether this thread holds it."""
        return torch.compiler.is_compiling() or self._lock._is_owned()  # type: ignore[attr-defined]

    def acquire(self) -> None:
        if not torch.compiler.is_compiling():
            self._lock.acquire()

    def release(self) -> None:
        if not torch.compiler.is_compiling():
            self._lock.release()


class WeightSite:
    """The hooks of one module, or of the whole model, that runs with weights of an adapter's own.

    While it runs, its weights are the adapter's for everybody: so one thread runs it at a time.
    """

    def __init__(self, sites: Sites, path: str):
        self.sites, self.path = sites, path
        self._lock = _Lock()
        self._depth = 0
        self._open: Any = None
        self._marks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_depth": 0, "_open": None, "_marks": []}

    def hang(self) -> list[RemovableHandle]:
        module = self.sites.base.model.get_submodule(self.path)
        # Parts of a module are also called past its own pass (an encoder, in generate()), so each is an entrance.
        parts = dict(tree.named_modules(module))
        if not self.path:
            parts = {path: m for path, m in parts.items() if isinstance(m, PreTrainedModel)} or {"": module}
        handles = []
        for path, part in parts.items():
            # What other strips do at the same module is done to what it computes with these weights.
            leave = partial(self.leave, path)
            handles.append(part.register_forward_pre_hook(self.enter, prepend=True))
            handles.append(part.register_forward_hook(leave, prepend=True, with_kwargs=True, always_call=True))
        return handles

    def enter(self, module: nn.Module, args: Any) -> None:
        self._lock.acquire()
        self._depth += 1
        force = self.sites.in_force()
        plan = None if force is None else force.weights.get(self.path)
        if self._depth > 1 or force is None or plan is None:
            return
        if force.route.uniform:
            self.sites.base.check_whole()
            whole = self.sites.base.model.get_submodule(self.path)
            self._open = plan[0][-1].swapped(whole)
            self._open.__enter__()
        else:
            self._marks.append(noise.mark())

    def leave(self, part: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not (self._lock.owned() and self._depth):  # the module failed before it was entered
            return None
        try:
            if self._depth > 1:
                return None
            if self._open is not None:
                block, self._open = self._open, None
                block.__exit__(None, None, None)
            force = self.sites.in_force()
            plan = None if force is None else force.weights.get(self.path)
            if force is None or plan is None or force.route.uniform:
                return None
            mark = self._marks.pop() if self._marks else None
            return self._rerun(force, plan, part, module, args, kwargs, output, mark)
        finally:
            self._depth -= 1
            self._lock.release()

    def _rerun(
        self,
        force: InForce,
        plan: Plan,
        part: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        mark: Any,
    ) -> Any:
        """The output, with the rows of each stack computed once more with its weights."""
        if output is None:  # the module failed
            return None
        if force.places is not None:
            force.places.check(self.path, args, kwargs)
        for number, strips in enumerate(plan):
            if strips and strips[-1].below(part):
                at = partial(_rows_of_stack, force.route, number)
                picked, named = rows_in((args, kwargs), at, self.path)
                noise.rewind(mark, number)
                whole = self.sites.base.model.get_submodule(self.path)
                with strips[-1].swapped(whole, part), quiet(), force.route.running(number, base=True):
                    result = module(*picked, **named)
                output = rows_put(output, result, at, self.path)
        return output

    @contextmanager
    def within(self, strip: WeightStrip) -> Iterator[None]:
        """Weights of an adapter's own outside of the module's pass, if they are not in place already."""
        self._lock.acquire()
        self._depth += 1
        try:
            with nullcontext() if self._depth > 1 else strip.swapped(self.sites.base.model.get_submodule(self.path)):
                yield
        finally:
            self._depth -= 1
            self._lock.release()

    def close(self) -> None:
        """Give the module its own weights back where a pass of this thread was cut short, as by Ctrl-C."""
        while self._lock.owned() and self._depth:
            if self._open is not None:
                self._open.__exit__(None, None, None)
            self._open, self._marks = None, []
            self._depth -= 1
            self._lock.release()


def _rows_of_stack(route: Route, number: int, rows: int) -> Any:
    """Which of so many rows are those of one stack."""
    return dict(route.groups(rows))[number]


class AttentionSite:
    """What stands at an attention layer that some adapter changes."""

    def __init__(self, sites: Sites, path: str):
        self.sites, self.path = sites, path

    def now(self) -> AttentionHook | None:
        """What is in force there."""
        force = self.sites.in_force()
        plan = None if force is None else force.attention.get(self.path)
        return None if force is None or plan is None else AttentionHook(force, plan, self.path)


class AttentionHook(NamedTuple):
    """What the routed adapters do at one attention layer."""

    force: InForce
    plan: Plan
    path: str

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        return self.force.attend(self.path, self.plan, call)

    def parts(self, rows: int) -> list[tuple[int | None, slice]]:
        """(stack number, some of its rows) in the batch's order; None: neighbours whose attention nothing changes."""
        groups = []
        for number, at in self.force.route.groups(rows):
            if isinstance(at, tuple):  # scattered rows: each by itself
                groups += [(number, slice(row, row + 1)) for row in at]
            else:
                groups.append((number, at or slice(0, rows)))
        groups.sort(key=lambda group: group[1].start)
        return [(number if self.plan[number] else None, at) for number, at in _joined(groups, self.plan)]

    def changed(self, number: int, call: AttentionCall) -> Tensor:
        """The result for rows of one stack, whose strips change it."""
        return self.force.changed(self.plan, number, call)


class TokenSite:
    """One hook of the virtual tokens: a function of those in force, if they have it at this module."""

    def __init__(self, sites: Sites, path: str, kind: str, name: str):
        self.sites, self.key = sites, (path, kind, name)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        force = self.sites.in_force()
        if force is None or self.key not in force.token_hooks:
            return None
        self.sites.base.check_whole()
        return getattr(force.tokens, self.key[2])(module, *given)


# -- gradient checkpointing


class KeptRoute:
    """A layer's checkpointing function. The layer runs again in the backward pass, maybe in another thread, and the
    route may be another then: it keeps its own."""

    def __init__(self, sites: Sites, checkpoint: Callable[..., Any]):
        self.sites, self.checkpoint = sites, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        force = self.sites.in_force()
        function = noise.again(function)
        return self.checkpoint(function if force is None else _Replay(self.sites, force, function), *args, **kwargs)


class _Replay:
    def __init__(self, sites: Sites, force: InForce, function: Callable[..., Any]):
        self.sites, self.force, self.function = sites, force, function
        self.context = copy_context()  # with what strips have written for this pass
        ends = (next((s for _, s in reversed(stack) if s.trained), None) for stack in force.stacks)
        self.training = [p for strip in ends if strip is not None for p in [*strip.parameters()][:1] if p.requires_grad]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.context.run(self._run, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not all(p.requires_grad for p in self.training):
            raise TanzakuError(
                "a backward pass reaches a layer whose adapter is not active any more; activate it again before it"
            )
        before, whole = self.sites.here(), self.force.whole
        self.sites.put((self.force,))
        try:
            with nullcontext() if whole is None else self.sites.weights[""].within(whole):
                return self.function(*args, **kwargs)
        finally:
            self.sites.put(before)


# -- transformers' attention interface

PACKING = "_tanzaku_packing"  # gives attention its rows back where a batch holds single tokens (see train/packing.py)
_ATTEND = "_tanzaku_attend"
_Result = tuple[Tensor, Tensor | None]


def register(own: str) -> None:
    """Register a wrapper of the attention function `own` and its mask twin, once."""
    name = PREFIX + own
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, own))
    if own in ALL_MASK_ATTENTION_FUNCTIONS and name not in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])


def _attention(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    catch(key, value)
    # Read so that compiled code guards what is not there, too: layers share their code.
    packing, site = getattr(module, PACKING, None), getattr(module, _ATTEND, None)
    base = _function(own, module)
    hook = None if site is None else site.now()
    if packing is not None and packing.tokens is not None:
        return cast(_Result, packing.attend(own, base, hook, module, query, key, value, options))
    if hook is None:
        return cast(_Result, base(module, query, key, value, attention_mask, **options))
    return cast(_Result, hook(AttentionCall(module, query, key, value, attention_mask, options, base, own)))


def _function(own: str, module: nn.Module) -> Callable[..., Any]:
    if own != "eager":
        return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS[own])
    # Eager attention is each model's own function, named alike in every modelling file.
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise TanzakuError(f"{type(module).__name__} has no eager attention function; load the model with sdpa")
    return cast(Callable[..., Any], function)


def _rows_of(call: AttentionCall, rows: Rows) -> AttentionCall:
    mask = call.mask
    if mask is not None and mask.shape[0] > 1:
        mask = take(mask, rows)
    query, key, value = (take(x, rows) for x in (call.query, call.key, call.value))
    # Biases and sinks that each row's tokens give, beside those of all rows.
    size = len(call.query)
    own = {n: x for n, x in call.options.items() if isinstance(x, Tensor) and x.dim() == 4 and len(x) == size > 1}
    options = {**call.options, **{name: take(x, rows) for name, x in own.items()}}
    return replace(call, query=query, key=key, value=value, mask=mask, options=options)


def _joined(groups: list[tuple[int, Any]], plan: Plan) -> list[tuple[int, Any]]:
    """Groups whose attention nothing changes are one group where they are neighbours."""
    out: list[tuple[int, Any]] = []
    for number, rows in groups:
        last, before = out[-1] if out else (number, None)
        plain = not plan[number] and not plan[last]
        if plain and isinstance(rows, slice) and isinstance(before, slice) and before.stop == rows.start:
            out[-1] = (number, slice(before.start, rows.stop))
        else:
            out.append((number, rows))
    return out


def _stacked(strips: Sequence[AttentionStrip], call: AttentionCall) -> AttentionCall:
    """Each strip sees the ones before it as the model's own attention."""
    for strip in strips:
        call = replace(call, base=partial(_through, strip, call))
    return call


def _through(
    strip: AttentionStrip,
    below: AttentionCall,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    call = replace(below, query=query, key=key, value=value, mask=mask, options=options)
    return strip.attend(call), None


def _offset(stack: list[tuple[str, Strip]]) -> int:
    """Positions that the stack's attention strips take before a row's first token, each adapter counted once."""
    per_path: dict[str, int] = {}
    for path, strip in stack:
        if isinstance(strip, AttentionStrip):
            per_path[path] = per_path.get(path, 0) + strip.position_offset
    return max(per_path.values(), default=0)
