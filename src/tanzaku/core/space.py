"""What a setting may be, where a recipe leaves it open: a grid, a choice or a range in the place of its value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from tanzaku.errors import TanzakuError, listed, nearest

_KEYS = ("grid", "choice", "low", "high", "log")
_FORMS = "{grid: [1, 4]}, {choice: [1, 4]} or {low: 1, high: 8}"


@dataclass(frozen=True)
class _Values:
    """Different values, one or more."""

    values: tuple[Any, ...]
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if not self.values:
            raise TanzakuError(f"{self.kind} is empty, expected a list of values such as [1, 4, 16]")
        for at, value in enumerate(self.values):
            if any(type(value) is type(other) and value == other for other in self.values[:at]):
                raise TanzakuError(f"{self.kind} has {value!r} twice, expected each value once")

    @property
    def size(self) -> int:
        """How many values there are."""
        return len(self.values)

    def written(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {self.kind: list(self.values)}


class Grid(_Values):
    """Each of the values is tried, with each of every other grid's."""

    kind = "grid"


class Choice(_Values):
    """A search draws one of the values."""

    kind = "choice"


@dataclass(frozen=True)
class Range:
    """A search draws a number from `low` to `high`, both included; `log` spreads its draws over orders of magnitude.

    Whole numbers are drawn where both bounds are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    kind: ClassVar[str] = "range"

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
                raise TanzakuError(f"{name} is {bound!r}, expected a number")
        if self.low >= self.high:
            raise TanzakuError(f"low is {self.low} and high is {self.high}, expected low below high")
        if self.log and self.low <= 0:
            raise TanzakuError(f"log is on and low is {self.low}, expected low above 0, or no log")

    @property
    def integer(self) -> bool:
        """Whether whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def size(self) -> float:
        """How many numbers there are to draw; infinite unless they are whole."""
        return self.high - self.low + 1 if self.integer else math.inf

    def written(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {"low": self.low, "high": self.high} | ({"log": True} if self.log else {})


Space = Grid | Choice | Range
Spaces = Mapping[str, Choice | Range]


def spaces(**of: Choice | Range) -> Spaces:
    """A method's default space: `spaces(r=Choice((1, 4, 16)), learning_rate=Range(1e-4, 1e-2, log=True))`."""
    return MappingProxyType(of)


def ends(value: Any) -> tuple[Any, ...]:
    """The extremes of what a setting may be: all values of a grid or a choice, the bounds of a range, or the value."""
    if isinstance(value, Range):
        return value.low, value.high
    return value.values if isinstance(value, Grid | Choice) else (value,)


def space_of(value: Any, *, mapping: bool = False) -> Space | None:
    """The space that a recipe's value stands for, or None where it is a plain value.

    Args:
        value: as YAML has it.
        mapping: the setting takes mappings itself, as `rank_pattern` does. Then only a grid or a choice with a list is
            a space, and any other mapping is a value.

    Raises:
        TanzakuError: a mapping that is no space where no other will do, or a space that cannot be.
    """
    if not isinstance(value, Mapping):
        return None
    given = {str(key): entry for key, entry in value.items()}
    kind = next((kind for kind in (Grid, Choice) if given.keys() == {kind.kind}), None)
    listing = given[kind.kind] if kind is not None else None
    if mapping and not isinstance(listing, list | tuple):
        return None
    if kind is not None:
        if not isinstance(listing, list | tuple):
            raise TanzakuError(f"{kind.kind} is {listing!r}, expected a list of values such as [1, 4, 16]")
        return kind(tuple(listing))
    if given.keys() - {"log"} != {"low", "high"}:
        raise TanzakuError(_no_space(given))
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise TanzakuError(f"log is {log!r}, expected true or false")
    return Range(_number("low", given["low"]), _number("high", given["high"]), log)


def _no_space(given: Mapping[str, Any]) -> str:
    unknown = next((key for key in given if key not in _KEYS), None)
    if unknown is not None:
        return f"found the key {unknown!r}{nearest(unknown, _KEYS)}, expected a value, {_FORMS}"
    bounds = given.keys() & {"low", "high"}
    if len(bounds) == 1 and given.keys() <= {"low", "high", "log"}:
        (one,) = bounds
        return f"found {one} alone, expected low and high, as in {{low: 1, high: 8}}"
    return f"found {listed(given) or 'no key'}, expected a value, {_FORMS}"


def _number(name: str, value: Any) -> Any:
    """Numbers in quotes count as numbers here, as they do elsewhere in a recipe."""
    if isinstance(value, str):
        for read in (int, float):
            try:
                return read(value)
            except ValueError:
                continue
        raise TanzakuError(f"{name} is {value!r}, expected a number")
    return value
