"""The data card: what the rows are, what of them is odd, and what the model reads. Nothing is trained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from tanzaku.cli.display import Display
from tanzaku.cli.rows import SHOWN, show_rows, words
from tanzaku.errors import printable
from tanzaku.tasks.checks import TITLES, findings
from tanzaku.tasks.prepare import Tables, open_tables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tanzaku.tasks.settings import DataSettings
    from tanzaku.tasks.task import Split, Task

_ALL = 2**24  # tokens of a row, more than any has


@dataclass(frozen=True)
class _Tokens:
    """The rows as a model reads them, and how many tokens each had before it was cut."""

    splits: dict[str, Split]
    lengths: dict[str, list[int]]


def show_card(
    kind: type[Task],
    data: DataSettings,
    model: str | None,
    max_length: int,
    folded: bool = False,
    show: int | None = None,
) -> Tables:
    """Print the card of the tables that are returned; without a model, in characters alone.

    Args:
        show: training rows that are printed; None: a few.

    Raises:
        TanzakuError: rows that cannot be read, or no such model.
        typer.Exit: with code 1, a check would stop training.
    """
    display, notes = Display(), list[str]()
    read = open_tables(kind, data, folded, notes.append)
    found = list(findings(read.tables, read.task, data, folded))
    tokenizer = _tokenizer(model) if model is not None else None
    tokens = None if tokenizer is None else _encoded(read, tokenizer, max_length)
    if tokenizer is not None and tokens is not None:
        task = read.task.told_by(tokenizer)
        notes += [
            line for name, split in tokens.splits.items() if folded or name != "train" for line in task.remarks(split)
        ]
    _rows(display, read, tokens, max_length)
    _targets(display, read)
    display.say("")
    stops = [each for each in found if each.check is not None and each.check not in data.allow]
    for line in notes:
        display.say(printable(f"note: {line}"))
    for each in found:
        what = "note" if each.check is None else "stops training" if each in stops else "allowed"
        display.say(printable(f"{what}: {each.text if what == 'allowed' else each}"))
    if not (notes or found):
        display.say("nothing odd was found")
    show_rows(
        display, read, None if tokens is None else tokens.splits["train"], tokenizer, SHOWN if show is None else show
    )
    if stops:
        raise typer.Exit(1)
    return read


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    from tanzaku.cli.adapters import note
    from tanzaku.cli.machine import quieten
    from tanzaku.models.loading import load_tokenizer

    quieten()
    return load_tokenizer(model, on_progress=note)


def _encoded(read: Tables, tokenizer: PreTrainedTokenizerBase, max_length: int) -> _Tokens:
    from tanzaku.tasks.prepare import encode

    splits = {split.name: split for split in encode(read, tokenizer, max_length).splits()}
    whole = {split.name: split for split in encode(read, tokenizer, _ALL).splits()}
    return _Tokens(splits, {name: [each.length for each in split.examples] for name, split in whole.items()})


def _rows(display: Display, read: Tables, tokens: _Tokens | None, max_length: int) -> None:
    dropped = tokens is not None and any(split.dropped for split in tokens.splits.values())
    long = "left out above" if dropped else "cut at"
    head = ["", "rows", "characters"] + ([] if tokens is None else ["tokens", f"{long} {max_length}"]) + ["from"]
    lines = []
    for name, table in read.tables.items():
        lengths = [sum(map(len, row)) for row in words(read, name)]
        cells = [TITLES[name], f"{len(table):,}", _spread(lengths)]
        if tokens is not None:
            cells += [
                _spread(tokens.lengths[name]),
                f"{tokens.splits[name].truncated or tokens.splits[name].dropped:,}",
            ]
        lines.append([*cells, printable(table.source)])
    display.table(head, lines, right=range(1, len(head) - 1))


def _spread(lengths: Sequence[int]) -> str:
    return f"{min(lengths):,} to {max(lengths):,}, median {statistics.median(lengths):,.0f}"


def _targets(display: Display, read: Tables) -> None:
    head, lines = read.task.table_of(read.tables, read.data)
    display.say("")
    splits = [TITLES[name] for name in read.tables]
    display.table(
        [*head, *splits], [[printable(line[0]), *line[1:]] for line in lines], right=range(1, len(splits) + 1)
    )
