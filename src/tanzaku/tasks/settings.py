"""The recipe's `data` section, but for the columns, which are each task's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Check = Literal[
    "duplicates-across-splits",
    "duplicates-across-folds",
    "labels-numeric",
    "labels-many",
    "labels-missing",
    "labels-separator",
    "label-spellings",
]


@dataclass(frozen=True)
class Finding:
    """One thing about the rows. Without a check's name it is a note; else it stops training unless it is allowed."""

    text: str
    check: Check | None = None

    def __str__(self) -> str:
        return self.text if self.check is None else f"{self.text}; if it is meant, pass --allow {self.check}"


class Override(NamedTuple):
    """A flag of prediction: what its value is called, its help, and whether it may be given several times."""

    metavar: str
    about: str
    repeatable: bool = False


class DataSettings(BaseModel):
    """Where the rows are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    options: ClassVar[frozenset[str]] = frozenset()  # keys of a task that name no columns

    train: str = Field(
        min_length=1, description="training rows: .tsv, .csv, .jsonl, .json, .parquet, .xlsx, - or a dataset"
    )
    valid: str | None = Field(default=None, min_length=1, description="validation rows, for figures after each epoch")
    test: str | None = Field(default=None, min_length=1, description="test rows, for figures at the end")
    encoding: str | None = Field(default=None, min_length=1, description="of the files, such as cp932 (detected)")
    format: Literal["tsv", "csv", "jsonl", "json"] | None = Field(
        default=None, description="of the files, whatever their names say"
    )
    task_id: str | None = Field(
        default=None, min_length=1, description="column that says which of several tasks a row is of"
    )
    weight: str | None = Field(
        default=None, min_length=1, description="column of what a training row's loss counts, 0 or more (all 1)"
    )
    allow: list[Check] = Field(default=[], description="pass this check of rows (repeatable; tanzaku check names them)")

    def columns(self) -> list[tuple[str, str]]:
        """The columns that are named, each with the key that names it."""
        own = [key for key in type(self).model_fields if key not in {*DataSettings.model_fields, *self.options}]
        named = [(key, getattr(self, key)) for key in (*own, "task_id", "weight")]
        listed = [(key, value if isinstance(value, list) else [value]) for key, value in named]
        return [(key, column) for key, columns in listed for column in columns if column is not None]


class TextSettings(DataSettings):
    """Rows of one text, or of two."""

    text: str = Field(default="text", min_length=1, description="column of the text")
    text_pair: str | None = Field(default=None, min_length=1, description="column of a second text")
