"""`tanzaku compare`: many candidates at once, and an honest verdict."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tanzaku.cli.flags import recipe_flags
from tanzaku.cli.run import Interrupted, portable, sitting
from tanzaku.errors import TanzakuError
from tanzaku.recipe import SECTIONS, Recipe, build_recipe
from tanzaku.recipe_errors import flag

if TYPE_CHECKING:
    from tanzaku.cli.run import Sitting
    from tanzaku.compare.comparison import Comparison

DEFAULT = ("lora", "adalora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3", "llama_adapter", "head")
REPORT, EPOCHS = "report.html", "epochs.parquet"
RESUME = "go on with a comparison that was cut off: the one in --out, or else the newest in runs"


@partial(recipe_flags, sections=SECTIONS, switches={"resume": RESUME})
def compare(file: Path | None, flags: dict[str, Any], overwrite: bool, resume: bool) -> None:
    """Train many candidates at once, and say which is better.

    All share one frozen model and its steps. Where no method is named, every one but full is a candidate.
    """
    recipe = resumed(file, flags) if resume else build_recipe(file, flags, default_methods=DEFAULT)
    run_comparison("compare", recipe, overwrite, resume)


def resumed(file: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe of a run that was cut off. One that is given again must say the same.

    Raises:
        TanzakuError: there is no such run, or the recipe is another.
    """
    from tanzaku.compare.journal import Journal

    out = Path(flags["out"]).expanduser() if flags.get("out") else _newest()
    kept = Journal(out).about()["recipe"]
    given = {key: value for key, value in flags.items() if value and key != "out"}
    if file is None and given:
        raise TanzakuError(
            f"--resume goes on with the recipe that {out} was begun with; leave {flag(next(iter(_flat(given))))} out"
        )
    if file is not None:
        now = json.loads(json.dumps(_anywhere(build_recipe(file, flags, default_methods=DEFAULT))))
        for key, value in kept.items():
            if key != "out" and now.get(key) != value:
                part = key
                if isinstance(value, dict):
                    part += "." + next(k for k in value if value[k] != now[key].get(k))
                fix = "leave recipe and flags out, or choose another --out"
                raise TanzakuError(f"--resume: {out} was begun with another {part}; {fix}")
    return Recipe.model_validate({**kept, "out": str(out)})


def _flat(flags: dict[str, Any]) -> list[str]:
    """The names of all flags."""
    return [name for key, value in flags.items() for name in (value if isinstance(value, dict) else [key])]


def _newest() -> Path:
    """The newest comparison in runs that is not done."""
    found = []
    for path in Path("runs").glob("*/state/run.json"):
        out = path.parent.parent
        try:
            done = json.loads((out / "results.json").read_text(encoding="utf-8")).get("status") == "done"
        except (OSError, ValueError):
            done = False
        if not done:
            found.append((path.stat().st_mtime, out))
    if not found:
        raise TanzakuError("--resume: found no comparison in runs that was cut off; name its directory with --out")
    return max(found)[1]


def _anywhere(recipe: Recipe) -> dict[str, Any]:
    """The recipe with paths that hold in any directory."""
    raw = recipe.model_dump(mode="json")
    raw["model"] = portable(recipe.model)
    for key in ("train", "valid", "test"):
        if raw["data"][key] and Path(raw["data"][key]).exists():
            raw["data"][key] = str(Path(raw["data"][key]).resolve())
    return raw


def run_comparison(command: str, recipe: Recipe, overwrite: bool, resume: bool) -> None:
    """Run a comparison and report on it.

    Raises:
        TanzakuError: bad input, found before the model is loaded where that can be, or no candidate succeeded.
        Interrupted: Ctrl-C while training; what was finished is kept.
        typer.Exit: with code 1, some candidates failed.
    """
    from tanzaku.compare.candidates import expand

    candidates, searched = expand(recipe.methods, recipe.train, recipe.compare)
    every = [*candidates, *(corner for search in searched for corner in search.corners())]
    methods = [(each.name, each.method, each.settings) for each in every]
    recipe.compare.design(recipe.data.valid is not None)
    with sitting(command, recipe, methods, overwrite, resume) as run:
        from tanzaku.cli.live import Live
        from tanzaku.cli.record import clear
        from tanzaku.compare.comparison import Comparison
        from tanzaku.compare.comparison import Interrupted as Cut
        from tanzaku.compare.journal import Journal, checksum

        live = Live(recipe.compare.rank_by)
        live.say(f"report: {run.out / REPORT}")
        model, data = run.load(live, methods)
        journal = Journal(run.out)
        about = run.about(data)
        if resume:
            kept = journal.about()
            if kept["rows"] != checksum(data):
                raise TanzakuError(f"--resume: the rows have changed since {run.out} was begun; begin anew")
            journal.go_on()
            about["started"] = kept["started"]
        else:
            clear(run.out)
            journal.begin({"recipe": _anywhere(recipe), "rows": checksum(data), "started": about["started"]})
        comparison = Comparison(
            model=model,
            data=data,
            candidates=candidates,
            searched=searched,
            settings=recipe.compare,
            seed=recipe.train.seed,
            out=run.out,
            journal=journal,
            watcher=live,
            meta=run.meta(data),
        )
        live.begin(comparison, lambda: _write(run, about, comparison, "running"))
        try:
            with live:
                comparison.run()
        except (Cut, KeyboardInterrupt):
            comparison.judge()
            comparison.finalists = []
            _write(run, about, comparison, "interrupted")
            raise Interrupted(_how_to_go_on(command, comparison)) from None
        results = _write(run, about, comparison, "done")
        live.summary(results, run.out, REPORT)
        _check_success(results)


def _write(run: Sitting, about: dict[str, Any], comparison: Comparison, status: str) -> dict[str, Any]:
    """results.json, epochs.parquet and the report, as far as the comparison has come."""
    from tanzaku.cli.record import write_results
    from tanzaku.compare.report import write_report
    from tanzaku.compare.tables import write_epochs
    from tanzaku.files import finite

    results: dict[str, Any] = finite(
        {**about, "status": status, "seconds": round(comparison.journal.seconds, 3), **comparison.results()}
    )
    results = write_results(run.out, results)
    write_epochs(results, run.out / EPOCHS)
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
