"""Classification: each text, or pair of texts, is of one of some classes."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.support.lazy import Lazy
from tanzaku.tasks.labels import NUMBER, check_labels, label_name, odd_labels, spelling
from tanzaku.tasks.losses import focal
from tanzaku.tasks.metrics import ACCURACY, MACRO_F1, ROC_AUC
from tanzaku.tasks.row_tasks import RowTasks
from tanzaku.tasks.settings import Override, TextSettings
from tanzaku.tasks.task import LEARNED, LOSS, Batch, Column, Example, Metric, Records, Said, ignorance
from tanzaku.tasks.text import TextTask, check_columns, columns_in

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tanzaku.tasks.data import Table
    from tanzaku.tasks.settings import Finding
    from tanzaku.tasks.task import Array
else:
    np = Lazy("numpy")

_SHOWN = 20  # labels in a table; as many again would hide the rest of the data card
_LONG = 40  # characters of a label


class ClassificationSettings(TextSettings):
    """Columns of a text, or two, and of the label."""

    label: str = Field(default="label", min_length=1, description="column of the label, or of the number")


@dataclass(frozen=True)
class Classification(TextTask):
    """Classes in the order of their ids."""

    labels: tuple[str, ...]
    text: str = "text"
    text_pair: str | None = None
    row_tasks: RowTasks | None = None

    name = "classification"
    summary = "one of some labels for each text"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    metrics: ClassVar[tuple[Metric, ...]] = (LOSS, ROC_AUC, ACCURACY, MACRO_F1)
    rank_by = "roc_auc"
    has_focal = True
    Data = ClassificationSettings
    overrides: ClassVar[Mapping[str, Override]] = {
        **TextTask.overrides,
        "labels": Override("A,B,...", "names of the labels, where the adapter does not say them"),
    }
    answer_keys = ("predicted", "probabilities")

    # -- rows

    @classmethod
    def learn(cls, tables: Mapping[str, Table], data: Any) -> Classification:
        check_columns(
            tables, {"text": data.text, "text_pair": data.text_pair, "label": data.label}, ("text", "text_pair")
        )
        task = cls(cls.labels_in(tables["train"], data), data.text, data.text_pair)
        for table in tables.values():
            for row, value in enumerate(table.column(data.label), 1):
                task.target_of(value, f"{table.source} row {row}")
        return task

    @classmethod
    def labels_in(cls, table: Table, data: Any) -> tuple[str, ...]:
        """The labels of the training rows, in the order of their ids."""
        return labels_of(table.column(data.label), table.source)

    @classmethod
    def findings(cls, tables: Mapping[str, Table], data: Any) -> Iterator[Finding]:
        yield from odd_labels(cls.targets(tables["train"], data), tables["train"], data)

    @classmethod
    def targets(cls, table: Table, data: Any) -> list[str]:
        column = enumerate(table.column(data.label), 1)
        return [label_name(value, f"{table.source} row {row}") for row, value in column]

    def target_of(self, value: Any, where: str) -> int:
        """The id of a label."""
        name = label_name(value, where)
        if name not in self.labels:
            same = next((each for each in self.labels if spelling(each) == spelling(name)), None)
            fix = nearest(name, self.labels) if same is None else f"; write it {same!r}, as in training"
            known = " ".join(listed(self.labels).split())
            raise TanzakuError(f"label {name!r} in {where} is not among the training labels {known}{fix}")
        return self.labels.index(name)

    def target_tensor(self, targets: Sequence[int]) -> Tensor:
        import torch

        return torch.tensor(targets, dtype=torch.int64)

    def stratum(self, example: Example) -> str | None:
        return f"label {self.labels[example.target]!r}"

    def class_weights(self, examples: Sequence[Example]) -> list[float]:
        """Inverse class frequency n / (k * count); a class without rows is a TanzakuError."""
        counts = Counter(example.target for example in examples)
        if empty := [name for label, name in enumerate(self.labels) if not counts[label]]:
            raise TanzakuError(f"class {listed(empty)} has no rows to weigh; add some or turn weights off")
        return [len(examples) / (len(self.labels) * counts[example.target]) for example in examples]

    # -- the model

    def model_settings(self) -> dict[str, Any]:
        ids = dict(enumerate(self.labels))
        return {
            "num_labels": len(ids),
            "problem_type": "single_label_classification",
            "id2label": ids,
            "label2id": {name: index for index, name in ids.items()},
        }

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        from torch.nn.functional import cross_entropy

        return focal(cross_entropy(outputs.logits.float(), batch.targets["target"], reduction="none"), batch)

    def records(self, outputs: Any, batch: Batch) -> Records:
        logits = outputs.logits.detach().cpu().double()
        found: Records = {"logits": logits.numpy(), "probabilities": logits.softmax(-1).numpy()}
        if batch.targets:
            target = batch.targets["target"].cpu()
            loss = -logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
            found |= {"target": target.numpy(), "loss": loss.numpy(), "weight": np.ones(len(target))}
        return found

    # -- figures

    @property
    def beside(self) -> tuple[str, ...]:
        return ("accuracy", "macro_f1") if len(self.labels) > 2 else ("accuracy",)

    def doubts(self, runs: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> list[str]:
        counts = np.bincount([example.target for example in examples], minlength=len(self.labels))
        shares, ignorant = counts / counts.sum(), self.ignorant(counts.tolist())
        out = []
        if ignorant > 0 and min(run["loss"] for run in runs) > LEARNED * ignorant:
            out.append("did not learn: its loss stayed that of the labels' frequencies; try another learning rate")
        right = statistics.fmean(
            1.0 if (value := run["valid"].get("accuracy")) is None else float(value) for run in runs
        )
        if right < float(shares.max()):
            out.append(
                f"below the majority label: {right:.1%} are right, and to say the most frequent "
                f"label of the training rows always is right for {shares.max():.1%} of those"
            )
        return out

    def ignorant(self, counts: Sequence[int]) -> float:
        """The loss of one who knows how many rows of each label there are, and nothing of a row."""
        return ignorance(counts)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.labels

    def confusion(self, records: Records) -> list[list[int]]:
        """A row without numbers predicts nothing and is not counted."""
        known = np.isfinite(records["probabilities"]).all(axis=1)
        counts = np.zeros((len(self.labels), len(self.labels)), dtype=int)
        np.add.at(counts, (records["target"][known], records["probabilities"][known].argmax(axis=1)), 1)
        found: list[list[int]] = counts.tolist()
        return found

    # -- predictions

    def predictions(self, records: Records) -> list[list[float]]:
        """Probabilities of each label, to 9 digits: ties among nearly certain rows would be ties in ROC-AUC."""
        return [[float(f"{p:.9g}") for p in row] for row in records["probabilities"].tolist()]

    def recorded(self, predictions: Sequence[Any], examples: Sequence[Example]) -> Records:
        rows = [[math.nan if p is None else p for p in row] for row in predictions]
        probabilities: Array = np.array(rows, dtype=float).reshape(len(rows), len(self.labels))
        target = np.array([example.target for example in examples])
        own = np.maximum(probabilities[np.arange(len(target)), target], np.finfo(np.float64).tiny)
        return {"probabilities": probabilities, "target": target, "loss": -np.log(own), "weight": np.ones(len(target))}

    def truth(self, example: Example) -> str:
        return str(self.labels[example.target])

    def said(self, prediction: Any, example: Example) -> Said:
        known = [(chance, -at) for at, chance in enumerate(prediction or ()) if chance is not None]
        if not known:
            return Said("–")
        chance, at = max(known)
        return Said(self.labels[-at], chance, -at == example.target)

    def columns(self) -> list[Column]:
        return [Column("predicted", "text"), *(Column("p", "number", label) for label in self.labels)]

    def cells(self, prediction: Any) -> list[Any]:
        return [self._likeliest(prediction), *(round(p, 6) for p in prediction)]

    def answer(self, prediction: Any) -> dict[str, Any]:
        shares = {label: round(p, 6) for label, p in zip(self.labels, prediction, strict=True)}
        return {"predicted": self._likeliest(prediction), "probabilities": shares}

    def _likeliest(self, prediction: Sequence[float]) -> str:
        return self.labels[prediction.index(max(prediction))]

    # -- files and tables

    def to_json(self) -> dict[str, Any]:
        columns = {"text": self.text, "text_pair": self.text_pair}
        return {"labels": list(self.labels), **columns, **self.tasks_to_json()}

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> Classification:
        check_labels(about.get("labels"), where)
        return cls(tuple(about["labels"]), *columns_in(about, where), RowTasks.from_json(about, where))

    @classmethod
    def fits(cls, width: int | None, config: Any) -> bool:
        return width != 1 and config.problem_type != "multi_label_classification"

    @classmethod
    def overruled(cls, asked: Mapping[str, Any], about: Mapping[str, Any], path: Any) -> dict[str, Any]:
        found = super().overruled(asked, about, path)
        if "labels" in found:
            found["labels"], own = names_in(found["labels"]), about.get("labels")
            if isinstance(own, list) and len(found["labels"]) != len(own):
                raise TanzakuError(
                    f"--labels names {len(found['labels'])} labels, and {path} has {len(own)}: {listed(map(str, own))}"
                )
        return found

    @classmethod
    def of_base(cls, config: Any, width: int | None, asked: Mapping[str, Any], path: str, base: str) -> Classification:
        own = [str(label) for _, label in sorted((config.id2label or {}).items())]
        given = names_in(asked["labels"]) if "labels" in asked else None
        names, width = given or own, width or len(given or own)
        if len(names) != width:
            found = f"--labels names {len(names)}" if given else f"its base {base!r} names {len(own)}"
            raise TanzakuError(f"{path} tells {width} labels apart, and {found}; give --labels with {width} names")
        return cls(tuple(names), asked.get("text", "text"), asked.get("text_pair"))

    def describe(self) -> str:
        return f"labels {', '.join(self.labels)}"

    def answers(self) -> str:
        return f"It answers with one of {len(self.labels)} labels: {', '.join(self.labels)}."

    @classmethod
    def table_of(cls, tables: Mapping[str, Table], data: Any) -> tuple[list[str], list[list[str]]]:
        counts = {split: Counter(cls.targets(table, data)) for split, table in tables.items()}
        names = cls.labels_in(tables["train"], data)
        lines = [[_short(name), *(f"{each[name]:,}" for each in counts.values())] for name in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append([f"and {len(names) - _SHOWN} more labels", *("" for _ in counts)])
        return ["label"], lines


def names_in(text: str) -> list[str]:
    """The labels in `--labels mild,harsh`; a TanzakuError unless they are two or more, each once."""
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or "" in names or len({*names}) < len(names):
        raise TanzakuError(f"--labels is {text!r}, expected two names or more, as in --labels mild,harsh, each once")
    return names


def _short(label: str) -> str:
    return label if len(label) <= _LONG else f"{label[:_LONG]}..."


def labels_of(values: Iterable[Any], source: str = "the training data") -> tuple[str, ...]:
    """The distinct labels of the training rows: by value when all are numbers, else by text.

    The numbers 1 and 1.0 and the text "1" are one label. A TanzakuError names ``source`` and the row
    without a label, or the only class.
    """
    names = {label_name(value, f"{source} row {row}") for row, value in enumerate(values, 1)}
    if len(names) < 2:
        found = f"only the label {next(iter(names))!r}" if names else "no labels"
        raise TanzakuError(f"{source} has {found}; expected at least two classes to tell apart")
    numbers = all(NUMBER.fullmatch(name) for name in names)
    return tuple(sorted(names, key=lambda name: (float(name) if numbers else 0.0, name)))
