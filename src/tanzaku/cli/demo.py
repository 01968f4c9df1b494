"""`tanzaku demo`: bundled rows on the embedded model, several methods at once, one report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from tanzaku.cli.compare import run_comparison
from tanzaku.cli.flags import check_choices
from tanzaku.cli.record import command_of
from tanzaku.cli.resume import resumed
from tanzaku.recipe.schema import build_recipe

# By task, the recipe in `data` and where the run is written.
DEMOS = {"classification": ("demo.yaml", "runs/demo"), "generation": ("demo_generation.yaml", "runs/demo-generation")}
_SHOWN = 3  # rows for which what is written is shown


def demo(
    task: Annotated[
        str, typer.Option(metavar="|".join(DEMOS), help="tell poems apart, or write spoken dates in ISO 8601")
    ] = next(iter(DEMOS)),
    epochs: Annotated[str | None, typer.Option(metavar="INTEGER", help="passes over the training rows")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="only these, as in lora,ia3 (repeatable)")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=f"directory of the run; replaces a demo ({' or '.join(out for _, out in DEMOS.values())})",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run of another command too")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a demo that was cut off")] = False,
) -> None:
    """Try several methods on bundled rows.

    With the embedded model: no download, no account and no GPU. Poems are told apart by every method that suits any
    model; dates and times as people say them are written in ISO 8601 by three.
    """
    check_choices({"--task": (task, tuple(DEMOS))})
    recipe_file, usual = DEMOS[task]
    folder = out or usual
    names = [name.strip() for names in methods or [] for name in names.split(",")]
    flags: dict[str, Any] = {"out": folder, "methods": [name for name in names if name]}
    if epochs is not None:
        flags["train"] = {"epochs": epochs}
    if resume:
        recipe = resumed("demo", None, {"out": folder})
    else:
        recipe = build_recipe(Path(str(resources.files("tanzaku"))) / "data" / recipe_file, flags)
    again = not resume and command_of(Path(folder).expanduser()) == "demo"
    run_comparison("demo", recipe, overwrite or again, resume, samples=_SHOWN)
