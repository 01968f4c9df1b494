"""The hooks of a model with adapters. They hold no adapter and no route: each asks, when it runs, what is in force."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tanzaku.core import dropout, taps
from tanzaku.core.in_force import Current, InForce, Plan
from tanzaku.core.quiet import quiet
from tanzaku.core.routing import Cut, Route, Rows, take
from tanzaku.core.rows import Batch, under_way
from tanzaku.core.survey import Axis, Key, is_plain, replaced, see, tensors
from tanzaku.core.weights import WeightCopy, rows_in, rows_put, stacked
from tanzaku.errors import TanzakuError, listed
from tanzaku.models import tree
from tanzaku.support.context import Local


class ModuleSite:
    """The hooks of one module whose input or output is changed."""

    def __init__(self, sites: Current, path: str):
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
                part = type(span.layers[0]).batched_inputs(span.layers, span.sizes, module, part)
            else:
                with force.route.running(span.number, has_rows=force.has_rows(self.path, x, returned=False)):
                    for layer in span.layers:
                        part = layer.inputs(module, part)
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
            if read is None and not all(layer.reads_call for layer in span.layers):
                _, x = self._read(module, args, kwargs)
                read = Cut(x.transpose(0, dim) if dim else x, at).parts
            if span.number is None:
                assert read is not None
                part = type(span.layers[0]).batched_outputs(span.layers, span.sizes, module, read[i], part)
                parts.append(part)
                continue
            with force.route.running(span.number, has_rows=force.has_rows(self.path, y, returned=True)):
                for layer in span.layers:
                    if layer.reads_call:
                        if split is None and force.places is not None:
                            split = Split(force, self.path, args, kwargs)
                        given = (args, kwargs) if split is None else split.of(span.number)
                        part = layer.outputs_of(module, *given, part)
                    else:
                        assert read is not None
                        part = layer.outputs(module, read[i], part)
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

    def __init__(self, sites: Current, path: str):
        self.sites, self.path = sites, path
        self._lock = _Lock()
        self._depth = 0
        self._open: Any = None
        self._marks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_depth": 0, "_open": None, "_marks": []}

    def attach(self) -> list[RemovableHandle]:
        module = self.sites.base.model.get_submodule(self.path)
        # Parts of a module are also called past its own pass (an encoder, in generate()), so each is an entrance.
        parts = dict(tree.named_modules(module))
        if not self.path:
            parts = {path: m for path, m in parts.items() if isinstance(m, PreTrainedModel)} or {"": module}
        handles = []
        for path, part in parts.items():
            # What other adapter layers do at the same module is done to what it computes with these weights.
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
            self._open = stacked(plan[0], whole)
            self._open.__enter__()
        else:
            self._marks.append((dropout.mark(), taps.mark()))

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
            mark = self._marks.pop() if self._marks else (None, None)
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
        mark: tuple[Any, Any],
    ) -> Any:
        """The output, with the rows of each stack computed once more with its weights."""
        if output is None:  # the module failed
            return None
        if force.places is not None:
            force.places.check(self.path, args, kwargs)
        for number, layers in enumerate(plan):
            if any(layer.below(part) for layer in layers):
                at = partial(_rows_of_stack, force.route, number)
                picked, named = rows_in((args, kwargs), at, self.path)
                dropout.rewind(mark[0], number)
                taps.rewind(mark[1])
                whole = self.sites.base.model.get_submodule(self.path)
                before = self.sites.here()
                self.sites.put((force.alone(number),))
                try:
                    with stacked(layers, whole, part), force.route.running(number, base=True):
                        result = module.forward(*picked, **named)
                finally:
                    self.sites.put(before)
                output = rows_put(output, result, at, self.path)
        return output

    @contextmanager
    def within(self, layer: WeightCopy) -> Iterator[None]:
        """Weights of an adapter's own outside of the module's pass, if they are not in place already."""
        self._lock.acquire()
        self._depth += 1
        try:
            with nullcontext() if self._depth > 1 else layer.swapped(self.sites.base.model.get_submodule(self.path)):
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


class TokenSite:
    """One hook of the virtual tokens: a function of those in force, if they have it at this module."""

    def __init__(self, sites: Current, path: str, kind: str, name: str):
        self.sites, self.key = sites, (path, kind, name)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        force = self.sites.in_force()
        if force is None or self.key not in force.token_hooks:
            return None
        self.sites.base.check_whole()
        return getattr(force.tokens, self.key[2])(module, *given)


class Entrance:
    """At the whole model: notes what a pass is given, where a batch of several adapters needs to know."""

    def __init__(self, sites: Current, ensure: Callable[[InForce], None]):
        self.sites, self.ensure = sites, ensure

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        force = self.sites.in_force()
        if force is None or force.places is None:
            return
        if force.places.unseen and not torch.compiler.is_compiling() and see(self.sites.base, module, args, kwargs):
            force.places.look()
            self.ensure(force)
        under_way.set(Batch(self.sites.base, args, kwargs))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The pass is over."""
        if under_way.get() is not None:
            under_way.set(None)


class HeadSite:
    """At the whole model and at its output embedding, where an adapter has a layer at the latter. A program that
    multiplies with the embedding's weight by itself, as fused losses do, would pass over such a layer in silence."""

    def __init__(self, sites: Current, path: str):
        self.sites, self.path = sites, path

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        _head.ran = False

    def runs(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        _head.ran = True

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The pass is over, and the output embedding has run, if the route has something there."""
        force = self.sites.in_force()
        if torch.compiler.is_compiling() or _head.ran or force is None:
            return
        if self.path in {**force.before, **force.after, **force.weights}:
            raise TanzakuError(
                f"{listed(force.route.adapters)} has a layer at {self.path}, which did not run: a program that takes "
                "losses with its weight alone, as TRL's trainers and fused kernels do, would neither count nor train "
                f"it; leave {self.path} out of the adapter"
            )


_head = threading.local()


class SplitSite:
    """A module around sites without rows. It runs for the whole batch without adapters, and then once more for each
    stack that has some inside, on the stack's rows alone."""

    def __init__(self, sites: Current, path: str):
        self.sites, self.path = sites, path

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        force = self.sites.in_force()
        if force is not None and force.places is not None and self.path in force.places.around:
            if not is_plain((args, kwargs)):
                raise TanzakuError(
                    f"{self.path} would have to run once for each of {listed(force.route.adapters)}, which a cache "
                    "does not allow: route each alone, or pass use_cache=False"
                )
            block = ExitStack()
            block.enter_context(quiet())
            _open.set((*(_open.get() or ()), (self, force, dropout.mark(), block)))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output, with the rows of each stack as the stack makes them."""
        entered = _open.get()
        if not entered or entered[-1][0] is not self:
            return None
        _, force, mark, block = entered[-1]
        _open.set(entered[:-1] or None)
        block.close()
        if output is None:  # the module failed
            return None
        split = Split(force, self.path, args, kwargs)
        parts: list[tuple[int, dict[Key, Tensor]]] = []
        for number in range(len(force.stacks)):
            if not any(path.startswith(f"{self.path}.") for path, _ in force.stacks[number]):
                continue
            own_args, own_kwargs = split.of(number)
            dropout.rewind(mark, number)
            before = self.sites.here()
            self.sites.put((force.alone(number),))
            try:
                with force.route.running(number, base=True):
                    parts.append((number, dict(tensors(module.forward(*own_args, **own_kwargs)))))
            finally:
                self.sites.put(before)
        out = {}
        for key, x in tensors(output):
            at = _groups(force.route, x, split.call.outputs[key])
            out[key] = Cut(x, [at[number] for number, _ in parts]).put([part[key] for _, part in parts])
        return replaced(output, out)


_open: Local[tuple[tuple[SplitSite, InForce, Any, ExitStack], ...]] = Local("tanzaku_split")


class Split:
    """The arguments of a module's call, for the rows of each stack."""

    def __init__(self, force: InForce, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]):
        assert force.places is not None
        self.args, self.kwargs = args, kwargs
        self.given = dict(tensors({**dict(enumerate(args)), **kwargs}))
        for call in force.places.seen.at(path):
            axes = {key: call.inputs.get(key) for key in self.given}
            if all(axis and axis.dims == self.given[key].dim() for key, axis in axes.items()):
                self.call = call
                break
        else:
            raise force.places.refusal(path, next(iter(self.given.values()), torch.empty(0)))
        self.groups = {key: _groups(force.route, x, call.inputs[key]) for key, x in self.given.items()}

    def of(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of one stack."""
        own = {key: take(x, self.groups[key][number]) for key, x in self.given.items()}
        args = tuple(replaced(value, own, (at,)) for at, value in enumerate(self.args))
        return args, {name: replaced(value, own, (name,)) for name, value in self.kwargs.items()}


def _groups(route: Route, x: Tensor, axis: Axis | None) -> dict[int, Rows]:
    if axis is None or axis.dim is None or x.shape[0] == 1:  # one for all rows
        return dict.fromkeys(range(len(route.stacks)))
    return dict(route.groups(x.shape[0]))
