"""What a route does at every site of a model, worked out once, and which route is in force."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from tanzaku.core import dropout
from tanzaku.core.method import AdapterLayer, AttentionCall, AttentionLayer, ModuleLayer, TokenLayer
from tanzaku.core.quiet import routes
from tanzaku.core.routing import Route, Rows, put, take
from tanzaku.core.rows import Places, rows_at
from tanzaku.core.shared import Shared
from tanzaku.core.tokens import VirtualTokens
from tanzaku.core.weights import OwnWeights, WeightCopy, gives_way, trained_copies
from tanzaku.errors import TanzakuError, listed
from tanzaku.models.families import Base

# One list of adapter layers per stack of the route, in stacking order.
Plan = list[list[Any]]


class InForce:
    """What one route does at every site of a model. It is made once and not changed after, so threads may share it.

    Args:
        stacks: for each stack of the route, (path, adapter layer) in stacking order.
    """

    def __init__(self, base: Base, route: Route, stacks: list[list[tuple[str, AdapterLayer]]]):
        self.route, self.stacks = route, stacks
        self.ended = False  # one of its adapters is gone
        self.before: dict[str, Plan] = {}
        self.after: dict[str, Plan] = {}
        self.weights: dict[str, Plan] = {}
        self.attention: dict[str, Plan] = {}
        self.shared: list[Shared] = []  # computed before a pass
        self.read: list[AdapterLayer] = []  # layers of others that these read, which a copy of them needs, too
        self.reads_places = any(isinstance(s, ModuleLayer) and s.reads_places for stack in stacks for _, s in stack)
        self.virtual = tuple(sum(s.num_virtual_tokens for _, s in st if isinstance(s, TokenLayer)) for st in stacks)
        tokens: Plan = [[] for _ in stacks]
        for number, stack in enumerate(stacks):
            trained = trained_copies(stack)
            for path, layer in stack:
                if gives_way(path, layer, trained):
                    continue
                if isinstance(layer, TokenLayer):
                    tokens[number].append(layer)
                    continue
                if isinstance(layer, Shared):
                    if all(layer is not each for each in self.shared):  # an adapter may be in several stacks
                        self.shared.append(layer)
                    continue
                for plans in self._plans_of(layer):
                    plan = plans.setdefault(path, [[] for _ in stacks])[number]
                    plan.insert(0 if isinstance(layer, ModuleLayer) and layer.undoes else len(plan), layer)
        if not route.uniform and "" in self.weights:
            names = dict.fromkeys(name for layers in self.weights[""] for layer in layers for name in layer.own)
            raise TanzakuError(
                f"{listed(names, 3)} of the whole model are an adapter's own: its rows cannot share a batch with others"
            )
        placed = [any(isinstance(s, TokenLayer | AttentionLayer) for _, s in stack) for stack in stacks]
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
            inside = [(path, layer) for path, layer in self.stacks[number] if not isinstance(layer, TokenLayer)]
            self._alone[number] = InForce(self._base, self.route.alone(number), [inside])
        return self._alone[number]

    def groups(self, path: str, x: Tensor, returned: bool) -> tuple[int, list[tuple[int, Rows]]]:
        """(dimension that counts rows, the rows of each stack) for a tensor of a site."""
        if self.places is None:
            # What is drawn for a job's rows, or read of each, lies as it does where others are beside them.
            known = dropout.mark() is not None or self.route.has_context
            dim = rows_at(self._base, path, x.dim(), returned) or 0 if known else 0
            return dim, self.route.groups(x.shape[dim] if x.dim() else 1)
        return self.places.groups(path, x, returned)

    def has_rows(self, path: str, x: Tensor, returned: bool) -> bool:
        """Whether the dimension that :meth:`groups` says counts rows of the batch, as far as somebody asks."""
        if self.places is not None or not self.route.has_context:
            return True
        return rows_at(self._base, path, x.dim(), returned) is not None

    def _plans_of(self, layer: AdapterLayer) -> Iterator[dict[str, Plan]]:
        if isinstance(layer, ModuleLayer):
            if layer.edits_input:
                yield self.before
            if layer.edits_output:
                yield self.after
        else:
            yield self.weights if isinstance(layer, OwnWeights) else self.attention

    @property
    def whole(self) -> WeightCopy | None:
        """The copy of all weights, if the route has one."""
        plan = self.weights.get("")
        return plan[0][-1] if plan else None

    def spans(self, plan: Plan, groups: list[tuple[int, Rows]], x: Tensor, module: nn.Module) -> list[_Span]:
        """Which layers work on which rows of `x`. Neighbours with one layer each, of one batch key, are one span."""
        spans: list[_Span] = []
        last: Any = None
        for number, rows_of_it in groups:
            layers, at = plan[number], cast(Any, rows_of_it)
            if not layers:
                continue
            for layer in layers:
                layer.check_here(x)
            shape = layers[0].batch_key(module) if len(layers) == 1 and isinstance(at, slice) else None
            kind = None if shape is None else (type(layers[0]), shape)
            if kind is None:
                spans.append(_Span(number, at, layers))
            elif kind == last and spans[-1].rows.stop == at.start:
                before = spans[-1]
                sizes = (*before.sizes, at.stop - at.start)
                spans[-1] = _Span(None, slice(before.rows.start, at.stop), [*before.layers, *layers], sizes)
            else:
                spans.append(_Span(None, at, layers, (at.stop - at.start,)))
            last = kind
        return spans

    def attend(self, path: str, plan: Plan, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """The result of an attention layer for a batch of rows, with what the adapter layers of `plan` make of it."""
        size = call.query.shape[0]
        groups = self.route.groups(size) if self.places is None else self.places.of_rows(path, call.query)
        if groups[0][1] is None:
            return (self.changed(plan, 0, call), None) if plan[0] else call.base_result()
        bare, weights = None, None
        mark = dropout.mark()
        if not all(self.stacks[number] for number, _ in groups) or (mark is not None and not all(plan)):
            # The base's own call over the whole batch keeps bare rows bit for bit what they are without adapters.
            bare, weights = call.base_result()
        parts = []
        for number, rows in groups if bare is not None else joined(groups, plan):
            if plan[number]:
                dropout.rewind(mark, number)
                parts.append((rows, self.changed(plan, number, _rows_of(call, rows))))
            elif bare is None:
                parts.append((rows, _rows_of(call, rows).run()))
        if bare is None:
            bare = call.query.new_empty(call.query.shape[0], *parts[0][1].shape[1:])
        return put(bare, parts), weights

    def changed(self, plan: Plan, number: int, call: AttentionCall) -> Tensor:
        """The result for rows of one stack, whose adapter layers change it."""
        for layer in plan[number]:
            layer.check_here(call.query)
        with self.route.running(number, call.key.shape[2]):
            return _stacked(plan[number], call).run()


class _Span(NamedTuple):
    """Layers that one after another change these rows; `number` None: each changes its own, so many `sizes` of them."""

    number: int | None
    rows: Any
    layers: list[Any]
    sizes: tuple[int, ...] = ()


class Current:
    """What is in force in one model, in all threads or in this one."""

    _numbers = itertools.count()

    def __init__(self, base: Base):
        self.base = base
        self.active: InForce | None = None  # for everybody who has no route of his own
        self._reset()

    def _reset(self) -> None:
        self._number = next(Current._numbers)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_number", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is another model: routes of the first are not its own.
        self.__dict__.update(state)
        self._reset()

    def in_force(self) -> InForce | None:
        """What is in force where this runs."""
        own = routes.get()
        force = self.active if own is None else own.get(self._number, self.active)
        return None if force is None or force.ended else force

    def here(self) -> tuple[InForce | None] | None:
        """The route of this context, if it has one of its own."""
        own = routes.get()
        return (own[self._number],) if own is not None and self._number in own else None

    def put(self, here: tuple[InForce | None] | None) -> None:
        """Give this context a route of its own, or take it away: then it has what is active."""
        own = dict(routes.get() or {})
        if here is None:
            own.pop(self._number, None)
        else:
            own[self._number] = here[0]
        routes.set(own or None)


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


def joined(groups: list[tuple[int, Any]], plan: Plan) -> list[tuple[int, Any]]:
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


def _stacked(layers: Sequence[AttentionLayer], call: AttentionCall) -> AttentionCall:
    """Each adapter layer sees the ones before it as the model's own attention."""
    for layer in layers:
        call = replace(call, base=partial(_through, layer, call))
    return call


def _through(
    layer: AttentionLayer,
    below: AttentionCall,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    call = replace(below, query=query, key=key, value=value, mask=mask, options=options)
    return layer.attend(call), None


def _offset(stack: list[tuple[str, AdapterLayer]]) -> int:
    """Positions that the stack's attention layers take before a row's first token, each adapter counted once."""
    per_path: dict[str, int] = {}
    for path, layer in stack:
        if isinstance(layer, AttentionLayer):
            per_path[path] = per_path.get(path, 0) + layer.position_offset
    return max(per_path.values(), default=0)
