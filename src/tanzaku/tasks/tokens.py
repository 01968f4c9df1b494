"""Token classification: entities in a text, as labels of its words or as spans of its characters."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.support.lazy import Lazy
from tanzaku.support.targets import IGNORED
from tanzaku.tasks.cells import missing
from tanzaku.tasks.losses import focal
from tanzaku.tasks.row_tasks import RowTasks
from tanzaku.tasks.settings import DataSettings, Finding, Override
from tanzaku.tasks.task import (
    LEARNED,
    LOSS,
    Batch,
    Column,
    Example,
    Metric,
    Records,
    Said,
    Split,
    Statistics,
    Task,
    ignorance,
)
from tanzaku.tasks.text import check_characters, check_places, padded

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tanzaku.tasks.data import Table
else:
    np = Lazy("numpy")

Entity = tuple[int, int, str]  # start, end (after its last), type; counted in words, or in characters of a text

_OUTSIDE = "O"
_NONE = "none"  # where an entity of a table of counts is on one side alone


class TokensSettings(DataSettings):
    """Columns of a text and its spans, or of its words and their tags."""

    text: str = Field(default="text", min_length=1, description="column of the text")
    spans: str = Field(
        default="spans", min_length=1, description="column of spans: lists of {start, end, label}, in characters"
    )
    words: str | None = Field(default=None, min_length=1, description="column of words: lists, in place of a text")
    tags: str = Field(default="tags", min_length=1, description="column of the words' tags: lists of O, B-X, I-X")


# -- metrics, of records with `found` and `gold`, entities of each row


def _counts(records: Records) -> Any:
    """[n, 3]: entities that are right in both bounds and in type, that were found, and that there are."""
    pairs = zip(records["found"], records["gold"], strict=True)
    return np.array([[len({*a} & {*b}), len({*a}), len({*b})] for a, b in pairs], dtype=float)


def _share(right: Any, of: Any) -> Any:
    return right / np.maximum(of, 1)


def _f1(records: Records) -> Statistics:
    return Statistics(_counts(records), lambda sums: 2 * _share(sums[0], sums[1] + sums[2]))


def _precision(records: Records) -> Statistics:
    return Statistics(_counts(records), lambda sums: _share(sums[0], sums[1]))


def _recall(records: Records) -> Statistics:
    return Statistics(_counts(records), lambda sums: _share(sums[0], sums[2]))


def _macro_f1(records: Records) -> Statistics:
    """Mean over the types that there are or that were found."""
    types = sorted({kind for column in ("found", "gold") for row in records[column] for _, _, kind in row})
    if not types:
        return Statistics(np.zeros((len(records["gold"]), 1)), lambda sums: sums[0])
    of_type = [
        _counts({key: [[e for e in row if e[2] == kind] for row in records[key]] for key in ("found", "gold")})
        for kind in types
    ]

    def figure(sums: Any) -> Any:
        right, sizes = sums[0::3], sums[1::3] + sums[2::3]
        return (2 * _share(right, sizes)).sum(axis=0) / np.maximum((sizes > 0).sum(axis=0), 1)

    return Statistics(np.concatenate(of_type, axis=1), figure)


F1 = Metric("f1", "F1", "higher", (0.0, 1.0), _f1)
PRECISION = Metric("precision", "precision", "higher", (0.0, 1.0), _precision)
RECALL = Metric("recall", "recall", "higher", (0.0, 1.0), _recall)
MACRO_F1 = Metric("macro_f1", "macro F1", "higher", (0.0, 1.0), _macro_f1)


@dataclass(frozen=True)
class Tokens(Task):
    """Entities of some types. With `words`, rows are lists of words, and an entity's bounds are counted in these; else
    rows are texts, and bounds are characters, as near as the tokenizer's tokens come to them.

    An entity is right where both bounds and the type are: F1 is that of nervaluate's strict mode, and of seqeval's with
    the scheme IOB2.
    """

    types: tuple[str, ...]
    column: str = "text"
    words: bool = False
    row_tasks: RowTasks | None = None

    name = "tokens"
    summary = "entities in each text"
    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    metrics = (LOSS, F1, MACRO_F1, PRECISION, RECALL)
    rank_by = "f1"
    has_focal = True
    Data = TokensSettings
    overrides: ClassVar[Mapping[str, Override]] = {
        "column": Override("TEXT", "column of the text, or of the words of task tokens (as in training)")
    }
    reading = ("column",)
    answer_keys = ("predicted",)

    @property
    def tags(self) -> tuple[str, ...]:
        """The model's classes in the order of their ids, in the scheme IOB2."""
        return (_OUTSIDE, *(f"{place}-{kind}" for kind in self.types for place in "BI"))

    # -- rows

    @classmethod
    def learn(cls, tables: Mapping[str, Table], data: Any) -> Tokens:
        types: dict[str, set[str]] = {}
        for split, table in tables.items():
            rows = _rows(table, data)
            types[split] = {kind for _, entities in rows for _, _, kind in entities}
        if not types["train"]:
            raise TanzakuError(f"{tables['train'].source} has no entity in any row; expected some to find")
        for split, found in types.items():
            if unseen := sorted(found - types["train"]):
                raise TanzakuError(
                    f"{tables[split].source} has entities of the type {unseen[0]!r}, which no training row has"
                    f"{nearest(unseen[0], types['train'])}; the types are {listed(sorted(types['train']))}"
                )
        words = _in_words(tables["train"], data)
        return cls(tuple(sorted(types["train"])), words or data.text, words is not None)

    @classmethod
    def findings(cls, tables: Mapping[str, Table], data: Any) -> Iterator[Finding]:
        for table in tables.values():
            rows = _rows(table, data)
            if not any(entities for _, entities in rows):
                yield Finding(f"no row of {table.source} has an entity, so nothing in it can be found")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.column,)

    @classmethod
    def targets(cls, table: Table, data: Any) -> list[str]:
        return [_in_words_said(text, entities) for text, entities in _rows(table, data)]

    def check_cell(self, value: Any, where: str) -> None:
        if not self.blank(value):
            _cell(value, self.words, where)

    def blank(self, value: Any) -> bool:
        if missing(value) or value == [] or (isinstance(value, str) and not value.strip()):
            return True
        return self.words and isinstance(value, str) and value.strip("[] \t\n") == ""  # JSON without a word

    def have_tokens(self, values: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        return [bool(self._units(_cell(value, self.words, "a row"), tokenizer, None)[1]) for value in values]

    def encode(
        self, table: Table, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, targets: Any = None
    ) -> Split:
        check_places(tokenizer, self.name)
        special = tokenizer.num_special_tokens_to_add()
        if max_length <= special:
            raise TanzakuError(
                f"max_length {max_length} leaves no room for text beside {special} special tokens; expected at least "
                f"{special + 1}"
            )
        gold = None if targets is None else _rows(table, targets)
        examples, texts, cut = [], [], 0
        for row, value in enumerate(table.column(self.column), 1):
            where = f"{table.source} row {row}: column {self.column!r}"
            text = _cell(value, self.words, where)
            inputs, units, whole = self._units(text, tokenizer, max_length)
            if not units:
                raise TanzakuError(f"{where} is {str(value)[:40]!r}, which gives no tokens; fix or drop the row")
            cut += len(inputs["input_ids"]) < whole
            target, weight = None, 1.0
            if gold is not None:
                target = gold[row - 1][1]
                weight = float(len(units))
            examples.append(Example(inputs, target, weight, about=units))
            texts.append(" ".join(text) if self.words else str(text))
        return Split(name, self.told(examples, table), texts, cut, table.source)

    def _units(
        self, text: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> tuple[dict[str, list[int]], list[tuple[int, int, int]], int]:
        """The row as tokens; of each word, or of each token of a text, (token, start, end); and how many tokens it
        had."""
        options: dict[str, Any] = {"return_attention_mask": False, "return_offsets_mapping": True, "verbose": False}
        found = tokenizer(text, is_split_into_words=self.words, **options)
        whole = len(found["input_ids"])
        if max_length is not None and whole > max_length:
            found = tokenizer(text, is_split_into_words=self.words, truncation=True, max_length=max_length, **options)
        inputs = {key: found[key] for key in ("input_ids", "token_type_ids") if found.get(key)}
        units: list[tuple[int, int, int]] = []
        if self.words:
            before = None
            for token, word in enumerate(found.word_ids()):
                if word is not None and word != before:
                    units.append((token, word, word + 1))
                before = word
        else:
            for token, ((start, end), of) in enumerate(zip(found["offset_mapping"], found.sequence_ids(), strict=True)):
                # Some tokenizers count the space before a word as its own.
                while start < end and text[start].isspace():
                    start += 1
                while end > start and text[end - 1].isspace():
                    end -= 1
                if of is not None and end > start:
                    units.append((token, start, end))
        return inputs, units, whole

    def collate(self, examples: Sequence[Example], pad_token_id: int, width: int = 0, decoder_width: int = 0) -> Batch:
        import torch

        inputs = padded(examples, pad_token_id, width)
        if all(example.target is None for example in examples):
            return Batch.of(inputs, {}, examples)
        tags = torch.full_like(inputs["input_ids"], IGNORED)
        for row, example in enumerate(examples):
            for (token, _, _), tag in zip(example.about, self._tagged(example), strict=True):
                tags[row, token] = tag
        return Batch.of(inputs, {"tags": tags}, examples)

    def _tagged(self, example: Example) -> list[int]:
        """The tag's id of each unit."""
        out = [0] * len(example.about)
        for start, end, kind in example.target:
            inside = [at for at, (_, first, last) in enumerate(example.about) if first < end and last > start]
            for place, at in enumerate(inside):
                out[at] = 1 + 2 * self.types.index(kind) + (place > 0)
        return out

    # -- the model

    def model_settings(self) -> dict[str, Any]:
        ids = dict(enumerate(self.tags))
        return {"num_labels": len(ids), "id2label": ids, "label2id": {name: index for index, name in ids.items()}}

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        from torch.nn.functional import cross_entropy

        logits = outputs.logits.float().transpose(1, 2)
        losses = cross_entropy(logits, batch.targets["tags"], ignore_index=IGNORED, reduction="none")
        return focal(losses, batch).sum(dim=1)

    def records(self, outputs: Any, batch: Batch) -> Records:
        logits = outputs.logits.detach().cpu().double()
        sure, tags = (each.numpy() for each in logits.softmax(-1).max(dim=-1))
        tokens = [[token for token, _, _ in example.about] for example in batch.examples]
        scores = [sure[row, at] for row, at in enumerate(tokens)]
        found = [
            self._entities(tags[row, at], scores[row], example)
            for row, (at, example) in enumerate(zip(tokens, batch.examples, strict=True))
        ]
        out: Records = {"scores": scores, "found": [[entity for entity, _ in row] for row in found]}
        out["sure"] = [[score for _, score in row] for row in found]
        if batch.targets:
            log_shares = logits.log_softmax(-1)
            loss = [
                -log_shares[row, at, self._tagged(example)].sum().item()
                for row, (at, example) in enumerate(zip(tokens, batch.examples, strict=True))
            ]
            out |= {"loss": np.array(loss), **self._judged(batch.examples)}
        return out

    def _judged(self, examples: Sequence[Example]) -> Records:
        return {"gold": [example.target for example in examples], "weight": np.array([e.weight for e in examples])}

    def _entities(self, tags: Any, sure: Any, example: Example) -> list[tuple[Entity, float]]:
        """Entities in a row's tags, each with the mean of its tags' probabilities. One begins with B, and what is
        inside of none counts as outside, as strict IOB2 has it."""
        out: list[tuple[Entity, float]] = []
        at = 0
        while at < len(tags):
            tag = int(tags[at])
            last = at + 1
            if tag % 2 == 1:
                while last < len(tags) and int(tags[last]) == tag + 1:
                    last += 1
                bounds = example.about[at][1], example.about[last - 1][2]
                out.append(((*bounds, self.types[tag // 2]), float(np.mean(sure[at:last]))))
            at = last
        return out

    # -- figures

    @property
    def beside(self) -> tuple[str, ...]:
        return ("f1", "precision", "recall")

    @property
    def held(self) -> tuple[str, ...]:
        return ("f1",)  # of which precision and recall are two sides

    def doubts(self, runs: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> list[str]:
        ignorant = ignorance(Counter(tag for example in examples for tag in self._tagged(example)).values())
        out = []
        if min(run["loss"] for run in runs) > LEARNED * ignorant:
            out.append("did not learn: its loss stayed that of the tags' frequencies; try another learning rate")
        if not any(run["valid"].get("recall") for run in runs):
            out.append("finds nothing: in no run is an entity of the validation rows right")
        return out

    @property
    def classes(self) -> tuple[str, ...]:
        return (*self.types, _NONE)

    def confusion(self, records: Records) -> list[list[int]]:
        """Of entities with the same bounds; what has these on one side alone is `none` on the other."""
        table = np.zeros((len(self.types) + 1,) * 2, dtype=int)
        for found, gold in zip(records["found"], records["gold"], strict=True):
            said, true = ({(start, end): self.types.index(kind) for start, end, kind in row} for row in (found, gold))
            for bounds in said.keys() | true.keys():
                table[true.get(bounds, -1), said.get(bounds, -1)] += 1
        counts: list[list[int]] = table.tolist()
        return counts

    # -- predictions

    def predictions(self, records: Records) -> list[Any]:
        """Of each row, {"entities": [[start, end, type, score], ...], "loss": the sum over its tags or null}."""
        losses = records["loss"].tolist() if "loss" in records else [None] * len(records["found"])
        rows = zip(records["found"], records["sure"], losses, strict=True)
        return [
            {
                "entities": [[*entity, round(score, 6)] for entity, score in zip(found, sure, strict=True)],
                "loss": None if loss is None else float(f"{loss:.9g}"),
            }
            for found, sure, loss in rows
        ]

    def recorded(self, predictions: Sequence[Any], examples: Sequence[Example]) -> Records:
        found = [[(start, end, kind) for start, end, kind, _ in row["entities"]] for row in predictions]
        losses = [math.nan if row["loss"] is None else row["loss"] for row in predictions]
        gold = [[(start, end, kind) for start, end, kind in example.target] for example in examples]
        weight = np.array([example.weight for example in examples])
        return {"found": found, "loss": np.array(losses), "gold": gold, "weight": weight}

    def truth(self, example: Example) -> str:
        return _said(example.target)

    def said(self, prediction: Any, example: Example) -> Said:
        entities = [(start, end, kind) for start, end, kind, _ in prediction["entities"]]
        sure = [score for *_, score in prediction["entities"]]
        right = {*entities} == {(start, end, kind) for start, end, kind in example.target}
        return Said(_said(entities), min(sure, default=None), right)

    def columns(self) -> list[Column]:
        return [Column("predicted", "text")]

    def cells(self, prediction: Any) -> list[Any]:
        return [json.dumps(self.answer(prediction)["predicted"], ensure_ascii=False)]

    def answer(self, prediction: Any) -> dict[str, Any]:
        keys = ("start", "end", "label", "score")
        return {"predicted": [dict(zip(keys, entity, strict=True)) for entity in prediction["entities"]]}

    # -- files and tables

    def to_json(self) -> dict[str, Any]:
        return {"types": list(self.types), "column": self.column, "words": self.words, **self.tasks_to_json()}

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> Tokens:
        types, column, words = (about.get(key) for key in ("types", "column", "words"))
        if not isinstance(types, list) or not types or not all(isinstance(each, str) for each in types):
            raise TanzakuError(f"{where}types is {str(types)[:40]}, expected one name or more")
        if not isinstance(column, str) or not isinstance(words, bool):
            raise TanzakuError(f"{where}column is {str(column)[:40]}, expected a name (and words, true or false)")
        return cls(tuple(types), column, words, RowTasks.from_json(about, where))

    @classmethod
    def of_base(cls, config: Any, width: int | None, asked: Mapping[str, Any], path: str, base: str) -> Tokens:
        tags = [str(tag) for _, tag in sorted((config.id2label or {}).items())]
        types = [tag[2:] for tag in tags if tag.startswith("B-")]
        if (_OUTSIDE, *(f"{place}-{kind}" for kind in types for place in "BI")) != tuple(tags) or not types:
            raise TanzakuError(
                f"{path}: its base {base!r} names the tags {listed(tags)}, expected O, B-X, I-X for each type X in "
                "this order"
            )
        return cls(tuple(types), asked.get("column", "text"), False)

    def describe(self) -> str:
        return f"entities {', '.join(self.types)}, in {'words' if self.words else 'characters'}"

    def answers(self) -> str:
        return f"It finds entities of {len(self.types)} types: {', '.join(self.types)}."

    @classmethod
    def table_of(cls, tables: Mapping[str, Table], data: Any) -> tuple[list[str], list[list[str]]]:
        counts = [Counter(kind for _, row in _rows(table, data) for *_, kind in row) for table in tables.values()]
        types = sorted({kind for each in counts for kind in each})
        return ["entities"], [[kind, *(f"{each[kind]:,}" for each in counts)] for kind in types]


# -- cells


def _in_words(table: Table, data: Any) -> str | None:
    """The column of words, if rows are lists of them."""
    if data.words is not None:
        return str(data.words)
    return None if data.text in table.columns else next((n for n in ("words", "tokens") if n in table.columns), None)


def _rows(table: Table, data: Any) -> list[tuple[Any, list[Entity]]]:
    """Each row's words or text, and its entities.

    Raises:
        TanzakuError: what is wrong with a row, and where.
    """
    words = _in_words(table, data)
    out: list[tuple[Any, list[Entity]]] = []
    columns = (words, data.tags) if words is not None else (data.text, data.spans)
    keys = ("words", "tags") if words is not None else ("text", "spans")
    values = [table.column(column, key) for column, key in zip(columns, keys, strict=True)]
    if not values[0]:
        raise TanzakuError(f"{table.source} has no rows; expected at least one")
    for row, (value, target) in enumerate(zip(*values, strict=True), 1):
        where, whose = (f"{table.source} row {row}: column {column!r}" for column in columns)
        if missing(value) or not value:
            raise TanzakuError(f"{where} has no text; fill it in or drop the row")
        text = _cell(value, words is not None, where)
        read = _from_tags if words is not None else _from_spans
        out.append((text, read(_list(target, whose), text, whose)))
    return out


def _list(value: Any, where: str) -> list[Any]:
    """A list, as it is or as JSON in a cell of text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError:
            raise TanzakuError(f"{where} is {value[:40]!r}, expected a list as JSON writes it") from None
    value = [] if value is None else value
    if not isinstance(value, list):
        raise TanzakuError(f"{where} is a {type(value).__name__}, expected a list")
    return value


def _cell(value: Any, words: bool, where: str) -> Any:
    if not words:
        if not isinstance(value, str):
            raise TanzakuError(f"{where} is {str(value)[:40]} ({type(value).__name__}), expected text")
        check_characters(value, where)
        return value
    found = _list(value, where)
    for at, word in enumerate(found, 1):
        if not isinstance(word, str) or not word.strip():
            raise TanzakuError(f"{where} word {at} is {str(word)[:40]!r}, expected text")
        check_characters(word, where)
    return found


def _from_tags(tags: Sequence[Any], words: Sequence[str], where: str) -> list[Entity]:
    """Entities of words that are tagged O, B-X and I-X; S-X and E-X (of BIOES) are read too. A tag without a place (O
    alone aside) makes an entity of its word."""
    if len(tags) != len(words):
        raise TanzakuError(f"{where} has {len(tags)} tags for {len(words)} words; expected one for each")
    out: list[Entity] = []
    for at, tag in enumerate(tags):
        if not isinstance(tag, str) or not tag.strip():
            raise TanzakuError(f"{where} tag {at + 1} is {tag!r}, expected a name such as O or B-PER")
        place, dash, kind = tag.strip().partition("-")
        if tag.strip() == _OUTSIDE:
            continue
        if not dash or place not in ("B", "I", "S", "E") or not kind:
            place, kind = "S", tag.strip()
        goes_on = place in ("I", "E") and out and out[-1][1] == at and out[-1][2] == kind
        if goes_on:
            out[-1] = (out[-1][0], at + 1, kind)
        else:
            out.append((at, at + 1, kind))
    return out


def _from_spans(spans: Sequence[Any], text: str, where: str) -> list[Entity]:
    out: list[Entity] = []
    for at, span in enumerate(spans, 1):
        if not isinstance(span, Mapping) or not {"start", "end", "label"} <= span.keys():
            raise TanzakuError(f"{where} span {at} is {str(span)[:40]}, expected start, end and label")
        start, end, kind = span["start"], span["end"], span["label"]
        if type(start) is not int or type(end) is not int:
            raise TanzakuError(f"{where} span {at} is from {start!r} to {end!r}, expected whole numbers")
        if start == end:
            raise TanzakuError(f"{where} span {at} is empty, from {start} to {end}; end is behind its last character")
        if not 0 <= start < end <= len(text):
            raise TanzakuError(
                f"{where} span {at} is from {start} to {end}, expected characters from 0 to {len(text)} of its text"
            )
        if not isinstance(kind, str) or not kind.strip():
            raise TanzakuError(f"{where} span {at} has the label {str(kind)[:40]!r}, expected a name")
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        if start == end:
            raise TanzakuError(f"{where} span {at} is of white space alone; drop it")
        out.append((start, end, kind.strip()))
    out.sort()
    for one, other in pairwise(out):
        if other[0] < one[1]:
            raise TanzakuError(f"{where}: the spans {list(one)} and {list(other)} overlap; expected each alone")
    return out


def _said(entities: Iterable[Sequence[Any]]) -> str:
    return "; ".join(f"{kind} {start} to {end}" for start, end, kind in sorted(map(tuple, entities))) or _NONE


def _in_words_said(text: Any, entities: Sequence[Entity]) -> str:
    join = " " if isinstance(text, list) else ""
    return "; ".join(f"{kind} {join.join(text[start:end])!r}" for start, end, kind in entities) or _NONE
