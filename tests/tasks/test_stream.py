"""Rows a few at a time are the rows that a table read at once has, and so are the errors."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tanzaku.errors import TanzakuError
from tanzaku.tasks import stream
from tanzaku.tasks.data import read_table
from tanzaku.tasks.stream import open_rows

ROWS = [{"text": f"warm sea {n}", "note": 'a "b",\tc\u3000d', "n": str(n)} for n in range(10)]


@pytest.fixture(params=[".tsv", ".csv", ".jsonl", ".parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stream, "LARGE", 0)
    return _write(tmp_path / f"in{request.param}", 10)


def _write(path: Path, count: int) -> Path:
    rows = [ROWS[n % 10] for n in range(count)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join('"' + cell.replace('"', '""') + '"' for cell in row.values()) for row in rows]
        path.write_text("\ufeff" + "\n".join([mark.join(ROWS[0]), "", *lines]), encoding="utf-8")
    return path


def test_rows_are_those_of_the_table(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "read_table", None)  # it is not needed
    rows = open_rows(str(file))
    assert (len(rows), rows.names) == (10, ("text", "note", "n"))
    assert list(rows) == ROWS and list(rows) == ROWS
    table = read_table(file)
    assert {name: [row[name] for row in rows] for name in rows.names} == table.columns
    assert list(rows.chunks(4, 3)) == [ROWS[3:7], ROWS[7:]]
    with pytest.raises(TanzakuError, match=r"has no column 'txt' .did you mean 'text'"):
        rows.check_column("txt")


def test_objects_may_lack_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LARGE", 0)
    (tmp_path / "in.jsonl").write_text('{"a": 1}\n{"b": [2]}\n', encoding="utf-8")
    assert list(open_rows(str(tmp_path / "in.jsonl"))) == [{"a": 1, "b": None}, {"a": None, "b": [2]}]


ODD = {
    "a.tsv": [
        b"a\tb\n1\n",
        b"a\ta\n1\t2\n",
        b"a\tb\n\xff\t2\n",
        b'a\tb\n"1\t2\n',
        b"a\tb\n",
        b"a,b\n1,2\n",
        b"a\n\0\n",
    ],
    "a.jsonl": [b"[1]\n", b'{"a": 1, "a": 2}\n', b'{"a": \n', b'{"": 1}\n', b"\n"],
    "a.parquet": [b"PAR1", b"x"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in ODD for content in ODD[name]])
def test_errors_are_those_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setattr(stream, "LARGE", 0)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TanzakuError) as expected:
        read_table(tmp_path / name)
    with pytest.raises(TanzakuError) as found:
        open_rows(str(tmp_path / name))
    assert str(found.value) == str(expected.value)


def test_memory_is_flat(file: Path) -> None:
    def peak(count: int) -> int:
        _write(file, count)
        tracemalloc.start()
        for _ in open_rows(str(file)).chunks(256):
            pass
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(2000)
    assert peak(40000) < 1.3 * peak(4000)
