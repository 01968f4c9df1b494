"""The bundled poems: shape, quoting, and no leak between splits."""

import csv
import itertools
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

POEMS = Path(__file__).parents[2] / "src" / "tanzaku" / "data" / "poems"
COUNTS = {
    "train": {"0": 42, "1": 120},
    "valid": {"0": 16, "1": 38},
    "test": {"0": 16, "1": 38},
}
AWKWARD = ('"', "'", ",", "、", "\\", "#", "%", "「", "『", "……", "\u3000", "\n", "!", "?")


def table(split: str) -> list[list[str]]:
    with (POEMS / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", strict=True))


def rows(split: str) -> list[tuple[str, str]]:
    return [(poem, label) for poem, label in table(split)[1:]]


def bigrams(text: str) -> frozenset[str]:
    kept = [c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "PSZC"]
    return frozenset(a + b for a, b in itertools.pairwise(kept))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right)


@pytest.mark.parametrize("split", COUNTS)
def test_header_and_counts(split: str) -> None:
    header, *body = table(split)
    assert header == ["poem", "label"]
    assert all(len(row) == 2 for row in body)
    assert Counter(label for _, label in body) == COUNTS[split]


@pytest.mark.parametrize("split", COUNTS)
def test_file_is_utf8_with_lf_and_writes_back_unchanged(split: str, tmp_path: Path) -> None:
    raw = (POEMS / f"{split}.tsv").read_bytes()
    assert b"\r" not in raw
    assert not raw.startswith(b"\xef\xbb\xbf")
    copy = tmp_path / "copy.tsv"
    with copy.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(table(split))
    assert copy.read_bytes() == raw


@pytest.mark.parametrize("split", COUNTS)
def test_texts_are_short_and_not_empty(split: str) -> None:
    for poem, _ in rows(split):
        assert poem == poem.strip()
        assert 12 <= len(poem) <= 60, poem
        assert bigrams(poem), poem


@pytest.mark.parametrize("split", COUNTS)
def test_labels_are_mixed(split: str) -> None:
    runs = [len(list(group)) for _, group in itertools.groupby(label for _, label in rows(split))]
    assert len(runs) >= 10


def test_no_near_duplicates_within_or_between_splits() -> None:
    grams = [(poem, bigrams(poem)) for split in COUNTS for poem, _ in rows(split)]
    close = [(a, b) for (a, x), (b, y) in itertools.combinations(grams, 2) if jaccard(x, y) >= 0.5]
    assert close == []


def test_openings_vary() -> None:
    openings = Counter((label, poem[:3]) for split in COUNTS for poem, label in rows(split))
    assert max(openings.values()) <= 3


def test_awkward_characters_are_present() -> None:
    poems = [poem for split in COUNTS for poem, _ in rows(split)]
    assert [mark for mark in AWKWARD if not any(mark in poem for poem in poems)] == []
    assert sum("\n" in poem for poem in poems) == 3
    assert any(poem.startswith("#") for poem in poems)
    assert any(poem.startswith('"') for poem in poems)


@pytest.mark.parametrize("split", COUNTS)
def test_every_split_and_class_has_rows_that_break_careless_parsers(split: str) -> None:
    hard = ('"', "'", ",", "\\", "#", "%", "『", "……", "\u3000", "\n", "!", "?")
    found = Counter(label for poem, label in rows(split) if any(mark in poem for mark in hard))
    assert min(found["0"], found["1"]) >= 2
    assert any("\n" in poem for poem, _ in rows(split))
