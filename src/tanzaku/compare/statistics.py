"""Which candidates are better, as far as the data can tell: means, intervals, p-values, and who is tied.

Two designs. Cross-validation (``folds``) shares training rows between its runs, so that a plain t-test on them finds
far too much: its variance is corrected. A fixed split (``split``) has two sources of noise: training, seen in its
seeds, and the choice of validation rows, seen in a bootstrap of them. Nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats

from tanzaku.compare.settings import MARGIN
from tanzaku.errors import TanzakuError, listed, nearest

Array = np.ndarray[Any, np.dtype[Any]]
Interval = tuple[float, float]

METRICS = ("loss", "accuracy", "roc_auc", "macro_f1")
LEVEL = 0.05  # below it, two candidates are told apart
SIMULATED = 4000  # comparisons
POWER = 0.8  # how often a difference that is said to be found would be
ENOUGH = 5  # figures from which a t interval of their mean is given
REPLICATES = 2000  # of the bootstrap
CELLS = 2**17  # validation rows times replicates held at once: 1 MiB in float64
ROUNDING = 1e-6  # nats: a mean loss of float32 logits is not known better


@dataclass(frozen=True)
class Run:
    """One measured training run of a candidate.

    `value` is the design's metric on the run's validation rows, `probabilities` [n, C] are those that it gives their
    labels, in the order of the file. `labels` are the ids [n] of a fold's own rows; those of a fixed split are in its
    design.
    """

    repeat: int
    fold: int
    seed: int
    value: float
    probabilities: Array | None = None
    labels: Array | None = None


@dataclass(frozen=True)
class Scored:
    """A candidate all of whose runs succeeded."""

    name: str
    runs: Sequence[Run]
    trainable_parameters: int


@dataclass(frozen=True)
class Design:
    """How all candidates were measured.

    `metric` is one of METRICS; of loss less is better, of the others more. `train_rows` and `valid_rows` are those of
    one run, on average. `labels` are the ids [n] of a fixed split's validation rows. `margin` is how much less of the
    metric a cheaper candidate may be expected to have: of a loss, a share of the best's.
    """

    kind: Literal["folds", "split"]
    metric: str
    train_rows: float
    valid_rows: float
    labels: Array | None = None
    margin: float = MARGIN


@dataclass(frozen=True)
class Standing:
    """A candidate in the order. `mean` is nan where a figure was no number.

    `interval` (95%; None where unknown) is of the mean over runs and rows, where there are five `figures` or more: one
    of each fold, or of each seed of a fixed split. Of fewer it is `of_rows` alone: what other validation rows would
    have given these very runs.
    """

    name: str
    mean: float
    interval: Interval | None
    trainable_parameters: int
    figures: tuple[float, ...] = ()
    of_rows: bool = False


@dataclass(frozen=True)
class Comparison:
    """Two candidates, `a` before `b` in the order. Where there is nothing to go by, figures are None.

    `difference` is a's mean less b's, `interval` the 95% interval of this pair alone, `p` two-sided. `p_adjusted`
    (Holm) is over the pairs with the best, for those; for others, which no verdict speaks of, over all pairs. Were all
    others truly worse by `visible`, 80 of 100 of them would be found. `loss` is what of the metric is expected to be
    lost by taking b in place of a.
    """

    a: str
    b: str
    difference: float
    interval: Interval | None = None
    p: float | None = None
    p_adjusted: float | None = None
    visible: float | None = None
    loss: float | None = None

    @property
    def told(self) -> bool:
        """Whether the data tell the two apart."""
        return self.p_adjusted is not None and self.p_adjusted < LEVEL


@dataclass(frozen=True)
class Ranking:
    """Every candidate and every pair, best mean first.

    `tied`: the best and all that the data cannot tell from it. `cheapest`: of these, the one that trains the fewest
    parameters, among the best itself and those whose expected loss against it is within the design's margin; that two
    cannot be told apart is no sign that they are alike. `runs`: how many each candidate had.
    """

    candidates: tuple[Standing, ...]
    comparisons: tuple[Comparison, ...]
    best: str
    tied: tuple[str, ...]
    cheapest: str
    runs: int


def rank(scored: Sequence[Scored], design: Design) -> Ranking:
    """Candidates in the order of their means, and what can be told of each pair.

    Equal means go by fewer trained parameters, then by name. A candidate with a figure that is no number (the area of
    one class alone, a loss that ran away) has no mean: it comes last and is compared with none.

    Raises:
        TanzakuError: no candidates, two of one name, runs that differ between candidates, an unknown kind or metric,
            no rows; for a fixed split, labels or probabilities missing or of another shape.
    """
    _check(scored, design)
    figures = {each.name: _figures(each, design) for each in scored}
    means = {name: float(row.mean()) for name, row in figures.items()}
    sign = 1 if design.metric == "loss" else -1

    def place(each: Scored) -> tuple[bool, float, int, str]:
        mean = means[each.name]
        # Rounded, since equal means of unequal figures differ in the last digits.
        score = 0.0 if math.isnan(mean) else sign * round(mean, 12)
        return math.isnan(mean), score, each.trainable_parameters, each.name

    order = sorted(scored, key=place)
    table = np.stack([figures[each.name] for each in order])
    noise = _Folds(table, design) if design.kind == "folds" else _Split(table, order, design)
    standings = [_standing(each, figures[each.name], noise.of_mean(i), design) for i, each in enumerate(order)]
    comparisons = _comparisons(standings, noise, design)
    best = standings[0]
    with_best = {pair.b: pair for pair in comparisons if pair.a == best.name}
    apart = {name for name, pair in with_best.items() if pair.told}
    tied = [each for each in standings if each.name not in apart and math.isnan(each.mean) == math.isnan(best.mean)]
    margin = design.margin * (abs(best.mean) if design.metric == "loss" else 1)

    def good(each: Standing) -> bool:
        loss = None if each is best else with_best[each.name].loss
        return each is best or (loss is not None and loss <= margin)

    cheapest = min(filter(good, tied), key=lambda each: each.trainable_parameters)
    names = tuple(each.name for each in tied)
    return Ranking(tuple(standings), comparisons, best.name, names, cheapest.name, len(scored[0].runs))


def _standing(each: Scored, figures: Array, noise: _Noise | None, design: Design) -> Standing:
    mean, few = float(figures.mean()), len(figures) < ENOUGH
    if few:
        interval = None if math.isnan(mean) else _of_rows(each, design)
    else:
        interval = None if noise is None else noise.interval(mean, _bounds(design.metric))
    own = tuple(figures.tolist())
    return Standing(each.name, mean, interval, each.trainable_parameters, own, of_rows=few and interval is not None)


def _comparisons(standings: Sequence[Standing], noise: _Folds | _Split, design: Design) -> tuple[Comparison, ...]:
    differences = {(a, b): standings[a].mean - standings[b].mean for a, b in combinations(range(len(standings)), 2)}
    known = {pair: found for pair in differences if (found := noise.of_difference(*pair)) is not None}
    p = {pair: found.p(differences[pair]) for pair, found in known.items()}
    # The verdict speaks of the pairs with the best alone, so these are adjusted for each other alone.
    first = [pair for pair in p if pair[0] == 0]
    adjusted = dict(zip(p, holm(list(p.values())), strict=True))
    adjusted |= dict(zip(first, holm([p[pair] for pair in first]), strict=True))
    sign = -1 if design.metric == "loss" else 1
    low, high = _bounds(design.metric)
    out = []
    for pair, difference in differences.items():
        a, b = (standings[i].name for i in pair)
        if (found := known.get(pair)) is None:
            out.append(Comparison(a, b, difference))
            continue
        interval = found.interval(difference, (low - high, high - low))
        visible = found.found(len(first) if pair in first else len(p))
        loss = found.loss(sign * difference)
        out.append(Comparison(a, b, difference, interval, p[pair], adjusted[pair], visible, loss))
    return tuple(out)


def _bounds(metric: str) -> Interval:
    return 0.0, math.inf if metric == "loss" else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values raised for being several, in the order given. Holm 1979, Scandinavian Journal of Statistics 6."""
    adjusted, highest = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class _Noise:
    """Standard error of a figure (above 0), and the degrees of freedom of the t distribution that it follows."""

    error: float
    freedom: float

    def half(self, level: float) -> float:
        return self.error * float(stats.t.isf(level / 2, self.freedom))

    def interval(self, figure: float, bounds: Interval) -> Interval:
        half = self.half(LEVEL)
        return max(figure - half, bounds[0]), min(figure + half, bounds[1])

    def p(self, difference: float) -> float:
        return 2 * float(stats.t.sf(abs(difference) / self.error, self.freedom))

    def found(self, pairs: int) -> float:
        """The true difference of each of so many pairs that is found in 80 of 100 of them."""
        return self.error * _findable(pairs, max(1, round(self.freedom)))

    def loss(self, ahead: float) -> float:
        """What is expected to be lost against one that is `ahead` by so much: the mean of what of it is above 0, by the
        correlated Bayesian t-test. Corani & Benavoli 2015, Machine Learning 100."""
        z, n = ahead / self.error, self.freedom
        if n <= 1:
            return math.inf
        density = float(stats.t.pdf(z, n)) * (n + z * z) / (n - 1)
        return self.error * (z * float(stats.t.cdf(z, n)) + density)


@cache
def _findable(pairs: int, freedom: int) -> float:
    """In standard errors, the true difference of several candidates from a better one that Holm's tests find in 80 of
    100: simulated, since what one pair is held to depends on how many others were found before it."""
    rng = np.random.default_rng(0)
    size = (SIMULATED, pairs)
    # All pairs have the best in common, which is half of the noise of each.
    noise = (rng.normal(size=(SIMULATED, 1)) + rng.normal(size=size)) / math.sqrt(2)
    errors = np.sqrt(rng.chisquare(freedom, size) / freedom)
    limits = stats.t.isf(LEVEL / (2 * np.arange(pairs, 0, -1)), freedom)

    def missed(shift: float) -> float:
        ordered = -np.sort(-(shift + noise) / errors, axis=1)
        return POWER - float((ordered > limits).cumprod(axis=1).mean())

    high = float(limits[0]) + 2
    while missed(high) > 0:
        high *= 2
    return float(optimize.brentq(missed, 0.0, high, xtol=1e-3))


class _Folds:
    """The corrected resampled t-test: runs that share training rows vary less than runs on fresh rows would.

    Nadeau & Bengio 2003, Inference for the generalization error, Machine Learning 52; for repeated folds, Bouckaert &
    Frank 2004. The spread of figures (table [candidates, resamples]) is at least one validation row: figures that
    agree by chance, as those of a few rows do, are no certainty.
    """

    def __init__(self, table: Array, design: Design):
        self.table, self.design = table, design

    def of_mean(self, a: int) -> _Noise | None:
        return self._noise(self.table[a])

    def of_difference(self, a: int, b: int) -> _Noise | None:
        return self._noise(self.table[a] - self.table[b])

    def _noise(self, figures: Array) -> _Noise | None:
        count, rows = len(figures), self.design.valid_rows
        if count < 2 or np.isnan(figures).any():
            return None
        variance = max(float(figures.var(ddof=1)), _grain(self.design.metric, 1 / rows, float(figures.mean())) ** 2)
        return _Noise(math.sqrt(variance * (1 / count + rows / self.design.train_rows)), count - 1)


class _Split:
    """Two sources of noise: training, by the spread over seeds, and validation rows, by a paired bootstrap of them.

    Few seeds can agree by chance, and the t distribution of the sum (Welch-Satterthwaite) does not make up for that:
    with two seeds, one pair in eight could be told apart by noise alone. So the seeds' variance of a difference is the
    largest of three: its own, the sum of the two candidates', and twice that of a typical candidate, which is the
    median over all (made unbiased), so that one unstable candidate does not hide every difference. The rows' variance
    is at least one row's worth. One seed says nothing of training: there is no noise of a difference then, and that of
    a mean is the rows' alone.
    """

    def __init__(self, table: Array, order: Sequence[Scored], design: Design):
        self.table, self.metric, self.seeds = table, design.metric, table.shape[1]
        assert design.labels is not None  # checked
        self.rows = len(design.labels)
        sizes = np.unique(design.labels, return_counts=True)[1]
        by_class = design.metric in ("roc_auc", "macro_f1")  # means over classes: there a row of the rarest counts most
        self.share = 1 / (len(sizes) * sizes.min() if by_class else self.rows)
        known = [i for i in range(len(order)) if not np.isnan(table[i]).any()]
        drawn = _bootstrap([order[i] for i in known], design.labels, design.metric)
        self.replicates = {i: values for i, values in zip(known, drawn, strict=True) if np.isfinite(values).all()}
        self.spread, self.typical = np.zeros(len(table)), 0.0
        if self.seeds > 1 and known:
            self.spread = table.var(axis=1, ddof=1)
            middle = float(stats.chi2.median(self.seeds - 1)) / (self.seeds - 1)
            self.typical = float(np.median(self.spread[known])) / middle

    def of_mean(self, a: int) -> _Noise | None:
        if a not in self.replicates:
            return None
        seeds = max(float(self.spread[a]), self.typical)
        return self._noise(seeds, self.replicates[a], float(self.table[a].mean()))

    def of_difference(self, a: int, b: int) -> _Noise | None:
        if a not in self.replicates or b not in self.replicates or self.seeds < 2:
            return None
        difference = self.table[a] - self.table[b]
        seeds = max(float(difference.var(ddof=1)), float(self.spread[a] + self.spread[b]), 2 * self.typical)
        return self._noise(seeds, self.replicates[a] - self.replicates[b], float(difference.mean()))

    def _noise(self, seeds: float, replicates: Array, figure: float) -> _Noise:
        training = seeds / self.seeds
        rows = max(float(replicates.var(ddof=1)), _grain(self.metric, self.share, figure) ** 2)
        freedom = rows**2 / max(self.rows - 1, 1) + (training**2 / (self.seeds - 1) if self.seeds > 1 else 0.0)
        return _Noise(math.sqrt(training + rows), (training + rows) ** 2 / freedom)


def _grain(metric: str, share: float, figure: float) -> float:
    """What one row of `share` is worth, above 0: the whole share, or of a loss, its part of the figure."""
    return max(share * abs(figure), ROUNDING) if metric == "loss" else share


def _of_rows(each: Scored, design: Design) -> Interval | None:
    """What the mean of these very runs would be on other validation rows, in 95 of 100 draws of them within each label;
    None where they are not kept. A metric of few rows is far from normal near its ends, and percentiles stay within."""
    runs = []
    for run in sorted(each.runs, key=_key):
        labels = run.labels if design.kind == "folds" else design.labels
        if labels is None or run.probabilities is None or np.isnan(run.probabilities).any():
            return None
        runs.append((run.probabilities, labels, (run.repeat, run.fold)))
    rng, total = np.random.default_rng(0), np.zeros(REPLICATES)
    most = max(len(labels) for _, labels, _ in runs)
    for columns in np.array_split(np.arange(REPLICATES), max(1, most * REPLICATES // CELLS)):
        drawn: dict[tuple[int, int], Array] = {}  # runs on the same rows see the same draws of them
        for probabilities, labels, rows in runs:
            if rows not in drawn:
                drawn[rows] = _draws(rng, labels, len(columns))
            total[columns] += resampled(design.metric, probabilities, labels, drawn[rows]) / len(runs)
    if not np.isfinite(total).all():
        return None
    low, high = np.percentile(total, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    return float(low), float(high)


def _draws(rng: np.random.Generator, labels: Array, number: int) -> Array:
    """[n, number]: how often each row is in each draw, as many of each label as there are."""
    counts = np.zeros((len(labels), number))
    for rows in (np.flatnonzero(labels == label) for label in np.unique(labels)):
        counts[rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), number).T
    return counts


def _bootstrap(scored: Sequence[Scored], labels: Array, metric: str) -> Array:
    """[candidates, REPLICATES]: the metric, mean over a candidate's runs, on rows drawn anew within each label.

    In a replicate all candidates see the same rows, and every call draws the same.
    """
    rng = np.random.default_rng(0)
    out = np.zeros((len(scored), REPLICATES))
    for columns in np.array_split(np.arange(REPLICATES), max(1, len(labels) * REPLICATES // CELLS)):
        counts = _draws(rng, labels, len(columns))
        for i, each in enumerate(scored):
            for run in sorted(each.runs, key=_key):  # sums in another order differ in the last digits
                assert run.probabilities is not None  # checked
                out[i, columns] += resampled(metric, run.probabilities, labels, counts) / len(each.runs)
    return out


def resampled(metric: str, probabilities: Array, labels: Array, counts: Array) -> Array:
    """A metric of `tasks.metrics.classification_metrics`, of many draws of the same rows at once.

    Args:
        probabilities: [n, C], float64.
        labels: [n], ids.
        counts: [n, B], float64: how often each row is in each draw. All draws have the same rows of each label.

    Returns:
        [B]; nan where it is nan.
    """
    n, classes = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    out: Array
    if metric == "loss":
        own = np.maximum(probabilities[np.arange(n), labels], np.finfo(np.float64).tiny)
        out = -np.log(own) @ counts / counts[:, 0].sum()
    elif metric == "accuracy":
        out = (predicted == labels) @ counts / counts[:, 0].sum()
    elif metric == "macro_f1":
        truth, guess = labels == np.arange(classes)[:, None], predicted == np.arange(classes)[:, None]  # [C, n]
        hits, sizes = (truth & guess) @ counts, (truth * 1.0 + guess) @ counts
        out = (2 * hits / np.maximum(sizes, 1)).sum(0) / (sizes > 0).sum(0)  # of the classes seen or predicted
    else:
        ones = [1] if classes == 2 else np.unique(labels)
        areas = [_area(probabilities[:, c], labels == c, counts) for c in ones if 0 < (labels == c).sum() < n]
        out = np.mean(areas, axis=0) if areas else np.full(counts.shape[1], math.nan)
    return out


def _area(scores: Array, positive: Array, counts: Array) -> Array:
    """[B]: the share of pairs, one positive row and one not, in which the positive scores more; a tie is half."""
    order = np.flatnonzero(~positive)[scores[~positive].argsort()]
    below = np.zeros((len(order) + 1, counts.shape[1]))  # negative rows among the first k
    counts[order].cumsum(axis=0, out=below[1:])
    won = below[scores[order].searchsorted(scores[positive], "left")]
    won += below[scores[order].searchsorted(scores[positive], "right")]
    area: Array = np.einsum("pb,pb->b", counts[positive], won) / (2 * counts[positive].sum(0) * below[-1])
    return area


def _figures(each: Scored, design: Design) -> Array:
    """One figure a resample: for folds the mean over seeds, for a split that of each seed. All nan if one is none."""
    by_resample: dict[tuple[int, ...], list[float]] = {}
    for run in sorted(each.runs, key=_key):
        lost = design.kind == "split" and run.probabilities is not None and np.isnan(run.probabilities).any()
        by_resample.setdefault(_key(run)[: 2 if design.kind == "folds" else 3], []).append(
            math.nan if lost else run.value
        )
    figures = np.array([np.mean(values) for values in by_resample.values()], dtype=np.float64)
    return figures if np.isfinite(figures).all() else np.full_like(figures, math.nan)


def _key(run: Run) -> tuple[int, int, int]:
    return run.repeat, run.fold, run.seed


def _check(scored: Sequence[Scored], design: Design) -> None:
    if design.kind not in ("folds", "split"):
        raise TanzakuError(f"found a design of kind {design.kind!r}, expected folds or split")
    if design.metric not in METRICS:
        raise TanzakuError(
            f"found metric {design.metric!r}, expected one of {listed(METRICS)}{nearest(design.metric, METRICS)}"
        )
    if not (0 < design.train_rows < math.inf and 0 < design.valid_rows < math.inf):
        raise TanzakuError(
            f"found {design.train_rows} training and {design.valid_rows} validation rows a run, expected some of both"
        )
    if not scored:
        raise TanzakuError("there are no candidates to rank; expected one or more whose runs all succeeded")
    names = [each.name for each in scored]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TanzakuError(f"two candidates are named {twice[0]!r}; give each a name of its own")
    first = sorted(map(_key, scored[0].runs))
    for each in scored:
        keys = sorted(map(_key, each.runs))
        if not keys:
            raise TanzakuError(f"candidate {each.name!r} has no runs, expected one or more")
        if len(set(keys)) < len(keys):
            raise TanzakuError(f"candidate {each.name!r} has two runs of one repeat, fold and seed; expected one each")
        if keys != first:
            raise TanzakuError(
                f"candidate {each.name!r} was measured on other repeats, folds or seeds than {names[0]!r} "
                f"({len(keys)} and {len(first)} runs); expected the same for all"
            )
    if design.kind == "split":
        _check_split(scored, design.labels)


def _check_split(scored: Sequence[Scored], labels: Array | None) -> None:
    if labels is None or labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise TanzakuError("a fixed split is compared by its validation rows; expected their label ids [n] in labels")
    lowest, highest = int(labels.min()), int(labels.max())
    for name, found in ((each.name, run.probabilities) for each in scored for run in each.runs):
        whose = f"a run of candidate {name!r}"
        if found is None:
            raise TanzakuError(f"{whose} has no probabilities; a fixed split is compared by those of its rows")
        if found.ndim != 2 or len(found) != len(labels) or not 0 <= lowest <= highest < found.shape[1]:
            raise TanzakuError(
                f"{whose} has probabilities {list(found.shape)}, which do not fit {len(labels)} labels from {lowest} "
                f"to {highest}; expected [n, C] and labels from 0 to C - 1"
            )
        if (found < 0).any() or (found > 1).any():
            raise TanzakuError(f"{whose} has probabilities outside of 0 to 1; expected the softmax of its logits")
