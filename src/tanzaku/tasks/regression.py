"""Regression: a number for each text, or pair of texts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tanzaku.errors import TanzakuError
from tanzaku.support.lazy import Lazy
from tanzaku.tasks.cells import number_of
from tanzaku.tasks.row_tasks import RowTasks
from tanzaku.tasks.settings import Finding, TextSettings
from tanzaku.tasks.task import LEARNED, LOSS, Batch, Column, Example, Metric, Records, Said, Statistics
from tanzaku.tasks.text import TextTask, check_columns, columns_in

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tanzaku.tasks.data import Table
    from tanzaku.tasks.task import Array
else:
    np = Lazy("numpy")

_INFINITE = (0.0, math.inf)
_ROUNDING = 1e-13  # what it leaves of no variance, as a share of a sum of squares


class RegressionSettings(TextSettings):
    """Columns of a text, or two, and of the number."""

    label: str = Field(default="label", min_length=1, description="column of the label, or of the number")


# -- metrics, of records with `prediction` and `target` [n] in the unit of the rows


def _mae(records: Records) -> Statistics:
    errors = np.abs(records["prediction"] - records["target"])
    return Statistics(np.stack([errors, np.ones_like(errors)], axis=1), lambda sums: sums[0] / sums[1])


def _rmse(records: Records) -> Statistics:
    errors = (records["prediction"] - records["target"]) ** 2
    return Statistics(np.stack([errors, np.ones_like(errors)], axis=1), lambda sums: np.sqrt(sums[0] / sums[1]))


def _pearson(records: Records) -> Statistics:
    # About their means, since sums of squares of large numbers lose digits.
    x, y = (records[key] - records[key].mean() for key in ("prediction", "target"))
    return Statistics(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1), _correlation)


def _correlation(sums: Array) -> Array:
    """[B], of the sums [6, B] of 1, x, y, xx, yy and xy; nan where x or y does not vary."""
    n, x, y, xx, yy, xy = sums
    of_x, of_y = n * xx - x * x, n * yy - y * y
    varied = (of_x > _ROUNDING * n * xx) & (of_y > _ROUNDING * n * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(varied, (n * xy - x * y) / np.sqrt(of_x * of_y), math.nan)
    return np.clip(found, -1.0, 1.0)


def _spearman(records: Records) -> Statistics:
    """Ranks depend on which rows are drawn, so a row's statistics are how often it is, and ranks come of their sums."""
    prediction, target = records["prediction"], records["target"]
    if not np.isfinite(prediction).all():
        return Statistics(np.full((len(prediction), 1), math.nan), lambda sums: sums[0])
    places = [np.unique(values, return_inverse=True)[1] for values in (prediction, target)]

    def figure(counts: Array) -> Array:
        x, y = (_ranks(place, counts) for place in places)
        middle = (counts.sum(axis=0) + 1) / 2
        x, y = x - middle, y - middle
        sums = np.stack([np.broadcast_to(each, x.shape) for each in (np.ones_like(x), x, y, x * x, y * y, x * y)])
        return _correlation((sums * counts).sum(axis=1))

    return Statistics(np.eye(len(target)), figure)


def _ranks(place: Array, counts: Array) -> Array:
    """[n, B]: the mean rank in each draw of rows [n] that stand at `place` in order and are drawn `counts` [n, B]."""
    at = np.zeros((place.max() + 1, counts.shape[1]))
    np.add.at(at, place, counts)
    ranks: Array = (at.cumsum(axis=0) - (at - 1) / 2)[place]
    return ranks


MAE = Metric("mae", "mean absolute error", "lower", _INFINITE, _mae, by_row=True)
RMSE = Metric("rmse", "root mean squared error", "lower", _INFINITE, _rmse)
PEARSON = Metric("pearson", "Pearson's r", "higher", (-1.0, 1.0), _pearson, hub="pearsonr")
SPEARMAN = Metric("spearman", "Spearman's rho", "higher", (-1.0, 1.0), _spearman, hub="spearmanr")


@dataclass(frozen=True)
class Regression(TextTask):
    """Numbers are learned as how many standard deviations they are from the mean of the training rows."""

    mean: float
    deviation: float
    text: str = "text"
    text_pair: str | None = None
    row_tasks: RowTasks | None = None

    name = "regression"
    summary = "a number for each text"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    metrics = (LOSS, MAE, RMSE, PEARSON, SPEARMAN)
    rank_by = "mae"
    Data = RegressionSettings
    answer_keys = ("predicted",)

    # -- rows

    @classmethod
    def learn(cls, tables: Mapping[str, Table], data: Any) -> Regression:
        check_columns(
            tables, {"text": data.text, "text_pair": data.text_pair, "label": data.label}, ("text", "text_pair")
        )
        numbers = {split: _numbers(table, data.label) for split, table in tables.items()}["train"]
        if len(set(numbers)) < 2:
            raise TanzakuError(
                f"column {data.label!r} of {tables['train'].source} has only the number {numbers[0]:g}; expected at "
                "least two different ones"
            )
        return cls(statistics.fmean(numbers), statistics.pstdev(numbers), data.text, data.text_pair)

    @classmethod
    def findings(cls, tables: Mapping[str, Table], data: Any) -> Iterator[Finding]:
        table = tables["train"]
        if len(distinct := sorted(set(_numbers(table, data.label)))) == 2:
            yield Finding(
                f"column {data.label!r} of {table.source} has the numbers {distinct[0]:g} and {distinct[1]:g} alone, "
                "which look like classes: task classification tells classes apart"
            )

    @classmethod
    def targets(cls, table: Table, data: Any) -> list[str]:
        return [f"{number:g}" for number in _numbers(table, data.label)]

    def target_of(self, value: Any, where: str) -> float:
        return number_of(value, where)

    def target_tensor(self, targets: Sequence[float]) -> Tensor:
        import torch

        return torch.tensor([(target - self.mean) / self.deviation for target in targets], dtype=torch.float32)

    # -- the model

    def model_settings(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        loss: Tensor = (outputs.logits.float()[:, 0] - batch.targets["target"]) ** 2
        return loss

    def records(self, outputs: Any, batch: Batch) -> Records:
        standard = outputs.logits.detach().cpu().double()[:, 0].numpy()
        found: Records = {"prediction": self.mean + self.deviation * standard}
        return found | self._judged(found["prediction"], batch.examples) if batch.targets else found

    def _judged(self, prediction: Array, examples: Sequence[Example]) -> Records:
        target = np.array([example.target for example in examples], dtype=float)
        loss = ((prediction - target) / self.deviation) ** 2
        return {"target": target, "loss": loss, "weight": np.ones(len(target))}

    # -- figures

    @property
    def beside(self) -> tuple[str, ...]:
        return ("mae", "pearson")

    def doubts(self, runs: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> list[str]:
        # Of one who always says the mean of the training rows, the loss is 1.
        if min(run["loss"] for run in runs) > LEARNED:
            return ["did not learn: its error stayed that of the training rows' mean; try another learning rate"]
        return []

    # -- predictions

    def predictions(self, records: Records) -> list[float]:
        return [float(f"{value:.9g}") for value in records["prediction"].tolist()]

    def recorded(self, predictions: Sequence[Any], examples: Sequence[Example]) -> Records:
        prediction = np.array([math.nan if value is None else value for value in predictions], dtype=float)
        return {"prediction": prediction, **self._judged(prediction, examples)}

    def truth(self, example: Example) -> str:
        return f"{example.target:.6g}"

    def said(self, prediction: Any, example: Example) -> Said:
        return Said("–" if prediction is None else f"{prediction:.4g}")

    def columns(self) -> list[Column]:
        return [Column("predicted", "number")]

    def cells(self, prediction: Any) -> list[Any]:
        return [float(f"{prediction:.9g}")]

    def answer(self, prediction: Any) -> dict[str, Any]:
        return {"predicted": prediction}

    # -- files and tables

    def to_json(self) -> dict[str, Any]:
        columns = {"text": self.text, "text_pair": self.text_pair}
        return {"mean": self.mean, "deviation": self.deviation, **columns, **self.tasks_to_json()}

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> Regression:
        found = []
        for key, least in (("mean", -math.inf), ("deviation", 0.0)):
            value = about.get(key)
            if not isinstance(value, int | float) or not least < value < math.inf:
                over = "" if least else " above 0"
                raise TanzakuError(f"{where}{key} is {str(value)[:40]}, expected a number{over}")
            found.append(float(value))
        text, pair = columns_in(about, where)
        return cls(found[0], found[1], text, pair, RowTasks.from_json(about, where))

    @classmethod
    def fits(cls, width: int | None, config: Any) -> bool:
        return width == 1

    @classmethod
    def of_base(cls, config: Any, width: int | None, asked: Mapping[str, Any], path: str, base: str) -> Regression:
        return cls(0.0, 1.0, asked.get("text", "text"), asked.get("text_pair"))  # what the head gives is the number

    def describe(self) -> str:
        return f"numbers, mean {self.mean:.4g}, standard deviation {self.deviation:.4g}"

    def caution(self) -> str:
        return (
            f"its head gives standard deviations ({self.deviation:.6g}) from the mean ({self.mean:.6g}) of the rows "
            "that it was trained on"
        )

    def left_in_config(self) -> dict[str, Any]:
        return {"standardized_targets": {"mean": self.mean, "deviation": self.deviation}}

    def answers(self) -> str:
        return f"It answers with a number: {self.caution()}."

    @classmethod
    def table_of(cls, tables: Mapping[str, Table], data: Any) -> tuple[list[str], list[list[str]]]:
        numbers = [_numbers(table, data.label) for table in tables.values()]
        rows: dict[str, Callable[[list[float]], float]] = {
            "least": min,
            "median": statistics.median,
            "mean": statistics.fmean,
            "most": max,
        }
        return ["number"], [[name, *(f"{of(each):.4g}" for each in numbers)] for name, of in rows.items()]


def _numbers(table: Table, column: str) -> list[float]:
    return [number_of(value, f"{table.source} row {row}") for row, value in enumerate(table.column(column), 1)]
