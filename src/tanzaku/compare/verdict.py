"""What a ranking says, in plain words: a few short sentences, none of which claims more than the data support."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tanzaku.compare.statistics import LEVEL, Comparison, Design, Interval, Ranking, Standing
from tanzaku.support.numbers import written
from tanzaku.tasks.task import Metric, Task, metric_named

MORE = "measure with --seeds 3 or --folds 5"
BASE = "the base"  # as it is; no candidate's name, since it has a space
SHOWN = 6  # names in one sentence


def tested_by(results: Mapping[str, Any], task: Task) -> list[Metric]:
    """The figures of the test rows that a table shows: the one that ranks, with the task's own beside it. None without
    test rows."""
    if not any(each["test"] for each in results["candidates"]):
        return []
    names = dict.fromkeys([results["design"]["metric"], *task.beside])
    return [metric_named(task, name) for name in names]


def sentences(
    ranking: Ranking | None, design: Design, failed: Mapping[str, str] | None = None, tested: float | None = None
) -> list[str]:
    """The verdict: which is best, who is tied with it, which of these is cheapest, who is worse, who has no figure.

    Args:
        ranking: of `statistics.rank` by this design; None where no candidate finished.
        failed: candidates that are not in it, and why, in one line each.
        tested: what the best one's adapter has of the design's metric on test rows, where there are any.
    """
    metric, failures = design.metric.on_validation, _failures(failed or {})
    if ranking is None:
        return ["No candidate finished, so there is no verdict.", *failures]
    best, *others = ranking.candidates
    if math.isnan(best.mean):
        return [
            f"No candidate has a figure, so there is no verdict: in a run of each, {metric} is no number.",
            *failures,
        ]
    out = [_best(best, ranking.runs, metric, alone=not others)]
    if len(ranking.tied) > 1:
        out.append(_chosen(len(ranking.tied), tested))
    pairs = [pair for pair in ranking.comparisons if pair.a == best.name and not math.isnan(pair.difference)]
    tied = [pair for pair in pairs if pair.b in ranking.tied]
    worse = [pair for pair in pairs if pair.b not in ranking.tied]
    only = len(ranking.comparisons) == 1
    if all(pair.p is None for pair in pairs) and (pairs or ranking.runs == 1):
        out.append(_too_few(ranking))
    elif tied:
        out += [_tied(tied, best.name, not worse, only), _visible(tied, design.metric), _cheapest(ranking, design)]
    if worse:
        out.append(_worse(worse, best.name, not tied, only))
    if missing := [each.name for each in others if math.isnan(each.mean)]:
        out.append(f"{_and(missing)} {_are(missing)} ranked last: in a run, {metric} was no number.")
    return out + failures


def against_base(ranking: Ranking, pair: Comparison, design: Design) -> str:
    """What training has changed.

    Args:
        ranking: of the base, which trains nothing, and the best candidate; `pair` is of these two.
    """
    (base,) = (each for each in ranking.candidates if each.name == BASE)
    (best,) = (each for each in ranking.candidates if each.name != BASE)
    if math.isnan(base.mean):
        return f"The base without training has no figure: in a run, {design.metric.on_validation} was no number."
    start = f"Without training, the base has {_number(base.mean)}"
    if pair.p is None or math.isnan(pair.difference):
        return f"{start}."
    if not pair.told:
        return f"{start}, and the data cannot tell {best.name} from it ({_p(pair.p, True)})."
    sizes = sorted(map(abs, pair.interval)) if pair.interval else [abs(pair.difference)] * 2
    better = "better" if ranking.best == best.name else "worse"
    return f"{start}; {best.name} is {better} by {_range((sizes[0], sizes[1]))} ({_p(pair.p, True)})."


def _best(best: Standing, runs: int, metric: str, alone: bool) -> str:
    metric = f"mean {metric}" if runs > 1 and not metric.startswith("mean ") else metric
    of = "other validation rows: " if best.of_rows else "95% interval "
    interval = f"{of}{_range(best.interval)}, " if best.interval else ""
    figure = f"{_number(best.mean)} ({interval}{runs} run{'s' if runs > 1 else ''})"
    if alone:
        return f"{best.name} is the only candidate: its {metric} is {figure}."
    return f"{best.name} has the best {metric}, {figure}."


def _chosen(many: int, tested: float | None) -> str:
    """Of several that could have come first, the one that did had luck: its figure is too good. Tsamardinos et al.
    2018, Machine Learning 107, measure by how much."""
    lucky = f"Of {many} that could be the best these rows put it first, partly by luck"
    if tested is None or math.isnan(tested):
        return f"{lucky}: on others expect it to be somewhat worse."
    return f"{lucky}; on the test rows, which chose nothing, its adapter has {_number(tested)}."


def _too_few(ranking: Ranking) -> str:
    runs = "Too few runs" if ranking.runs > 1 else "One run each" if len(ranking.candidates) > 1 else "One run"
    hidden = " and not in the interval" if ranking.candidates[0].interval else ""
    return f"{runs}: what training anew would change is not known{hidden}, so there is no verdict; {MORE}."


def _tied(tied: Sequence[Comparison], best: str, everyone: bool, only: bool) -> str:
    names = f"any of the other {len(tied)}" if everyone and len(tied) > 2 else _and(pair.b for pair in tied)
    if len(tied) == 1 and tied[0].p_adjusted is not None:
        return f"The data cannot tell {best} from {names} ({_p(tied[0].p_adjusted, only)})."
    return f"The data cannot tell {best} from {names} (each adjusted p is at least {LEVEL})."


def _visible(tied: Sequence[Comparison], metric: Metric) -> str:
    """What this much data can see at all."""
    least = max(pair.visible for pair in tied if pair.visible is not None)
    if metric.bounded and least >= (metric.bounds[1] - metric.bounds[0]) / 2:
        return "With so few runs, hardly any difference would be found; more seeds or folds would help."
    return f"A true difference of {_number(least)} is found in 80 of 100 such comparisons."


def _cheapest(ranking: Ranking, design: Design) -> str:
    """That two cannot be told apart is no sign that they are alike: what is cheaper has to be shown to be as good."""
    sizes = {each.name: each.trainable_parameters for each in ranking.candidates}
    parameters = f"it trains {sizes[ranking.cheapest]:,} parameters"
    if ranking.cheapest != ranking.best:
        within = f"{design.margin:.0%} of it" if not design.metric.bounded else f"{design.margin:g}"
        also = f", in {_and(design.beside)} too" if design.beside else ""
        return (
            f"Of these, {ranking.cheapest} is the cheapest that is expected to lose no more than {within} against "
            f"{ranking.best}{also}: {parameters}."
        )
    if all(sizes[name] >= sizes[ranking.best] for name in ranking.tied):
        return f"Of these, {ranking.best}, the best, also is the cheapest: {parameters}."
    return f"Nothing cheaper is shown to be as good as {ranking.best}: {parameters}."


def _worse(worse: Sequence[Comparison], best: str, everyone: bool, only: bool) -> str:
    sizes = [abs(pair.difference) for pair in worse]
    if len(worse) > 1:
        names = f"All {len(worse)} others" if everyone and len(worse) > 2 else _and(pair.b for pair in worse)
        by = _range((min(sizes), max(sizes)))
        return f"{names} are worse than {best}, by {by} (each adjusted p is below {LEVEL})."
    (pair,) = worse
    # A pair that is told apart has 0 outside of its interval.
    interval = pair.interval and (min(map(abs, pair.interval)), max(map(abs, pair.interval)))
    within = f"{_range(interval)}, " if interval else ""
    p = _p(pair.p_adjusted or 0.0, only)
    return f"{pair.b} is worse than {best} by {_number(sizes[0])} ({within}{p})."


def _failures(failed: Mapping[str, str]) -> list[str]:
    if not failed:
        return []
    if len(failed) > 2:
        return [f"{_and(failed)} failed and are not ranked."]
    whys = _and(f"{name} ({why.strip().rstrip('.')})" for name, why in failed.items())
    return [f"{whys} failed and {_are(failed)} not ranked."]


def _are(names: Sequence[str] | Mapping[str, str]) -> str:
    return "is" if len(names) == 1 else "are"


def _and(names: Iterable[str]) -> str:
    every = list(names)
    if len(every) > SHOWN:
        every = [*every[: SHOWN - 1], f"{len(every) - SHOWN + 1} more"]
    return " and ".join(filter(None, [", ".join(every[:-1]), every[-1]]))


def _range(interval: Interval) -> str:
    return f"{_number(interval[0])} to {_number(interval[1])}"


def _number(value: float) -> str:
    return written(value, 3)


def _p(value: float, only: bool) -> str:
    """`only`: there is one pair, and nothing was adjusted."""
    name = "p" if only else "adjusted p"
    if value < 0.001:
        return f"{name} below 0.001"
    near = abs(value - LEVEL) < 0.0005  # three decimals would not show the side
    return f"{name} {value:.{5 if near else 3}f}"
