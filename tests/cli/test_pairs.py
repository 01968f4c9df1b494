"""Rows of two texts: both are read, and both are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_kit import Tanzaku, results_of

PAIRS = [("warm rain", "cold sea", "no"), ("warm rain", "warm sea", "yes"), ("cold wind", "winter", "yes")]
PAIRS += [("cold wind", "spring", "no"), ("the sea", "a sea", "yes"), ("the winter", "the spring", "no")]


@pytest.fixture
def pairs(work: Path) -> Path:
    for split, before in (("train", ""), ("valid", "of "), ("test", "a ")):
        lines = ["text\tlabel\treply", *(f"{before}{one}\t{label}\t{other}" for one, other, label in PAIRS)]
        (work / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return work


def test_a_comparison_shows_both_texts(pairs: Path, tanzaku: Tanzaku) -> None:
    options = ["--text-pair", "reply", "--workers", "1", "--out", "run"]
    said = tanzaku("compare", "recipe.yaml", *options, "--folds", "2")
    assert said.code == 0, said.err
    expected = [[f"a {one}", other] for one, other, _ in PAIRS]
    assert results_of(pairs / "run")["rows"]["texts"] == expected
    page = (pairs / "run/report.html").read_text(encoding="utf-8")
    [data] = re.findall(r'<script[^>]* id="data"[^>]*>(.*?)</script>', page, flags=re.DOTALL)
    assert [row["text"] for row in json.loads(data)["rows"]["texts"]] == ["\n".join(pair) for pair in expected]
    said = tanzaku("compare", "--resume", "--out", "run")
    assert said.code == 0, said.err


def test_predictions_keep_both_texts_and_read_both(pairs: Path, tanzaku: Tanzaku) -> None:
    assert tanzaku("train", "recipe.yaml", "--text-pair", "reply", "--out", "run").code == 0
    [job] = results_of(pairs / "run")["jobs"]
    for name in ("out.tsv", "out.jsonl"):
        said = tanzaku("predict", "run/adapters/lora", "--data", "test.tsv", "--out", name)
        assert said.code == 0, said.err
    head, first, *_ = (pairs / "out.tsv").read_text(encoding="utf-8").splitlines()
    assert head.split("\t")[:4] == ["text", "label", "reply", "predicted"]
    assert first.split("\t")[:3] == ["a warm rain", "no", "cold sea"]
    lines = [json.loads(line) for line in (pairs / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["reply"] for line in lines] == [other for _, other, _ in PAIRS]
    chances = [[*line["probabilities"].values()] for line in lines]
    for found, expected in zip(chances, job["predictions"], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert chances[0] != pytest.approx(chances[1], abs=1e-9)  # the same first text, and another second one
