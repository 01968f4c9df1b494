"""Generation: a causal language model learns to write what follows a prompt (instruction tuning)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from tanzaku.errors import TanzakuError, listed
from tanzaku.support.targets import IGNORED
from tanzaku.tasks.cells import missing, short
from tanzaku.tasks.conversations import (
    Reader,
    Rendered,
    Shape,
    conversation_column,
    messages_in,
    shape_of,
    words_in,
)
from tanzaku.tasks.sampling import Decoding
from tanzaku.tasks.task import Batch, Example, Split
from tanzaku.tasks.text import check_places, padded, tokens_of
from tanzaku.tasks.text_metrics import writing_of
from tanzaku.tasks.written import Row, WrittenSettings, WrittenTask, check_lengths, numbers_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tanzaku.tasks.data import Table

# By shape, what is read of a row: the first always, others where they are.
_ROLES: Mapping[str, tuple[str, ...]] = {
    "pairs": ("prompt",),
    "chat": ("messages",),
    "instructions": ("instruction", "input", "system"),
    "text": ("text",),
}


class GenerationSettings(WrittenSettings):
    """Columns of prompts and completions, of conversations, of instructions, or of text."""

    prompt: str = Field(default="prompt", min_length=1, description="column of what is written on from")
    completion: str = Field(default="completion", min_length=1, description="column of what is to be written")
    messages: str = Field(
        default="messages", min_length=1, description="column of conversations, for the chat template"
    )
    instruction: str = Field(default="instruction", min_length=1, description="column of instructions (Alpaca)")
    input: str = Field(default="input", min_length=1, description="column of what an instruction is about, if any")
    output: str = Field(default="output", min_length=1, description="column of answers to instructions")
    system: str = Field(default="system", min_length=1, description="column of what stands before a conversation")
    text: str = Field(default="text", min_length=1, description="column of text that is learnt whole")


@dataclass(frozen=True)
class Generation(WrittenTask):
    """Text that is written on from a prompt. The loss is of completions alone, and of all tokens of plain text.

    Args:
        shape: of the rows. read: by role, the names of the columns that are read.
    """

    shape: Shape
    read: Mapping[str, str]

    name = "generation"
    summary = "text that follows a prompt"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    Data = GenerationSettings

    # -- rows

    @classmethod
    def learn(cls, tables: Mapping[str, Table], data: Any) -> Generation:
        shape = shape_of(tables["train"], data)
        read = _columns(tables["train"], data, shape)
        task = cls(shape, read, decoding=Decoding(max_new_tokens=data.max_new_tokens), sample=data.sample)
        references: list[str] = []
        for table in tables.values():
            if not len(table):
                raise TanzakuError(f"{table.source} has no rows; expected at least one")
            references += [task._reference(row) for row in task._rows(table, data)]
        return replace(task, writing=writing_of(references))

    def _rows(self, table: Table, data: Any = None) -> Iterator[tuple[str, dict[str, Any], Any]]:
        """Of each row where it stands, what is read of it by role, and what is to be written, where `data` says the
        columns.

        Raises:
            TanzakuError: a cell that is missing, or none of its kind.
        """
        columns = [
            table.column(name) if at == 0 or name in table.columns else [None] * len(table)
            for at, name in enumerate(self.read.values())
        ]
        answers: Sequence[Any] = [None] * len(table)
        if data is not None and self.shape in ("pairs", "instructions"):
            key = "completion" if self.shape == "pairs" else "output"
            answers = table.column(getattr(data, key), key)
        for number, (*cells, answer) in enumerate(zip(*columns, answers, strict=True), 1):
            where = f"{table.source} row {number}"
            own = {
                role: self._cell(cell, f"{where}: column {name!r}", empty=role in ("input", "system"))
                for cell, (role, name) in zip(cells, self.read.items(), strict=True)
            }
            if data is not None and self.shape in ("pairs", "instructions"):
                answer = words_in(answer, f"{where}: column {getattr(data, key)!r}")
            yield where, own, answer

    def _cell(self, value: Any, where: str, empty: bool = False) -> Any:
        return messages_in(value, where) if self.shape == "chat" else words_in(value, where, empty)

    def _reference(self, row: tuple[str, dict[str, Any], Any]) -> str:
        _, cells, answer = row
        if self.shape == "chat":
            said = [message["content"] for message in cells["messages"] if message["role"] == "assistant"]
            return str(said[-1]) if said else ""
        return str(cells["text"] if self.shape == "text" else answer)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(self.read.values())

    @property
    def required(self) -> tuple[str, ...]:
        return self.reads[:1]

    @property
    def needs(self) -> tuple[str, ...]:
        return self.required

    @classmethod
    def targets(cls, table: Table, data: Any) -> list[str]:
        task = cls(shape := shape_of(table, data), _columns(table, data, shape))
        return [short(task._reference(row)) for row in task._rows(table, data)]

    def check_cell(self, value: Any, where: str) -> None:
        if not self.blank(value):
            self._cell(value, where)

    def blank(self, value: Any) -> bool:
        return (
            missing(value)
            or (isinstance(value, str) and not value.strip())
            or (isinstance(value, Sized) and not len(value))
        )

    def have_tokens(self, values: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
        if self.shape == "chat":
            return [True] * len(values)
        found = tokenizer(list(values), add_special_tokens=False, verbose=False)["input_ids"] if values else []
        return [bool(ids) for ids in found]

    def encode(
        self, table: Table, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, targets: Any = None
    ) -> Split:
        reader = _reader(tokenizer)
        examples, texts = [], []
        long: list[tuple[str, int]] = []
        for where, cells, answer in self._rows(table, targets):
            row = self._rendered(reader, cells, answer, where, targets is not None)
            ids, labels, asked = _tokens(tokenizer, row)
            if not ids:
                raise TanzakuError(f"{where} gives no tokens; fix or drop the row")
            if len(ids) > max_length:
                long.append((where, len(ids)))
                ids, labels = ids[:max_length], labels[:max_length]
            asked = asked[-max_length:]  # what was asked last stays
            texts.append(row.text[: row.prompt] or row.text)
            if targets is None:
                examples.append(Example({"input_ids": asked}, about=Row(asked)))
                continue
            learnt = sum(label != IGNORED for label in labels[1:])  # nothing foretells the first
            if not learnt and not (long and long[-1][0] == where and targets.too_long != "cut"):
                cut = f" in its first {max_length} tokens" if long and long[-1][0] == where else ""
                raise TanzakuError(f"{where} has no token that is learnt{cut}; drop the row, or raise --max-length")
            examples.append(Example({"input_ids": ids}, row.reference, float(max(learnt, 1)), about=Row(asked, labels)))
        if targets is not None and targets.too_long == "error":
            check_lengths(long, len(examples), table.source, max_length)
        allowed = f"{max_length} tokens"
        return Split(name, examples, texts, len(long), table.source, long=numbers_of(long), allowed=allowed)

    def learnt(self, example: Example) -> list[bool]:
        return [label != IGNORED for label in example.about.labels]

    def _rendered(self, reader: Reader, cells: dict[str, Any], answer: Any, where: str, learnt: bool) -> Rendered:
        if self.shape == "pairs":
            return reader.pair(cells["prompt"], answer)
        if self.shape == "text":
            return reader.plain(cells["text"], learnt)
        if self.shape == "chat":
            return reader.conversation(cells["messages"], where, learnt)
        asked = "\n".join(filter(None, (cells["instruction"], cells.get("input"))))
        messages = [{"role": "user", "content": asked}]
        if cells.get("system"):
            messages.insert(0, {"role": "system", "content": cells["system"]})
        if learnt:
            messages.append({"role": "assistant", "content": answer})
        return reader.conversation(messages, where, learnt)

    def collate(self, examples: Sequence[Example], pad_token_id: int, width: int = 0, decoder_width: int = 0) -> Batch:
        import torch

        inputs = padded(examples, pad_token_id, width)
        if all(example.target is None for example in examples):
            return Batch.of(inputs, {}, examples)
        # A token's target is its successor.
        goals = torch.full_like(inputs["input_ids"], IGNORED)
        for row, example in enumerate(examples):
            goals[row, : example.length - 1] = torch.tensor(example.about.labels[1:], dtype=torch.int64)
        return Batch.of(inputs, {"goals": goals}, examples)

    # -- the model

    def check_model(self, config: Any) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise TanzakuError(
                f"the model ({config.model_type}) is an encoder-decoder, and task generation trains causal language "
                "models; use task: seq2seq"
            )

    # -- text that is written

    def probe(self, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Split | None:
        whole, own = (tokens_of(tokenizer, text, special)[0] for special in (True, False))
        before = whole[: len(whole) - len(own)]  # what stands before any text, such as <s>
        size = max_length - len(before)
        rows = []
        for start in range(0, len(own), max(size, 1)):
            labels = [IGNORED] * len(before) + own[start : start + size]
            ids = [*before, *own[start : start + size]]
            if learnt := sum(label != IGNORED for label in labels[1:]):
                rows.append(Example({"input_ids": ids}, "", float(learnt), about=Row((), labels)))
        return Split("held", rows, [""] * len(rows), 0, "the held text") if rows else None

    @property
    def writes(self) -> bool:
        return self.shape != "text"

    @property
    def converses(self) -> bool:
        return self.shape in ("chat", "instructions")

    def typed(self, converses: bool) -> Generation:
        name = "messages" if converses else "prompt"
        return replace(self, shape="chat" if converses else "pairs", read={name: name})

    # -- files and tables

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "read": dict(self.read),
            **super().to_json(),
        }

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> Generation:
        shape, read = about.get("shape"), about.get("read")
        if shape not in _ROLES:
            raise TanzakuError(f"{where}shape is {short(shape)}, expected {listed(_ROLES)}")
        roles = _ROLES[cast(Shape, shape)]
        if not isinstance(read, dict) or not {roles[0]} <= read.keys() <= {*roles}:
            raise TanzakuError(f"{where}read is {short(read)}, expected names of columns by {listed(roles)}")
        if not all(isinstance(name, str) for name in read.values()):
            raise TanzakuError(f"{where}read is {short(read)}, expected names of columns")
        return cls(cast(Shape, shape), read, **cls.how(about, where))

    @classmethod
    def of_base(cls, config: Any, width: int | None, asked: Mapping[str, Any], path: str, base: str) -> Generation:
        return cls("pairs", {"prompt": "prompt"}, decoding=cls.asked_for(asked))

    def describe(self) -> str:
        return {"pairs": "completions", "chat": "answers", "instructions": "answers", "text": "text"}[self.shape]

    def answers(self) -> str:
        return "It writes text that follows a prompt."


def _columns(table: Table, data: Any, shape: Shape) -> dict[str, str]:
    """By role, the columns that rows of a shape are read from."""
    if shape == "chat":
        return {"messages": str(conversation_column(table, data))}
    named = {role: str(getattr(data, role)) for role in _ROLES[shape]}
    first = _ROLES[shape][0]
    return {role: name for role, name in named.items() if role == first or name in table.columns}


def _reader(tokenizer: PreTrainedTokenizerBase) -> Reader:
    check_places(tokenizer, Generation.name)

    def template(messages: list[dict[str, Any]], asking: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))

    has = getattr(tokenizer, "chat_template", None) is not None
    marks = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return Reader(template if has else None, marks, tokenizer.eos_token or "", repr(tokenizer.name_or_path))


def _tokens(tokenizer: PreTrainedTokenizerBase, row: Rendered) -> tuple[list[int], list[int], list[int]]:
    """A row's ids, what is learnt of them (-100: nothing), and the ids that are written on from: those that its prompt
    has by itself, so that it is asked as it was learnt."""
    asked, _ = tokens_of(tokenizer, row.text[: row.prompt], row.special)
    if not row.learnt:
        return asked, [IGNORED] * len(asked), asked
    edges = sorted({0, len(row.text), *(first for first, _ in row.learnt)})
    ids, offsets = tokens_of(tokenizer, row.text, row.special)
    if ids[: len(asked)] != asked or any(start < edge < end for start, end in offsets for edge in edges):
        # A token would reach from what is given into what is learnt: each part has tokens of its own.
        ids, offsets = [], []
        for first, last in pairwise(edges):
            part, own = tokens_of(tokenizer, row.text[first:last], row.special and not first)
            ids += part
            offsets += [(first + start, first + end) for start, end in own]
        asked = ids[: sum(end <= row.prompt for _, end in offsets)]
    learnt = [end > start and any(a <= start and end <= b for a, b in row.learnt) for start, end in offsets]
    return ids, [token if own else IGNORED for token, own in zip(ids, learnt, strict=True)], asked
