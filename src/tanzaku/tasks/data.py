"""Rows from a file or a dataset, as named columns. Values stay as they were read, and what is inferred is said."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanzaku.errors import TanzakuError, flag, listed, nearest, printable
from tanzaku.tasks.cells import cell_in
from tanzaku.tasks.delimited import read_delimited
from tanzaku.tasks.encodings import decoded
from tanzaku.tasks.jsonrows import Columns, read_json, read_json_lines
from tanzaku.tasks.names import check_names
from tanzaku.tasks.sources import (
    SPLIT,
    STDIN,
    SUFFIXES,
    bytes_of,
    check_name,
    format_named,
    format_of,
    neighbour,
    stdin_bytes,
    suffix_of,
    table_in,
)

DELIMITERS = {"tsv": "\t", "csv": ","}


def to_stderr(line: str) -> None:
    """Say a line beside the output."""
    print(printable(line), file=sys.stderr)


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where they came from. Values are text in TSV and CSV, else as stored."""

    columns: Columns
    source: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str, key: str = "") -> list[Any]:
        """The values of one column, or as `COLUMN.KEY` of what dictionaries in it have; a TanzakuError with the nearest
        name when there is none.

        Args:
            key: the setting that names the column, which the error then names.
        """
        if name not in self.columns and self._has_inside(name):
            column = name.partition(".")[0]
            return [cell_in({column: cell}, name) for cell in self.columns[column]]
        if name not in self.columns:
            near = next((f" (did you mean {each!r}?)" for each in self.columns if _plain(each) == _plain(name)), "")
            hint = "; its first line looks like a row: add a line of column names" if self._lacks_header() else ""
            hint += f"; say which it is with {flag(key)}" if key and not hint else ""
            raise TanzakuError(
                f"{self.source} has no column {name!r}{near or nearest(name, self.columns)}; "
                f"its columns are {listed(self.columns)}{hint}"
            )
        return self.columns[name]

    def _has_inside(self, name: str) -> bool:
        """Whether a name is that of a column of dictionaries, which have its last part."""
        column, _, key = name.partition(".")
        cells = self.columns.get(column, [None])
        return bool(key) and (not cells or any(isinstance(cell, Mapping) and key in cell for cell in cells))

    def _lacks_header(self) -> bool:
        """Whether a column is called what is in it, or by a number: then the names are values of a row."""
        return any(name in values or name.strip().isdecimal() for name, values in self.columns.items())


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()


def read_table(
    source: str | Path,
    split: str | None = None,
    *,
    encoding: str | None = None,
    format: str | None = None,
    note: Callable[[str], None] = to_stderr,
) -> Table:
    """Read a table: a file, standard input, or a dataset of the ``datasets`` library.

    Args:
        source: a .tsv, .csv, .jsonl, .json, .parquet or .xlsx file, those of text also packed (.csv.gz); ``-`` for
            standard input; a folder with one table; or the name of a dataset. ``imdb:train`` names a split as well.
        split: the split of a dataset, when ``source`` does not name it.
        encoding: of text, where it is known; else it is detected, and said when it is not UTF-8.
        format: ``tsv``, ``csv``, ``jsonl`` or ``json``, whatever the file's name says.
        note: is told each thing that was inferred, in a line.

    Raises:
        TanzakuError: what is missing, empty or broken, with its line, in one line of text.
    """
    name = str(source)
    if name == STDIN:
        return _filled(_read_text(stdin_bytes(), "standard input", encoding, format, note), "standard input")
    check_name(name)
    path = Path(name)
    if not path.exists() and (named := SPLIT.fullmatch(name)):
        if split not in (None, named["split"]):
            raise TanzakuError(f"{name} names another split than {split!r}; give one of the two")
        path, split = Path(named["name"]), named["split"]
    if path.is_dir() and (inside := table_in(path, split)):
        path, split = inside, None
        name = name if SPLIT.fullmatch(name) else str(path)
    elif path.is_dir() or (suffix_of(path) not in SUFFIXES and not path.is_file()):
        return _filled(_dataset(path, split), name)
    if split is not None:
        raise TanzakuError(f"{path} is a file and has no split {split!r}; leave the split out")
    kind = format or format_named(path)
    if kind in _BINARY:
        return _filled(_BINARY[kind](bytes_of(path), path, note), name)
    return _filled(_read_text(bytes_of(path), name, encoding, kind, note), name)


def _filled(columns: Columns, name: str) -> Table:
    if not len(table := Table(columns, name)):
        header = listed(columns) or "empty"
        raise TanzakuError(f"{name} has a header ({header}) but no rows; expected at least one")
    return table


def _read_text(raw: bytes, name: str, encoding: str | None, format: str | None, note: Callable[[str], None]) -> Columns:
    text, found = decoded(raw, name, encoding)
    if encoding is None and found != "utf-8":
        note(f"{name} is read as {found}; --encoding overrules it")
    kind = format or format_of(text)
    if kind not in DELIMITERS:
        return read_json_lines(text, name) if kind == "jsonl" else read_json(text, name, note)
    names, rows = read_delimited(text, DELIMITERS[kind], name, note)
    return {column: [row[at] for row in rows] for at, column in enumerate(names)}


def _parquet(raw: bytes, path: Path, note: Callable[[str], None]) -> Columns:
    import pyarrow  # with datasets below: slow to import, and most tables are text
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(raw)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise TanzakuError(f"{path} is not a readable Parquet file: {_short(error)}") from None
    check_names(table.column_names, str(path))
    return dict(zip(table.column_names, (column.to_pylist() for column in table.columns), strict=True))


def _excel(raw: bytes, path: Path, note: Callable[[str], None]) -> Columns:
    """The first sheet, its first row as names. Whole numbers, which Excel keeps as any other, come as integers."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise TanzakuError(
            f"{path} is an Excel file, which takes openpyxl: pip install openpyxl, or save it as CSV (UTF-8)"
        ) from None
    try:
        book = load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
        sheets = {sheet.title: [list(row) for row in sheet.iter_rows(values_only=True)] for sheet in book.worksheets}
    except Exception as error:  # the library raises what its parts raise: of zip, of XML, of its own
        raise TanzakuError(f"{path} is not a readable Excel file: {_short(error)}; save it as CSV (UTF-8)") from None
    filled = {name: rows for name, rows in sheets.items() if any(cell is not None for row in rows for cell in row)}
    if len(filled) != 1:
        found = f"{len(filled)} sheets with content: {listed(filled)}" if filled else "no content"
        raise TanzakuError(f"{path} has {found}; expected one sheet with column names and rows")
    head, *rows = next(iter(filled.values()))
    width = max(at for row in (head, *rows) for at, cell in enumerate(row, 1) if cell is not None)
    names = ["" if name is None else str(name) for name in head[:width]]
    if [name for name in names if name] == names[:1] != names:
        raise TanzakuError(
            f"the first row of {path} has one cell, {names[0][:40]!r}; if that is a title, take it away: "
            "the first row names the columns"
        )
    check_names(names, str(path))
    rows = [row for row in rows if any(cell is not None for cell in row)]
    return {name: [row[at] if at < len(row) else None for row in rows] for at, name in enumerate(names)}


_BINARY: dict[str, Callable[[bytes, Path, Callable[[str], None]], Columns]] = {"parquet": _parquet, "xlsx": _excel}


def _dataset(path: Path, split: str | None) -> Columns:
    import datasets

    try:
        loaded = datasets.load_dataset(str(path), split=split)
    except Exception as error:  # the library raises nearly every kind of error, network ones included
        raise TanzakuError(
            f"dataset {str(path)!r} cannot be loaded: {_short(error)}; expected a file ({listed(SUFFIXES)}), "
            f"a folder, or a dataset on this machine or within reach{neighbour(path)}"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) > 1:
            fix = f"name one, as in {path}:{next(iter(loaded))}"
            raise TanzakuError(f"dataset {str(path)!r} has splits {listed(loaded)}; {fix}")
        loaded = next(iter(loaded.values()))
    columns: Columns = loaded.to_dict()
    check_names(list(columns), str(path))
    return columns


def _short(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".;:")
