from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from tanzaku.compare import statistics
from tanzaku.compare.statistics import Comparison, Design, Run, Scored, holm, losses, rank
from tanzaku.errors import TanzakuError
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.metrics import ACCURACY, ROC_AUC
from tanzaku.tasks.task import LOSS, Metric, Statistics
from task_data import labelled
from tiers import costly

Array = np.ndarray[Any, np.dtype[Any]]

METRICS = Classification.metrics
NAMES = [metric.name for metric in METRICS]

FIVE_FOLDS = Design("folds", ROC_AUC, train_rows=400, valid_rows=100)
pytestmark = pytest.mark.filterwarnings("error")  # of a division by zero, or a mean of nothing


def folded(name: str, values: Sequence[float], parameters: int = 1) -> Scored:
    return Scored(name, [Run(0, fold, 0, value) for fold, value in enumerate(values)], parameters)


def sums(metric: Metric, probabilities: Array, labels: Array) -> Statistics:
    """From probabilities [n, C] and ids [n]."""
    task = Classification(tuple("abcdefg"[: probabilities.shape[1]]))
    return metric.statistics(task.recorded(probabilities.tolist(), labelled(labels.tolist())))


def run(seed: int, metric: Metric, probabilities: Array, labels: Array) -> Run:
    found = sums(metric, probabilities, labels)
    return Run(0, 0, seed, found.value(), found)


def on_folds(each: Scored) -> Scored:
    """Its seeds as folds."""
    return replace(each, runs=[replace(run, fold=run.seed, seed=0) for run in each.runs])


def on_value(each: Scored, value: float) -> Scored:
    return replace(each, runs=[replace(run, value=value) for run in each.runs])


def split(name: str, by_seed: Sequence[Array], labels: Array, metric: Metric = ACCURACY) -> Scored:
    """From probabilities [n, C] of each seed."""
    return Scored(name, [run(seed, metric, p, labels) for seed, p in enumerate(by_seed)], 1)


def fixed(labels: Array, metric: Metric = ACCURACY) -> Design:
    return Design("split", metric, train_rows=100, valid_rows=len(labels), strata=labels)


def answers(right: Array, labels: Array) -> Array:
    """Probabilities [n, 2] that favour the label in some rows and miss it in the others."""
    return np.where((np.where(right, labels, 1 - labels) == 1)[:, None], [[0.2, 0.8]], [[0.8, 0.2]])


def pair(scored: Sequence[Scored], design: Design) -> Comparison:
    (found,) = rank(scored, design).comparisons
    return found


# Order


def test_order_tied_and_cheapest() -> None:
    noisy = [0.02, -0.02, 0.01, -0.01, 0.0]
    scored = [
        folded("bad", [0.5 + x for x in noisy], 1),
        folded("good", [0.9, 0.9, 0.9, 0.9, 0.9], 500),
        folded("close", [0.89 + x for x in noisy], 20),
        folded("near", [0.88 - x for x in noisy], 20),
    ]
    ranking = rank(scored, FIVE_FOLDS)
    assert [each.name for each in ranking.candidates] == ["good", "close", "near", "bad"]
    assert [each.mean for each in ranking.candidates] == pytest.approx([0.9, 0.89, 0.88, 0.5])
    assert ranking.best == "good"
    assert ranking.tied == ("good", "close", "near")
    assert ranking.cheapest == "good"  # of the tied, close trains less, and may well be more than a point behind
    assert rank(scored, replace(FIVE_FOLDS, margin=0.03)).cheapest == "close"
    assert ranking.runs == 5
    assert [(each.a, each.b) for each in ranking.comparisons] == [
        ("good", "close"),
        ("good", "near"),
        ("good", "bad"),
        ("close", "near"),
        ("close", "bad"),
        ("near", "bad"),
    ]
    assert [each.told for each in ranking.comparisons] == [False, False, True, False, True, True]


def test_less_loss_is_better() -> None:
    scored = [folded("a", [0.5, 0.6]), folded("b", [0.4, 0.5])]
    assert rank(scored, replace(FIVE_FOLDS, metric=LOSS)).best == "b"
    assert rank(scored, FIVE_FOLDS).best == "a"
    assert pair(scored, replace(FIVE_FOLDS, metric=LOSS)).difference == pytest.approx(-0.1)


def test_equal_means_go_by_parameters_then_name() -> None:
    # The first two sum to 0.6000000000000001 and 0.6 in these orders.
    scored = [folded("z", [0.1, 0.2, 0.3], 9), folded("c", [0.3, 0.2, 0.1], 7), folded("b", [0.2, 0.1, 0.3], 7)]
    assert sum([0.1, 0.2, 0.3]) != sum([0.3, 0.2, 0.1])
    ranking = rank(scored, FIVE_FOLDS)
    assert [each.name for each in ranking.candidates] == ["b", "c", "z"]
    assert ranking.cheapest == "b"


@pytest.mark.parametrize("kind", ["folds", "split"])
def test_the_order_of_the_input_changes_nothing(kind: str) -> None:
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.arange(30) % 2)
    design = fixed(labels, ROC_AUC) if kind == "split" else FIVE_FOLDS
    scored = [split(name, [drawn(rng, labels, 1.0) for _ in range(3)], labels, ROC_AUC) for name in "abcd"]
    scored = scored if kind == "split" else [on_folds(each) for each in scored]
    expected = rank(scored, design)
    for _ in range(3):
        shuffled = [replace(each, runs=[each.runs[i] for i in rng.permutation(3)]) for each in scored]
        assert rank([shuffled[i] for i in rng.permutation(4)], design) == expected


# Cross-validation


def test_corrected_t_test_by_hand() -> None:
    """Differences of mean 0.04 and variance 0.00025: t = 0.04 / sqrt(0.00025 (1/5 + 100/400)) = 3.7712."""
    other = [0.80, 0.82, 0.78, 0.85, 0.81]
    better = [x + d for x, d in zip(other, [0.02, 0.04, 0.06, 0.03, 0.05], strict=True)]
    found = pair([folded("other", other), folded("better", better)], FIVE_FOLDS)
    assert (found.a, found.b) == ("better", "other")
    assert found.difference == pytest.approx(0.04)
    assert found.p == pytest.approx(0.0196, abs=5e-5)  # of a table of t with 4 degrees of freedom
    assert found.p_adjusted == found.p
    # 0.04 -+ 2.7764 * 0.0106066
    assert found.interval == pytest.approx((0.010551, 0.069449), abs=1e-6)
    # Found in 80 of 100 with 4 degrees of freedom: 3.75 standard errors, by the noncentral t distribution.
    assert found.visible == pytest.approx(3.75 * 0.0106066, rel=0.03)


def test_interval_of_a_mean_by_hand() -> None:
    """Variance 0.00067 (1/5 + 1/4) = 0.0003015; 2.7764 standard errors are 0.04821."""
    (found,) = rank([folded("only", [0.80, 0.82, 0.78, 0.85, 0.81])], FIVE_FOLDS).candidates
    assert found.mean == pytest.approx(0.812)
    assert found.interval == pytest.approx((0.812 - 0.04821, 0.812 + 0.04821), abs=1e-5)


def test_intervals_stay_where_a_metric_can_be() -> None:
    ranking = rank([folded("high", [1.0, 1.0, 0.9, 1.0, 1.0]), folded("low", [0.0, 0.1, 0.0, 0.0, 0.0])], FIVE_FOLDS)
    assert ranking.candidates[0].interval is not None and ranking.candidates[0].interval[1] == 1.0
    assert ranking.candidates[1].interval is not None and ranking.candidates[1].interval[0] == 0.0
    (found,) = ranking.comparisons
    assert found.interval is not None and found.interval[1] == 1.0
    (loss,) = rank([folded("high", [4.0, 1.0, 9.0, 1.0, 9.0])], replace(FIVE_FOLDS, metric=LOSS)).candidates
    assert loss.interval is not None and loss.interval[0] == 0.0 and loss.interval[1] > 9


def test_seeds_of_a_fold_are_averaged_first() -> None:
    """Ten figures of five folds are no ten resamples."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0.7, 0.9, (2, 5, 2))
    twice = [
        Scored(name, [Run(0, f, s, float(values[i, f, s])) for s in (1, 0) for f in range(5)], 1)
        for i, name in enumerate("ab")
    ]
    once = [folded(name, values[i].mean(axis=1).tolist()) for i, name in enumerate("ab")]
    found, expected = rank(twice, FIVE_FOLDS), rank(once, FIVE_FOLDS)
    assert found.runs == 10
    assert found.comparisons[0].p == pytest.approx(expected.comparisons[0].p)
    assert found.candidates[0].interval == pytest.approx(expected.candidates[0].interval)


def test_one_resample_tells_nothing() -> None:
    ranking = rank([folded("a", [0.9]), folded("b", [0.1])], FIVE_FOLDS)
    assert [each.interval for each in ranking.candidates] == [None, None]
    assert ranking.comparisons == (Comparison("a", "b", pytest.approx(0.8)),)
    assert ranking.tied == ("a", "b")
    two_seeds = [
        Scored(name, [Run(0, 0, 0, value), Run(0, 0, 1, value)], 1) for name, value in (("a", 0.9), ("b", 0.1))
    ]
    assert pair(two_seeds, FIVE_FOLDS).p is None


@pytest.mark.parametrize("metric", METRICS, ids=NAMES)
def test_figures_that_agree_are_no_certainty(metric: Metric) -> None:
    design = replace(FIVE_FOLDS, metric=metric)
    same = pair([folded("a", [0.9, 0.7, 0.8]), folded("b", [0.9, 0.7, 0.8])], design)
    assert (same.difference, same.p, same.p_adjusted) == (0, 1, 1)
    assert same.interval is not None and same.interval[0] <= 0 <= same.interval[1]
    one_row = pair([folded("a", [0.91, 0.71, 0.81]), folded("b", [0.9, 0.7, 0.8])], design)
    assert one_row.p is not None and 0 < one_row.p < 1
    if metric is not LOSS:  # one validation row more in each of three folds is nothing
        assert one_row.p > 0.2
    (perfect,) = rank([folded("a", [1.0] * 5)], design).candidates
    assert perfect.interval is not None and perfect.interval[0] < 1.0


def test_rounding_of_equal_losses_is_no_difference() -> None:
    design = replace(FIVE_FOLDS, metric=LOSS)
    found = pair([folded("a", [0.1 + 0.2, 0.3, 0.3]), folded("b", [0.3, 0.3, 0.3 + 1e-16])], design)
    assert found.p == pytest.approx(1)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8),
    metric=st.sampled_from(METRICS),
    rows=st.tuples(st.floats(1, 1000), st.floats(1, 1000)),
)
@example(values=[(0.0, 0.0)] * 3 + [(1.0, 0.0)] * 4, metric=METRICS[0], rows=(42.0, 1.0))
def test_interval_and_p_agree(values: list[tuple[float, float]], metric: Metric, rows: tuple[float, float]) -> None:
    scored = [folded(name, [each[i] for each in values]) for i, name in enumerate("ab")]
    found = pair(scored, Design("folds", metric, *rows))
    assert found.p is not None and found.interval is not None and found.visible is not None
    low, high = found.interval
    assert low <= found.difference <= high
    assert 0 <= found.p <= 1
    if abs(found.p - 0.05) > 1e-6:
        assert (found.p < 0.05) == (not low <= 0 <= high) == found.told
        # What is found in 80 of 100 runs lies beyond what is just told apart, which is found in half of them.
        assert found.told or abs(found.difference) <= found.visible


@given(shift=st.floats(0.001, 0.3), more=st.floats(0.001, 0.3))
def test_a_larger_difference_has_a_smaller_p(shift: float, more: float) -> None:
    base = np.array([0.90, 0.85, 0.95, 0.88])
    other = base + np.array([0.03, -0.03, 0.01, -0.01])
    ps = []
    for gap in (shift, shift + more):
        found = pair([folded("a", base.tolist()), folded("b", (other - gap).tolist())], FIVE_FOLDS)
        assert found.a == "a"
        ps.append(found.p)
    assert ps[1] < ps[0]


# A fixed split


def drawn(rng: np.random.Generator, labels: Array, skill: float, classes: int = 2) -> Array:
    """Probabilities [n, C] by a candidate of some skill."""
    logits = rng.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    softmax: Array = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return softmax


def by_scikit_learn(probabilities: Array, labels: Array) -> dict[str, float]:
    """The figures of rows, by another's code: areas of the classes that some and not all rows have."""
    n, classes = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    ones = [c for c in ([1] if classes == 2 else range(classes)) if 0 < (labels == c).sum() < n]
    areas = [metrics.roc_auc_score(labels == c, probabilities[:, c]) for c in ones]
    return {
        "loss": float(-np.log(probabilities[np.arange(n), labels]).mean()),
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "roc_auc": float(np.mean(areas)) if areas else math.nan,
    }


@settings(deadline=None, max_examples=60)
@given(classes=st.integers(2, 4), rows=st.integers(2, 25), seed=st.integers(0, 10_000), step=st.sampled_from([0.01, 1]))
def test_metrics_of_drawn_rows_are_those_of_the_task(classes: int, rows: int, seed: int, step: float) -> None:
    """With ties (logits in whole steps), classes that no row has, and classes that are guessed alone."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(1, classes + 1), rows)
    logits = torch.from_numpy(np.round(rng.normal(size=(rows, classes)) * 2 / step) * step)
    probabilities = logits.log_softmax(1).exp().numpy()
    draws = np.empty((5, rows), dtype=int)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        draws[:, own] = rng.choice(own, (5, len(own)))
    counts = np.stack([np.bincount(draw, minlength=rows) for draw in draws], axis=1).astype(float)
    task = Classification(tuple("abcd"[:classes]))

    def of_the_task(draw: Array) -> dict[str, float]:
        return task.figures(task.recorded(probabilities[draw].tolist(), labelled(labels[draw].tolist())))

    expected = [by_scikit_learn(probabilities[draw], labels[draw]) for draw in draws]
    for draw, figures in zip(draws, expected, strict=True):
        assert of_the_task(draw) == pytest.approx(figures, nan_ok=True)
    for metric in METRICS:
        found = sums(metric, probabilities, labels).drawn(counts)
        assert found == pytest.approx([each[metric.name] for each in expected], nan_ok=True), metric.name


def test_noise_of_rows_by_hand() -> None:
    """Of 100 rows, `a` alone is right in 20 and `b` alone in 8; training repeats itself exactly.

    The difference of 0.12 then has the variance (0.28 - 0.12**2) / 100 in a bootstrap that forgets labels. Both labels
    have the same share of all, so that one that heeds them has it too.
    """
    labels = np.arange(100) % 2
    right = np.ones((2, 100), dtype=bool)
    right[1, :20] = right[0, 20:28] = False
    a, b = (split(name, [answers(row, labels)] * 3, labels) for name, row in zip("ab", right, strict=True))
    found = pair([a, b], fixed(labels))
    assert found.difference == pytest.approx(0.12)
    error = math.sqrt((0.28 - 0.12**2) / 100)
    assert found.p == pytest.approx(2 * stats.t.sf(0.12 / error, 99), rel=0.15)
    assert found.interval == pytest.approx((0.12 - 1.984 * error, 0.12 + 1.984 * error), abs=0.006)


def test_noise_of_training_by_hand() -> None:
    """A candidate that is right in 60, 70 and 80 of 100 rows, and one that is right in all.

    Of the seeds the variance is 0.01, in the difference too, and the typical one is half of it over the median of
    chi2 / 2 (1.3863 / 2); twice that is 0.014427, the largest of the three. A row is right in a mean of 0.6 + 0.1 / 3 +
    0.1 * 2 / 3 of the seeds; the variance of that over rows, by 100, is that of the rows.
    """
    labels = np.arange(100) % 2
    rights = [np.arange(100) < count for count in (60, 70, 80)]
    full = np.ones(100, dtype=bool)
    found = pair(
        [
            split("a", [answers(full, labels)] * 3, labels),
            split("b", [answers(right, labels) for right in rights], labels),
        ],
        fixed(labels),
    )
    assert found.difference == pytest.approx(0.3)
    training = max(0.01, 2 * 0.005 / 0.693147) / 3
    rows = float(np.mean(rights, axis=0).var()) / 100
    freedom = (training + rows) ** 2 / (training**2 / 2 + rows**2 / 99)
    assert found.p == pytest.approx(2 * stats.t.sf(0.3 / math.sqrt(training + rows), freedom), rel=0.03)


def test_a_difference_that_seeds_agree_on_by_chance_is_not_certain() -> None:
    """`a` and `b` vary by 0.2, in step: the difference is the same for each seed. The others do not vary at all."""
    labels = np.arange(200) % 2

    def right(name: str, *counts: int) -> Scored:
        return split(name, [answers(np.arange(200) < count, labels) for count in counts], labels)

    others = [right("c", 120, 120), right("d", 100, 100), right("e", 80, 80)]
    steady = rank([right("a", 190, 190), right("b", 180, 180), *others], fixed(labels)).comparisons[0]
    in_step = rank([right("a", 190, 150), right("b", 180, 140), *others], fixed(labels)).comparisons[0]
    for found in (steady, in_step):
        assert (found.a, found.b, found.difference) == ("a", "b", pytest.approx(0.05))
    assert steady.p is not None and steady.p < 0.01
    assert in_step.p is not None and in_step.p > 0.5


def test_one_unstable_candidate_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(100) % 2
    scored = [
        split(name, [drawn(rng, labels, skill) for _ in range(3)], labels)
        for name, skill in (("good", 5.0), ("fair", 1.0), ("poor", 0.0))
    ]
    unstable = split("unstable", [drawn(rng, labels, skill) for skill in (5.0, -5.0, 5.0)], labels)
    told = {(each.a, each.b): each.told for each in rank([*scored, unstable], fixed(labels)).comparisons}
    assert told["good", "fair"] and told["good", "poor"]
    assert not any(told[each] for each in told if "unstable" in each)


def test_stable_candidates_get_the_noise_of_a_typical_one() -> None:
    """Two seeds that agree are more often luck than stability, where the others' seeds do not."""
    rng = np.random.default_rng(4)
    labels = np.arange(100) % 2
    steady = [
        split(name, [answers(np.arange(100) < right, labels)] * 2, labels) for name, right in (("a", 90), ("b", 75))
    ]
    alone = pair(steady, fixed(labels))
    others = [split(name, [drawn(rng, labels, skill) for skill in (0.2, 1.5)], labels) for name in "cdefg"]
    (among,) = (each for each in rank([*steady, *others], fixed(labels)).comparisons if (each.a, each.b) == ("a", "b"))
    assert alone.p is not None and among.p is not None
    assert alone.p < 0.001 and among.p > 0.05


def test_one_seed_gives_no_p() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 2
    scored = [split("a", [drawn(rng, labels, 3)], labels), split("b", [drawn(rng, labels, 0)], labels)]
    ranking = rank(scored, fixed(labels))
    (found,) = ranking.comparisons
    assert (found.p, found.p_adjusted, found.interval, found.visible) == (None, None, None, None)
    assert ranking.tied == ("a", "b")
    # Of rows alone: the usual interval of a share.
    for each in ranking.candidates:
        assert each.interval is not None
        half = 1.984 * math.sqrt(each.mean * (1 - each.mean) / 100)
        assert each.interval == pytest.approx((each.mean - half, each.mean + half), abs=0.012)


@pytest.mark.parametrize("metric", METRICS, ids=NAMES)
def test_few_rows_that_agree_are_no_certainty(metric: Metric) -> None:
    """One row of the rarer label, in which all is right or all is wrong: the bootstrap sees no noise there."""
    labels = np.array([0, 0, 0, 0, 1])
    right, wrong = np.ones(5, dtype=bool), np.array([True, True, True, True, False])
    found = pair(
        [split(name, [answers(row, labels)] * 3, labels, metric) for name, row in (("a", right), ("b", wrong))],
        fixed(labels, metric),
    )
    assert found.a == "a"
    assert found.p is not None and (found.p > 0.05 or metric is LOSS)
    same = pair([split(name, [answers(right, labels)] * 2, labels, metric) for name in "ab"], fixed(labels, metric))
    assert (same.difference, same.p) == (0, 1)
    one_row = pair(
        [split(name, [answers(right[:1], labels[:1])] * 2, labels[:1], ACCURACY) for name in "ab"], fixed(labels[:1])
    )
    assert one_row.p == 1


def test_the_bootstrap_repeats_itself_whatever_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    scored = [split(name, [drawn(rng, labels, 1) for _ in range(2)], labels, ROC_AUC) for name in "ab"]
    first = rank(scored, fixed(labels, ROC_AUC))
    assert rank(scored, fixed(labels, ROC_AUC)) == first
    monkeypatch.setattr(statistics, "CELLS", 700)
    assert rank(scored, fixed(labels, ROC_AUC)).comparisons[0].p == pytest.approx(first.comparisons[0].p, rel=0.2)


# Several pairs


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_laws_of_holm(p: list[float], seed: int) -> None:
    adjusted = holm(p)
    assert all(own <= found <= min(1, own * len(p)) for own, found in zip(p, adjusted, strict=True))
    in_order = [adjusted[i] for i in np.argsort(p)]
    assert in_order == sorted(in_order)
    shuffled = np.random.default_rng(seed).permutation(len(p))
    assert holm([p[i] for i in shuffled]) == [adjusted[i] for i in shuffled]


def test_pairs_are_adjusted_together() -> None:
    rng = np.random.default_rng(0)
    scored = [folded(name, (0.8 - i / 20 + rng.normal(size=6) / 50).tolist()) for i, name in enumerate("abcd")]
    pairs = rank(scored, FIVE_FOLDS).comparisons
    assert len(pairs) == 6
    p = [each.p for each in pairs if each.p is not None]
    # Those with the best, of which the verdict speaks, for each other alone.
    assert [each.p_adjusted for each in pairs] == [*holm(p[:3]), *holm(p)[3:]]
    assert min(each.p_adjusted or 0.0 for each in pairs[:3]) == pytest.approx(3 * min(p[:3]))


def test_expected_loss_by_hand() -> None:
    """The mean of what is above 0 of a t distribution: half its mean deviation where it is around 0."""
    rng = np.random.default_rng(0)
    for ahead, freedom in ((0.0, 4.0), (0.5, 9.0), (-2.0, 30.0)):
        draws = ahead + 0.7 * rng.standard_t(freedom, 10**6)
        assert statistics._Noise(0.7, freedom).loss(ahead) == pytest.approx(np.maximum(draws, 0).mean(), abs=5e-3)
    assert statistics._Noise(0.7, 1.0).loss(0.0) == math.inf


def test_two_that_cannot_be_told_apart_are_not_therefore_alike() -> None:
    """What is cheaper is taken where its expected loss is within the margin: absolute, of a loss relative."""
    steady = [0.9, 0.9, 0.9, 0.9, 0.9]
    loose = replace(FIVE_FOLDS, valid_rows=10**5, train_rows=4 * 10**5)
    near = [folded("best", steady, 500), folded("head", [x - 0.001 for x in steady], 3)]
    assert rank(near, loose).cheapest == "head" if rank(near, loose).tied == ("best", "head") else True
    rng = np.random.default_rng(0)
    far = [
        folded("best", (0.9 + rng.normal(size=5) / 20).tolist(), 500),
        folded("head", [0.82, 0.9, 0.7, 0.95, 0.8], 3),
    ]
    ranking = rank(far, FIVE_FOLDS)
    assert set(ranking.tied) == {"best", "head"} and ranking.cheapest == ranking.best == "best"
    loss = [folded("best", [2.0, 2.1, 1.9, 2.0, 2.05], 500), folded("head", [2.01, 2.1, 1.92, 2.0, 2.05], 3)]
    by_loss = replace(FIVE_FOLDS, metric=LOSS)
    assert rank(loss, replace(by_loss, margin=0.05)).cheapest == "head"  # 0.1 nats of 2
    assert rank(loss, replace(by_loss, margin=0.0001)).cheapest == "best"


def test_what_is_cheaper_must_hold_in_the_other_metrics_too() -> None:
    """A metric that is near its end for all says nothing of what others still tell apart."""
    noise = np.array([0.001, -0.001, 0.0005, -0.0005, 0.0])
    area = [folded("lora", list(0.998 + noise), 100), folded("head", list(0.997 - noise), 1)]
    share = [folded("lora", list(0.95 + noise), 100), folded("head", list(0.88 - noise), 1)]
    assert rank(area, FIVE_FOLDS).cheapest == "head"
    found = losses(share, FIVE_FOLDS, "lora")
    assert found["lora"] == 0.0 and found["head"] == pytest.approx(0.07, abs=0.001)
    assert rank(area, FIVE_FOLDS, found).cheapest == "lora"
    assert losses(share, FIVE_FOLDS, "head")["lora"] < 1e-3  # it need not be the best there
    assert rank(area, FIVE_FOLDS, dict.fromkeys(found, 0.005)).cheapest == "head"


def test_few_runs_have_an_interval_of_rows() -> None:
    """No t distribution of one degree of freedom: of fewer than five figures, what other rows would give these runs."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    by_seed = [drawn(rng, labels, 1.0) for _ in range(2)]
    (found,) = rank([split("a", by_seed, labels)], fixed(labels)).candidates
    assert found.of_rows and len(found.figures) == 2 and found.interval is not None
    assert 0.05 < found.interval[1] - found.interval[0] < 0.3
    assert found.interval[0] < found.mean < found.interval[1]
    (many,) = rank([split("a", [drawn(rng, labels, 1.0) for _ in range(5)], labels)], fixed(labels)).candidates
    assert not many.of_rows and many.interval is not None
    # Of folds each has its own rows.
    runs = [replace(run(0, ACCURACY, p, labels), fold=fold, strata=labels) for fold, p in enumerate(by_seed)]
    (of_folds,) = rank([Scored("a", runs, 1)], Design("folds", ACCURACY, 60, 60)).candidates
    assert of_folds.of_rows and of_folds.interval is not None
    # One answer on two folds of rows is better known than on one.
    once, twice = (
        rank([Scored("a", [replace(runs[0], fold=k) for k in range(n)], 1)], Design("folds", ACCURACY, 60, 60))
        for n in (1, 2)
    )
    widths = [high - low for r in (once, twice) for low, high in [r.candidates[0].interval or (0, 0)]]
    assert 0.5 < widths[1] / widths[0] < 0.9
    (unknown,) = rank([folded("a", [0.9, 0.8])], FIVE_FOLDS).candidates
    assert unknown.interval is None and not unknown.of_rows


# What is no number, and misuse


@pytest.mark.parametrize("kind", ["folds", "split"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_comes_last(kind: str, value: float) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 2
    scored = [split(name, [drawn(rng, labels, 1) for _ in range(2)], labels, LOSS) for name in "abc"]
    scored = scored if kind == "split" else [on_folds(each) for each in scored]
    broken = replace(
        scored[0], runs=[scored[0].runs[0], replace(scored[0].runs[1], value=value)], trainable_parameters=0
    )
    design = replace(fixed(labels, LOSS), kind=kind)
    ranking = rank([broken, *scored[1:]], design)
    last = ranking.candidates[-1]
    assert last.name == "a" and math.isnan(last.mean) and last.interval is None
    assert [each.p is None for each in ranking.comparisons] == [False, True, True]
    assert ranking.comparisons[0].p_adjusted == ranking.comparisons[0].p
    assert "a" not in ranking.tied and ranking.cheapest != "a"
    alone = rank([broken, replace(broken, name="b", trainable_parameters=5)], design)
    assert (alone.best, alone.tied, alone.cheapest) == ("a", ("a", "b"), "a")
    (nothing,) = alone.comparisons
    assert math.isnan(nothing.difference) and nothing.p is None


def test_area_of_one_label_alone() -> None:
    labels = np.ones(10, dtype=int)
    p = drawn(np.random.default_rng(0), labels, 1)
    assert math.isnan(sums(ROC_AUC, p, labels).value())
    scored = [Scored(name, [run(seed, ROC_AUC, p, labels) for seed in range(2)], 1) for name in "ab"]
    assert math.isnan(rank(scored, fixed(labels, ROC_AUC)).candidates[0].mean)
    assert pair([on_value(each, 0.5) for each in scored], fixed(labels, ROC_AUC)).p is None


def test_probabilities_that_are_no_numbers() -> None:
    labels = np.arange(10) % 2
    p = drawn(np.random.default_rng(0), labels, 1)
    known = split("b", [p, p], labels, LOSS)
    lost = on_value(split("a", [p * math.nan] * 2, labels, LOSS), 0.0)
    ranking = rank([lost, known], fixed(labels, LOSS))
    assert ranking.tied == ("b",) and math.isnan(ranking.candidates[1].mean)


def test_misuse_is_told_in_one_line() -> None:
    labels = np.arange(10) % 2
    p = np.full((10, 2), 0.5)
    a, b = folded("a", [0.5, 0.6]), folded("b", [0.5, 0.6])
    seeds = split("a", [p, p], labels)

    def refused(message: str, scored: Sequence[Scored], design: Design = FIVE_FOLDS) -> None:
        with pytest.raises(TanzakuError, match=message) as error:
            rank(scored, design)
        assert "\n" not in str(error.value)

    refused("no candidates", [])
    refused("two candidates are named 'a'", [a, b, a])
    refused("kind 'fold', expected folds or split", [a], replace(FIVE_FOLDS, kind="fold"))  # type: ignore[arg-type]
    refused("0 training", [a], replace(FIVE_FOLDS, train_rows=0))
    refused("nan validation", [a], replace(FIVE_FOLDS, valid_rows=math.nan))
    refused("'b' has no runs", [a, folded("b", [])])
    refused("'b' was measured on other .* than 'a' .3 and 2 runs", [a, folded("b", [0.5, 0.6, 0.7])])
    refused("other repeats, folds or seeds", [a, replace(b, runs=[replace(run, seed=1) for run in b.runs])])
    refused("'b' has two runs of one repeat", [a, replace(b, runs=[b.runs[0]] * 2)])
    refused("expected their strata", [seeds], Design("split", LOSS, 10, 10))
    refused("expected their strata", [seeds], fixed(labels[:, None]))
    refused("expected their strata", [seeds], Design("split", LOSS, 10, 10, strata=labels[:0]))
    refused("candidate 'a' has no statistics", [a], fixed(labels))
    refused("candidate 'a' has statistics of 10 rows, expected 9", [seeds], fixed(labels[:9]))


# Simulated: how often noise alone is told apart, and a real difference is


def centroids(rng: np.random.Generator, skills: tuple[float, float], repeats: int = 4) -> Array:
    """Accuracy [2, repeats * 5] of two classifiers of five inputs each, in repeated 5-fold cross-validation of 60 rows.

    Of equal skill, they are exchangeable: what tells them apart is noise.
    """
    labels = rng.permutation(np.arange(60) % 2)
    inputs = rng.normal(size=(2, 60, 5)) + np.array(skills)[:, None, None] * (labels[None, :, None] - 0.5)
    found = np.empty((2, repeats * 5))
    for i in range(repeats):
        for k, valid in enumerate(np.split(rng.permutation(60), 5)):
            train = np.setdiff1d(np.arange(60), valid)
            ones, zeros = (inputs[:, train[labels[train] == label]].mean(1, keepdims=True) for label in (1, 0))
            scores = ((inputs[:, valid] - (ones + zeros) / 2) * (ones - zeros)).sum(2)
            found[:, 5 * i + k] = ((scores > 0) == labels[valid]).mean(1)
    return found


def folds_told(skills: tuple[float, float], times: int) -> tuple[float, float]:
    """Shares that are told apart: by `rank`, and by a plain paired t-test on the same figures."""
    rng = np.random.default_rng(5)
    design = Design("folds", ACCURACY, train_rows=48, valid_rows=12)
    told, plain = [], []
    for _ in range(times):
        figures = centroids(rng, skills)
        told.append(pair([folded("a", figures[0].tolist()), folded("b", figures[1].tolist())], design).told)
        difference = figures[0] - figures[1]
        t = difference.mean() / math.sqrt(difference.var(ddof=1) / len(difference))
        plain.append(2 * stats.t.sf(abs(t), len(difference) - 1) < 0.05)
    return float(np.mean(told)), float(np.mean(plain))


def test_noise_of_folds_is_rarely_told_apart() -> None:
    """The plain test is what the correction is for."""
    told, plain = folds_told((0.8, 0.8), times=300)
    assert told <= 0.06
    assert plain > 0.2


def test_a_large_difference_is_found_in_folds() -> None:
    told, _ = folds_told((0.2, 1.5), times=40)
    assert told > 0.9


def many_told(best: float, number: int, times: int) -> tuple[float, float, float]:
    """Of `number` candidates in twice five folds of 216 rows, all with an area of 0.85 but the first: the shares of
    cases in which any is called worse than the best, in which the true best is, and of others that are told from it."""
    rng = np.random.default_rng(7)
    labels = np.arange(216) % 2
    skills = np.sqrt(2) * stats.norm.ppf([best, *[0.85] * (number - 1)])
    anyone, dropped, found = [], [], []
    for _ in range(times):
        rows = 0.77 * rng.normal(size=216) + 0.63 * rng.normal(size=(number, 216)) + skills[:, None] * (labels - 0.5)
        runs: list[list[Run]] = [[] for _ in range(number)]
        for repeat in range(2):
            order = np.concatenate([2 * rng.permutation(108), 2 * rng.permutation(108) + 1])
            for fold in range(5):
                at = order[fold::5]
                trained = rows[:, at] + 0.3 * rng.normal(size=(number, len(at)))
                for own, scores in zip(runs, trained, strict=True):
                    own.append(Run(repeat, fold, 0, area(scores, labels[at])))
        scored = [Scored(str(i), own, 1) for i, own in enumerate(runs)]
        ranking = rank(scored, Design("folds", ROC_AUC, train_rows=173, valid_rows=43))
        told = {each.b for each in ranking.comparisons if each.a == ranking.best and each.told}
        anyone.append(bool(told))
        dropped.append("0" in told)
        found.append(len(told) / (number - 1) if ranking.best == "0" else 0)
    return float(np.mean(anyone)), float(np.mean(dropped)), float(np.mean(found))


def area(scores: Array, labels: Array) -> float:
    return float((scores[labels == 1][:, None] > scores[labels == 0]).mean())


@pytest.mark.parametrize("number", [2, 5, 9])
def test_of_many_equal_candidates_hardly_any_is_called_worse(number: int) -> None:
    assert many_told(0.85, number, times=120)[0] <= 0.05


def test_of_nine_candidates_ten_points_are_found() -> None:
    """Pairs that the verdict does not speak of are no reason to find less."""
    _, dropped, found = many_told(0.95, 9, times=40)
    assert dropped == 0 and found >= 0.5


def test_what_is_said_to_be_found_is_found() -> None:
    """In simulated comparisons of three with one degree of noise: 80 of 100, give or take what 4,000 draws do."""
    rng = np.random.default_rng(1)
    truth, told = statistics._findable(2, 9), []
    for _ in range(1500):
        common, own = rng.normal(), rng.normal(size=2)
        t = (truth + (common + own) / math.sqrt(2)) / np.sqrt(rng.chisquare(9, 2) / 9)
        told += [p < 0.05 for p in holm((2 * stats.t.sf(np.abs(t), 9)).tolist())]
    assert np.mean(told) == pytest.approx(0.8, abs=0.03)


def split_told(gap: float, unsteady: float, seeds: int, times: int, metric: Metric) -> float:
    """The share told apart of two candidates that answer rows, and train, differently by chance."""
    rng = np.random.default_rng(6)
    told = []
    for _ in range(times):
        labels = rng.permutation(np.arange(60) % 2)
        shared = rng.normal(size=60) / 2
        scored = []
        for name, skill in (("a", 0.8 + gap), ("b", 0.8)):
            own = rng.normal(size=60)
            margins = (skill + unsteady * rng.normal(size=(seeds, 1))) * (2 * labels - 1) + shared + own
            p = 1 / (1 + np.exp(-2 * margins))
            scored.append(split(name, [np.stack([1 - row, row], axis=1) for row in p], labels, metric))
        told.append(pair(scored, fixed(labels, metric)).told)
    return float(np.mean(told))


@pytest.mark.parametrize(
    ("unsteady", "seeds", "metric"),
    costly([(0, 3, ACCURACY), (0.3, 3, ROC_AUC)], [(0.5, 2, ACCURACY), (1.5, 2, LOSS)]),
)
def test_noise_of_a_split_is_rarely_told_apart(
    unsteady: float, seeds: int, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows alone, both, and mostly training with two seeds, where the seeds' own variance would tell one in eight."""
    monkeypatch.setattr(statistics, "REPLICATES", 300)
    assert split_told(0, unsteady, seeds, times=300, metric=metric) <= 0.06


def test_a_large_difference_is_found_in_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "REPLICATES", 300)
    assert split_told(1.5, 0.2, seeds=3, times=40, metric=ACCURACY) > 0.9
