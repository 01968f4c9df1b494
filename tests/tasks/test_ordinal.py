"""Ordinal classification: the order of labels, the loss of thresholds, and metrics that are scikit-learn's."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch.nn.functional import binary_cross_entropy, cross_entropy

from close import GRADIENT, assert_close
from tanzaku.errors import TanzakuError
from tanzaku.tasks.data import Table
from tanzaku.tasks.losses import focal
from tanzaku.tasks.ordinal import Ordinal, OrdinalSettings
from tanzaku.tasks.task import metric_named
from task_data import labelled

TASK = Ordinal(("bad", "fair", "good", "best"))


def data(**given: Any) -> OrdinalSettings:
    return OrdinalSettings(train="train.tsv", **given)


def learned(*labels: Any, **given: Any) -> tuple[str, ...]:
    table = Table({"text": [f"text {at}" for at in range(len(labels))], "label": [*labels]}, "train.tsv")
    return Ordinal.learn({"train": table}, data(**given)).labels


# --- the order ---


def test_the_order_of_labels() -> None:
    assert learned("10", "9", 1.0) == ("1", "9", "10")
    assert learned("good", "bad", "fair", order=["bad", "fair", "good"]) == ("bad", "fair", "good")
    assert learned(1, 2, 1, order=[2, 3, 1]) == ("2", "3", "1")  # one of them has no rows
    table = Table({"text": ["a", "b", "c"], "label": [1, 2, 1]}, "train.tsv")
    [found] = Ordinal.findings({"train": table}, data(order=[2, 3, 1]))
    assert "no training row has the label 3" in str(found)
    assert Ordinal.table_of({"train": table}, data(order=[2, 3, 1]))[1] == [["2", "1"], ["3", "0"], ["1", "2"]]


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        (["good", "bad"], {}, "labels bad, good, which are no numbers: say their order, as in --order bad"),
        (["good", "bad"], {"order": ["bad", "goood"]}, "label 'good', which the order bad, goood has not.*'goood'"),
        (["good", "bad"], {"order": ["bad"]}, "found bad, expected two labels or more, each once"),
        (["good", "bad"], {"order": ["bad", "good", "bad"]}, "each once"),
        (["good", "bad"], {"order": "bad, good"}, "expected a list of labels"),
        (["good", "good"], {"order": ["bad", "good"]}, "only the label 'good'"),
    ],
)
def test_what_is_no_order_is_refused(labels: list[str], given: dict[str, Any], message: str) -> None:
    with pytest.raises((TanzakuError, ValueError), match=message):
        learned(*labels, **given)


# --- the loss ---


def scored(logits: torch.Tensor, labels: list[int], focus: float = 0.0) -> torch.Tensor:
    from dataclasses import replace

    batch = TASK.collate([replace(each, focal=focus) for each in labelled(labels)], 0)
    return TASK.score(SimpleNamespace(logits=logits), batch)


def test_loss_is_that_of_each_threshold() -> None:
    """By hand: probabilities 0.1, 0.2, 0.3, 0.4, and a row of the third class, which is above two thresholds."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    expected = -np.log(0.9) - np.log(0.7) - np.log(0.6)
    assert scored(logits, [2]).tolist() == pytest.approx([expected])


def test_loss_is_corals_of_cumulative_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(20, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(4, (20,), generator=generator)
    above = 1 - logits.softmax(1).cumsum(1)[:, :-1]
    is_above = (labels[:, None] > torch.arange(3)).double()
    each = binary_cross_entropy(above, is_above, reduction="none")
    found = scored(logits, labels.tolist())
    assert_close(found, each.sum(1).float())
    [a], [b] = (torch.autograd.grad(loss.sum(), logits, retain_graph=True) for loss in (found, each))
    assert_close(a.float(), b.float(), GRADIENT)
    batch = TASK.collate(labelled(labels.tolist()), 0)
    assert_close(scored(logits, labels.tolist(), 2.0), (each * (1 - torch.exp(-each)) ** 2).sum(1).float())
    assert focal(each, batch) is each


def test_of_two_classes_it_is_cross_entropy() -> None:
    two, logits = Ordinal(("a", "b")), torch.tensor([[2.0, -1.0], [0.5, 0.25]])
    found = two.score(SimpleNamespace(logits=logits), two.collate(labelled([0, 1]), 0))
    assert_close(found, cross_entropy(logits, torch.tensor([0, 1]), reduction="none"))


def test_nearer_classes_lose_less_and_certain_rows_have_slopes() -> None:
    sure = 200 * torch.eye(4)
    losses = scored(sure, [0, 0, 0, 0]).tolist()
    assert losses == pytest.approx([0, 200, 400, 600], abs=2)
    logits = sure.clone().requires_grad_()
    scored(logits, [0, 3, 1, 0]).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


# --- metrics ---


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_metrics_are_scikit_learns(seed: int, number: int) -> None:
    chance = np.random.default_rng(seed)
    logits = torch.from_numpy(chance.normal(size=(number, 4)) * 2)
    labels = chance.integers(0, 4, number)
    records = TASK.records(SimpleNamespace(logits=logits), TASK.collate(labelled(labels.tolist()), 0))
    guess = logits.argmax(1).numpy()
    found = TASK.figures(records)
    steps = metrics.mean_absolute_error(labels, guess)
    assert found["mae_steps"] == pytest.approx(steps)
    if len({*labels, *guess}) > 1:
        kappa = metrics.cohen_kappa_score(labels, guess, weights="quadratic", labels=[0, 1, 2, 3])
        assert found["kappa"] == pytest.approx(kappa, abs=1e-9)
    else:
        assert np.isnan(found["kappa"])
    kept = json.loads(json.dumps(TASK.predictions(records)))
    assert TASK.figures(TASK.recorded(kept, labelled(labels.tolist()))) == pytest.approx(found, rel=1e-6, nan_ok=True)
    draw = chance.integers(0, number, number)
    for name in ("kappa", "mae_steps"):
        statistics = metric_named(TASK, name).statistics
        drawn = statistics(records).drawn(np.bincount(draw, minlength=number)[:, None].astype(float))[0]
        again = {key: value[draw] for key, value in records.items()}
        assert drawn == pytest.approx(statistics(again).value(), abs=1e-9, nan_ok=True), name


def test_one_who_knows_the_frequencies_alone() -> None:
    """Has the loss that `doubts` takes for knowing nothing."""
    counts = [4, 3, 2, 1]
    logits = torch.tensor(counts).float().log().expand(10, 4)
    labels = [at for at, count in enumerate(counts) for _ in range(count)]
    assert scored(logits, labels).mean().item() == pytest.approx(TASK.ignorant(counts), rel=1e-5)
