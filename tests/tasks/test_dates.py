"""The bundled dates: what a script writes, in phrases and at moments that no other split has."""

from __future__ import annotations

import csv
import re
from datetime import datetime
from pathlib import Path

import pytest
from bench import spoken_dates

DATES = Path(__file__).parents[2] / "src" / "tanzaku" / "data" / "dates"
TIME = (
    r"(?:朝の?|午前|お昼の|午後|夕方の?|夜の?)?[\d〇一二三四五六七八九十]+時(?:半|[\d〇一二三四五六七八九十]+分)?|正午"
)
DAY = rf"[\d〇一二三四五六七八九十]+月[\d〇一二三四五六七八九十]+日|{'|'.join(spoken_dates.DAYS.values())}"


def table(split: str) -> list[tuple[str, str]]:
    with (DATES / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        header, *body = csv.reader(file, delimiter="\t", strict=True)
    assert header == ["prompt", "completion"]
    return [(prompt, completion) for prompt, completion in body]


@pytest.mark.parametrize("split", spoken_dates.ROWS)
def test_the_files_are_what_the_script_writes(split: str) -> None:
    raw = (DATES / f"{split}.tsv").read_bytes()
    assert raw == spoken_dates.text_of(spoken_dates.rows()[split]).encode()
    assert len(table(split)) == spoken_dates.ROWS[split]


def phrase_of(prompt: str) -> str:
    """The sentence, without what was put into it."""
    return re.sub(TIME, "T", re.sub(DAY, "D", prompt, count=1), count=1)


def test_test_rows_are_said_otherwise_and_no_moment_is_said_twice() -> None:
    phrases = {split: {phrase_of(prompt) for prompt, _ in table(split)} for split in spoken_dates.ROWS}
    assert phrases["valid"] <= phrases["train"] and len(phrases["train"]) == len(spoken_dates.KNOWN)
    assert not phrases["test"] & phrases["train"] and len(phrases["test"]) == len(spoken_dates.HELD_OUT)
    moments = [completion for split in spoken_dates.ROWS for _, completion in table(split)]
    assert len({*moments}) == len(moments)


def number(text: str) -> int:
    """A number below 100, read anew: `十` is ten, and what stands before it counts it."""
    if text.isascii():
        return int(text)
    tens, ten, ones = text.rpartition("十")
    digits = "〇一二三四五六七八九"
    return (10 * (digits.index(tens) if tens else 1) if ten else 0) + (digits.index(ones) if ones else 0)


@pytest.mark.parametrize("split", spoken_dates.ROWS)
def test_what_is_to_be_written_is_what_is_said(split: str) -> None:
    names = {name: day for day, name in spoken_dates.DAYS.items()}
    for prompt, completion in table(split):
        at = datetime.strptime(f"2026-{completion}", "%Y-%m-%dT%H:%M")
        found = re.search(DAY, prompt)
        assert found, prompt
        day = names.get(found[0]) or tuple(number(part) for part in re.findall(r"[^月日]+", found[0]))
        assert day == (at.month, at.day), prompt
        said = re.search(TIME, prompt.replace(found[0], ""))
        assert said, prompt
        if said[0] == "正午":
            assert (at.hour, at.minute) == (12, 0)
            continue
        part, hour, minute = re.fullmatch(r"(\D*?の?)([\d〇一二三四五六七八九十]+)時(.*)", said[0]).groups()  # type: ignore[union-attr]
        later = part.rstrip("の") in ("午後", "夕方", "夜")
        assert (number(hour) + 12 * later, {"": 0, "半": 30}.get(minute) or number(minute.rstrip("分") or "〇")) == (
            at.hour,
            at.minute,
        ), prompt
