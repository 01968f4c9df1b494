"""Rows of a table a few at a time, so that a file of any length needs little memory.

Only what is plain is read so: any other file is left to :func:`tanzaku.tasks.data.read_table`, which reads it at once
or says what is wrong with it.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanzaku.errors import TanzakuError
from tanzaku.tasks.data import Table, read_table

LARGE = 2**23  # bytes: smaller files are read at once

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows by the names of their columns; each iteration reads them anew."""

    source: str
    names: tuple[str, ...]
    count: int
    _read: Callable[[], Iterable[Row]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        for row in self._read():
            yield {name: row.get(name) for name in self.names}  # an object of JSON may lack some

    def check_column(self, name: str) -> None:
        """A TanzakuError with the nearest name where there is no such column."""
        first = next(iter(self), {})
        Table({each: [first.get(each)] for each in self.names}, self.source).column(name)

    def chunks(self, size: int, start: int = 0) -> Iterator[list[Row]]:
        """The rows from number `start` (counted from 0), `size` at a time."""
        rows = itertools.islice(self, start, None)
        while chunk := list(itertools.islice(rows, size)):
            yield chunk


class _Odd(Exception):
    """Something that is not read here."""


def open_rows(source: str, encoding: str | None = None, format: str | None = None) -> Rows:
    """The rows of a file or a dataset. The whole is looked through once.

    Args:
        encoding, format: of a text file, where they are not to be found out.

    Raises:
        TanzakuError: as :func:`tanzaku.tasks.data.read_table`.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None and encoding is format is None and path.is_file() and path.stat().st_size > LARGE:
        names: dict[str, None] = {}
        count = 0
        try:
            for row in reader(path):
                names.update(dict.fromkeys(row))
                count += 1
            _check_names(list(names))
            if count:
                return Rows(source, tuple(names), count, lambda: reader(path))
        except (_Odd, TanzakuError, OSError, ValueError, RecursionError, csv.Error):
            pass  # an error of reading is told below
    table = read_table(source, encoding=encoding, format=format)
    columns = table.columns
    return Rows(
        source,
        tuple(columns),
        len(table),
        lambda: (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)),
    )


def _check_names(names: list[str]) -> None:
    plain = all(name == name.strip() and len(name.splitlines()) == 1 for name in names)
    if not plain or len(set(names)) < len(names):
        raise _Odd


def _delimited(path: Path) -> Iterator[Row]:
    delimiter = {".tsv": "\t", ".csv": ","}[path.suffix.lower()]
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names = next(reader, [])
        _check_names(names)
        if len(names) < 2 and any(mark in "".join(names) for mark in "\t,;"):
            raise _Odd
        for row in reader:
            if not row:
                continue  # a blank line is no row
            # A line break within a field may be a quote that was never closed.
            if len(row) != len(names) or any("\n" in cell or "\r" in cell or "\0" in cell for cell in row):
                raise _Odd
            yield dict(zip(names, row, strict=True))


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            if not line.strip():
                continue
            found = json.loads(line, object_pairs_hook=_object)
            if not isinstance(found, dict):
                raise _Odd
            yield found


def _object(pairs: list[tuple[str, Any]]) -> Row:
    _check_names([name for name, _ in pairs])
    return dict(pairs)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException:
        raise _Odd from None


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".tsv": _delimited,
    ".csv": _delimited,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
