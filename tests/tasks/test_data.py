from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes one file of a fresh folder."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def complaint(source: str | Path, split: str | None = None) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises(TanzakuError) as caught:
        read_table(source, split)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# --- what is read ---


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1), suffix=st.sampled_from([".tsv", ".csv"]))
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
    """A folder that ``datasets`` reads as two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "poems"
    data.mkdir()
    (data / "train.csv").write_text("text,label\na,1\nb,0\n")
    (data / "test.csv").write_text("text,label\nc,1\n")
    return data


def test_a_folder_is_a_dataset(folder: Path) -> None:
    assert read_table(f"{folder}:train").columns == {"text": ["a", "b"], "label": [1, 0]}
    assert read_table(folder, split="test").columns == {"text": ["c"], "label": [1]}
    assert read_table(f"{folder}:test", split="test").source == f"{folder}:test"


def test_a_single_split_needs_no_name(folder: Path) -> None:
    (folder / "test.csv").unlink()
    assert len(read_table(folder)) == 2


def test_splits_to_choose_from(folder: Path) -> None:
    message = complaint(folder)
    assert "train, test" in message
    assert f"{folder}:train" in message


def test_unknown_split(folder: Path) -> None:
    message = complaint(f"{folder}:trian")
    assert "trian" in message
    assert "'train', 'test'" in message


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


@pytest.mark.parametrize("codec", ["cp932", "euc_jp", "utf-16", "cp1252"])
def test_other_encodings_are_named(put: Put, codec: str) -> None:
    text = "text\tlabel\nfoo\t1\né\t0\n" if codec == "cp1252" else "text\tlabel\nfoo\t1\n古池や、蛙\t0\n"
    message = complaint(put("a.tsv", text.encode(codec)))
    assert f"decodes as {codec}" in message
    assert "iconv" in message
    assert ("line 1, byte 1" if codec == "utf-16" else "line 3, byte 1;") in message


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
    monkeypatch.setattr("tanzaku.tasks.data._LONGEST_FIELD", 10)
    message = complaint(put("a.tsv", "text\nfoo\n" + "a" * 11 + "\n"))
    assert "line 3: field larger than field limit (10)" in message


@pytest.mark.parametrize(
    ("name", "header", "expected"),
    [
        ("a.tsv", "text\ttext", "2 columns named 'text'"),
        ("a.csv", "text,,label", "column 2 of"),
        ("a.csv", '"te\nxt",label', r"'te\nxt'"),
        ("a.csv", "\ntext,label", "line 1 is blank"),
        ("a.csv", "text\tlabel", r"separated by '\t'; expected ','"),
        ("a.csv", "text;label", "separated by ';'; expected ','"),
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
        ("[" * 100_000, 1, "recursion"),
        ('{"a": ' + "1" * 5000 + "}", 1, "4300"),
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
