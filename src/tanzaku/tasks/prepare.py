"""From the recipe's `data` section to encoded splits: tables and targets first, then tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

from tanzaku.errors import TanzakuError, flag
from tanzaku.tasks.checks import findings
from tanzaku.tasks.data import Table, read_table, to_stderr
from tanzaku.tasks.row_tasks import RowTasks
from tanzaku.tasks.settings import DataSettings
from tanzaku.tasks.sources import STDIN
from tanzaku.tasks.task import Task, TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tables:
    """Checked tables by split name, before a tokenizer is needed, and the task that they define."""

    tables: dict[str, Table]
    task: Task
    data: DataSettings


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
    read = open_tables(kind, data, note)
    for found in findings(read.tables, read.task, data, folded):
        if found.check is None:
            note(str(found))
        elif found.check not in data.allow:
            raise TanzakuError(str(found))
    return read


def open_tables(kind: type[Task], data: DataSettings, note: Callable[[str], None] = to_stderr) -> Tables:
    """Read every table, and check that each has the columns and cells that it needs.

    Raises:
        TanzakuError: a file, column or cell that is missing or broken, or a target unseen in training.
    """
    own = {key: getattr(data, key) for key in kind.Data.model_fields if key not in DataSettings.model_fields}
    own["task_id"] = data.task_id
    for key, other in combinations([key for key, column in own.items() if column is not None], 2):
        if own[key] == own[other]:
            raise TanzakuError(
                f"{flag(key)} and {flag(other)} both name the column {own[key]!r}; expected one column for each"
            )
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
    if data.task_id is not None:
        if all(each.name != "row_tasks" for each in fields(cast(Any, task))):
            raise TanzakuError(f"task {task.name} has rows of one task alone; leave task_id out")
        task = replace(cast(Any, task), row_tasks=RowTasks.learn(tables, data.task_id))
    return Tables(tables, task, data)


def encode(read: Tables, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaskData:
    """Tokenise the tables.

    Raises:
        TanzakuError: a row without text or tokens, or a `max_length` without room for text.
    """
    splits = {
        name: read.task.encode(table, name, tokenizer, max_length, read.data) for name, table in read.tables.items()
    }
    return TaskData(splits["train"], splits.get("valid"), splits.get("test"), read.task, int(tokenizer.pad_token_id))
