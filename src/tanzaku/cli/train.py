"""`tanzaku train`: one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tanzaku.cli.flags import recipe_flags
from tanzaku.cli.run import Interrupted, sitting
from tanzaku.errors import TanzakuError, listed
from tanzaku.recipe import build_recipe, jobs_of


@recipe_flags
def train(file: Path | None, flags: dict[str, Any], overwrite: bool) -> None:
    """Train one adapter.

    Shows figures after each epoch and a confusion matrix; the adapter goes into the run's directory.
    """
    recipe = build_recipe(file, flags)
    if len(recipe.methods) != 1:
        found = listed(str(entry.name) for entry in recipe.methods) or "no method"
        raise TanzakuError(f"train takes one method, found {found}; name one with --method, or use tanzaku compare")
    [job] = jobs_of(recipe)
    methods = [(job.name, job.method, job.settings)]
    with sitting("train", recipe, methods, overwrite, resume=False) as run:
        from tanzaku.cli.display import Display
        from tanzaku.cli.record import Record, clear
        from tanzaku.train.loop import train_jobs

        display = Display()
        model, data = run.load(display, methods)
        clear(run.out)
        record = Record(run.out, run.about(data), run.clock, display)
        record.write()
        with display:
            train_jobs(model, data, [job], out=run.out, observer=record, meta=run.meta(data))
        record.write()
        [result] = record.results
        if result.status == "done":
            display.adapter(result, data, run.out)
        elif result.status == "interrupted":
            clear(run.out)
            raise Interrupted("interrupted before the end of training; nothing is kept, so run the same command again")
        else:
            raise TanzakuError(f"candidate {job.name!r} failed: {result.error}")
