"""Which candidates are better, as far as the data can tell: means, intervals, p-values, and who is tied.

Two designs. Cross-validation (``folds``) shares training rows between its runs, so that a plain t-test on them finds
far too much: its variance is corrected. A fixed split (``split``) has two sources of noise: training, seen in its
seeds, and the choice of validation rows, seen in a bootstrap of them. Nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats

from tanzaku.errors import TanzakuError
from tanzaku.recipe.comparison import MARGIN
from tanzaku.tasks.task import Metric, Statistics

Array = np.ndarray[Any, np.dtype[Any]]
Interval = tuple[float, float]

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

    `value` is the design's metric on the run's validation rows, and `statistics` has it as sums over these, in the
    order of the file. `strata` are numbers [n] of a fold's own rows, by which they are drawn anew; those of a fixed
    split are in its design.
    """

    repeat: int
    fold: int
    seed: int
    value: float
    statistics: Statistics | None = None
    strata: Array | None = None


@dataclass(frozen=True)
class Scored:
    """A candidate all of whose runs succeeded."""

    name: str
    runs: Sequence[Run]
    trainable_parameters: int


@dataclass(frozen=True)
class Design:
    """How all candidates were measured.

    `train_rows` and `valid_rows` are those of one run, on average. `strata` are numbers [n] of a fixed split's
    validation rows, by which they are drawn anew. `margin` is how much less of the metric a cheaper candidate may be
    expected to have: of one without bounds, a share of the best's. `beside`: titles of metrics in which it must not
    lose more either.
    """

    kind: Literal["folds", "split"]
    metric: Metric
    train_rows: float
    valid_rows: float
    strata: Array | None = None
    margin: float = MARGIN
    beside: tuple[str, ...] = ()


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


def losses(scored: Sequence[Scored], design: Design, best: str) -> dict[str, float]:
    """What of the design's metric is expected to be lost by taking each candidate in place of `best`, which need not be
    the best in this metric; inf where nothing tells. Of a metric without bounds, as a share of the best's."""
    found = {each.name: _figures(each, design) for each in scored}
    order = sorted(scored, key=lambda each: each.name != best)
    table = np.stack([found[each.name] for each in order])
    noise = _Folds(table, design) if design.kind == "folds" else _Split(table, order, design)
    means, out = table.mean(axis=1), {best: 0.0}
    scale = 1.0 if design.metric.bounded else abs(float(means[0])) or 1.0
    for i, each in enumerate(order[1:], 1):
        between = noise.of_difference(0, i)
        loss = math.inf if between is None else between.loss(design.metric.sign * float(means[0] - means[i]))
        out[each.name] = loss / scale
    return out


def rank(scored: Sequence[Scored], design: Design, beside: Mapping[str, float] | None = None) -> Ranking:
    """Candidates in the order of their means, and what can be told of each pair.

    Args:
        beside: by candidate, the largest loss (:func:`losses`) against the best in what else is asked of it. A metric
            that is near its end for all tells little apart, where others still do.

    Equal means go by fewer trained parameters, then by name. A candidate with a figure that is no number (the area of
    one class alone, a loss that ran away) has no mean: it comes last and is compared with none.

    Raises:
        TanzakuError: no candidates, two of one name, runs that differ between candidates, an unknown kind, no rows;
            for a fixed split, strata or statistics missing or of another shape.
    """
    _check(scored, design)
    figures = {each.name: _figures(each, design) for each in scored}
    means = {name: float(row.mean()) for name, row in figures.items()}
    sign = -design.metric.sign

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
    margin = design.margin * (1 if design.metric.bounded else abs(best.mean))

    def good(each: Standing) -> bool:
        loss = None if each is best else with_best[each.name].loss
        also = (beside or {}).get(each.name, 0.0)
        return each is best or (loss is not None and loss <= margin and also <= design.margin)

    cheapest = min(filter(good, tied), key=lambda each: each.trainable_parameters)
    names = tuple(each.name for each in tied)
    return Ranking(tuple(standings), comparisons, best.name, names, cheapest.name, len(scored[0].runs))


def _standing(each: Scored, figures: Array, noise: _Noise | None, design: Design) -> Standing:
    mean, few = float(figures.mean()), len(figures) < ENOUGH
    if few:
        interval = None if math.isnan(mean) else _of_rows(each, design)
    else:
        interval = None if noise is None else noise.interval(mean, design.metric.bounds)
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
    low, high = design.metric.bounds
    out = []
    for pair, difference in differences.items():
        a, b = (standings[i].name for i in pair)
        if (found := known.get(pair)) is None:
            out.append(Comparison(a, b, difference))
            continue
        interval = found.interval(difference, (low - high, high - low))
        visible = found.found(len(first) if pair in first else len(p))
        loss = found.loss(design.metric.sign * difference)
        out.append(Comparison(a, b, difference, interval, p[pair], adjusted[pair], visible, loss))
    return tuple(out)


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
        assert design.strata is not None  # checked
        self.rows = len(design.strata)
        sizes = np.unique(design.strata, return_counts=True)[1]
        self.share = 1 / (len(sizes) * sizes.min() if design.metric.by_stratum else self.rows)
        known = [i for i in range(len(order)) if not np.isnan(table[i]).any()]
        drawn = _bootstrap([order[i] for i in known], design.strata)
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


def _grain(metric: Metric, share: float, figure: float) -> float:
    """What one row of `share` is worth, above 0: its part of what the metric can be, or else of the figure."""
    low, high = metric.bounds
    return share * (high - low) if metric.bounded else max(share * abs(figure), ROUNDING)


def _of_rows(each: Scored, design: Design) -> Interval | None:
    """What the mean of these very runs would be on other validation rows, in 95 of 100 draws of them within strata;
    None where they are not kept. A metric of few rows is far from normal near its ends, and percentiles stay within."""
    runs = []
    for run in sorted(each.runs, key=_key):
        strata = run.strata if design.kind == "folds" else design.strata
        if strata is None or run.statistics is None or not run.statistics.known:
            return None
        runs.append((run.statistics, strata, (run.repeat, run.fold)))
    rng, total = np.random.default_rng(0), np.zeros(REPLICATES)
    for columns in _columns(max(len(strata) for _, strata, _ in runs)):
        drawn: dict[tuple[int, int], Array] = {}  # runs on the same rows see the same draws of them
        for statistics, strata, rows in runs:
            if rows not in drawn:
                drawn[rows] = _draws(rng, strata, len(columns))
            total[columns] += statistics.drawn(drawn[rows]) / len(runs)
    if not np.isfinite(total).all():
        return None
    low, high = np.percentile(total, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    return float(low), float(high)


def _columns(rows: int) -> list[Array]:
    """Numbers of the replicates, so many at a time as there is room for."""
    return np.array_split(np.arange(REPLICATES), max(1, rows * REPLICATES // CELLS))


def _draws(rng: np.random.Generator, strata: Array, number: int) -> Array:
    """[n, number]: how often each row is in each draw, as many of each stratum as there are."""
    counts = np.zeros((len(strata), number))
    for rows in (np.flatnonzero(strata == each) for each in np.unique(strata)):
        counts[rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), number).T
    return counts


def _bootstrap(scored: Sequence[Scored], strata: Array) -> Array:
    """[candidates, REPLICATES]: the metric, mean over a candidate's runs, on rows drawn anew within each stratum.

    In a replicate all candidates see the same rows, and every call draws the same.
    """
    rng = np.random.default_rng(0)
    out = np.zeros((len(scored), REPLICATES))
    for columns in _columns(len(strata)):
        counts = _draws(rng, strata, len(columns))
        for i, each in enumerate(scored):
            for run in sorted(each.runs, key=_key):  # sums in another order differ in the last digits
                assert run.statistics is not None  # checked
                out[i, columns] += run.statistics.drawn(counts) / len(each.runs)
    return out


def _figures(each: Scored, design: Design) -> Array:
    """One figure a resample: for folds the mean over seeds, for a split that of each seed. All nan if one is none."""
    by_resample: dict[tuple[int, ...], list[float]] = {}
    for run in sorted(each.runs, key=_key):
        lost = design.kind == "split" and run.statistics is not None and not run.statistics.known
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
        _check_split(scored, design.strata)


def _check_split(scored: Sequence[Scored], strata: Array | None) -> None:
    if strata is None or strata.ndim != 1 or not len(strata):
        raise TanzakuError("a fixed split is compared by its validation rows; expected their strata [n]")
    for name, found in ((each.name, run.statistics) for each in scored for run in each.runs):
        whose = f"a run of candidate {name!r}"
        if found is None:
            raise TanzakuError(f"{whose} has no statistics; a fixed split is compared by those of its rows")
        if found.rows.shape[0] != len(strata):
            raise TanzakuError(f"{whose} has statistics of {found.rows.shape[0]} rows, expected {len(strata)}")
