"""TSV and CSV as people have them: the habits of Excel and pandas are read and said, and doubtful rows refused."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tanzaku.errors import TanzakuError, listed
from tanzaku.tasks.names import check_names

_LONGEST_FIELD = 2**24  # characters: room for a book, yet an open quote in a large file is still noticed
_SEP = re.compile(r"sep=(.)(?:\r\n|\n|\r)", re.IGNORECASE)
_NAMES = {"\t": "tabs", ",": "commas", ";": "semicolons"}


@dataclass(frozen=True)
class _Record:
    fields: list[str]
    first: int
    last: int

    def place(self, source: str) -> str:
        lines = f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"
        return f"{source} {lines}"


def read_delimited(
    text: str, delimiter: str, source: str, note: Callable[[str], None], gap: int = 0
) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the rows.

    Args:
        gap: lines of the source between the header and the rows that are left out of the text.

    Raises:
        TanzakuError: what is broken, with its line.
    """
    start = 1
    if said := _SEP.match(text):  # Excel's line for itself
        text, delimiter, start = text[said.end() :], said[1], 2
    elif delimiter == "," and _only_semicolons(text):
        delimiter = ";"
        note(f"{source} is separated by semicolons: read so")
    records = _records(text, delimiter, source, start, gap)
    head = next(records)
    _check_delimiter(head, delimiter, source)
    rows = [record for record in records if record.fields]  # a blank line is no row
    names = head.fields
    while names and not names[-1].strip():
        names = names[:-1]
    names = names or head.fields
    index = _index(names, rows)
    check_names(names[1:] if index else names, head.place(source))
    names, rows = _cut(names, len(head.fields), rows, delimiter, source, note)
    _check_quotes(names, rows, delimiter, source)
    if index:
        note(f"{source}: its first column numbers the rows and is {index}: left out")
        return names[1:], [record.fields[1:] for record in rows]
    return names, [record.fields for record in rows]


def _only_semicolons(text: str) -> bool:
    head = re.split(r"[\r\n]", text, maxsplit=1)[0]
    return ";" in head and "," not in head and "\t" not in head


def _records(text: str, delimiter: str, source: str, first: int, gap: int) -> Iterator[_Record]:
    """The header, and what follows; strict about quotes."""
    # newline="" keeps line breaks inside quoted fields as they were written.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = end = first
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        rows = []
        for row in reader:
            end = reader.line_num + first - 1
            rows.append(_Record(row, start, end))
            if len(rows) == 1:
                first, end = first + gap, end + gap
            start = end + 1
    except csv.Error as error:
        unclosed = "unexpected end of data" in str(error)
        reason = 'a quote (") is opened and never closed' if unclosed else str(error).replace("\t", r"\t")
        fix = 'quote the whole field, and write each quote in it twice ("")'
        if "field limit" in reason:
            reason = f"a field of more than {_LONGEST_FIELD:,} characters"
            fix = 'is there a quote (") that is never closed? If not, cut the text, or give the rows as JSON Lines'
        place = _Record([], start, max(start, reader.line_num + first - 1)).place(source)
        raise TanzakuError(f"{place}: {reason}; {fix}") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise TanzakuError(f"{source} is empty; expected column names and rows")
    yield from rows


def _check_delimiter(head: _Record, delimiter: str, source: str) -> None:
    place = head.place(source)
    if not head.fields:
        raise TanzakuError(f"{place} is blank; expected column names")
    [first, *others] = head.fields
    found = next((mark for mark in "\t,;" if mark != delimiter and mark in first), None)
    if found and not others:
        kind = {"\t": "tsv", ",": "csv"}.get(found)
        fix = (
            f"--format {kind} (predict: --data-format)"
            if kind
            else f"{_NAMES.get(delimiter, delimiter)} in their place"
        )
        raise TanzakuError(
            f"{place} is one column {first!r}, which looks separated by {found!r}; "
            f"expected {delimiter!r} (tabs in .tsv, commas in .csv); rename the file, or give {fix}"
        )


def _cut(
    names: list[str], width: int, rows: list[_Record], delimiter: str, source: str, note: Callable[[str], None]
) -> tuple[list[str], list[_Record]]:
    """Rows of the header's width. Columns at the end that have no name and no content go, as spreadsheets leave them.

    Args:
        width: of the header as it stands; `names` is without nameless columns at its end.
    """
    lengths = {len(record.fields) for record in rows}
    if len(lengths) == 1 and not any("".join(record.fields[width:]).strip() for record in rows):
        width = max(width, *lengths)  # a delimiter at the end of every row
    for record in rows:
        found, more = len(record.fields), "".join(record.fields[len(names) :]).strip()
        if more and len(names) < found <= width:
            at = next(n for n, cell in enumerate(record.fields) if n >= len(names) and cell.strip()) + 1
            raise TanzakuError(
                f"column {at} of {source} has no name, and {record.fields[at - 1][:40]!r} at line {record.first}; "
                "name it in the first line, or empty it"
            )
        if not len(names) <= found <= width:
            fix = f"quote a field that contains {delimiter!r} or a line break"
            if len(names) == 1 and width < min(lengths):
                fix = "if that is a title, take it away: the first line names the columns"
            raise TanzakuError(
                f"{record.place(source)}: found {found}, expected {len(names)} fields ({listed(names)}); {fix}"
            )
    if width == len(names):
        return names, rows
    note(f"{source}: empty columns without a name at the end of its rows, left out: {width - len(names)}")
    return names, [_Record(record.fields[: len(names)], record.first, record.last) for record in rows]


def _index(names: Sequence[str], rows: Sequence[_Record]) -> str:
    """How the first column is called, where it is the row numbers that pandas writes; else nothing."""
    if len(names) < 2 or names[0].strip() not in ("", "Unnamed: 0"):
        return ""
    numbers = [record.fields[0] for record in rows]
    if not numbers or not all(map(str.isdecimal, numbers)) or len(set(numbers)) < len(numbers):
        return ""
    return f"named {names[0]!r}" if names[0].strip() else "without a name"


# -- a stray quote


def _check_quotes(names: Sequence[str], rows: Sequence[_Record], delimiter: str, source: str) -> None:
    """A quote that only opens takes the rows up to the next one for one field. They are rows to the eye.

    A line within a quoted field is taken for such a row if it has as many fields as the table, of which one but the
    field itself is what others are in its column: a label that others have, or a number among numbers. Tabs, which
    hardly any text has, are enough where each line has as many.
    """
    doubtful = [record for record in rows if record.first < record.last]
    if not doubtful or len(names) < 2:
        return
    others = [record.fields for record in rows if record.first == record.last]
    columns = [[fields[at] for fields in others] for at in range(len(names))]
    known = [{value for value in column if value.strip()} for column in columns]
    numeric = [len(column) > 1 and all(map(_is_number, column)) for column in columns]
    for record in doubtful:
        for column, value in enumerate(record.fields):
            lines = [line for line in re.split(r"\r\n|\r|\n", value) if line]
            rowlike = list(_rowlike(lines, column, len(names), delimiter))
            alike = any(
                cell in known[at] or (numeric[at] and _is_number(cell))
                for cells in rowlike
                for at, cell in cells
                if at != column
            )
            if alike or (delimiter == "\t" and len(rowlike) == len(lines) > 1):
                raise TanzakuError(
                    f'{record.place(source)}: the quote (") that opens {lines[0][:20]!r} takes in what looks like '
                    f'{len(lines)} rows; take it away, or quote the whole field and write each quote in it twice (""); '
                    "if it is one field, give the rows as JSON Lines"
                )


def _rowlike(lines: Sequence[str], column: int, width: int, delimiter: str) -> Iterator[list[tuple[int, str]]]:
    """Of each line within a field that has as many cells as a row, its cells by column."""
    for number, line in enumerate(lines):
        cells = line.split(delimiter)
        before = column if number == 0 else 0  # the first line goes on from the fields before it
        after = width - 1 - column if number == len(lines) - 1 else 0  # and others follow the last
        if before + len(cells) + after == width:
            yield list(enumerate(cells, before))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?\d+(\.\d+)?\s*", text) is not None
