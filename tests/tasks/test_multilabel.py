"""Multi-label classification: labels from cells, the loss, metrics that are scikit-learn's, and thresholds."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn import metrics
from torch import nn

from close import assert_close
from tanzaku.errors import TanzakuError
from tanzaku.tasks.data import Table
from tanzaku.tasks.losses import focal
from tanzaku.tasks.multilabel import Multilabel, MultilabelSettings
from tanzaku.tasks.task import Batch, Example, Records, metric_named

Array = np.ndarray[Any, np.dtype[Any]]
TASK = Multilabel(("a", "b", "c"))


def data(**given: Any) -> MultilabelSettings:
    return MultilabelSettings(train="train.tsv", **given)


def table(*labels: Any, source: str = "train.tsv") -> Table:
    return Table({"text": [f"text {at}" for at in range(len(labels))], "label": [*labels]}, source)


def learned(*labels: Any, **given: Any) -> tuple[tuple[str, ...], list[list[int]]]:
    task = Multilabel.learn({"train": table(*labels)}, data(**given))
    return task.labels, task.targets_in(table(*labels), data(**given))


def refused(message: str) -> Any:
    return pytest.raises(TanzakuError, match=message)


# --- cells ---


@pytest.mark.parametrize(
    "cells",
    [
        (["b", "a"], [], ["c"]),
        ('["b", "a"]', "[]", '["c"]'),
        ("b,a", "", "c"),
        (" b , a,b ", "  ", "c,"),
        (("a", "b"), (), "c"),
    ],
)
def test_labels_of_a_row(cells: tuple[Any, ...]) -> None:
    assert learned(*cells) == (("a", "b", "c"), [[0, 1], [], [2]])


def test_separators_and_numbers() -> None:
    assert learned("b|a, x", "c", separator="|") == (("a, x", "b", "c"), [[0, 1], [2]])
    assert learned([10, 9.0], ["2"], []) == (("2", "9", "10"), [[1, 2], [0], []])


@pytest.mark.parametrize("yes, no", [("1", "0"), (1, 0), (True, False), (1.0, 0.0), ("TRUE", "false")])
def test_a_column_for_each_label(yes: Any, no: Any) -> None:
    columns = {"text": ["x", "y"], "toxic": [yes, no], "mild": [yes, yes]}
    own = data(label_columns=["toxic", "mild"])
    task = Multilabel.learn({"train": Table(columns, "train.tsv")}, own)
    assert task.labels == ("toxic", "mild") and task.targets_in(Table(columns, ""), own) == [[0, 1], [1]]
    assert Multilabel.targets(Table(columns, ""), own) == ["mild, toxic", "mild"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a,b", None], r"^train.tsv row 2 has no labels; write \[\]"),
        (["a,b", math.nan], "row 2 has no labels"),
        (["a,b", "['a']"], "row 2 are .*as JSON writes it"),
        (["a,b", ["a", ["b"]]], "the label in train.tsv row 2 is a list"),
        (["a,b", ["a", ""]], "row 2 has no label"),
        (["a", "a"], "has only the label 'a'; expected at least two"),
        (["", ""], "has no labels"),
        ([[0, 1, 1], [0, 0, 1]], "'label' of train.tsv has 3 zeros and ones in each row.*--label-columns"),
    ],
)
def test_what_has_no_labels_is_refused(cells: list[Any], message: str) -> None:
    with refused(message):
        learned(*cells)


def test_labels_that_training_has_not() -> None:
    with refused("label 'B' in valid.tsv row 1 is not among the training labels a, b; write it 'b'"):
        Multilabel.learn({"train": table("a,b"), "valid": table("B", source="valid.tsv")}, data())
    for cell, found in (("2", "'2'"), ("", "nothing"), (None, "nothing"), (0.5, "0.5")):
        columns = Table({"text": ["x", "y"], "a": ["1", cell], "b": ["0", "0"]}, "train.tsv")
        with refused(f"^train.tsv row 2: column 'a' holds {found}, expected 0 or 1"):
            Multilabel.learn({"train": columns}, data(label_columns=["a", "b"]))
    with refused("no column 'd'.*--label-columns"):
        Multilabel.learn({"train": columns}, data(label_columns=["a", "d"]))
    with refused("names a alone"):
        Multilabel.learn({"train": columns}, data(label_columns=["a"]))


def test_what_is_odd_is_said() -> None:
    def said(*labels: Any, **given: Any) -> list[tuple[str | None, str]]:
        return [(each.check, each.text) for each in Multilabel.findings({"train": table(*labels)}, data(**given))]

    assert said("a,b", "b", "c") == said(["a", "b"], [], ["c"]) == []
    [(check, text)] = said("a|b", "b", "a|c")
    assert check == "labels-separator" and "'|' in 2 of them, such as 'a|b'" in text and "--separator" in text
    assert "task classification" in said("a", "b", "c")[0][1]
    assert said("a,b", "", " ") == [
        (None, "column 'label' of train.tsv is blank in 2 of 3 rows, which are read as having no label")
    ]
    assert [check for check, _ in said("a,A", "b,n/a")] == ["labels-missing", "label-spellings"]
    marks = Table({"text": ["x", "y"], "a": ["1", "1"], "b": ["0", "1"]}, "train.tsv")
    [found] = Multilabel.findings({"train": marks}, data(label_columns=["a", "b"]))
    assert "every training row has the label 'a'" in str(found)


@pytest.mark.parametrize("value", ["0", "1", "most", "", "nan", True])
def test_thresholds_are_shares(value: Any) -> None:
    with pytest.raises((ValidationError, TanzakuError)):
        data(thresholds=value)
    assert data(thresholds=0.3).thresholds == "0.3" and data(thresholds="tuned").thresholds == "tuned"


# --- the loss ---


def rows(targets: Any, focus: float = 0.0) -> Batch:
    examples = [Example({"input_ids": [5]}, [*np.nonzero(each)[0].tolist()], focal=focus) for each in targets]
    return TASK.collate(examples, 0)


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
TARGETS = np.array([[1, 0, 1], [0, 0, 0]])


def test_loss_is_transformers() -> None:
    """Its mean over rows and labels, with problem_type multi_label_classification."""
    batch, outputs = rows(TARGETS), SimpleNamespace(logits=LOGITS)
    expected = nn.BCEWithLogitsLoss()(LOGITS, torch.from_numpy(TARGETS).float())
    assert_close(TASK.score(outputs, batch).mean(), expected)
    assert TASK.figures(TASK.records(outputs, batch))["loss"] == pytest.approx(expected.item())
    assert TASK.model_settings()["problem_type"] == "multi_label_classification"


def test_focal_loss_counts_each_label() -> None:
    each = nn.BCEWithLogitsLoss(reduction="none")(LOGITS, torch.from_numpy(TARGETS).float())
    batch = rows(TARGETS, focus=2.0)
    found = TASK.score(SimpleNamespace(logits=LOGITS), batch)
    assert_close(found, focal(each, batch).mean(dim=1))
    assert_close(found, (each * (1 - torch.exp(-each)) ** 2).mean(dim=1))


# --- metrics ---


def records(probabilities: Array, targets: Array, task: Multilabel = TASK) -> Records:
    predictions = [{"probabilities": row, "predicted": [], "loss": 0.0} for row in probabilities.tolist()]
    return task.decided(task.recorded(predictions, [Example({}, np.nonzero(row)[0].tolist()) for row in targets]))


def by_scikit_learn(truth: Array, scores: Array, given: Array) -> dict[str, float]:
    known = [at for at in range(truth.shape[1]) if 0 < truth[:, at].sum() < len(truth)]
    return {
        "micro_f1": metrics.f1_score(truth, given, average="micro"),
        "macro_f1": metrics.f1_score(truth, given, average="macro", zero_division=np.nan),
        "exact_match": metrics.accuracy_score(truth, given),
        "roc_auc": metrics.roc_auc_score(truth[:, known], scores[:, known], average="macro") if known else math.nan,
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([(), (0.2, 0.5, 0.7)]))
def test_metrics_are_scikit_learns(seed: int, number: int, thresholds: tuple[float, ...]) -> None:
    chance = np.random.default_rng(seed)
    truth = (chance.random((number, 3)) < 0.5).astype(int)
    truth[0] = 1
    scores = np.round(chance.random((number, 3)), 1)  # ties too
    task = Multilabel(("a", "b", "c"), thresholds=thresholds)
    given = (scores >= np.array(thresholds or [0.5] * 3)).astype(int)
    found, expected = task.figures(records(scores, truth, task)), by_scikit_learn(truth, scores, given)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, nan_ok=True), key
    own = task.by_class(records(scores, truth, task))
    shares = metrics.precision_recall_fscore_support(truth, given, zero_division=np.nan)
    for at, figures in enumerate(own.values()):
        assert [*figures.values()][:4] == pytest.approx([each[at] for each in shares], nan_ok=True)


def test_metrics_of_drawn_rows_are_those_of_these_rows() -> None:
    chance = np.random.default_rng(0)
    truth, scores = (chance.random((12, 3)) < 0.4).astype(int), chance.random((12, 3))
    draw = chance.integers(0, 12, 12)
    counts = np.bincount(draw, minlength=12)[:, None].astype(float)
    for name in ("micro_f1", "macro_f1", "exact_match", "roc_auc"):
        statistics = metric_named(TASK, name).statistics
        drawn = statistics(records(scores, truth)).drawn(counts)[0]
        assert drawn == pytest.approx(statistics(records(scores[draw], truth[draw])).value(), nan_ok=True), name


def test_figures_that_are_no_number() -> None:
    none = np.zeros((2, 3))
    found = TASK.figures(records(none, none.astype(int)))
    assert math.isnan(found["micro_f1"]) and math.isnan(found["macro_f1"]) and found["exact_match"] == 1
    found = TASK.figures(records(np.full((2, 3), math.nan), none.astype(int)))
    assert all(math.isnan(found[key]) for key in ("micro_f1", "macro_f1", "exact_match", "roc_auc"))


# --- thresholds ---


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=12))
def test_tuned_thresholds_are_the_best(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([[p / 20, 0, 0] for p, _ in pairs]), np.array([[int(t), 0, 0] for _, t in pairs])
    task = Multilabel(("a", "b", "c"), tuned=True)
    assert task.chooses == "thresholds: tuned" and TASK.chooses is None
    chosen = task.chosen(records(scores, truth, task))
    assert chosen.thresholds[1:] == (0.5, 0.5)  # no row has the label

    def f1(least: float) -> float:
        return float(metrics.f1_score(truth[:, 0], scores[:, 0] >= least, zero_division=0))

    best = max(f1(least) for least in np.arange(-0.025, 1.1, 0.05))
    if not truth.any():
        assert chosen.thresholds[0] == 0.5
        return
    assert f1(chosen.thresholds[0]) == pytest.approx(best)
    if f1(0.5) == pytest.approx(best):
        assert chosen.thresholds[0] == 0.5
    given = chosen.decided(records(scores, truth))["given"]
    assert (given[:, 0] == (scores[:, 0] >= chosen.thresholds[0])).all()


# --- predictions ---


def test_predictions_as_people_and_programs_read_them() -> None:
    task = Multilabel(("a", "b", "c, d"), thresholds=(0.5, 0.9, 0.2))
    found = task.predictions(
        task.records(SimpleNamespace(logits=torch.tensor([[3.0, 1.0, -1.0], [-3.0, 0, -3]])), Batch({}, {}, []))
    )
    assert [each["predicted"] for each in found] == [[0, 2], []] and found[0]["loss"] is None
    said = task.said(found[0], Example({}, (0, 2)))
    assert (said.text, said.right) == ("a, c, d", True) and said.confidence == pytest.approx(1 / (1 + math.e))
    assert task.said(found[1], Example({}, [1])).text == "none" == task.truth(Example({}, []))
    assert task.cells(found[0])[0] == '["a", "c, d"]' and task.cells(found[1])[0] == ""
    assert task.answer(found[0])["predicted"] == ["a", "c, d"]
    assert "b 0.9" in str(task.caution()) and task.left_in_config() == {
        "label_thresholds": {"a": 0.5, "b": 0.9, "c, d": 0.2}
    }
    assert TASK.caution() is None and TASK.left_in_config() == {}


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 2, 0.5], "tuned", [0.5, None, 0.5]])
def test_a_damaged_file_is_refused(thresholds: Any) -> None:
    about = {**TASK.to_json(), "thresholds": thresholds}
    with refused("^x: thresholds is .*expected 3 numbers from 0 to 1"):
        Multilabel.from_json(about, "x: ")
    assert Multilabel.from_json(TASK.to_json(), "") == TASK
