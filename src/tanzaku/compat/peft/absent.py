"""What a module of PEFT's answers for a name that is not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from tanzaku.errors import nearest


def absent_from(module: str, names: Sequence[str]) -> Callable[[str], NoReturn]:
    """A module's `__getattr__`: an error that says what is there."""

    def __getattr__(name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        # Of an AttributeError, `from ... import` would drop the text.
        raise ImportError(f"{module} has no {name!r}{nearest(name, names)}; it has {', '.join(names)}")

    return __getattr__
