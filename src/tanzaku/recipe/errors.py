"""What the schema refuses, in one line: where it stands, what was found and expected, and the nearest name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from tanzaku.errors import flag, listed, nearest

# Where pydantic's own words would not help: it speaks of Python.
_WORDS = {
    "model_type": "a mapping of keys",
    "list_type": "a list",
    "string_type": "text (in quotes, where YAML would read something else)",
    "string_too_short": "a name",
    "string_pattern_mismatch": "letters, digits, '_' and '-' only",
}


def complaint(
    error: ValidationError, source: str, sections: Mapping[str, type[BaseModel]], flags: Mapping[str, Any]
) -> str:
    """The first thing that is wrong.

    Args:
        source: the file, or whose settings they are.
        sections: the schema of each section by its key, "" for the whole.
        flags: values that came from flags, nested as the schema is; they are told by the flag's name.
    """
    first, *others = error.errors()
    if first["type"] == "missing" and len(first["loc"]) > 1:  # a key with a slip tells more than the lack of it
        first = next((each for each in others if each["type"] == "extra_forbidden"), first)
    where, kind, value = first["loc"], first["type"], first["input"]
    if where == ("model", "name"):  # which is written as model, and so is its flag
        where = ("model",)
    section = str(where[0]) if len(where) > 1 else ""
    known = sections[section].model_fields if section in sections else {}
    key = next((part for part in reversed(where) if isinstance(part, str)), "")  # of a list, not of its item
    from_flag = key in (flags.get(section, {}) if section else flags)
    prefix = f"{source}: " if source and not from_flag else ""
    if kind == "extra_forbidden":
        near = nearest(str(where[-1]), known)
        asked = f"{flag(str(where[-1]))}: " if from_flag else prefix
        return f"{asked}{section or 'the recipe'} has no key {str(where[-1])!r}{near}; it has {listed(known, 40)}"
    if kind == "missing":
        return f"{prefix}{_dotted(where)} is missing; write it in a recipe or give {flag(str(where[-1]))}"
    name = flag(key) if from_flag else _dotted(where)
    if kind == "value_error":  # raised by the schema's own checks, as one line already
        # What is said of a whole section names the keys itself, and a section has no flag.
        of_section = from_flag and len(where) == 1 and key in sections
        return f"{prefix}{'' if of_section else name + ': '}{first['ctx']['error']}"
    expected = _WORDS.get(kind) or first["msg"].removeprefix("Input should ").removeprefix("be ")
    near = nearest(value, _choices(first)) if isinstance(value, str) and value.strip() else ""
    if section == "train" and isinstance(value, Mapping):
        near = "; a grid or a range stands in a candidate's own train section"
    return f"{prefix}{name} is {_short(value)}, expected {expected}{near}"


def _dotted(where: tuple[int | str, ...]) -> str:
    """`train.epochs`; items of a list are counted from 1, and the names of a union's branches are left out."""
    parts = [str(where[0])] if where else ["the recipe"]
    for part in where[1:]:
        if isinstance(part, int):
            parts[-1] += f" item {part + 1}"
        elif "[" not in part:
            parts.append(part)
    return ".".join(parts)


def _choices(first: Any) -> list[str]:
    expected = str(first.get("ctx", {}).get("expected", ""))
    return expected.replace(" or ", ", ").replace("'", "").split(", ")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
