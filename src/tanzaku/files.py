"""Writing files that are never half, and numbers as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tanzaku.errors import TanzakuError


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end: a reader finds the old file or the new one, never a half.

    Raises:
        TanzakuError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise TanzakuError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The value with null for every number that JSON has not: nan and the infinities."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
