"""What a task is: the whole contract. A task turns rows into a model's inputs, its outputs into losses, and rows into
figures. It knows nothing of jobs, adapters, processes or what makes a step cheap, and nothing else knows what a task
knows: training, comparison, prediction, files and report use what stands here.

A row keeps three forms. A table's cells become an :class:`Example`; the model's outputs for it become records, of which
metrics are computed; and its prediction is what a record keeps in a file, from which the record can be made again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.support.lazy import Lazy
from tanzaku.tasks.cells import plain
from tanzaku.tasks.row_tasks import CONTEXT, RowTasks
from tanzaku.tasks.settings import DataSettings, Override

if TYPE_CHECKING:
    import numpy as np

    # Not where it is run: a recipe is read with tasks, and is not to wait for torch.
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tanzaku.tasks.data import Table
    from tanzaku.tasks.decoding import Written
    from tanzaku.tasks.sampling import Decoding
    from tanzaku.tasks.settings import Finding

    Array = np.ndarray[Any, np.dtype[Any]]
else:
    np = Lazy("numpy")

LEARNED = 0.95  # of the loss of one who knows nothing of a row: a run that stays above it did not learn
_CELLS = 2**20  # sums held at once: 8 MiB in float64
DECODED = "labels"  # among the inputs of a row, what an encoder-decoder is to write: its decoder reads it shifted
Records = dict[str, Any]  # by name, an entry for each row: an array, or a list where entries differ in length


@dataclass(frozen=True)
class Example:
    """One row, encoded and not padded.

    Args:
        inputs: by `forward`'s names, a number for each token.
        others: the same of further rows of a pass, where one row of a table is several (answers to choose from).
        shared: tokens that all of these begin with, as far as the task knows.
        target: what it should come to; None: it is to be predicted.
        weight: what its loss is the sum over: 1, or its tokens that have a target.
        factor: what its loss counts among those of other rows; 1 on average over the rows of a job.
        focal: by which power its loss counts less the surer the model is of it (`losses.focal`).
        about: what else the task must know of the row to read its outputs.
        context: a number by name that adapters may read of the row.
    """

    inputs: Mapping[str, Sequence[int]]
    target: Any = None
    weight: float = 1.0
    factor: float = 1.0
    focal: float = 0.0
    about: Any = None
    context: Mapping[str, int] = field(default_factory=dict)
    others: Sequence[Mapping[str, Sequence[int]]] = ()
    shared: int = 0

    @property
    def rows(self) -> list[Mapping[str, Sequence[int]]]:
        """The inputs of each row that it takes in a pass."""
        return [self.inputs, *self.others]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of these, special ones included."""
        return [len(next(iter(row.values()))) for row in self.rows]

    @property
    def length(self) -> int:
        """Tokens of the longest of them."""
        return max(self.lengths)

    @property
    def decoder_length(self) -> int:
        """The most tokens that an encoder-decoder's decoder reads of a row; 0: none of its own."""
        return max(len(row.get(DECODED, ())) for row in self.rows)


@dataclass(frozen=True)
class Split:
    """Encoded rows in file order, the text that stands for each in a report, how many rows were cut, and the second
    texts of pairs.

    Args:
        long: numbers, from 0, of the rows that were cut, where the task may leave them out; `allowed` says in words how
            long rows may be. kept: numbers in the file of the rows that are left; None: all are. dropped: how many are
            not.
    """

    name: str
    examples: list[Example]
    texts: list[str]
    truncated: int
    source: str
    seconds: list[str] | None = None
    long: Sequence[int] = ()
    allowed: str = ""
    kept: Sequence[int] | None = None
    dropped: int = 0

    def number(self, row: int) -> int:
        """Of a row in its file, counted from 1."""
        return 1 + (row if self.kept is None else self.kept[row])

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def shown(self) -> list[Any]:
        """What stands for each row in a report: a text, or a list of two."""
        pairs = self.seconds is not None
        return [[*pair] for pair in zip(self.texts, self.seconds or (), strict=True)] if pairs else self.texts

    def keys(self) -> list[tuple[str, ...]]:
        """By row, what makes two rows one: their texts but for case, width and white space."""
        columns = [self.texts] if self.seconds is None else [self.texts, self.seconds]
        return [tuple(map(plain, row)) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Probe:
    """A text that nothing is trained on, as rows.

    Args:
        name: of its file, or `bundled`. rows: windows of it, one after another. sha256: of the text.
        base: the perplexity that the base has without an adapter.
    """

    name: str
    rows: Split
    sha256: str
    base: float = float("nan")

    @property
    def tokens(self) -> int:
        """How many are foretold."""
        return round(sum(example.weight for example in self.rows.examples))

    def to_json(self) -> dict[str, Any]:
        return {"text": self.name, "tokens": self.tokens, "base": self.base}


@dataclass(frozen=True)
class Batch:
    """Rows for one pass, padded on the right.

    Args:
        inputs: by `forward`'s names, [B, T]. targets: as the task's own `score` reads them.
        examples: whose rows they are, of each example all, one after another.
        context: what adapters may read of each row, [B, ...]; see `core/context.py`.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    examples: Sequence[Example]
    context: dict[str, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Own tokens of each row."""
        return [length for example in self.examples for length in example.lengths]

    @property
    def width(self) -> int:
        """T."""
        return int(next(iter(self.inputs.values())).shape[1])

    @property
    def decoder_lengths(self) -> list[int]:
        """Tokens of each row that an encoder-decoder's decoder reads; 0: none of its own."""
        return [len(row.get(DECODED, ())) for example in self.examples for row in example.rows]

    @property
    def decoder_width(self) -> int:
        """Of what it reads, [B, decoder_width]; 0: nothing."""
        return int(self.inputs[DECODED].shape[1]) if DECODED in self.inputs else 0

    def to(self, device: Any, without: frozenset[str] = frozenset()) -> Batch:
        """On a device, without some of the inputs."""
        inputs = {key: value.to(device) for key, value in self.inputs.items() if key not in without}
        targets = {key: value.to(device) for key, value in self.targets.items()}
        context = {key: value.to(device) for key, value in self.context.items()}
        return Batch(inputs, targets, self.examples, context)

    @classmethod
    def of(cls, inputs: dict[str, Tensor], targets: dict[str, Tensor], examples: Sequence[Example]) -> Batch:
        """A batch of rows, with what these say of themselves."""
        import torch

        told = [example.context for example in examples for _ in example.rows]
        return cls(inputs, targets, examples, {name: torch.tensor([row[name] for row in told]) for name in told[0]})


@dataclass(frozen=True)
class Statistics:
    """A metric of some rows, as sums over them: a bootstrap of thousands of draws then needs no pass over the rows.

    Args:
        rows: [n, k], sufficient statistics of each row; dense, or sparse in rows. figure: [k, B], sums of these over B
            draws of the rows, to the B figures.
    """

    rows: Any
    figure: Callable[[Array], Array]

    @property
    def known(self) -> bool:
        """Whether every row's statistics are numbers."""
        return bool(np.isfinite(getattr(self.rows, "data", self.rows)).all())

    def drawn(self, counts: Array) -> Array:
        """[B]: the figures of B draws, where row i was drawn counts[i, b] times."""
        size = max(1, _CELLS // self.rows.shape[1])
        draws = (counts[:, at : at + size] for at in range(0, counts.shape[1], size))
        return np.concatenate([self.figure(self.rows.T @ some) for some in draws])

    def by_row(self) -> list[float]:
        """The figure of each row alone."""
        alone: list[float] = self.figure(np.asarray(self.rows, dtype=float).T).tolist()
        return alone

    def value(self) -> float:
        """The figure of each row once."""
        return float(self.drawn(np.ones((self.rows.shape[0], 1)))[0])


@dataclass(frozen=True)
class Metric:
    """One figure of predictions.

    Args:
        name: in recipes and files. title: in tables. bounds: what it can be at most, for intervals and margins.
        statistics: of records, for :class:`Statistics`.
        proportion: whether it is a share of rows, written in percent, with an interval of its own (Wilson).
        by_stratum: whether it is a mean over strata, in which a row of the rarest counts most.
        by_row: whether the figure of one row alone says how good that row is.
        hub: what the Hugging Face Hub calls it, if otherwise.
    """

    name: str
    title: str
    better: Literal["higher", "lower"]
    bounds: tuple[float, float]
    statistics: Callable[[Records], Statistics]
    proportion: bool = False
    by_stratum: bool = False
    by_row: bool = False
    hub: str | None = None

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.better == "higher" else -1

    @property
    def bounded(self) -> bool:
        """Whether a difference of it means the same whatever the figures are."""
        return bool(np.isfinite(self.bounds).all())

    @property
    def on_validation(self) -> str:
        """How a sentence calls it where rows are validation rows."""
        return "validation loss" if self is LOSS else self.title


@dataclass(frozen=True)
class OwnMetric(Metric):
    """A metric by a function of the user's.

    Args:
        file: that the function stands in, without its folder. sha256: of what it says.
    """

    file: str = ""
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """What can be known of it without the function."""
        bounds = [end if np.isfinite(end) else None for end in self.bounds]
        return {"name": self.name, "better": self.better, "bounds": bounds, "file": self.file, "sha256": self.sha256}

    def try_out(self, reference: str) -> None:
        """Call the function for a text that is as it should be, and for one that is empty.

        Raises:
            TanzakuError: what it does wrong.
        """
        for text in (reference, ""):
            self.statistics({"text": [text], "reference": [reference]})


def _loss(records: Records) -> Statistics:
    return Statistics(np.stack([records["loss"], records["weight"]], axis=1), lambda sums: sums[0] / sums[1])


LOSS = Metric("loss", "loss", "lower", (0.0, float("inf")), _loss, by_row=True)


@dataclass(frozen=True)
class Column:
    """One column that prediction adds: `stem`, or `stem_part`; an adapter's name stands between the two."""

    stem: str
    kind: Literal["text", "number"]
    part: str = ""


@dataclass(frozen=True)
class Said:
    """A prediction as a report shows it: in words, with how sure it is (None: not known) and whether it is right (None:
    there is no right or wrong)."""

    text: str
    confidence: float | None = None
    right: bool | None = None


class Task(ABC):
    """One task, as the training rows define it. Settings that prediction needs are its fields, kept in tanzaku.json."""

    name: ClassVar[str]  # in recipes
    summary: ClassVar[str]
    auto_class: ClassVar[str]  # transformers' class that loads the model
    peft_type: ClassVar[str]  # HF PEFT's name of the task
    metrics: ClassVar[tuple[Metric, ...]]  # the loss first
    rank_by: ClassVar[str]  # what candidates are ranked by where nothing is said
    Data: ClassVar[type[DataSettings]]  # the recipe's `data` section, with the task's columns

    overrides: ClassVar[Mapping[str, Override]] = {}  # what prediction may be told, by flag
    takes_functions: ClassVar[bool] = False  # whether functions of the user's own may be metrics, of text and reference
    has_focal: ClassVar[bool] = False  # whether `score` is of cross entropies, and looks at a row's `focal`
    reading: ClassVar[tuple[str, ...]] = ()  # of these, the names of columns
    of_adapters: ClassVar[frozenset[str]] = frozenset()  # keys of `to_json` in which adapters of one pass may differ
    answer_keys: ClassVar[tuple[str, ...]]  # of `answer`

    tokenizer: Any = None  # where `told_by` keeps it, for text that is written
    row_tasks: RowTasks | None = None  # which of several tasks a row is of; a field where the task has a place for it

    # -- rows

    @classmethod
    @abstractmethod
    def learn(cls, tables: Mapping[str, Table], data: Any) -> Self:
        """From the tables by split name, and the recipe's `data` section.

        Raises:
            TanzakuError: a column, cell or target that is missing or broken, and in which row.
        """

    @classmethod
    @abstractmethod
    def findings(cls, tables: Mapping[str, Table], data: Any) -> Iterator[Finding]:
        """What is odd about the targets."""

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Columns that a prediction is made from."""

    @property
    def required(self) -> tuple[str, ...]:
        """Those of them without which there is nothing to predict from."""
        return self.reads

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that rows must have to be predicted."""
        return self.reads if self.row_tasks is None else (*self.reads, self.row_tasks.column)

    def told(self, examples: list[Example], table: Table) -> list[Example]:
        """The rows with what adapters may read of them."""
        if self.row_tasks is None:
            return examples
        ids = zip(examples, self.row_tasks.ids(table), strict=True)
        return [replace(example, context={CONTEXT: number}) for example, number in ids]

    @classmethod
    @abstractmethod
    def targets(cls, table: Table, data: Any) -> list[str]:
        """Each row's target in words: rows of one text and different targets are told of."""

    @abstractmethod
    def encode(
        self, table: Table, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, targets: Any = None
    ) -> Split:
        """Rows as tokens, `max_length` at most.

        Args:
            targets: the recipe's `data` section, which names the columns of the targets; None: there are none.

        Raises:
            TanzakuError: a row (counted from 1) without text or tokens, or no room for any.
        """

    def learnt(self, example: Example) -> list[bool] | None:
        """Of each token of a row, whether it is learnt; None where no tokens are."""
        return None

    def remarks(self, split: Split) -> list[str]:
        """What is to be known of rows that figures are of, a line each."""
        return []

    @abstractmethod
    def check_cell(self, value: Any, where: str) -> None:
        """A TanzakuError where a cell of a column that is read is neither blank nor what `encode` takes."""

    @abstractmethod
    def blank(self, value: Any) -> bool:
        """Whether a cell has nothing to predict from."""

    @abstractmethod
    def have_tokens(self, values: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        """Whether anything of each cell, none of them blank, is left as tokens."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad_token_id: int, width: int = 0, decoder_width: int = 0) -> Batch:
        """Rows padded to the longest, or to `width` tokens if that is more; where an encoder-decoder reads two texts,
        the second to `decoder_width`."""

    def stratum(self, example: Example) -> str | None:
        """What folds keep the shares of, in words; None where rows have nothing of the kind."""
        return None

    def class_weights(self, examples: Sequence[Example]) -> list[float]:
        """What each row's loss counts, so that all classes count alike."""
        raise TanzakuError(f"class_weights weighs classes, and {self.name} has none; leave it out")

    # -- the model

    @abstractmethod
    def model_settings(self) -> dict[str, Any]:
        """What the model's config is to say of the task."""

    def check_model(self, config: Any) -> None:
        """A TanzakuError where a model is made for other targets."""
        expected = self.model_settings()["num_labels"]
        if config.num_labels != expected:
            raise TanzakuError(
                f"the model has {config.num_labels} labels and the data {expected}: load it with num_labels={expected}"
            )

    def prepare(self, model: Any) -> None:
        """Look at a model before its first pass, since passes may be accelerated; a TanzakuError where it is none that
        can be run."""
        return

    def run(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The model's outputs for a batch, as `score` and `records` read them."""
        return model(**inputs)

    @abstractmethod
    def score(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of each example, a sum over its `weight`: (examples,), differentiable, in fp32 at least."""

    @abstractmethod
    def records(self, outputs: Any, batch: Batch) -> Records:
        """All that metrics and predictions need of each example, on the CPU, without gradients; `loss` and `weight`
        where they have targets."""

    # -- what is chosen of each adapter

    @property
    def chooses(self) -> str | None:
        """The setting by which something is chosen on validation rows that nothing is trained on; None: nothing is."""
        return None

    def chosen(self, records: Records) -> Self:
        """The task of an adapter, with what is chosen by its records of the validation rows, such as thresholds."""
        return self

    def decided(self, records: Records) -> Records:
        """An adapter's records of other rows, with what they come to by what was chosen."""
        return records

    # -- the bare base

    @property
    def zero_shot(self) -> bool:
        """Whether a base does it without an adapter, by what it was pretrained for: a comparison measures that, too."""
        return False

    # -- text that the model writes, where that is what it predicts

    @property
    def decoding(self) -> Decoding | None:
        """How text is written; None: nothing is."""
        return None

    @property
    def writes(self) -> bool:
        """Whether figures are of text that is written, too."""
        return False

    @property
    def sample(self) -> int:
        """Validation rows that are written for after each epoch, where figures are of text."""
        return 0

    def told_by(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The task with what it keeps of a tokenizer."""
        return self

    @property
    def converses(self) -> bool:
        """Whether it writes answers in conversations, for the tokenizer's chat template."""
        return False

    def typed(self, converses: bool) -> Self:
        """The task for what a person types: of rows with one column, of messages if it converses, else of prompts."""
        raise NotImplementedError(f"{self.name} writes nothing")

    def probe(self, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Split | None:
        """A text that nothing is trained on as rows, whose loss says how likely the model holds it: windows of it, one
        after another, of `max_length` tokens at most. None where the model foretells no text."""
        return None

    def prompt(self, example: Example) -> Sequence[int]:
        """The tokens of a row that the model writes on from."""
        raise NotImplementedError(f"{self.name} writes nothing")

    def begins(self, model: Any) -> Sequence[int]:
        """The tokens that an encoder-decoder's decoder begins with; none: those that the model says."""
        return ()

    def put(self, records: Records, written: Sequence[Written]) -> Records:
        """The records of rows with what was written for each."""
        raise NotImplementedError(f"{self.name} writes nothing")

    # -- figures

    def figures(self, records: Records) -> dict[str, float]:
        """Every metric by name; nan where it is no number."""
        return {metric.name: metric.statistics(records).value() for metric in self.metrics}

    def measured_by(self, own: Sequence[OwnMetric]) -> Self:
        """The task with metrics that are functions of the user's own as well.

        Raises:
            TanzakuError: it writes no text that they could compare.
        """
        if own:
            raise TanzakuError(f"{own[0].name} compares texts, and {self.name} writes none; leave it out")
        return self

    @property
    def beside(self) -> tuple[str, ...]:
        """Metrics whose test figures stand beside that which ranks."""
        return ()

    @property
    def held(self) -> tuple[str, ...]:
        """Metrics in which a cheaper candidate must not be expected to lose more than the margin either."""
        return self.beside

    def doubts(self, runs: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> list[str]:
        """What a reader should know of a candidate before its figures are believed.

        Args:
            runs: of its finished ones, `valid` figures and the least `loss` of training and validation.
            examples: the training rows.
        """
        return []

    @property
    def classes(self) -> tuple[str, ...]:
        """What a table of counts has rows and columns for; none where nothing is counted."""
        return ()

    def confusion(self, records: Records) -> list[list[int]] | None:
        """Counts [true][predicted] of `classes`."""
        return None

    def by_class(self, records: Records) -> dict[str, dict[str, float]]:
        """Figures of each class alone, by its name, where a table of counts would not show them."""
        return {}

    # -- predictions

    @abstractmethod
    def predictions(self, records: Records) -> list[Any]:
        """Of each row, fit for JSON."""

    @abstractmethod
    def recorded(self, predictions: Sequence[Any], examples: Sequence[Example]) -> Records:
        """The records that predictions were made from, as far as metrics need them."""

    @abstractmethod
    def truth(self, example: Example) -> str:
        """The target as a report shows it."""

    @abstractmethod
    def said(self, prediction: Any, example: Example) -> Said:
        """The prediction as a report shows it."""

    @abstractmethod
    def columns(self) -> list[Column]:
        """What `tanzaku predict` adds to a table."""

    @abstractmethod
    def cells(self, prediction: Any) -> list[Any]:
        """The values of these columns."""

    @abstractmethod
    def answer(self, prediction: Any) -> dict[str, Any]:
        """The same for JSON lines."""

    # -- files and tables

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What prediction needs, kept in tanzaku.json beside an adapter."""

    def tasks_to_json(self) -> dict[str, Any]:
        """The part of :meth:`to_json` that says which of several tasks a row is of."""
        return {} if self.row_tasks is None else self.row_tasks.to_json()

    @classmethod
    @abstractmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> Self:
        """The task again; a TanzakuError that begins with `where` if something in it cannot be."""

    @classmethod
    def fits(cls, width: int | None, config: Any) -> bool:
        """Whether a head of so many outputs (None: not known), on a base with this config, may be this task's."""
        return True

    @classmethod
    def overruled(cls, asked: Mapping[str, Any], about: Mapping[str, Any], path: Any) -> dict[str, Any]:
        """What a user asks for in place of what `about` says of the adapter at `path`, as `from_json` takes it."""
        return {key: asked[key] for key in cls.overrides if key in asked}

    @classmethod
    @abstractmethod
    def of_base(cls, config: Any, width: int | None, asked: Mapping[str, Any], path: str, base: str) -> Self:
        """The task of an adapter that is another library's, by the config of the model `base`.

        Args:
            width: outputs of the head in the adapter's file, if there is one. asked: what the user says.
        """

    @abstractmethod
    def describe(self) -> str:
        """What it tells apart or finds, in a few words."""

    def caution(self) -> str | None:
        """What a user of a merged model has to know, which has the task's head and no tanzaku.json."""
        return None

    def left_in_config(self) -> dict[str, Any]:
        """The same for a program, in the merged model's config."""
        return {}

    @abstractmethod
    def answers(self) -> str:
        """The same as a sentence of a model card."""

    @classmethod
    @abstractmethod
    def table_of(cls, tables: Mapping[str, Table], data: Any) -> tuple[list[str], list[list[str]]]:
        """Head and lines of the data card's table of targets."""


@dataclass(frozen=True)
class TaskData:
    """Encoded splits of one task, what their batches are padded with, and a text that nothing is trained on, where it
    is measured what the base forgets."""

    train: Split
    valid: Split | None
    test: Split | None
    task: Task
    pad_token_id: int = field(default=0)
    probe: Probe | None = None

    def splits(self) -> list[Split]:
        """The splits there are, training rows first."""
        return [split for split in (self.train, self.valid, self.test) if split is not None]


def ignorance(counts: Iterable[int]) -> float:
    """The loss, in nats, of one who knows how often each class is, and nothing of a row."""
    known = np.array([count for count in counts if count], dtype=float)
    shares = known / known.sum()
    return float(-(shares * np.log(shares)).sum())


def metric_named(task: type[Task] | Task, name: str) -> Metric:
    """The metric of a task.

    Raises:
        TanzakuError: the task has none of that name.
    """
    for metric in task.metrics:
        if metric.name == name:
            return metric
    known = [metric.name for metric in task.metrics]
    raise TanzakuError(f"{task.name} has no metric {name!r}{nearest(name, known)}, expected one of {listed(known)}")


def weighed(data: TaskData, by_class: bool, focal: float = 0.0) -> TaskData:
    """The same rows, with training rows that count what they say, and, `by_class`, so much that all classes count alike
    where they say nothing. Together they count what they would without: a weight changes no learning rate.

    Args:
        focal: of all training rows.

    Raises:
        TanzakuError: no row counts anything, or a class has no rows.
    """
    examples = data.train.examples
    if not by_class and not focal and all(example.factor == 1 for example in examples):
        return data
    classes = data.task.class_weights(examples) if by_class else [1.0] * len(examples)
    factors = [example.factor * weight for example, weight in zip(examples, classes, strict=True)]
    total = sum(example.weight * factor for example, factor in zip(examples, factors, strict=True))
    if not total:
        raise TanzakuError(f"all {len(examples)} training rows have the weight 0; let some of them count")
    scale = sum(example.weight for example in examples) / total
    counted = [replace(e, factor=factor * scale, focal=focal) for e, factor in zip(examples, factors, strict=True)]
    return replace(data, train=replace(data.train, examples=counted))


def joined(parts: Sequence[Records], order: Sequence[int]) -> Records:
    """Records of several batches as one; `order` says which row each is."""
    place = np.argsort(np.asarray(order))
    out: Records = {}
    for key in parts[0]:
        columns = [part[key] for part in parts]
        if isinstance(columns[0], np.ndarray):
            out[key] = np.concatenate(columns)[place]
        else:
            rows = [entry for column in columns for entry in column]
            out[key] = [rows[at] for at in place]
    return out


def subset(split: Split, rows: Sequence[int], name: str) -> Split:
    """Some rows of a split, in its order."""
    seconds = None if split.seconds is None else [split.seconds[r] for r in rows]
    kept = [split.number(r) - 1 for r in rows]
    examples, texts = [split.examples[r] for r in rows], [split.texts[r] for r in rows]
    return Split(name, examples, texts, 0, split.source, seconds, kept=kept)


def without_long(split: Split) -> Split:
    """A split without the rows that were cut.

    Raises:
        TanzakuError: nothing is left.
    """
    if not split.long:
        return split
    out = {*split.long}
    kept = [row for row in range(len(split)) if row not in out]
    if not kept:
        raise TanzakuError(
            f"all {len(split)} rows of {split.source} have more than {split.allowed}, and too_long: drop would leave "
            "none; allow more"
        )
    return replace(subset(split, kept, split.name), allowed=split.allowed, kept=kept, dropped=len(out))


def take(records: Records, rows: slice) -> Records:
    """The records of some rows."""
    return {key: column[rows] for key, column in records.items()}


def picked(records: Records, rows: Sequence[int]) -> Records:
    """The records of rows by their numbers."""
    return {
        key: column[list(rows)] if isinstance(column, np.ndarray) else [column[row] for row in rows]
        for key, column in records.items()
    }
