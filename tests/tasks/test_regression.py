"""Regression: numbers from cells, the loss, and metrics that are those of scipy and scikit-learn."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_absolute_error, root_mean_squared_error
from torch import nn

from close import assert_close
from tanzaku.errors import TanzakuError
from tanzaku.tasks.cells import number_of
from tanzaku.tasks.data import Table
from tanzaku.tasks.regression import Regression, RegressionSettings
from tanzaku.tasks.task import Example, Records

DATA = RegressionSettings(train="train.tsv")


def table(*numbers: Any) -> dict[str, Table]:
    return {"train": Table({"text": [f"text {at}" for at in range(len(numbers))], "label": [*numbers]}, "train.tsv")}


def records(prediction: Any, target: Any, task: Regression | None = None) -> Records:
    own = task or Regression(0.0, 1.0)
    return own.recorded(list(prediction), [Example({}, float(each)) for each in target])


def test_targets_are_standardised() -> None:
    task = Regression.learn(table("1", 2, 3.0, "6"), DATA)
    assert (task.mean, task.deviation) == (3.0, pytest.approx(np.std([1, 2, 3, 6])))
    standard = task.target_tensor([1.0, 2.0, 3.0, 6.0])
    assert_close(standard.mean(), torch.tensor(0.0), scale=1)
    assert_close(standard.std(correction=0), torch.tensor(1.0))


def test_loss_and_records_are_those_of_transformers() -> None:
    """The mean squared error that its models compute with problem_type regression, of standardised targets."""
    task = Regression(2.0, 4.0)
    examples = [Example({"input_ids": [5, 6]}, 10.0), Example({"input_ids": [7]}, -2.0), Example({"input_ids": [8]}, 3)]
    batch = task.collate(examples, 0)
    outputs = SimpleNamespace(logits=torch.tensor([[1.5], [-0.25], [0.5]]))
    expected = nn.MSELoss()(outputs.logits[:, 0], (torch.tensor([10.0, -2.0, 3.0]) - 2) / 4)
    assert_close(task.score(outputs, batch).mean(), expected)
    found = task.records(outputs, batch)
    assert found["prediction"].tolist() == [8.0, 1.0, 4.0]
    assert task.figures(found)["loss"] == pytest.approx(expected.item())
    assert task.figures(task.recorded(task.predictions(found), examples)) == pytest.approx(task.figures(found))
    unknown = task.collate([Example({"input_ids": [5]})], 0)
    assert not unknown.targets and task.records(SimpleNamespace(logits=torch.zeros(1, 1)), unknown).keys() == {
        "prediction"
    }


numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3).map(lambda value: round(value, 3)))


def expected(prediction: Any, target: Any) -> dict[str, float]:
    varied = len({*prediction}) > 1 and len({*target}) > 1
    return {
        "mae": mean_absolute_error(target, prediction),
        "rmse": root_mean_squared_error(target, prediction),
        "pearson": stats.pearsonr(prediction, target).statistic if varied else math.nan,
        "spearman": stats.spearmanr(prediction, target).statistic if varied else math.nan,
    }


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12), st.integers(0, 2**31))
def test_metrics_are_those_of_the_libraries(pairs: list[tuple[float, float]], seed: int) -> None:
    prediction, target = (np.array(column) for column in zip(*pairs, strict=True))
    varies = min(np.ptp(prediction) / max(1.0, abs(prediction).max()), np.ptp(target) / max(1.0, abs(target).max()))
    if 0 < varies < 1e-6:
        return  # rounding decides
    rows = records(prediction, target)
    counts = np.random.default_rng(seed).multinomial(len(target), np.full(len(target), 1 / len(target)), 3).T
    for metric in Regression.metrics[1:]:
        statistics = metric.statistics(rows)
        assert statistics.value() == pytest.approx(expected(prediction, target)[metric.name], nan_ok=True, abs=1e-6)
        for drawn, count in zip(statistics.drawn(counts.astype(float)), counts.T, strict=True):
            again = expected(np.repeat(prediction, count), np.repeat(target, count))[metric.name]
            if math.isnan(again) and metric.name in ("pearson", "spearman"):
                assert math.isnan(drawn)
            else:
                assert drawn == pytest.approx(again, abs=1e-5, rel=1e-6)


def test_no_number_has_no_figure() -> None:
    found = Regression(0.0, 1.0).figures(records([1.0, math.nan, 2.0], [1.0, 2.0, 3.0]))
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("", ["row 2", "no number"]),
        (None, ["row 2", "no number"]),
        ("3,5", ["'3,5'", "after a point"]),
        ("many", ["'many'", "such as 3.5"]),
        ("inf", ["finite"]),
        ("nan", ["finite"]),
        (10**400, ["expected one such as 3.5"]),
        ("1e200", ["less than 1e+100"]),
        (True, ["finite"]),
        ("1_000", ["'1_000'", "such as 3.5"]),
        ("１２", ["such as 3.5"]),
        ([1], ["'[1]'"]),
    ],
)
def test_cells_that_are_no_numbers(value: Any, parts: list[str]) -> None:
    with pytest.raises(TanzakuError) as refused:
        Regression.learn(table(1, value, 3), DATA)
    for part in ("train.tsv row 2", *parts):
        assert part in str(refused.value)


def test_numbers_that_are_all_alike_are_refused() -> None:
    with pytest.raises(TanzakuError, match="only the number 2; expected at least two"):
        Regression.learn(table(2, 2.0, "2"), DATA)
    assert number_of(" 1e3 ", "") == 1000.0


def test_two_numbers_look_like_classes() -> None:
    [found] = Regression.findings(table(0, 1, 1, 0), DATA)
    assert found.check is None and "task classification" in str(found)
    assert not [*Regression.findings(table(0, 1, 2), DATA)]


def test_what_is_kept_makes_the_task_again() -> None:
    task = Regression(1.5, 2.5, "a", "b")
    assert Regression.from_json(task.to_json(), "") == task
    for change in ({"mean": None}, {"mean": math.inf}, {"deviation": 0}, {"deviation": "x"}, {"text": None}):
        with pytest.raises(TanzakuError, match=f"here: {next(iter(change))} is"):
            Regression.from_json(task.to_json() | change, "here: ")


def test_a_run_that_learns_nothing_is_told_of() -> None:
    task = Regression(0.0, 1.0)
    assert "did not learn" in task.doubts([{"valid": {}, "loss": 0.97}], [])[0]
    assert task.doubts([{"valid": {}, "loss": 0.97}, {"valid": {}, "loss": 0.5}], []) == []
