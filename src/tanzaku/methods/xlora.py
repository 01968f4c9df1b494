"""X-LoRA: trained LoRA adapters, of which a gate takes for each token what the bare base makes of it asks for.

    y' = y + sum_k s_k d_k,  s = softmax(G h)

d_k is what adapter k adds to y, and h the last hidden state of the same token in a first pass, of the bare base. The
gate G alone is trained: one for all modules, or with `layerwise_scalings` outputs of its own for each.

Buehler and Buehler 2024, arXiv 2402.07148.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import PurePath
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.first_pass import FIRST_PASS, FirstPass
from tanzaku.core.method import About, AdapterLayer, Method, Place
from tanzaku.core.places import places
from tanzaku.core.routing import running_route, take
from tanzaku.core.shared import Shared, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.errors import TanzakuError
from tanzaku.methods.composed import Composed, ComposedLayer, Layers, Site
from tanzaku.methods.parts import Projection
from tanzaku.models.families import Base
from tanzaku.support.refs import Ref


class Scalings(NamedTuple):
    """What the gate says of a pass's tokens.

    Args:
        table: (rows, tokens + 1, sites, adapters), by a token's place among those of its row that are no padding; last
            what all others have, which is nothing. before: (rows, 1), how many of the row's places a cache has.
        encoder: (rows, tokens of the encoder, sites, adapters), or None.
    """

    table: Tensor
    before: Tensor
    encoder: Tensor | None


class _Seen(NamedTuple):
    """What the bare base made of a pass's tokens, and what dropout left of what the gate made of it."""

    by: weakref.ref[Gate]
    found: FirstPass
    kept: list[Tensor]
    encoder_kept: list[Tensor]


# Of the pass that runs in this context, for a checkpointed layer that runs again.
_seen: ContextVar[tuple[_Seen, ...]] = ContextVar("tanzaku_xlora_seen", default=())


class Gate(Shared):
    """The network that says how much of each adapter a token takes, by PEFT's names."""

    reads_first_pass = True

    def __init__(self, how: XLora, width: int, sites: int, like: Tensor):
        super().__init__()
        self.how, self.sites, self.adapters = how, sites, len(how.adapters)
        out = self.adapters * (sites if how.layerwise_scalings else 1)
        sizes = [width, *[how.xlora_size] * (how.xlora_depth - 1), out]
        step = 3 if how.xlora_dropout_p > 0 else 2  # of its linear layers among PEFT's, with activations and dropout
        layers = {str(step * n): Projection(a, b, like) for n, (a, b) in enumerate(pairwise(sizes))}
        if like.device.type != "meta":
            for layer in layers.values():
                nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
        self.internal_xlora_classifier = nn.ModuleDict({"layers": nn.ModuleDict(layers)})

    def compute_of(self, given: Mapping[str, Any]) -> Scalings:
        found: FirstPass = given[FIRST_PASS]
        pass_ = _Seen(weakref.ref(self), found, self._kept(found.hidden, found), self._kept(found.encoder, found))
        _seen.set((*(each for each in _seen.get() if each.by() not in (None, self)), pass_))
        return self._of(pass_)

    def compute(self) -> Scalings:
        found = next((each for each in _seen.get() if each.by() is self), None)
        if found is None:
            raise TanzakuError("xlora: found a module that runs by itself, expected a pass of the whole model")
        return self._of(found)

    def _of(self, seen: _Seen) -> Scalings:
        found = seen.found
        said = self._said(found.hidden, seen.kept)
        tokens = found.hidden.shape[1]
        place = (found.own.cumsum(1) - 1).where(found.own, tokens)
        table = said.new_zeros(len(said), tokens + 1, *said.shape[2:])
        table = table.scatter(1, place[..., None, None].expand_as(said), said)
        table = torch.cat([table[:, :tokens], torch.zeros_like(table[:, :1])], 1)
        encoder = None if found.encoder is None else self._said(found.encoder.detach(), seen.encoder_kept)
        return Scalings(table, found.before, encoder)

    def _kept(self, hidden: Tensor | None, found: FirstPass) -> list[Tensor]:
        """What dropout leaves between layers: drawn once a pass, also where a layer that runs again asks anew."""
        rate, inner = self.how.xlora_dropout_p, self.how.xlora_depth - 1
        if hidden is None or not (found.training and rate and inner):
            return []
        size = (*hidden.shape[:2], self.how.xlora_size)
        return [F.dropout(torch.ones(size, device=hidden.device), rate) for _ in range(inner)]

    def _said(self, hidden: Tensor, kept: list[Tensor]) -> Tensor:
        """(rows, tokens, sites or 1, adapters)."""
        *inner, last = self.internal_xlora_classifier["layers"].values()  # type: ignore[operator]
        x = hidden.to(last.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for number, layer in enumerate(inner):
                x = torch.relu(layer(x))
                x = x * kept[number].to(x) if kept else x
            return self.how.scaled(last(x).view(*x.shape[:2], -1, self.adapters))


class XLoraLayer(ComposedLayer):
    """The adapters at one site, by the gate."""

    def __init__(self, site: Site, parts: Sequence[Layers], gate: Gate, number: int, crosses: bool):
        super().__init__(site, parts)
        self.gate, self.number, self.crosses = Ref(gate), number, crosses
        self.reads_places = self.whole_rows = True  # type: ignore[misc]

    def made(self, read: Tensor, changes: Tensor) -> Tensor:
        scalings: Scalings = reached(self.gate).value()
        if self.crosses:
            if scalings.encoder is None:
                raise TanzakuError("xlora: a decoder's attention to an encoder has no encoder to read")
            own = _own(scalings.encoder, len(changes))
        else:
            table, before = _own(scalings.table, len(changes)), _own(scalings.before, len(changes))
            at = places(changes[..., 0, :]).at
            tokens = table.shape[1] - 1
            index = (at - before).where((at >= before) & (at < before + tokens), tokens)
            own = table.gather(1, index[..., None, None].expand(*index.shape, *table.shape[2:]))
        scale = own[:, :, self.number if own.shape[2] > 1 else 0]
        return torch.einsum("...p,...ps->...s", scale.to(changes.dtype), changes)


def _own(x: Tensor, size: int) -> Tensor:
    """Of a tensor of all rows of the batch, those that a layer has before it."""
    route, number, _ = running_route()
    own = take(x, dict(route.groups(len(x)))[number])
    if size % len(own):
        raise TanzakuError(f"xlora: found {size} rows in a module, expected the {len(own)} of the batch")
    return own.repeat_interleave(size // len(own), 0) if size != len(own) else own


class _Building(NamedTuple):
    """What an X-LoRA is made with: its gate, the sites' numbers, and which of them read an encoder."""

    gate: Gate
    numbers: Iterator[int]
    cross: set[str]


@dataclass
class XLora(Composed):
    """X-LoRA over attached LoRA adapters, which stay frozen; a classifier's head is trained along.

    Args:
        enable_softmax: the gate's outputs are shares of one; without, they are taken as they are.
        softmax_temperature: by which the outputs are divided before.
        layerwise_scalings: each module has shares of its own.
        top_k_lora: only so many adapters a token are taken. enable_softmax_topk: what they then take are shares of one.
        xlora_depth: linear layers of the gate. xlora_size: their width. xlora_dropout_p: between them, in training.
        global_scaling_weight: a factor of all that is added.
        hidden_size: kept for PEFT's files; the model tells its own.
        scaling_pass_value: 0 alone, as the first pass is the bare base's.
    """

    name = "xlora"
    peft_type = "XLORA"
    paper = "arXiv 2402.07148"
    summary = "trained LoRA adapters, of which each token takes what a gate says"
    about = About(
        where="the modules that its adapters change, which all change the same ones",
        parameters="(width + 1) * adapters",
        cost="a pass of the bare base before each, and every adapter's own",
        choose="to have several adapters' abilities in one text, by what each token asks for",
        limits="two passes; is not linear, so it cannot be merged; needs all its adapters, which its files bring along",
    )
    in_peft = True
    nonzero = ("global_scaling_weight",)
    learning_rate = 1e-3  # Adam's usual one: a small network that starts at random
    # PEFT's gate and one with a hidden layer, as the paper's are deeper; a decade each way.
    space = spaces(xlora_depth=Choice((1, 2)), learning_rate=Range(1e-4, 1e-2, log=True))

    _building = cast("_Building | None", None)
    _brings = cast("Mapping[str, str]", {})

    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    softmax_temperature: float = 1.0
    layerwise_scalings: bool = False
    top_k_lora: int | None = None
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    global_scaling_weight: float = 1.0
    scaling_pass_value: float = 0.0
    hidden_size: int | None = None

    def scaled(self, out: Tensor) -> Tensor:
        """What is taken of each adapter, from what the gate says: (..., adapters)."""
        if self.enable_softmax:
            out = (out / self.softmax_temperature).softmax(-1)
        if self.top_k_lora is not None:
            best = out.topk(self.top_k_lora, dim=-1).indices
            out = out * torch.zeros_like(out).scatter(-1, best, 1.0)
        if self.enable_softmax_topk:
            taken = out != 0
            out = out.masked_fill(~taken, -torch.inf).softmax(-1).masked_fill(~taken, 0.0)
        return out * self.global_scaling_weight

    def layer(self, site: Site, parts: Sequence[Layers], size: int, like: Tensor) -> ComposedLayer:
        assert self._building is not None
        gate, numbers, cross = self._building
        return XLoraLayer(site, parts, gate, next(numbers), site.path in cross)

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        self.check()
        for name in self.adapters:
            method = place.adapters[name].method
            plain = method.name == "lora" and not method.settings()["use_dora"]
            self.require(plain, f"{name!r}, of {method.name}", "adapters of lora without use_dora, as in HF PEFT")
        self.hidden_size = base.hidden_size
        sites = [site for name in self.adapters[:1] for site in self._table(name, place.adapters[name], base)]
        gate = Gate(self, base.hidden_size, len(sites), next(base.model.parameters()))
        self._building = _Building(gate, count(), self._reading_encoders(base, sites))
        yield "", gate
        try:
            yield from super().build(place)
        finally:
            self._building = None

    def _reading_encoders(self, base: Base, sites: Sequence[Site]) -> set[str]:
        """Paths of modules that make a decoder's keys and values of what its encoder returns."""
        crossing = [each.path for each in base.structure.attention if each.cross] if base.encoder_decoder else []
        names = base.defaults(self.name, ("key", "value")) if crossing else []
        parts = [(site.path, *site.path.rpartition(".")[::2]) for site in sites]
        return {path for path, parent, last in parts if parent in crossing and last in names}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Method:
        """As ever, or with PEFT's directories by name in place of names."""
        given = settings.get("adapters")
        if not isinstance(given, dict):
            return super().from_settings(settings)
        own = {k: str(v) for k, v in given.items()}
        # Those that are beside a file of ours have names of their own.
        names = {k: PurePath(v).name if PurePath(v).parts[:-1] == ("parts",) else str(k) for k, v in own.items()}
        made = cast(XLora, super().from_settings({**settings, "adapters": list(names.values())}))
        made._brings = {names[k]: v for k, v in own.items()}
        return made

    def brings(self) -> Mapping[str, str]:
        return self._brings

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        # PEFT calls them by numbers, whatever their names, and finds them by these alone.
        return {**config, "adapters": {str(n): f"parts/{name}" for n, name in enumerate(self.adapters)}}

    def check(self) -> None:
        """Raise an error for settings that make no gate."""
        for key in ("xlora_depth", "xlora_size"):
            self.require(getattr(self, key) > 0, f"{key}={getattr(self, key)}", "1 or more")
        self.require(0 <= self.xlora_dropout_p < 1, f"xlora_dropout_p={self.xlora_dropout_p}", "a probability below 1")
        self.require(self.softmax_temperature > 0, f"softmax_temperature={self.softmax_temperature}", "more than 0")
        best, most = self.top_k_lora, len(self.adapters)
        self.require(best is None or 0 < best <= most, f"top_k_lora={best}", f"None, or 1 to {most}")
        self.require(
            self.scaling_pass_value == 0,
            f"scaling_pass_value={self.scaling_pass_value}",
            "0: the first pass is the bare base's",
        )
