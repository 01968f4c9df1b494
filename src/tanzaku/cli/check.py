"""`tanzaku check`: the data card."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, ValidationError, create_model

from tanzaku.cli.flags import flag_of, parameter, show_flag
from tanzaku.errors import TanzakuError, listed
from tanzaku.models.settings import Model
from tanzaku.recipe.comparison import CompareSettings
from tanzaku.recipe.errors import complaint
from tanzaku.recipe.schema import SECTIONS, Recipe, laid_over, load_recipe, sections, task_in
from tanzaku.tasks import task_named
from tanzaku.train.settings import TrainSettings

_SPLITS = ("train", "valid", "test")


class _Rows(BaseModel):
    """What of a recipe concerns its rows, but for these, which are each task's own."""

    model: Model | None = None
    task: str = "classification"
    train: TrainSettings = TrainSettings.model_validate({})
    compare: CompareSettings = CompareSettings.model_validate({})


def check(**given: Any) -> None:
    """Look at rows before training.

    Prints rows, targets, lengths, what is odd, and some rows as the model reads them. DATA is training, validation and
    test rows in this order, or a recipe. Exit code 1: train would refuse the rows.
    """
    from tanzaku.cli.card import show_card

    sources, model, max_length = given.pop("sources") or [], given.pop("model"), given.pop("max_length")
    task, show = given.pop("task"), given.pop("show")
    raw, file = {}, ""
    if sources and Path(sources[0]).suffix in (".yaml", ".yml"):
        file, *sources = sources
        raw = load_recipe(file)
    data = {key: value for key, value in given.items() if value not in (None, [])}
    free = [split for split in _SPLITS if split not in data]
    if len(sources) > len(free):
        raise TanzakuError(f"found {listed(sources)} as DATA, expected at most {len(free)}: {listed(free)} rows")
    data |= dict(zip(free, sources, strict=False))
    if not raw and "train" not in data:
        raise TanzakuError("found no rows; expected a table or a recipe, as in tanzaku check train.tsv valid.tsv")
    flags: dict[str, Any] = {"data": data}
    flags |= {"model": {"name": model}} if model is not None else {}
    flags |= {"task": task} if task is not None else {}
    flags |= {"train": {"max_length": max_length}} if max_length is not None else {}
    raw = laid_over(raw, flags)
    kind = task_named(task_in(raw))
    schema = create_model("Rows", __base__=_Rows, data=(kind.Data, ...))
    try:
        rows: Any = schema.model_validate(raw)
    except ValidationError as error:
        raise TanzakuError(complaint(error, file, sections(kind.name), flags)) from None
    model, folded = rows.model and rows.model.name, rows.compare.folds is not None
    show_card(kind, rows.data, model, rows.train.max_length, folded, show)


check.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        parameter(
            "sources", list[str] | None, typer.Argument(metavar="DATA", help="rows, or a recipe", show_default=False)
        ),
        *(flag_of(name, field) for name, field in SECTIONS["data"].model_fields.items()),
        flag_of("task", Recipe.model_fields["task"]),
        flag_of("model", SECTIONS["model"].model_fields["name"]),
        flag_of("max_length", TrainSettings.model_fields["max_length"]),
        show_flag("3"),
    ]
)
