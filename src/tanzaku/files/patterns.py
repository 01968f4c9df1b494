"""Regular expressions from settings and files: one that is none, or that would never end, is an error."""

from __future__ import annotations

import re
from functools import cache

import regex  # type: ignore[import-untyped]

from tanzaku.errors import TanzakuError

_SECONDS = 0.25  # for one path; any sensible expression takes microseconds


def groups_of(pattern: str, path: str, form: str = "{}") -> tuple[str | None, ...] | None:
    """The groups of `pattern` where all of `path` matches it, or None. `form` is an expression to put the pattern into.

    Raises:
        TanzakuError: it is no regular expression, or takes too long.
    """
    _check(pattern)
    whole = form.replace("{}", pattern)
    if not _may_explode(pattern):
        found = re.fullmatch(whole, path)
        return None if found is None else found.groups()
    try:
        found = regex.fullmatch(whole, path, timeout=_SECONDS)
    except TimeoutError:
        raise TanzakuError(
            f"{pattern!r} takes too long to match {path!r}: use fewer repeats inside of others"
        ) from None
    except regex.error as error:
        raise TanzakuError(f"{pattern!r} is no regular expression ({error})") from None
    return None if found is None else found.groups()


@cache
def _check(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise TanzakuError(f"{pattern!r} is no regular expression ({error})") from None


@cache
def _may_explode(pattern: str) -> bool:
    """Whether a group is repeated, or there are many repeats: only then can `re`, which no clock stops, take long."""
    return re.search(r"\)[*+?{]|\\\d", pattern) is not None or len(re.findall(r"[*+?{]", pattern)) > 3
