"""Rows that ask: of each its prompt, its choices and which of them is right, wherever these stand in a table."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from tanzaku.errors import TanzakuError, flag, listed, nearest
from tanzaku.tasks.cells import missing, short
from tanzaku.tasks.labels import label_name
from tanzaku.tasks.settings import DataSettings
from tanzaku.tasks.templates import CHOICES, Template, is_template
from tanzaku.tasks.text import check_characters

if TYPE_CHECKING:
    from tanzaku.tasks.data import Table

Loss = Literal["lm", "unlikelihood", "length_normalised"]
_NUMBERED = re.compile(r"choice_?\d+")
_COLUMN, _LABEL, _ANSWER = "choices", "label", "answer"


class ChoiceSettings(DataSettings):
    """Columns of prompts, of choices and of the right one, or a template of prompts and choices for all rows."""

    options: ClassVar[frozenset[str]] = frozenset(
        {"template", "choices", "losses", "length_normalised", "encoder_decoder"}
    )

    prompt: str = Field(default="prompt", min_length=1, description="column of what is written on from")
    template: str | None = Field(
        default=None, min_length=1, description="Jinja template of what is asked, in place of a column"
    )
    choices: str | list[str] | dict[str, str] | None = Field(
        default=None,
        description="answers to choose from: yes ||| no for all rows, or a column with a list for each (choices)",
    )
    choice_columns: list[str] = Field(
        default=[], description="columns with a choice each, in place of one with lists (choice0, choice1, ...)"
    )
    label: str = Field(
        default=_LABEL, min_length=1, description="column of the label, of the number, or of the right choice"
    )
    losses: list[Loss] = Field(
        default=["lm", "unlikelihood", "length_normalised"], min_length=1, description="what is learnt by (repeatable)"
    )
    length_normalised: bool = Field(default=True, description="divide the score of a choice by its length in tokens")
    encoder_decoder: bool = Field(
        default=False, description="choices are ranked by an encoder-decoder (T5, BART), which reads prompts apart"
    )

    @field_validator("choices", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, list | dict):
            return value
        cells = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if any(isinstance(each, bool) for each in cells):
            raise TanzakuError("found true or false, which YAML reads in yes, no, on and off; write them in quotes")

        def text(cell: Any) -> Any:
            return str(cell) if isinstance(cell, int | float) else cell

        pairs = value.items() if isinstance(value, dict) else ()
        return {text(key): text(each) for key, each in pairs} if pairs else [text(each) for each in value]

    def columns(self) -> list[tuple[str, str]]:
        unread = {"prompt"} if self.template is not None else set()
        if self.template is not None and Template(self.template).answers:
            unread.add("label")
        return [(key, column) for key, column in super().columns() if key not in unread]


@dataclass(frozen=True)
class Question:
    """One row.

    Args:
        names: of its choices, as people read them. words: what is written for each, right behind the prompt.
        answer: the name of the right one; None: that is not known.
    """

    prompt: str
    names: tuple[str, ...]
    words: tuple[str, ...]
    answer: str | None = None


@dataclass(frozen=True)
class Reading:
    """Where prompts and choices stand.

    Args:
        prompt: a column. template: in its place.
        names, words: of choices that are those of all rows. mapped: whether labels are these names, whatever they read.
        choices: else a column with lists, or a template of them. choice_columns: or columns with one each.
    """

    prompt: str = "prompt"
    template: str | None = None
    names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    choices: str | None = None
    choice_columns: tuple[str, ...] = ()
    mapped: bool = False

    @classmethod
    def of(cls, table: Table, data: Any) -> Reading:
        """As a recipe's section says, or the columns of a table that are called so."""
        found: dict[str, Any] = {"prompt": data.prompt, "template": data.template}
        given = data.choices
        if data.choice_columns and given is not None:
            raise TanzakuError("choices and choice_columns both say what there is to choose from; give one of the two")
        if data.choice_columns:
            return cls(**found, choice_columns=tuple(data.choice_columns))
        if given is None:
            numbered = [name for name in table.columns if _NUMBERED.fullmatch(name)]
            if _COLUMN not in table.columns and numbered:
                numbered.sort(key=lambda name: int(name.removeprefix("choice").removeprefix("_")))
                return cls(**found, choice_columns=tuple(numbered))
            return cls(**found, choices=_COLUMN)
        if isinstance(given, str) and is_template(given):
            template = Template(given, "template of choices")
            if template.columns:
                return cls(**found, choices=given)
            given = template.split({}, "choices")
        if isinstance(given, str):
            return cls(**found, choices=given)
        words = tuple(given.values() if isinstance(given, dict) else given)
        names = tuple(given) if isinstance(given, dict) else tuple(word.strip() for word in words)
        check_choices(words, "choices of all rows")
        check_choices(names, "choices of all rows")
        return cls(**found, names=names, words=words, mapped=isinstance(given, dict))

    @cached_property
    def asks(self) -> Template | None:
        """The template of prompts."""
        return None if self.template is None else Template(self.template)

    @cached_property
    def lists(self) -> Template | None:
        """The template of choices."""
        named = self.choices is None or not is_template(self.choices)
        return None if named else Template(str(self.choices), "template of choices")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row is read from."""
        asked = [self.prompt] if self.asks is None else sorted(self.asks.columns)
        if self.lists is not None:
            asked += sorted(self.lists.columns)
        elif self.choices is not None:
            asked.append(self.choices)
        return tuple(dict.fromkeys([*asked, *self.choice_columns]))

    def questions(self, table: Table, label: str | None) -> Iterator[Question]:
        """The rows of a table.

        Args:
            label: the column of the right choice; None: it is not asked for.

        Raises:
            TanzakuError: a column that is missing, or a row (counted from 1) that cannot be read.
        """
        answers = label is not None
        own = self.asks is not None and self.asks.answers
        for template in filter(None, (self.asks, self.lists)):
            template.check([*table.columns], table.source, answers)
        for key, name in (("prompt", self.prompt if self.asks is None else None), ("choices", self.choices)):
            if name is not None and not (key == "choices" and self.lists is not None):
                table.column(name, key)
        for name in self.choice_columns:
            table.column(name, "choice_columns")
        right: Sequence[Any] = [None] * len(table)
        column = "" if label is None or own else _label_in(table, label)
        if column:
            right = table.column(column, "label")
        if not len(table):
            raise TanzakuError(f"{table.source} has no rows; expected at least one")
        for at, cell in enumerate(right):
            where = f"{table.source} row {at + 1}"
            row = {name: column[at] for name, column in table.columns.items()}
            names, words, keys = self._choices(row, where)
            prompt = self._prompt(row, words, where)
            answer = None
            if answers and own and self.asks is not None:
                text = self.asks.answer({**row, CHOICES: [word.strip() for word in words]}, where)
                answer = _named(text, names, words, (), f"{where}: the answer by the template")
            elif answers:
                answer = _named(cell, names, words, keys, f"{where}: column {column!r}")
            if own:
                words = tuple(f" {word.strip()}" for word in words)
            yield Question(prompt, names, words, answer)

    def _prompt(self, row: Mapping[str, Any], words: Sequence[str], where: str) -> str:
        if self.asks is not None:
            text, what = self.asks.prompt({**row, CHOICES: [word.strip() for word in words]}, where), "the template"
        else:
            text, what = row[self.prompt], f"column {self.prompt!r}"
            if not isinstance(text, str) and not missing(text):
                found = f"{str(text)[:40]} ({type(text).__name__})"
                raise TanzakuError(f"{where}: {what} is {found}, expected text; --template makes text of other cells")
        if missing(text) or not text.strip():
            raise TanzakuError(f"{where}: {what} gives no text to ask with; fill it in or drop the row")
        check_characters(text, where)
        return text

    def _choices(self, row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Of a row's choices the names, the words and the labels that stand beside them in its cell, if any."""
        if self.names:
            return self.names, self.words, self.names if self.mapped else ()
        keys: tuple[str, ...] = ()
        if self.lists is not None:
            found: Any = self.lists.split(row, where)
        elif self.choices is not None:
            found, keys = _listed_in(row[self.choices], f"{where}: column {self.choices!r}")
        else:
            found = [row[name] for name in self.choice_columns]
        words = tuple("" if missing(each) else each if isinstance(each, str) else str(each) for each in found)
        check_choices(words, f"the choices of {where}")
        return tuple(word.strip() for word in words), words, keys

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {
            "prompt": self.prompt,
            "template": self.template,
            "names": list(self.names),
            "words": list(self.words),
            "choices": self.choices,
            "choice_columns": list(self.choice_columns),
            "mapped": self.mapped,
        }

    @classmethod
    def from_json(cls, about: Mapping[str, Any], where: str) -> Reading:
        """A TanzakuError that begins with `where` if something in it cannot be."""
        found: dict[str, Any] = {}
        for key in ("prompt", "template", "choices"):
            found[key] = about.get(key)
            if not isinstance(found[key], str) and (found[key] is not None or key == "prompt"):
                raise TanzakuError(f"{where}{key} is {short(found[key])}, expected text")
        for key in ("names", "words", "choice_columns"):
            cells = about.get(key)
            if not isinstance(cells, list) or not all(isinstance(each, str) for each in cells):
                raise TanzakuError(f"{where}{key} is {short(cells)}, expected a list of texts")
            found[key] = tuple(cells)
        if len(found["names"]) != len(found["words"]):
            raise TanzakuError(f"{where}names are {len(found['names'])} and words {len(found['words'])}")
        if sum(map(bool, (found["names"], found["choices"], found["choice_columns"]))) != 1:
            raise TanzakuError(f"{where}expected one of names, choices and choice_columns")
        if not isinstance(mapped := about.get("mapped", False), bool):
            raise TanzakuError(f"{where}mapped is {short(mapped)}, expected true or false")
        own = cls(**found, mapped=mapped)
        try:
            own.columns  # noqa: B018  # reads the templates
            if own.names:
                check_choices(own.words, "words")
                check_choices(own.names, "names")
        except TanzakuError as error:
            raise TanzakuError(f"{where}{error}") from None
        return own


def check_choices(choices: Sequence[str], whose: str) -> None:
    """A TanzakuError unless they are two or more, each once and none empty."""
    if len(choices) < 2:
        only = f"is one, {choices[0]!r}" if choices else "are none"
        raise TanzakuError(f"{whose}: there {only}; expected two or more")
    bare = [each.strip() for each in choices]
    if "" in bare:
        raise TanzakuError(f"{whose}: number {bare.index('')} (from 0) is empty; fill it in or drop the row")
    if twice := [each for each, times in Counter(bare).items() if times > 1]:
        raise TanzakuError(f"{whose}: {twice[0]!r} is there twice; expected each once")
    for each in choices:
        check_characters(each, whose)


def _label_in(table: Table, label: str) -> str:
    return _ANSWER if label == _LABEL and _LABEL not in table.columns and _ANSWER in table.columns else label


def _listed_in(value: Any, where: str) -> tuple[list[Any], tuple[str, ...]]:
    """Choices in a cell: a list, or as many datasets have it {text: [...], label: [...]}, or either as JSON writes it;
    and their labels."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise TanzakuError(
                f"{where} is {short(value)}, expected a list of choices, or one as JSON writes it; name columns with a "
                f"choice each with {flag('choice_columns')}"
            ) from None
    keys: tuple[str, ...] = ()
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = value.get("label")
        if labels is not None:
            keys = tuple(map(str, labels)) if isinstance(labels, list) else ()
            if len({*keys}) != len(value["text"]):
                raise TanzakuError(
                    f"{where} has the labels {short(labels)} for {len(value['text'])} texts, expected one for each"
                )
        value = value["text"]
    if not isinstance(value, list) or not all(isinstance(each, str | int | float) for each in value):
        raise TanzakuError(f"{where} is {short(value)}, expected a list of choices")
    return value, keys


def _named(value: Any, names: Sequence[str], words: Sequence[str], keys: Sequence[str], where: str) -> str:
    """The name of the choice that a cell means. A number is that of a choice, counted from 0; a text is a choice's, or
    a number where none reads so.

    Raises:
        TanzakuError: it is none of them, or a number that may be that of one and the text of another.
    """
    name, bare = label_name(value, where, "answer"), [word.strip() for word in words]
    number = int(name) if name.isdecimal() and int(name) < len(names) else None
    if number is not None and isinstance(value, int | float) and [*names] == bare and not keys:
        if name in names and names[number] != name:
            raise TanzakuError(
                f"{where} is {name}, which may be the choice {name!r} or number {name} from 0, {names[number]!r}: "
                f"write it as text, or say which with choices: {{{name}: {name!r}, ...}}"
            )
        return names[number]
    for known in (keys, names, bare):
        if name in known:
            return names[[*known].index(name)]
    if number is not None:
        return names[number]
    expected = f"0 to {len(names) - 1}, or one of {listed(map(repr, names))}"
    raise TanzakuError(f"{where} is {name!r}, which is none of the choices{nearest(name, names)}; expected {expected}")
