"""What a table's cells hold, or do not."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from tanzaku.errors import TanzakuError

_LARGEST = 1e100  # of a number in a row: squares of larger ones are none


def missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or value == "" or value != value  # only NaN differs from itself


def cell_in(row: Mapping[str, Any], name: str) -> Any:
    """A row's cell by its column's name, or by `COLUMN.KEY` what a dictionary in it has, as translations in datasets:
    {"translation": {"en": ..., "ja": ...}}."""
    if name in row:
        return row[name]
    column, _, key = name.partition(".")
    inside = row.get(column)
    return inside.get(key) if isinstance(inside, Mapping) else None


def plain(text: str) -> str:
    """The text without differences of case, of half and full width, and of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def number_of(value: Any, where: str) -> float:
    """The finite number in a cell.

    Raises:
        TanzakuError: there is none; `where` is its place.
    """
    value = value.strip() if isinstance(value, str) else value
    if missing(value):
        raise TanzakuError(f"{where} has no number; fill it in or drop the row")
    try:
        if isinstance(value, str) and ("_" in value or not value.isascii()):
            raise ValueError  # which Python reads as a number, and hardly anybody means so
        found = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        comma = isinstance(value, str) and "," in value
        fix = "; write its decimals after a point" if comma else ""
        raise TanzakuError(f"the number in {where} is {str(value)[:40]!r}, expected one such as 3.5{fix}") from None
    if not abs(found) < _LARGEST:  # nor is nan
        raise TanzakuError(
            f"the number in {where} is {str(value)[:40]!r}, expected a finite one of less than {_LARGEST:g}"
        )
    return found


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
