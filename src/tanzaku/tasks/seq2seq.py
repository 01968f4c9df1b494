"""Sequence to sequence: an encoder-decoder (T5, BART, Marian, ...) learns to write a target for a source."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.support.targets import IGNORED
from tanzaku.tasks.cells import missing, short
from tanzaku.tasks.conversations import words_in
from tanzaku.tasks.sampling import OVERRIDES, Decoding
from tanzaku.tasks.settings import Override
from tanzaku.tasks.task import DECODED, Batch, Example, Split
from tanzaku.tasks.text import padded
from tanzaku.tasks.text_metrics import writing_of
from tanzaku.tasks.written import Row, WrittenSettings, WrittenTask, check_lengths, numbers_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tanzaku.engine.text_head import Hidden
    from tanzaku.tasks.data import Table

_OWN = ("source", "source_prefix", "source_lang", "target_lang")  # kept for prediction


class Seq2SeqSettings(WrittenSettings):
    """Columns of sources and targets, and what stands before both."""

    options: ClassVar[frozenset[str]] = WrittenSettings.options | {
        "source_prefix",
        "max_target_length",
        "source_lang",
        "target_lang",
    }

    source: str = Field(default="source", min_length=1, description="column of what is read")
    target: str = Field(default="target", min_length=1, description="column of what is to be written for it")
    source_prefix: str = Field(default="", description='text before each source, such as "summarize: " (T5)')
    max_target_length: int = Field(default=128, ge=1, description="tokens of a target at most, counted")
    source_lang: str | None = Field(
        default=None, min_length=1, description="language of the sources, as the tokenizer calls it (mBART, NLLB)"
    )
    target_lang: str | None = Field(default=None, min_length=1, description="language of the targets")


@dataclass(frozen=True)
class Seq2Seq(WrittenTask):
    """A target that is written for a source. The loss is of the target's tokens, with what ends it.

    Args:
        source: the column that is read. source_prefix: text before each.
        source_lang, target_lang: of a tokenizer that marks texts with their language.
        opening: a target's tokens, and of these, how many a tokenizer puts before any text.
    """

    source: str = "source"
    source_prefix: str = ""
    source_lang: str | None = None
    target_lang: str | None = None
    opening: tuple[tuple[int, ...], int] = ((), 0)

    name = "seq2seq"
    summary = "a text for another one (translation, summaries), by an encoder-decoder"
    auto_class = "AutoModelForSeq2SeqLM"
    peft_type = "SEQ_2_SEQ_LM"
    Data = Seq2SeqSettings
    reading: ClassVar[tuple[str, ...]] = ("source",)
    overrides: ClassVar[Mapping[str, Override]] = {
        "source": Override("TEXT", "column of what is read (as in training)"),
        "source_prefix": Override("TEXT", "text before each source (as in training)"),
        "source_lang": Override("TEXT", "language of the sources (as in training)"),
        "target_lang": Override("TEXT", "language of the targets (as in training)"),
        **OVERRIDES,
    }

    # -- rows

    @classmethod
    def learn(cls, tables: Mapping[str, Table], data: Any) -> Seq2Seq:
        task = cls(**{key: getattr(data, key) for key in _OWN}, sample=data.sample)
        references: list[str] = []
        for table in tables.values():
            if not len(table):
                raise TanzakuError(f"{table.source} has no rows; expected at least one")
            references += [target for _, _, target in task._rows(table, data)]
        decoding = Decoding(max_new_tokens=data.max_new_tokens)
        return replace(task, decoding=decoding, writing=writing_of(references))

    def _rows(self, table: Table, data: Any = None) -> Iterator[tuple[str, str, str]]:
        """Of each row where it stands, its source, and its target, where `data` says the column.

        Raises:
            TanzakuError: no such column, or a cell without text.
        """
        sources = table.column(self.source, "source")
        targets = [""] * len(table) if data is None else table.column(data.target, "target")
        for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1):
            where = f"{table.source} row {number}"
            source = words_in(source, f"{where}: column {self.source!r}")
            if data is not None:
                target = words_in(target, f"{where}: column {data.target!r}")
            yield where, source, target

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,)

    @classmethod
    def targets(cls, table: Table, data: Any) -> list[str]:
        return [short(target) for _, _, target in cls(source=data.source)._rows(table, data)]

    def check_cell(self, value: Any, where: str) -> None:
        if not self.blank(value):
            words_in(value, where)

    def blank(self, value: Any) -> bool:
        return missing(value) or (isinstance(value, str) and not value.strip())

    def have_tokens(self, values: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        found = tokenizer(list(values), add_special_tokens=False, verbose=False)["input_ids"] if values else []
        return [bool(ids) for ids in found]

    def told_by(self, tokenizer: PreTrainedTokenizerBase) -> Seq2Seq:
        self._speak(tokenizer)
        ids, bare = (tokenizer(text_target="a", add_special_tokens=own)["input_ids"] for own in (True, False))
        before = next((at for at in range(len(ids)) if bare and ids[at : at + len(bare)] == bare), 0)
        return replace(self, tokenizer=tokenizer, opening=(tuple(ended(tokenizer, ids)), before))

    def tokens_of(self, references: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(text_target=references, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return found

    def _speak(self, tokenizer: Any) -> None:
        """Have a tokenizer that marks texts with their language know those of sources and targets.

        Raises:
            TanzakuError: it does not know them, was not told, or has no languages.
        """
        asked = {"source_lang": self.source_lang, "target_lang": self.target_lang}
        kind = type(tokenizer).__name__
        if not hasattr(tokenizer, "src_lang"):
            if told := [f"{key} {value!r}" for key, value in asked.items() if value is not None]:
                raise TanzakuError(f"the tokenizer {kind} marks no languages, found {listed(told)}; leave them out")
            return
        known = getattr(tokenizer, "lang_code_to_id", None) or {}
        for (key, value), own in zip(asked.items(), ("src_lang", "tgt_lang"), strict=True):
            if value is None:
                flags = "--source-lang and --target-lang"
                example = f", such as {listed(list(known)[:3])}" if known else ""
                raise TanzakuError(f"the tokenizer {kind} marks texts with their language; give {flags}{example}")
            token = tokenizer.convert_tokens_to_ids(value)
            names = {value, f"__{value}__"}
            if not (names & {*known} if known else token not in (None, tokenizer.unk_token_id)):
                raise TanzakuError(f"the tokenizer {kind} knows no language {value!r}{nearest(value, known)} ({key})")
            setattr(tokenizer, own, value)

    def encode(
        self, table: Table, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, targets: Any = None
    ) -> Split:
        self._speak(tokenizer)
        rows = list(self._rows(table, targets))
        places = [where for where, _, _ in rows]
        texts = [source for _, source, _ in rows]
        asked = [f"{self.source_prefix}{source}" for source in texts]
        _check_room(tokenizer, "max_length", max_length)
        sources, long = _cut(lambda some, **cut: tokenizer(some, **cut), asked, places, max_length)
        bare = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for where, ids in zip(places, bare, strict=True):
            if not ids:
                raise TanzakuError(f"{where}: column {self.source!r} gives no tokens; fix or drop the row")
        if targets is None:
            examples = [Example({"input_ids": ids}, about=Row(ids)) for ids in sources]
            return Split(name, examples, texts, len(long), table.source)
        most = targets.max_target_length
        _check_room(tokenizer, "max_target_length", most)
        references = [target for _, _, target in rows]
        goals, over = _cut(
            lambda some, **cut: tokenizer(text_target=some, **cut),
            references,
            places,
            most,
            partial(ended, tokenizer),
        )
        if targets.too_long == "error":
            check_lengths(long, len(rows), table.source, max_length)
            check_lengths(over, len(rows), table.source, most, "max_target_length", "tokens of the target")
        examples = [
            Example({"input_ids": ids, DECODED: own}, reference.strip(), float(len(own)), about=Row(ids, own))
            for ids, own, reference in zip(sources, goals, references, strict=True)
        ]
        cut = numbers_of([*long, *over])
        allowed = f"{max_length} tokens, or {most} of a target"
        return Split(name, examples, texts, len(cut), table.source, long=cut, allowed=allowed)

    def learnt(self, example: Example) -> list[bool]:
        return [*[False] * example.length, *[True] * example.decoder_length]

    def collate(self, examples: Sequence[Example], pad_token_id: int, width: int = 0, decoder_width: int = 0) -> Batch:
        import torch

        inputs = padded(examples, pad_token_id, width)
        if all(example.target is None for example in examples):
            return Batch.of(inputs, {}, examples)
        rows = [example.about.labels for example in examples]
        decoder_width = max(decoder_width, *map(len, rows))
        labels = torch.tensor([[*row, *[IGNORED] * (decoder_width - len(row))] for row in rows], dtype=torch.int64)
        return Batch.of({**inputs, DECODED: labels}, {"goals": labels}, examples)

    # -- the model

    def check_model(self, config: Any) -> None:
        if not getattr(config, "is_encoder_decoder", False):
            raise TanzakuError(
                f"the model ({config.model_type}) is no encoder-decoder, which task seq2seq trains; expected one such "
                "as T5 or BART, or use task: generation"
            )

    def run(self, model: Any, inputs: dict[str, Any]) -> Hidden:
        return super().run(model, decoded(model, inputs))

    # -- text that is written

    def begins(self, model: Any) -> Sequence[int]:
        import torch

        ids, before = self.opening
        if not ids:
            return ()
        found: list[int] = shifted(model, torch.tensor([ids]))[0, : before + 1].tolist()
        return found

    def typed(self, converses: bool) -> Seq2Seq:
        if converses:
            raise TanzakuError("task seq2seq reads a source as it is, and no conversation; leave --template out")
        return self

    # -- files and tables

    def to_json(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in _OWN}, **super().to_json()}

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> Seq2Seq:
        own: dict[str, Any] = {key: about.get(key) for key in _OWN}
        for key, value in own.items():
            if not isinstance(value, str) and (value is not None or not key.endswith("_lang")):
                raise TanzakuError(f"{where}{key} is {short(value)}, expected text")
        return cls(**own, **cls.how(about, where))

    @classmethod
    def of_base(cls, config: Any, width: int | None, asked: Mapping[str, Any], path: str, base: str) -> Seq2Seq:
        return cls(**{key: asked[key] for key in _OWN if key in asked}, decoding=cls.asked_for(asked))

    def describe(self) -> str:
        return "targets"

    def answers(self) -> str:
        return "It writes a text for another one."


def ended(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], most: int | None = None) -> list[int]:
    """A target's tokens with one that ends it, where a tokenizer puts none there."""
    end = tokenizer.eos_token_id
    if end is None or end in ids[-2:]:  # before the language, in some
        return [*ids]
    return [*ids[: None if most is None else most - 1], int(end)]


def decoded(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder-decoder is given for rows whose decoder is to write `DECODED`."""
    labels = inputs[DECODED]
    read = {key: value for key, value in inputs.items() if key != DECODED}
    # The decoder looks back alone: what is padded is hidden for those who ask which tokens are a row's own.
    decoder = {"decoder_input_ids": shifted(model, labels), "decoder_attention_mask": (labels != IGNORED).long()}
    return {**read, **decoder}


def shifted(model: Any, labels: Tensor) -> Tensor:
    """What the decoder of a model reads to foretell `labels` (rows, tokens; -100: none), by the model's own rule."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    try:
        if own is None:
            rule = vars(sys.modules[type(model).__module__])["shift_tokens_right"]
            config = model.config
            own = partial(rule, pad_token_id=config.pad_token_id, decoder_start_token_id=config.decoder_start_token_id)
        found: Tensor = own(labels)
    except (KeyError, TypeError, ValueError) as error:  # no such rule, or a config that it needs more of
        raise TanzakuError(
            f"{type(model).__name__} does not say what its decoder reads for a target ({error}); expected an "
            "encoder-decoder such as T5 or BART, with its decoder_start_token_id and pad_token_id"
        ) from None
    return found


def _check_room(tokenizer: PreTrainedTokenizerBase, key: str, most: int) -> None:
    special = tokenizer.num_special_tokens_to_add()
    if most <= special:
        room = f"no room for text beside {special} special tokens"
        raise TanzakuError(f"{key} {most} leaves {room}; expected at least {special + 1}")


def _cut(
    encode: Callable[..., Any],
    texts: Sequence[str],
    places: Sequence[str],
    most: int,
    ended: Callable[[Sequence[int], int | None], list[int]] = lambda ids, most: [*ids],
) -> tuple[list[list[int]], list[tuple[str, int]]]:
    """Texts as tokens, special ones included, cut behind so many; and which were longer, with their lengths.

    Args:
        ended: tokens with what ends them, so many at most.
    """
    whole = [ended(ids, None) for ids in encode(list(texts), return_attention_mask=False, verbose=False)["input_ids"]]
    long = [(where, len(ids)) for where, ids in zip(places, whole, strict=True) if len(ids) > most]
    if not long:
        return whole, long
    cut = encode(list(texts), truncation=True, max_length=most, return_attention_mask=False)["input_ids"]
    return [ended(ids, most) for ids in cut], long
