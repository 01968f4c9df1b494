"""The data card: what the rows are, what of them is odd, and what the model reads. Nothing is trained."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from tanzaku.cli.display import Display
from tanzaku.errors import printable
from tanzaku.tasks.checks import TITLES, findings
from tanzaku.tasks.labels import label_name
from tanzaku.tasks.prepare import ClassificationTables, open_classification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tanzaku.recipe import DataSettings
    from tanzaku.tasks.classification import Split

_SHOWN = 3  # rows, as the model reads them
_LABELS = 20  # in the table; as many again would hide the rest of the card
_WIDE, _LONG = 200, 40  # characters of a row, and of a label


@dataclass(frozen=True)
class _Tokens:
    """The rows as a model reads them, and how many tokens each had before it was cut."""

    splits: dict[str, Split]
    lengths: dict[str, list[int]]


def show_card(data: DataSettings, model: str | None, max_length: int, folded: bool = False) -> None:
    """Print the card; without a model, in characters alone.

    Raises:
        TanzakuError: rows that cannot be read, or no such model.
        typer.Exit: with code 1, a check would stop training.
    """
    display, notes = Display(), list[str]()
    read = open_classification(data, notes.append)
    found = list(findings(read.tables, data, folded))
    tokenizer = _tokenizer(model) if model is not None else None
    tokens = None if tokenizer is None else _encoded(read, data, tokenizer, max_length)
    _rows(display, read, data, tokens, max_length)
    _labels(display, read, data)
    display.say("")
    stops = [each for each in found if each.check is not None and each.check not in data.allow]
    for line in notes:
        display.say(printable(f"note: {line}"))
    for each in found:
        kind = "note" if each.check is None else "stops training" if each in stops else "allowed"
        display.say(printable(f"{kind}: {each.text if kind == 'allowed' else each}"))
    if not (notes or found):
        display.say("nothing odd was found")
    _first_rows(display, read, data, tokens, tokenizer)
    if stops:
        raise typer.Exit(1)


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    from tanzaku.cli.adapters import note
    from tanzaku.cli.machine import quieten
    from tanzaku.models import load_tokenizer

    quieten()
    return load_tokenizer(model, on_progress=note)


def _encoded(
    read: ClassificationTables, data: DataSettings, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> _Tokens:
    from tanzaku.tasks.prepare import encode_classification

    splits = {split.name: split for split in encode_classification(read, data, tokenizer, max_length).splits()}
    lengths = {}
    for name, table in read.tables.items():
        columns = [table.column(column) for column in (data.text, data.text_pair) if column is not None]
        whole = tokenizer(*columns, return_attention_mask=False, verbose=False)["input_ids"]
        lengths[name] = [len(ids) for ids in whole]
    return _Tokens(splits, lengths)


def _rows(
    display: Display, read: ClassificationTables, data: DataSettings, tokens: _Tokens | None, max_length: int
) -> None:
    head = ["", "rows", "characters"] + ([] if tokens is None else ["tokens", f"cut at {max_length}"]) + ["from"]
    lines = []
    for name, table in read.tables.items():
        columns = [table.column(column) for column in (data.text, data.text_pair) if column is not None]
        cells = [TITLES[name], f"{len(table):,}", _spread([sum(map(len, row)) for row in zip(*columns, strict=True)])]
        if tokens is not None:
            cells += [_spread(tokens.lengths[name]), f"{tokens.splits[name].truncated:,}"]
        lines.append([*cells, printable(table.source)])
    display.table(head, lines, right=range(1, len(head) - 1))


def _spread(lengths: Sequence[int]) -> str:
    return f"{min(lengths):,} to {max(lengths):,}, median {statistics.median(lengths):,.0f}"


def _labels(display: Display, read: ClassificationTables, data: DataSettings) -> None:
    counts = {
        name: Counter(label_name(value, table.source) for value in table.column(data.label))
        for name, table in read.tables.items()
    }
    names = read.labels.names
    lines = [[_cut(label, _LONG), *(f"{counts[name][label]:,}" for name in counts)] for label in names[:_LABELS]]
    display.say("")
    display.table(["label", *(TITLES[name] for name in counts)], lines, right=range(1, len(counts) + 1))
    if len(names) > _LABELS:
        display.say(f"and {len(names) - _LABELS} more labels")


def _first_rows(
    display: Display,
    read: ClassificationTables,
    data: DataSettings,
    tokens: _Tokens | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    table = read.tables["train"]
    display.say(f"\nthe first rows{'' if tokens is None else ', token by token as the model reads them'}")
    for row in range(min(_SHOWN, len(table))):
        if tokens is None or tokenizer is None:
            columns = [table.column(column)[row] for column in (data.text, data.text_pair) if column is not None]
            text = " | ".join(columns)
        else:
            text = "|".join(tokenizer.decode([token]) for token in tokens.splits["train"].examples[row].input_ids)
        label = label_name(table.column(data.label)[row], table.source)
        display.say(f"{_cut(label, _LONG)}: {_cut(text, _WIDE)}")


def _cut(text: str, length: int) -> str:
    return printable(text if len(text) <= length else f"{text[:length]}...")
