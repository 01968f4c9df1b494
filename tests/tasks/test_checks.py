from __future__ import annotations

import io
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import pytest

from tanzaku.errors import TanzakuError
from tanzaku.tasks.checks import findings
from tanzaku.tasks.classification import Classification, ClassificationSettings
from tanzaku.tasks.data import Table
from tanzaku.tasks.labels import spelling
from tanzaku.tasks.multilabel import Multilabel, MultilabelSettings
from tanzaku.tasks.prepare import open_tables, read_tables
from tanzaku.tasks.settings import Check, TextSettings

TASK = Classification(("0", "1"))
SETTINGS = ClassificationSettings(train="train.tsv")
GOOD = [("春の雨", "0"), ("夏の海", "1"), ("秋の風", "0"), ("冬の星", "1")]


def table(rows: list[tuple[Any, ...]], source: str = "train.tsv", names: tuple[str, ...] = ("text", "label")) -> Table:
    return Table({name: [row[at] for row in rows] for at, name in enumerate(names)}, source)


def found(train: list[tuple[Any, ...]], folded: bool = False, **others: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
    tables = {"train": table(train)} | {name: table(rows, f"{name}.tsv") for name, rows in others.items()}
    return [(each.check, str(each)) for each in findings(tables, TASK, SETTINGS, folded)]


def test_nothing_is_said_of_good_rows() -> None:
    assert found(GOOD, valid=[("朝の光", "0")], test=[("夜の闇", "1")], folded=True) == []


# --- rows that are there twice ---


@pytest.mark.parametrize("text", ["春の雨", " 春の雨\n", "春の雨\u3000"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_rows_in_two_splits(split: str, text: str) -> None:
    [(check, line)] = found(GOOD, **{split: [("朝の光", "0"), (text, "0")]})
    title = {"valid": "validation", "test": "test"}[split]
    assert check == "duplicates-across-splits"
    assert (
        f"1 of the 2 {title} rows ({split}.tsv) are also training rows (train.tsv); the first: row 2 is row 1" in line
    )
    assert "--allow duplicates-across-splits" in line


def test_case_and_width_make_no_other_row() -> None:
    [(check, line)] = found([("Ｒain ｱ", "0"), ("sea", "1")], valid=[("rAIN  ア", "0")])
    assert (check, "row 1 is row 1" in line) == ("duplicates-across-splits", True)


def test_each_pair_of_splits_is_told() -> None:
    lines = [line for _, line in found(GOOD, valid=GOOD, test=GOOD)]
    assert ["validation rows" in line.split(" are also ")[1] for line in lines] == [False, False, True]
    assert [line.split(" rows (")[0] for line in lines] == [
        "4 of the 4 validation",
        "4 of the 4 test",
        "4 of the 4 test",
    ]


def test_a_pair_is_a_row_by_both_texts() -> None:
    settings = ClassificationSettings(train="train.tsv", text_pair="pair")
    names = ("text", "pair", "label")
    tables = {"train": table([("a", "b", "0"), ("c", "d", "1")], names=names)}
    for pair, number in (("x", 0), ("b", 1)):
        every = {**tables, "valid": table([("a", pair, "0")], "valid.tsv", names)}
        assert len(list(findings(every, replace(TASK, text_pair="pair"), settings))) == number


def test_repeated_rows_are_a_note_and_across_folds_an_error() -> None:
    repeated = [*GOOD, GOOD[1]]
    [(check, line)] = found(repeated)
    assert check is None
    assert "repeated rows in train.tsv: 1 of 5; the first: row 5 repeats row 2" in line
    [(check, line)] = found(repeated, folded=True)
    assert check == "duplicates-across-folds"
    assert "drop the repeated rows; where they are allowed, those of one text stay in one fold" in line
    assert "if it is meant, pass --allow duplicates-across-folds" in line
    assert [check for check, _ in found(GOOD, valid=[("a", "0"), ("a", "0")], folded=True)] == [
        "duplicates-across-folds"
    ]
    assert [check for check, _ in found(GOOD, test=[("a", "0"), ("a", "0")], folded=True)] == [None]


def test_one_text_under_two_labels() -> None:
    notes = found([*GOOD, ("春の雨", "1")])
    assert notes[0] == (
        None,
        "texts with more than one label in train.tsv: 1; the first: row 1 is '0' and row 5 is '1'",
    )


# --- labels ---


@pytest.mark.parametrize(
    ("labels", "check"),
    [
        ([f"{n / 8:.3f}" for n in range(8)], "labels-numeric"),
        ([n / 8 + 0.01 for n in range(8)], "labels-numeric"),
        ([f"{n}e-3" for n in range(1, 12)], "labels-numeric"),
        ([str(n) for n in range(11)], "labels-numeric"),
        ([f"text {n}" for n in range(11)], "labels-many"),
    ],
)
def test_as_many_labels_as_rows(labels: list[Any], check: str) -> None:
    [(found_check, line)] = found([(f"row {n}", label) for n, label in enumerate(labels)])
    assert found_check == check
    assert f"{len(labels)} different" in line and f"in {len(labels)} rows" in line


def test_swapped_columns_are_named() -> None:
    swapped = [(str(n % 2), f"text {n}") for n in range(12)]
    assert "--text and --label may be swapped" in found(swapped)[0][1]


def test_few_or_frequent_labels_are_no_measurements() -> None:
    assert found([("a", "0.5"), ("b", "1.5")]) == []
    assert found([(f"row {n}", str(n % 10)) for n in range(20)]) == []
    assert found([(f"row {n}", f"class {n % 50}") for n in range(100)]) == []


@pytest.mark.parametrize("word", ["NaN", "nan", "#N/A", "null", "None", "N/A", "#VALUE!"])
def test_words_that_say_no_label(word: str) -> None:
    [(check, line)] = found([*GOOD, ("朝の光", word)])
    assert check == "labels-missing"
    assert f"the label {word!r} in 1 of 5 rows, first in row 5" in line


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("1", "１"),
        ("1", "1.0"),
        ("Good", "good"),
        ("good one", "good  one"),
        ("ｱ", "ア"),
        ("True", "TRUE"),
        ("0", "-0.0"),
        ("1", "01"),
    ],
)
def test_one_label_in_two_spellings(one: str, two: str) -> None:
    rows = [("a", one), ("b", "other"), ("c", two), ("d", one)]
    [(check, line)] = found(rows)
    assert check == "label-spellings"
    assert f"{one!r} (row 1), {two!r} (row 3): write it in one way" in line
    assert spelling(one) == spelling(two) != spelling("other")


def test_long_numbers_are_not_one_label_for_a_floats_sake() -> None:
    assert found([("a", 2**63), ("b", 2**63 + 1), ("c", 2**63), ("d", 2**63 + 1)]) == []


@pytest.mark.parametrize(("known", "value"), [("True", "TRUE"), ("False", "false"), ("0.0", "0"), ("1", "１")])
def test_labels_of_another_spelling_are_refused_with_the_known_one(tmp_path: Path, known: str, value: str) -> None:
    (tmp_path / "train.tsv").write_text(f"text\tlabel\na\t{known}\nb\tother\n", encoding="utf-8")
    (tmp_path / "valid.tsv").write_text(f"text\tlabel\nc\t{value}\n", encoding="utf-8")
    settings = ClassificationSettings(train=str(tmp_path / "train.tsv"), valid=str(tmp_path / "valid.tsv"))
    with pytest.raises(TanzakuError, match=f"label '{value}' .* write it '{known}', as in training"):
        read_tables(Classification, settings)


# --- what is done with it ---


@pytest.fixture
def odd(tmp_path: Path) -> dict[Check, TextSettings]:
    """Of each check, rows that it stops."""

    def write(name: str, rows: list[tuple[str, str]]) -> str:
        path = tmp_path / f"{name}.tsv"
        path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
        return str(path)

    good = write("good", GOOD)
    rows: dict[str, list[tuple[str, str]]] = {
        "duplicates-across-folds": [*GOOD, GOOD[0]],
        "labels-numeric": [(f"row {n}", f"{n / 8}") for n in range(8)],
        "labels-many": [(f"row {n}", f"label {n}") for n in range(12)],
        "labels-missing": [*GOOD, ("a", "null")],
        "label-spellings": [("a", "x"), ("b", "X"), ("c", "y")],
    }
    settings: dict[Any, TextSettings] = {
        name: ClassificationSettings(train=write(name, each)) for name, each in rows.items()
    }
    settings["duplicates-across-splits"] = ClassificationSettings(train=good, test=good)
    many = write("many", [("a", "x|y"), ("b", "y"), ("c", "x|z")])
    settings["labels-separator"] = MultilabelSettings(train=many)
    return settings


@pytest.mark.parametrize("check", get_args(Check))
def test_a_check_stops_unless_it_is_allowed(odd: dict[Check, TextSettings], check: Check) -> None:
    kind: Any = Multilabel if isinstance(odd[check], MultilabelSettings) else Classification
    with pytest.raises(TanzakuError, match=f"pass --allow {check}"):
        read_tables(kind, odd[check], folded=True)
    allowed = odd[check].model_copy(update={"allow": [check]})
    task: Any = read_tables(kind, allowed, folded=True).task
    assert isinstance(task, kind) and len(task.labels) >= 2


def test_notes_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text;label\na;0\na;1\n", encoding="utf-8")
    notes: list[str] = []
    read_tables(Classification, ClassificationSettings(train=str(tmp_path / "train.csv")), note=notes.append)
    assert len(notes) == 3
    assert "semicolons" in notes[0] and "more than one label" in notes[1] and "repeat" in notes[2]


@pytest.mark.parametrize("columns", [{"label": "text"}, {"text_pair": "text"}, {"text_pair": "label"}])
def test_one_column_has_one_part(columns: dict[str, str]) -> None:
    with pytest.raises(TanzakuError, match=r"both name the column '(text|label)'; expected one column for each"):
        open_tables(Classification, ClassificationSettings(train="train.tsv", **columns))


def test_texts_are_checked_before_a_tokenizer_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": null, "label": 1}\n', encoding="utf-8")
    with pytest.raises(TanzakuError, match="row 2: column 'text' has no text"):
        open_tables(Classification, ClassificationSettings(train=str(tmp_path / "train.jsonl")))


def test_standard_input_is_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TanzakuError, match="can be read once"):
        open_tables(Classification, ClassificationSettings(train="-", valid="-"))
    (tmp_path / "valid.tsv").write_text("text\tlabel\nc\t0\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text,label\na,0\nb,1\n")))
    read = open_tables(Classification, ClassificationSettings(train="-", valid=str(tmp_path / "valid.tsv")))
    assert [len(each) for each in read.tables.values()] == [2, 1]


def test_the_bundled_poems_pass() -> None:
    poems = Path(str(resources.files("tanzaku"))) / "data" / "poems"
    splits = {split: str(poems / f"{split}.tsv") for split in ("train", "valid", "test")}
    notes: list[str] = []
    read_tables(Classification, ClassificationSettings(**splits, text="poem"), folded=True, note=notes.append)
    assert notes == []
