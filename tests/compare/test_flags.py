"""What is said of a candidate beside its figure."""

from __future__ import annotations

from typing import Any

import pytest

from tanzaku.compare.flags import flags
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.metrics import ROC_AUC
from tanzaku.tasks.task import LOSS, Metric
from task_data import labelled

TASK = Classification(("a", "b"))
# A loss of 0.611 knows how many there are of each label, and nothing of the row.
ROWS = labelled([0] * 7 + [1] * 3)


def record(train: float = 0.2, loss: float = 0.3, accuracy: float = 0.9, area: float | None = 0.95) -> dict[str, Any]:
    valid = {"loss": loss, "accuracy": accuracy, "roc_auc": area}
    return {"epochs": [{"train_loss": 0.7}, {"train_loss": train}], "valid": valid}


def words(*records: dict[str, Any], metric: Metric = ROC_AUC, same_rows: bool = True) -> list[str]:
    return [flag.split(":")[0] for flag in flags(records, TASK, ROWS, metric, same_rows)]


def test_nothing_is_said_of_what_is_right() -> None:
    assert words() == words(record()) == words(record(), record(area=0.9)) == []


def test_a_loss_that_stays_that_of_the_labels() -> None:
    assert words(record(0.61, 0.6), record(0.6, 0.65)) == ["did not learn"]
    assert words(record(0.61, 0.6), record(0.4, 0.65)) == []  # one run did
    assert words(record(0.65, 0.4)) == []  # the mean of a first epoch lags behind what it has learned


def test_a_focal_loss_says_nothing_of_what_was_learned() -> None:
    focal = {"train_settings": {"focal_gamma": 2.0}}
    assert words(record(0.2, 0.6)) == [] and words(record(0.2, 0.6) | focal) == ["did not learn"]


def test_less_than_always_the_same_label() -> None:
    assert words(record(accuracy=0.72), record(accuracy=0.66)) == ["below the majority label"]
    assert "69.0% are right" in flags([record(accuracy=0.69)], TASK, ROWS, LOSS, True)[0]


@pytest.mark.parametrize(("area", "said"), [(0.85, []), (0.84, ["unstable"]), (0.6, ["unstable"])])
def test_runs_that_are_far_apart(area: float, said: list[str]) -> None:
    assert words(record(area=0.95), record(area=area)) == said
    assert words(record(area=0.95), record(area=area), same_rows=False) == []  # folds have rows of their own
    assert ("give it five seeds" in str(flags([record(), record(area=area)], TASK, ROWS, ROC_AUC, True))) == bool(said)


def test_losses_are_compared_by_their_size() -> None:
    assert words(record(loss=2.0), record(loss=2.3), metric=LOSS) == []
    assert words(record(loss=0.2), record(loss=0.5), metric=LOSS) == ["unstable"]
    assert words(record(area=None), record(area=None)) == []
