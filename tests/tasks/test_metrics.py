from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor

from tanzaku.errors import TanzakuError
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.metrics import interval_of, wilson_interval
from tanzaku.tasks.task import Batch, Records, metric_named
from task_data import labelled

Array = np.ndarray[Any, np.dtype[Any]]


def refused(message: str) -> Any:
    return pytest.raises(TanzakuError, match=message)


def drawn(classes: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits and labels in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows + classes, classes, generator=generator) * 3
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (rows,), generator=generator)])
    return logits, labels


def task_of(logits: Tensor) -> Classification:
    return Classification(tuple("abcdefg"[: logits.shape[1]]))


def records(logits: Tensor, labels: Tensor) -> Records:
    batch = Batch({}, {"target": labels}, labelled(labels.tolist()))
    return task_of(logits).records(SimpleNamespace(logits=logits), batch)


def figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return task_of(logits).figures(records(logits, labels))


def confusion(logits: Tensor, labels: Tensor) -> list[list[int]]:
    return task_of(logits).confusion(records(logits, labels))


def by_scikit_learn(probabilities: Array, truth: Array) -> dict[str, float]:
    """Of rows in which every class occurs, by probabilities [n, C] and ids [n]."""
    classes, predicted = probabilities.shape[1], probabilities.argmax(1)
    scores = probabilities[:, 1] if classes == 2 else probabilities
    return {
        "loss": metrics.log_loss(truth, probabilities, labels=range(classes)),
        "accuracy": metrics.accuracy_score(truth, predicted),
        "roc_auc": metrics.roc_auc_score(truth, scores, multi_class="ovr", average="macro"),
        "macro_f1": metrics.f1_score(truth, predicted, average="macro"),
    }


@settings(deadline=None)
@given(classes=st.integers(2, 5), rows=st.integers(0, 40), seed=st.integers(0, 10_000))
def test_metrics_are_those_of_scikit_learn(classes: int, rows: int, seed: int) -> None:
    logits, labels = drawn(classes, rows, seed)
    probabilities, truth = logits.double().softmax(1).numpy(), labels.numpy()
    found = figures(logits, labels)
    assert found == pytest.approx(by_scikit_learn(probabilities, truth))
    assert {type(value) for value in found.values()} == {float}
    table = confusion(logits, labels)
    assert table == metrics.confusion_matrix(truth, probabilities.argmax(1)).tolist()
    assert sum(table[label][label] for label in range(classes)) / len(truth) == found["accuracy"]


@settings(deadline=None)
@given(classes=st.integers(2, 5), rows=st.integers(0, 40), seed=st.integers(0, 10_000), ties=st.booleans())
def test_drawn_anew_they_are_those_of_the_rows_drawn(classes: int, rows: int, seed: int, ties: bool) -> None:
    """By sums over the rows, where each class keeps its size; with ties of few different logits, too."""
    logits, labels = drawn(classes, rows, seed)
    if ties:
        logits = logits.div(3).round()
    rng, truth, n = np.random.default_rng(seed), labels.numpy(), len(labels)
    draws = []
    for _ in range(3):
        draw = np.arange(n)
        for label in range(classes):
            own = np.flatnonzero(truth == label)
            draw[own] = rng.choice(own, len(own))
        draws.append(draw)
    counts = np.stack([np.bincount(draw, minlength=n) for draw in draws], axis=1).astype(float)
    own = records(logits, labels)
    expected = [by_scikit_learn(own["probabilities"][draw], truth[draw]) for draw in draws]
    for metric in task_of(logits).metrics:
        found = metric.statistics(own)
        assert found.known
        assert found.drawn(counts) == pytest.approx([each[metric.name] for each in expected])
        assert found.value() == pytest.approx(by_scikit_learn(own["probabilities"], truth)[metric.name])


@settings(deadline=None)
@given(classes=st.integers(2, 4), rows=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_draws_that_keep_no_class(classes: int, rows: int, seed: int) -> None:
    """Rows of any class may be missing in a draw of the figures that know of none."""
    logits, labels = drawn(classes, rows, seed)
    draw = np.random.default_rng(seed).integers(len(labels), size=len(labels))
    counts = np.bincount(draw, minlength=len(labels)).astype(float)[:, None]
    expected = figures(logits[draw], labels[draw])
    for name in ("loss", "accuracy", "macro_f1"):
        found = metric_named(task_of(logits), name).statistics(records(logits, labels)).drawn(counts)
        assert found == pytest.approx([expected[name]])


@settings(deadline=None)
@given(classes=st.integers(2, 5), rows=st.integers(0, 40), seed=st.integers(0, 10_000))
def test_a_file_keeps_all_that_metrics_need(classes: int, rows: int, seed: int) -> None:
    logits, labels = drawn(classes, rows, seed)
    task, own = task_of(logits), records(logits, labels)
    again = task.recorded(json.loads(json.dumps(task.predictions(own))), labelled(labels.tolist()))
    assert task.figures(again) == pytest.approx(task.figures(own), rel=1e-6)
    assert task.confusion(again) == task.confusion(own)


def test_a_metric_has_the_name_of_one() -> None:
    assert [metric_named(Classification, metric.name) for metric in Classification.metrics] == [*Classification.metrics]
    with refused("classification has no metric 'acuracy'.*did you mean 'accuracy'.*expected one of loss, roc_auc"):
        metric_named(Classification, "acuracy")


def test_a_share_of_rows_has_an_interval() -> None:
    logits, labels = drawn(3, 20, 0)
    own = records(logits, labels)
    right = int((logits.argmax(1) == labels).sum())
    found = {metric.name: interval_of(metric, own) for metric in task_of(logits).metrics}
    assert found == {"loss": None, "roc_auc": None, "macro_f1": None, "accuracy": wilson_interval(right, len(labels))}
    logits[0] = math.nan
    assert interval_of(metric_named(task_of(logits), "accuracy"), records(logits, labels)) is None


def test_figures_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, -1.0]])
    found = figures(logits, torch.tensor([0, 1, 1, 0]))
    assert found["accuracy"] == 0.75
    assert found["roc_auc"] == 1.0
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert confusion(logits, torch.tensor([0, 1, 1, 0])) == [[1, 1], [0, 2]]
    assert confusion(logits, torch.tensor([1, 1, 1, 1])) == [[0, 0], [1, 3]]


def test_large_margins_keep_their_order() -> None:
    """In float32 both rows would have probability 1, and the area would be one half."""
    logits = torch.tensor([[0.0, 20.0], [0.0, 25.0]])
    assert figures(logits, torch.tensor([0, 1]))["roc_auc"] == 1.0


@pytest.mark.filterwarnings("error")
def test_one_class_of_two_has_no_area() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    found = figures(logits, torch.tensor([1, 1]))
    assert math.isnan(found["roc_auc"])
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("error")
def test_area_leaves_out_an_absent_class() -> None:
    logits, _ = drawn(3, 20, 0)
    labels = torch.arange(len(logits)) % 2
    probabilities = logits.double().softmax(1).numpy()
    areas = [metrics.roc_auc_score(labels.numpy() == label, probabilities[:, label]) for label in (0, 1)]
    assert figures(logits, labels)["roc_auc"] == pytest.approx(np.mean(areas))
    assert math.isnan(figures(logits, torch.full_like(labels, 2))["roc_auc"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_logits_that_are_no_numbers(strange: float) -> None:
    logits, labels = drawn(2, 8, 0)
    logits[3, 1] = strange
    found = figures(logits, labels)
    assert found.keys() == {"loss", "accuracy", "roc_auc", "macro_f1"}
    assert all(math.isnan(value) for value in found.values())


def test_rows_of_nan_are_in_no_cell() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    assert confusion(logits, torch.tensor([0, 1])) == [[0, 1], [0, 0]]
    assert confusion(logits[1:], torch.tensor([1])) == [[0, 0], [0, 0]]


def test_any_float_type_with_gradients() -> None:
    logits, labels = drawn(3, 20, 1)
    half = logits.bfloat16().requires_grad_()
    assert figures(half, labels) == figures(half.detach().float(), labels)


@given(n=st.integers(1, 200), share=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
def test_wilson_interval_holds_the_share(n: int, share: float, confidence: float) -> None:
    successes = round(share * n)
    low, high = wilson_interval(successes, n, confidence)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high


def test_wilson_interval_by_hand() -> None:
    z, n, p = 1.959963984540054, 50, 0.8
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = ((centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n))
    assert wilson_interval(40, 50) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "message"),
    [
        (0, 0, 0.95, "0 successes of 0"),
        (3, 2, 0.95, "3 successes of 2"),
        (-1, 2, 0.95, "-1 successes of 2"),
        (1, 2, 95, "confidence is 95"),
    ],
)
def test_refused_intervals(successes: int, n: int, confidence: float, message: str) -> None:
    with refused(message):
        wilson_interval(successes, n, confidence)
