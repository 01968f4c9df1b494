"""`tanzaku methods`: the table of methods, from a file, since the methods themselves import torch."""

from __future__ import annotations

import json
from importlib import resources
from typing import Annotated

import typer


def methods(as_json: Annotated[bool, typer.Option("--json", help="for programs, settings included")] = False) -> None:
    """List the methods.

    The name in recipes, PEFT's name, whether it merges into the base model, the learning rate that it has where none is
    given, the paper.
    """
    from tanzaku.cli.display import Display

    if as_json:
        typer.echo(_table(), nl=False)
        return
    rows = [
        [
            method["name"],
            method["peft_type"],
            "yes" if method["mergeable"] else "no",
            f"{method['learning_rate']:g}",
            method["paper"],
            method["summary"],
        ]
        for method in json.loads(_table())
    ]
    Display().table(["name", "PEFT type", "merges", "learning rate", "paper", "what it does"], rows)


def by_default() -> tuple[str, ...]:
    """Names of the candidates of a comparison that names none."""
    return tuple(method["name"] for method in json.loads(_table()) if method["by_default"])


def _table() -> str:
    return (resources.files("tanzaku") / "methods" / "methods.json").read_text(encoding="utf-8")
