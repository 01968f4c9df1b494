"""What a reader should know of a candidate before its figure is believed: that it did not learn, or is no better than a
label that is always given, or came out another way with each seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Of the loss of one who knows how frequent each label is, and nothing of the row.
LEARNED = 0.95
# Between the best and the worst run on the same rows: of a metric from 0 to 1, and of a loss as a share of its mean.
UNSTEADY, UNSTEADY_LOSS = 0.1, 0.5


def flags(records: Sequence[Mapping[str, Any]], shares: Array, metric: str, same_rows: bool) -> list[str]:
    """What is to be said of a candidate, by the records of its finished runs.

    Args:
        shares: of each label among the training rows, [C].
        metric: what candidates are ranked by. same_rows: all runs were measured on the same validation rows.
    """
    out: list[str] = []
    if not records:
        return out
    known = shares[shares > 0]
    ignorant = float(-(known * np.log(known)).sum())
    losses = [min(_last(record), _known(record["valid"].get("loss"))) for record in records]
    if ignorant > 0 and min(losses) > LEARNED * ignorant:
        out.append("did not learn: its loss stayed that of the labels' frequencies; try another learning rate")
    accuracies = [_known(record["valid"].get("accuracy"), 1.0) for record in records]
    if statistics.fmean(accuracies) < float(shares.max()):
        out.append(
            f"below the majority label: {statistics.fmean(accuracies):.1%} are right, and to say the most frequent "
            f"label of the training rows always is right for {shares.max():.1%} of those"
        )
    figures = [value for record in records if (value := record["valid"].get(metric)) is not None]
    if same_rows and len(figures) > 1:
        apart = max(figures) - min(figures)
        if apart > (UNSTEADY_LOSS * statistics.fmean(figures) if metric == "loss" else UNSTEADY):
            more = "" if len(figures) >= 5 else "; give it five seeds"
            out.append(f"unstable: its runs are {apart:.2f} apart{more}")
    return out


def _last(record: Mapping[str, Any]) -> float:
    epochs = record["epochs"]
    return _known(epochs[-1]["train_loss"]) if epochs else float("inf")


def _known(value: float | None, otherwise: float = float("inf")) -> float:
    return otherwise if value is None else float(value)
