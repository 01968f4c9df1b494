"""Errors a user can act on: what was found, what was expected, and the nearest fix, in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class TanzakuError(ValueError):
    """Bad input. The command line prints it as one line and leaves with exit code 2.

    A message quotes what it found, which may be anything: characters that are no text are escaped, and what is very
    long is cut.
    """

    def __str__(self) -> str:
        text = super().__str__()
        text = text if len(text) <= _LONG else f"{text[: _LONG // 2]} [...] {text[-_LONG // 2 :]}"
        return printable(text)


class TooLarge(TanzakuError):
    """A tensor that settings ask for, which no machine would hold."""

    def __init__(self, size: Iterable[int]):
        super().__init__(f"its settings ask for a tensor of {' x '.join(map(str, size))} numbers: too large")


_LONG = 1000

# What moves a terminal's cursor, ends a line or turns the direction of a text, and what no encoding has.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text in one line, its control characters escaped."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def flag(field: str) -> str:
    """The flag of a field: `--batch-size` for `batch_size`."""
    return "--" + field.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names in one line, cut after ``limit`` with a count of the rest."""
    every = list(names)
    shown = ", ".join(every[:limit])
    return f"{shown} and {len(every) - limit} more" if len(every) > limit else shown
