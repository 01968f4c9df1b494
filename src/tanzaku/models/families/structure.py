"""Roles of the layers of a model that the table does not know, found by what runs in it and by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from tanzaku.models import tree
from tanzaku.models.families.sublayers import Ends, Kind, Sublayer, sublayers_of
from tanzaku.models.families.trace import Attention, Call, Trace, sizes_of

_ASKING = re.compile(r"(^|_)q($|_|[^a-z])|query|^wq|^to_q", re.I)
_OFFERING = re.compile(r"(^|_)k($|_|[^a-z])|key|^wk|^to_k", re.I)

_VALUE = re.compile(r"(^|_)v($|_|[^a-z])|value|^wv|^to_v", re.I)

# Last names of layers by role, as model families have them; only for models that no pass can be made through.
_NAMES = {
    "query": ("q_proj", "query", "q", "q_lin", "query_proj", "wq", "to_q", "q_b_proj"),
    "key": ("k_proj", "key", "k", "k_lin", "key_proj", "wk", "to_k"),
    "value": ("v_proj", "value", "v", "v_lin", "value_proj", "wv", "to_v"),
    "fused": ("qkv_proj", "qkv", "query_key_value", "c_attn", "Wqkv", "W_pack", "att_proj"),
    "up": (
        "up_proj",
        "fc1",
        "fc_in",
        "w1",
        "wi",
        "wi_0",
        "wi_1",
        "lin1",
        "dense_h_to_4h",
        "c_fc",
        "gate_up_proj",
        "w3",
    ),
    "down": ("down_proj", "fc2", "fc_out", "w2", "wo", "lin2", "dense_4h_to_h", "c_proj"),
}


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass
class Structure:
    """What was found in one model.

    Args:
        roles: paths of modules by role (see `family.ROLES`), in order of first execution.
        attention: self-attention that goes through transformers' interface, in order of first execution.
        sublayers: attention and feed-forward with the residual stream around them, in order of first execution; none
            where the trace has no modules.
        inline: modules that compute attention themselves. remembers: modules that keep a state in themselves.
        ran: whether a pass was made; else all is by names and shapes.
    """

    roles: dict[str, list[str]] = field(default_factory=dict)
    attention: list[Attention] = field(default_factory=list)
    sublayers: list[Sublayer] = field(default_factory=list)
    inline: list[str] = field(default_factory=list)
    remembers: list[str] = field(default_factory=list)
    ran: bool = False

    def add(self, role: str, paths: Iterable[str]) -> None:
        known = self.roles.setdefault(role, [])
        known.extend(path for path in paths if path not in known)


def structure_of(model: nn.Module, found: Trace | None) -> Structure:
    """The roles of the layers of `model`, of which one pass did `found`."""
    return _by_names(model) if found is None else _Reader(found).structure


class _Reader:
    """Reads roles off a trace."""

    def __init__(self, trace: Trace):
        # Of a mixture's experts only those run that a token goes to, and each reads other tokens than the rows'.
        self.calls = [call for call in trace.calls if "experts" not in call.path.split(".")]
        self.trace = trace
        self.by_result = {call.result: call for call in trace.calls}
        self.taken: set[str] = set()
        self.structure = Structure(attention=trace.attention, remembers=trace.remembers, ran=True)
        self.ends: list[Ends] = []
        for attention in trace.attention:
            self._attention(attention)
        for call in self.calls:
            self._inline(call)
        for call in self.calls:
            self._feed_forward(call)
        self._mixers()
        self.structure.sublayers = sublayers_of(trace, self.ends, block_of)

    def _add(self, role: str, calls: Iterable[Call]) -> None:
        paths = [call.path for call in calls]
        self.structure.add(role, paths)
        self.taken.update(paths)

    def _calls(self, results: Iterable[int], block: str) -> list[Call]:
        """The layers with matrices, of one block, that gave these results."""
        calls = [self.by_result[n] for n in results if n in self.by_result]
        return [call for call in calls if block_of(call.path) == block and not isinstance(call.module, _CONVOLUTIONS)]

    def _attention(self, attention: Attention) -> None:
        block = block_of(attention.path)
        query, key, value = (self._calls(s.straight, block) for s in (attention.query, attention.key, attention.value))
        # Latent attention has keys' rotated part of another layer: what keys and values are both of is the projection.
        both = [call for call in key if call in value]
        self._add("query", query)
        if not attention.shared:
            self._add("key", both or key)
            self._add("value", both or value)
        after = (call for call in self.calls if attention.result in call.sources.straight)
        if (out := next(after, None)) is not None and block_of(out.path) == block and not out.sources.weighing:
            self._add("out", [out])
            if query:
                self.ends.append(Ends("cross" if attention.cross else "attention", query[0].path, out.path))

    def _inline(self, out: Call) -> None:
        """Attention in a model's own words: a layer whose input is weighed by a softmax of other layers' results."""
        sources = out.sources
        if out.path in self.taken or not sources.weighing or sources.many:
            return
        block = block_of(out.path)
        weighing, values = self._calls(sources.weighing, block), self._calls(sources.straight, block)
        weighing = [call for call in weighing if call.path not in self.taken]
        if not weighing or not values:
            return
        values = [call for call in values if _VALUE.search(_last(call.path))] or values
        fused = [call for call in values if call in weighing]
        asking = [call for call in weighing if call not in fused]
        # What weighs and reads something else are projections of positions, or queries of other tokens.
        beside = [call for call in asking if call.reads == values[0].reads]
        keys = fused or [c for c in beside if _OFFERING.search(_last(c.path))] or beside[1:]
        queries = [c for c in beside or asking if _ASKING.search(_last(c.path)) and c not in keys]
        queries = queries or [c for c in asking if _ASKING.search(_last(c.path)) and c not in keys]
        queries = queries or fused or [c for c in asking if c not in keys][:1]
        self._add("query", queries)
        self._add("key", keys)
        self._add("value", fused or values)
        self._add("out", [out])
        if queries:
            kind: Kind = "attention" if any(call.reads == queries[0].reads for call in values) else "cross"
            self.ends.append(Ends(kind, queries[0].path, out.path))
        self.structure.inline.append(_common(call.path for call in (*queries, *keys, *values)))

    def _feed_forward(self, down: Call) -> None:
        """A layer that reads what one or two others made of one input, and leads back to that input's width."""
        sources = down.sources
        if (
            isinstance(down.module, _CONVOLUTIONS)
            or down.path in self.taken
            or sources.weighing
            or sources.many
            or down.direct
        ):
            return
        if not 1 <= len(sources.straight) <= 2:
            return
        ups = self._calls(sources.straight, block_of(down.path))
        fits = (
            len(ups) == len(sources.straight)
            and len({call.reads for call in ups}) == 1
            and all(call.sizes[0] == down.sizes[1] and call.path not in self.taken for call in ups)
            and all(call.sizes[1] in (down.sizes[0], 2 * down.sizes[0]) for call in ups)
        )
        if fits and block_of(down.path):
            gates = [call for call in ups if "gate" in _last(call.path) and len(ups) == 2]
            self._add("gate", gates)
            self._add("up", [call for call in ups if call not in gates])
            self._add("down", [down])
            self.ends.append(Ends("feed_forward", ups[0].path, down.path))

    def _mixers(self) -> None:
        """What reads the input of a block without attention, or of a state-space layer beside attention."""
        attends = [*self.structure.inline, *(attention.path for attention in self.trace.attention)]
        with_attention = {block_of(path) for path in attends}
        # Experts, a router and a gate beside them are one feed-forward.
        inside = [*self.structure.roles.get("down", []), *self.trace.experts]
        for call in self.calls:
            block, owner = block_of(call.path), call.path.rpartition(".")[0]
            if block in ("", call.path) or call.path in self.taken or isinstance(call.module, _CONVOLUTIONS):
                continue
            if owner != block and any(f"{path}.".startswith(f"{owner}.") for path in inside):
                continue
            if block in with_attention and owner not in self.trace.convolves:
                continue
            before = self._calls(call.sources.straight, block)
            if not any(each.path.startswith(f"{owner}.") for each in before):
                self._add("mixer", [call])
        if not self.taken:  # a network of convolutions
            whole = [c for c in self.calls if isinstance(c.module, nn.Conv2d) and c.module.groups == 1]
            self._add("mixer", [call for call in whole if block_of(call.path) not in ("", call.path)])


def _by_names(model: nn.Module) -> Structure:
    """Roles by last names, where the shapes agree."""
    out = Structure()
    for path, parent in tree.named_modules(model):
        sizes = {name: s for name, child in parent.named_children() if (s := sizes_of(child)) is not None}
        if not path or "experts" in path.split(".") or isinstance(parent, nn.MultiheadAttention):
            continue

        def named(role: str, sizes: dict[str, tuple[int, int]] = sizes) -> list[str]:
            return [name for name in sizes if name in _NAMES[role]]

        def add(role: str, names: list[str], path: str = path) -> None:
            out.add(role, [f"{path}.{name}" for name in names])

        query, key, value, fused = (named(role) for role in ("query", "key", "value", "fused"))
        if query and key and value and sizes[key[0]][0] == sizes[value[0]][0]:
            add("query", query[:1])
            add("key", key[:1])
            add("value", value[:1])
        elif fused and not query and sizes[fused[0]][1] > sizes[fused[0]][0]:
            for role in ("query", "key", "value"):
                add(role, fused[:1])
        ups = named("up")
        if downs := [n for n in named("down") if ups and sizes[n][1] == sizes[ups[0]][0]]:
            add("gate", [n for n in ups if "gate" in n and len(ups) == 2])
            add("up", [n for n in ups if "gate" not in n or len(ups) < 2])
            add("down", downs[:1])
    return out


def block_of(path: str) -> str:
    """The path of the outermost numbered module that holds it, such as a layer; "" outside of any."""
    parts = path.split(".")
    return next((".".join(parts[: n + 1]) for n, part in enumerate(parts) if part.isdigit()), "")


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _common(paths: Iterable[str]) -> str:
    """The path of the module that holds all of these."""
    split = [path.split(".")[:-1] for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


# -- names for paths


def names_for(paths: list[str], model_paths: list[str]) -> list[str] | str:
    """What a user would write for exactly these modules: the shortest last names that no other module has, or else a
    regular expression, or else the paths themselves."""
    wanted = set(paths)
    names: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        for n in range(1, len(parts) + 1):
            name = ".".join(parts[-n:])
            if all(p in wanted for p in model_paths if p == name or p.endswith("." + name)):
                names[name] = None
                break
    if not any(part.isdigit() for name in names for part in name.split(".")):
        return list(names)
    return _pattern(paths, model_paths, lambda numbers: r"\d+") or _pattern(paths, model_paths, _one_of) or paths


def _one_of(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"


def _pattern(paths: list[str], model_paths: list[str], numbered: Callable[[list[str]], str]) -> str | None:
    """A regular expression for exactly these paths, whose numbers are `numbered`; None where that matches others."""
    owners: dict[tuple[str, ...], dict[str, None]] = {}
    numbers: dict[tuple[str, ...], list[list[str]]] = {}
    for path in paths:
        *owner, last = path.split(".")
        kind = tuple("#" if part.isdigit() else part for part in owner)
        owners.setdefault(kind, {})[last] = None
        at = numbers.setdefault(kind, [[] for part in kind if part == "#"])
        for known, number in zip(at, [part for part in owner if part.isdigit()], strict=True):
            known.extend([number] if number not in known else [])
    # As few of the first parts as tell these modules from others: a file then fits the model without its head, too.
    for kept in range(1, max(map(len, owners)) + 1):
        ends = {kind[-kept:]: kind for kind in owners}
        if len(ends) < len(owners) or any(end[0] == "#" for end in ends):
            continue
        each = []
        for end, kind in ends.items():
            rest = iter(numbers[kind][len([part for part in kind if part == "#"]) - end.count("#") :])
            each.append(
                r"\.".join([*(numbered(next(rest)) if part == "#" else part for part in end), _lasts(owners[kind])])
            )
        pattern = f"(|.*\\.)({'|'.join(each)})" if len(each) > 1 else f"(|.*\\.){each[0]}"
        if {path for path in model_paths if re.fullmatch(pattern, path)} == set(paths):
            return pattern
    return None


def _lasts(names: Iterable[str]) -> str:
    return f"({'|'.join(names)})"
