"""What rows should not be: in two splits, under a label in two spellings, of as many classes as rows.

Each check has a name, by which `--allow` passes it: what stops training is seldom meant, and the rest is only said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tanzaku.tasks.cells import plain
from tanzaku.tasks.data import Table
from tanzaku.tasks.settings import Finding
from tanzaku.tasks.task import Task

TITLES = {"train": "training", "valid": "validation", "test": "test"}


def findings(tables: Mapping[str, Table], task: Task, data: Any, folded: bool = False) -> Iterator[Finding]:
    """What is found in checked tables by split name; targets first, as the others are read by them.

    Args:
        data: the recipe's section. folded: whether training and validation rows are cut into folds.
    """
    names = {split: task.targets(table, data) for split, table in tables.items()}
    texts = {split: _texts(table, task.reads) for split, table in tables.items()}
    yield from task.findings(tables, data)
    for split, table in tables.items():
        yield from _within(texts[split], names[split], table.source, folded and split != "test")
    splits = list(tables)
    for at, later in enumerate(splits):
        for earlier in splits[:at]:
            yield from _across(texts, tables, earlier, later)


# -- texts


def _texts(table: Table, reads: Sequence[str]) -> list[tuple[str, ...]]:
    """What makes two rows one: their texts but for case, width and white space."""
    columns: list[list[Any]] = [table.column(name) for name in reads]
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
