"""What a reader should know of a candidate before its figure is believed: what its task doubts, and that it came out
another way with each seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tanzaku.support.numbers import written
from tanzaku.tasks.task import Example, Metric, Task

# Between the best and the worst run on the same rows: of what a metric can be, and of one without bounds, of its mean.
UNSTEADY, UNSTEADY_SHARE = 0.1, 0.5


def flags(
    records: Sequence[Mapping[str, Any]], task: Task, examples: Sequence[Example], metric: Metric, same_rows: bool
) -> list[str]:
    """What is to be said of a candidate, by the records of its finished runs.

    Args:
        examples: the training rows. metric: what candidates are ranked by. same_rows: all runs were measured on the
            same validation rows.
    """
    if not records:
        return []
    runs = [
        {"valid": record["valid"], "loss": min(_last(record), _known(record["valid"]["loss"]))} for record in records
    ]
    out = task.doubts(runs, examples)
    figures = [value for record in records if (value := record["valid"].get(metric.name)) is not None]
    if same_rows and len(figures) > 1:
        apart = max(figures) - min(figures)
        low, high = metric.bounds
        if apart > (UNSTEADY * (high - low) if metric.bounded else UNSTEADY_SHARE * statistics.fmean(figures)):
            more = "" if len(figures) >= 5 else "; give it five seeds"
            out.append(f"unstable: its runs are {written(apart, 2)} apart{more}")
    return out


def _last(record: Mapping[str, Any]) -> float:
    epochs = record["epochs"]
    if record.get("train_settings", {}).get("focal_gamma"):
        return float("inf")  # a focal loss is small of rows that nothing is known of, too
    return _known(epochs[-1]["train_loss"]) if epochs else float("inf")


def _known(value: float | None) -> float:
    return float("inf") if value is None else float(value)
