"""Multi-label classification: each text, or pair of texts, has any number of some labels."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.support.lazy import Lazy
from tanzaku.tasks.cells import missing, short
from tanzaku.tasks.labels import NUMBER, check_labels, label_name, odd_names, spelling
from tanzaku.tasks.losses import focal
from tanzaku.tasks.metrics import areas, unknown
from tanzaku.tasks.row_tasks import RowTasks
from tanzaku.tasks.settings import Finding, TextSettings
from tanzaku.tasks.task import LEARNED, LOSS, Batch, Column, Example, Metric, Records, Said, Statistics, ignorance
from tanzaku.tasks.text import TextTask, check_columns, columns_in

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tanzaku.tasks.data import Table
    from tanzaku.tasks.task import Array
else:
    np = Lazy("numpy")

TUNED = "tuned"
_HALF = 0.5
_SHARE = (0.0, 1.0)
_SEPARATORS = (",", ";", "|")
_NONE = "none"
_NUMBERS = (int, float)
_YES, _NO = {"1", "true", "yes"}, {"0", "false", "no"}


class MultilabelSettings(TextSettings):
    """Columns of a text, or two, and of the labels."""

    options: ClassVar[frozenset[str]] = frozenset({"separator", "thresholds"})

    label: str = Field(default="label", min_length=1, description="column of the label, or of the number")
    label_columns: list[str] = Field(
        default=[], description="a column of 0 and 1 for each label, in place of one with their names (repeatable)"
    )
    separator: str | None = Field(default=None, min_length=1, description="between labels that are one text (a comma)")
    thresholds: str = Field(
        default=f"{_HALF:g}",
        description="probability from which a label is given, or tuned: each label's own, by the validation rows",
    )

    @field_validator("thresholds", mode="before")
    @classmethod
    def _a_share(cls, value: Any) -> Any:
        text = str(value).strip()
        try:
            known = text == TUNED or 0 < float(text) < 1
        except ValueError:
            known = False
        if not known:
            raise TanzakuError(f"found {value!r}, expected a number between 0 and 1, or {TUNED}")
        return text

    def columns(self) -> list[tuple[str, str]]:
        return [(key, column) for key, column in super().columns() if key != "label" or not self.label_columns]


# -- metrics, of records with `probabilities` [n, L] in float64, `given` and `target` [n, L], 0 or 1


def _counted(records: Records) -> Array | None:
    """[n, 2L]: of each label whether it is right, and twice what F1 is the share of; None where not all is a number."""
    if not np.isfinite(records["probabilities"]).all():
        return None
    given, target = records["given"].astype(float), records["target"].astype(float)
    return np.concatenate([given * target, given + target], axis=1)


def _micro_f1(records: Records) -> Statistics:
    """Of all labels of all rows."""
    if (counts := _counted(records)) is None:
        return unknown(len(records["target"]))
    half = counts.shape[1] // 2
    sums = np.stack([2 * counts[:, :half].sum(axis=1), counts[:, half:].sum(axis=1)], axis=1)

    def figure(sums: Array) -> Array:
        with np.errstate(invalid="ignore"):  # of no label at all
            found: Array = sums[0] / sums[1]
        return found

    return Statistics(sums, figure)


def _macro_f1(records: Records) -> Statistics:
    """The mean over the labels that rows have or are given."""
    if (counts := _counted(records)) is None:
        return unknown(len(records["target"]))
    half = counts.shape[1] // 2

    def figure(sums: Array) -> Array:
        hits, sizes = sums[:half], sums[half:]
        with np.errstate(invalid="ignore"):
            found: Array = (2 * hits / np.maximum(sizes, 1)).sum(0) / (sizes > 0).sum(0)
        return found

    return Statistics(counts, figure)


def _exact(records: Records) -> Statistics:
    if not np.isfinite(records["probabilities"]).all():
        return unknown(len(records["target"]))
    right = (records["given"] == records["target"]).all(axis=1)
    return Statistics(np.stack([right, np.ones(len(right))], axis=1), lambda sums: sums[0] / sums[1])


def _roc_auc(records: Records) -> Statistics:
    """The mean over labels, without those that every row or no row has."""
    return areas(records["probabilities"], records["target"] > 0)


MICRO_F1 = Metric("micro_f1", "micro F1", "higher", _SHARE, _micro_f1, hub="f1")
MACRO_F1 = Metric("macro_f1", "macro F1", "higher", _SHARE, _macro_f1, hub="f1")
EXACT = Metric("exact_match", "exact match", "higher", _SHARE, _exact, proportion=True)
ROC_AUC = Metric("roc_auc", "ROC-AUC", "higher", _SHARE, _roc_auc)


@dataclass(frozen=True)
class Multilabel(TextTask):
    """Labels in the order of their ids, and from which probability each is given (none: 0.5).

    Args:
        separator: between labels in a cell of text. tuned: whether each adapter is to have thresholds of its own.
    """

    labels: tuple[str, ...]
    text: str = "text"
    text_pair: str | None = None
    thresholds: tuple[float, ...] = ()
    separator: str = ","
    tuned: bool = False
    row_tasks: RowTasks | None = None

    name = "multilabel"
    summary = "any of some labels for each text"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    metrics = (LOSS, MICRO_F1, MACRO_F1, EXACT, ROC_AUC)
    rank_by = "micro_f1"
    has_focal = True
    Data = MultilabelSettings
    of_adapters = frozenset({"thresholds"})
    answer_keys = ("predicted", "probabilities")

    # -- rows

    @classmethod
    def learn(cls, tables: Mapping[str, Table], data: Any) -> Multilabel:
        where = {} if data.label_columns else {"label": data.label}
        check_columns(tables, {"text": data.text, "text_pair": data.text_pair, **where}, ("text", "text_pair"))
        for table in tables.values():
            for name in data.label_columns:
                table.column(name, "label_columns")
        labels = tuple(data.label_columns) or _labels_of(cls._names(tables["train"], data), tables["train"].source)
        if len(labels) < 2:
            raise TanzakuError(f"--label-columns names {listed(labels)} alone, expected two columns or more")
        tuned = data.thresholds == TUNED
        thresholds = () if tuned or float(data.thresholds) == _HALF else (float(data.thresholds),) * len(labels)
        task = cls(labels, data.text, data.text_pair, thresholds, data.separator or ",", tuned)
        for table in tables.values():
            task.targets_in(table, data)
        return task

    @classmethod
    def findings(cls, tables: Mapping[str, Table], data: Any) -> Iterator[Finding]:
        table, names = tables["train"], cls._names(tables["train"], data)
        if not data.label_columns:
            where = f"column {data.label!r} of {table.source}"
            yield from odd_names(names, where)
            if all(len(each) < 2 for each in names):
                yield _few(names, table.column(data.label), where, data.separator or ",")
            if blank := sum(isinstance(cell, str) and not cell.strip() for cell in table.column(data.label)):
                yield Finding(f"{where} is blank in {blank} of {len(names)} rows, which are read as having no label")
        counts = Counter(name for each in names for name in each)
        for label in data.label_columns:
            if counts[label] in (0, len(names)):
                found = f"{'no' if not counts[label] else 'every'} training row has the label {label!r}"
                yield Finding(f"{found}, so nothing can be learned of it")

    @classmethod
    def targets(cls, table: Table, data: Any) -> list[str]:
        return [", ".join(sorted(names)) or _NONE for names in cls._names(table, data)]

    @classmethod
    def _names(cls, table: Table, data: Any) -> list[list[str]]:
        """The labels of each row, each once."""
        if data.label_columns:
            columns = [_marks(table, name) for name in data.label_columns]
            rows = zip(*columns, strict=True)
            return [[name for name, mark in zip(data.label_columns, row, strict=True) if mark] for row in rows]
        _check_vectors(table, data.label)
        column = enumerate(table.column(data.label), 1)
        return [_in_cell(value, f"{table.source} row {row}", data.separator or ",") for row, value in column]

    def targets_in(self, table: Table, data: Any) -> list[Any]:
        rows = enumerate(self._names(table, data), 1)
        return [self._ids(names, f"{table.source} row {row}") for row, names in rows]

    def target_of(self, value: Any, where: str) -> list[int]:
        """The ids of the labels in a cell."""
        return self._ids(_in_cell(value, where, self.separator), where)

    def _ids(self, names: Sequence[str], where: str) -> list[int]:
        for name in names:
            if name not in self.labels:
                same = next((each for each in self.labels if spelling(each) == spelling(name)), None)
                fix = nearest(name, self.labels) if same is None else f"; write it {same!r}, as in training"
                raise TanzakuError(f"label {name!r} in {where} is not among the training labels {self._said()}{fix}")
        return sorted(self.labels.index(name) for name in names)

    def _said(self) -> str:
        return " ".join(listed(self.labels).split())

    def target_tensor(self, targets: Sequence[Sequence[int]]) -> Tensor:
        import torch

        return torch.from_numpy(self._marked(targets)).float()

    def _marked(self, targets: Sequence[Sequence[int]]) -> Array:
        """[n, L], 1 where a row has the label."""
        marks = np.zeros((len(targets), len(self.labels)))
        for row, ids in enumerate(targets):
            marks[row, list(ids)] = 1
        return marks

    # -- the model

    def model_settings(self) -> dict[str, Any]:
        ids = dict(enumerate(self.labels))
        return {
            "num_labels": len(ids),
            "problem_type": "multi_label_classification",
            "id2label": ids,
            "label2id": {name: index for index, name in ids.items()},
        }

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean over labels, as transformers has it."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        losses = binary_cross_entropy_with_logits(outputs.logits.float(), batch.targets["target"], reduction="none")
        return focal(losses, batch).mean(dim=1)

    def records(self, outputs: Any, batch: Batch) -> Records:
        from torch.nn.functional import binary_cross_entropy_with_logits

        logits = outputs.logits.detach().cpu().double()
        found: Records = {"probabilities": logits.sigmoid().numpy()}
        if batch.targets:
            target = batch.targets["target"].cpu().double()
            loss = binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
            found |= {"target": target.numpy(), "loss": loss.numpy(), "weight": np.ones(len(target))}
        return self.decided(found)

    # -- what is chosen of each adapter

    @property
    def chooses(self) -> str | None:
        return f"thresholds: {TUNED}" if self.tuned else None

    def chosen(self, records: Records) -> Multilabel:
        """With each label's threshold where its F1 on these rows is best, of several the nearest to 0.5; 0.5 where no
        row has the label."""
        if not self.tuned:
            return self
        columns = zip(records["probabilities"].T, records["target"].T, strict=True)
        return replace(self, thresholds=tuple(_best(scores, target) for scores, target in columns))

    def decided(self, records: Records) -> Records:
        least = np.array(self.thresholds or [_HALF] * len(self.labels))
        return {**records, "given": records["probabilities"] >= least}

    # -- figures

    @property
    def beside(self) -> tuple[str, ...]:
        return ("micro_f1", "macro_f1", "exact_match")

    @property
    def held(self) -> tuple[str, ...]:
        return ("micro_f1", "macro_f1")

    def doubts(self, runs: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> list[str]:
        counts = self._marked([example.target for example in examples]).sum(axis=0)
        ignorant = float(np.mean([ignorance((count, len(examples) - count)) for count in counts.tolist()]))
        out = []
        if ignorant > 0 and min(run["loss"] for run in runs) > LEARNED * ignorant:
            out.append("did not learn: its loss stayed that of the labels' frequencies; try another learning rate")
        if not any(run["valid"].get("micro_f1") for run in runs):
            out.append("gives no right label: in no run has a validation row one; train longer, or tune the thresholds")
        return out

    @property
    def classes(self) -> tuple[str, ...]:
        return self.labels

    def by_class(self, records: Records) -> dict[str, dict[str, float]]:
        """nan where a figure has nothing to be a share of."""
        given, target = records["given"] > 0, records["target"] > 0
        least = self.thresholds or [_HALF] * len(self.labels)
        hits, sizes, rows = (given & target).sum(axis=0), given.sum(axis=0), target.sum(axis=0)
        return {
            label: {
                "precision": _share(hits[at], sizes[at]),
                "recall": _share(hits[at], rows[at]),
                "F1": _share(2 * hits[at], sizes[at] + rows[at]),
                "rows": int(rows[at]),
                "threshold": float(least[at]),
            }
            for at, label in enumerate(self.labels)
        }

    # -- predictions

    def predictions(self, records: Records) -> list[Any]:
        """Of each row, {"probabilities": of each label, to 9 digits, "predicted": ids, "loss": or null}."""
        losses = records["loss"].tolist() if "loss" in records else [None] * len(records["given"])
        rows = zip(records["probabilities"].tolist(), records["given"], losses, strict=True)
        return [
            {
                "probabilities": [float(f"{p:.9g}") for p in row],
                "predicted": given.nonzero()[0].tolist(),
                "loss": None if loss is None else float(f"{loss:.9g}"),
            }
            for row, given, loss in rows
        ]

    def recorded(self, predictions: Sequence[Any], examples: Sequence[Example]) -> Records:
        rows = [[math.nan if p is None else p for p in row["probabilities"]] for row in predictions]
        return {
            "probabilities": np.array(rows, dtype=float).reshape(len(rows), len(self.labels)),
            "given": self._marked([row["predicted"] for row in predictions]) > 0,
            "loss": np.array([math.nan if row["loss"] is None else row["loss"] for row in predictions]),
            "target": self._marked([example.target for example in examples]),
            "weight": np.ones(len(rows)),
        }

    def truth(self, example: Example) -> str:
        return ", ".join(self.labels[at] for at in example.target) or _NONE

    def said(self, prediction: Any, example: Example) -> Said:
        """As sure as it is of the label that it is least sure of."""
        given = prediction["predicted"]
        if None in prediction["probabilities"]:
            return Said("–")
        sure = min(p if at in given else 1 - p for at, p in enumerate(prediction["probabilities"]))
        text = ", ".join(self.labels[at] for at in given) or _NONE
        return Said(text, sure, given == sorted(example.target))

    def columns(self) -> list[Column]:
        return [Column("predicted", "text"), *(Column("p", "number", label) for label in self.labels)]

    def cells(self, prediction: Any) -> list[Any]:
        names = [self.labels[at] for at in prediction["predicted"]]
        plain = not any(self.separator in name for name in names)
        text = self.separator.join(names) if plain else json.dumps(names, ensure_ascii=False)
        return [text, *(round(p, 6) for p in prediction["probabilities"])]

    def answer(self, prediction: Any) -> dict[str, Any]:
        shares = {label: round(p, 6) for label, p in zip(self.labels, prediction["probabilities"], strict=True)}
        return {"predicted": [self.labels[at] for at in prediction["predicted"]], "probabilities": shares}

    # -- files and tables

    def to_json(self) -> dict[str, Any]:
        columns = {"text": self.text, "text_pair": self.text_pair}
        own = {"thresholds": list(self.thresholds) or None, "separator": self.separator}
        return {"labels": list(self.labels), **columns, **own, **self.tasks_to_json()}

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> Multilabel:
        check_labels(about.get("labels"), where)
        labels, thresholds, separator = tuple(about["labels"]), about.get("thresholds"), about.get("separator", ",")
        if thresholds is not None and not _are_thresholds(thresholds, len(labels)):
            found = f"{where}thresholds is {short(thresholds)}"
            raise TanzakuError(f"{found}, expected {len(labels)} numbers from 0 to 1, one for each label")
        if not isinstance(separator, str) or not separator:
            raise TanzakuError(f"{where}separator is {short(separator)}, expected what stands between labels")
        given = tuple(map(float, thresholds or ()))
        return cls(labels, *columns_in(about, where), given, separator, False, RowTasks.from_json(about, where))

    @classmethod
    def fits(cls, width: int | None, config: Any) -> bool:
        return width != 1 and config.problem_type == "multi_label_classification"

    @classmethod
    def of_base(cls, config: Any, width: int | None, asked: Mapping[str, Any], path: str, base: str) -> Multilabel:
        own = [str(label) for _, label in sorted((config.id2label or {}).items())]
        if len(own) != (width or len(own)):
            raise TanzakuError(f"{path} tells {width} labels, and its base {base!r} names {len(own)}")
        return cls(tuple(own), asked.get("text", "text"), asked.get("text_pair"))

    def describe(self) -> str:
        return f"any of the labels {', '.join(self.labels)}"

    def answers(self) -> str:
        caution = f": {found}" if (found := self.caution()) else ""
        return f"It answers with any of {len(self.labels)} labels: {', '.join(self.labels)}{caution}."

    def caution(self) -> str | None:
        if not self.thresholds:
            return None
        pairs = [f"{label} {least:.4g}" for label, least in zip(self.labels, self.thresholds, strict=True)]
        return f"labels are given from these probabilities on: {', '.join(pairs)}"

    def left_in_config(self) -> dict[str, Any]:
        return {"label_thresholds": dict(zip(self.labels, self.thresholds, strict=True))} if self.thresholds else {}

    @classmethod
    def table_of(cls, tables: Mapping[str, Table], data: Any) -> tuple[list[str], list[list[str]]]:
        splits = [cls._names(table, data) for table in tables.values()]
        names = data.label_columns or _labels_of(cls._names(tables["train"], data), tables["train"].source)
        counts = [Counter(name for row in rows for name in row) for rows in splits]
        lines = [[name, *(f"{each[name]:,}" for each in counts)] for name in names]
        return ["label"], [*lines, ["no label", *(f"{sum(not row for row in rows):,}" for rows in splits)]]


# -- cells


def _in_cell(value: Any, where: str, separator: str) -> list[str]:
    """The names in a cell, each once: a list, also as JSON writes it, or text with separators; blank text has none."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                value = json.loads(text)
            except ValueError:
                raise TanzakuError(
                    f"the labels in {where} are {short(text)}, expected a list as JSON writes it"
                ) from None
        else:
            value = [part for part in text.split(separator) if part.strip()]
    if not isinstance(value, list | tuple):
        if missing(value):
            raise TanzakuError(f"{where} has no labels; write [] where there are none")
        value = [value]
    return list(dict.fromkeys(label_name(each, where) for each in value))


def _marks(table: Table, column: str) -> list[bool]:
    """Whether each row has the label that a column of 0 and 1 is of."""
    out = []
    for row, value in enumerate(table.column(column, "label_columns"), 1):
        text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().casefold()
        if missing(value) or text not in _YES | _NO:
            found = "nothing" if missing(value) else short(value)
            raise TanzakuError(f"{table.source} row {row}: column {column!r} holds {found}, expected 0 or 1")
        out.append(text in _YES)
    return out


def _check_vectors(table: Table, column: str) -> None:
    """A TanzakuError where rows hold a 0 or 1 for each label, and not the labels."""
    values = table.column(column)
    lists = [value for value in values if isinstance(value, list)]
    bits = [value for value in lists if all(type(each) in _NUMBERS and each in (0, 1) for each in value)]
    of_one_length = len(bits) == len(values) and len({len(value) for value in bits}) == 1
    if of_one_length and any(len({*value}) < len(value) for value in bits):
        raise TanzakuError(
            f"column {column!r} of {table.source} has {len(bits[0])} zeros and ones in each row; expected the names of "
            "a row's labels, or a column for each label, as in --label-columns"
        )


def _labels_of(rows: Sequence[Sequence[str]], source: str) -> tuple[str, ...]:
    """The labels of the training rows: by value when all are numbers, else by text."""
    names = {name for row in rows for name in row}
    if len(names) < 2:
        found = f"only the label {next(iter(names))!r}" if names else "no labels"
        raise TanzakuError(f"{source} has {found}; expected at least two labels to give")
    numbers = all(NUMBER.fullmatch(name) for name in names)
    return tuple(sorted(names, key=lambda name: (float(name) if numbers else 0.0, name)))


def _few(names: Sequence[Sequence[str]], cells: Sequence[Any], where: str, separator: str) -> Finding:
    """What is said where no row has two labels: another separator, or a task of one label a row."""
    for other in _SEPARATORS:
        if other != separator and (found := [name for row in names for name in row if other in name]):
            return Finding(
                f"{where} has no {separator!r} between labels, and {other!r} in {len(found)} of them, such as "
                f"{found[0]!r}: say with --separator what stands between labels",
                "labels-separator",
            )
    return Finding(f"no row of {where} has two labels: task classification gives each text one")


# -- thresholds


def _best(scores: Array, target: Array) -> float:
    """The threshold between two scores, or below all, at which F1 is best."""
    if not target.sum() or not np.isfinite(scores).all():
        return _HALF
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], target[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + target.sum())
    below = np.append(ranked[1:], 0.0)
    ends = np.append(ranked[1:] < ranked[:-1], True)  # where rows of one score end: they come together
    middles = np.where((middle := (ranked + below) / 2) > below, middle, ranked)
    good = ends & (f1 >= f1[ends].max() - 1e-12)
    found = middles[good]
    spans = good & (ranked >= _HALF) & (below < _HALF)
    return _HALF if spans.any() else float(found[np.abs(found - _HALF).argmin()])


def _are_thresholds(found: Any, number: int) -> bool:
    return (
        isinstance(found, list)
        and len(found) == number
        and all(isinstance(each, int | float) and 0 <= each <= 1 for each in found)
    )


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else math.nan
