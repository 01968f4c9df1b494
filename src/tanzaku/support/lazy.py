"""Modules that are imported when they are first used, so that help and bad recipes wait for none of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """Stands for a module, by its name."""

    def __init__(self, name: str):
        self.__name__ = name

    def __getattr__(self, key: str) -> Any:
        return getattr(import_module(self.__name__), key)
