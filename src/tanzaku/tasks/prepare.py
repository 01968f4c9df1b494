"""From the recipe's `data` section to encoded splits: tables and labels first, then tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tanzaku.tasks.classification import Labels, Split, encode_split
from tanzaku.tasks.data import Table, read_table

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


def read_classification(data: DataSettings) -> ClassificationTables:
    """Read every table, and check columns and labels: nothing slow is loaded for data that cannot be used.

    Raises:
        TanzakuError: a file, column or label that is missing or broken, or a label unseen in training.
    """
    sources = {"train": data.train, "valid": data.valid, "test": data.test}
    tables = {name: read_table(source) for name, source in sources.items() if source is not None}
    for table in tables.values():
        for column in (data.text, data.text_pair, data.label):
            if column is not None:
                table.column(column)
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
