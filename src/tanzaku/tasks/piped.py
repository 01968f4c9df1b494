"""Rows of standard input as they come: those of a pipe that stays open are there before it ends."""

from __future__ import annotations

import codecs
import csv
import io
import json
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from tanzaku.errors import TanzakuError, listed
from tanzaku.tasks.data import DELIMITERS, Table, to_stderr
from tanzaku.tasks.delimited import read_delimited
from tanzaku.tasks.encodings import decoded, known, marked
from tanzaku.tasks.jsonrows import Columns, read_json, read_json_lines
from tanzaku.tasks.sources import check_content, format_of, stdin_stream

_SOURCE = "standard input"
_BLOCK = 2**16  # bytes
_BEFORE = 200  # lines that tell what is in a column, where a quote may be a stray one


class Piped:
    """Rows of standard input, which can be gone through once.

    ``names`` are those of the rows that came first: objects of JSON may have more later, and lack none.
    """

    source = _SOURCE

    def __init__(
        self, encoding: str | None = None, format: str | None = None, note: Callable[[str], None] = to_stderr
    ) -> None:
        """
        Args:
            encoding, format, note: as :func:`tanzaku.tasks.data.read_table` has them.

        Raises:
            TanzakuError: nothing is piped in, or the first rows are broken. Later ones raise it when they come.
        """
        self._lines = _Lines(encoding, note)
        self._note: Callable[[str], None] = note
        first = self._lines.peek()
        self._format = format or format_of(first)
        self._whole = self._format == "json" and not _is_row(first)
        self._header, self._before = "", deque[str](maxlen=_BEFORE)
        if self._format in DELIMITERS:
            self._header = self._lines.take(2 if first.lower().startswith("sep=") else 1)
        self._begin = self._lines.number
        self._count, self._ready = 0, deque[dict[str, Any]]()
        self._broken: TanzakuError | None = None  # what is wrong behind the rows that are ready
        self.names: tuple[str, ...] = ()
        while not self._ready:
            columns = self._more()
            if not self._ready and self._lines.ended:
                header = listed(columns) or "empty"
                raise TanzakuError(f"{_SOURCE} has a header ({header}) but no rows; expected at least one")
        self.names = tuple(columns)

    def __len__(self) -> int:
        """Rows that were given out."""
        return self._count

    def check_column(self, name: str) -> None:
        """A TanzakuError with the nearest name where there is no such column."""
        Table({each: [] for each in self.names}, self.source).column(name)

    def chunks(self, size: int, start: int = 0) -> Iterator[list[dict[str, Any]]]:
        """The rows that have come, at most `size` at a time."""
        if start:
            raise ValueError(f"start is {start}, expected 0: what was read once is gone")
        while self._ready or self._broken is not None or not self._lines.ended:
            while chunk := [self._ready.popleft() for _ in range(min(size, len(self._ready)))]:
                self._count += len(chunk)
                yield chunk
            if self._broken is not None or not self._lines.ended:
                self._more()

    def _more(self) -> Columns:
        """Wait for whole rows, and make them ready; as columns. Those in front of a broken one come first."""
        if self._broken is not None:
            raise self._broken
        at, text = self._lines.number, self._lines.take()
        while not self._lines.ended and (self._whole or self._is_open(text)):
            text += self._lines.take()
        if not text.strip() and (self.names or not self._lines.ended):
            return {}
        try:
            columns, old = self._read(text, at)
        except TanzakuError as error:
            lines = _lines_of(text)
            # A prefix that ends within a quoted field is no whole rows.
            ends = [] if self._whole else [n for n in range(1, len(lines)) if not self._is_open("".join(lines[:n]))]
            good = bisect(ends, False, key=lambda n: self._breaks(lines[:n], at))
            if not good:
                raise
            self._broken, self._note = error, lambda _: None
            text = "".join(lines[: ends[good - 1]])
            columns, old = self._read(text, at)
        if self._format in DELIMITERS:
            self._before.extend(line for line in _lines_of(text) if '"' not in line and line.strip())
        self._note = lambda _: None  # what is inferred is so for all rows, and said once
        rows_now = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        lacking = dict.fromkeys(self.names)
        self._ready.extend(lacking | row for row in islice(rows_now, old, None))
        return columns

    def _breaks(self, lines: Sequence[str], at: int) -> bool:
        """Whether something is wrong with the first lines of what has come."""
        note, self._note = self._note, lambda _: None
        try:
            return not self._read("".join(lines), at)[0]
        except TanzakuError:
            return True
        finally:
            self._note = note

    def _read(self, text: str, at: int) -> tuple[Columns, int]:
        """Columns, and how many of their rows were there before."""
        if self._format in DELIMITERS:
            # Rows before tell whether a line within quotes is a row that a stray quote has swallowed.
            before = list(self._before) if '"' in text else []
            lines = "".join((self._header, *before, text))
            gap = at - len(before) - self._begin
            names, rows = read_delimited(lines, DELIMITERS[self._format], _SOURCE, self._note, gap)
            return {name: [row[column] for row in rows] for column, name in enumerate(names)}, len(before)
        if self._whole:
            return read_json(text, _SOURCE, self._note), 0
        return read_json_lines(text, _SOURCE, at), 0

    def _is_open(self, text: str) -> bool:
        """Whether the text ends within a quoted field."""
        if self._format not in DELIMITERS or '"' not in text:
            return False
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[self._format], strict=True)
        try:
            for _ in reader:
                pass
        except csv.Error as error:
            return "unexpected end of data" in str(error)
        return False


def _lines_of(text: str) -> list[str]:
    """Lines with what ends them: a line separator within a text ends none."""
    return io.StringIO(text, newline="").readlines()


def _is_row(line: str) -> bool:
    """Whether a line is one row for sure: no list or part of a value over lines, nor an object that holds all rows."""
    try:
        values = list(json.loads(line).values())
    except (AttributeError, ValueError, RecursionError):
        return False
    return not all(isinstance(value, list | dict) for value in values) and not any(
        isinstance(value, list) and isinstance(next(iter(value), None), dict) for value in values
    )


class _Lines:
    """Lines as they come, with what ends them."""

    def __init__(self, encoding: str | None, note: Callable[[str], None]) -> None:
        self._stream = stdin_stream()
        self._ended = False  # the stream; lines of it may be ready still
        self._ready = deque[str]()
        self._rest = ""  # of a line that has not come whole
        self.number = 1  # of the next line
        first = b""
        while b"\n" not in first and (block := self._stream.read1(_BLOCK)):
            first += block
        check_content(first, _SOURCE)
        found = known(encoding) if encoding is not None else marked(first)
        self.encoding = found or decoded(first[: first.rfind(b"\n") + 1] or first, _SOURCE)[1]
        if encoding is None and self.encoding != "utf-8":
            note(f"{_SOURCE} is read as {self.encoding}; --encoding overrules it")
        self._plain = encoding is None and self.encoding == "utf-8"
        self._decoder = codecs.getincrementaldecoder(self.encoding)()
        self._take_in(first)

    @property
    def ended(self) -> bool:
        return self._ended and not self._ready

    def peek(self) -> str:
        """The next line that is not blank; nothing where there is none."""
        while not any(map(str.strip, self._ready)) and not self._ended:
            self._take_in(self._stream.read1(_BLOCK))
        return next(filter(str.strip, self._ready), "")

    def take(self, number: int | None = None) -> str:
        """That many lines, or all that are ready; waits for one at least, unless it has ended."""
        while len(self._ready) < (number or 1) and not self._ended:
            self._take_in(self._stream.read1(_BLOCK))
        taken = [self._ready.popleft() for _ in range(min(number or len(self._ready), len(self._ready)))]
        self.number += len(taken)
        return "".join(taken)

    def _take_in(self, block: bytes) -> None:
        self._ended = not block
        below = f"{_SOURCE} from line {self.number + len(self._ready)}"
        try:
            begun = self.number > 1 or self._ready or self._rest
            new = self._decoder.decode(block, final=self._ended)
            text = self._rest + (new if begun else new.removeprefix("\ufeff"))
        except UnicodeDecodeError:
            fix = "say what it is with --encoding, or pipe UTF-8"
            raise TanzakuError(f"{below} on is not {self.encoding}; {fix}") from None
        if self._plain and marked(block) not in (None, "utf-8"):
            raise TanzakuError(f"{below} on looks like {marked(block)}; say so with --encoding")
        if "\0" in text:
            raise TanzakuError(f"{below} on has a NUL character; expected plain text")
        lines = _lines_of(text)
        whole = self._ended or text.endswith("\n")  # a return at the end may be half of an end of line
        self._rest = "" if whole or not lines else lines.pop()
        self._ready.extend(lines)
