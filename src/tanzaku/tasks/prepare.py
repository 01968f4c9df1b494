"""From the recipe's `data` section to encoded splits: tables and targets first, then tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

from tanzaku.errors import TanzakuError, flag
from tanzaku.tasks.cells import number_of
from tanzaku.tasks.checks import findings
from tanzaku.tasks.data import Table, read_table, to_stderr
from tanzaku.tasks.row_tasks import RowTasks
from tanzaku.tasks.settings import DataSettings
from tanzaku.tasks.sources import STDIN
from tanzaku.tasks.task import Task, TaskData, without_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tables:
    """Checked tables by split name, before a tokenizer is needed, and the task that they define."""

    tables: dict[str, Table]
    task: Task
    data: DataSettings
    weights: dict[str, list[float]] = field(default_factory=dict)  # of rows that are trained on, by split


def read_tables(
    kind: type[Task], data: DataSettings, folded: bool = False, note: Callable[[str], None] = to_stderr
) -> Tables:
    """Read every table, and check it and its rows: nothing slow is loaded for data that cannot be used.

    Args:
        folded: whether training and validation rows will be cut into folds.
        note: is told what was inferred or is odd, and stops nothing.

    Raises:
        TanzakuError: as `open_tables`, or a check that `data` does not allow.
    """
    read = open_tables(kind, data, folded, note)
    for found in findings(read.tables, read.task, data, folded):
        if found.check is None:
            note(str(found))
        elif found.check not in data.allow:
            raise TanzakuError(str(found))
    return read


def open_tables(
    kind: type[Task], data: DataSettings, folded: bool = False, note: Callable[[str], None] = to_stderr
) -> Tables:
    """Read every table, and check that each has the columns and cells that it needs.

    Args:
        folded: whether validation rows are trained on too, in folds.

    Raises:
        TanzakuError: a file, column or cell that is missing or broken, or a target unseen in training.
    """
    for (key, column), (other, same) in combinations(data.columns(), 2):
        if column == same:
            both = f"{flag(key)} and {flag(other)} both name" if key != other else f"{flag(key)} names twice"
            raise TanzakuError(f"{both} the column {column!r}; expected one column for each")
    sources = {"train": data.train, "valid": data.valid, "test": data.test}
    if sum(source == STDIN for source in sources.values()) > 1:
        raise TanzakuError(
            "- is standard input, which can be read once; give one of the splits so, and files as others"
        )
    tables = {
        name: read_table(source, encoding=data.encoding, format=data.format, note=note)
        for name, source in sources.items()
        if source is not None
    }
    task = kind.learn(tables, data)
    if task.chooses and (folded or "valid" not in tables):
        why = "folds train on all rows in the end; leave them out" if folded else "there are none; give --valid"
        raise TanzakuError(f"{task.chooses} is chosen on validation rows, and {why}")
    if data.task_id is not None:
        if all(each.name != "row_tasks" for each in fields(cast(Any, task))):
            raise TanzakuError(f"task {task.name} has rows of one task alone; leave task_id out")
        task = replace(cast(Any, task), row_tasks=RowTasks.learn(tables, data.task_id))
    trained = [split for split in ("train", "valid") if split in tables and (folded or split == "train")]
    return Tables(tables, task, data, {} if data.weight is None else _weights(tables, trained, data.weight))


def _weights(tables: Mapping[str, Table], splits: Sequence[str], column: str) -> dict[str, list[float]]:
    """What each row of these splits counts.

    Raises:
        TanzakuError: no such column, a cell that is no number from 0 on, or nothing that counts.
    """
    found = {}
    for split in splits:
        source = tables[split].source
        cells = enumerate(tables[split].column(column, "weight"), 1)
        found[split] = [number_of(value, f"{source} row {row}: column {column!r}") for row, value in cells]
        for row, number in enumerate(found[split], 1):
            if number < 0:
                raise TanzakuError(f"{source} row {row}: column {column!r} is {number:g}, expected a weight, 0 or more")
    if not any(map(any, found.values())):
        raise TanzakuError(f"column {column!r} of {tables['train'].source} is 0 in all rows; let some of them count")
    return found


def encode(read: Tables, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaskData:
    """Tokenise the tables.

    Raises:
        TanzakuError: a row without text or tokens, a `max_length` without room for text, or rows of which all are too
            long.
    """
    task = read.task.told_by(tokenizer)
    splits = {name: task.encode(table, name, tokenizer, max_length, read.data) for name, table in read.tables.items()}
    if getattr(read.data, "too_long", None) == "drop":
        splits = {name: without_long(split) for name, split in splits.items()}
    for name, weights in read.weights.items():
        kept = splits[name].kept
        own = weights if kept is None else [weights[row] for row in kept]
        rows = zip(splits[name].examples, own, strict=True)
        splits[name] = replace(splits[name], examples=[replace(row, factor=weight) for row, weight in rows])
    return TaskData(splits["train"], splits.get("valid"), splits.get("test"), task, int(tokenizer.pad_token_id))
