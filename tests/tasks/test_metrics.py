from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor

from tanzaku.errors import TanzakuError
from tanzaku.tasks.metrics import classification_metrics, confusion, wilson_interval


def refused(message: str) -> Any:
    return pytest.raises(TanzakuError, match=message)


def drawn(classes: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits and labels in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows + classes, classes, generator=generator) * 3
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (rows,), generator=generator)])
    return logits, labels


@settings(deadline=None)
@given(classes=st.integers(2, 5), rows=st.integers(0, 40), seed=st.integers(0, 10_000))
def test_metrics_are_those_of_scikit_learn(classes: int, rows: int, seed: int) -> None:
    logits, labels = drawn(classes, rows, seed)
    probabilities = logits.double().softmax(1).numpy()
    predicted, truth = probabilities.argmax(1), labels.numpy()
    scores = probabilities[:, 1] if classes == 2 else probabilities
    found = classification_metrics(logits, labels)
    assert found == pytest.approx(
        {
            "loss": metrics.log_loss(truth, probabilities),
            "accuracy": metrics.accuracy_score(truth, predicted),
            "roc_auc": metrics.roc_auc_score(truth, scores, multi_class="ovr", average="macro"),
            "macro_f1": metrics.f1_score(truth, predicted, average="macro"),
        }
    )
    assert {type(value) for value in found.values()} == {float}
    table = confusion(logits, labels, classes)
    assert table == metrics.confusion_matrix(truth, predicted).tolist()
    assert sum(table[label][label] for label in range(classes)) / len(truth) == found["accuracy"]


def test_figures_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, -1.0]])
    found = classification_metrics(logits, torch.tensor([0, 1, 1, 0]))
    assert found["accuracy"] == 0.75
    assert found["roc_auc"] == 1.0
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert confusion(logits, torch.tensor([0, 1, 1, 0]), 2) == [[1, 1], [0, 2]]
    assert confusion(logits, torch.tensor([1, 1, 1, 1]), 2) == [[0, 0], [1, 3]]


def test_large_margins_keep_their_order() -> None:
    """In float32 both rows would have probability 1, and the area would be one half."""
    logits = torch.tensor([[0.0, 20.0], [0.0, 25.0]])
    assert classification_metrics(logits, torch.tensor([0, 1]))["roc_auc"] == 1.0


@pytest.mark.filterwarnings("error")
def test_one_class_of_two_has_no_area() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    found = classification_metrics(logits, torch.tensor([1, 1]))
    assert math.isnan(found["roc_auc"])
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("error")
def test_area_leaves_out_an_absent_class() -> None:
    logits, _ = drawn(3, 20, 0)
    labels = torch.arange(len(logits)) % 2
    probabilities = logits.double().softmax(1).numpy()
    areas = [metrics.roc_auc_score(labels.numpy() == label, probabilities[:, label]) for label in (0, 1)]
    assert classification_metrics(logits, labels)["roc_auc"] == pytest.approx(np.mean(areas))
    assert math.isnan(classification_metrics(logits, torch.full_like(labels, 2))["roc_auc"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_logits_that_are_no_numbers(strange: float) -> None:
    logits, labels = drawn(2, 8, 0)
    logits[3, 1] = strange
    found = classification_metrics(logits, labels)
    assert found.keys() == {"loss", "accuracy", "roc_auc", "macro_f1"}
    assert all(math.isnan(value) for value in found.values())


def test_rows_of_nan_are_in_no_cell() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    assert confusion(logits, torch.tensor([0, 1]), 2) == [[0, 1], [0, 0]]
    assert confusion(logits[1:], torch.tensor([1]), 2) == [[0, 0], [0, 0]]


def test_any_float_type_with_gradients() -> None:
    logits, labels = drawn(3, 20, 1)
    half = logits.bfloat16().requires_grad_()
    assert classification_metrics(half, labels) == classification_metrics(half.detach().float(), labels)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 2), [0], r"logits \[2, 2\] and labels \[1\] do not fit"),
        ((2, 1), [0, 0], "two classes or more"),
        ((2,), [0, 0], r"expected \[N, C\] and \[N\]"),
        ((0, 2), [], "no predictions"),
        ((2, 2), [0, 2], "label id 2 is outside the 2 classes 0 to 1"),
        ((2, 2), [-100, 1], "label id -100 is outside"),
    ],
)
def test_what_does_not_fit(shape: tuple[int, ...], labels: list[int], message: str) -> None:
    with refused(message):
        classification_metrics(torch.zeros(shape), torch.tensor(labels, dtype=torch.int64))
    with refused(message):
        confusion(torch.zeros(shape), torch.tensor(labels, dtype=torch.int64), 2)


def test_confusion_of_another_number_of_classes() -> None:
    with refused("logits have 2 classes, expected num_labels 3"):
        confusion(torch.zeros(1, 2), torch.tensor([0]), 3)


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
