"""Whose rows a module has before it: known from what its tensors are, never guessed from a size that fits.

In a batch of several adapters each layer changes its own rows of what a module reads and returns. Mostly the first
dimension counts them. Where it counts tokens, images or anything else, the base was seen (`survey.py`) and tells:

- the second dimension counts them: it is routed by that;
- images that have places in the texts: each belongs to the row whose text has its place;
- no dimension does, as where experts read the tokens that chose them, or where all rows read one table: a module around
  it, which does have rows, runs once more for each adapter, on that adapter's rows alone;
- otherwise it is refused in a batch of several adapters. A route of one adapter asks for nothing of this.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from tanzaku.core.routing import Route, Rows
from tanzaku.core.survey import Axis, Call, Survey, image_token, survey, tensors
from tanzaku.errors import TanzakuError, listed
from tanzaku.models.families import Base
from tanzaku.support.context import Local


class Place(NamedTuple):
    """Where a module has rows in the tensors that layers change, which have so many `dims`: see `survey.Axis`."""

    dim: int
    share: int
    dims: tuple[int, int]  # of what it reads and of what it returns
    of: str


class Within(NamedTuple):
    """The module has no rows, but one around it has, by this path."""

    path: str


class Places:
    """The places of all sites of one route over several adapters."""

    def __init__(self, base: Base, route: Route, sites: Sequence[str]):
        self.base, self.route, self.sites = base, route, sites
        self.found: dict[str, Place | Within | None] = {}
        self.around: set[str] = set()  # modules that run once for each adapter
        self.look()

    def look(self) -> None:
        """Take what has been seen of the base up to now."""
        self.seen = survey(self.base)  # kept: a pass asks no table of all models
        self.unseen = not self.seen.calls
        self.found = {path: _place_of(self.seen, self.base, path) for path in self.sites}
        self.around = {place.path for place in self.found.values() if isinstance(place, Within)}

    def groups(self, path: str, x: Tensor, returned: bool) -> tuple[int, list[tuple[int, Rows]]]:
        """(dimension that counts rows, the rows of each stack) for a tensor that a site reads or has returned.

        Raises:
            TanzakuError: the rows have no known place in it.
        """
        place, batch = self.found.get(path), under_way.get()
        if x.is_meta:  # which holds no numbers that could be wrong
            return 0, self.route.groups(x.shape[0])
        if not isinstance(place, Place) or x.dim() != place.dims[returned]:
            raise self.refusal(path, x)
        size = x.shape[place.dim]
        if place.of == "images":
            counts = None if batch is None else batch.images(size)
            if counts is None:
                raise self.refusal(path, x, "images of several rows")
            return place.dim, self.route.shares(counts)
        if batch is not None and not self.route.unrolled(size):
            fits = any(size == rows if place.share == 1 else size % rows == 0 for rows in batch.sizes)
            if not fits and batch.sizes:
                raise self.refusal(path, x)
        return place.dim, self.route.groups(size)

    def of_rows(self, path: str, x: Tensor) -> list[tuple[int, Rows]]:
        """The rows of each stack where the first dimension has to count them."""
        place = self.found.get(path)
        if not isinstance(place, Place):
            raise self.refusal(path, x)
        if place.dim:
            raise self.refusal(path, x)
        return self.route.groups(x.shape[0])

    def check(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise a clear error where the first dimension of what a module reads does not count rows."""
        read = next(tensors((args, kwargs)), None)
        if read is not None:
            self.of_rows(path, read[1])

    def refusal(self, path: str, x: Tensor, what: str = "") -> TanzakuError:
        """What to say of a site whose rows have no known place."""
        shape = " x ".join(map(str, x.shape))
        return TanzakuError(
            f"{path} reads {what or 'a tensor'} ({shape}) in which the rows of a batch have no known place, so "
            f"{listed(self.route.adapters)} cannot share a batch there: route each alone, or leave it out of "
            "target_modules"
        )


def _place_of(seen: Survey, base: Base, path: str) -> Place | Within | None:
    direct = _direct(seen.at(path))
    if direct is not None and not _gathered(seen, base, path):
        return direct
    parent = path.rpartition(".")[0]
    if seen.never_runs(base, path):
        return None
    while parent and not isinstance(base.model.get_submodule(parent), PreTrainedModel):
        calls = seen.at(parent)
        if calls and all(map(_can_be_cut, calls)) and not _gathered(seen, base, parent):
            return Within(parent)
        parent = parent.rpartition(".")[0]
    return None


def rows_at(base: Base, path: str, dims: int, returned: bool) -> int | None:
    """The dimension that counts rows in a tensor of so many dimensions that a site reads or returns, if it is known."""
    place = _place_of(survey(base), base, path)
    return place.dim if isinstance(place, Place) and place.dims[returned] == dims else None


def _direct(calls: Sequence[Call]) -> Place | None:
    """Where all calls of a module have the rows in the first tensor that they read and the first that they return."""
    found: set[Place] = set()
    for call in calls:
        ends = [next(iter(part.values()), None) for part in (call.inputs, call.outputs)]
        for axis in ends:
            if axis is None or axis.dim is None or axis[:2] != (ends[0] or axis)[:2]:
                return None
        reads, returns = cast(list[Axis], ends)
        found.add(Place(reads.dim or 0, reads.share, (reads.dims, returns.dims), call.of))
    return found.pop() if len(found) == 1 else None


def _can_be_cut(call: Call) -> bool:
    """Whether a call may run for some of its rows: what it reads is the rows' own or read by all of them, and what it
    returns is their own."""
    reads = [axis is not None and axis.dim != 1 for axis in call.inputs.values()]
    returns = [axis is not None and axis.dim == 0 for axis in call.outputs.values()]
    has_rows = any(axis is not None and axis.dim == 0 for axis in call.inputs.values())
    return call.plain and call.of == "rows" and has_rows and all(reads) and all(returns) and bool(returns)


def _gathered(seen: Survey, base: Base, path: str) -> bool:
    """Whether a module is one of several that may each read some of the tokens, as experts do. Those of a tiny batch
    may have been as many in each row by chance."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        holder = base.model.get_submodule(around := ".".join(parts[: end - 1]))
        if not isinstance(holder, nn.ModuleList | nn.ModuleDict):
            continue
        owner = next((read for up in range(end - 1, -1, -1) if (read := _first(seen, ".".join(parts[:up])))), None)
        # Layers that all read all tokens are none.
        every = owner is not None and all(
            (first := _first(seen, f"{around}.{name}")) is not None and first.tokens == owner.tokens
            for name in holder._modules
        )
        for call in seen.at(".".join(parts[:end])):
            first = next(iter(call.inputs.values()), None)
            whole = first is not None and first.share == 1 and first.dims > 2
            if first is None or first.dim is None or not (whole or every):
                return True
    return False


def _first(seen: Survey, path: str) -> Axis | None:
    """Of the first tensor that a module reads."""
    return next((axis for call in seen.at(path) for axis in call.inputs.values()), None)


# -- the pass under way


class Batch:
    """What the pass under way has been given.

    `sizes` are the numbers of rows that its inputs have: one, unless rows of a text and of images are counted apart.
    """

    def __init__(self, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]):
        names = list(inspect.signature(base.model.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.given = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        self.token = image_token(getattr(base.model, "config", None))
        of_rows = [x for name, x in self.given.items() if x.dim() > 1 and (self.token is None or name in _TEXTS)]
        self.sizes = {x.shape[0] for x in of_rows}

    def images(self, size: int) -> list[int] | None:
        """Of `size` parts that all images have, how many belong to each row of the batch; None: that is not known."""
        ids, pixels = self.given.get("input_ids"), self.given.get("pixel_values")
        grids = self.given.get("image_grid_thw")
        known = {*_TEXTS, "pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids"}
        if ids is None or pixels is None or any(word in n for n in self.given.keys() - known for word in _PICTURES):
            return None
        places = ids.eq(self.token or 0).sum(1).tolist()
        # What each image has: one of as many equal parts, or as many as its grid.
        parts = [1] * len(pixels) if grids is None else grids.prod(1).tolist()
        if (grids is None and pixels.dim() != 4) or sum(parts) != len(pixels):
            return None
        owned = _owned(parts, places)
        if owned is None or any(size * count % len(pixels) for count in owned):
            return None
        return [size * count // len(pixels) for count in owned]


_TEXTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels")
_PICTURES = ("image", "pixel", "video", "patch", "spatial", "vision")


def _owned(parts: Sequence[int], places: Sequence[int]) -> list[int] | None:
    """How many of the parts belong to each row, if images come in the order of their rows and each has as many places
    in its row's text as it has parts, or a constant multiple; None: they do not."""
    left, total, out = list(reversed(parts)), sum(places), []
    for count in places:
        own = 0
        while left and own * total < count * sum(parts):
            own += left.pop()
        if own * total != count * sum(parts):
            return None
        out.append(own)
    return None if left or not total else out


under_way: Local[Batch] = Local("tanzaku_batch")
