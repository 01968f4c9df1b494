"""ReFT: edits of hidden states behind each layer, at the first and the last tokens of a text, in few dimensions.

    LoReFT   h + R^T (W h + b - R h)    R (r, width) of orthonormal rows
    NoReFT   h + R^T (W h + b - R h)    R any
    DiReFT   h + R^T (W h + b)          R any

Wu et al. 2024, arXiv 2404.03592. Settings have the names of the Adapters library (arXiv 2311.11077).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import in_full
from tanzaku.core.method import About, AdapterLayer, Method, ModuleLayer, Place, trainable
from tanzaku.core.places import places
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.errors import TanzakuError, nearest
from tanzaku.methods.parts import Projection, activation, activations
from tanzaku.models.families import features, weight_of


class Rows(nn.Module):
    """R, (r, width), as it is."""

    def __init__(self, r: int, size: int, like: Tensor):
        super().__init__()
        self.weight = trainable(r, size, like=like)

    def matrix(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    def draw(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as torch draws a linear layer's


class OrthonormalRows(nn.Module):
    """R, (r, width), of orthonormal rows: the first of a product of r reflections, each given by a vector below the
    diagonal of `original`, whose diagonal has the rows' signs; maybe times an orthogonal `base` (width, width).

    With a base it is what torch's orthogonal parametrization computes, which files of other programs have: of the
    diagonal it takes the whole numbers, and where weights decay, those are soon zero.
    """

    base: Tensor | None

    def __init__(self, r: int, size: int, like: Tensor, base: bool):
        super().__init__()
        self.original = trainable(r, size, like=like)
        self.register_buffer("base", trainable(size, size, like=like).detach() if base else None)

    def matrix(self) -> Tensor:
        x = self.original.mT.float() if self.original.dtype != torch.float64 else self.original.mT
        below = x.tril(-1)
        rows = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(0)))
        if self.base is not None:
            rows = self.base.to(x.dtype) @ (rows * x.diagonal().trunc())
        else:  # where weights decay, so does the diagonal: its sign alone counts
            rows = rows * torch.where(x.diagonal() < 0, -1.0, 1.0).to(x.dtype)
        return cast(Tensor, rows.mT.to(self.original.dtype))

    @torch.no_grad()
    def draw(self) -> None:
        self.original.copy_(-torch.eye(*self.original.shape))
        if self.base is not None:
            self.base.copy_(torch.linalg.qr(torch.randn_like(self.base))[0])
        else:
            self.original.add_(torch.geqrf(torch.randn_like(self.original).mT)[0].tril(-1).mT)


class Unit(nn.Module):
    """The edit at one end of a text."""

    def __init__(self, how: ReFT, size: int, like: Tensor):
        super().__init__()
        self.learned_source = Projection(size, how.r, like)
        self.projection = (
            OrthonormalRows(how.r, size, like, how.full_form) if how.orthogonality else Rows(how.r, size, like)
        )

    @torch.no_grad()
    def draw(self, subtracts: bool) -> None:
        self.projection.draw()
        # W = R, and without a difference W = 0, is no edit.
        if subtracts:
            self.learned_source.weight.copy_(self.projection.matrix())


class ReftLayer(ModuleLayer):
    """Behind one layer: edits at the first tokens of each row, and at the last."""

    hub = "refts"
    reads_places = True
    whole_rows = True

    def __init__(self, how: ReFT, size: int, like: Tensor):
        super().__init__()
        self.width = size
        self.prefix, self.suffix, self.tied = how.prefix_positions, how.suffix_positions, how.tied_weights
        self.subtracts, self.dropout = bool(how.subtract_projection), how.dropout
        self.act = nn.Identity() if how.non_linearity is None else activation(how.non_linearity)
        read = {"0": self.prefix > 0 or (self.tied and self.suffix > 0), "1": self.suffix > 0 and not self.tied}
        kept = {
            name: used for name, used in read.items() if used or (how.full_form and not (name == "1" and self.tied))
        }
        self.units = nn.ModuleDict({name: Unit(how, size, like) for name in kept})
        for name, used in kept.items():
            if like.device.type != "meta":
                self.unit(name).draw(self.subtracts)
            self.unit(name).requires_grad_(used)

    def unit(self, name: str) -> Unit:
        return cast(Unit, self.units[name])

    def edit(self, unit: Unit, x: Tensor, training: bool) -> Tensor:
        """The whole of `x` (rows, tokens, width), edited."""
        rows = unit.projection.matrix()
        x = x.to(rows.dtype)
        source = self.act(unit.learned_source(x))
        if self.subtracts:
            source = source - F.linear(x, rows)
        return F.dropout(x + source @ rows, self.dropout, training)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        at, lengths, first = places(y)
        ends: list[tuple[str, Tensor]] = []
        if self.prefix:
            ends.append(("0", (at >= 0) & (at < self.prefix)))
        if self.suffix and first:  # what is generated is no longer the end of what was asked
            ends.append(("0" if self.tied else "1", (at >= 0) & (at >= lengths - self.suffix)))
        out = y
        for name, where in ends:
            unit = self.unit(name)

            def edited(_: Tensor, y: Tensor, unit: Unit = unit) -> Tensor:
                return self.edit(unit, y, module.training)

            out = torch.where(where[..., None], in_full(edited, unit.learned_source.weight, y, y).to(y.dtype), out)
        return out


STYLES: dict[str, dict[str, bool]] = {
    "loreft": {"orthogonality": True, "subtract_projection": True},
    "noreft": {"orthogonality": False, "subtract_projection": True},
    "direft": {"orthogonality": False, "subtract_projection": False},
}


@dataclass
class ReFT(Method):
    """Representation fine-tuning: LoReFT, NoReFT, DiReFT.

    Tokens are a row's own: padding and virtual tokens do not count. With a cache, tokens that are generated have the
    places that they have in the whole text; the last tokens are those of what was asked. Behind the last layer an edit
    counts only where the head reads it: of a decoder's classifier that is the last token.

    Args:
        style: "loreft", "noreft" or "direft": what settings that are None are.
        layers: numbers of layers, from 0 in order of execution, or "all".
        prefix_positions, suffix_positions: how many of the first and of the last tokens are edited.
        r: rows of R.
        orthogonality: they are orthonormal. subtract_projection: - R h.
        tied_weights: one edit for both ends.
        dropout: of the edited state. non_linearity: of W h + b, by transformers' name.
        full_form: keep what the Adapters library keeps: an edit for both ends, used or not, and width x width numbers
            beside each R that is orthonormal. Its files are read so, and written of such alone.
    """

    name = "reft"
    peft_type = "REFT"
    paper = "arXiv 2404.03592"
    summary = "low-rank edits of the first and last tokens' hidden states"
    about = About(
        where="the hidden states behind every layer, at the first tokens of a text, and the last if wanted",
        parameters="layers * ends * (2 * r * width + r)",
        cost="small products behind each layer",
        choose="with few rows, where a few tokens can steer the rest",
        limits="edits the prompt and not what is generated; cannot be merged",
    )
    in_peft = False
    by_default = False
    learning_rate = 9e-4  # The paper's for LLaMA; 2e-4 to 4e-3 for RoBERTa.
    # The paper's ranks, and around its learning rates.
    space = spaces(r=Choice((1, 4, 8)), learning_rate=Range(1e-4, 1e-2, log=True))

    style: str = "loreft"
    layers: Literal["all"] | list[int] = "all"
    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool | None = None
    subtract_projection: bool | None = None
    tied_weights: bool = False
    dropout: float = 0.05
    non_linearity: str | None = None
    full_form: bool = False

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if config.get("architecture") != "reft":
            return None
        none = {"architecture": "reft", "dtype": None, "output_reft": True, "init_weights_seed": None}
        given = {key: value for key, value in config.items() if key not in none or value != none[key]}
        # It does not write whether the projection is subtracted, and reads all as if it were.
        return {"subtract_projection": True, **given, "full_form": True}

    def to_hub(self) -> dict[str, Any] | None:
        if not self.full_form:
            raise TanzakuError("reft: the Adapters library's form has more than is kept: attach with full_form=True")
        own = {f.name for f in dataclasses.fields(Method)} | {"style", "full_form"}
        settings = {key: value for key, value in self.settings().items() if key not in own}
        return {"architecture": "reft", "dtype": None, "output_reft": True, "init_weights_seed": None, **settings}

    def reads_ends(self) -> str | None:
        return f"suffix_positions={self.suffix_positions}" if self.suffix_positions else None

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self._check()
        paths = place.base.layer_paths()
        numbers = range(len(paths)) if self.layers == "all" else self.layers
        strange = [number for number in numbers if not 0 <= number < len(paths)]
        self.require(not strange, f"layers={self.layers}", f"numbers of layers, 0 to {len(paths) - 1}")
        for number in dict.fromkeys(numbers):
            path, inside = paths[number]
            module = place.base.model.get_submodule(inside)
            width = features(module)[1]
            self.require(self.r < width, f"r={self.r}", f"less than the {width} numbers of a hidden state")
            yield path, ReftLayer(self, width, weight_of(module))

    def _check(self) -> None:
        styles = " or ".join(map(repr, STYLES))
        self.require(self.style in STYLES, f"style={self.style!r}{nearest(self.style, STYLES)}", styles)
        for key, value in STYLES[self.style].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        self.require(self.r > 0, f"r={self.r}", "1 or more")
        ends = self.prefix_positions, self.suffix_positions
        self.require(min(ends) >= 0 and max(ends) > 0, f"prefix_positions and suffix_positions {ends}", "some to edit")
        self.require(0 <= self.dropout < 1, f"dropout={self.dropout}", "0 or more, below 1")
        name = self.non_linearity
        known = name is None or name.lower() in activations()
        self.require(known, f"non_linearity={name!r}", "None, or one of transformers' activations")
        self.non_linearity = name and name.lower()
