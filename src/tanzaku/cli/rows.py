"""Rows as the model reads them, token by token, and which of their tokens are learnt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tanzaku.cli.display import Display
from tanzaku.errors import printable
from tanzaku.tasks.task import DECODED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tanzaku.tasks.prepare import Tables
    from tanzaku.tasks.task import Split

SHOWN = 3  # rows of a data card
_WIDE, _LONG = 200, 40  # characters of a row, or of tokens that are learnt or not, and of a target
_BROKEN = "\ufffd"  # what a tokenizer makes of a character whose other bytes are in the next token


def show_rows(
    display: Display, read: Tables, split: Split | None, tokenizer: PreTrainedTokenizerBase | None, count: int
) -> None:
    """Print the first training rows; in words where there is no tokenizer."""
    if not count:
        return
    targets = read.task.targets(read.tables["train"], read.data)
    if split is not None:
        targets = [targets[split.number(row) - 1] for row in range(len(split.examples[:count]))]
    if split is None or tokenizer is None:
        display.say("\nthe first rows")
        for target, row in zip(targets[:count], words(read, "train"), strict=False):
            display.say(f"{_cut(target, _LONG)}: {_cut(' | '.join(row), _WIDE)}")
        return
    learnt = [read.task.learnt(example) for example in split.examples[:count]]
    one = "the first row, token by token as the model reads it"
    many = "the first rows, token by token as the model reads them"
    marks = "" if all(each is None for each in learnt) else f"; what is learnt is {display.marking}"
    display.say(f"\n{many if len(learnt) > 1 else one}{marks}")
    for target, example, of_tokens in zip(targets, split.examples, learnt, strict=False):
        ids = [*next(iter(example.inputs.values())), *example.inputs.get(DECODED, ())]
        if of_tokens is None:
            display.say(f"{_cut(target, _LONG)}: {_cut('|'.join(pieces(tokenizer, ids)), _WIDE)}")
            continue
        parts = []
        for is_learnt, some in groupby(zip(ids, of_tokens, strict=True), key=lambda pair: pair[1]):
            parts.append((_middle_out(list(pieces(tokenizer, [token for token, _ in some]))), is_learnt))
        display.marked(parts, between="|")


def _words_of(cell: Any) -> str:
    if cell is None or isinstance(cell, str):
        return cell or ""
    words = isinstance(cell, list) and all(isinstance(word, str) for word in cell)
    return " ".join(cell) if words else json.dumps(cell, ensure_ascii=False, default=str)


def words(read: Tables, split: str) -> list[tuple[str, ...]]:
    """Of each row, what the model reads of it, in words."""
    columns = [read.tables[split].column(column) for column in read.task.reads]
    return [tuple(_words_of(cell) for cell in row) for row in zip(*columns, strict=True)]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[str]:
    """The text of each token; tokens that are parts of one character are together."""
    together: list[int] = []
    for token in ids:
        together.append(token)
        text = str(tokenizer.decode(together))
        if not text.endswith(_BROKEN) or len(together) == 4:  # bytes of a character at most
            yield text
            together = []
    if together:
        yield str(tokenizer.decode(together))


def _middle_out(tokens: Sequence[str]) -> str:
    """Tokens in a line: of many those at both ends, where what is learnt begins and stops."""
    text = "|".join(tokens)
    if len(text) <= _WIDE:
        return printable(text)
    ends, left = (_within(tokens), _within(tokens[::-1]))
    out = len(tokens) - ends - left
    return printable("|".join([*tokens[:ends], f"...{out} tokens...", *tokens[len(tokens) - left :]]))


def _within(tokens: Sequence[str]) -> int:
    """How many tokens have room in half a line."""
    room, count = _WIDE // 2, 0
    while count < len(tokens) and room >= len(tokens[count]) + 1:
        room -= len(tokens[count]) + 1
        count += 1
    return count


def _cut(text: str, length: int) -> str:
    return printable(text if len(text) <= length else f"{text[:length]}...")
