"""Passes over rows that methods look at before the first step, and what was seen in them: see `calibration.py`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Passes:
    """Passes over rows, and what others have seen in passes over the same rows.

    Args:
        runs: each runs some rows, routed to the adapter, in evaluation mode, and gives their mean loss, which may be
            differentiated.
        seen: what :meth:`once` has found for adapters that changed nothing yet either.
    """

    def __init__(self, runs: Iterable[Callable[[], Tensor]], seen: dict[Hashable, Mapping[str, Any]] | None = None):
        self.runs, self.seen = runs, {} if seen is None else seen

    def __iter__(self) -> Iterator[Callable[[], Tensor]]:
        return iter(self.runs)

    def once(self, key: Hashable, look: Callable[[], Mapping[str, T]]) -> Mapping[str, T]:
        """What `look` finds in these rows at each path, or found before for another. Whoever asks leaves it as it is.

        Args:
            key: all that it depends on besides the base and the rows.
        """
        if key not in self.seen:
            self.seen[key] = look()
        return self.seen[key]
