"""What verbs say and refuse of the tables that they are given."""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import pytest
from cli_kit import ROWS, Tanzaku, assert_refused, results_of, write_tsv


def test_encoding_and_format_are_flags_and_keys_of_the_recipe(work: Path, tanzaku: Tanzaku) -> None:
    for name in ("train", "valid", "test"):
        path = work / f"{name}.tsv"
        path.with_suffix(".txt").write_bytes(f"{path.read_text(encoding='utf-8')}東京 {name}\tmild\n".encode("cp932"))
    files = [word for name in ("train", "valid", "test") for word in (f"--{name}", f"{name}.txt")]
    flags = ["--encoding", "cp932", "--format", "tsv"]
    assert_refused(tanzaku("train", "recipe.yaml", *files), "train.txt has no known suffix", "--format")
    assert_refused(tanzaku("train", "recipe.yaml", *files, *flags[2:]), "could be cp932", "--encoding")
    said = tanzaku("train", "recipe.yaml", *files, *flags, "--out", "run")
    assert (said.code, said.err) == (0, "")
    kept = results_of(work / "run")["recipe"]["data"]
    assert (kept["encoding"], kept["format"], kept["allow"]) == ("cp932", "tsv", [])
    recipe = (work / "recipe.yaml").read_text(encoding="utf-8")
    recipe = recipe.replace(".tsv", ".txt").replace("data: {", "data: {encoding: cp932, format: tsv, ")
    (work / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert tanzaku("check", "recipe.yaml").code == 0


def test_what_is_inferred_is_said_beside_the_output(work: Path, tanzaku: Tanzaku) -> None:
    rows = "".join(f"はる {text};{label}\n" for text, label in ROWS)
    (work / "train.csv").write_bytes(f"text;label\n{rows}".encode("euc_jp"))
    said = tanzaku("train", "recipe.yaml", "--train", "train.csv", "--out", "run")
    assert said.code == 0
    assert said.err.splitlines() == [
        "train.csv is read as euc_jp; --encoding overrules it",
        "train.csv is separated by semicolons: read so",
    ]
    (work / "new.csv.gz").write_bytes(gzip.compress((work / "train.csv").read_bytes()))
    said = tanzaku("predict", "run/adapters/lora", "--data", "new.csv.gz")
    assert (said.code, said.out.count("\n")) == (0, 7)
    assert "new.csv.gz is read as euc_jp" in said.err


def test_rows_from_standard_input(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((work / "train.tsv").read_bytes())))
    assert tanzaku("train", "recipe.yaml", "--train", "-", "--out", "run").code == 0
    assert results_of(work / "run")["data"]["rows"]["train"] == 6
    assert_refused(tanzaku("train", "recipe.yaml", "--train", "-", "--valid", "-"), "standard input", "read once")


def test_odd_rows_are_said_before_training(work: Path, tanzaku: Tanzaku) -> None:
    write_tsv(work / "train.tsv", [*ROWS, (ROWS[0][0].upper(), "harsh")])
    said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert said.code == 0
    assert said.err.splitlines() == [
        "texts with more than one label in train.tsv: 1; the first: row 1 is 'mild' and row 7 is 'harsh'",
        "repeated rows in train.tsv: 1 of 7; the first: row 7 repeats row 1",
    ]
