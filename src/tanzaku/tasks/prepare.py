"""From the recipe's `data` section to encoded splits: tables and labels first, then tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from tanzaku.errors import TanzakuError
from tanzaku.recipe_errors import flag
from tanzaku.tasks.checks import findings
from tanzaku.tasks.classification import Labels, Split, encode_split, texts_of
from tanzaku.tasks.data import Table, read_table, to_stderr
from tanzaku.tasks.sources import STDIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tanzaku.recipe import DataSettings


@dataclass(frozen=True)
class ClassificationData:
    """Encoded splits of one classification task, and what their batches are padded with."""

    train: Split
    valid: Split | None
    test: Split | None
    labels: Labels
    pad_token_id: int

    def splits(self) -> list[Split]:
        """The splits there are, training rows first."""
        return [split for split in (self.train, self.valid, self.test) if split is not None]


@dataclass(frozen=True)
class ClassificationTables:
    """Checked tables by split name, before a tokenizer is needed."""

    tables: dict[str, Table]
    labels: Labels


def read_classification(
    data: DataSettings, folded: bool = False, note: Callable[[str], None] = to_stderr
) -> ClassificationTables:
    """Read every table, and check it and its rows: nothing slow is loaded for data that cannot be used.

    Args:
        folded: whether training and validation rows will be cut into folds.
        note: is told what was inferred or is odd, and stops nothing.

    Raises:
        TanzakuError: as `open_classification`, or a check that `data` does not allow.
    """
    read = open_classification(data, note)
    for found in findings(read.tables, data, folded):
        if found.check is None:
            note(str(found))
        elif found.check not in data.allow:
            raise TanzakuError(str(found))
    return read


def open_classification(data: DataSettings, note: Callable[[str], None] = to_stderr) -> ClassificationTables:
    """Read every table, and check that each has the columns, texts and labels that it needs.

    Raises:
        TanzakuError: a file, column, text or label that is missing or broken, or a label unseen in training.
    """
    columns = {"text": data.text, "text_pair": data.text_pair, "label": data.label}
    for key, other in combinations([key for key, column in columns.items() if column is not None], 2):
        if columns[key] == columns[other]:
            raise TanzakuError(
                f"{flag(key)} and {flag(other)} both name the column {columns[key]!r}; expected one column for each"
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
    for table in tables.values():
        for column in columns.values():
            if column is not None:
                table.column(column)
    for table in tables.values():
        for column in (data.text, data.text_pair):
            if column is not None:
                texts_of(table, column)
    labels = Labels.from_column(tables["train"].column(data.label), tables["train"].source)
    for table in tables.values():
        for row, value in enumerate(table.column(data.label), 1):
            labels.encode(value, f"{table.source} row {row}")
    return ClassificationTables(tables, labels)


def encode_classification(
    read: ClassificationTables, data: DataSettings, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> ClassificationData:
    """Tokenise the tables.

    Raises:
        TanzakuError: a row without text or tokens, or a `max_length` without room for text.
    """
    splits = {
        name: encode_split(table, name, tokenizer, data.text, data.text_pair, data.label, read.labels, max_length)
        for name, table in read.tables.items()
    }
    return ClassificationData(
        train=splits["train"],
        valid=splits.get("valid"),
        test=splits.get("test"),
        labels=read.labels,
        pad_token_id=int(tokenizer.pad_token_id),
    )


def prepare_classification(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> ClassificationData:
    """Tables read, labels taken from the training rows, texts tokenised; see the two functions above."""
    return encode_classification(read_classification(data), data, tokenizer, max_length)
