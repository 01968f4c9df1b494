"""Rows from a file or a dataset, as named columns. Values stay as they were read; nothing is guessed."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tanzaku.errors import TanzakuError, listed, nearest

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_DELIMITERS = {".tsv": "\t", ".csv": ","}
_LONGEST_FIELD = 2**24  # characters: room for a book, yet an open quote in a large file is still noticed
_SPLIT = re.compile(r"(?P<name>.+?):(?P<split>\w+(\[.*\])?)")

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where they came from. Values are text in TSV and CSV, else as stored."""

    columns: Columns
    source: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[Any]:
        """The values of one column; a TanzakuError with the nearest name when there is none."""
        if name not in self.columns:
            raise TanzakuError(
                f"{self.source} has no column {name!r}{nearest(name, self.columns)}; "
                f"its columns are {listed(self.columns)}"
            )
        return self.columns[name]


def read_table(source: str | Path, split: str | None = None) -> Table:
    """Read a .tsv, .csv, .jsonl, .json or .parquet file, or a dataset of the ``datasets`` library.

    Args:
        source: a file, or a dataset: a folder or any other name. ``imdb:train`` names a split as well.
        split: the split of a dataset, when ``source`` does not name it.

    Raises:
        TanzakuError: what is missing, empty or broken, with its line, in one line of text.
    """
    name = str(source)
    if not name.strip():
        raise TanzakuError("the data source is empty; expected a file or the name of a dataset")
    path = Path(name)
    if not path.exists() and (named := _SPLIT.fullmatch(name)):
        if split not in (None, named["split"]):
            raise TanzakuError(f"{name} names another split than {split!r}; give one of the two")
        path, split = Path(named["name"]), named["split"]
    suffix = path.suffix.lower()
    if path.is_dir() or (suffix not in SUFFIXES and not path.is_file()):
        columns = _dataset(path, split)
    elif suffix not in SUFFIXES:
        raise TanzakuError(f"{path} has no known suffix{nearest(suffix, SUFFIXES)}; expected {listed(SUFFIXES)}")
    elif split is not None:
        raise TanzakuError(f"{path} is a file and has no split {split!r}; leave the split out")
    elif suffix == ".parquet":
        columns = _parquet(path)
    elif suffix in _DELIMITERS:
        columns = _delimited(_text(path), _DELIMITERS[suffix], name)
    else:
        columns = _json(_text(path), name, array=suffix == ".json")
    if not len(table := Table(columns, name)):
        header = listed(columns) or "empty"
        raise TanzakuError(f"{name} has a header ({header}) but no rows; expected at least one")
    return table


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        folder = "" if path.parent.is_dir() else f", nor a folder {path.parent}"
        raise TanzakuError(f"there is no file {path}{folder}{_neighbour(path)}") from None
    except OSError as error:
        raise TanzakuError(f"{path} cannot be read: {error.strerror or error}") from None
    if not raw.removeprefix(codecs.BOM_UTF8).strip():
        raise TanzakuError(f"{path} is empty; expected column names and rows")
    return raw


def _neighbour(path: Path) -> str:
    """The fix for a path that is not there: the nearest name in its folder, else the tables there are."""
    if not path.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in path.parent.iterdir())
    tables = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    return nearest(path.name, names) or (f"; that folder has {listed(tables)}" if tables else "")


def _text(path: Path) -> str:
    raw = _bytes(path).removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = error.start - raw.rfind(b"\n", 0, error.start)
        raise TanzakuError(f"{path} is not UTF-8 at line {line}, byte {byte}; {_conversion(raw)}") from None
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        raise TanzakuError(f"{path} has a NUL byte at line {line}; expected plain text, so save it as UTF-8")
    return text


def _conversion(raw: bytes) -> str:
    # EUC-JP goes first: its bytes also decode as cp932 (to half-width kana), but not the other way round.
    utf16 = ["utf-16"] if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else []
    for codec in [*utf16, "euc_jp", "cp932", "cp1252"]:
        try:
            raw.decode(codec)
        except UnicodeDecodeError:
            continue
        return f"it decodes as {codec}: convert it, as with iconv -f {codec.replace('_', '-')} -t utf-8"
    return "convert it to UTF-8"


def _check_names(names: Sequence[str], source: str) -> None:
    for number, name in enumerate(names, 1):
        if not name.strip() or len(name.splitlines()) > 1:
            raise TanzakuError(f"column {number} of {source} is named {name!r}; expected a name of one line")
    for name, count in Counter(names).items():
        if count > 1:
            raise TanzakuError(f"{source} has {count} columns named {name!r}; rename all but one")


def _delimited(text: str, delimiter: str, source: str) -> Columns:
    # newline="" keeps line breaks inside quoted fields as they were written.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    start = 1

    def place() -> str:
        last = reader.line_num
        return f"{source} line {start}" if last <= start else f"{source} lines {start} to {last}"

    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        for row in reader:
            if not rows:
                _check_header(row, delimiter, place())
            elif row and len(row) != len(rows[0]):
                raise TanzakuError(
                    f"{place()}: found {len(row)}, expected {len(rows[0])} fields ({listed(rows[0])}); "
                    f"quote a field that contains {delimiter!r} or a line break"
                )
            rows += [row] if row else []  # a blank line is no row
            start = reader.line_num + 1
    except csv.Error as error:
        unclosed = "unexpected end of data" in str(error)
        reason = 'a quote (") is opened and never closed' if unclosed else str(error).replace("\t", r"\t")
        fix = 'quote the whole field, and write each quote in it twice ("")'
        raise TanzakuError(f"{place()}: {reason}; {fix}") from None
    finally:
        csv.field_size_limit(limit)
    return {name: [row[index] for row in rows[1:]] for index, name in enumerate(rows[0])}


def _check_header(header: Sequence[str], delimiter: str, place: str) -> None:
    if not header:
        raise TanzakuError(f"{place} is blank; expected column names")
    other = next((mark for mark in "\t,;" if mark != delimiter and mark in header[0]), None)
    if other and len(header) == 1:
        raise TanzakuError(
            f"{place} is one column {header[0]!r}, which looks separated by {other!r}; "
            f"expected {delimiter!r} (tabs in .tsv, commas in .csv)"
        )
    _check_names(header, place)


def _json(text: str, source: str, array: bool) -> Columns:
    """One JSON object a line or, with ``array``, one list of them; a name an object lacks is None there."""
    if array and text.lstrip().startswith("["):
        found = [(f"item {n}", item) for n, item in enumerate(_parse(text, source, 1), 1)]
    else:
        lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        found = [(f"line {n}", _parse(line, source, n)) for n, line in lines]
    for where, item in found:
        if not isinstance(item, dict):
            raise TanzakuError(f"{source} {where} is {json.dumps(item)[:40]}, expected an object {{...}}")
    names = dict.fromkeys(name for _, item in found for name in item)
    _check_names(list(names), source)
    return {name: [item.get(name) for _, item in found] for name in names}


def _parse(text: str, source: str, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at character {error.colno}"
    except (ValueError, RecursionError) as error:
        line, reason = first_line, str(error)
    raise TanzakuError(f"{source} line {line} is not JSON: {reason}; expected one whole object a line")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_names([name for name, _ in pairs], "the object")
    return dict(pairs)


def _parquet(path: Path) -> Columns:
    import pyarrow  # with datasets below: slow to import, and most tables are text
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(_bytes(path))).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise TanzakuError(f"{path} is not a readable Parquet file: {_short(error)}") from None
    _check_names(table.column_names, str(path))
    return dict(zip(table.column_names, (column.to_pylist() for column in table.columns), strict=True))


def _dataset(path: Path, split: str | None) -> Columns:
    import datasets

    try:
        loaded = datasets.load_dataset(str(path), split=split)
    except Exception as error:  # the library raises nearly every kind of error, network ones included
        raise TanzakuError(
            f"dataset {str(path)!r} cannot be loaded: {_short(error)}; expected a file ({listed(SUFFIXES)}), "
            f"a folder, or a dataset on this machine or within reach{_neighbour(path)}"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) > 1:
            fix = f"name one, as in {path}:{next(iter(loaded))}"
            raise TanzakuError(f"dataset {str(path)!r} has splits {listed(loaded)}; {fix}")
        loaded = next(iter(loaded.values()))
    columns: Columns = loaded.to_dict()
    _check_names(list(columns), str(path))
    return columns


def _short(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".;:")
