"""What a label is called, and when two are one label in different spellings."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from tanzaku.errors import TanzakuError

NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def label_name(value: Any, where: str) -> str:
    """A label as text, the same for every way a file format may hold it.

    Raises:
        TanzakuError: there is none, or something that is no label; `where` is its place.
    """
    value = value.strip() if isinstance(value, str) else value
    if missing(value):
        raise TanzakuError(f"{where} has no label; fill it in or drop the row")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise TanzakuError(f"the label in {where} is a {type(value).__name__}; expected a name or an integer")
    return str(value)


def missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or value == "" or value != value  # only NaN differs from itself


def plain(text: str) -> str:
    """The text without differences of case, of half and full width, and of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def spelling(name: str) -> str:
    """What labels share that differ in spelling alone: True and TRUE, 1 and １, 0 and 0.0."""
    name = plain(name)
    return str(Fraction(name)) if NUMBER.fullmatch(name) else name  # exact: a float makes one of two long numbers
