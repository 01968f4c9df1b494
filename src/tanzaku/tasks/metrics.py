"""Metrics of classes, as each row's sufficient statistics; and an interval for a share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tanzaku.errors import TanzakuError
from tanzaku.support.lazy import Lazy
from tanzaku.tasks.task import Metric, Records, Statistics

if TYPE_CHECKING:
    import numpy as np

    from tanzaku.tasks.task import Array


# Of the records of a classifier: `probabilities` [n, C] in float64, `target` [n], ids.
else:
    np = Lazy("numpy")


def unknown(rows: int) -> Statistics:
    """The statistics of rows whose figure is no number."""
    return Statistics(np.full((rows, 1), math.nan), lambda sums: sums[0])


def _right(records: Records) -> Array:
    right: Array = records["probabilities"].argmax(axis=1) == records["target"]
    return right


def _accuracy(records: Records) -> Statistics:
    if not np.isfinite(records["probabilities"]).all():
        return unknown(len(records["target"]))
    right = _right(records)
    return Statistics(np.stack([right, np.ones(len(right))], axis=1), lambda sums: sums[0] / sums[1])


def _macro_f1(records: Records) -> Statistics:
    """Over the classes seen or predicted."""
    probabilities, target = records["probabilities"], records["target"]
    n, classes = probabilities.shape
    if not np.isfinite(probabilities).all():
        return unknown(n)
    truth, guess = np.eye(classes)[target], np.eye(classes)[probabilities.argmax(axis=1)]

    def figure(sums: Array) -> Array:
        hits, sizes = sums[:classes], sums[classes:]
        of_class: Array = (2 * hits / np.maximum(sizes, 1)).sum(0) / (sizes > 0).sum(0)
        return of_class

    return Statistics(np.concatenate([truth * guess, truth + guess], axis=1), figure)


def _roc_auc(records: Records) -> Statistics:
    """Of the probability of class 1 for two classes; beyond, the mean over classes of one against the rest, without the
    classes that every row or no row belongs to."""
    probabilities, target = records["probabilities"], records["target"]
    classes = probabilities.shape[1]
    ones = [1] if classes == 2 else list(range(classes))
    return areas(probabilities[:, ones], target[:, None] == ones)


def areas(scores: Array, truth: Array) -> Statistics:
    """The mean over columns of the area under the curve of scores [n, C] for what is true [n, C], without columns that
    are true of all rows or of none.

    The area is no function of a few sums; but of sums at each place in the order of the scores it is one: the share of
    pairs, one row of the class and one of another, in which the first scores more, where a tie is half.
    """
    from scipy.sparse import csr_array

    n = len(scores)
    known = [c for c in range(scores.shape[1]) if 0 < truth[:, c].sum() < n]
    if not known or not np.isfinite(scores).all():
        return unknown(n)
    columns, sizes, start = [], [], 0
    for c in known:
        values, place = np.unique(scores[:, c], return_inverse=True)
        columns.append(start + place + len(values) * truth[:, c])
        sizes.append(len(values))
        start += 2 * len(values)
    rows = np.tile(np.arange(n), len(known))
    table = csr_array((np.ones(len(rows)), (rows, np.concatenate(columns))), shape=(n, start))

    def figure(sums: Array) -> Array:
        areas, at = np.zeros((len(sizes), sums.shape[1])), 0
        for row, size in enumerate(sizes):
            others, own = sums[at : at + size], sums[at + size : at + 2 * size]
            won = own * (others.cumsum(axis=0) - others / 2)
            with np.errstate(invalid="ignore"):  # a draw without rows of one kind
                areas[row] = won.sum(axis=0) / (own.sum(axis=0) * others.sum(axis=0))
            at += 2 * size
        mean: Array = areas.mean(axis=0)
        return mean

    return Statistics(table, figure)


ACCURACY = Metric("accuracy", "accuracy", "higher", (0.0, 1.0), _accuracy, proportion=True)
ROC_AUC = Metric("roc_auc", "ROC-AUC", "higher", (0.0, 1.0), _roc_auc, by_stratum=True)
MACRO_F1 = Metric("macro_f1", "macro F1", "higher", (0.0, 1.0), _macro_f1, by_stratum=True, hub="f1")


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) of the share ``successes / n``, which also holds near 0 and 1.

    Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= n or n < 1:
        raise TanzakuError(f"found {successes} successes of {n}, expected 0 to n successes of at least one")
    if not 0 < confidence < 1:
        raise TanzakuError(f"confidence is {confidence}, expected a share between 0 and 1, such as 0.95")
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def interval_of(metric: Metric, records: Records) -> tuple[float, float] | None:
    """The 95% interval of a share of rows; None for other metrics, and where it is no number."""
    if not metric.proportion:
        return None
    sums: Any = metric.statistics(records).rows.sum(axis=0)
    return None if not np.isfinite(sums).all() else wilson_interval(int(sums[0]), int(sums[1]))
