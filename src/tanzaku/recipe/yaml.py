"""YAML as recipes are written in it: 1e-4 is a number, a key stands once, and a mistake has a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tanzaku.errors import TanzakuError, nearest
from tanzaku.tasks.sources import SUFFIXES, suffix_of


class _Loader(yaml.SafeLoader):
    """PyYAML's plain loader reads 1e-4 as text, as YAML 1.1 has it, and lets the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of one YAML document; a TanzakuError names `source`, the line and the mistake."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}" if mark else ""
        raise TanzakuError(f"{source}{where}: {error.problem or error.context}; expected YAML") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise TanzakuError(f"{source}: {reason}; expected YAML") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if path.is_dir():
        raise TanzakuError(f"{path} is a directory; expected a recipe, which is a YAML file")
    if path.is_file() and suffix_of(path) in SUFFIXES and suffix_of(path) != ".json":  # which is YAML, too
        raise TanzakuError(f"{path} is a table; expected a recipe, which is a YAML file; give rows with --train {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise TanzakuError(f"there is no recipe {path}{nearest(path.name, beside)}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TanzakuError(f"{path} line {line} is not UTF-8; expected a recipe, which is a YAML file") from None
    except OSError as error:
        raise TanzakuError(f"{path} cannot be read: {error.strerror or error}") from None
    value = parse_yaml(text, str(path))
    if value is None:
        raise TanzakuError(f"{path} is empty; expected keys such as model, data and methods")
    odd = next((key for key in value if not isinstance(key, str)), None) if isinstance(value, dict) else None
    if odd is not None:
        raise TanzakuError(f"{path} has the key {odd!r}; expected names such as model, data and methods")
    if not isinstance(value, dict):
        raise TanzakuError(f"{path} is a {type(value).__name__}; expected keys such as model, data and methods")
    return value
