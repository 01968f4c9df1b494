"""Adapters that are made of others, which stay attached and frozen: what fusion and averages have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tanzaku.core import taps
from tanzaku.core.frozen import frozen, untrained
from tanzaku.core.method import AdapterLayer, Attached, Method, ModuleLayer, Place
from tanzaku.core.shared import Shared
from tanzaku.core.weights import WeightCopy
from tanzaku.errors import TanzakuError, listed
from tanzaku.models.families import Base, features
from tanzaku.support.refs import Ref


class Site(NamedTuple):
    """Where every part has something to do: at what a module reads, at what it returns, or only looking on."""

    path: str
    does: str  # "inputs", "outputs" or "looks"

    def __str__(self) -> str:
        return f"the {self.does} of {self.path}"


Layers = Sequence[ModuleLayer]  # of one part at one site, one after another


class ComposedLayer(ModuleLayer):
    """What is made, at one site, of the changes that several adapters make there.

    Args:
        parts: of each adapter its layers at the site.
    """

    edits_output = False

    def __init__(self, site: Site, parts: Sequence[Layers]):
        super().__init__()
        self.edits_input, self.edits_output = site.does == "inputs", site.does == "outputs"  # type: ignore[misc]
        self._parts = tuple(tuple(Ref(layer) for layer in layers) for layers in parts)
        every = [layer for layers in parts for layer in layers]
        for flag in ("reads_call", "reads_weight", "reads_places", "whole_rows", "reads_padding", "untrimmed"):
            setattr(self, flag, any(getattr(layer, flag) for layer in every))

    def made(self, read: Tensor, changes: Tensor) -> Tensor:
        """What is added, (..., size).

        Args:
            read: (..., size), what the parts look at. changes: (..., parts, size), what each would add.
        """
        raise TypeError(f"{type(self).__name__} defines no made()")

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._composed(module, (x,), {}, x)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self._composed(module, (x,), {}, y)

    def outputs_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        return self._composed(module, args, kwargs, y)

    def _composed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        # In full: a change that is small beside y would be lost in the difference of two sums in half precision.
        full = y if y.dtype == torch.float64 else y.float()
        given = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        given = full if self.edits_input else given
        changes = []
        with untrained():
            noted = taps.mark()
            read = _there(self._parts[-1][0]).reads(module, given, full)
            taps.rewind(noted)
            for layers in self._parts:
                z = full
                for ref in layers:
                    layer = frozen(_there(ref))
                    if self.edits_input:
                        z = layer.inputs(module, z)
                    elif layer.reads_call:
                        z = layer.outputs_of(module, args, kwargs, z)
                    else:
                        z = layer.outputs(module, given, z)
                changes.append(z.to(full.dtype) - full)
        kind = next(self.parameters(), full).dtype
        with torch.autocast(y.device.type, enabled=False):
            made = self.made(read.to(kind), torch.stack(changes, dim=-2).to(kind))
        return (full + made).to(y.dtype)


class Onlooker(ModuleLayer):
    """Stands where parts note what a module reads, and does so for them."""

    edits_input = True
    edits_output = False

    def __init__(self, layers: Layers):
        super().__init__()
        self._layers = tuple(map(Ref, layers))

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        for ref in self._layers:
            x = _there(ref).inputs(module, x)
        return x


def _there(ref: Ref[ModuleLayer]) -> ModuleLayer:
    layer = ref()
    if layer is None:
        raise TanzakuError("an adapter was copied without those that it is made of: copy the whole model")
    return layer


@dataclass
class Composed(Method):
    """An adapter that is made of attached ones, its parts, which it leaves as they are.

    Args:
        adapters: their names, two or more. All change the same modules, each in its own way. What they drop out in
            training they drop while this is trained, too.
    """

    in_peft = False
    uses_others = True
    by_default = False  # it says nothing of which adapters
    starts_as_base = False

    least: ClassVar[int] = 2

    _reads: ClassVar[Mapping[str, int]] = {}  # what its parts read of rows, once it is built

    adapters: list[str] = field(default_factory=list)

    def row_data(self) -> Mapping[str, int]:
        return self._reads

    def uses(self) -> Sequence[str]:
        return self.adapters

    def layer(self, site: Site, parts: Sequence[Layers], size: int, like: Tensor) -> ComposedLayer:
        """What is made of the parts' layers at one site, whose tensors have `size` features."""
        raise TypeError(f"{type(self).__name__} defines no layer()")

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        names = self.adapters
        self.require(len(names) >= self.least, f"adapters={names}", "the names of two or more that are attached")
        self.require(len({*names}) == len(names), f"adapters={names}", "each of them once")
        parts_read = (place.adapters[name].method.row_data() for name in names)
        self._reads = {key: number for each in parts_read for key, number in each.items()}  # type: ignore[misc]
        tables = {name: self._table(name, place.adapters[name], place.base) for name in names}
        first = tables[names[0]]
        for name in names[1:]:
            other = sorted({*first} ^ {*tables[name]})
            whose = [names[0] if site in first else name for site in other]
            found = listed([f"{who!r} changes {site}" for who, site in zip(whose, other, strict=True)], 2)
            self.require(not other, f"adapters at different places ({found} alone)", "adapters at the same ones")
        every = (p for name in names for _, layer in place.adapters[name].at() for p in layer.parameters())
        first_of = next(every)
        for site in first:
            parts = [table[site] for table in tables.values()]
            if site.does == "looks":
                yield site.path, Onlooker([layer for layers in parts for layer in layers])
                continue
            module = place.base.model.get_submodule(site.path)
            size = _width(module, site, parts)
            yield site.path, self.layer(site, parts, size, _like(parts, module, first_of))

    def _table(self, name: str, adapter: Attached, base: Base) -> dict[Site, list[ModuleLayer]]:
        """An adapter's layers by their sites."""
        heads, out = self.heads(base), defaultdict(list)
        expected = "adapters that change what modules read or return, such as bottleneck, lora or ia3"
        for path, layer in adapter.at():
            if isinstance(layer, Shared):
                continue  # its layers read it
            if isinstance(layer, WeightCopy):
                head = any(part.has(path) or part.path == path for part in heads)
                self.require(head, f"{name!r}, which has its own copy of {path or 'all weights'}", expected)
                continue  # its parts' heads are left where they are, and one of its own is trained
            self.require(isinstance(layer, ModuleLayer), f"{name!r}, which adds tokens, or keys and values", expected)
            assert isinstance(layer, ModuleLayer)
            self.require(
                not isinstance(layer, ComposedLayer | Onlooker), f"{name!r}, which is made of others", expected
            )
            self.require(not layer.undoes, f"{name!r}, which undoes at {path} what it did elsewhere", expected)
            both = layer.edits_input and layer.edits_output
            turned = isinstance(base.model.get_submodule(path), _ConvNd)
            self.require(not turned, f"{name!r} at {path}, a convolution", "adapters at layers of tokens' features")
            self.require(not both, f"{name!r}, which changes both what {path} reads and what it returns", expected)
            does = "outputs" if layer.edits_output else "looks" if isinstance(layer, taps.Tap) else "inputs"
            out[Site(path, does)].append(layer)
        return dict(out)


def _width(module: nn.Module, site: Site, parts: Sequence[Layers]) -> int:
    told = next((layer.width for layers in parts for layer in layers if layer.width is not None), None)
    if told is not None:
        return told
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1 and type(weight) is nn.Parameter:  # a norm's gain
        return len(weight)
    return features(module, site.path)[0 if site.does == "inputs" else 1]


def _like(parts: Sequence[Layers], module: nn.Module, other: Tensor) -> Tensor:
    """A tensor of the parts', or of the module where what they have is elsewhere, in what their layers share."""
    own = (p for layers in parts for layer in layers for p in layer.parameters())
    return next(own, next(module.parameters(), other))
