"""Errors a user can act on: what was found, what was expected, and the nearest fix, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TanzakuError(ValueError):
    """Bad input. The command line prints it as one line and leaves with exit code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name closest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names in one line, cut after ``limit`` with a count of the rest."""
    every = list(names)
    shown = ", ".join(every[:limit])
    return f"{shown} and {len(every) - limit} more" if len(every) > limit else shown
