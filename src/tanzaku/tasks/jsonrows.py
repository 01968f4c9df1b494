"""JSON Lines and JSON: an object a line, a list of objects, or an object of columns; anything else by what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tanzaku.errors import TanzakuError, listed
from tanzaku.tasks.names import check_names

Columns = dict[str, list[Any]]

_AS_JSON = "name it .json, or give --format json (predict: --data-format)"


def read_json_lines(text: str, source: str, first: int = 1) -> Columns:
    """One object a line; a name that an object lacks is None there.

    Args:
        first: the number of the first line.

    Raises:
        TanzakuError: what is broken, with its line.
    """
    lines = [(n, line) for n, line in enumerate(text.split("\n"), first) if line.strip()]
    if len(lines) > 1 and not _is_json(lines[0][1]) and _is_json(text):
        raise TanzakuError(f"{source} is one JSON value over {len(lines)} lines, not one a line; {_AS_JSON}")
    if len(lines) == 1 and lines[0][1].lstrip().startswith("[{"):
        raise TanzakuError(f"{source} is one list of objects, not an object a line; {_AS_JSON}")
    return _columns([(f"line {n}", _parse(line, source, n)) for n, line in lines], source)


def read_json(text: str, source: str, note: Callable[[str], None]) -> Columns:
    """A list of objects, an object that holds one list of them or a list for each column, or an object a line.

    Raises:
        TanzakuError: what is broken or something else, with its line.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if text.lstrip().startswith("["):
        rows = _parse(text, source, 1)
        return _columns([(f"item {n}", item) for n, item in enumerate(rows, 1)], source)
    if len(lines) > 1 and (_is_json(lines[0]) or not _is_json(text)):
        return read_json_lines(text, source)
    whole = _parse(text, source, 1)
    if not isinstance(whole, dict):
        raise TanzakuError(f"{source} is {_short(whole)}, expected a list of objects [{{...}}, ...]")
    if whole.keys() in ({"columns", "data"}, {"columns", "index", "data"}) and _rows_in(whole["data"]):
        return _of_pandas_split(whole, source)
    held = {key: value for key, value in whole.items() if isinstance(value, list)}
    tables = [key for key, value in held.items() if value and all(isinstance(item, dict) for item in value)]
    if len(held) == len(whole) > 0 and not tables:
        lengths = {key: len(value) for key, value in held.items()}
        if len(set(lengths.values())) > 1:
            found = listed(f"{key} {length}" for key, length in lengths.items())
            raise TanzakuError(f"{source} is an object of columns of different lengths: {found}; expected one length")
        check_names(list(held), source)
        return held
    if whole and all(isinstance(value, dict) for value in whole.values()):
        return _of_pandas(whole, source)
    if len(tables) == 1:
        [key] = tables
        note(f"{source} is an object: its rows are those of {key!r}")
        return _columns([(f"item {n} of {key!r}", item) for n, item in enumerate(held[key], 1)], source)
    if tables or len(lines) > 1:
        what = f"with lists of objects at {listed(tables)}" if tables else f"with the keys {listed(whole)}"
        raise TanzakuError(f"{source} is one object {what}; expected a list of objects [{{...}}, ...]: keep one alone")
    return _columns([("line 1", whole)], source)


def _of_pandas(whole: dict[str, dict[str, Any]], source: str) -> Columns:
    """`{column: {row: value}}`, which pandas' to_json() writes unless told otherwise."""
    (first, rows), *others = ((name, list(column)) for name, column in whole.items())
    for name, keys in others:
        if keys != rows:
            raise TanzakuError(
                f"{source} is one object of objects, of which {first!r} and {name!r} have other keys; "
                "expected a list of objects [{...}, ...]"
            )
    check_names(list(whole), source)
    return {name: list(column.values()) for name, column in whole.items()}


def _rows_in(data: Any) -> bool:
    """Whether it holds rows, and is not a column that is named so."""
    return isinstance(data, list) and any(isinstance(row, list) for row in data)


def _of_pandas_split(whole: dict[str, Any], source: str) -> Columns:
    """`{columns: [name], index: [row], data: [[value]]}`, which pandas' to_json(orient="split") writes."""
    names, rows = whole["columns"], whole["data"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TanzakuError(f"{source}: columns is {_short(names)}, expected a list of names")
    check_names(names, source)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(names):
            raise TanzakuError(
                f"{source} row {number} of data is {_short(row)}, expected a list of {len(names)} values"
            )
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}


def _columns(found: list[tuple[str, Any]], source: str) -> Columns:
    for where, item in found:
        if not isinstance(item, dict):
            raise TanzakuError(f"{source} {where} is {_short(item)}, expected an object {{...}}")
    names = list(dict.fromkeys(name for _, item in found for name in item))
    check_names(names, source)
    return {name: [item.get(name) for _, item in found] for name in names}


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:40]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, source: str, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at character {error.colno}"
    except TanzakuError as error:  # of a name
        line, reason = first_line, str(error)
    except RecursionError:
        line, reason = first_line, "it is nested too deeply"
    except ValueError:  # of Python's own limit
        line, reason = first_line, "it has a number of thousands of digits"
    raise TanzakuError(f"{source} line {line} is not JSON: {reason}; expected one whole object a line")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_names([name for name, _ in pairs], "the object")
    return dict(pairs)
