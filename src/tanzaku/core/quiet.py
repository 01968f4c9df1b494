"""What is in force where this runs, by the number of a model's sites; and running modules of the base without it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from tanzaku.support.context import Local

# What is in force here, by the number of the model's sites; a model that is not named has what is active in it.
routes: Local[Mapping[int, Any]] = Local("tanzaku_routes")


class _Nothing(dict[int, Any]):
    """In force everywhere: nothing."""

    def get(self, key: int, default: Any = None) -> None:
        return None


_NOTHING = _Nothing()


def quiet() -> AbstractContextManager[None]:
    """Run modules of the base without what adapters do there."""
    return routes.within(_NOTHING)
