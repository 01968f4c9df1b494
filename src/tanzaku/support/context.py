"""What holds within a block of code for whoever runs it: this thread and this task, not others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar, cast

import torch

T = TypeVar("T")


class Local(Generic[T]):
    """A value of the context that runs, None where none was set.

    Compiled code cannot read a context variable, which would break its graph, but guards what it reads of a thread.
    So each value is kept in both places: tasks of one thread are told apart except in compiled code.
    """

    def __init__(self, name: str):
        self._context: ContextVar[T | None] = ContextVar(name, default=None)
        self._thread = threading.local()

    def get(self) -> T | None:
        if torch.compiler.is_compiling():
            return cast("T | None", getattr(self._thread, "value", None))
        return self._context.get()

    @contextmanager
    def within(self, value: T) -> Iterator[None]:
        """A block in which it is `value`, and after which it is what it was."""
        before = self.get()
        self.set(value)
        try:
            yield
        finally:
            self.set(before)

    def set(self, value: T | None) -> None:
        self._thread.value = value
        if not torch.compiler.is_compiling():
            self._context.set(value)
