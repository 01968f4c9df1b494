"""What a table's columns may be called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tanzaku.errors import TanzakuError


def check_names(names: Sequence[str], source: str) -> None:
    """Names of one line, none twice.

    Raises:
        TanzakuError: the first that is not so.
    """
    for number, name in enumerate(names, 1):
        if not name.strip() or len(name.splitlines()) > 1:
            raise TanzakuError(f"column {number} of {source} is named {name!r}; expected a name of one line")
    for name, count in Counter(names).items():
        if count > 1:
            raise TanzakuError(f"{source} has {count} columns named {name!r}; rename all but one")
