"""Errors that PEFT's are of another class than `ValueError`: programs that catch those catch these."""

from __future__ import annotations

from tanzaku.errors import TanzakuError


class WrongType(TanzakuError, TypeError):
    """PEFT's is a TypeError."""


class NoSuchKey(TanzakuError, KeyError):
    """PEFT's is a KeyError."""


class Misused(TanzakuError, RuntimeError):
    """PEFT's is a RuntimeError."""


class PeftError(Exception):
    """What PEFT's own errors share."""


class NoMatchingPeftModuleError(PeftError, TanzakuError):
    """No module of the base is one that the settings mean."""


class PeftWarning(UserWarning):
    """What PEFT's own warnings share."""
