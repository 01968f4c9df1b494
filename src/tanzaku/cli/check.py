"""`tanzaku check`: the data card."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, Field, ValidationError

from tanzaku.cli.flags import flag_of, parameter
from tanzaku.compare.settings import CompareSettings
from tanzaku.errors import TanzakuError, listed
from tanzaku.recipe import SECTIONS, DataSettings, Recipe, laid_over, load_recipe
from tanzaku.recipe_errors import complaint
from tanzaku.train.settings import TrainSettings

_SPLITS = ("train", "valid", "test")


class _Rows(BaseModel):
    """What of a recipe concerns its rows."""

    model: str | None = Field(default=None, min_length=1)
    data: DataSettings
    train: TrainSettings = TrainSettings.model_validate({})
    compare: CompareSettings = CompareSettings.model_validate({})


def check(**given: Any) -> None:
    """Look at rows before training.

    Prints rows, labels, lengths, what is odd, and three rows as the model reads them. DATA is training, validation and
    test rows in this order, or a recipe. Exit code 1: train would refuse the rows.
    """
    from tanzaku.cli.card import show_card

    sources, model, max_length = given.pop("sources") or [], given.pop("model"), given.pop("max_length")
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
    flags |= {"model": model} if model is not None else {}
    flags |= {"train": {"max_length": max_length}} if max_length is not None else {}
    try:
        rows = _Rows.model_validate(laid_over(raw, flags))
    except ValidationError as error:
        raise TanzakuError(complaint(error, file, SECTIONS, flags)) from None
    show_card(rows.data, rows.model, rows.train.max_length, rows.compare.folds is not None)


check.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        parameter(
            "sources", list[str] | None, typer.Argument(metavar="DATA", help="rows, or a recipe", show_default=False)
        ),
        *(flag_of(name, field) for name, field in DataSettings.model_fields.items()),
        flag_of("model", Recipe.model_fields["model"]),
        flag_of("max_length", TrainSettings.model_fields["max_length"]),
    ]
)
