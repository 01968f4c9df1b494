"""The three sites of a frozen model: hooks on, hooks off.

Everything an adapter does to a model passes through here. Modules are reached by forward (pre-)hooks, attention by
transformers' attention interface, virtual tokens by the backbone's inputs. Nothing in the model is replaced, and a
site that no routed adapter uses has no hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tanzaku import noise
from tanzaku.errors import TanzakuError
from tanzaku.families import Base
from tanzaku.method import AttentionCall, AttentionStrip, ModuleStrip, Strip, TokenStrip
from tanzaku.routing import Cut, Route, put, take
from tanzaku.tokens import VirtualTokens
from tanzaku.weights import WeightStrip, as_used

# One list of strips per stack of the route, in stacking order.
Plan = list[list[Any]]


_quiet = 0


class _Running:
    """Within the block, the strips of one stack run: dropout is theirs alone. A class, since it is entered often."""

    __slots__ = ("keys", "number", "route")

    def __init__(self, route: Route, number: int, keys: int | None = None):
        self.route, self.number, self.keys = route, number, keys

    def __enter__(self) -> None:
        self.route.at, self.route.keys = self.number, self.keys

    def __exit__(self, *_: object) -> None:
        self.route.at = self.route.keys = None


class _Span(NamedTuple):
    """Strips that one after another change these rows; `number` None: each changes its own, so many `sizes` of them."""

    number: int | None
    rows: Any
    strips: list[Any]
    sizes: tuple[int, ...] = ()


@contextmanager
def quiet() -> Iterator[None]:
    """Run modules of the base without what adapters hang on them."""
    global _quiet
    _quiet += 1
    try:
        yield
    finally:
        _quiet -= 1


class AttentionHook(NamedTuple):
    """What the routed adapters do at one attention layer."""

    sites: Sites
    plan: Plan

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        return self.sites.attend(self.plan, call)

    def parts(self, rows: int) -> list[tuple[int | None, slice]]:
        """(stack number, some of its rows) in the batch's order; None: neighbours whose attention nothing changes."""
        assert self.sites.route is not None
        groups = []
        for number, at in self.sites.route.groups(rows):
            if isinstance(at, Tensor):  # scattered rows: each by itself
                groups += [(number, slice(row, row + 1)) for row in at.tolist()]
            else:
                groups.append((number, at or slice(0, rows)))
        groups.sort(key=lambda group: group[1].start)
        return [(number if self.plan[number] else None, at) for number, at in _joined(groups, self.plan)]

    def changed(self, number: int, call: AttentionCall) -> Tensor:
        """The result for rows of one stack, whose strips change it."""
        return self.sites.changed(self.plan, number, call)


class Sites:
    """The hooks that one route needs on one model."""

    def __init__(self, base: Base):
        self.base = base
        self.route: Route | None = None
        self._handles: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []
        self._whole: list[WeightStrip] = []
        self._plans: dict[tuple[type[Strip], str], Plan] = {}
        self._shape: list[Any] | None = None
        self.stacks: list[list[tuple[str, Strip]]] = []

    def on(self, route: Route, stacks: list[list[tuple[str, Strip]]]) -> None:
        """Hang `stacks` (for each stack of the route: (path, strip) in stacking order)."""
        shape = _shape(stacks[0]) if route.uniform else None
        if self.route is not None and shape is not None and shape == self._shape:
            # The same hooks with other strips: switching between adapters of one kind costs no walk over the model.
            self.route, self.stacks = route, stacks
            for plan in self._plans.values():
                plan[0].clear()
            for path, strip in stacks[0]:
                self._plans[_kind(strip), path][0].append(strip)
            return
        self.off()
        self.route, self.stacks, self._shape = route, stacks, shape
        try:
            self._hang()
        except BaseException:
            self.off()
            raise

    def off(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        for undo in reversed(self._undo):
            undo()
        self._handles, self._undo, self._whole, self.route, self.stacks = [], [], [], None, []
        self._plans, self._shape = {}, None

    def _hang(self) -> None:
        assert self.route is not None
        tokens: Plan = [[] for _ in self.stacks]
        for number, stack in enumerate(self.stacks):
            for path, strip in stack:
                if isinstance(strip, TokenStrip):
                    tokens[number].append(strip)
                else:
                    plan = self._plans.setdefault((_kind(strip), path), [[] for _ in self.stacks])
                    plan[number].append(strip)
        by_kind = {k: {path: plan for (kind, path), plan in self._plans.items() if kind is k} for k in _KINDS}
        # A module's own weights first: what other strips do at the same module is done to what it computes with them.
        for path, plan in by_kind[WeightStrip].items():
            self._hang_weights(path, plan)
        for path, plan in by_kind[ModuleStrip].items():
            self._hang_module(self.base.model.get_submodule(path), plan)
        if by_kind[AttentionStrip]:
            self._hang_attention(by_kind[AttentionStrip])
        offsets = [_offset(stack) for stack in self.stacks]
        placed = [any(isinstance(s, TokenStrip | AttentionStrip) for _, s in stack) for stack in self.stacks]
        if any(placed):
            virtual = VirtualTokens(self.base, self.route, tokens, offsets, placed)
            self._handles += virtual.hang()
        self._keep_route_in_checkpoints()

    # -- module site

    def _hang_module(self, module: nn.Module, plan: Plan) -> None:
        if any(s.edits_input for stack in plan for s in stack):
            self._handles.append(module.register_forward_pre_hook(partial(self._before, plan)))
        if any(s.edits_output for stack in plan for s in stack):
            self._handles.append(module.register_forward_hook(partial(self._after, plan)))

    def _before(self, plan: Plan, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if _quiet:
            return None
        x = args[0]
        parts = []
        spans = self._spans(plan, x.shape[0], module, "edits_input")
        cut = Cut(x, [span.rows for span in spans])
        for span, part in zip(spans, cut.parts, strict=True):
            if span.number is None:
                part = type(span.strips[0]).inputs_together(span.strips, span.sizes, module, part)
            else:
                with self._running(span.number):
                    for strip in span.strips:
                        part = strip.inputs(module, part)
            parts.append(part)
        return (cut.put(parts), *args[1:])

    def _after(self, plan: Plan, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if _quiet:
            return None
        parts = []
        spans = self._spans(plan, output.shape[0], module, "edits_output")
        rows = [span.rows for span in spans]
        cut = Cut(output, rows)
        for span, x, part in zip(spans, Cut(args[0], rows).parts, cut.parts, strict=True):
            if span.number is None:
                part = type(span.strips[0]).outputs_together(span.strips, span.sizes, module, x, part)
            else:
                with self._running(span.number):
                    for strip in span.strips:
                        part = strip.outputs(module, x, part)
            parts.append(part)
        return cut.put(parts)

    def _spans(self, plan: Plan, rows: int, module: nn.Module, edits: str) -> list[_Span]:
        """Which strips work on which rows. Neighbours with a strip each, of one kind and shape, are one span."""
        spans: list[_Span] = []
        last: Any = None
        for number, at in self._groups(rows):
            strips = [s for s in plan[number] if getattr(s, edits)]
            if not strips:
                continue
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

    def _groups(self, rows: int) -> list[tuple[int, Any]]:
        assert self.route is not None
        return self.route.groups(rows)

    def _running(self, number: int, keys: int | None = None) -> _Running:
        assert self.route is not None
        return _Running(self.route, number, keys)

    # -- a module's own weights

    def _hang_weights(self, path: str, plan: Plan) -> None:
        module = self.base.model.get_submodule(path)
        assert self.route is not None
        if not self.route.uniform:
            if not path:
                raise TanzakuError("full fine-tuning changes every weight: its rows cannot share a batch with others")
            marks: list[Any] = []
            self._handles.append(module.register_forward_pre_hook(lambda *_: marks.append(noise.mark())))
            self._handles.append(module.register_forward_hook(partial(self._rerun, plan, marks), with_kwargs=True))
            return
        # Parts of a model are also called by themselves (an encoder, in generate()), so each is an entrance.
        entrances = [module] if path else [m for m in module.modules() if isinstance(m, PreTrainedModel)] or [module]
        if not path:
            self._whole.append(plan[0][-1])
        open_: list[Any] = []
        depth = [0]

        def enter(_module: nn.Module, _args: Any) -> None:
            depth[0] += 1
            if depth[0] == 1:
                open_.append(plan[0][-1].swapped(module))
                open_[-1].__enter__()

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            depth[0] -= 1
            if depth[0] == 0:
                open_.pop().__exit__(None, None, None)

        for entrance in entrances:
            self._handles.append(entrance.register_forward_pre_hook(enter))
            self._handles.append(entrance.register_forward_hook(leave, always_call=True))

    def _rerun(
        self,
        plan: Plan,
        marks: list[Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        mark = marks.pop()
        if _quiet:
            return output
        parts = []
        for number, rows in self._groups(output.shape[0]):
            if plan[number]:
                picked = [take(a, rows) if isinstance(a, Tensor) else a for a in args]
                strip = plan[number][-1]
                own = {name: as_used(p, module.get_parameter(name)) for name, p in strip.own.items()}
                noise.rewind(mark, number)
                with quiet(), self._running(number):
                    parts.append((rows, torch.func.functional_call(module, own, tuple(picked), kwargs)))
        return put(output, parts)

    # -- attention site

    def _hang_attention(self, plans: dict[str, Plan]) -> None:
        shared = [s for plan in plans.values() for stack in plan for s in stack if _shares(s)]
        if shared:
            model = cast(Any, self.base.model)
            entrance = model.get_decoder() if self.base.encoder_decoder else self.base.backbone

            def refresh(_module: nn.Module, _args: Any) -> None:
                for strip in shared:
                    strip.refresh()

            self._handles.append(entrance.register_forward_pre_hook(refresh))
        for path, plan in plans.items():
            module = self.base.model.get_submodule(path)
            config = getattr(module, "config", None)
            if config is None:
                raise TanzakuError(
                    f"{path} of {type(self.base.model).__name__} does not go through transformers' attention interface"
                )
            own = config._attn_implementation or "eager"
            if not own.startswith(PREFIX):
                register(own)
                config._attn_implementation_internal = PREFIX + own
                self._undo.append(partial(setattr, config, "_attn_implementation_internal", own))
            module.__dict__[_ATTEND] = AttentionHook(self, plan)
            self._undo.append(partial(module.__dict__.pop, _ATTEND, None))

    def attend(self, plan: Plan, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """The result of an attention layer for a batch of rows, with what the strips of `plan` make of it."""
        groups = self._groups(call.query.shape[0])
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
        with self._running(number, call.key.shape[2]):
            return _stacked(plan[number], call).run()

    # -- gradient checkpointing

    def _keep_route_in_checkpoints(self) -> None:
        """A checkpointed layer runs again in the backward pass, when the route may be another: it keeps its own."""

        def replay(
            route: Route, stacks: list[list[tuple[str, Strip]]], whole: WeightStrip | None, function: Any, *args: Any
        ) -> Any:
            if self.route is route and whole is None:
                return function(*args)
            before = (self.route, self.stacks)
            if self.route is not route:
                self.on(route, stacks)
            try:
                with nullcontext() if whole is None else whole.swapped(self.base.model):
                    return function(*args)
            finally:
                if before[0] is None:
                    self.off()
                elif before[0] is not route:
                    self.on(before[0], before[1])

        self._wrap_checkpoints(replay)
        enable = getattr(self.base.model, "gradient_checkpointing_enable", None)
        if enable is not None:

            def enabled(*args: Any, **kwargs: Any) -> None:
                enable(*args, **kwargs)
                self._wrap_checkpoints(replay)

            # Trainers enable checkpointing when an adapter is active already.
            self.base.model.__dict__["gradient_checkpointing_enable"] = enabled
            self._undo.append(partial(self.base.model.__dict__.pop, "gradient_checkpointing_enable", None))

    def _wrap_checkpoints(self, replay: Callable[..., Any]) -> None:
        for module in self.base.model.modules():
            checkpoint = module.__dict__.get(_CHECKPOINT)
            if checkpoint is not None and getattr(module, "gradient_checkpointing", False):

                def kept(function: Callable[..., Any], *args: Any, checkpoint: Any = checkpoint) -> Any:
                    whole = self._whole[-1] if self._whole else None
                    return checkpoint(partial(replay, self.route, self.stacks, whole, noise.again(function)), *args)

                module.__dict__[_CHECKPOINT] = kept
                self._undo.append(partial(_put_back, module, kept, checkpoint))


_CHECKPOINT = "_gradient_checkpointing_func"


_KINDS: tuple[type[Strip], ...] = (ModuleStrip, WeightStrip, AttentionStrip)


def _kind(strip: Strip) -> type[Strip]:
    return next(kind for kind in _KINDS if isinstance(strip, kind))


def _shape(stack: list[tuple[str, Strip]]) -> list[Any] | None:
    """What hooks a stack needs, where they are all at modules and hang on nothing else."""
    shape: list[Any] = []
    for path, strip in stack:
        if isinstance(strip, ModuleStrip):
            shape.append((path, strip.edits_input, strip.edits_output))
        elif isinstance(strip, WeightStrip) and path:
            shape.append((path, None, None))
        else:
            return None
    return shape


def _put_back(module: nn.Module, kept: Any, checkpoint: Any) -> None:
    # Checkpointing may have been enabled anew since, with other options.
    if module.__dict__.get(_CHECKPOINT) is kept:
        module.__dict__[_CHECKPOINT] = checkpoint


# -- transformers' attention interface

PREFIX = "tanzaku_"
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
    packing = module.__dict__.get(PACKING)
    base = _function(own, module)
    hook = None if _quiet else module.__dict__.get(_ATTEND)
    if packing is not None and packing.tokens is not None:
        return cast(_Result, packing.attend(own, base, hook, module, query, key, value, options))
    if hook is None:
        return cast(_Result, base(module, query, key, value, attention_mask, **options))
    return cast(_Result, hook(AttentionCall(module, query, key, value, attention_mask, options, base, own)))


def _function(own: str, module: nn.Module) -> Callable[..., Any]:
    if own != "eager":
        return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS[own])
    # Eager attention is each model's own function, named alike in every modelling file.
    import sys

    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise TanzakuError(f"{type(module).__name__} has no eager attention function; load the model with sdpa")
    return cast(Callable[..., Any], function)


def _rows_of(call: AttentionCall, rows: Any) -> AttentionCall:
    mask = call.mask
    if mask is not None and mask.shape[0] > 1:
        mask = take(mask, rows)
    query, key, value = (take(x, rows) for x in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, mask=mask)


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


def _shares(strip: AttentionStrip) -> bool:
    return type(strip).refresh is not AttentionStrip.refresh


def _offset(stack: list[tuple[str, Strip]]) -> int:
    """Positions that the stack's attention strips take before a row's first token, each adapter counted once."""
    per_path: dict[str, int] = {}
    for path, strip in stack:
        if isinstance(strip, AttentionStrip):
            per_path[path] = per_path.get(path, 0) + strip.position_offset
    return max(per_path.values(), default=0)
