"""`tanzaku methods`: the table of methods."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def methods(as_json: Annotated[bool, typer.Option("--json", help="for programs, settings included")] = False) -> None:
    """List the methods.

    The name in recipes, PEFT's name, whether it merges into the base model, the learning rate that it has where none is
    given, the paper.
    """
    from tanzaku.cli.display import Display
    from tanzaku.methods import METHODS

    if as_json:
        table = [
            {
                "name": method.name,
                "peft_type": method.peft_type,
                "mergeable": method.mergeable,
                "learning_rate": method.learning_rate,
                "paper": method.paper,
                "summary": method.summary,
                "settings": method().settings(),
            }
            for method in METHODS.values()
        ]
        typer.echo(json.dumps(table, indent=2, ensure_ascii=False))
        return
    Display().table(
        ["name", "PEFT type", "merges", "learning rate", "paper", "what it does"],
        [
            [m.name, m.peft_type, "yes" if m.mergeable else "no", f"{m.learning_rate:g}", m.paper, m.summary]
            for m in METHODS.values()
        ],
    )
