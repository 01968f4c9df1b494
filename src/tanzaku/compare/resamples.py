"""The runs that every candidate gets: on repeated stratified folds, or on one split by several seeds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from tanzaku.errors import TanzakuError
from tanzaku.recipe.comparison import Design
from tanzaku.tasks.task import Split, TaskData, subset


@dataclass(frozen=True)
class Resample:
    """Rows to train on and rows to be measured on, and the seed of the run. There are no test rows in it."""

    repeat: int
    fold: int
    seed: int
    data: TaskData
    folded: bool = True

    @property
    def name(self) -> str:
        return f"r{self.repeat}-f{self.fold}-s{self.seed}" if self.folded else f"s{self.seed}"


def resamples(data: TaskData, design: Design, seed: int) -> list[Resample]:
    """What `design` says, folds by repeats by seeds; every candidate gets the same.

    Folds are cut from the training and validation rows together, each with the strata's shares of the whole. Rows of
    one text are in one fold: what is measured on was never trained on.

    Raises:
        TanzakuError: a stratum has fewer texts than there are folds, or there is no validation split to measure on.
    """
    seeds = [seed + number for number in range(design.seeds)]
    if design.folds is None:
        if data.valid is None:
            raise TanzakuError("there are no validation rows to compare on; give --valid, or --folds 5")
        return _probed_once([Resample(0, 0, each, replace(data, test=None), folded=False) for each in seeds])
    rows = pooled(data)
    texts = _by_text(rows)
    given = [data.task.stratum(example) for example in rows.examples]
    counts = Counter(given)
    # A text in several strata counts for the one with the fewest rows.
    strata = [min((given[row] for row in each), key=lambda stratum: counts[stratum]) for each in texts]
    number, few = min((strata.count(stratum), stratum or "") for stratum in counts)
    if number < design.folds:
        what = "row" if len(texts) == len(rows) else "different text"
        fix = f"use --folds {number} or fewer, or add rows" if number > 1 else "add rows of it, or leave it out"
        whose = few or f"{rows.source} alone"
        raise TanzakuError(
            f"{whose} has {number} {what}{'' if number == 1 else 's'}, too few for {design.folds} folds; {fix}"
        )
    out = []
    for repeat in range(design.repeats):
        kind = KFold if None in strata else StratifiedKFold
        cut = kind(design.folds, shuffle=True, random_state=(seed + repeat) % 2**32)
        for fold, sides in enumerate(cut.split(np.zeros(len(strata)), strata)):
            train, valid = (sorted(row for each in side for row in texts[each]) for side in sides)
            part = replace(data, train=subset(rows, train, "train"), valid=subset(rows, valid, "valid"), test=None)
            out += [Resample(repeat, fold, each, part) for each in seeds]
    return _probed_once(out)


def _probed_once(found: list[Resample]) -> list[Resample]:
    """What the base forgets is measured in the first run of each candidate."""
    return [found[0], *(replace(each, data=replace(each.data, probe=None)) for each in found[1:])]


def _by_text(split: Split) -> list[list[int]]:
    """The rows of each text, in the order of the first."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row, key in enumerate(split.keys()):
        found.setdefault(key, []).append(row)
    return list(found.values())


def pooled(data: TaskData) -> Split:
    """The training and the validation rows as one split."""
    if data.valid is None:
        return data.train
    first, second = data.train, data.valid
    return Split(
        "train",
        first.examples + second.examples,
        first.texts + second.texts,
        first.truncated + second.truncated,
        f"{first.source} and {second.source}",
        None if first.seconds is None or second.seconds is None else first.seconds + second.seconds,
    )
