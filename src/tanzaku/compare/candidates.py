"""From a recipe's entries to candidates: those it writes out, those of its grids, and those that a search draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import chain, count, islice, product
from math import prod
from pathlib import Path
from typing import Any, Literal

from tanzaku.core.method import Method
from tanzaku.core.space import Choice, Grid, Range, Space, Spaces, ends
from tanzaku.errors import TanzakuError, listed
from tanzaku.recipe.comparison import CompareSettings
from tanzaku.recipe.schema import MethodEntry, checked, named, spaces_of, start_of, used_by
from tanzaku.train.settings import TrainSettings

Rate = Literal["default", "own", "shared"]
TRIALS = 16  # of an entry with ranges, where the comparison is not told
LARGEST_GRID = 1000
_CORNERS = 64
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Candidate:
    """A method with its settings, under a name that its adapter may carry.

    `entry` names the recipe's entry that it comes from; `drawn` has what a grid or a search chose of its settings.
    """

    name: str
    method: Method
    settings: TrainSettings
    origin: Literal["recipe", "grid", "search"] = "recipe"
    entry: str = ""
    drawn: Mapping[str, Any] = field(default_factory=dict)
    rate: Rate = "default"  # whose its learning rate is: the method's, its own, or that of all methods
    uses: Mapping[str, str | Path] = field(default_factory=dict)  # candidates, or directories of adapters
    init_from: Path | None = None  # the adapter that it goes on from


@dataclass(frozen=True)
class Searched:
    """An entry whose `space` is searched. `method` and `train` hold what is fixed, and defaults for the rest."""

    name: str
    method: Method
    train: TrainSettings
    space: Spaces
    trials: int
    uses: Mapping[str, str | Path] = field(default_factory=dict)
    init_from: Path | None = None

    def candidate(self, drawn: Mapping[str, Any], name: str) -> Candidate:
        """The candidate at one point of the space."""
        found = _candidate(self.name, self.method, self.train, drawn, name, "search")
        return replace(found, uses=self.uses, init_from=self.init_from)

    def corners(self) -> list[Candidate]:
        """Candidates at the extremes of the space, 64 at most: what a model refuses anywhere, it refuses there."""
        points = product(*(ends(space) for space in self.space.values()))
        drawn = (dict(zip(self.space, point, strict=True)) for point in islice(points, _CORNERS))
        return [self.candidate(values, f"{self.name}-{slug(values)}") for values in drawn]


def expand(
    entries: Sequence[MethodEntry], train: TrainSettings, settings: CompareSettings
) -> tuple[list[Candidate], list[Searched]]:
    """The candidates of a comparison, in the recipe's order, and the searches that will find others.

    An entry without a space is a candidate. One with grids is the product of their values. One with a choice or a range
    is searched, and a grid beside them is a choice. Where `settings.trials` is a number, every entry is searched that
    leaves anything of its method's default space open (:class:`CompareSettings` says when it does), but for those that
    others use: these are trained as they are written, since what uses them has to know what they are.

    Args:
        train: the run's settings, which an entry's own go over.

    Raises:
        TanzakuError: an unknown method or setting, a value or a space that does not fit, a grid of more than 1000
            candidates, or two candidates that are one.
    """
    candidates: list[Candidate] = []
    searched: list[Searched] = []
    entries = named(entries)
    taken = {str(entry.name) for entry in entries}
    uses_of = {str(entry.name): used_by(entry, entries) for entry in entries}
    parts = {used for uses in uses_of.values() for used in uses.values()}
    for entry in entries:
        uses, found, start = uses_of[str(entry.name)], spaces_of(entry), start_of(entry)
        method, run = checked(_without(entry, found), train)
        own = {key: _typed(entry, found, key, train) for key in found}
        fixed = {key: getattr(method, key) for key in entry.settings} | {key: getattr(run, key) for key in entry.train}
        name = str(entry.name)
        opened = settings.trials is not None and name not in parts
        rest = type(method).open_space({**fixed, **own}) if opened else {}
        if start is not None:  # its method's settings are the adapter's
            rest = {key: space for key, space in rest.items() if key in TrainSettings.model_fields}
        if rest or any(not isinstance(space, Grid) for space in own.values()):
            drawn = {key: Choice(space.values) if isinstance(space, Grid) else space for key, space in own.items()}
            searched.append(Searched(name, method, run, {**drawn, **rest}, settings.trials or TRIALS, uses, start))
        elif own:
            grids = {key: ends(space) for key, space in own.items()}
            product_of = _product(name, method, run, grids, taken, _rate(entry, train))
            candidates += [replace(each, uses=uses, init_from=start) for each in product_of]
        else:
            rate = _rate(entry, train)
            candidates.append(Candidate(name, method, run, entry=name, rate=rate, uses=uses, init_from=start))
    _check_used(candidates, searched)
    _check_different(candidates, searched)
    _check_names(taken | {candidate.name for candidate in candidates}, searched)
    return candidates, searched


def _rate(entry: MethodEntry, train: TrainSettings) -> Rate:
    if "learning_rate" in entry.train:
        return "own"
    return "default" if train.learning_rate is None else "shared"


def _without(entry: MethodEntry, keys: Iterable[str], **values: Any) -> MethodEntry:
    """The entry without these settings, but with `values` for some of them."""
    parts = {
        part: {key: values.get(key, value) for key, value in held.items() if key not in keys or key in values}
        for part, held in (("settings", entry.settings), ("train", entry.train))
    }
    return entry.model_copy(update=parts)


def _typed(entry: MethodEntry, found: Mapping[str, Space], key: str, train: TrainSettings) -> Space:
    """The space of `key` with values as the setting takes them, so that a range of fractions is none of integers."""

    def typed(value: Any) -> Any:
        method, run = checked(_without(entry, found, **{key: value}), train)
        return getattr(run if key in TrainSettings.model_fields else method, key)

    space = found[key]
    values = [typed(value) for value in ends(space)]
    try:
        return Range(values[0], values[1], space.log) if isinstance(space, Range) else type(space)(tuple(values))
    except TanzakuError as error:
        raise TanzakuError(f"candidate {entry.name!r}: {key}: {error}") from None


def _candidate(
    entry: str,
    method: Method,
    train: TrainSettings,
    drawn: Mapping[str, Any],
    name: str,
    origin: Literal["grid", "search"],
    rate: Rate = "default",
) -> Candidate:
    """The candidate with what was drawn in place. The values are of the settings' own types already."""
    own = {key: value for key, value in drawn.items() if key not in TrainSettings.model_fields}
    run = train.model_copy(update={key: value for key, value in drawn.items() if key not in own})
    rate = "own" if "learning_rate" in drawn else rate
    return Candidate(name, replace(method, **own), run, origin, entry, dict(drawn), rate)


def _product(
    entry: str, method: Method, train: TrainSettings, grids: Mapping[str, Sequence[Any]], taken: set[str], rate: Rate
) -> list[Candidate]:
    """All candidates of an entry's grids, under names that join `taken`."""
    if (total := prod(map(len, grids.values()))) > LARGEST_GRID:
        raise TanzakuError(
            f"candidate {entry!r}: its grids make {total:,} candidates, expected {LARGEST_GRID:,} or fewer; "
            "write choice for grid, and a search draws some of them"
        )
    out = []
    for point in product(*grids.values()):
        drawn = dict(zip(grids, point, strict=True))
        plain = f"{entry}-{slug(drawn)}"
        numbers = (f"{plain}-{n}" for n in count(2))
        name = next(name for name in chain([plain], numbers) if name not in taken)
        taken.add(name)
        out.append(_candidate(entry, method, train, drawn, name, "grid", rate))
    return out


def as_written(candidates: Sequence[Candidate], searched: Sequence[Searched], settings: CompareSettings) -> str | None:
    """A line on the candidates that are not searched where all others are, or None."""
    every: list[Candidate | Searched] = [*candidates, *searched]
    parts = {used for each in every for used in each.uses.values()}
    found = [each.name for each in candidates if each.name in parts]
    if settings.trials is None or not found:
        return None
    return f"trained as written and not searched, since other candidates are made of them: {listed(found)}"


def check_settled(candidates: Sequence[Candidate]) -> None:
    """A TanzakuError where a candidate's precision is still open: one of several in a space is."""
    for each in candidates:
        if each.settings.precision == "auto":
            raise TanzakuError(
                f"candidate {each.name!r}: found precision auto as one of several, expected bf16, fp32 or fp16 there; "
                "auto by itself is settled as a run begins"
            )


def _check_used(candidates: Sequence[Candidate], searched: Sequence[Searched]) -> None:
    """A TanzakuError where what a candidate uses is no candidate by itself."""
    plain = {each.name for each in candidates if each.entry == each.name}
    every: list[Candidate | Searched] = [*candidates, *searched]
    for each in every:
        for used in each.uses.values():
            if isinstance(used, str) and used not in plain:
                raise TanzakuError(
                    f"candidate {each.name!r} uses {used!r}, which stands for several candidates: give that one value "
                    "for each setting, or use the directory of an adapter that is trained"
                )


def _check_different(candidates: Sequence[Candidate], searched: Sequence[Searched]) -> None:
    seen: dict[str, str] = {}
    whole = [(c.name, c.method, c.settings, repr((c.uses, c.init_from))) for c in candidates]
    drawn = [(s.name, s.method, s.train, repr((sorted(s.space.items()), s.uses, s.init_from))) for s in searched]
    for name, method, train, space in [*whole, *drawn]:
        same = repr((method.name, sorted(method.settings().items()), train, space))
        if same in seen:
            raise TanzakuError(f"candidates {seen[same]!r} and {name!r} are the same; change one, or leave it out")
        seen[same] = name


def _check_names(names: Iterable[str], searched: Sequence[Searched]) -> None:
    for search in searched:
        for name in names:
            if re.match(rf"{re.escape(search.name)}-s\d", name):
                raise TanzakuError(
                    f"a candidate is named {name!r}, as the trials of {search.name!r} are; give it another name"
                )


def slug(drawn: Mapping[str, Any], digits: int | None = None) -> str:
    """What was drawn in a few letters that a file's name may have: `r4-lr1e-3`.

    A setting goes by the first letters of its words, one word as a whole. '_' stands for a decimal point.

    Args:
        digits: fractions are rounded to this many; None leaves them as they are.
    """
    short = {key: "".join(word[0] for word in key.split("_")) if "_" in key else key for key in drawn}
    parts = []
    for key, value in drawn.items():
        nick = short[key] if list(short.values()).count(short[key]) == 1 else key
        if isinstance(value, float) and digits is not None:
            value = float(f"{value:.{digits}g}")
        text = _text(value)
        parts.append(f"{nick}{text}" if text[0].isdigit() else f"{nick}-{text}")
    return "-".join(parts)[:_LONGEST_NAME].rstrip("-_")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        value = _fraction(value)
    kept = re.sub(r"[^A-Za-z0-9-]+", "_", str(value)).strip("_")
    return kept or "none"


def _fraction(value: float) -> str:
    """16, 0.5 or 0.01; below that and from a million on 1.2e-3."""
    number = Decimal(repr(value)).normalize()
    if -3 < number.adjusted() < 6:
        return format(number, "f")
    sign, digits, _ = number.as_tuple()
    first, *others = map(str, digits)
    return f"{'-' * sign}{'.'.join([first, *([''.join(others)] if others else [])])}e{number.adjusted()}"
