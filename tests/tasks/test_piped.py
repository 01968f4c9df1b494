"""Standard input as it comes: rows before the pipe is closed, and nothing that a file would not do."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import pytest

from tanzaku.errors import TanzakuError
from tanzaku.tasks.data import read_table
from tanzaku.tasks.piped import Piped


class Drops(io.RawIOBase):
    """A stream that gives its bytes in the pieces they were put in."""

    def __init__(self, *pieces: bytes):
        self.pieces = list(pieces)

    def read1(self, size: int = -1) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""


def pipe(monkeypatch: pytest.MonkeyPatch, *pieces: bytes) -> None:
    class Stdin:
        buffer = Drops(*pieces)

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Stdin())


def rows_of(piped: Piped, size: int = 100) -> list[dict[str, Any]]:
    return [row for chunk in piped.chunks(size) for row in chunk]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[BinaryIO]:
    """The writing end of a pipe that is standard input."""
    read, write = os.pipe()
    with os.fdopen(read, encoding="utf-8") as stdin, os.fdopen(write, "wb", buffering=0) as end:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield end


def test_rows_are_there_before_the_pipe_is_closed(ends: BinaryIO) -> None:
    ends.write("text\tlabel\n春\t0\nsea\t1\nhal".encode())
    piped = Piped()
    assert (piped.names, len(piped)) == (("text", "label"), 0)
    chunks = piped.chunks(100)
    assert next(chunks) == [{"text": "春", "label": "0"}, {"text": "sea", "label": "1"}]
    ends.write(b"f\t1\n")
    assert next(chunks) == [{"text": "half", "label": "1"}]
    ends.write(b"last\t0")
    ends.close()
    assert next(chunks) == [{"text": "last", "label": "0"}]
    assert (list(chunks), len(piped)) == ([], 4)


TABLES = {
    "tsv": "text\tlabel\n春の雨\t0\nsea\t1\n",
    "csv with quotes": 'text,label\n"a, b",0\n"two\nlines",1\n"say ""x""",0\n',
    "semicolons": "text;label\na;0\nb;1\n",
    "sep=": "sep=;\ntext;label\na;0\nb;1\n",
    "the index of pandas": ",text,label\n0,a,0\n1,b,1\n",
    "commas at the end": "text,label,,\na,0,,\nb,1,,\n",
    "returns": "text,label\r\na,0\r\nb,1\r\n",
    "returns alone": "text,label\ra,0\rb,1\r",
    "blank lines": "\ntext,label\n\na,0\n\nb,1\n\n".lstrip("\n"),
    "json lines": '{"text": "a", "label": 0}\n\n{"text": "b", "label": 1}\n',
    "a list": '[{"text": "a", "label": 0}, {"text": "b", "label": 1}]',
    "a list over lines": json.dumps([{"text": "a", "label": 0}], indent=1),
    "columns": '{"text": ["a", "b"], "label": [0, 1]}',
}


@pytest.mark.parametrize("size", [1, 3, 7, 2**16])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", TABLES)
def test_as_a_file_in_whatever_pieces(monkeypatch: pytest.MonkeyPatch, name: str, encoding: str, size: int) -> None:
    raw = TABLES[name].encode(encoding)
    pipe(monkeypatch, *(raw[at : at + size] for at in range(0, len(raw), size)))
    piped = Piped(note=lambda _: None)
    found = rows_of(piped, 2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    table = read_table("-", note=lambda _: None)
    assert list(piped.names) == list(table.columns)
    assert found == [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]


def test_what_is_inferred_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    pipe(monkeypatch, "text;label\n東京の雨;0\n".encode("cp932"), "京都の雪;1\n".encode("cp932"))
    assert [row["text"] for row in rows_of(Piped(note=notes.append))] == ["東京の雨", "京都の雪"]
    assert notes == [
        "standard input is read as cp932; --encoding overrules it",
        "standard input is separated by semicolons: read so",
    ]


def test_keys_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b'{"text": "a", "n": 1}\n', b'{"text": "b", "m": 2}\n')
    piped = Piped()
    assert piped.names == ("text", "n")
    assert rows_of(piped) == [{"text": "a", "n": 1}, {"text": "b", "n": None, "m": 2}]


def test_a_stray_quote_after_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"text,label\na,0\nb,1\n"
    pipe(monkeypatch, head, b'"c,0\nd,1\n', b'e",1\n')
    chunks = Piped().chunks(100)
    assert len(next(chunks)) == 2
    with pytest.raises(TanzakuError, match=r"standard input lines 4 to 6: .* takes in what looks like 3 rows"):
        next(chunks)
    pipe(monkeypatch, head, b'"c,0\n', b"d,1\n")
    with pytest.raises(TanzakuError, match=r'standard input lines 4 to 5: a quote \("\) is opened and never closed'):
        rows_of(Piped())


BROKEN: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([], "standard input is empty"),
    "no rows": ([b"text\tlabel\n", b"\n"], r"has a header \(text, label\) but no rows"),
    "fields": ([b"text,label\na,0\n", b"b,1,2\n"], "standard input line 3: found 3, expected 2 fields"),
    "JSON": ([b'{"text": "a"}\n', b'{"text": "b"}\n{"text"\n'], "standard input line 3 is not JSON"),
    "letters": ([b"text\na\n", b"b\n\xff\n"], "standard input from line 3 on is not utf-8; .*--encoding"),
    "ISO-2022-JP": (
        [b"text\na\n", "東京\n".encode("iso2022_jp")],
        "standard input from line 3 on looks like iso2022_jp; .*--encoding",
    ),
    "NUL": ([b"text\na\n", b"b\0\n"], "standard input from line 3 on has a NUL character"),
    "Parquet": ([b"PAR1abc\n"], "is a Parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_told_with_its_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pieces, says = BROKEN[name]
    pipe(monkeypatch, *pieces)
    with pytest.raises(TanzakuError, match=says):
        rows_of(Piped())
