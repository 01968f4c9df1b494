"""The compare section: what is run of each candidate, and sizes of memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanzaku.errors import TanzakuError
from tanzaku.recipe.comparison import CompareSettings, Design, bytes_of

SIZES = [
    ("8GB", 8 * 10**9),
    ("7.5 GB", 7_500_000_000),
    ("512MiB", 512 * 2**20),
    ("1.5gib", 3 * 2**29),
    ("1TB", 10**12),
    (" 64 kB ", 64_000),
    ("100b", 100),
]


@pytest.mark.parametrize(("text", "count"), SIZES)
def test_bytes(text: str, count: int) -> None:
    assert bytes_of(text) == count
    assert CompareSettings(memory=text).memory == text


@pytest.mark.parametrize("text", ["", "8", "8 G", "GB", "-1GB", "0GB", "0.1b", "1e3MB", "8 giga", "8GB free", "½GB"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(TanzakuError, match="expected a number and a unit, such as 8GB or 512MiB"):
        bytes_of(text)
    with pytest.raises(ValueError, match="such as 8GB"):
        CompareSettings(memory=text)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(["KB", "MB", "GB", "KiB", "MiB", "GiB"]), st.sampled_from(["", " "]))
def test_bytes_grow_with_the_number_and_the_unit(number: int, unit: str, gap: str) -> None:
    assert bytes_of(f"{number}{gap}{unit}") == number * bytes_of(f"1{unit}") == bytes_of(f"{number}.0{unit.lower()}")


def test_what_is_run_of_a_candidate() -> None:
    split, folds = (CompareSettings().design(valid_rows=rows) for rows in (True, False))
    assert (split, split.runs, folds, folds.runs) == (Design(None, 1, 3), 3, Design(5, 1, 1), 5)
    told = CompareSettings(folds=4, repeats=2)
    assert told.design(valid_rows=True) == told.design(valid_rows=False) == Design(4, 2, 1)
    assert CompareSettings(folds=4, repeats=2, seeds=3).design(valid_rows=True).runs == 24
    assert CompareSettings(seeds=2).design(valid_rows=False) == Design(5, 1, 2)


def test_repeats_need_folds() -> None:
    assert CompareSettings(repeats=2).design(valid_rows=False) == Design(5, 2, 1)
    with pytest.raises(TanzakuError, match=r"repeats is 2.*one split; give folds"):
        CompareSettings(repeats=2).design(valid_rows=True)


@pytest.mark.parametrize(
    "field", [name for name in CompareSettings.model_fields if name not in ("memory", "rank_by", "margin")]
)
def test_counts_are_positive(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        CompareSettings.model_validate({field: 0})
