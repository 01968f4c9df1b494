"""Choice: which of some answers follows a prompt, by how likely a language model holds each (rank classification)."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from tanzaku.errors import TanzakuError, listed
from tanzaku.support.lazy import Lazy
from tanzaku.support.targets import IGNORED
from tanzaku.tasks.answer_choices import ChoiceSettings, Loss, Question, Reading
from tanzaku.tasks.cells import missing, short
from tanzaku.tasks.losses import log_otherwise
from tanzaku.tasks.metrics import ACCURACY, MACRO_F1
from tanzaku.tasks.row_tasks import RowTasks
from tanzaku.tasks.seq2seq import decoded, ended
from tanzaku.tasks.task import DECODED, LOSS, Batch, Column, Example, Records, Said, Split, Statistics, Task
from tanzaku.tasks.text import check_characters, check_places, padded, tokens_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tanzaku.engine.text_head import Hidden
    from tanzaku.tasks.data import Table
    from tanzaku.tasks.settings import Finding
else:
    np = Lazy("numpy")

LOSSES: tuple[Loss, ...] = get_args(Loss)
_LONG = 40  # characters of a choice in a table
_SHOWN = 20  # choices in a table
_PLAIN = Reading(choices="choices")


# -- metrics, of records with `scores`, for each row an array of its choices' scores, and `target`, numbers of choices


def _table(records: Records) -> Records:
    """What metrics of classes read: where a row has fewer choices than another, what it has not is never the best."""
    scores = records["scores"]
    table = np.full((len(scores), max(map(len, scores))), np.finfo(float).min)
    for row, own in zip(table, scores, strict=True):
        row[: len(own)] = own
    return {"probabilities": table, "target": records["target"]}


def _accuracy(records: Records) -> Statistics:
    return ACCURACY.statistics(_table(records))


def _macro_f1(records: Records) -> Statistics:
    return MACRO_F1.statistics(_table(records))


_OF_ROWS = (LOSS, replace(ACCURACY, statistics=_accuracy))
_OF_CLASSES = (*_OF_ROWS, replace(MACRO_F1, statistics=_macro_f1))


@dataclass(frozen=True)
class RankClassification(Task):
    """The best of some answers to a prompt. Each is a row of a pass, prompt and answer; its score is the mean of its
    tokens' log probabilities, or, where it is not to be `length_normalised`, their sum.

    Brown et al. 2020, Language models are few-shot learners, section 2.4; Liu et al. 2022 (T-Few), section 3.2.

    Args:
        asked: where of a row its prompt and its choices stand. losses: what is learnt by, each of weight 1.
        encoder_decoder: whether an encoder reads the prompt, and a decoder has an answer with what ends it.
    """

    asked: Reading = _PLAIN
    losses: tuple[Loss, ...] = LOSSES
    length_normalised: bool = True
    encoder_decoder: bool = False
    row_tasks: RowTasks | None = field(default=None, kw_only=True)

    name = "choice"
    summary = "the best of some answers to a prompt"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    metrics = _OF_CLASSES
    rank_by = "accuracy"
    Data = ChoiceSettings
    of_adapters: ClassVar[frozenset[str]] = frozenset({"losses"})
    answer_keys = ("predicted", "confidence", "probabilities")

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", _OF_CLASSES if self.classes else _OF_ROWS)
        if self.encoder_decoder:
            object.__setattr__(self, "auto_class", "AutoModelForSeq2SeqLM")
            object.__setattr__(self, "peft_type", "SEQ_2_SEQ_LM")

    # -- rows

    @classmethod
    def learn(cls, tables: Mapping[str, Table], data: Any) -> RankClassification:
        twice = [name for name, times in Counter(data.losses).items() if times > 1]
        if twice:
            raise TanzakuError(f"losses has {twice[0]!r} twice; expected each once, since each has the weight 1")
        task = cls(Reading.of(tables["train"], data), tuple(data.losses), data.length_normalised, data.encoder_decoder)
        for table in tables.values():
            for _ in task.asked.questions(table, data.label):
                pass
        return task

    @classmethod
    def findings(cls, tables: Mapping[str, Table], data: Any) -> Iterator[Finding]:
        yield from ()

    @property
    def reads(self) -> tuple[str, ...]:
        return self.asked.columns

    @property
    def required(self) -> tuple[str, ...]:
        # A template may go without some of what it reads.
        return (self.asked.prompt,) if self.asked.template is None else ()

    @classmethod
    def targets(cls, table: Table, data: Any) -> list[str]:
        return [str(each.answer) for each in Reading.of(table, data).questions(table, data.label)]

    def check_cell(self, value: Any, where: str) -> None:
        if isinstance(value, str):
            check_characters(value, where)

    def blank(self, value: Any) -> bool:
        return missing(value) or (isinstance(value, str) and not value.strip())

    def have_tokens(self, values: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        return [not isinstance(value, str) or bool(tokens_of(tokenizer, value, special=False)[0]) for value in values]

    def encode(
        self, table: Table, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, targets: Any = None
    ) -> Split:
        check_places(tokenizer, self.name)
        if self.encoder_decoder and hasattr(tokenizer, "src_lang"):
            raise TanzakuError(
                f"the tokenizer {type(tokenizer).__name__} marks texts with their language, which task {self.name} "
                "does not tell it; expected T5, BART or another of one language"
            )
        examples, texts, cut = [], [], 0
        label = None if targets is None else targets.label
        for number, row in enumerate(self.asked.questions(table, label), 1):
            where = f"{table.source} row {number}"
            if self.encoder_decoder:
                asked, answers, shorter = _apart(tokenizer, row, max_length, where)
                first, *others = ({"input_ids": asked, DECODED: answer} for answer in answers)
            else:
                asked, answers, shorter = _tokens(tokenizer, row, max_length, where)
                first, *others = ({"input_ids": asked + answer} for answer in answers)
            shared = 0 if self.encoder_decoder else len(asked)
            examples.append(Example(first, row.answer, about=row.names, others=others, shared=shared))
            texts.append(row.prompt)
            cut += shorter
        return Split(name, self.told(examples, table), texts, cut, table.source)

    def learnt(self, example: Example) -> list[bool]:
        if self.encoder_decoder:
            return [*[False] * example.lengths[0], *[True] * len(example.inputs[DECODED])]
        return [at >= example.shared for at in range(example.lengths[0])]

    def collate(self, examples: Sequence[Example], pad_token_id: int, width: int = 0, decoder_width: int = 0) -> Batch:
        import torch

        inputs = padded(examples, pad_token_id, width)
        if self.encoder_decoder:
            answers = [row[DECODED] for example in examples for row in example.rows]
            most = max(decoder_width, *map(len, answers))
            goals = torch.tensor([[*row, *[IGNORED] * (most - len(row))] for row in answers], dtype=torch.int64)
            return Batch.of({**inputs, DECODED: goals}, self._targets(goals, examples), examples)
        # A token's target is its successor.
        goals = torch.full_like(inputs["input_ids"], IGNORED)
        rows = [(row["input_ids"], example.shared) for example in examples for row in example.rows]
        for own, (ids, begin) in zip(goals, rows, strict=True):
            own[begin - 1 : len(ids) - 1] = torch.tensor(ids[begin:], dtype=torch.int64)
        return Batch.of(inputs, self._targets(goals, examples), examples)

    def _targets(self, goals: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        import torch

        known = all(example.target is not None for example in examples)
        return {"goals": goals, **({"right": torch.tensor(_right(examples))} if known else {})}

    def stratum(self, example: Example) -> str | None:
        return f"choice {example.target!r}" if self.classes else None

    # -- the model

    def model_settings(self) -> dict[str, Any]:
        return {}

    def check_model(self, config: Any) -> None:
        if (found := bool(getattr(config, "is_encoder_decoder", False))) != self.encoder_decoder:
            what, fix = ("an", "give --encoder-decoder") if found else ("no", "leave --encoder-decoder out")
            raise TanzakuError(f"the model ({config.model_type}) is {what} encoder-decoder; {fix}")

    def run(self, model: Any, inputs: dict[str, Any]) -> Hidden:
        from tanzaku.engine.text_head import text_head

        return text_head(model).run(decoded(model, inputs) if self.encoder_decoder else inputs)

    def score(self, outputs: Hidden, batch: Batch) -> Tensor:
        return self._lost(_Scored(outputs.losses(batch.targets["goals"])[0], batch), batch.targets["right"])

    def _lost(self, scored: _Scored, right: Tensor) -> Tensor:
        """(examples,): the sum of the losses that are asked for."""
        return sum((getattr(scored, loss)(right) for loss in self.losses), scored.costs.new_zeros(len(right)))

    def records(self, outputs: Hidden, batch: Batch) -> Records:
        costs = outputs.losses(batch.targets["goals"])[0].detach().cpu().double()
        scored = _Scored(costs, batch.to("cpu"))
        scores = scored.scores(self.length_normalised).tolist()
        names = [example.about for example in batch.examples]
        found: Records = {
            "scores": [np.array(row[: len(own)]) for row, own in zip(scores, names, strict=True)],
            "names": names,
        }
        if "right" in batch.targets:
            right = batch.targets["right"].cpu()
            loss = self._lost(scored, right).numpy()
            found |= {"target": right.numpy(), "loss": loss, "weight": np.ones(len(right))}
        return found

    @property
    def zero_shot(self) -> bool:
        return True

    # -- figures

    @property
    def beside(self) -> tuple[str, ...]:
        return ("macro_f1",) if len(self.classes) > 2 else ()

    def doubts(self, runs: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> list[str]:
        right = statistics.fmean(
            1.0 if (value := run["valid"].get("accuracy")) is None else float(value) for run in runs
        )
        if self.classes:
            often = max(Counter(example.target for example in examples).values()) / len(examples)
            what = "to say the most frequent answer of the training rows always is right for"
        else:
            often, what = statistics.fmean(1 / len(each.about) for each in examples), "to guess is right for"
        return [f"below a guess: {right:.1%} are right, and {what} {often:.1%} of those"] if right < often else []

    @property
    def classes(self) -> tuple[str, ...]:
        return self.asked.names

    def confusion(self, records: Records) -> list[list[int]] | None:
        """A row without numbers predicts nothing and is not counted."""
        if not self.classes:
            return None
        counts = np.zeros((len(self.classes), len(self.classes)), dtype=int)
        for scores, target in zip(records["scores"], records["target"], strict=True):
            if np.isfinite(scores).all():
                counts[target, scores.argmax()] += 1
        found: list[list[int]] = counts.tolist()
        return found

    # -- predictions

    def predictions(self, records: Records) -> list[Any]:
        """Of each row {"scores": by choice}, and its "loss" where it is known."""
        found: list[Any] = [
            {"scores": {name: float(f"{score:.9g}") for name, score in zip(names, scores.tolist(), strict=True)}}
            for names, scores in zip(records["names"], records["scores"], strict=True)
        ]
        if "loss" in records:
            for each, loss in zip(found, records["loss"].tolist(), strict=True):
                each["loss"] = float(f"{loss:.9g}")
        return found

    def recorded(self, predictions: Sequence[Any], examples: Sequence[Example]) -> Records:
        names = [example.about for example in examples]
        return {
            "scores": [
                np.array([_number(row["scores"][name]) for name in own])
                for row, own in zip(predictions, names, strict=True)
            ],
            "names": names,
            "target": np.array(_right(examples)),
            "loss": np.array([_number(row.get("loss")) for row in predictions]),
            "weight": np.ones(len(predictions)),
        }

    def truth(self, example: Example) -> str:
        return str(example.target)

    def said(self, prediction: Any, example: Example) -> Said:
        shares = _shares(prediction["scores"])
        if not shares:
            return Said("–")
        best = max(shares, key=shares.__getitem__)
        return Said(best, shares[best], best == example.target)

    def columns(self) -> list[Column]:
        return [
            Column("predicted", "text"),
            Column("confidence", "number"),
            *(Column("p", "number", name) for name in self.classes),
        ]

    def cells(self, prediction: Any) -> list[Any]:
        found = self.answer(prediction)
        return [found["predicted"], found["confidence"], *(found["probabilities"][name] for name in self.classes)]

    def answer(self, prediction: Any) -> dict[str, Any]:
        shares = {name: round(share, 6) for name, share in _shares(prediction["scores"]).items()}
        best = max(prediction["scores"], key=prediction["scores"].__getitem__)
        return {"predicted": best, "confidence": shares[best], "probabilities": shares}

    # -- files and tables

    def to_json(self) -> dict[str, Any]:
        return {
            **self.asked.to_json(),
            "losses": list(self.losses),
            "length_normalised": self.length_normalised,
            "encoder_decoder": self.encoder_decoder,
            **self.tasks_to_json(),
        }

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> RankClassification:
        losses = about.get("losses")
        if not isinstance(losses, list) or not losses or not {*map(str, losses)} <= {*LOSSES}:
            raise TanzakuError(f"{where}losses is {short(losses)}, expected some of {listed(LOSSES)}")
        flags = {key: about.get(key) for key in ("length_normalised", "encoder_decoder")}
        for key, value in flags.items():
            if not isinstance(value, bool):
                raise TanzakuError(f"{where}{key} is {short(value)}, expected true or false")
        own: dict[str, Any] = {**flags, "row_tasks": RowTasks.from_json(about, where)}
        return cls(Reading.from_json(about, where), tuple(losses), **own)

    @classmethod
    def of_base(
        cls, config: Any, width: int | None, asked: Mapping[str, Any], path: str, base: str
    ) -> RankClassification:
        return cls()

    def describe(self) -> str:
        return f"choices {', '.join(self.classes)}" if self.classes else "one of each row's choices"

    def answers(self) -> str:
        if not self.classes:
            return "It chooses one of the answers that are given with a prompt."
        return f"It answers a prompt with one of {len(self.classes)} choices: {', '.join(self.classes)}."

    @classmethod
    def table_of(cls, tables: Mapping[str, Table], data: Any) -> tuple[list[str], list[list[str]]]:
        rows = {
            split: [*Reading.of(tables["train"], data).questions(table, data.label)] for split, table in tables.items()
        }
        names = Reading.of(tables["train"], data).names
        if names:
            counts = {split: Counter(each.answer for each in some) for split, some in rows.items()}
            lines = [[_short(name), *(f"{each[name]:,}" for each in counts.values())] for name in names[:_SHOWN]]
            if len(names) > _SHOWN:
                lines.append([f"and {len(names) - _SHOWN} more choices", *("" for _ in counts)])
            return ["choice"], lines
        sizes = sorted({len(each.names) for some in rows.values() for each in some})
        many = [[f"{size} choices", *(f"{sum(len(r.names) == size for r in some):,}" for some in rows.values())]
                for size in sizes]  # fmt: skip
        return ["rows with"], many


class _Scored:
    """The cross entropies of a batch's choices, and what is made of them.

    Args:
        costs: (rows, tokens), of the tokens of each choice, 0 elsewhere.
    """

    def __init__(self, costs: Tensor, batch: Batch):
        import torch

        self.costs, self.own = costs, batch.targets["goals"] != IGNORED
        sizes = [len(example.rows) for example in batch.examples]
        owners = [at for at, size in enumerate(sizes) for _ in range(size)]
        places = [place for size in sizes for place in range(size)]
        self.owner, self.place = (torch.tensor(each, device=costs.device) for each in (owners, places))
        self.shape = (len(sizes), max(sizes))
        self.counts = self.own.sum(dim=1)

    def scores(self, normalised: bool) -> Tensor:
        """(examples, most choices): log probabilities of choices; -inf where a row has no more of them."""
        sums = -self.costs.sum(dim=1)
        found = sums / self.counts if normalised else sums
        return found.new_full(self.shape, -math.inf).index_put((self.owner, self.place), found)

    def lm(self, right: Tensor) -> Tensor:
        """The mean over the tokens of the right choice of -log p."""
        at = self.place == right[self.owner]
        return self.costs[at].sum(dim=1) / self.counts[at]

    def unlikelihood(self, right: Tensor) -> Tensor:
        """The mean over the tokens of all wrong choices of -log(1 - p)."""
        at = self.place != right[self.owner]
        tokens = (-log_otherwise(self.costs[at])).masked_fill(~self.own[at], 0.0).sum(dim=1)
        none = self.costs.new_zeros(self.shape[0])
        sums = none.index_add(0, self.owner[at], tokens)
        return sums / none.index_add(0, self.owner[at], self.counts[at].to(none.dtype))

    def length_normalised(self, right: Tensor) -> Tensor:
        """Cross entropy of the right choice, by the mean log probability of each."""
        found: Tensor = -self.scores(True).log_softmax(dim=1).gather(1, right[:, None])[:, 0]
        return found


def _right(examples: Sequence[Example]) -> list[int]:
    """The numbers of the right choices."""
    return [example.about.index(example.target) for example in examples]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _shares(scores: Mapping[str, float | None]) -> dict[str, float]:
    """The softmax over the scores of choices; nothing where one is no number."""
    known = [score for score in scores.values() if score is not None and math.isfinite(score)]
    if len(known) < len(scores):
        return {}
    powers = [math.exp(score - max(known)) for score in known]
    return {name: power / sum(powers) for name, power in zip(scores, powers, strict=True)}


def _short(name: str) -> str:
    return name if len(name) <= _LONG else f"{name[:_LONG]}..."


def _tokens(
    tokenizer: PreTrainedTokenizerBase, row: Question, max_length: int, where: str
) -> tuple[list[int], list[list[int]], bool]:
    """Ids of a prompt, of each choice behind it, and whether the prompt was cut: what is left out is its beginning.

    A space at the end of a prompt is read with the choices, as it was in the text that models learnt from, and no token
    reaches from one into the other.
    """
    prompt = row.prompt.rstrip(" ")
    gap = row.prompt[len(prompt) :]
    asked, offsets = tokens_of(tokenizer, prompt)
    answers = []
    for name, word in zip(row.names, row.words, strict=True):
        whole, _ = tokens_of(tokenizer, prompt + gap + word)
        apart = whole[: len(asked)] != asked
        answers.append(tokens_of(tokenizer, gap + word, special=False)[0] if apart else whole[len(asked) :])
        if not answers[-1]:
            raise TanzakuError(f"{where}: the choice {name!r} gives no tokens; fix or drop the row")
    special = next((at for at, (start, end) in enumerate(offsets) if end > start), len(asked))
    if special == len(asked):
        raise TanzakuError(f"{where}: {prompt[:40]!r} gives no tokens to ask with; fix or drop the row")
    over = len(asked) + (longest := max(map(len, answers))) - max_length
    if over > len(asked) - special - 1:
        raise TanzakuError(
            f"{where} has a choice of {longest} tokens, and max_length {max_length} leaves no room for a prompt; use "
            f"--max-length {longest + special + 1} or more"
        )
    return [*asked[:special], *asked[special + max(over, 0) :]], answers, over > 0


def _apart(
    tokenizer: PreTrainedTokenizerBase, row: Question, max_length: int, where: str
) -> tuple[list[int], list[list[int]], bool]:
    """The same for an encoder, which reads the prompt, and a decoder, which has each answer and what ends it; without
    white space at their ends."""
    asked, offsets = tokenizer(row.prompt.strip(), verbose=False)["input_ids"], tokens_of(tokenizer, row.prompt)[1]
    begin = next((at for at, (start, end) in enumerate(offsets) if end > start), len(offsets))
    if begin == len(offsets):
        raise TanzakuError(f"{where}: {row.prompt[:40]!r} gives no tokens to ask with; fix or drop the row")
    answers = []
    for name, word in zip(row.names, row.words, strict=True):
        if not tokenizer(text_target=word.strip(), add_special_tokens=False, verbose=False)["input_ids"]:
            raise TanzakuError(f"{where}: the choice {name!r} gives no tokens; fix or drop the row")
        answers.append(ended(tokenizer, tokenizer(text_target=word.strip(), verbose=False)["input_ids"]))
    over = len(asked) - max_length
    if over >= len(asked) - begin - 1:
        raise TanzakuError(f"{where}: max_length {max_length} leaves no room for a prompt; use a larger --max-length")
    return [*asked[:begin], *asked[begin + max(over, 0) :]], answers, over > 0
