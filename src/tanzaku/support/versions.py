"""The version of this library, and of others that are installed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

VERSION = "0.1.0"


def versions_of(libraries: Iterable[str]) -> dict[str, str]:
    """Version by name, of those that are installed."""
    return {library: found for library in libraries if (found := _version(library)) is not None}


@cache
def _version(library: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
