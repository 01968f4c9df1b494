"""What rows should not be: in two splits, under a label in two spellings, of as many classes as rows.

Each check has a name, by which `--allow` passes it: what stops training is seldom meant, and the rest is only said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tanzaku.errors import listed
from tanzaku.tasks.data import Table
from tanzaku.tasks.labels import NUMBER, label_name, plain, spelling

if TYPE_CHECKING:
    from tanzaku.recipe import DataSettings

Check = Literal[
    "duplicates-across-splits",
    "duplicates-across-folds",
    "labels-numeric",
    "labels-many",
    "labels-missing",
    "label-spellings",
]
TITLES = {"train": "training", "valid": "validation", "test": "test"}
_MISSING = {"nan", "na", "n/a", "#n/a", "<na>", "null", "#null!", "none", "nil", "#value!", "#ref!", "#div/0!"}
_FEW = 10  # classes that hardly any task has too many of, however few its rows


@dataclass(frozen=True)
class Finding:
    """One thing about the rows. Without a check's name it is a note; else it stops training unless it is allowed."""

    text: str
    check: Check | None = None

    def __str__(self) -> str:
        return self.text if self.check is None else f"{self.text}; if it is meant, pass --allow {self.check}"


def findings(tables: Mapping[str, Table], data: DataSettings, folded: bool = False) -> Iterator[Finding]:
    """What is found in checked tables by split name; labels first, as the others are read by them.

    Args:
        folded: whether training and validation rows are cut into folds.
    """
    names = {split: _names(table, data.label) for split, table in tables.items()}
    texts = {split: _texts(table, data) for split, table in tables.items()}
    yield from _labels(names["train"], tables["train"], data)
    for split, table in tables.items():
        yield from _within(texts[split], names[split], table.source, folded and split != "test")
    splits = list(tables)
    for at, later in enumerate(splits):
        for earlier in splits[:at]:
            yield from _across(texts, tables, earlier, later)


# -- labels


def _names(table: Table, column: str) -> list[str]:
    return [label_name(value, f"{table.source} row {row}") for row, value in enumerate(table.column(column), 1)]


def _labels(names: Sequence[str], table: Table, data: DataSettings) -> Iterator[Finding]:
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
    for name, count in classes.items():
        if name.casefold() in _MISSING:
            yield Finding(
                f"{where} has the label {name!r} in {count} of {rows} rows, first in row {names.index(name) + 1}, "
                "which says that there is none: fill it in or drop the rows",
                "labels-missing",
            )
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(spelling(name), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            found = listed(f"{name!r} (row {names.index(name) + 1})" for name in group)
            yield Finding(
                f"{where} has one label in {len(group)} spellings, {found}: write it in one way", "label-spellings"
            )


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return NUMBER.match(name.lstrip("+-.")) is not None  # and not nan or inf, which float() also takes


# -- texts


def _texts(table: Table, data: DataSettings) -> list[tuple[str, ...]]:
    """What makes two rows one: their texts but for case, width and white space."""
    columns: list[list[Any]] = [table.column(name) for name in (data.text, data.text_pair) if name is not None]
    return [tuple(plain(str(value)) for value in row) for row in zip(*columns, strict=True)]


def _within(texts: Sequence[tuple[str, ...]], names: Sequence[str], source: str, folded: bool) -> Iterator[Finding]:
    first: dict[tuple[str, ...], int] = {}
    again: list[tuple[int, int]] = []
    torn: dict[tuple[str, ...], tuple[int, int]] = {}
    for row, text in enumerate(texts):
        before = first.setdefault(text, row)
        if before < row:
            again.append((row, before))
            if names[before] != names[row]:
                torn.setdefault(text, (row, before))
    if torn:
        row, before = next(iter(torn.values()))
        yield Finding(
            f"texts with more than one label in {source}: {len(torn)}; the first: row {before + 1} is "
            f"{names[before]!r} and row {row + 1} is {names[row]!r}"
        )
    if again:
        row, before = again[0]
        what = f"repeated rows in {source}: {len(again)} of {len(texts)}; "
        what += f"the first: row {row + 1} repeats row {before + 1}"
        if folded:
            yield Finding(
                f"{what}. Folds would count them more than once: drop the repeated rows; where they are allowed, "
                "those of one text stay in one fold",
                "duplicates-across-folds",
            )
        else:
            yield Finding(what)


def _across(
    texts: Mapping[str, Sequence[tuple[str, ...]]], tables: Mapping[str, Table], earlier: str, later: str
) -> Iterator[Finding]:
    there = {text: row for row, text in reversed(list(enumerate(texts[earlier], 1)))}
    shared = [(row, there[text]) for row, text in enumerate(texts[later], 1) if text in there]
    if shared:
        row, other = shared[0]
        yield Finding(
            f"{len(shared)} of the {len(texts[later])} {TITLES[later]} rows ({tables[later].source}) are also "
            f"{TITLES[earlier]} rows ({tables[earlier].source}); the first: row {row} is row {other} there, but for "
            "case, width and spaces at most. Figures on known rows mislead: drop them from one",
            "duplicates-across-splits",
        )
