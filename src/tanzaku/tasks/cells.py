"""What a table's cells hold, or do not."""

from __future__ import annotations

import unicodedata
from typing import Any


def missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or value == "" or value != value  # only NaN differs from itself


def plain(text: str) -> str:
    """The text without differences of case, of half and full width, and of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
