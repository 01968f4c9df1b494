"""A comparison from its candidates to its results: search, measure, judge, and try the finalists on the test rows.

Every job that ends is in the journal before anything is done with it, and what follows depends on jobs' figures alone.
So a comparison that is killed and begun again trains what is missing and ends where it would have ended.
"""

from __future__ import annotations

import math
import shutil
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tanzaku.compare.candidates import Candidate, Searched, check_settled
from tanzaku.compare.flags import flags
from tanzaku.compare.journal import Journal
from tanzaku.compare.resamples import Resample, pooled, resamples
from tanzaku.compare.search import Outcome, Search, direction, rungs, survivors
from tanzaku.compare.statistics import Comparison as Pair
from tanzaku.compare.statistics import Design, Ranking, Run, Scored, losses, rank
from tanzaku.compare.verdict import against_base, sentences
from tanzaku.compare.zero_shot import ZeroShot, predicted
from tanzaku.core.attach import activate, detach
from tanzaku.engine.accelerations import Accelerations
from tanzaku.files.writing import finite
from tanzaku.models.families import Base
from tanzaku.recipe.comparison import CompareSettings, bytes_of
from tanzaku.storage import store
from tanzaku.tasks.inference import records_of
from tanzaku.tasks.task import Metric, Records, Split, Statistics, Task, TaskData, metric_named
from tanzaku.train.events import Emitter, Event, Listener
from tanzaku.train.results import Job
from tanzaku.train.scheduler import JobScheduler, intervals
from tanzaku.train.step import autocast

ADAPTERS = "adapters"
_SEARCH_SEED = 10_000  # added to the seed of trials: the runs that rank a candidate are none that it was chosen by


class Interrupted(Exception):
    """Ctrl-C; what was finished is in the journal."""


@dataclass
class Comparison:
    """One comparison on one loaded model.

    Args:
        model: made for the task, on its device; it is left as it was.
        out: the run's directory. seed: of folds, draws and runs. meta: kept beside each adapter, for prediction.
        listeners: are told what happens, after the journal; `events` tells them.
    """

    model: PreTrainedModel
    data: TaskData
    candidates: Sequence[Candidate]
    searched: Sequence[Searched]
    settings: CompareSettings
    seed: int
    out: Path
    journal: Journal
    listeners: Sequence[Listener]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        check_settled([*self.candidates, *(corner for search in self.searched for corner in search.corners())])
        self.events = Emitter(self._keep, *self.listeners)
        self.task = self.data.task
        self.metric = metric_named(self.task, self.settings.rank_by or self.task.rank_by)
        # Figures that a reader of the ranking looks at as well.
        self.beside = [metric_named(self.task, name) for name in self.task.held if name != self.metric.name]
        self.design = self.settings.design(self.data.valid is not None)
        self.resamples = resamples(self.data, self.design, self.seed)
        self.memory = bytes_of(self.settings.memory) if self.settings.memory else None
        self.searches = [
            Search(each, self.journal.search, self.seed, self.settings, self.metric) for each in self.searched
        ]
        self.measured: list[Candidate] = []
        self.ranking: Ranking | None = None
        self.finalists: list[str] = []
        self.rows_per_step: int | None = None
        self.tested: dict[str, Any] = {}
        self.zero_shot: ZeroShot | None = None
        self._jobs: dict[str, _Job] = {}  # of the stage under way, by name

    def run(self) -> None:
        """All stages. What is in the journal is not done again.

        Raises:
            Interrupted: Ctrl-C.
        """
        self._look_at_the_base()
        while self._wave():
            pass
        self.measured = [*self.candidates]
        for search in self.searches:
            self.measured += [c for c in search.best(self.settings.keep) if c.name not in self._names()]
        jobs = [self._measure(candidate, at) for at in self.resamples for candidate in self.measured]
        self._train("measure", jobs)
        self.judge()
        self._finish()

    def _names(self) -> set[str]:
        return {candidate.name for candidate in self.measured}

    # -- stages

    def _look_at_the_base(self) -> None:
        """Measure the base as it is, where it can do the task: first, so that it is seen at once."""
        if not self.task.zero_shot:
            return
        if (kept := self.journal.kept("base")) is None:
            self.events.emit("stage", stage="base", jobs=0, done=0)
            each = [*self.candidates, *(corner for search in self.searched for corner in search.corners())][0].settings
            with autocast(self.model.device, each.precision):
                kept = {"predictions": predicted(self.model, self.task, self.resamples, self.data.pad_token_id, each)}
            self.journal.keep_as("base", kept)
        self.zero_shot = ZeroShot(self.task, self.resamples, kept["predictions"])

    def _wave(self) -> bool:
        """The next wave of every search, on the first split; False where none has one."""
        waves = [(search, trials) for search in self.searches if (trials := search.wave())]
        if not waves:
            return False
        groups, jobs = [], []
        for search, trials in waves:
            group = [self._job(t.candidate, "search", "search", self._trial_run()) for t in trials]
            groups.append([each.name for each in group])
            jobs += group + [p for p in self._parts(search.searched.uses) if p not in jobs]
        self._train("search", jobs, groups)
        for (search, trials), names in zip(waves, groups, strict=True):
            search.tell({t.name: self._outcome(name) for t, name in zip(trials, names, strict=True)})
        return True

    def _trial_run(self) -> Resample:
        first = self.resamples[0]
        return replace(first, seed=self.seed + _SEARCH_SEED, data=replace(first.data, probe=None))

    def _outcome(self, name: str) -> Outcome:
        record = self.journal.jobs[name]
        values = [_figure(epoch["valid"], self.metric.name) for epoch in record["epochs"]]
        value = None if record["valid"] is None else _figure(record["valid"], self.metric.name)
        return Outcome(record["status"], values, None if value is None or math.isnan(value) else value)

    def _measure(self, candidate: Candidate, at: Resample) -> _Job:
        # On one split, the run of the first seed gives the adapter; folds leave rows out, so their runs give none.
        save = self.design.folds is None and at.seed == self.seed
        used = any(candidate.name in other.uses.values() for other in self.measured)
        return self._job(candidate, at.name, "measure", at, save or used)

    def _job(self, candidate: Candidate, what: str, stage: str, at: Resample, save: bool = False) -> _Job:
        """A job of a candidate, with where what it uses is: of other candidates, what they became on the same rows."""
        uses = {
            label: self.journal.folder / ADAPTERS / _name(used, what) if isinstance(used, str) else used
            for label, used in candidate.uses.items()
        }
        return _Job(_name(candidate.name, what), candidate, stage, at, save, uses)

    def _parts(self, uses: Mapping[str, str | Path]) -> list[_Job]:
        """Jobs of the candidates that trials use."""
        used = [each for each in self.candidates if each.name in uses.values()]
        return [self._job(each, "search", "search", self._trial_run(), save=True) for each in used]

    def judge(self) -> None:
        """Rank the candidates all of whose runs are done, and choose the finalists."""
        scored = self._all_scored(self.metric)
        self.ranking = rank(scored, self._statistics(self.metric)) if scored else None
        if self.ranking is not None and self.beside and not math.isnan(self.ranking.candidates[0].mean):
            found = [losses(self._all_scored(m), self._statistics(m), self.ranking.best) for m in self.beside]
            worst = {each.name: max(by_name[each.name] for by_name in found) for each in scored}
            self.ranking = rank(scored, self._statistics(self.metric), worst)
        order = [standing.name for standing in self.ranking.candidates] if self.ranking else []
        # Whoever is recommended is kept and tested, too.
        also = {self.ranking.cheapest} if self.ranking else set()
        self.finalists = [name for place, name in enumerate(order) if place < self.settings.finalists or name in also]

    def _finish(self) -> None:
        """The finalists' adapters and predictions."""
        by_name = {candidate.name: candidate for candidate in self.measured}
        best = [by_name[name] for name in self.finalists]
        if self.design.folds is not None:
            used = {used for candidate in best for used in candidate.uses.values()}
            self._train("final", [self._final(each) for each in self.measured if each in best or each.name in used])
        for candidate in best:
            self._publish(candidate)
        self.tested = self.journal.kept("tested") or {}
        if self.tested.get("finalists") != self.finalists:
            if self.data.test is not None:
                self.events.emit("stage", stage="test", jobs=0, done=0)
            # Written once and read ever after: the test rows are looked at one time.
            self.tested = {"finalists": self.finalists, **self._test(best)}
            self.journal.keep_as("tested", self.tested)
        for done in (self.journal.folder / ADAPTERS, self.journal.states):
            shutil.rmtree(done, ignore_errors=True)

    def _final(self, candidate: Candidate) -> _Job:
        """A run on all rows, of as many epochs as the folds' runs lasted: no rows are left to stop it by."""
        records = [self.journal.jobs[_name(candidate.name, at.name)] for at in self.resamples]
        epochs = round(plain.median(r["restored_epoch"] or len(r["epochs"]) for r in records))
        changes: dict[str, Any] = {"epochs": max(1, epochs), "patience": None, "restore_best": False}
        if (steps := candidate.settings.max_steps) is not None:
            changes["max_steps"] = steps * changes["epochs"] // candidate.settings.epochs
        candidate = replace(candidate, settings=candidate.settings.model_copy(update=changes))
        data = replace(self.data, train=pooled(self.data), valid=None, test=None)
        return self._job(candidate, "final", "final", Resample(0, 0, self.seed, data), save=True)

    def _publish(self, candidate: Candidate) -> None:
        """Move a finalist's adapter out of the journal, under the candidate's own name."""
        job = _name(candidate.name, self.resamples[0].name if self.design.folds is None else "final")
        source, target = self.journal.folder / ADAPTERS / job, self.out / ADAPTERS / candidate.name
        if source.is_dir():
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)

    def _test(self, best: Sequence[Candidate]) -> dict[str, Any]:
        """Predictions of the finalists' adapters: of the test rows, or else of the fixed split's validation rows."""
        split = self.data.test or (self.data.valid if self.design.folds is None else None)
        out: dict[str, Any] = {"predictions": {}, "figures": {}}
        there = [c for c in best if (self.out / ADAPTERS / c.name).is_dir()]
        if split is None:
            return out
        base = self.zero_shot is not None  # goes with the first of them
        for precision in dict.fromkeys(c.settings.precision for c in there):
            group = [c for c in there if c.settings.precision == precision]
            for candidate in group:
                store.load(self.model, self.out / ADAPTERS / candidate.name, candidate.name)
            with autocast(self.model.device, precision):
                splits: dict[str | None, Split] = {c.name: split for c in group}
                if base:
                    splits[None] = split
                fast = Accelerations(Base.of(self.model), group[0].settings.accelerations)  # of all candidates alike
                found = records_of(self.model, self.task, splits, self.data.pad_token_id, 8, fast)
            activate(self.model, None)
            for candidate in reversed(group):  # a later one may use an earlier one
                detach(self.model, candidate.name)
            if base:
                base = False
                out["base"] = {"predictions": self.task.predictions(found[None]), **self._figures(found[None])}
            for candidate in group:
                own = self._chosen(candidate)
                records = own.decided(found[candidate.name])
                out["predictions"][candidate.name] = self.task.predictions(records)
                figures: dict[str, Any] = {
                    "confusion": self.task.confusion(records),
                    "by_class": own.by_class(records),
                }
                out["figures"][candidate.name] = figures | self._figures(records)
        return out

    def _figures(self, records: Records) -> dict[str, Any]:
        """Of the test rows, where there are any."""
        if self.data.test is None:
            return {}
        return {"test": self.task.figures(records), "test_intervals": intervals(self.task, records)}

    def _chosen(self, candidate: Candidate) -> Task:
        """The task with what was chosen for a finalist's adapter."""
        if not self.task.of_adapters:
            return self.task
        folder = self.out / ADAPTERS / candidate.name
        return type(self.task).from_json(store.read_meta(folder), f"{folder}: ")

    # -- training

    def _train(self, stage: str, jobs: Sequence[_Job], groups: Sequence[Sequence[str]] = ()) -> None:
        """Train what the journal has not, all at once. Of `groups`, those that lag stop at the rungs."""
        missing = [job for job in jobs if job.name not in self.journal.jobs]
        self._jobs = {job.name: job for job in jobs}
        self.events.emit("stage", stage=stage, jobs=len(jobs), done=len(jobs) - len(missing))
        if not missing:
            return
        with JobScheduler(
            self.model,
            self.data,
            out=self.journal.folder,
            observer=self.events,
            meta=self.meta,
            rows_per_step=self.settings.rows_per_step,
            memory=self.memory,
            workers=self.settings.workers,
            measure=True,
            states=self.journal.states,
        ) as scheduler:
            self.rows_per_step = scheduler.rows_per_step
            # What uses others comes when these are done.
            for level in ([j for j in missing if not j.uses], [j for j in missing if j.uses]):
                scheduler.add([job.job(self.settings.reduction) for job in level])
                self._run(scheduler, groups)

    def _run(self, scheduler: JobScheduler, groups: Sequence[Sequence[str]]) -> None:
        while True:
            scheduler.run()
            if scheduler.interrupted:
                raise Interrupted
            if not scheduler.waiting:
                return
            scheduler.proceed(*self._halved(scheduler, groups))

    def _keep(self, event: Event) -> None:
        """Write a job that has ended into the journal."""
        if event.kind == "job_done" and event.figures["status"] != "interrupted":
            own = self._jobs[str(event.job)]
            about = {"candidate": own.candidate.name, "stage": own.stage}
            at = {"repeat": own.at.repeat, "fold": own.at.fold, "seed": own.at.seed}
            self.journal.keep(finite({**event.figures, **about, **at}))

    def _halved(self, scheduler: JobScheduler, groups: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
        """Those of the waiting jobs that successive halving stops, and those that wait on. A group is judged when all
        of it have come to the rung; where memory lets only a part of it come, nobody is stopped. Those that are a rung
        ahead, after a kill, wait for the others."""
        stopped: list[str] = []
        ahead: list[str] = []
        for names in groups:
            all_waiting = {name: epochs for name, epochs in scheduler.waiting.items() if name in names}
            if not all_waiting or any(name in names for name in scheduler.queued):
                continue
            epoch = min(all_waiting.values())
            waiting = [name for name, epochs in all_waiting.items() if epochs == epoch]
            ahead += [name for name in all_waiting if name not in waiting]
            values = {}
            for name in names:
                epochs = self._epochs(scheduler, name)
                if len(epochs) >= epoch:
                    values[name] = _figure(epochs[epoch - 1], self.metric.name)
            on = survivors(values, self.settings.reduction, direction(self.metric))
            stopped += [name for name in waiting if name not in on]
        return stopped, ahead

    def _epochs(self, scheduler: JobScheduler, name: str) -> list[Mapping[str, float]]:
        """Validation figures by epoch, of a job under way or one that ended, in this sitting or before."""
        if name in scheduler.results:
            return [record.valid for record in scheduler.results[name].epochs]
        return [epoch["valid"] for epoch in self.journal.jobs.get(name, {"epochs": []})["epochs"]]

    # -- figures

    def records(self, candidate: Candidate) -> list[dict[str, Any]]:
        """The journal's records of a candidate's measured runs, in the order of the resamples, where they are."""
        names = [_name(candidate.name, at.name) for at in self.resamples]
        return [self.journal.jobs[name] for name in names if name in self.journal.jobs]

    def _all_scored(self, metric: Metric) -> list[Scored]:
        return [each for candidate in self.measured if (each := self._scored(candidate, metric)) is not None]

    def _scored(self, candidate: Candidate, metric: Metric) -> Scored | None:
        records = self.records(candidate)
        if len(records) < len(self.resamples) or any(record["status"] != "done" for record in records):
            return None
        runs = [
            Run(
                at.repeat,
                at.fold,
                at.seed,
                _figure(record["valid"] or {}, metric.name),
                self._sums(record["predictions"], at.data.valid, metric),
                None if at.data.valid is None else self._strata(at.data.valid),
            )
            for at, record in zip(self.resamples, records, strict=True)
        ]
        return Scored(candidate.name, runs, records[0]["trainable_parameters"])

    def _sums(self, predictions: list[Any] | None, split: Split | None, metric: Metric) -> Statistics | None:
        if not predictions or split is None:
            return None
        return metric.statistics(self.task.recorded(predictions, split.examples))

    def _strata(self, split: Split) -> np.ndarray[Any, np.dtype[Any]]:
        """Of each row, the number of its stratum."""
        names = [self.task.stratum(example) for example in split.examples]
        return np.unique([name or "" for name in names], return_inverse=True)[1]

    def _statistics(self, metric: Metric) -> Design:
        train = plain.fmean(len(at.data.train) for at in self.resamples)
        valid = [at.data.valid for at in self.resamples if at.data.valid is not None]
        strata = None
        if self.design.folds is None:
            strata = self._strata(valid[0])
        kind: Any = "split" if self.design.folds is None else "folds"
        beside = tuple(self._named(each) for each in self.beside)
        return Design(kind, metric, train, plain.fmean(map(len, valid)), strata, self.settings.margin, beside)

    def _named(self, metric: Metric) -> str:
        """A metric that must hold, with its margin where that is of another kind than the ranking one's."""
        if metric.bounded == self.metric.bounded:
            return metric.title
        own = f"{self.settings.margin:g}" if metric.bounded else f"{self.settings.margin:.0%} of it"
        return f"{metric.title} ({own})"

    def results(self) -> dict[str, Any]:
        """The part of results.json that the comparison fills, as far as it has come; docs/results.md says what."""
        design = self._statistics(self.metric)
        names = [standing.name for standing in self.ranking.candidates] if self.ranking else []
        order = [*names, *(c.name for c in self.measured or self.candidates if c.name not in names)]
        by_name = {c.name: c for c in self.measured or self.candidates}
        done = bool(self.measured)
        return {
            "design": {
                "kind": design.kind,
                "folds": self.design.folds,
                "repeats": self.design.repeats,
                "seeds": sorted({at.seed for at in self.resamples}),
                "runs": len(self.resamples),
                "metric": self.metric.name,
                "margin": self.settings.margin,
                "train_rows": design.train_rows,
                "valid_rows": design.valid_rows,
                "rows_per_step": self.rows_per_step or self.settings.rows_per_step,
                "memory_limit_bytes": self.memory,
            },
            "candidates": [self._candidate(by_name[name]) for name in order],
            "base": self._base(design),
            "comparisons": [_pair_json(pair) for pair in (self.ranking.comparisons if self.ranking else ())],
            "verdict": {
                "sentences": self._sentences(design) if done else [],
                "best": self.ranking.best if self.ranking else None,
                "tied": list(self.ranking.tied) if self.ranking else [],
                "cheapest": self.ranking.cheapest if self.ranking else None,
            },
            "search": [self._searched(search) for search in self.searches],
            "rows": self._rows(),
            "jobs": [_job_json(record) for record in sorted(self.journal.jobs.values(), key=_place)],
        }

    def _sentences(self, design: Design) -> list[str]:
        found = sentences(self.ranking, design, self._failed(), self._tested())
        return [*found, against_base(*pair, design)] if (pair := self._against_base(design)) else found

    def _against_base(self, design: Design) -> tuple[Ranking, Pair] | None:
        """The base beside the best candidate."""
        if self.zero_shot is None or self.ranking is None:
            return None
        best = next(each for each in self._all_scored(self.metric) if each.name == self.ranking.best)
        return self.zero_shot.against(best, design, self._strata)

    def _base(self, design: Design) -> dict[str, Any] | None:
        """What the base has without training."""
        if self.zero_shot is None:
            return None
        scored = {metric.name: self.zero_shot.scored(metric, self._strata) for metric in self.task.metrics}
        pair = self._against_base(design)
        tested = self.tested.get("base", {})
        return {
            "scores": {name: [run.value for run in each.runs] for name, each in scored.items()},
            "mean": plain.fmean(run.value for run in scored[self.metric.name].runs),
            "comparison": None if pair is None else _pair_json(pair[1]),
            "test": tested.get("test"),
            "test_intervals": tested.get("test_intervals"),
        }

    def _tested(self) -> float | None:
        """The best one's figure on the test rows, in the metric that ranks, where there are any."""
        figures = self.tested.get("figures", {}).get(self.ranking.best if self.ranking else "", {})
        return (figures.get("test") or {}).get(self.metric.name)

    def _failed(self) -> dict[str, str]:
        out: dict[str, str] = {}
        for candidate in self.measured:
            for record in self.records(candidate):
                if record["status"] == "failed":
                    out.setdefault(candidate.name, str(record["error"]))
        return out

    def _candidate(self, candidate: Candidate) -> dict[str, Any]:
        records = self.records(candidate)
        first = records[0] if records else {}
        failed = self._failed().get(candidate.name)
        whole = len(records) == len(self.resamples) and failed is None
        standings = {s.name: (place, s) for place, s in enumerate(self.ranking.candidates, 1)} if self.ranking else {}
        place, standing = standings.get(candidate.name, (None, None))
        adapter = self.out / ADAPTERS / candidate.name
        tested = self.tested.get("figures", {}).get(candidate.name, {})
        metrics = [metric.name for metric in self.task.metrics]
        return {
            "name": candidate.name,
            "method": candidate.method.name,
            "origin": candidate.origin,
            "method_settings": first.get("method_settings", candidate.method.settings()),
            "train_settings": candidate.settings.model_dump(),
            "status": "done" if whole else "failed" if failed else "interrupted",
            "error": failed,
            "note": first.get("note"),
            "trainable_parameters": first.get("trainable_parameters"),
            "total_parameters": first.get("total_parameters"),
            "scores": {m: [(record["valid"] or {}).get(m) for record in records] for m in metrics},
            "mean": standing.mean if standing else None,
            "interval": standing.interval if standing else None,
            "interval_of": None if standing is None or standing.interval is None else _OF[standing.of_rows],
            "flags": self._flags(candidate, records),
            "rank": place,
            "seconds": plain.fmean(record["seconds"] for record in records) if records else None,
            "peak_memory_bytes": first.get("step_bytes") or None,
            "held_perplexity": self._held_perplexity(candidate, first),
            "finalist": candidate.name in self.finalists,
            "adapter": f"{ADAPTERS}/{candidate.name}" if adapter.is_dir() else None,
            "test": tested.get("test"),
            "test_intervals": tested.get("test_intervals"),
            "confusion": tested.get("confusion"),
            "by_class": tested.get("by_class") or {},
        }

    def _held_perplexity(self, candidate: Candidate, first: Mapping[str, Any]) -> float | None:
        """That of the adapter which is kept, or else of the first run's."""
        final = self.journal.jobs.get(_name(candidate.name, "final"), first)
        found: float | None = final.get("held_perplexity")
        return found

    def _flags(self, candidate: Candidate, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a figure does not say of itself, in a few words each."""
        done = [record for record in records if record["status"] == "done" and record["valid"]]
        rows = self.data.train.examples
        out = flags(done, self.task, rows, self.metric, same_rows=self.design.folds is None)
        if candidate.rate == "shared":
            rate = candidate.settings.learning_rate
            shared = {c.method.name for c in self.measured or self.candidates if c.rate == "shared"}
            if len(shared) > 1:
                out.append(f"its learning rate, {rate:g}, was shared with other methods and not searched")
        return out

    def _searched(self, search: Search) -> dict[str, Any]:
        chosen = {candidate.name for candidate in search.best(self.settings.keep)}
        return {
            "entry": search.searched.name,
            "method": search.searched.method.name,
            "space": {key: space.written() for key, space in search.searched.space.items()},
            "trials": [
                {
                    "name": told.trial.name,
                    "settings": {k: v for k, v in told.trial.candidate.drawn.items() if k != "learning_rate"},
                    "learning_rate": told.trial.candidate.settings.learning_rate,
                    "value": told.value,
                    "status": told.status,
                    "epochs": told.epochs,
                    "kept": told.trial.candidate.name in chosen,
                }
                for told in search.told()
            ],
        }

    def _rows(self) -> dict[str, Any] | None:
        split: Split | None = self.data.test or (self.data.valid if self.design.folds is None else None)
        if split is None or not self.tested.get("predictions"):
            return None
        base = self.tested.get("base", {}).get("predictions")
        return {
            "split": "test" if split is self.data.test else "valid",
            "numbers": [split.number(row) for row in range(len(split))] if split.dropped else None,
            "texts": split.shown,
            "targets": [example.target for example in split.examples],
            "predictions": self.tested["predictions"],
            "figures": {name: self._by_row(own, split) for name, own in self.tested["predictions"].items()},
            "base": base,
            "base_figures": None if base is None else self._by_row(base, split),
        }

    def _by_row(self, predictions: list[Any], split: Split) -> list[float] | None:
        """What each row alone has of the metric that ranks, where that says something of a row."""
        if not self.metric.by_row:
            return None
        return self.metric.statistics(self.task.recorded(predictions, split.examples)).by_row()


@dataclass(frozen=True)
class _Job:
    """A job of a comparison: whose it is, at which stage, on which rows."""

    name: str
    candidate: Candidate
    stage: str
    at: Resample
    save: bool = False
    uses: Mapping[str, Path] = field(default_factory=dict)

    def job(self, reduction: int) -> Job:
        settings = self.candidate.settings.model_copy(update={"seed": self.at.seed})
        # A full copy of the model waiting at a rung would keep its memory, so what runs alone is never stopped.
        halved = self.stage == "search" and self.candidate.method.shares_batch and not self.save
        stops = tuple(rungs(settings.epochs, reduction)) if halved else ()
        return Job(
            self.name,
            self.candidate.method,
            settings,
            self.at.data,
            stops,
            self.save,
            self.uses,
            self.candidate.init_from,
        )


def _name(candidate: str, what: str) -> str:
    """A job's name: fit for an adapter and a file."""
    return f"{candidate}--{what}"


def _figure(valid: Mapping[str, float | None], metric: str) -> float:
    value = valid.get(metric)
    return math.nan if value is None else float(value)


_OF = {False: "runs", True: "rows"}


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of a job among all, whenever it was trained."""
    stage = ("search", "measure", "final").index(record["stage"])
    return stage, record["candidate"], record["repeat"], record["fold"], record["seed"]


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {key: getattr(pair, key) for key in ("a", "b", "difference", "interval", "p", "p_adjusted")}


def _job_json(record: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("name", "candidate", "stage", "repeat", "fold", "seed", "status", "error", "epochs", "best_epoch")
    return {key: record[key] for key in (*keys, "steps", "seconds")}
