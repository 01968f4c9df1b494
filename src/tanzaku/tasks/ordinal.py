"""Ordinal classification: each text, or pair of texts, is of one of some classes that have an order.

Learned by the loss of CORAL (Cao, Mirjalili, Raschka 2020, Rank consistent ordinal regression for neural networks,
https://arxiv.org/abs/1901.07884): of each threshold between two neighbours, the cross entropy of whether a row is
above it. Here the probability of being above is the sum of a softmax's above. So thresholds never contradict each
other, which CORAL has shared weights for; each term is a proper score, being that of a binary event; the head is a
classifier's, one output a class; and with two classes the loss is cross entropy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.support.lazy import Lazy
from tanzaku.tasks.classification import Classification, ClassificationSettings, labels_of
from tanzaku.tasks.labels import NUMBER, label_name
from tanzaku.tasks.losses import focal
from tanzaku.tasks.metrics import ACCURACY, MACRO_F1, unknown
from tanzaku.tasks.settings import Finding
from tanzaku.tasks.task import LOSS, Batch, Example, Metric, Records, Statistics, ignorance

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tanzaku.tasks.data import Table
    from tanzaku.tasks.task import Array
else:
    np = Lazy("numpy")


class OrdinalSettings(ClassificationSettings):
    """Columns of a text, or two, and of the label, and the order of labels."""

    options: ClassVar[frozenset[str]] = frozenset({"order"})

    order: list[str] = Field(
        default=[], description="the labels from the least to the most (numbers: by value; repeatable)"
    )

    @field_validator("order", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise TanzakuError(f"found {value!r}, expected a list of labels, such as [bad, fair, good]")
        names = [label_name(each, "the order") for each in value]
        if len(names) == 1 or len({*names}) < len(names):
            raise TanzakuError(f"found {listed(names)}, expected two labels or more, each once")
        return names


# -- metrics, of records with `probabilities` [n, C] and `target` [n], ids: steps are differences of ids


def _steps(records: Records) -> tuple[Array, Array] | None:
    """[n] and [n]: ids that are predicted, and true ones, as numbers; None where not all are known."""
    if not np.isfinite(records["probabilities"]).all():
        return None
    return records["probabilities"].argmax(axis=1).astype(float), records["target"].astype(float)


def _kappa(records: Records) -> Statistics:
    """Cohen's kappa, with squared steps as weights.

    Cohen 1968, Weighted kappa. What is expected by chance, a sum over pairs of classes, is one of sums over rows.
    """
    if (found := _steps(records)) is None:
        return unknown(len(records["target"]))
    x, y = found

    def figure(sums: Array) -> Array:
        n, x, y, xx, yy, xy = sums
        chance = xx + yy - 2 * x * y / n
        with np.errstate(invalid="ignore", divide="ignore"):  # all rows of one class, and predicted so
            kappa: Array = 1 - (xx + yy - 2 * xy) / chance
        return np.where(chance > 0, kappa, np.nan)

    return Statistics(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1), figure)


def _off(records: Records) -> Statistics:
    if (found := _steps(records)) is None:
        return unknown(len(records["target"]))
    steps = np.abs(found[0] - found[1])
    return Statistics(np.stack([steps, np.ones_like(steps)], axis=1), lambda sums: sums[0] / sums[1])


KAPPA = Metric("kappa", "weighted kappa", "higher", (-1.0, 1.0), _kappa)
STEPS = Metric("mae_steps", "mean steps off", "lower", (0.0, float("inf")), _off)


@dataclass(frozen=True)
class Ordinal(Classification):
    """Classes from the least to the most."""

    name = "ordinal"
    summary = "one of some labels that have an order"
    metrics = (LOSS, KAPPA, STEPS, ACCURACY, MACRO_F1)
    rank_by = "kappa"
    Data = OrdinalSettings

    # -- rows

    @classmethod
    def labels_in(cls, table: Table, data: Any) -> tuple[str, ...]:
        names = labels_of(table.column(data.label), table.source)
        if not data.order:
            if not all(NUMBER.fullmatch(name) for name in names):
                fix = "--order bad --order fair --order good, or order: [bad, fair, good]"
                raise TanzakuError(
                    f"column {data.label!r} of {table.source} has the labels {listed(names)}, which are no numbers: "
                    f"say their order, as in {fix}"
                )
            return names
        for name in names:
            if name not in data.order:
                raise TanzakuError(
                    f"column {data.label!r} of {table.source} has the label {name!r}, which the order "
                    f"{listed(data.order)} has not{nearest(name, data.order)}"
                )
        return tuple(data.order)

    @classmethod
    def findings(cls, tables: Mapping[str, Table], data: Any) -> Iterator[Finding]:
        yield from super().findings(tables, data)
        there = {*cls.targets(tables["train"], data)}
        if absent := [name for name in data.order if name not in there]:
            yield Finding(f"no training row has the label {listed(absent)}, so nothing can be learned of it")

    # -- the model

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        return focal(_threshold_losses(outputs.logits.float(), batch.targets["target"]), batch).sum(dim=1)

    def records(self, outputs: Any, batch: Batch) -> Records:
        found = super().records(outputs, batch)
        if batch.targets:
            logits = outputs.logits.detach().cpu().double()
            found["loss"] = _threshold_losses(logits, batch.targets["target"].cpu()).sum(dim=1).numpy()
        return found

    # -- figures

    @property
    def beside(self) -> tuple[str, ...]:
        return ("accuracy", "mae_steps")

    @property
    def held(self) -> tuple[str, ...]:
        return ("mae_steps",)

    def ignorant(self, counts: Sequence[int]) -> float:
        below = np.cumsum(counts)[:-1].tolist()
        return sum(ignorance((count, sum(counts) - count)) for count in below)

    # -- predictions

    def recorded(self, predictions: Sequence[Any], examples: Sequence[Example]) -> Records:
        found = super().recorded(predictions, examples)
        shares, target = found["probabilities"], found["target"]
        below = shares.cumsum(axis=1)[:, :-1]
        above = shares[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        right = np.where(target[:, None] > np.arange(below.shape[1]), above, below)
        return {**found, "loss": -np.log(np.clip(right, np.finfo(np.float64).tiny, 1)).sum(axis=1)}

    # -- files and tables

    @classmethod
    def fits(cls, width: int | None, config: Any) -> bool:
        return False  # another library's adapter does not say that its classes have an order

    def describe(self) -> str:
        return f"labels {' < '.join(self.labels)}"

    def answers(self) -> str:
        return (
            f"It answers with one of {len(self.labels)} labels, from the least to the most: {', '.join(self.labels)}."
        )


def _threshold_losses(logits: Tensor, target: Tensor) -> Tensor:
    """[n, C - 1]: of each threshold, the cross entropy of whether a row is above it."""
    import torch

    shares = logits.log_softmax(dim=1)
    below = shares.logcumsumexp(dim=1)[:, :-1]
    above = shares.flip(1).logcumsumexp(dim=1).flip(1)[:, 1:]
    thresholds = torch.arange(below.shape[1], device=logits.device)
    return -torch.where(target[:, None] > thresholds, above, below).clamp(max=0)
