"""What a comparison shows. A terminal gets a live table below the lines; a file or a pipe gets a line a job."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from tanzaku.cli.display import Display, perplexities
from tanzaku.compare.verdict import tested_by
from tanzaku.support.numbers import written

if TYPE_CHECKING:
    from tanzaku.compare.comparison import Comparison
    from tanzaku.tasks.task import Metric, Task
    from tanzaku.train.events import Event

_STAGES = {
    "base": "base: what it does without training",
    "search": "search: drawn settings, on one split",
    "measure": "measure: every candidate on every split and seed",
    "final": "final: the finalists on all rows",
    "test": "test: the finalists' predictions",
}


_QUIET = 30  # seconds after which a file or a pipe is told how things stand
_SOON = 10  # seconds before which the first steps, which measure, tell nothing of the time left


@dataclass
class _Row:
    """One candidate of the stage under way."""

    done: int = 0
    failed: int = 0
    figures: list[float] = field(default_factory=list)
    running: dict[str, tuple[int, int, float]] = field(default_factory=dict)  # job -> step, steps, loss


class Live(Display):
    """Draws a comparison, by its events. A context manager, for the table."""

    def __init__(self, metric: Metric):
        super().__init__()
        self.metric, self.word = metric, metric.on_validation
        self.rows: dict[str, _Row] = {}
        self.total = self.ended = 0
        self.steps = self.steps_known = self.jobs_known = 0
        self.stage_began = time.monotonic()
        self._said = time.monotonic()
        self.table_now = RichLive(
            get_renderable=self._table, console=self.console, refresh_per_second=2, transient=True, screen=False
        )

    def __enter__(self) -> Live:
        if self.console.is_terminal:
            self.table_now.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.table_now.stop()

    def begin(self, comparison: Comparison) -> None:
        """Say what will be run."""
        design = comparison.design
        many = len(comparison.candidates)
        parts = [f"{many} candidate{'s' if many != 1 else ''}"] if many else []
        parts += [f"up to {search.total} settings of {search.searched.name}" for search in comparison.searches]
        if design.folds is None:
            runs = f"{design.seeds} run{'s' if design.seeds > 1 else ''} each, by seed"
        else:
            again = f" {design.repeats} times" if design.repeats > 1 else ""
            seeds = f", {design.seeds} seeds" if design.seeds > 1 else ""
            runs = f"{design.folds} folds{again}{seeds}"
        self.say(f"compare: {', '.join(parts)}; {runs}; ranked by {self.word}")

    # -- the comparison's listener

    def __call__(self, event: Event) -> None:
        if event.kind == "stage":
            self.stage(**event.figures)
        super().__call__(event)

    def stage(self, stage: str, jobs: int, done: int) -> None:
        self.rows, self.total, self.ended = {}, jobs, done
        self.steps = self.steps_known = self.jobs_known = 0
        self.stage_began = self._said = time.monotonic()
        kept = f", {done} done before" if done else ""
        self.say(f"\n{_STAGES[stage]}" + (f"; {jobs} runs{kept}" if jobs else ""))

    def job_started(self, job: str, figures: Mapping[str, Any]) -> None:
        row, steps, step = self._row(job), figures["steps"], figures["step"]
        self.steps_known += steps - step
        if job in row.running:  # once more: its worker was lost, and the steps that it had done
            self.steps_known -= steps - row.running[job][0]
        else:
            self.jobs_known += 1
        row.running[job] = (step, steps, math.nan)
        if figures["note"]:
            self.say(f"{job} {figures['note']}")

    def step_done(self, job: str, figures: Mapping[str, Any]) -> None:
        row, step = self._row(job), figures["step"]
        self.steps += step - row.running[job][0]
        row.running[job] = (step, figures["steps"], figures["loss"])
        if not self.console.is_terminal and time.monotonic() - self._said > _QUIET:
            self._said = time.monotonic()
            self.say(self._state())

    def epoch_done(self, job: str, figures: Mapping[str, Any]) -> None:
        pass

    def job_done(self, job: str, figures: Mapping[str, Any]) -> None:
        row = self._row(job)
        self._said = time.monotonic()
        step, steps, _ = row.running.pop(job, (0, 0, math.nan))
        self.steps_known -= steps - step
        self.ended += 1
        status, epochs = figures["status"], figures["epochs"]
        if status == "interrupted":
            return
        figure = (figures["valid"] or (epochs[-1]["valid"] if epochs else {})).get(self.metric.name, math.nan)
        if status == "failed":
            row.failed += 1
            outcome = f"failed: {figures['error']}"
        else:
            row.done += 1
            row.figures += [] if math.isnan(figure) else [figure]
            stopped = f", stopped after epoch {len(epochs)}" if status == "stopped" else ""
            outcome = f"{self.word} {_number(figure)}{stopped}" if not math.isnan(figure) else "done"
        width = len(str(self.total))
        self.say(f"[{self.ended:>{width}}/{self.total}] {job}: {outcome} ({figures['seconds']:.1f} s)")

    def _row(self, job: str) -> _Row:
        return self.rows.setdefault(job.rsplit("--", 1)[0], _Row())

    # -- the live table

    def _left(self) -> str:
        """Time left in this stage, from the steps so far."""
        passed = time.monotonic() - self.stage_began
        if not self.steps or not self.jobs_known or passed < _SOON:
            return "-"
        waiting = self.total - self.ended - sum(len(row.running) for row in self.rows.values())
        expected = self.steps_known + waiting * self.steps_known / self.jobs_known
        minutes, seconds = divmod(int(passed * max(0.0, expected - self.steps) / self.steps), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours:,} h {minutes:02} min" if hours else f"{minutes}:{seconds:02}"

    def _best(self) -> str:
        means = {name: fmean(row.figures) for name, row in self.rows.items() if row.figures}
        if not means:
            return "-"
        best = (max if self.metric.better == "higher" else min)(means, key=lambda name: means[name])
        return f"{best} {_number(means[best])}"

    def _state(self) -> str:
        running = sum(len(row.running) for row in self.rows.values())
        waiting = max(0, self.total - self.ended - running)
        jobs = f"{running} running · {waiting} waiting · {self.ended} done"
        return f"{jobs} · best so far {self._best()} · {self._left()} left"

    def _table(self) -> Table:
        table = Table(title=Text(self._state()), title_justify="left", box=None, pad_edge=False)
        table.add_column("candidate", no_wrap=True)
        for head in ("done", "running", "steps", "loss", self.word):
            table.add_column(head, justify="right", no_wrap=True)
        room = max(3, self.console.size.height - 6)
        order = sorted(self.rows, key=lambda name: (not self.rows[name].running, name))
        for name in order[:room]:
            row = self.rows[name]
            steps = " ".join(f"{100 * step // max(1, of)}%" for step, of, _ in list(row.running.values())[:4])
            losses = [loss for _, _, loss in row.running.values() if not math.isnan(loss)]
            table.add_row(
                Text(name),
                str(row.done) + (f" ({row.failed} failed)" if row.failed else ""),
                str(len(row.running) or "-"),
                steps or "-",
                _number(fmean(losses)) if losses else "-",
                _number(fmean(row.figures)) if row.figures else "-",
            )
        if len(order) > room:
            table.add_row(Text(f"and {len(order) - room} more"), "", "", "", "", "")
        return table

    # -- the end

    def summary(self, results: dict[str, Any], task: Task, out: Path, report: str) -> None:
        """The report's path, the ranking and the verdict."""
        self.say(f"\nreport: {out / report}\n")
        rows = []
        tested = tested_by(results, task)
        # Of few runs there is an interval of other rows for these very runs, and none of other runs.
        of = ", of rows" if any(each["interval_of"] == "rows" for each in results["candidates"]) else ""
        for each in results["candidates"]:
            if each["status"] != "done":
                continue
            low, high = each["interval"] or (None, None)
            span = f" ({_number(low)} to {_number(high)})" if low is not None else ""
            rows.append(
                [
                    str(each["rank"] or "-"),
                    each["name"],
                    _number(each["mean"]) + span,
                    *(_tested(each["test"], metric) for metric in tested),
                    f"{each['trainable_parameters']:,}",
                    f"{(each['peak_memory_bytes'] or 0) / 2**20:,.0f}",
                    f"{each['seconds']:.1f}",
                ]
            )
        if base := results["base"]:
            tests = [_tested(base["test"], metric) for metric in tested]
            rows.append(["-", "the base, not trained", _number(base["mean"]), *tests, "0", "-", "-"])
        tests = [f"test {metric.title}" for metric in tested]
        head = ["", "candidate", f"{self.word} (95%{of})", *tests, "trained parameters", "MiB", "seconds"]
        self.table(head, rows, right=range(2, len(head)))
        if probe := results["forgetting"]:
            own = {each["name"]: each["held_perplexity"] for each in results["candidates"]}
            self.say(f"perplexity on held text: {perplexities(probe['base'], own)}")
        for each in results["candidates"]:
            if each["status"] != "done":
                self.say(f"{each['name']} {each['status']}: {each['error'] or 'not all of its runs were done'}")
            for flag in each["flags"]:
                self.say(f"{each['name']}: {flag}")
        self.say("\n" + "\n".join(results["verdict"]["sentences"]))
        kept = [each["adapter"] for each in results["candidates"] if each["adapter"]]
        if kept:
            self.say(f"\nadapters: {', '.join(str(out / adapter) for adapter in kept)}")


def _tested(test: dict[str, float] | None, metric: Metric) -> str:
    value = None if test is None else test.get(metric.name)
    return "-" if value is None else f"{value:.1%}" if metric.proportion else _number(value)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else written(value, 4)
