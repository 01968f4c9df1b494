from __future__ import annotations

import csv
import gzip
import io
import json
import os
import socket
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tanzaku.errors import TanzakuError
from tanzaku.tasks.data import Table, read_table

Put = Callable[[str, "str | bytes"], Path]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))
# Lines in a cell that look like rows are refused: a quote may have been forgotten.
CELL = TEXT.filter(lambda text: not ({"\n", "\r"} & {*text} and {"\t", ","} & {*text}))


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes one file of a fresh folder."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def complaint(source: str | Path, split: str | None = None, **options: Any) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises(TanzakuError) as caught:
        read_table(source, split, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# --- what is read ---


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1), suffix=st.sampled_from([".tsv", ".csv"]))
def test_any_text_survives_a_delimited_file(tmp_path: Path, rows: list[tuple[str, str]], suffix: str) -> None:
    path = tmp_path / f"round{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerows([("text", "label"), *rows])
    table = read_table(path)
    assert table.columns == {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    assert len(table) == len(rows)
    assert table.source == str(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"text": TEXT, "n": st.integers() | st.none()}), min_size=1))
def test_any_text_survives_json_lines(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    path = tmp_path / "round.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert read_table(path).columns == {name: [row[name] for row in rows] for name in ("text", "n")}


def test_text_files_keep_strings(put: Put) -> None:
    path = put("a.tsv", 'text\tlabel\n"two\nlines, ""quoted"""\t1\n\n 007 \t1.0\n')
    assert read_table(path).columns == {"text": ['two\nlines, "quoted"', " 007 "], "label": ["1", "1.0"]}


def test_a_byte_order_mark_is_no_part_of_the_first_name(put: Put) -> None:
    assert list(read_table(put("a.csv", b"\xef\xbb\xbftext,label\na,1\n")).columns) == ["text", "label"]
    assert list(read_table(put("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n')).columns) == ["text"]


def test_suffixes_may_be_upper_case(put: Put) -> None:
    assert len(read_table(put("A.TSV", "text\na\n"))) == 1


def test_long_fields_are_read_and_the_limit_is_put_back(put: Put) -> None:
    csv.field_size_limit(131_072)
    assert len(read_table(put("a.tsv", "text\n" + "a" * 1_000_000 + "\n")).column("text")[0]) == 1_000_000
    assert csv.field_size_limit() == 131_072


def test_json_keeps_types_and_fills_what_is_left_out(put: Put) -> None:
    path = put("a.jsonl", '{"text": "a", "label": 1}\r\n\n{"text": "\u2028", "label": true, "more": 1.5}\n')
    expected = {"text": ["a", "\u2028"], "label": [1, True], "more": [None, 1.5]}
    assert read_table(path).columns == expected


@pytest.mark.parametrize("text", ['[{"a": 1},\n {"a": 2}]', '{"a": 1}\n{"a": 2}'])
def test_json_is_a_list_or_lines(put: Put, text: str) -> None:
    assert read_table(put("a.json", text)).columns == {"a": [1, 2]}


def test_parquet_keeps_types(tmp_path: Path) -> None:
    columns = {"text": ["a", None], "label": [1, 0], "score": [0.5, 1.0], "ok": [True, False]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").columns == columns


# --- datasets ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tables."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "poems"
    data.mkdir()
    (data / "train.csv").write_text("text,label\na,1\nb,0\n")
    (data / "test.csv").write_text("text,label\nc,1\n")
    return data


def test_a_split_of_a_folder_is_the_table_of_that_name(folder: Path) -> None:
    assert read_table(f"{folder}:train").columns == {"text": ["a", "b"], "label": ["1", "0"]}
    assert read_table(folder, split="test").columns == {"text": ["c"], "label": ["1"]}
    assert read_table(f"{folder}:test", split="test").source == f"{folder}:test"


def test_the_only_table_of_a_folder_needs_no_name(folder: Path) -> None:
    (folder / "test.csv").unlink()
    (folder / "notes.md").write_text("about")
    table = read_table(folder)
    assert (len(table), table.source) == (2, str(folder / "train.csv"))


@pytest.mark.parametrize("other", ["poems_test.csv", "old/train.csv", "validation.tsv"])
def test_splits_are_not_guessed_from_names(folder: Path, other: str) -> None:
    (folder / "old").mkdir()
    (folder / "test.csv").rename(folder / other)
    message = complaint(folder)
    assert "is a folder of 2 tables" in message
    assert other in message
    assert f"name one, as in {folder}" in message


def test_shards_are_read_by_their_own_library(folder: Path) -> None:
    for name, new in (("train", "train-00000-of-00001"), ("test", "test-00000-of-00001")):
        (folder / f"{name}.csv").rename(folder / f"{new}.csv")
    assert len(read_table(f"{folder}:train")) == 2
    assert f"has splits train, test; name one, as in {folder}:train" in complaint(folder)


def test_a_folder_of_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tanzaku.tasks.sources._MANY", 1)
    assert "is a folder of more than 1 files; name the table" in complaint(folder)


def test_unknown_split(folder: Path) -> None:
    message = complaint(f"{folder}:trian")
    assert "no table named 'trian' (did you mean 'train'?)" in message
    assert "test.csv, train.csv" in message


def test_two_splits_at_once() -> None:
    assert "'test'" in complaint("imdb:train", split="test")


def test_a_dataset_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\n the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = complaint("imdb:train")
    assert "'imdb'" in message
    assert "Couldn't reach the Hub" in message
    assert ".tsv" in message


def test_a_mistyped_suffix_finds_the_file(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    path = put("train.tsv", "text\na\n")
    assert "did you mean 'train.tsv'?" in complaint(path.with_suffix(".tvs"))


# --- what is refused ---


def test_missing_file_names_the_nearest(put: Put, tmp_path: Path) -> None:
    put("valid.tsv", "text\na\n")
    assert "did you mean 'valid.tsv'?" in complaint(tmp_path / "vaild.tsv")
    assert "has valid.tsv" in complaint(tmp_path / "q.parquet")
    assert str(tmp_path / "none") in complaint(tmp_path / "none" / "valid.tsv")


def test_unknown_suffix(put: Put) -> None:
    message = complaint(put("a.tvs", "text\na\n"))
    assert "a.tvs" in message
    assert "did you mean '.tsv'?" in message
    assert ".parquet" in message


def test_no_source_and_split_of_a_file(put: Put) -> None:
    assert "empty" in complaint("")
    path = put("a.tsv", "text\na\n")
    assert "no split 'train'" in complaint(path, "train")
    assert "no split 'train'" in complaint(f"{path}:train")


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \n\n"])
def test_empty_file(put: Put, suffix: str, content: bytes) -> None:
    message = complaint(put(f"a.{suffix}", content))
    assert f"a.{suffix} is empty" in message


def test_header_only(put: Put, tmp_path: Path) -> None:
    for name, content in {"a.tsv": "text\tlabel\n", "a.csv": "text,label\r\n"}.items():
        message = complaint(put(name, content))
        assert name in message
        assert "header (text, label) but no rows" in message
    assert "no rows" in complaint(put("a.json", "[]"))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "a.parquet")
    assert "header (text) but no rows" in complaint(tmp_path / "a.parquet")


def test_place_of_a_byte_that_is_not_utf8(put: Put) -> None:
    assert "line 2, byte 4;" in complaint(put("a.tsv", b"\xef\xbb\xbftext\nfoo\x81\xff\x81\n"))


def test_nul_byte(put: Put) -> None:
    message = complaint(put("a.tsv", "text\nfoo\nb\0r\n"))
    assert "NUL" in message
    assert "line 3" in message


@pytest.mark.parametrize(
    ("rows", "place", "found"),
    [
        ("a\t1\nb\n", "line 3:", "found 1, expected 2"),
        ("a\t1\nb\t0\tc\n", "line 3:", "found 3, expected 2"),
        ('"a\nb"\t1\nc\t0\t\n', "line 4:", "found 3, expected 2"),
        ('"a\nb"\t1\t2\n', "lines 2 to 3:", "found 3, expected 2"),
        ('"a" b\t1\n', "line 2:", r"'\t' expected after"),
        ('a\t1\n"b\t0\nc\t1\n', "lines 3 to 4:", "never closed"),
    ],
)
def test_broken_line(put: Put, rows: str, place: str, found: str) -> None:
    message = complaint(put("a.tsv", f"text\tlabel\n{rows}"))
    assert f"a.tsv {place}" in message
    assert found in message
    assert "quote" in message
    comma = complaint(put("a.csv", f"text\tlabel\n{rows}".replace("\t", ",")))
    assert f"a.csv {place}" in comma


def test_a_field_beyond_the_limit(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tanzaku.tasks.delimited._LONGEST_FIELD", 10)
    message = complaint(put("a.tsv", "text\nfoo\n" + "a" * 11 + "\n"))
    assert "line 3: a field of more than 10 characters; is there a quote" in message


@pytest.mark.parametrize(
    ("name", "header", "expected"),
    [
        ("a.tsv", "text\ttext", "2 columns named 'text'"),
        ("a.csv", "text,,label", "column 2 of"),
        ("a.csv", '"te\nxt",label', r"'te\nxt'"),
        ("a.csv", "\ntext,label", "line 1 is blank"),
        ("a.csv", "text\tlabel", r"separated by '\t'; expected ','"),
        ("a.tsv", "text,label", r"separated by ','; expected '\t'"),
    ],
)
def test_header(put: Put, name: str, header: str, expected: str) -> None:
    assert expected in complaint(put(name, f"{header}\na\n"))


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ('{"a": 1}\n{"a": \n', 2, "Expecting value"),
        ('{"a": 1}\n\n[1]\n', 3, "an object"),
        ('{"a": 1}\n{"a": 1, "a": 2}\n', 2, "2 columns named 'a'"),
        ('{"a": 1}\n{"": 1}\n', 2, "named ''"),
        ("[" * 100_000, 1, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", 1, "thousands of digits"),
    ],
)
def test_broken_json_line(put: Put, text: str, line: int, expected: str) -> None:
    message = complaint(put("a.jsonl", text))
    assert f"a.jsonl line {line} " in message
    assert expected in message


def test_broken_json_list(put: Put) -> None:
    assert "line 2 is not JSON" in complaint(put("a.json", '[{"a": 1},\n{"a" 2}]'))
    assert "item 2 is 5, expected an object" in complaint(put("a.json", '[{"a": 1}, 5]'))


def test_unreadable_parquet(put: Put) -> None:
    assert "a.parquet is not a readable Parquet file" in complaint(put("a.parquet", "text\na\n"))


def test_parquet_with_one_name_twice(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "2 columns named 'a'" in complaint(tmp_path / "a.parquet")


def test_unreadable_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "a.tsv cannot be read: Permission denied" in complaint(tmp_path / "a.tsv")


def test_unknown_column() -> None:
    with pytest.raises(TanzakuError) as caught:
        Table({"text": ["a"], "label": [1]}, "train.tsv").column("txt")
    assert str(caught.value) == ("train.tsv has no column 'txt' (did you mean 'text'?); its columns are text, label")


def test_a_header_that_is_a_row(put: Put) -> None:
    for content in ("rain\t0\nsnow\t1\nsea\t0\n", "rain\tmild\nsnow\tharsh\nsea\tmild\n"):
        with pytest.raises(TanzakuError, match="looks like a row: add a line of column names"):
            read_table(put("a.tsv", content)).column("text")
    with pytest.raises(TanzakuError) as caught:
        read_table(put("a.tsv", "words\tclass\nrain\t0\n")).column("text")
    assert "looks like a row" not in str(caught.value)


def test_names_that_differ_in_width_or_space_are_near() -> None:
    for name in ("ｔｅｘｔ", " TEXT"):
        with pytest.raises(TanzakuError) as caught:
            Table({name: ["a"]}, "train.tsv").column("text")
        assert f"did you mean {name!r}?" in str(caught.value)


# --- which file it is ---


@pytest.mark.parametrize("name", ["https://example.com/train.csv", "https://example.com/train", "s3://b/x.parquet"])
def test_addresses_are_not_read(name: str) -> None:
    assert f"{name} is an address, which is not read; download it" in complaint(name)


def test_patterns_are_not_expanded(put: Put, tmp_path: Path) -> None:
    put("a1.tsv", "text\na\n")
    put("a2.tsv", "text\na\n")
    message = complaint(tmp_path / "a*.tsv")
    assert "is a pattern" in message
    assert "a1.tsv" in message and "a2.tsv" in message
    assert "matches no file" in complaint(tmp_path / "b?.tsv")
    assert len(read_table(put("[a].tsv", "text\na\n"))) == 1


def test_files_that_could_keep_a_reader_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tsv")
    assert "a.tsv is a FIFO; expected a file, a folder, or - for standard input" in complaint(tmp_path / "a.tsv")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "b.tsv"))
        assert "b.tsv is a socket" in complaint(tmp_path / "b.tsv")
    (tmp_path / "c.tsv").symlink_to("/dev/zero")
    assert "c.tsv is a device" in complaint(tmp_path / "c.tsv")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json"])
def test_packed_files(put: Put, suffix: str) -> None:
    content = {".tsv": "text\tlabel\na\tb\n", ".csv": "text,label\na,b\n"}.get(suffix, '{"text": "a", "label": "b"}\n')
    path = put(f"a{suffix}.GZ", gzip.compress(content.encode()))
    assert read_table(path).columns == {"text": ["a"], "label": ["b"]}


def test_packed_files_that_are_none(put: Put) -> None:
    assert "not a whole gzip file" in complaint(put("a.csv.gz", gzip.compress(b"text\n" + bytes(500))[:-9]))
    assert "not a whole gzip file" in complaint(put("a.csv.gz", "text\na\n"))
    assert "ends with .gz" in complaint(put("a.csv", gzip.compress(b"text\na\n")))
    assert "a.csv.gz is empty" in complaint(put("a.csv.gz", gzip.compress(b"")))


def test_what_a_file_is_goes_before_its_name(put: Put, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as archive:
        archive.writestr("xl/workbook.xml", "")
    assert "a.csv is an Excel file, whatever its name; name it .xlsx, or in the spreadsheet" in complaint(
        tmp_path / "a.csv"
    )
    with zipfile.ZipFile(tmp_path / "b.csv", "w") as archive:
        archive.writestr("b.csv", "text\na\n")
    assert "b.csv is a zip archive" in complaint(tmp_path / "b.csv")
    assert "old Excel file" in complaint(put("c.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"))
    assert "is a Parquet file" in complaint(put("d.csv", b"PAR1...PAR1"))
    assert "is a spreadsheet; in the spreadsheet program, save it as CSV" in complaint(put("e.ods", "x"))


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS .* git lfs pull"),
        (b"\xef\xbb\xbf\n<!DOCTYPE HTML>\n<html lang=en>, sign in", "a web page, .* download the file itself"),
        (b"<html><body>no, page", "a web page"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
        (b"\x89PNG\r\n\x1a\n\0", "an image"),
        (b"SQLite format 3\0\x10", "an SQLite database"),
        (b"\x28\xb5\x2f\xfd\x04", "packed with Zstandard"),
        (b"BZh91AY&SY\xff", "packed with bzip2"),
        (b"\x80\x04\x95ab", "a Python pickle, .* may run code"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".xlsx", ".tsv.gz"])
def test_what_is_no_table_at_all(tmp_path: Path, suffix: str, head: bytes, what: str) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_bytes(gzip.compress(head) if suffix.endswith(".gz") else head)
    with pytest.raises(TanzakuError, match=f"train{suffix} is .*{what}"):
        read_table(path)


def test_a_title_above_the_names(put: Put, tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    with pytest.raises(TanzakuError, match=r"line 2: found 2, expected 1 fields \(# mine\); if that is a title"):
        read_table(put("t.csv", "# mine\ntext,label\na,0\n"))
    book = openpyxl.Workbook()
    for row in (["mine"], [], ["text", "label"], ["a", 0]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(TanzakuError, match="has one cell, 'mine'; if that is a title, take it away"):
        read_table(tmp_path / "t.xlsx")


def test_excel(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["text", "label", None], ["春の雨", 1, None], [None, None, None], ["sea", 0, None]):
        book.active.append(row)
    book.create_sheet("empty")
    book.save(tmp_path / "a.xlsx")
    assert read_table(tmp_path / "a.xlsx").columns == {"text": ["春の雨", "sea"], "label": [1, 0]}
    book["empty"].append(["text"])
    book.save(tmp_path / "a.xlsx")
    assert "2 sheets with content: Sheet, empty" in complaint(tmp_path / "a.xlsx")
    (tmp_path / "b.xlsx").write_text("text\na\n")
    assert "b.xlsx is not a readable Excel file" in complaint(tmp_path / "b.xlsx")


def test_excel_without_its_library(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "takes openpyxl: pip install openpyxl, or save it as CSV" in complaint(put("a.xlsx", b"PK\x03\x04"))


def test_a_format_goes_before_the_suffix(put: Put) -> None:
    assert read_table(put("a.txt", "text\tlabel\na,b\tc\n"), format="tsv").columns == {"text": ["a,b"], "label": ["c"]}
    assert read_table(put("a.csv", "text\tlabel\na,b\tc\n"), format="tsv").columns == {"text": ["a,b"], "label": ["c"]}
    assert "--format" in complaint(put("a.txt", "text\na\n"))


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ("text\tlabel\na\tb\n", None),
        ("text,label\na,b\n", None),
        ("text;label\na;b\n", None),
        ('{"text": "a", "label": "b"}\n', None),
        ('[{"text": "a", "label": "b"}]', None),
        ("text\tlabel\na\tb\n", "tsv"),
        ('{"text": "a", "label": "b"}\n', "jsonl"),
    ],
)
def test_standard_input(monkeypatch: pytest.MonkeyPatch, content: str, format: str | None) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    table = read_table("-", format=format)
    assert (table.columns, table.source) == ({"text": ["a"], "label": ["b"]}, "standard input")
    assert "standard input is empty" in complaint("-")


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    for stdin in (terminal, None):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "nothing is piped into it" in complaint("-")


# --- encodings ---


JAPANESE = "text\tlabel\nfoo\t1\n古池や、蛙飛びこむ\t0\n"
WESTERN = "text\tlabel\ncafé au lait, naïve\t1\n“für” – schöne Grüße\t0\n"


@pytest.mark.parametrize(
    ("codec", "content", "name"),
    [
        ("cp932", JAPANESE, "cp932"),
        ("cp932", JAPANESE.replace("foo", "ﾃｽﾄ"), "cp932"),
        ("euc_jp", JAPANESE, "euc_jp"),
        ("iso2022_jp", JAPANESE, "iso2022_jp"),
        ("iso2022_jp_ext", JAPANESE.replace("foo", "ﾃｽﾄ"), "iso2022_jp_ext"),
        ("utf-16", JAPANESE, "utf-16"),
        ("utf-32", JAPANESE, "utf-32"),
        ("cp1252", WESTERN, "cp1252"),
    ],
)
@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_other_encodings_are_read_and_said(put: Put, codec: str, content: str, name: str, suffix: str) -> None:
    raw, said = content.encode(codec), list[str]()
    path = put(f"a{suffix}", gzip.compress(raw) if suffix.endswith("gz") else raw)
    assert read_table(path, note=said.append).columns == read_table(put("b.tsv", content)).columns
    assert said == [f"{path} is read as {name}; --encoding overrules it"]
    assert read_table(path, encoding=codec, note=said.append).columns == read_table(put("b.tsv", content)).columns
    assert len(said) == 1


@pytest.mark.parametrize(
    ("content", "codec", "could"),
    [
        ("東京都\t良\n", "cp932", "cp932 or cp1252"),  # no kana: Chinese and Korean have bytes like these, too
        ("东西很好\t好\n", "gb18030", "euc_jp or cp932 or cp1252"),
        ("안녕하세요 세계\t1\n", "euc_kr", "euc_jp or cp1252"),
        ("ｱｲｳ\t1\n", "cp932", "cp932 or cp1252"),
        ("élan\t1\n", "cp1252", "cp932 or cp1252"),
        ("привет, мир\t1\n", "cp1251", "cp1252"),
        ("Ελληνικά κείμενο\t1\n", "cp1253", "cp1252"),
        ("ışık, dağ ve deniz\t1\n", "cp1254", "cp1252"),
        ("żółć, być\t1\n", "cp1250", "cp1252"),
        ("ý, ještě příští týden\t1\n", "cp1250", "cp1252"),
    ],
)
def test_what_could_be_several_encodings_is_refused(put: Put, content: str, codec: str, could: str) -> None:
    path = put("a.tsv", b"text\tlabel\n" + content.encode(codec))
    message = complaint(path)
    assert f"a.tsv is not UTF-8 at line 2, byte 1; it could be {could}: say what it is with --encoding" in message
    assert read_table(path, encoding=codec).columns["text"] == [content.split("\t")[0]]


def test_a_mix_of_encodings(put: Put) -> None:
    mixed = JAPANESE.encode() + "夏の海\t1\n".encode("cp932")
    message = complaint(put("a.tsv", mixed))
    assert "not UTF-8 at line 4, byte 1" in message
    assert "1 of its 2 lines" in message
    assert "it mixes encodings" in message and "--encoding" in message
    assert "is not cp932 at" in complaint(put("a.tsv", mixed), encoding="cp932")


def test_encodings_that_are_none(put: Put) -> None:
    path = put("a.tsv", "text\na\n")
    assert "encoding 'cp923' is not known (did you mean 'cp932'?)" in complaint(path, encoding="cp923")
    assert "encoding 'hex' is not known" in complaint(path, encoding="hex")


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_two_bytes_a_letter_without_a_mark(put: Put, codec: str) -> None:
    path = put("a.tsv", JAPANESE.encode(codec))
    assert f"give --encoding {codec}" in complaint(path)
    assert len(read_table(path, encoding=codec)) == 2


# --- what spreadsheets and pandas write ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sep=,\ntext,label\na,b\n", ""),
        ("sep=;\r\ntext;label\r\na;b\r\n", ""),
        ("text;label\na;b\n", "is separated by semicolons"),
        (",text,label\n7,a,b\n", "numbers the rows and is without a name: left out"),
        ("Unnamed: 0,text,label\n7,a,b\n", "is named 'Unnamed: 0': left out"),
        ("text,label,,\na,b,,\n", "empty columns without a name at the end of its rows, left out: 2"),
        ("text,label,,\na,b\n", "empty columns without a name at the end of its rows, left out: 2"),
        ("text,label\na,b, \n", "empty columns without a name at the end of its rows, left out: 1"),
    ],
)
def test_habits_of_spreadsheets(put: Put, content: str, said: str) -> None:
    notes: list[str] = []
    assert read_table(put("a.csv", content), note=notes.append).columns == {"text": ["a"], "label": ["b"]}
    assert len(notes) == (1 if said else 0)
    assert said in "".join(notes)


def test_notes_go_to_standard_error(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    read_table(put("a.csv", "text;label\na;b\n"))
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_what_only_looks_like_a_habit(put: Put) -> None:
    assert "line 3: found 1, expected 2" in complaint(put("a.csv", "sep=;\ntext;label\na\n"))
    assert "column 1 of" in complaint(put("a.csv", ",text\nx,a\n"))  # no row numbers
    assert "column 1 of" in complaint(put("a.csv", ",text\n1,a\n1,b\n"))
    assert "column 3 of" in complaint(put("a.csv", "text,label,\na,b,c\n"))
    assert list(read_table(put("a.csv", "Unnamed: 0,text\nx,a\n")).columns) == ["Unnamed: 0", "text"]
    assert "line 3: found 3, expected 2" in complaint(put("a.csv", "text,label\na,b\nc,d,\n"))


# --- a quote that only opens ---


@pytest.mark.parametrize(
    ("name", "rows", "lines"),
    [
        ("a.tsv", 'text\tlabel\nx\t1\n"a\t0\nb\t1\nc"\t0\ny\t0\n', "lines 3 to 5"),
        ("a.tsv", 'text\tlabel\nx\t1\n"a\t1\nb"\t0\n', "lines 3 to 4"),
        ("a.tsv", 'name\ttext\nx\tone\nthree\t"two\nfour\tfive\nsix\tseven"\ny\teight\n', "lines 3 to 5"),
        ("a.csv", 'text,label\nx,mild\n"a,mild\nb",mild\ny,harsh\n', "lines 3 to 4"),
        ("a.csv", 'label,text\nmild,x\nharsh,"a\nmild,b"\n', "lines 3 to 4"),
        ("a.csv", 'id,text\n1,x\n2,"a\n3,b\n4,c"\n5,y\n', "lines 3 to 5"),
    ],
)
def test_a_stray_quote_swallows_no_rows(put: Put, name: str, rows: str, lines: str) -> None:
    message = complaint(put(name, rows))
    assert lines in message
    assert "what looks like" in message and 'write each quote in it twice ("")' in message


@pytest.mark.parametrize(
    "rows",
    [
        'text,label\n"Dear Sir,\nI write, and wait",mild\nx,harsh\n',
        'text,label\n"one\ntwo",mild\n"three\nfour",harsh\n',
        'id,text\n1,"a\nb, c"\n2,"x, y\nz"\n',
        'text,more\n"a, b\nc",d\n"e, f\ng",h\n',
    ],
)
def test_cells_of_several_lines_are_read(put: Put, rows: str) -> None:
    assert len(read_table(put("a.csv", rows))) == 2


# --- shapes of JSON ---


@pytest.mark.parametrize(
    "text",
    [
        '{"text": ["a", "b"], "label": [1, 0]}',
        '{\n "text": ["a", "b"],\n "label": [1, 0]\n}',
        '{"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 0}}',
        '[\n {\n  "text": "a",\n  "label": 1\n },\n {\n  "text": "b",\n  "label": 0\n }\n]',
        '{\n "version": "1",\n "data": [\n  {"text": "a", "label": 1},\n  {"text": "b", "label": 0}\n ]\n}',
        '{"columns": ["text", "label"], "index": [0, 1], "data": [["a", 1], ["b", 0]]}',
        '{"columns": ["text", "label"], "data": [["a", 1], ["b", 0]]}',
    ],
)
def test_json_of_several_shapes(put: Put, text: str) -> None:
    assert read_table(put("a.json", text)).columns == {"text": ["a", "b"], "label": [1, 0]}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{"text": ["a"], "label": [1, 0]}', "different lengths: text 1, label 2"),
        ("a.json", '{"text": {"0": "a"}, "label": {"1": 1}}', "'text' and 'label' have other keys"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "lists of objects at train, test"),
        ("a.json", '{\n "a": 1\n}', "one object with the keys a; expected a list"),
        ("a.json", "5", "a.json is 5, expected a list"),
        ("a.json", '{"columns": ["text"], "data": [["a"], ["b", 0]]}', 'row 2 of data is ["b", 0], expected a list'),
        ("a.json", '{"columns": 5, "data": [["a"]]}', "columns is 5, expected a list of names"),
        ("a.json", '{"text": [], "label": []}', "no rows"),
        ("a.jsonl", '[\n {"a": 1}\n]', "one JSON value over 3 lines, not one a line; name it .json"),
        (
            "a.jsonl",
            '[{"a": 1}, {"a": 2}]',
            "one list of objects, not an object a line; name it .json, or give --format json",
        ),
    ],
)
def test_json_of_other_shapes(put: Put, name: str, text: str, expected: str) -> None:
    assert expected in complaint(put(name, text))
