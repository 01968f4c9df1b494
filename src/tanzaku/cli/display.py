"""What a run shows. A terminal gets a progress bar below the lines; a file or a pipe gets the lines alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tanzaku.cli.record import RESULTS
from tanzaku.support.numbers import written

if TYPE_CHECKING:
    from tanzaku.tasks.task import Metric, Task, TaskData
    from tanzaku.train.events import Event
    from tanzaku.train.results import JobResult

_SPLITS = {"train": "training", "valid": "validation", "test": "test"}


class Display:
    """Draws a run, by its events. A context manager, for the bar.

    Args:
        metrics: of its task. jobs: how many there will be.
    """

    def __init__(self, metrics: Sequence[Metric] = (), jobs: int = 1):
        self.metrics = metrics
        self.epochs = ["epoch", "training loss", *(metric.on_validation for metric in metrics), "seconds"]
        self.console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
        self.jobs, self.started = jobs, 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[pace]} steps/s  left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        self.console.print(line)

    @property
    def marking(self) -> str:
        """How what is marked can be told, in words."""
        return "in reverse video" if self._styled else "in [[ ]]"

    @property
    def _styled(self) -> bool:
        return self.console.is_terminal and self.console.color_system is not None

    def marked(self, parts: Sequence[tuple[str, bool]], between: str) -> None:
        """Print a line, some parts of it marked."""
        line = Text()
        for at, (part, is_marked) in enumerate(parts):
            line.append(between if at else "")
            line.append(f"[[{part}]]" if is_marked and not self._styled else part, "reverse" if is_marked else None)
        self.console.print(line)

    def data(self, data: TaskData, max_length: int) -> None:
        """Rows and what they are for, and the texts that were cut."""
        rows = ", ".join(f"{len(split)} {_SPLITS[split.name]}" for split in data.splits())
        self.say(f"data: {rows} rows; {data.task.describe()}")
        for split in data.splits():
            if split.truncated:
                kind = _SPLITS[split.name]
                most = split.allowed or f"{max_length} tokens"
                self.say(f"{split.truncated} of {len(split)} {kind} texts were cut at {most}")
            if split.dropped:
                of, kind = len(split) + split.dropped, _SPLITS[split.name]
                beside = "; test figures are of the others alone" if split.name == "test" else ""
                self.say(
                    f"{split.dropped} of {of} {kind} rows ({split.source}) have more than {split.allowed} and are left "
                    f"out{beside}"
                )

    # -- the run's listener

    def __call__(self, event: Event) -> None:
        match event.kind:
            case "job_started":
                self.job_started(str(event.job), event.figures)
            case "step":
                self.step_done(str(event.job), event.figures)
            case "epoch":
                self.epoch_done(str(event.job), event.figures)
            case "job_done":
                self.job_done(str(event.job), event.figures)
            case "note":
                self.say(event.figures["text"])

    def job_started(self, job: str, figures: Mapping[str, Any]) -> None:
        self.started += 1
        number = f" ({self.started} of {self.jobs})" if self.jobs > 1 else ""
        trained, steps, epochs = (figures[key] for key in ("trainable_parameters", "steps", "epochs"))
        before = f", going on after epoch {epochs}" if epochs else ""
        self.say(f"\n{job}{number}: {trained:,} trained parameters, {steps} steps{before}")
        self.say("  ".join(self.epochs))
        self._drop_task()
        self.task = self.bar.add_task(job, total=steps, completed=figures["step"], loss="-", pace="-")

    def step_done(self, job: str, figures: Mapping[str, Any]) -> None:
        if self.task is not None:
            speed = self.bar.tasks[-1].speed if self.bar.tasks else None
            pace = f"{speed:.1f}" if speed else "-"
            self.bar.update(self.task, completed=figures["step"], loss=_number(figures["loss"]), pace=pace)

    def epoch_done(self, job: str, figures: Mapping[str, Any]) -> None:
        valid = [_number(figures["valid"].get(metric.name)) for metric in self.metrics]
        cells = [str(figures["epoch"]), _number(figures["train_loss"]), *valid, f"{figures['seconds']:.1f}"]
        self.say("  ".join(cell.rjust(len(name)) for cell, name in zip(cells, self.epochs, strict=True)))

    def job_done(self, job: str, figures: Mapping[str, Any]) -> None:
        self._drop_task()
        if figures["restored_epoch"] is not None:
            self.say(f"weights of epoch {figures['restored_epoch']}, the best, are kept")
        if figures["status"] != "done":
            self.say(f"{job} {figures['status']}: {figures['error']}")

    def _drop_task(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = None

    # -- reports

    def adapter(self, result: JobResult, data: TaskData, out: Path) -> None:
        """How one adapter did, and where it is."""
        task = data.task
        if result.confusion is not None:
            names, kind = list(task.classes), "test" if data.test is not None else "validation"
            self.say(f"\nconfusion of the {kind} rows: a row is a true label, a column a predicted one")
            self.table(["", *names], [[n, *map(str, row)] for n, row in zip(names, result.confusion, strict=True)])
        if by_class := result.by_class:
            kind = "test" if data.test is not None else "validation"
            self.say(f"\nfigures of the {kind} rows, by class")
            keys = list(next(iter(by_class.values())))
            rows = [[name, *map(_plain, own.values())] for name, own in by_class.items()]
            self.table(["", *keys], rows, right=range(1, len(keys) + 1))
        if task.writes and result.valid is not None:  # after each epoch they were of some rows
            found = ", ".join(f"{each.title} {_number(result.valid.get(each.name))}" for each in task.metrics)
            self.say(f"validation {found}")
        if result.test is not None:
            self.say(f"test {', '.join(_tested(result, task))}")
        if data.probe is not None:
            self.say(f"perplexity on held text: {perplexities(data.probe.base, {result.name: result.held_perplexity})}")
        self.say(f"peak memory {_mebibytes(result)} MiB, {result.seconds:.1f} seconds")
        self.say(f"adapter: {out / (result.adapter or '')}\nresults: {out / RESULTS}")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        """Aligned columns; those numbered in `right` end together."""
        widths = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
            cells = [
                gap + cell if at in right else cell + gap for at, (cell, gap) in enumerate(zip(row, gaps, strict=True))
            ]
            self.say("  ".join(cells).rstrip())


def _tested(result: JobResult, task: Task) -> list[str]:
    """The figures of the test rows, those of shares of rows first, with their intervals."""
    found, out = result.test or {}, []
    names = dict.fromkeys([*task.beside, task.rank_by])
    for metric in (each for name in names for each in task.metrics if each.name == name):
        value = found.get(metric.name, math.nan)
        text = f"{value:.1%}" if metric.proportion and not math.isnan(value) else _number(value)
        if metric.name in result.test_intervals:
            low, high = result.test_intervals[metric.name]
            text += f" ({100 * low:.1f} to {100 * high:.1f})"
        out.append(f"{metric.title} {text}")
    return out


def perplexities(base: float | None, own: Mapping[str, float | None]) -> str:
    """That of the base and of each adapter, where they are known."""
    known = {name: value for name, value in {"base": base, **own}.items() if value is not None}
    return ", ".join(f"{name} {written(value, 2)}" for name, value in known.items())


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else written(value, 4)


def _plain(value: float | None) -> str:
    return str(value) if isinstance(value, int) else _number(value)


def _mebibytes(result: JobResult) -> str:
    return f"{result.peak_memory_bytes / 2**20:,.0f}"
