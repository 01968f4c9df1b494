"""`--resume`: which run goes on, and whether it is still the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tanzaku.cli.record import BEGUN, command_of, is_done
from tanzaku.cli.run import portable
from tanzaku.errors import TanzakuError, flag
from tanzaku.recipe.errors import complaint
from tanzaku.recipe.schema import Recipe, build_recipe, schema, sections, task_in
from tanzaku.tasks.probe import BUNDLED, NONE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tanzaku.cli.run import Sitting
    from tanzaku.compare.journal import Journal
    from tanzaku.tasks.task import TaskData


DRY_RUN = "print what tanzaku check tells of the rows, see that all fits the model, and train nothing"

SHOWN = "1 where text is written, else none; 3 in a dry run"


def switch(what: str) -> str:
    """The help of a verb's flag."""
    return f"go on with {what} that was cut off: the one in --out, or else the newest in runs"


def resumed(command: str, file: Path | None, flags: dict[str, Any], default_methods: Sequence[str] = ()) -> Recipe:
    """The recipe of a run that was cut off. One that is given again must say the same.

    Raises:
        TanzakuError: there is no such run, or the recipe is another.
    """
    from tanzaku.compare.journal import Journal

    out = Path(flags["out"]).expanduser() if flags.get("out") else _newest(command)
    if command == "train" and not (out / BEGUN).is_file():
        _say_what_is_there(out)
    _check_whole(out)
    about = Journal(out).about()
    begun = about["command"]
    if (begun == "train") != (command == "train"):
        raise TanzakuError(f"{out} holds a run of tanzaku {begun}; go on with tanzaku {begun} --resume --out {out}")
    kept = about["recipe"]
    given = {key: value for key, value in flags.items() if value and key != "out"}
    if file is None and given:
        raise TanzakuError(f"--resume goes on with the recipe that {out} was begun with; leave {_flags(given)[0]} out")
    if file is not None:
        now = _as_settled(json.loads(json.dumps(_anywhere(build_recipe(file, flags, default_methods)))), kept)
        for key, value in kept.items():
            if key != "out" and now.get(key) != value:
                part = key
                if isinstance(value, dict):
                    part += "." + next(k for k in value if value[k] != now[key].get(k))
                fix = "leave recipe and flags out, or choose another --out"
                raise TanzakuError(f"--resume: {out} was begun with another {part}; {fix}")
    try:
        return schema(task_in(kept)).model_validate({**kept, "out": str(out)})
    except ValidationError as error:
        raise _damaged(out, complaint(error, "its recipe", sections(task_in(kept)), {})) from None


def _as_settled(now: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the precision that the run began with, where it leaves it open."""
    pairs = [(now, kept), *zip(now["methods"], kept.get("methods", []), strict=False)]
    for mine, its in ((mine.get("train"), its.get("train")) for mine, its in pairs):
        if isinstance(mine, dict) and isinstance(its, dict) and mine.get("precision") == "auto":
            mine["precision"] = its.get("precision")
    return now


def _say_what_is_there(out: Path) -> None:
    if not out.is_dir():
        raise TanzakuError(f"--resume: there is no {out}, so no run to go on with; leave --resume out to begin one")
    if command_of(out) == "train" and is_done(out):
        raise TanzakuError(
            f"--resume: the run in {out} is done, and its adapter is below {out / 'adapters'}; to train anew choose "
            "another --out, or pass --overwrite"
        )


def _check_whole(out: Path) -> None:
    """An error where what a run wrote down as it was begun is there, and does not say what it should."""
    path = out / BEGUN
    if not path.is_file():
        return
    about = _read(path)
    kinds = {"tanzaku": str, "command": str, "recipe": dict, "started": str, "rows": str, "base model": str}
    if lacking := [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]:
        raise _damaged(out, f"it does not say its {lacking[0]}")


def _damaged(out: Path, why: str) -> TanzakuError:
    return TanzakuError(f"--resume: {out / BEGUN} is damaged: {why}; begin anew with --overwrite")


def begin(run: Sitting, journal: Journal, model: PreTrainedModel, data: TaskData, resume: bool) -> dict[str, Any]:
    """Begin a run in its directory, or go on with the one there; what results.json says of the run itself.

    Raises:
        TanzakuError: rows or base model are others than those that the run was begun with.
    """
    from tanzaku.cli.record import clear
    from tanzaku.train.state import base_checksum, checksum

    about = run.about(data)
    now = {f"file of {metric.name}": metric.sha256 for metric in run.recipe.own_metrics}
    now |= {} if data.probe is None else {"held text": data.probe.sha256}
    now |= {"rows": checksum(data), "base model": base_checksum(model)}
    now |= {f"adapter of {name}": digest for name, digest in run.starts.items()}
    if not resume:
        clear(run.out)
        recipe = {"command": run.command, "recipe": _anywhere(run.recipe), "started": about["started"]}
        journal.begin({**recipe, **now})
        run.begun = True
        return about
    kept = journal.about()
    for what, value in now.items():
        if kept.get(what) != value:
            changed = "the rows have" if what == "rows" else f"the {what} has"
            raise TanzakuError(f"--resume: {changed} changed since {run.out} was begun; begin anew with --overwrite")
    journal.go_on()
    return {**about, "started": kept["started"]}


def _flags(given: dict[str, Any]) -> list[str]:
    """All flags that were given, nested as a recipe is."""
    names = [(key, name) for key, value in given.items() for name in (value if isinstance(value, dict) else [key])]
    own = {("methods", "methods"): "method", ("model", "name"): "model"}  # flags that are not called as their key is
    return [flag(own.get(each, each[1])) for each in names]


def _newest(command: str) -> Path:
    """The newest run of the command in runs that is not done."""
    found = []
    for path in Path("runs").glob("*/state/run.json"):
        out = path.parent.parent
        if (_read(path).get("command") == "train") == (command == "train") and _read(out / "results.json").get(
            "status"
        ) != "done":
            found.append((path.stat().st_mtime, out))
    if not found:
        raise TanzakuError(
            f"--resume: found no run of tanzaku {command} in runs that was cut off; name its directory with --out"
        )
    return max(found)[1]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _anywhere(recipe: Recipe) -> dict[str, Any]:
    """The recipe with paths that hold in any directory."""
    raw = recipe.model_dump(mode="json")
    raw["model"] = recipe.model.model_copy(update={"name": portable(recipe.model.name)}).to_json()
    for entry in raw["methods"]:
        if "init_from" in entry:
            entry["init_from"] = str(Path(entry["init_from"]).expanduser().resolve())
    raw["measure"] = [str(Path(each).expanduser().absolute()) for each in recipe.measure]
    if recipe.forgetting not in (BUNDLED, NONE):
        raw["forgetting"] = str(Path(recipe.forgetting).expanduser().absolute())
    for key in ("train", "valid", "test"):
        if raw["data"][key] and Path(raw["data"][key]).exists():
            raw["data"][key] = str(Path(raw["data"][key]).resolve())
    return raw
