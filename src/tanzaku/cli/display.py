"""What a run shows. A terminal gets a progress bar below the lines; a file or a pipe gets the lines alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tanzaku.cli.record import RESULTS

if TYPE_CHECKING:
    from tanzaku.tasks.prepare import ClassificationData
    from tanzaku.train.results import EpochRecord, Job, JobResult

_SPLITS = {"train": "training", "valid": "validation", "test": "test"}
_METRICS = {"loss": "validation loss", "roc_auc": "ROC-AUC", "accuracy": "accuracy", "macro_f1": "macro F1"}
_EPOCHS = ["epoch", "training loss", *_METRICS.values(), "seconds"]


class Display:
    """Draws a run; it is the loop's observer. A context manager, for the bar."""

    def __init__(self, jobs: int = 1):
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

    def data(self, data: ClassificationData, max_length: int) -> None:
        """Rows and labels, and the texts that were cut."""
        rows = ", ".join(f"{len(split)} {_SPLITS[split.name]}" for split in data.splits())
        self.say(f"data: {rows} rows; labels {', '.join(data.labels.names)}")
        for split in data.splits():
            if split.truncated:
                kind = _SPLITS[split.name]
                self.say(f"{split.truncated} of {len(split)} {kind} texts were cut at {max_length} tokens")

    # -- the loop's observer

    def job_started(self, job: Job, result: JobResult, steps: int) -> None:
        self.started += 1
        number = f" ({self.started} of {self.jobs})" if self.jobs > 1 else ""
        before = f", going on after epoch {len(result.epochs)}" if result.epochs else ""
        self.say(f"\n{job.name}{number}: {result.trainable_parameters:,} trained parameters, {steps} steps{before}")
        self.say("  ".join(_EPOCHS))
        self._drop_task()
        self.task = self.bar.add_task(job.name, total=steps, completed=result.steps, loss="-", pace="-")

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
        if self.task is not None:
            speed = self.bar.tasks[-1].speed if self.bar.tasks else None
            pace = f"{speed:.1f}" if speed else "-"
            self.bar.update(self.task, completed=step, loss=_number(loss), pace=pace)

    def epoch_done(self, job: Job, record: EpochRecord) -> None:
        figures = [_number(record.valid.get(metric)) for metric in _METRICS]
        cells = [str(record.epoch), _number(record.train_loss), *figures, f"{record.seconds:.1f}"]
        self.say("  ".join(cell.rjust(len(name)) for cell, name in zip(cells, _EPOCHS, strict=True)))

    def job_done(self, job: Job, result: JobResult) -> None:
        self._drop_task()
        if result.restored_epoch is not None:
            self.say(f"weights of epoch {result.restored_epoch}, the best, are kept")
        if result.status != "done":
            self.say(f"{job.name} {result.status}: {result.error}")

    def _drop_task(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = None

    # -- reports

    def adapter(self, result: JobResult, data: ClassificationData, out: Path) -> None:
        """How one adapter did, and where it is."""
        if result.confusion is not None:
            names, kind = list(data.labels.names), "test" if data.test is not None else "validation"
            self.say(f"\nconfusion of the {kind} rows: a row is a true label, a column a predicted one")
            self.table(["", *names], [[n, *map(str, row)] for n, row in zip(names, result.confusion, strict=True)])
        if result.test is not None:
            self.say(f"test accuracy {_accuracy(result)}, ROC-AUC {_number(result.test.get('roc_auc'))}")
        self.say(f"peak memory {_mebibytes(result)} MiB, {result.seconds:.1f} seconds")
        self.say(f"adapter: {out / (result.adapter or '')}\nresults: {out / RESULTS}")

    def ranking(self, results: Sequence[JobResult], data: ClassificationData, out: Path) -> None:
        """All candidates, best first, and how little that may mean."""
        done = sorted((r for r in results if r.status == "done"), key=_merit, reverse=True)
        rows = []
        for rank, result in enumerate(done, 1):
            area = _number(_final(result).get("roc_auc"))
            size = f"{result.trainable_parameters:,}"
            rows.append(
                [str(rank), result.name, _accuracy(result), area, size, f"{result.seconds:.1f}", _mebibytes(result)]
            )
        split = "test" if data.test is not None else "validation"
        interval = " (95% interval)" if data.test is not None else ""
        head = ["", "candidate", f"{split} accuracy{interval}", "ROC-AUC", "trained parameters", "seconds", "peak MiB"]
        self.say("")
        self.table(head, rows, right=range(2, len(head)))
        for result in results:
            if result.status != "done":
                self.say(f"{result.name} {result.status}: {result.error}")
        self._caution(done, data)
        self.say(f"results: {out / RESULTS}")

    def _caution(self, done: Sequence[JobResult], data: ClassificationData) -> None:
        split = data.test or data.valid
        if split is None:
            self.say("There are no validation or test rows: the order is that of the recipe.")
            return
        line = f"One of {len(split)} {_SPLITS[split.name]} rows is {100 / len(split):.1f} points of accuracy"
        intervals = [result.test_interval for result in done if result.test_interval is not None]
        if len(intervals) > 1:
            near = sum(high >= intervals[0][0] for _, high in intervals[1:])
            line += f"; {near} of the {len(intervals) - 1} other intervals overlap the first's"
        self.say(f"{line}. One run with one seed cannot rank methods.")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        """Aligned columns; those numbered in `right` end together."""
        widths = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
            cells = [
                gap + cell if at in right else cell + gap for at, (cell, gap) in enumerate(zip(row, gaps, strict=True))
            ]
            self.say("  ".join(cells).rstrip())


def _final(result: JobResult) -> dict[str, float]:
    """The figures of the test rows, or else of the epoch whose weights were kept, on the validation rows."""
    if result.test is not None or not result.epochs:
        return result.test or {}
    return result.epochs[(result.restored_epoch or len(result.epochs)) - 1].valid


def _merit(result: JobResult) -> tuple[float, float]:
    figures = [_final(result).get(metric, math.nan) for metric in ("accuracy", "roc_auc")]
    accuracy, area = (-1.0 if math.isnan(figure) else figure for figure in figures)
    return accuracy, area


def _accuracy(result: JobResult) -> str:
    figure = _final(result).get("accuracy", math.nan)
    text = "-" if math.isnan(figure) else f"{figure:.1%}"
    if result.test_interval is not None:
        low, high = result.test_interval
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return text


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _mebibytes(result: JobResult) -> str:
    return f"{result.peak_memory_bytes / 2**20:,.0f}"
