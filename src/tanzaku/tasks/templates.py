"""Prompts by a Jinja template, in the shape of promptsource's too: `prompt ||| answer`.

https://github.com/bigscience-workshop/promptsource: what stands before the bars is asked and what stands behind them is
the answer, both without white space at their ends; `answer_choices` are the row's choices, themselves a template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tanzaku.errors import TanzakuError, listed, nearest

BARS = "|||"
CHOICES = "answer_choices"
_ASSIGNED, _NUMBER = 10, 10_000  # in one template
_KEPT = "\ue000" * 3  # in the place of bars in a cell, which divide nothing


def is_template(text: str) -> bool:
    """Whether a text is one, or choices with bars between them, and no name."""
    return any(mark in text for mark in ("{{", "{%", BARS))


class Template:
    """One template.

    Args:
        what: how errors call it.

    Raises:
        TanzakuError: it is none.
    """

    def __init__(self, source: str, what: str = "template"):
        self.source, self.what, self.answers = source, what, BARS in source
        self.every = self.columns = self._read(source)  # names of columns: of all, and of the prompt
        self.parts: list[str] | None = None
        parts = source.split(BARS)
        if len(parts) == 2:
            try:
                # In two by themselves, a prompt is had without the columns of its answer.
                self.columns, _ = map(self._read, parts)
                self.parts = parts
            except TanzakuError:
                pass  # the bars stand within a block

    def _read(self, source: str) -> frozenset[str]:
        """The names that a template reads and does not make itself."""
        from jinja2 import TemplateSyntaxError, meta

        try:
            tree = _environment().parse(source)
            if (costly := _costly(tree)) is not None:
                raise TanzakuError(
                    f"the {self.what} has {costly}, which may take time or memory without end; expected columns, "
                    "filters, conditions and loops over a column"
                )
            _compiled(source)  # which looks for filters, too
            names = meta.find_undeclared_variables(tree)
        except TemplateSyntaxError as error:
            reason = " ".join(str(error.message).split())
            raise TanzakuError(f"the {self.what} has a mistake in line {error.lineno}: {reason}") from None
        return frozenset(names - {CHOICES} - _environment().globals.keys())

    def check(self, names: Sequence[str], source: str, answers: bool) -> None:
        """A TanzakuError where a table has not the columns.

        Args:
            names: of its columns. source: what it is called. answers: whether the answer is asked for, too.
        """
        for name in sorted((self.every if answers else self.columns) - {*names}):
            raise TanzakuError(
                f"the {self.what} reads {name!r}, and {source} has no such column{nearest(name, names)}; its columns "
                f"are {listed(names)}"
            )

    def prompt(self, row: Mapping[str, Any], where: str) -> str:
        """What is asked of a row."""
        if not self.answers:
            return self._rendered(self.source, row, where)
        return self._rendered(self.parts[0], row, where).strip() if self.parts else self.split(row, where, 2)[0]

    def answer(self, row: Mapping[str, Any], where: str) -> str:
        """What is to follow."""
        return self._rendered(self.parts[1], row, where).strip() if self.parts else self.split(row, where, 2)[1]

    def split(self, row: Mapping[str, Any], where: str, expected: int | None = None) -> list[str]:
        """What stands between bars, without white space at its ends; a TanzakuError unless there are so many parts."""
        kept = {key: _without_bars(cell) for key, cell in row.items()}
        found = [part.replace(_KEPT, BARS).strip() for part in self._rendered(self.source, kept, where).split(BARS)]
        if expected is not None and len(found) != expected:
            raise TanzakuError(f"{where}: the {self.what} gives {len(found)} parts between {BARS}, expected {expected}")
        return found

    def _rendered(self, source: str, row: Mapping[str, Any], where: str) -> str:
        try:
            return str(_compiled(source).render(row))
        except Exception as error:  # whatever its expressions raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TanzakuError(f"{where}: the {self.what} cannot be filled in: {reason}") from None


def _without_bars(cell: Any) -> Any:
    if isinstance(cell, str):
        return cell.replace(BARS, _KEPT)
    if isinstance(cell, list):
        return [*map(_without_bars, cell)]
    return {key: _without_bars(value) for key, value in cell.items()} if isinstance(cell, dict) else cell


def _costly(tree: Any) -> str | None:
    """What of a template, which may be a stranger's, can take more than a row's cells give reason for."""
    from jinja2 import nodes

    if next(tree.find_all((nodes.Mul, nodes.Pow)), None) is not None:
        return "a product or a power"
    if next(tree.find_all((nodes.Macro, nodes.CallBlock)), None) is not None:
        return "a macro"
    if any(next(loop.find_all(nodes.For), None) is not None for loop in tree.find_all(nodes.For)):
        return "a loop within a loop"
    if sum(1 for _ in tree.find_all((nodes.Assign, nodes.AssignBlock))) > _ASSIGNED:
        return f"more than {_ASSIGNED} assignments"
    if any(isinstance(each.value, int) and each.value > _NUMBER for each in tree.find_all(nodes.Const)):
        return f"a number above {_NUMBER:,}"
    return None


@cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    found.globals["zip"] = zip
    return found


@cache
def _compiled(source: str) -> Any:
    return _environment().from_string(source)
