"""`tanzaku compare`: many candidates at once, and an honest verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tanzaku.cli.flags import recipe_flags, show_flag
from tanzaku.cli.methods import by_default
from tanzaku.cli.resume import DRY_RUN, SHOWN, begin, resumed, switch
from tanzaku.cli.run import Interrupted, rehearse, settled, sitting
from tanzaku.errors import TanzakuError
from tanzaku.recipe.schema import SECTIONS, Recipe, build_recipe

if TYPE_CHECKING:
    from tanzaku.cli.run import Sitting
    from tanzaku.compare.candidates import Candidate, Searched
    from tanzaku.compare.comparison import Comparison
    from tanzaku.train.events import Event

REPORT, EPOCHS = "report.html", "epochs.parquet"
_APART = 10.0  # seconds at least between two reports of what is not finished
_REST = 10  # times as long as writing one takes


@partial(
    recipe_flags,
    sections=SECTIONS,
    switches={"resume": switch("a comparison"), "dry_run": DRY_RUN},
    own=[show_flag(SHOWN)],
)
def compare(
    file: Path | None, flags: dict[str, Any], overwrite: bool, resume: bool, dry_run: bool, show: int | None
) -> None:
    """Train many candidates at once, and say which is better.

    All share one frozen model and its steps. Where no method is named, those that suit any model are
    candidates, but for full fine-tuning.
    """
    default = by_default()
    recipe = resumed("compare", file, flags, default) if resume else build_recipe(file, flags, default)
    if dry_run:
        recipe = settled(recipe)
        return rehearse("compare", recipe, _every(recipe)[2], show)
    run_comparison("compare", recipe, overwrite, resume, show)


def run_comparison(
    command: str, recipe: Recipe, overwrite: bool, resume: bool, show: int | None = None, samples: int = 0
) -> None:
    """Run a comparison and report on it.

    Args:
        samples: rows for which is shown what the base writes, and then the adapters.

    Raises:
        TanzakuError: bad input, found before the model is loaded where that can be, or no candidate succeeded.
        Interrupted: Ctrl-C while training; what was finished is kept.
        typer.Exit: with code 1, some candidates failed.
    """
    recipe = settled(recipe)
    candidates, searched, methods = _every(recipe)
    recipe.compare.design(recipe.data.valid is not None)
    with sitting(command, recipe, methods, overwrite, resume, show) as run:
        from tanzaku.cli.live import Live
        from tanzaku.cli.samples import by_the_adapters, by_the_base
        from tanzaku.compare.candidates import as_written
        from tanzaku.compare.comparison import Comparison
        from tanzaku.compare.comparison import Interrupted as Cut
        from tanzaku.compare.journal import Journal
        from tanzaku.train.events import EVENTS, EventLog

        live = Live(recipe.ranked_by)
        live.say(f"report: {run.out / REPORT}")
        if note := as_written(candidates, searched, recipe.compare):
            live.say(note)
        model, data = run.load(live, methods)
        bare = by_the_base(live, model, data, samples)
        journal = Journal(run.out)
        about = begin(run, journal, model, data, resume)
        with EventLog(run.out / EVENTS, live.say) as log:
            log.complete(journal.jobs)
            comparison = Comparison(
                model=model,
                data=data,
                candidates=candidates,
                searched=searched,
                settings=recipe.compare,
                seed=recipe.train.seed,
                out=run.out,
                journal=journal,
                listeners=[log, live],
                meta=run.meta(data),
            )
            comparison.events.listeners.append(Unfinished(lambda: _write(run, about, comparison, "running")))
            live.begin(comparison)
            with comparison.events.run(command, resume) as ending:
                try:
                    with live:
                        comparison.run()
                except (Cut, KeyboardInterrupt):
                    ending["status"] = "interrupted"
                    comparison.judge()
                    comparison.finalists = []
                results = _write(run, about, comparison, ending["status"])
        if ending["status"] == "interrupted":
            raise Interrupted(_how_to_go_on(command, comparison))
        by_the_adapters(live, data, bare, results["rows"])
        live.summary(results, data.task, run.out, REPORT)
        _check_success(results)


class Unfinished:
    """Has what is done so far written, by the events of a comparison: as a stage begins and as jobs end, at most every
    ten seconds and for a tenth of the time."""

    def __init__(self, write: Callable[[], object]):
        self.write = write
        self._next = 0.0  # when it may be written again

    def __call__(self, event: Event) -> None:
        ended = event.kind == "job_done" and event.figures["status"] != "interrupted"
        if event.kind == "stage" or (ended and time.monotonic() >= self._next):
            began = time.monotonic()
            self.write()
            now = time.monotonic()
            self._next = now + max(_APART, _REST * (now - began))


def _every(recipe: Recipe) -> tuple[list[Candidate], list[Searched], list[Candidate]]:
    """Candidates, searches, and the candidates of both, a search's at the ends of its space."""
    from tanzaku.compare.candidates import check_settled, expand

    candidates, searched = expand(recipe.methods, recipe.train, recipe.compare)
    every = [*candidates, *(corner for search in searched for corner in search.corners())]
    check_settled(every)
    return candidates, searched, every


def _write(run: Sitting, about: dict[str, Any], comparison: Comparison, status: str) -> dict[str, Any]:
    """results.json, epochs.parquet and the report, as far as the comparison has come."""
    from tanzaku.cli.record import write_results
    from tanzaku.compare.report import write_report
    from tanzaku.compare.tables import write_epochs
    from tanzaku.files.writing import finite

    results: dict[str, Any] = finite(
        {**about, "status": status, "seconds": round(comparison.journal.seconds, 3), **comparison.results()}
    )
    results = write_results(run.out, results)
    write_epochs(results, [metric.name for metric in comparison.task.metrics], run.out / EPOCHS)
    write_report(results, run.out / REPORT)
    return results


def _how_to_go_on(command: str, comparison: Comparison) -> str:
    done = len(comparison.journal.jobs)
    kept = f"{done} finished {'run is' if done == 1 else 'runs are'} kept"
    return f"interrupted; {kept}; go on with tanzaku {command} --resume --out {comparison.out}"


def _check_success(results: dict[str, Any]) -> None:
    failed = [candidate for candidate in results["candidates"] if candidate["status"] == "failed"]
    if failed:
        line = f"candidate {failed[0]['name']!r} failed: {failed[0]['error']}"
        if len(failed) == len(results["candidates"]):
            raise TanzakuError(line)
        typer.echo(f"tanzaku: {len(failed)} of {len(results['candidates'])} candidates failed; {line}", err=True)
        raise typer.Exit(1)
