"""The table of methods as a file of the package, which `tanzaku methods` prints: `python -m bench methods`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tanzaku
from tanzaku.methods import METHODS

FILE = Path(tanzaku.__file__).parent / "methods" / "methods.json"


def content() -> str:
    """What stands in the file, of the registry."""
    methods = [
        {
            "name": method.name,
            "class": method.__name__,
            "by_default": method.by_default,
            "peft_type": method.peft_type,
            "mergeable": method.mergeable,
            "learning_rate": method.learning_rate,
            "paper": method.paper,
            "summary": method.summary,
            "settings": method().settings(),
        }
        for method in METHODS.values()
    ]
    return json.dumps(methods, indent=2, ensure_ascii=False) + "\n"


def table(arguments: Sequence[str]) -> None:
    """Print the file, or with `--write` write it."""
    if list(arguments) == ["--write"]:
        FILE.write_text(content(), encoding="utf-8")
    else:
        print(content(), end="")
