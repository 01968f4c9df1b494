"""What a label is called, and when two are one label in different spellings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from tanzaku.errors import TanzakuError, listed
from tanzaku.tasks.cells import missing, plain, short
from tanzaku.tasks.settings import Finding

if TYPE_CHECKING:
    from tanzaku.tasks.data import Table

_MISSING = {"nan", "na", "n/a", "#n/a", "<na>", "null", "#null!", "none", "nil", "#value!", "#ref!", "#div/0!"}
_FEW = 10  # classes that hardly any task has too many of, however few its rows
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def label_name(value: Any, where: str, what: str = "label") -> str:
    """A label as text, the same for every way a file format may hold it.

    Raises:
        TanzakuError: there is none, or something that is no label; `where` is its place.
    """
    value = value.strip() if isinstance(value, str) else value
    if missing(value):
        raise TanzakuError(f"{where} has no {what}; fill it in or drop the row")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float):
        raise TanzakuError(f"the {what} in {where} is a {type(value).__name__}; expected a name or an integer")
    return str(value)


def spelling(name: str) -> str:
    """What labels share that differ in spelling alone: True and TRUE, 1 and １, 0 and 0.0."""
    name = plain(name)
    return str(Fraction(name)) if NUMBER.fullmatch(name) else name  # exact: a float makes one of two long numbers


def check_labels(labels: Any, where: str) -> None:
    """An error unless they are two names or more, each once."""
    if labels is None:
        raise TanzakuError(f"{where}labels is missing, so it does not say its labels; give --labels")
    if not isinstance(labels, list) or not all(isinstance(each, str) for each in labels) or len(labels) < 2:
        raise TanzakuError(f"{where}labels is {short(labels)}, expected two names or more")
    if twice := [each for each, times in Counter(labels).items() if times > 1]:
        raise TanzakuError(f"{where}labels has {twice[0]!r} twice, expected each label once")


def odd_labels(names: Sequence[str], table: Table, data: Any) -> Iterator[Finding]:
    """What labels should not be, by the names of the training rows'."""
    classes = Counter(names)
    where, rows = f"column {data.label!r} of {table.source}", len(names)
    if len(classes) > rows / 2:
        numeric = all(_is_number(name) for name in classes)
        fractions = numeric and len(classes) > 2 and not all(float(name).is_integer() for name in classes)
        if numeric and (fractions or len(classes) > _FEW):
            yield Finding(
                f"{where} has {len(classes)} different numbers in {rows} rows, which look like measurements: "
                "expected classes, so cut the numbers into some, or name another column with --label",
                "labels-numeric",
            )
        elif len(classes) > _FEW:
            few = len({str(value) for value in table.column(data.text)}) <= _FEW
            swapped = f"; {data.text!r} has few values, so --text and --label may be swapped" if few else ""
            yield Finding(
                f"{where} has {len(classes)} different labels in {rows} rows: expected several rows of each class, "
                f"so name the label's column with --label{swapped}",
                "labels-many",
            )
            return
    yield from odd_names([(name,) for name in names], where)


def odd_names(rows: Sequence[Sequence[str]], where: str) -> Iterator[Finding]:
    """What the names of labels should not be, by those of each training row."""
    classes = Counter(name for names in rows for name in names)
    first = {name: row for row, names in reversed(list(enumerate(rows, 1))) for name in names}
    for name, count in classes.items():
        if name.casefold() in _MISSING:
            yield Finding(
                f"{where} has the label {name!r} in {count} of {len(rows)} rows, first in row {first[name]}, "
                "which says that there is none: fill it in or drop the rows",
                "labels-missing",
            )
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(spelling(name), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            found = listed(f"{name!r} (row {first[name]})" for name in group)
            yield Finding(
                f"{where} has one label in {len(group)} spellings, {found}: write it in one way", "label-spellings"
            )


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return NUMBER.match(name.lstrip("+-.")) is not None  # and not nan or inf, which float() also takes
