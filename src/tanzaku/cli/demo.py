"""`tanzaku demo`: the bundled poems on the embedded model, methods that suit any model, one report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from tanzaku.cli.compare import run_comparison
from tanzaku.cli.record import command_of
from tanzaku.cli.resume import resumed
from tanzaku.recipe.schema import build_recipe


def demo(
    epochs: Annotated[str | None, typer.Option(metavar="INTEGER", help="passes over the training poems")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="only these, as in lora,ia3 (repeatable)")
    ] = None,
    out: Annotated[str, typer.Option(metavar="TEXT", help="directory of the run; replaces a demo")] = "runs/demo",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run of another command too")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a demo that was cut off")] = False,
) -> None:
    """Try the methods that suit any model on bundled poems.

    With the embedded model: no download, no account and no GPU.
    """
    names = [name.strip() for names in methods or [] for name in names.split(",")]
    flags: dict[str, Any] = {"out": out, "methods": [name for name in names if name]}
    if epochs is not None:
        flags["train"] = {"epochs": epochs}
    if resume:
        recipe = resumed("demo", None, {"out": out})
    else:
        recipe = build_recipe(Path(str(resources.files("tanzaku"))) / "data" / "demo.yaml", flags)
    run_comparison("demo", recipe, overwrite or (not resume and command_of(Path(out).expanduser()) == "demo"), resume)
