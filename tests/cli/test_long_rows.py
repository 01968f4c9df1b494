"""Rows of more than `max_length` tokens: the run stops, or they are cut, or left out, and it is said of how many."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Tanzaku, assert_refused, results_of

SHORT = ["warm rain", "a cold wind", "warm sea", "cold sea", "spring rain", "winter wind"]
LONG = "the warm rain of spring and a cold wind of winter"


@pytest.fixture
def rows(work: Path) -> None:
    """Of each split, with rows 1 and 4 of training, 2 of validation and 3 of test that are too long."""
    for split, at in {"train": [0, 3], "valid": [1], "test": [2]}.items():
        texts = [{"train": "", "valid": "the ", "test": "a "}[split] + text for text in SHORT]
        for row in at:
            texts.insert(row, f"{split} {LONG}" + " sea" * row)
        lines = [
            json.dumps({"prompt": text, "completion": " warm", "counts": 0 if LONG in text else 1 + row % 2}) + "\n"
            for row, text in enumerate(texts)
        ]
        Path(f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = Path("recipe.yaml").read_text(encoding="utf-8").replace(".tsv", ".jsonl")
    recipe = recipe.replace("data: {", "task: generation\ndata: {max_new_tokens: 3, ")
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")


def without_long() -> None:
    for split in ("train", "valid", "test"):
        path = Path(f"{split}.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if LONG not in line), encoding="utf-8")


@pytest.mark.parametrize("by", ["flag", "recipe"])
def test_they_are_left_out_and_told_of(rows: None, tanzaku: Tanzaku, by: str) -> None:
    flags = ["--too-long", "drop"] if by == "flag" else []
    if by == "recipe":
        text = Path("recipe.yaml").read_text(encoding="utf-8").replace("data: {", "data: {too_long: drop, ")
        Path("recipe.yaml").write_text(text, encoding="utf-8")
    said = tanzaku("train", "recipe.yaml", *flags, "--out", "run")
    assert said.code == 0, said.err
    for line in (
        r"2 of 8 training rows \(.*train.jsonl\) have more than 8 tokens and are left out$",
        r"1 of 7 validation rows \(.*valid.jsonl\) have more than 8 tokens and are left out$",
        r"1 of 7 test rows \(.*test.jsonl\) .* are left out; test figures are of the others alone$",
    ):
        assert re.search(line, said.out, re.MULTILINE), said.out
    results = results_of(Path("run"))
    assert results["data"]["rows"] == {"train": 6, "valid": 6, "test": 6}
    assert results["data"]["dropped"] == {"train": 2, "valid": 1, "test": 1}
    without_long()
    again = tanzaku("train", "recipe.yaml", "--out", "plain")
    assert again.code == 0, again.err
    [found], [expected] = results["jobs"], results_of(Path("plain"))["jobs"]
    assert found["test"] == pytest.approx(expected["test"]) and found["valid"] == pytest.approx(expected["valid"])


def test_weights_stay_those_of_their_rows(rows: None, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--too-long", "drop", "--weight", "counts", "--out", "run")
    assert said.code == 0, said.err
    without_long()
    said = tanzaku("train", "recipe.yaml", "--weight", "counts", "--out", "plain")
    assert said.code == 0, said.err
    losses: list[Any] = [
        [epoch["train_loss"] for epoch in results_of(Path(out))["jobs"][0]["epochs"]] for out in ("run", "plain")
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_the_rows_that_are_shown_are_those_that_are_left(rows: None, tanzaku: Tanzaku, model_dir: Path) -> None:
    said = tanzaku("train", "recipe.yaml", "--too-long", "drop", "--show", "2", "--out", "run")
    assert said.code == 0 and "warm|rain|[[warm|</s>]]" in said.out and "|of|" not in said.out, said.out + said.err
    said = tanzaku("check", "recipe.yaml", "--too-long", "drop", "--model", model_dir)
    assert "left out above 8" in said.out and re.search(r"training +8 .* 2 ", said.out), said.out


def test_a_comparison_numbers_rows_as_their_file_does(rows: None, tanzaku: Tanzaku) -> None:
    flags = ["--too-long", "drop", "--workers", "1", "--seeds", "1", "--sample", "2"]
    said = tanzaku("compare", "recipe.yaml", *flags, "--out", "run")
    assert said.code == 0, said.err
    assert results_of(Path("run"))["rows"]["numbers"] == [1, 2, 4, 5, 6, 7]
    assert "rows that were left out" in Path("run/report.html").read_text(encoding="utf-8")


def test_it_is_an_error_where_nobody_says_what_to_do_or_nothing_is_left(rows: None, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert_refused(said, "2 of 8 rows of", "the first 1 with 14", "--max-length 17", "--too-long drop")
    said = tanzaku("train", "recipe.yaml", "--too-long", "drop", "--max-length", "2", "--out", "run")
    assert_refused(said, "all 8 rows of", "train.jsonl have more than 2 tokens", "allow more")
    assert_refused(tanzaku("train", "recipe.yaml", "--too-long", "leave"), "--too-long", "drop")
