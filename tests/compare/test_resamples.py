"""Folds: each row is measured once, labels have their shares, and no text is on both sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from tanzaku.compare.resamples import resamples
from tanzaku.errors import TanzakuError
from tanzaku.recipe.comparison import Design
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.task import Example, Split, TaskData


def data(rows: list[tuple[str, int]], valid: list[tuple[str, int]] | None = None, **pairs: list[str]) -> TaskData:
    def split(name: str, rows: list[tuple[str, int]]) -> Split:
        examples = [Example({"input_ids": [number]}, label) for number, (_, label) in enumerate(rows)]
        return Split(name, examples, [text for text, _ in rows], 0, f"{name}.tsv", pairs.get(name))

    task = Classification(tuple(map(str, sorted({label for _, label in rows}))))
    return TaskData(split("train", rows), split("valid", valid) if valid else None, None, task, 0)


def test_rows_without_repeats_are_cut_as_scikit_learn_cuts_them() -> None:
    rows = [(f"text {number}", number % 3 // 2) for number in range(31)]
    found = resamples(data(rows), Design(3, 2, 1), seed=5)
    assert [each.name for each in found] == [f"r{repeat}-f{fold}-s5" for repeat in range(2) for fold in range(3)]
    for repeat in range(2):
        cut = StratifiedKFold(3, shuffle=True, random_state=5 + repeat).split(
            np.zeros(31), [label for _, label in rows]
        )
        for each, (train, valid) in zip(found[3 * repeat : 3 * repeat + 3], cut, strict=True):
            assert each.data.train.texts == [rows[row][0] for row in train]
            assert each.data.valid is not None and each.data.valid.texts == [rows[row][0] for row in valid]


def test_rows_of_one_text_stay_in_one_fold() -> None:
    rows = [(f"Text {number}", number % 2) for number in range(12)] * 2
    rows += [("text  3", 0), ("ＴＥＸＴ 4", 0), *[("text 5", 1)] * 5]
    valid = [("text 0", 0), ("another", 1)]
    found = resamples(data(rows, valid), Design(3, 2, 1), seed=0)
    measured: Counter[str] = Counter()
    for each in found:
        train, held = each.data.train, each.data.valid
        assert held is not None and not {*train.keys()} & {*held.keys()}
        assert len(train) + len(held) == len(rows) + len(valid)
        assert {example.target for example in held.examples} == {0, 1}
        measured.update(held.texts)
    assert measured == {text: 2 * count for text, count in Counter(text for text, _ in rows + valid).items()}


def test_a_pair_is_one_text_by_both() -> None:
    rows = [("premise", number % 2) for number in range(12)]
    pairs = [f"hypothesis {number // 2 * 2 + number % 2}" for number in range(12)]
    found = resamples(data(rows, train=pairs), Design(3, 1, 1), seed=0)
    for each in found:
        assert each.data.valid is not None and each.data.valid.seconds is not None
        assert len(each.data.valid.seconds) == len(each.data.valid) == 4
    same = replace(found[0].data, train=replace(data(rows).train, seconds=["the same"] * 12), valid=None)
    with pytest.raises(TanzakuError, match="label '1' has 0 different texts, too few for 3 folds; add rows of it"):
        resamples(same, Design(3, 1, 1), seed=0)


def test_a_label_with_few_texts_is_refused() -> None:
    rows = [(f"text {number}", 0) for number in range(9)] + [("x", 1)] * 4 + [("y", 1)]
    with pytest.raises(
        TanzakuError, match="label '1' has 2 different texts, too few for 3 folds; use --folds 2 or fewer"
    ):
        resamples(data(rows), Design(3, 1, 1), seed=0)
    assert len(resamples(data(rows), Design(2, 1, 1), seed=0)) == 2
    with pytest.raises(TanzakuError, match="label '1' has 1 row, too few for 2 folds; add rows of it, or leave it out"):
        resamples(data(rows[:10]), Design(2, 1, 1), seed=0)


def test_a_text_under_two_labels_counts_for_the_rarer() -> None:
    rows = [(f"text {number}", 0) for number in range(9)] + [("text 0", 1), ("text 1", 1)]
    for each in resamples(data(rows), Design(2, 1, 1), seed=0):
        assert each.data.valid is not None
        assert {example.target for example in each.data.valid.examples} == {0, 1}
