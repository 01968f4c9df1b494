"""Tasks, one a file: what rows are, what they become, what is lost and what is measured. `task.py` has the contract."""

from collections.abc import Mapping
from typing import Any

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.tasks.choice import RankClassification
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.generation import Generation
from tanzaku.tasks.multilabel import Multilabel
from tanzaku.tasks.ordinal import Ordinal
from tanzaku.tasks.regression import Regression
from tanzaku.tasks.seq2seq import Seq2Seq
from tanzaku.tasks.task import Task
from tanzaku.tasks.tokens import Tokens

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Classification, Ordinal, Multilabel, Regression, Tokens, Generation, Seq2Seq, RankClassification)
}


def task_in(about: Mapping[str, Any], where: str) -> Task | None:
    """The task that tanzaku.json tells of, if it does; one that has labels alone is classification.

    Raises:
        TanzakuError: begins with `where`; what is wrong with it.
    """
    kind = kind_in(about)
    return None if kind is None else kind.from_json({"text": "text", **about}, where)


def kind_in(about: Mapping[str, Any]) -> type[Task] | None:
    """The class of the task that tanzaku.json names."""
    named = about.get("task") or ("classification" if about.get("labels") is not None else None)
    return TASKS.get(named) if isinstance(named, str) else None


def task_named(name: str) -> type[Task]:
    """The task that a recipe names; a TanzakuError with the nearest name if there is none."""
    if name not in TASKS:
        raise TanzakuError(f"there is no task {name!r}{nearest(name, TASKS)}, expected one of {listed(TASKS)}")
    return TASKS[name]
