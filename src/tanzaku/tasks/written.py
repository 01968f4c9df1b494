"""Rows that have text written for them: what tasks share whose predictions are texts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import Field

from tanzaku.errors import TanzakuError, flag, listed
from tanzaku.support.lazy import Lazy
from tanzaku.tasks.cells import short
from tanzaku.tasks.sampling import OVERRIDES, SAMPLING, Decoding, decoding_of
from tanzaku.tasks.settings import DataSettings, Finding
from tanzaku.tasks.task import LOSS, Batch, Column, Example, Metric, OwnMetric, Records, Said, Split, Statistics, Task
from tanzaku.tasks.text_metrics import Writing, metric_from, text_metrics

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tanzaku.engine.text_head import Hidden
    from tanzaku.tasks.data import Table
    from tanzaku.tasks.decoding import Written
else:
    np = Lazy("numpy")

_GREEDY = Decoding()


class WrittenSettings(DataSettings):
    """What may be said of text that is to be written."""

    options: ClassVar[frozenset[str]] = frozenset({"too_long", "max_new_tokens", "sample"})

    too_long: Literal["error", "cut", "drop"] = Field(
        default="error",
        description="rows of more than max_length tokens: stop, leave out what is behind, or leave the rows out",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="tokens that are written for a prompt at most")
    sample: int = Field(default=16, ge=1, description="validation rows that are written for after each epoch")


# -- metrics


def _perplexity(records: Records) -> Statistics:
    rows = np.stack([records["loss"], records["weight"]], axis=1)
    return Statistics(rows, lambda sums: np.exp(np.minimum(sums[0] / sums[1], 700.0)))


def _token_accuracy(records: Records) -> Statistics:
    return Statistics(np.stack([records["right"], records["weight"]], axis=1), lambda sums: sums[0] / sums[1])


def _if_written(statistics: Any, records: Records) -> Statistics:
    """Of a metric of text that was written: no number where none was."""
    texts = records.get("text")
    if texts is None or any(text is None for text in texts):
        return _no_number(records)
    found: Statistics = statistics(records)
    return found


def _if_it_works(statistics: Any, records: Records) -> Statistics:
    """Of a user's own metric: no number where its function fails at a row that it had not met before. What was trained
    is worth more than one figure."""
    try:
        found: Statistics = statistics(records)
    except TanzakuError as error:
        _told(str(error))
        return _no_number(records)
    return found


def _no_number(records: Records) -> Statistics:
    return Statistics(np.full((len(records["reference"]), 1), math.nan), lambda sums: sums[0])


@cache
def _told(line: str) -> None:
    logging.getLogger("tanzaku").warning("tanzaku: %s", line)


def _of_text(metric: Any) -> Any:
    return replace(metric, statistics=partial(_if_written, metric.statistics))


PERPLEXITY = Metric("perplexity", "perplexity", "lower", (1.0, math.inf), _perplexity, by_row=True)
TOKEN_ACCURACY = Metric("token_accuracy", "token accuracy", "higher", (0.0, 1.0), _token_accuracy, by_row=True)


def _metrics(writing: Writing, writes: bool = True, measured: Sequence[OwnMetric] = ()) -> tuple[Metric, ...]:
    """Where nothing is written, there is nothing that a reference could be compared with."""
    own = (replace(metric, statistics=partial(_if_it_works, metric.statistics)) for metric in measured)
    texts = (*text_metrics(writing), *own) if writes else ()
    return (LOSS, PERPLEXITY, TOKEN_ACCURACY, *map(_of_text, texts))


@dataclass(frozen=True)
class Row:
    """What is known of a row beside its tokens: those that are written on from, and what is learnt (-100: nothing)."""

    asked: Sequence[int]
    labels: Sequence[int] = ()


@dataclass(frozen=True)
class WrittenTask(Task):
    """A task whose prediction is a text, and whose loss is of tokens: the `goals` of a batch are those that its decoder
    is to foretell at each of its places.

    Args:
        decoding: how text is written. writing: of the references, which decides how BLEU and ROUGE-L cut them.
        sample: rows that are written for after each epoch. measured: metrics by functions of the user's own.
    """

    decoding: Decoding = field(default=_GREEDY, kw_only=True)
    writing: Writing = field(default="latin", kw_only=True)
    sample: int = field(default=16, kw_only=True)
    measured: tuple[OwnMetric, ...] = field(default=(), kw_only=True)
    tokenizer: Any = field(default=None, compare=False, repr=False, kw_only=True)

    metrics = _metrics("latin")
    rank_by = "chrf"
    overrides = OVERRIDES
    reading: ClassVar[tuple[str, ...]] = ()
    answer_keys = ("predicted",)
    takes_functions = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", _metrics(self.writing, self.writes, self.measured))

    # -- rows

    @classmethod
    def findings(cls, tables: Mapping[str, Table], data: Any) -> Iterator[Finding]:
        yield from ()

    def remarks(self, split: Split) -> list[str]:
        if not self.writes:
            return []
        most, references = self.decoding.max_new_tokens, [str(example.target) for example in split.examples]
        if not (longer := [size for size in map(len, self.tokens_of(references)) if size > most]):
            return []
        return [
            f"{len(longer)} of {len(references)} references of {split.source} have more than {most} tokens and are "
            f"never written whole, which lowers figures; the longest needs --max-new-tokens {max(longer)}"
        ]

    def tokens_of(self, references: list[str]) -> list[list[int]]:
        """As they are written, without what ends them."""
        found: list[list[int]] = self.tokenizer(references, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def told_by(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        return replace(self, tokenizer=tokenizer)

    # -- the model

    def model_settings(self) -> dict[str, Any]:
        return {}

    def check_model(self, config: Any) -> None:
        pass

    def prepare(self, model: Any) -> None:
        from tanzaku.engine.text_head import text_head

        text_head(model)

    def run(self, model: Any, inputs: dict[str, Any]) -> Hidden:
        from tanzaku.engine.text_head import text_head

        return text_head(model).run(inputs)

    def score(self, outputs: Hidden, batch: Batch) -> Tensor:
        return outputs.losses(batch.targets["goals"])[0].sum(dim=1)

    def records(self, outputs: Hidden, batch: Batch) -> Records:
        losses, right = outputs.losses(batch.targets["goals"])
        return {
            "loss": losses.detach().double().sum(dim=1).cpu().numpy(),
            "right": right.sum(dim=1).cpu().numpy().astype(float),
            **self._judged(batch.examples),
        }

    def _judged(self, examples: Sequence[Example]) -> Records:
        return {
            "weight": np.array([example.weight for example in examples]),
            "reference": [example.target for example in examples],
        }

    @property
    def zero_shot(self) -> bool:
        return True

    # -- text that is written

    @property
    def writes(self) -> bool:
        return True

    def prompt(self, example: Example) -> Sequence[int]:
        asked: Sequence[int] = example.about.asked
        return asked

    def put(self, records: Records, written: Sequence[Written]) -> Records:
        return {**records, "text": [each.text(self.tokenizer, self.decoding.stop).strip() for each in written]}

    # -- figures

    def measured_by(self, own: Sequence[OwnMetric]) -> Self:
        if own and not self.writes:
            raise TanzakuError(
                f"{own[0].name} compares what is written, and for rows of plain text nothing is; leave it out"
            )
        return replace(self, measured=tuple(own))

    @property
    def beside(self) -> tuple[str, ...]:
        own = tuple(metric.name for metric in self.measured)
        return (*own, "exact_match", "perplexity") if self.writes else ("perplexity",)

    @property
    def held(self) -> tuple[str, ...]:
        return ()

    # -- predictions

    def predictions(self, records: Records) -> list[Any]:
        """Of each row, {"text": what was written or null, "loss": the sum over its tokens, "right": tokens}."""
        rows = len(next(iter(records.values())))
        texts = records.get("text") or [None] * rows
        out: list[Any] = [{"text": text} for text in texts]
        if "loss" in records:
            for each, loss, right in zip(out, records["loss"].tolist(), records["right"].tolist(), strict=True):
                each |= {"loss": float(f"{loss:.9g}"), "right": int(right)}
        return out

    def recorded(self, predictions: Sequence[Any], examples: Sequence[Example]) -> Records:
        losses = [math.nan if row.get("loss") is None else row["loss"] for row in predictions]
        return {
            "loss": np.array(losses, dtype=float),
            "right": np.array([row.get("right", math.nan) for row in predictions], dtype=float),
            "text": [row["text"] for row in predictions],
            **self._judged(examples),
        }

    def truth(self, example: Example) -> str:
        return str(example.target)

    def said(self, prediction: Any, example: Example) -> Said:
        text = prediction["text"]
        return Said("–" if text is None else text, None, None if text is None else text == example.target)

    def columns(self) -> list[Column]:
        return [Column("predicted", "text")]

    def cells(self, prediction: Any) -> list[Any]:
        return [prediction["text"]]

    def answer(self, prediction: Any) -> dict[str, Any]:
        return {"predicted": prediction["text"]}

    # -- files and tables

    def to_json(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.decoding.max_new_tokens,
            **({"sampling": sampling} if (sampling := self.decoding.sampling) else {}),
            "writing": self.writing,
            **({"measured": [metric.to_json() for metric in self.measured]} if self.measured else {}),
        }

    @staticmethod
    def how(about: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields of :meth:`to_json` above, as the class takes them.

        Raises:
            TanzakuError: begins with `where`; one that is none.
        """
        writing, sampling = about.get("writing"), about.get("sampling", {})
        if writing not in get_args(Writing):
            raise TanzakuError(f"{where}writing is {short(writing)}, expected {listed(get_args(Writing))}")
        if not isinstance(sampling, dict) or not sampling.keys() <= SAMPLING.keys():
            raise TanzakuError(f"{where}sampling is {short(sampling)}, expected settings by {listed(SAMPLING)}")
        settings = {"max_new_tokens": about.get("max_new_tokens"), **sampling}
        decoding = decoding_of(settings, lambda key: f"{where}{'sampling.' if key in SAMPLING else ''}{key}")
        measured = about.get("measured", [])
        if not isinstance(measured, list):
            raise TanzakuError(f"{where}measured is {short(measured)}, expected a list of metrics")
        own = tuple(metric_from(each, where) for each in measured)
        return {"decoding": decoding, "writing": cast(Writing, writing), "measured": own}

    @classmethod
    def overruled(cls, asked: Mapping[str, Any], about: Mapping[str, Any], path: Any) -> dict[str, Any]:
        found = super().overruled(asked, about, path)
        decoding_of({key: found[key] for key in OVERRIDES if key in found}, flag)
        sampling = {key: found.pop(key) for key in SAMPLING if key in found}
        kept = about.get("sampling", {})
        return {**found, "sampling": {**kept, **sampling}} if sampling and isinstance(kept, dict) else found

    @classmethod
    def asked_for(cls, asked: Mapping[str, Any]) -> Decoding:
        """How a user wants text written by an adapter of which nothing else is known."""
        return decoding_of({key: asked[key] for key in OVERRIDES if key in asked}, flag)

    @classmethod
    def table_of(cls, tables: Mapping[str, Table], data: Any) -> tuple[list[str], list[list[str]]]:
        sizes = [[len(each) for each in cls.targets(table, data)] for table in tables.values()]
        return ["rows"], [["to be written", *(f"{len(each):,}" for each in sizes)]]


def numbers_of(rows: Sequence[tuple[str, int]]) -> list[int]:
    """The numbers, from 0, of rows by where they are, each once."""
    return sorted({int(where.rpartition(" row ")[2]) - 1 for where, _ in rows})


def check_lengths(
    long: Sequence[tuple[str, int]], of: int, source: str, most: int, key: str = "max_length", what: str = "tokens"
) -> None:
    """A TanzakuError where rows are too long: how many, and what would help.

    Args:
        long: where they are, and how many tokens each has. of: so many rows. key: the setting that `most` is.
    """
    if long:
        largest = max(size for _, size in long)
        raise TanzakuError(
            f"{len(long)} of {of} rows of {source} have more than {most} {what}, the first "
            f"{long[0][0].rpartition(' row ')[2]} with {long[0][1]}: use {flag(key)} {largest}, --too-long cut to "
            "leave out what is behind, or --too-long drop to leave out these rows"
        )
