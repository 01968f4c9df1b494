"""Which of several tasks a row is of: a column, by which methods with `num_tasks` tell rows apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.tasks.cells import short
from tanzaku.tasks.labels import label_name

if TYPE_CHECKING:
    from tanzaku.tasks.data import Table

CONTEXT = "task_ids"  # what methods call it


@dataclass(frozen=True)
class RowTasks:
    """The tasks in the order of their ids, and the column that names a row's."""

    column: str
    names: tuple[str, ...]

    @classmethod
    def learn(cls, tables: Mapping[str, Table], column: str) -> RowTasks:
        """Those of the training rows.

        Raises:
            TanzakuError: a table lacks the column, or has a task that no training row has.
        """
        train = tables["train"]
        for table in tables.values():
            table.column(column, "task_id")
        cells = enumerate(train.column(column), 1)
        names = {label_name(value, f"{train.source} row {row}: column {column!r}", "task") for row, value in cells}
        own = cls(column, tuple(sorted(names)))
        for table in tables.values():
            own.ids(table)
        return own

    def ids(self, table: Table) -> list[int]:
        """The number of each row's task.

        Raises:
            TanzakuError: a row without one, or with one that is unknown.
        """
        cells = enumerate(table.column(self.column), 1)
        return [self.id_of(value, f"{table.source} row {row}: column {self.column!r}") for row, value in cells]

    def id_of(self, value: Any, where: str) -> int:
        """The number of the task in one cell; `where` is its place, for the TanzakuError."""
        name = label_name(value, where, "task")
        if name not in self.names:
            known = f"{listed(self.names)}{nearest(name, self.names)}"
            raise TanzakuError(f"{where} is {name!r}, which is no task of the training rows: {known}")
        return self.names.index(name)

    def to_json(self) -> dict[str, Any]:
        return {"task_id": self.column, "tasks": list(self.names)}

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> RowTasks | None:
        """What :meth:`to_json` gave; None where there is nothing of the kind."""
        column, names = about.get("task_id"), about.get("tasks")
        if column is None and names is None:
            return None
        if not isinstance(column, str) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise TanzakuError(f"{where}task_id is {short(column)}, expected a column's name (and tasks, names)")
        return cls(column, tuple(names))
