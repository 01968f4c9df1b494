"""References that `nn.Module` does not register: what a part of a model needs to reach and does not own."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Ref(Generic[T]):
    """A reference to a module that is somebody else's: none of its parameters are the holder's.

    A deep copy of the holder refers to the copy of the module if that is copied too, before or after, and to nothing
    otherwise; never to the original, which a copy must not change. Pickling keeps the module.
    """

    __slots__ = ("_pending", "_target")

    def __init__(self, target: T | None = None):
        self._target = target
        self._pending: tuple[dict[int, Any], T] | None = None  # a deep copy's memo, and what to look up in it

    def __call__(self) -> T | None:
        if self._pending is not None:
            # Only now is it certain that all that is to be copied has been.
            memo, original = self._pending
            self._target, self._pending = memo.get(id(original)), None
        return self._target

    def __deepcopy__(self, memo: dict[int, Any]) -> Ref[T]:
        original, copied = self(), Ref[T]()
        if original is None or id(original) in memo:
            copied._target = memo.get(id(original))
        else:
            copied._pending = (memo, original)
        return copied

    def __getstate__(self) -> tuple[T | None]:
        return (self(),)

    def __setstate__(self, state: tuple[T | None]) -> None:
        self._target, self._pending = state[0], None

    def __repr__(self) -> str:
        return f"Ref({type(cast(Any, self())).__name__})"
