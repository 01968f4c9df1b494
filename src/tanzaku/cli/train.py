"""`tanzaku train`: one adapter."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tanzaku.cli.flags import recipe_flags, show_flag
from tanzaku.cli.resume import DRY_RUN, SHOWN, begin, resumed, switch
from tanzaku.cli.run import Interrupted, rehearse, settled, sitting
from tanzaku.errors import TanzakuError, listed
from tanzaku.recipe.schema import build_recipe, jobs_of


@partial(recipe_flags, switches={"resume": switch("a run"), "dry_run": DRY_RUN}, own=[show_flag(SHOWN)])
def train(
    file: Path | None, flags: dict[str, Any], overwrite: bool, resume: bool, dry_run: bool, show: int | None
) -> None:
    """Train one adapter.

    Shows figures after each epoch and a confusion matrix; the adapter goes into the run's directory. A run that is cut
    off goes on after its last epoch.
    """
    recipe = resumed("train", file, flags) if resume else build_recipe(file, flags)
    if len(recipe.methods) != 1:
        found = listed(str(entry.name) for entry in recipe.methods) or "no method"
        raise TanzakuError(f"train takes one method, found {found}; name one with --method, or use tanzaku compare")
    recipe = settled(recipe)
    [job] = jobs_of(recipe)
    if dry_run:
        return rehearse("train", recipe, [job], show)
    with sitting("train", recipe, [job], overwrite, resume, show) as run:
        from tanzaku.cli.display import Display
        from tanzaku.cli.record import Record, clear
        from tanzaku.compare.journal import Journal
        from tanzaku.train.events import EVENTS, Emitter, EventLog
        from tanzaku.train.scheduler import train_jobs

        display = Display(recipe.metrics)
        model, data = run.load(display, [job])
        journal = Journal(run.out)
        record = Record(run.out, begin(run, journal, model, data, resume), run.clock)
        record.write()
        with EventLog(run.out / EVENTS, display.say) as log, display:
            events = Emitter(record, log, display)
            with events.run("train", resume) as ending:
                [result] = train_jobs(
                    model, data, [job], out=run.out, observer=events, meta=run.meta(data), states=journal.states
                )
                ending |= {"status": result.status, "error": result.error}
        record.write()
        if result.status == "interrupted":
            if not any(journal.states.glob("*")):
                clear(run.out)
                raise Interrupted("interrupted before the end of an epoch; nothing is kept, run the same command again")
            epochs = len(result.epochs)
            raise Interrupted(f"interrupted after epoch {epochs}; go on with tanzaku train --resume --out {run.out}")
        shutil.rmtree(journal.folder)
        if result.status == "done":
            display.adapter(result, data, run.out)
        else:
            raise TanzakuError(f"candidate {job.name!r} failed: {result.error}")
