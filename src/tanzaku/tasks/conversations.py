"""Rows of text to be written, in the shapes that people have them: prompts and completions, conversations (`messages`,
or ShareGPT's `conversations`), Alpaca's instructions, or plain text; and which characters of each are learnt.

Columns have the names of TRL, LLaMA-Factory and `datasets`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal

from tanzaku.errors import TanzakuError, flag, listed, nearest
from tanzaku.tasks.cells import missing, short
from tanzaku.tasks.text import check_characters

if TYPE_CHECKING:
    from tanzaku.tasks.data import Table

Shape = Literal["pairs", "chat", "instructions", "text"]
Message = dict[str, Any]
Span = tuple[int, int]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool", "tool": "tool"}
_SHAREGPT |= {"user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Rendered:
    """A row as the model is to read it.

    Args:
        text: all of it. learnt: of its characters, those that are learnt, in order; none of a row to predict.
        prompt: characters before the last part that is learnt. reference: that part, as a person reads it.
        special: whether the tokenizer's special tokens are still to be put around it.
    """

    text: str
    learnt: tuple[Span, ...]
    prompt: int
    reference: str
    special: bool


def shape_of(table: Table, data: Any) -> Shape:
    """Which shape rows have, by the columns that there are.

    Raises:
        TanzakuError: none; what was looked for.
    """
    # A column in which no row has anything is no sign of a shape, unless nothing else is one.
    there = table.columns
    for names in ([name for name in there if not all(map(missing, there[name]))], there):
        if any(name in names for name in _conversations(data)):
            return "chat"
        if data.prompt in names and data.completion in names:
            return "pairs"
        if data.instruction in names and data.output in names:
            return "instructions"
        if data.text in names:
            return "text"
    keys = ("prompt", "completion", "messages", "instruction", "output", "text")
    meant = [f"{found}; say so with {flag(key)}" for key in keys if (found := nearest(getattr(data, key), there))]
    raise TanzakuError(
        f"{table.source} has the columns {listed(there)}; expected {data.prompt} and {data.completion}, "
        f"{data.messages}, {data.instruction} and {data.output}, or {data.text}{next(iter(meant), '')}"
    )


def conversation_column(table: Table, data: Any) -> str | None:
    """The column of messages, under the name that is given or ShareGPT's; of two, one that has some."""
    names = [name for name in _conversations(data) if name in table.columns]
    return next((name for name in names if not all(map(missing, table.columns[name]))), next(iter(names), None))


def _conversations(data: Any) -> tuple[str, ...]:
    return data.messages, "conversations"


# -- cells


def words_in(value: Any, where: str, empty: bool = False) -> str:
    """A cell that is text.

    Args:
        empty: whether there may be none.
    """
    if missing(value) or (isinstance(value, str) and not value.strip()):
        if empty:
            return ""
        raise TanzakuError(f"{where} has no text; fill it in or drop the row")
    if not isinstance(value, str):
        raise TanzakuError(f"{where} is {str(value)[:40]} ({type(value).__name__}), expected text")
    check_characters(value, where)
    return value


def messages_in(value: Any, where: str) -> list[Message]:
    """A conversation in a cell: a list of messages with role and content, of ShareGPT's with from and value, or either
    as JSON writes it."""
    if missing(value):
        raise TanzakuError(f"{where} has no messages; fill it in or drop the row")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise TanzakuError(f"{where} is {value[:40]!r}, expected a list of messages as JSON writes it") from None
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise TanzakuError(f"{where} is a {type(value).__name__}, expected a list of messages")
    if not value:
        raise TanzakuError(f"{where} has no messages; fill it in or drop the row")
    return [_message(each, f"{where} message {number}") for number, each in enumerate(value, 1)]


def _message(each: Any, where: str) -> Message:
    if not isinstance(each, Mapping):
        raise TanzakuError(f"{where} is {short(each)}, expected role and content")
    if "from" in each and "role" not in each:
        role, content = _SHAREGPT.get(str(each["from"])), each.get("value")
        if role is None:
            raise TanzakuError(
                f"{where} is from {each['from']!r}{nearest(str(each['from']), _SHAREGPT)}, expected {listed(_SHAREGPT)}"
            )
        rest: dict[str, Any] = {}
    else:
        role, content = each.get("role"), each.get("content")
        rest = {key: entry for key, entry in each.items() if key not in ("role", "content") and entry is not None}
        if role not in ROLES:
            raise TanzakuError(f"{where} has the role {role!r}{nearest(str(role), ROLES)}, expected {listed(ROLES)}")
    if content is None and rest.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise TanzakuError(f"{where} has the content {short(content)}, expected text")
    check_characters(content, where)
    return {**rest, "role": role, "content": content}


# -- what the model reads


class Reader:
    """Rows of one shape as the model reads them.

    Args:
        template: renders messages, and what an answer begins with if it is told so; None: the tokenizer has none.
        marks: special tokens. end: the one that ends a completion which no template ends.
    """

    def __init__(
        self, template: Callable[[list[Message], bool], str] | None, marks: Sequence[str], end: str, model: str
    ):
        self.template, self.marks, self.end, self.model = template, marks, end, model

    def pair(self, prompt: str, completion: str | None) -> Rendered:
        """A prompt, and what is to be written on from it."""
        if completion is None:
            return Rendered(prompt, (), len(prompt), "", special=True)
        said = completion.removesuffix(self.end)
        text = prompt + said + self.end
        return Rendered(text, ((len(prompt), len(text)),), len(prompt), said.strip(), special=True)

    def plain(self, text: str, learnt: bool) -> Rendered:
        """A text that is learnt whole."""
        if not learnt:
            return Rendered(text, (), len(text), "", special=True)
        whole = text if text.endswith(self.end) else text + self.end
        return Rendered(whole, ((0, len(whole)),), 0, "", special=True)

    def conversation(self, messages: list[Message], where: str, learnt: bool) -> Rendered:
        """Messages through the tokenizer's template; what assistants say is learnt.

        Which characters these are is seen by rendering the conversation up to each of them, since few templates mark
        them. Where one is rendered otherwise when others follow (as thoughts that a template leaves out later), it is
        not learnt there.

        Raises:
            TanzakuError: begins with `where`; there is no template, it refuses the messages, or shows no answer of an
                assistant.
        """
        if not learnt:
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            if not messages:
                raise TanzakuError(f"{where} has no message before the assistant's; expected one to answer")
            text = self._render(messages, True, where)
            return Rendered(text, (), len(text), "", special=False)
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise TanzakuError(f"{where} has no message of the assistant, so nothing in it is learnt; drop the row")
        messages = messages[: answers[-1] + 1]
        text = self._render(messages, False, where)
        spans: dict[int, Span] = {}
        for at in answers:
            if not at:  # nothing is asked, and what stands before it is the template's
                continue
            before = self._render(messages[:at], True, where)
            # What closes a whole conversation does not stand behind an answer that others follow.
            until = self._render(messages[: at + 1], False, where)
            end = len(commonprefix([text, until]))  # noqa: RUF071 - of characters
            if text.startswith(before) and messages[at]["content"].strip() in text[len(before) : end]:
                spans[at] = len(before), end
        if answers[-1] not in spans:
            raise TanzakuError(
                f"{where}: the chat template of {self.model} does not show the assistant's last message "
                f"{short(messages[-1]['content'])} behind what comes before it, so nothing of it would be learnt"
            )
        more = self._render([*messages, {"role": "user", "content": "?"}], False, where, "")
        whole = text + self._end(text, more) if more.startswith(text) else text
        found = {
            at: (start, end + len(self._end(whole[start:end], whole[start:]))) for at, (start, end) in spans.items()
        }
        start, end = found[answers[-1]]
        return Rendered(whole[:end], tuple(found.values()), start, messages[-1]["content"].strip(), special=False)

    def _end(self, answer: str, followed: str) -> str:
        """What ends an answer where that is the mark of whoever speaks next, as some models have it; else nothing."""
        if any(answer.rstrip().endswith(mark) for mark in self.marks):
            return ""
        rest = followed[len(answer) :]
        space = rest[: len(rest) - len(rest.lstrip())]
        return next((space + mark for mark in self.marks if rest.lstrip().startswith(mark)), "")

    def _render(self, messages: list[Message], asking: bool, where: str, otherwise: str | None = None) -> str:
        if self.template is None:
            raise TanzakuError(
                f"{where}: the tokenizer of {self.model} has no chat template, which messages need; give rows with "
                "prompt and completion, or another model"
            )
        try:
            return self.template(messages, asking)
        except Exception as error:  # what a template raises is its author's choice
            if otherwise is not None:
                return otherwise
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise TanzakuError(f"{where}: the chat template of {self.model} refuses it: {said[0]}") from None
