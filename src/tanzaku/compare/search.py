"""The search of one entry's settings: drawn in waves by optuna, cut by successive halving, gone on with after a kill.

A study in an SQLite file is all the state there is. A trial is drawn from the seed, its slot (its place among the
trials) and what was told of earlier waves, and from nothing else. So a search that is killed anywhere and opened again
draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from tanzaku.compare.candidates import Candidate, Searched, slug
from tanzaku.core.space import Choice, Range
from tanzaku.errors import TanzakuError
from tanzaku.recipe.comparison import CompareSettings
from tanzaku.tasks.task import Metric

Direction = Literal["minimize", "maximize"]

_REDRAWS = 8  # of settings that were drawn before, until the first untried ones are taken
_SLOT, _OUTCOME, _ABOUT = "slot", "outcome", "about"  # what the study's attributes are called


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: it ran its epochs, was stopped at a rung, or failed.

    `values` has the ranking's figure after each epoch. `value` is the one the trial is judged by; None takes the last.
    """

    status: Literal["done", "stopped", "failed"]
    values: Sequence[float] = ()
    value: float | None = None


@dataclass(frozen=True)
class Trial:
    """A candidate to try. `slot` counts the trials of a search from 0."""

    name: str
    slot: int
    candidate: Candidate


@dataclass(frozen=True)
class Told:
    """A trial that has ended: its figure (None where it has none) and the epochs it was given."""

    trial: Trial
    status: Literal["done", "stopped", "failed"]
    value: float | None
    epochs: int


class Search:
    """Draws the settings of one entry in waves: `wave`, run what it gives, `tell`, until `wave` gives nothing.

    Args:
        searched: the entry; its name is the study's.
        storage: an SQLite file, made where there is none, that several entries may share; None keeps it in memory.
        seed: of the draws. Two entries draw differently from one seed.

    Raises:
        TanzakuError: the file is no search, or holds another search of that name.
    """

    def __init__(self, searched: Searched, storage: Path | None, seed: int, settings: CompareSettings, metric: Metric):
        self.searched, self.seed, self.settings, self.metric = searched, seed, settings, metric
        self.axes = {key: _axis(space) for key, space in sorted(searched.space.items())}
        points = math.prod(space.size for space in searched.space.values())
        self.total = int(min(searched.trials, points))
        self._finite = math.isfinite(points)
        self._sign = metric.sign
        self._path = storage
        with _opening(storage):
            self._storage = _storage(storage)
            self._study = _study(direction(metric), storage=self._storage, study_name=searched.name)
        self._check_same()

    def wave(self) -> list[Trial]:
        """The trials to run now, [] once all are told. Until they are told they stay the same, after a kill too."""
        asked = self._asked()
        told = sum(trial.state.is_finished() for trial in asked)
        if told >= self.total:
            return []
        first = told // self.settings.wave * self.settings.wave
        with _writing(self._path):
            for trial in self._study.get_trials(deepcopy=False):
                if not trial.state.is_finished() and _SLOT not in trial.user_attrs:  # a kill came before its slot
                    self._study.tell(trial.number, state=TrialState.FAIL)
            for slot in range(len(asked), min(first + self.settings.wave, self.total)):
                self._ask(slot)
        return [self._trial(frozen) for frozen in self._asked()[first:]]

    def tell(self, outcomes: Mapping[str, Outcome]) -> None:
        """How the trials of the wave ended, by name: all of them at once. What was told before is left as it is."""
        asked = {self._trial(frozen).name: frozen for frozen in self._asked()}
        missing = [name for name, frozen in asked.items() if name not in outcomes and not frozen.state.is_finished()]
        if missing or not outcomes.keys() <= asked.keys():
            raise ValueError(f"told of {sorted(outcomes)}, expected the whole wave: {sorted(asked)}, {missing} missing")
        with _writing(self._path):
            for name, frozen in asked.items():
                if not frozen.state.is_finished():
                    self._tell(frozen, outcomes[name])

    def told(self) -> list[Told]:
        """Every trial that has ended, in the order of slots."""
        ended = [frozen for frozen in self._asked() if frozen.state.is_finished()]
        return [Told(self._trial(frozen), **frozen.user_attrs[_OUTCOME]) for frozen in ended]

    def best(self, keep: int) -> list[Candidate]:
        """The best candidates so far, `keep` at most: those that ran to the end by their figures, then those stopped.

        A trial without a figure is never one of them.
        """

        def merit(told: Told) -> tuple[float, float]:
            reached = math.inf if told.status == "done" else told.epochs
            return reached, self._sign * (told.value or 0.0)

        good = [told for told in self.told() if told.value is not None]
        return [told.trial.candidate for told in sorted(good, key=merit, reverse=True)[:keep]]

    # -- one trial

    def _ask(self, slot: int) -> None:
        """Draw one more trial. It counts once its slot is written, which comes last."""
        tried = {_point(frozen) for frozen in self._asked()} if self._finite else set()
        for attempt in range(_REDRAWS):
            sampler: BaseSampler = TPESampler(
                n_startup_trials=self.settings.wave, seed=_seed(self.seed, self.searched.name, slot, attempt)
            )
            trial = self._draw(sampler)
            if _point(trial) not in tried:
                break
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            trial = self._draw(_Given(self._untried(tried)))
        trial.set_user_attr(_SLOT, slot)

    def _untried(self, tried: set[tuple[Any, ...]]) -> dict[str, Any]:
        """The first point of a finite space that is none of those: one more than there are of them suffices."""
        for number in range(len(tried) + 1):
            point = {}
            for key, axis in self.axes.items():
                number, place = divmod(number, len(axis.options))
                point[key] = axis.options[place]
            if tuple(point.values()) not in tried:
                break
        return point

    def _draw(self, sampler: BaseSampler) -> optuna.Trial:
        self._study.sampler = sampler
        return self._study.ask({key: axis.distribution for key, axis in self.axes.items()})

    def _tell(self, frozen: FrozenTrial, outcome: Outcome) -> None:
        """Each write may be the last before a kill; writing it again changes nothing, and the state comes last."""
        value = outcome.value if outcome.value is not None else next(reversed(outcome.values), math.nan)
        good = outcome.status != "failed" and math.isfinite(value)
        identity = self._storage.get_trial_id_from_study_id_trial_number(
            self._storage.get_study_id_from_name(self.searched.name), frozen.number
        )
        # Without figures a trial counts as worse than any that was stopped: the next draws keep away from it.
        for epoch, figure in enumerate(outcome.values if good else (), 1):
            self._storage.set_trial_intermediate_value(identity, epoch, figure)
        record = {"status": outcome.status, "value": value if good else None, "epochs": len(outcome.values)}
        self._storage.set_trial_user_attr(identity, _OUTCOME, record)
        if good and outcome.status == "done":
            self._study.tell(frozen.number, value)
        else:
            self._study.tell(frozen.number, state=TrialState.PRUNED)

    def _asked(self) -> list[FrozenTrial]:
        """The trials that count, in the order of slots."""
        found = [t for t in self._study.get_trials(deepcopy=False) if _SLOT in t.user_attrs]
        return sorted(found, key=lambda trial: int(trial.user_attrs[_SLOT]))

    def _trial(self, frozen: FrozenTrial) -> Trial:
        drawn = {key: self.axes[key].value(frozen.params[key]) for key in self.searched.space}
        slot = int(frozen.user_attrs[_SLOT])
        # The number makes the name unique, whatever the settings are.
        name = f"{self.searched.name}-s{slot + 1:02}-{slug(drawn, digits=2)}"
        return Trial(name, slot, self.searched.candidate(drawn, name))

    def _check_same(self) -> None:
        """Note what the draws rest on, or compare it with what an earlier sitting noted."""
        searched = self.searched
        about = {
            "method": searched.method.name,
            "settings": searched.method.settings(),
            "train": searched.train.model_dump(),
            "space": {key: space.written() for key, space in searched.space.items()},
            "seed": self.seed,
            "wave": self.settings.wave,
            "rank_by": self.metric.name,
        }
        about = json.loads(json.dumps(about, default=str))
        before = self._study.user_attrs.get(_ABOUT)
        if before is None:
            with _writing(self._path):
                self._study.set_user_attr(_ABOUT, about)
        elif before != about:
            other = next(key for key in about if before.get(key) != about[key])
            raise TanzakuError(
                f"{self._path} holds a search of {searched.name!r} with another {other}: found {before.get(other)}, "
                f"expected {about[other]}; go on with the recipe it was begun with, or choose another --out"
            )


def rungs(epochs: int, reduction: int) -> list[int]:
    """The epochs after which successive halving judges: 1, 3, 9 of ten for a reduction by 3. Never the last."""
    found, epoch = [], 1
    while epoch < epochs:
        found.append(epoch)
        epoch *= reduction
    return found


def direction(metric: Metric) -> Direction:
    """Which way the figure is better."""
    return "maximize" if metric.better == "higher" else "minimize"


def survivors(values: Mapping[str, float], reduction: int, direction: Direction) -> set[str]:
    """The names that go on from a rung, by their figures: the best of every `reduction`, and one at least.

    Equal figures go on together: neither the name nor the order decides. A nan goes on beside nothing but nans.

    Jamieson and Talwalkar 2016, arXiv 1502.07943.
    """
    worst = math.inf if direction == "minimize" else -math.inf
    figures = {name: worst if math.isnan(value) else value for name, value in values.items()}
    numbers = any(not math.isnan(value) for value in values.values())
    return {
        name
        for name, value in values.items()
        if not (numbers and math.isnan(value)) and _goes_on(name, figures, reduction, direction)
    }


def _goes_on(name: str, figures: Mapping[str, float], reduction: int, direction: Direction) -> bool:
    """What optuna's pruner says of a trial that reports last.

    The pruner is asynchronous: it compares with what was reported so far, so whoever comes first goes on. The last one
    is compared with all, as in a rung that everyone waits for.
    """
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction)
    study = _study(direction, pruner=pruner)
    stop = False
    for figure in (*(figure for other, figure in figures.items() if other != name), figures[name]):
        trial = study.ask()
        trial.report(figure, step=1)
        stop = trial.should_prune()
    return not stop


# -- axes of a space


@dataclass(frozen=True)
class _Axis:
    """A setting as optuna draws it. `options` are all that it can draw, where they can be counted."""

    distribution: BaseDistribution
    options: Sequence[Any]
    value: Callable[[Any], Any]


def _axis(space: Choice | Range) -> _Axis:
    if isinstance(space, Range):
        if space.integer:
            low, high = int(space.low), int(space.high)
            return _Axis(IntDistribution(low, high, log=space.log), range(low, high + 1), int)
        return _Axis(FloatDistribution(space.low, space.high, log=space.log), (), float)
    # Drawn by their places: of numbers in order, so that what is good says something of its neighbours.
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in space.values):
        ordered, places = sorted(space.values), range(len(space.values))
        return _Axis(IntDistribution(0, len(ordered) - 1), places, ordered.__getitem__)
    places = range(len(space.values))
    return _Axis(CategoricalDistribution(places), places, space.values.__getitem__)


def _point(trial: FrozenTrial | optuna.Trial) -> tuple[Any, ...]:
    return tuple(value for _, value in sorted(trial.params.items()))


class _Given(RandomSampler):
    """Draws one given point."""

    def __init__(self, point: Mapping[str, Any]):
        super().__init__()
        self._given = point

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._given[param_name]


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


# -- the study


def _study(direction: Direction, **options: Any) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study and trial
    return optuna.create_study(direction=direction, load_if_exists="study_name" in options, **options)


def _storage(path: Path | None) -> optuna.storages.BaseStorage:
    if path is None:
        return optuna.storages.InMemoryStorage()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by a URL: a path may have characters that mean something in one.
    return optuna.storages.RDBStorage("sqlite://", {"creator": partial(sqlite3.connect, path)})


@contextmanager
def _opening(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TanzakuError(f"cannot write {path}: {error.strerror or error}; choose another --out") from None
    except Exception as error:  # SQLAlchemy's, sqlite's or optuna's own, all of them about the file
        raise TanzakuError(
            f"{path} is no search to go on with: {_reason(error)}; remove it, or choose another --out"
        ) from error


@contextmanager
def _writing(path: Path | None) -> Iterator[None]:
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise TanzakuError(
            f"cannot write {path}: {_reason(error)}; what it holds already can be gone on with"
        ) from error


def _reason(error: BaseException) -> str:
    """Its own words and no SQL: optuna's say only that something went wrong below."""
    return str(error.__cause__ or error).strip().splitlines()[0]
