"""What a run is told: a YAML recipe, flags over it, and the candidates they name. One schema for both."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from tanzaku.core.space import Space, space_of
from tanzaku.errors import TanzakuError, flag, listed, nearest
from tanzaku.models.settings import Model, ModelSettings, as_block
from tanzaku.recipe.comparison import CompareSettings
from tanzaku.recipe.errors import complaint
from tanzaku.recipe.yaml import parse_yaml, read_yaml
from tanzaku.tasks import TASKS, task_named
from tanzaku.tasks.probe import BUNDLED, NONE
from tanzaku.tasks.settings import DataSettings
from tanzaku.tasks.sources import SPLIT, STDIN, SUFFIXES, is_address, suffix_of
from tanzaku.tasks.task import Metric, OwnMetric, Task, metric_named
from tanzaku.tasks.text_metrics import user_metric
from tanzaku.train.settings import TrainSettings

if TYPE_CHECKING:
    from tanzaku.core.method import Method
    from tanzaku.train.results import Job


_BUNDLED = Path(__file__).parents[1] / "data/recipes"
_BESIDE = ("name", "train", "uses", "init_from")  # keys of a candidate beside its method


class MethodEntry(BaseModel):
    """One candidate: `lora` or `{lora: {r: 1}}`, with a `name` and `train` settings of its own if it has them, and, of
    a method that is made of other adapters, what it `uses`: candidates, or directories of adapters. `init_from` names
    an adapter's directory, whose method, settings and weights it begins with.

    For `tanzaku compare` a setting may be a space (:mod:`tanzaku.core.space`), and the entry then stands for several
    candidates. It is kept as it is written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    settings: dict[str, Any] = {}
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    train: dict[str, Any] = {}
    uses: dict[str, str] = {}
    init_from: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _from_item(cls, item: Any) -> Any:
        if isinstance(item, MethodEntry):
            return item
        item = {item: None} if isinstance(item, str) else item
        if not isinstance(item, Mapping):
            raise TanzakuError(f"found {item!r}, expected a method such as lora or lora: {{r: 8}}")
        methods = [str(key) for key in item if key not in _BESIDE]
        if len(methods) != 1:
            found = listed(methods) or "no method"
            raise TanzakuError(f"found {found}, expected one method, with {listed(_BESIDE)} beside it if need be")
        settings = _mapping(item.get(methods[0]), f"settings of {methods[0]}", "{r: 8}")
        train = _mapping(item.get("train"), "train", "{epochs: 3}")
        for key in train:
            if key not in TrainSettings.model_fields:
                raise TanzakuError(f"train has no key {key!r}{nearest(key, TrainSettings.model_fields)}")
        if "max_length" in train:
            raise TanzakuError("all candidates read the same tokens: max_length goes into the recipe's train section")
        if "accelerations" in train:
            raise TanzakuError("all candidates share one model: accelerations go into the recipe's train section")
        uses = _uses(item.get("uses"))
        kept = {"name": item.get("name"), "init_from": item.get("init_from")}
        return {"method": methods[0], "settings": settings, "train": train, "uses": uses, **kept}

    @model_serializer
    def _to_item(self) -> dict[str, Any]:
        # As a recipe has it, so that the one in results.json can be run again.
        item: dict[str, Any] = {self.method: self.settings}
        if self.name not in (None, self.method):
            item["name"] = self.name
        beside = {"train": self.train, "uses": self.uses, "init_from": self.init_from}
        return item | {key: value for key, value in beside.items() if value}


def _uses(value: Any) -> dict[str, str]:
    """What an entry uses, by the name that its method has for it: the candidate's, or the last of a directory's."""
    if isinstance(value, Mapping) and all(isinstance(each, str) for each in value.values()):
        found = {str(key): str(each) for key, each in value.items()}
    elif isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, str) for each in value):
        found = {Path(each).name: each for each in value}
        if len(found) < len(value):
            raise TanzakuError(f"uses: found {listed(value)}, two of one name; write {{a: DIR, b: DIR}}")
    elif value is None:
        return {}
    else:
        raise TanzakuError(f"uses: found {value!r}, expected names of candidates or directories, such as [a, b]")
    for name in found:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            found_name = f"uses: found the name {name!r}, expected letters, digits, _ and -, 64 at most"
            raise TanzakuError(f"{found_name}; write {{a: DIR}}")
    return found


def _mapping(value: Any, what: str, example: str) -> dict[str, Any]:
    if not isinstance(value, Mapping | None):
        raise TanzakuError(f"found {value!r} as {what}, expected a mapping such as {example}")
    return {str(key): entry for key, entry in (value or {}).items()}


class Recipe(BaseModel):
    """A whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Model
    task: Literal[tuple(TASKS)] = Field(default="classification", description="what is learned")  # type: ignore[valid-type]
    data: SerializeAsAny[DataSettings]  # with the columns of the task; `schema` has them
    train: TrainSettings = TrainSettings.model_validate({})
    compare: CompareSettings = CompareSettings.model_validate({})
    methods: list[MethodEntry] = []
    measure: list[str] = Field(
        default=[],
        description="a function of your own that text is measured by, as my_file.py:function; its file is run "
        "(repeatable)",
    )
    forgetting: str = Field(
        default=BUNDLED,
        min_length=1,
        description="a text by whose perplexity is measured what the base forgets: a file, bundled or none",
    )
    out: str | None = Field(default=None, min_length=1, description="directory of the run (runs/<verb>-<time>)")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where the model runs")

    @field_validator("forgetting", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: BUNDLED, False: NONE}[value] if isinstance(value, bool) else value

    @property
    def kind(self) -> type[Task]:
        """The task's class."""
        return task_named(self.task)

    @property
    def own_metrics(self) -> list[OwnMetric]:
        """Metrics that are functions of the user's own; their files are run.

        Raises:
            TanzakuError: a function that is not there, or that is none, two of one name, or a task without texts.
        """
        return _functions(self.task, tuple(self.measure))

    @property
    def metrics(self) -> list[Metric]:
        """What the task's rows are measured by."""
        return [*self.kind.metrics, *self.own_metrics]

    @property
    def ranked_by(self) -> Metric:
        """The figure that candidates are ranked by."""
        name = self.compare.rank_by or self.kind.rank_by
        return next((metric for metric in self.own_metrics if metric.name == name), None) or metric_named(
            self.kind, name
        )


def _functions(task: str, named: Sequence[str]) -> list[OwnMetric]:
    if named and not task_named(task).takes_functions:
        which = listed(name for name, kind in TASKS.items() if kind.takes_functions)
        raise TanzakuError(
            f"{named[0]} compares a text that is written with its reference, and task {task} writes none; leave it "
            f"out, since it is of {which}"
        )
    own = [user_metric(each) for each in named]
    for at, metric in enumerate(own):
        if metric.name in (each.name for each in own[:at]):
            raise TanzakuError(f"{listed(named)}: two functions are named {metric.name}; rename one")
    return own


def is_function(value: Any) -> bool:
    """Whether a metric's name is that of a function in a file."""
    return isinstance(value, str) and (":" in value or value.endswith(".py"))


def _measured(recipe: Recipe) -> Recipe:
    """The recipe with the user's own functions in `measure`, wherever they are named, and by their names elsewhere."""
    named = [*recipe.measure]

    def name(value: Any) -> Any:
        if not is_function(value):
            return value
        named.append(value)
        return value.rpartition(":")[2]

    train = recipe.train.model_copy(update={"metric": name(recipe.train.metric)})
    compare = recipe.compare.model_copy(update={"rank_by": name(recipe.compare.rank_by)})
    methods = [
        entry.model_copy(update={"train": {**entry.train, "metric": name(entry.train["metric"])}})
        if "metric" in entry.train
        else entry
        for entry in recipe.methods
    ]
    changes = {"train": train, "compare": compare, "methods": methods, "measure": [*dict.fromkeys(named)]}
    found = recipe.model_copy(update=changes)
    _functions(found.task, found.measure)
    return found


@cache
def schema(task: str) -> type[Recipe]:
    """The recipe of a task, which reads the task's own columns; of an unknown one it says so."""
    kind = TASKS.get(task)
    if kind is None:
        return Recipe
    fields: dict[str, Any] = {"task": (Literal[task], task), "data": (kind.Data, ...)}
    return create_model("Recipe", __base__=Recipe, **fields)


def sections(task: str) -> dict[str, type[BaseModel]]:
    """The schema of each section of a task's recipe by its key, "" for the whole."""
    kind = TASKS.get(task)
    data = DataSettings if kind is None else kind.Data
    return {"": Recipe, "data": data, "model": ModelSettings, "train": TrainSettings, "compare": CompareSettings}


def _columns_of_all() -> type[BaseModel]:
    own = [kind.Data.model_fields for kind in TASKS.values()]
    columns: dict[str, Any] = {name: (each.annotation, each) for fields in own for name, each in fields.items()}
    return create_model("Columns", **columns)


SECTIONS = {**sections("classification"), "data": _columns_of_all()}  # of all tasks, for flags


def task_in(raw: Mapping[str, Any]) -> str:
    """The task that a recipe names as it is written, or the default."""
    found = raw.get("task")
    return found if isinstance(found, str) else str(Recipe.model_fields["task"].default)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe as it is written; relative paths of what it names are taken from its own folder.

    Raises:
        TanzakuError: no file, no YAML (with the line), or no mapping of keys.
    """
    folder = Path(path).parent
    raw = read_yaml(Path(path))
    data, model = raw.get("data"), as_block(raw.get("model"))
    entries = methods if isinstance(methods := raw.get("methods"), list) else []
    names = {str(key) for entry in entries for key in (entry if isinstance(entry, dict) else [entry])}
    names |= {str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(uses := entry.get("uses"), list | dict):
            entry["uses"] = _beside_each(folder, uses, names)
        if isinstance(entry, dict) and isinstance(start := entry.get("init_from"), str) and start.strip():
            entry["init_from"] = str(folder / Path(start).expanduser())
    if isinstance(data, dict):
        raw["data"] = {
            key: _beside(folder, value) if key in ("train", "valid", "test") and isinstance(value, str) else value
            for key, value in data.items()
        }
    for section, key in [(raw.get("train"), "metric"), (raw.get("compare"), "rank_by")] + [
        (entry.get("train"), "metric") for entry in entries if isinstance(entry, dict)
    ]:
        if isinstance(section, dict) and is_function(section.get(key)):
            section[key] = str(folder / Path(section[key]).expanduser())
    if isinstance(text := raw.get("forgetting"), str) and text not in ("", BUNDLED, NONE):
        raw["forgetting"] = str(folder / Path(text).expanduser())
    if isinstance(own := raw.get("measure"), list):
        raw["measure"] = [
            str(folder / Path(each).expanduser()) if isinstance(each, str) and each.strip() else each for each in own
        ]
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and (name.startswith(".") or (folder / name / "config.json").is_file()):
        raw["model"] = {**model, "name": str(folder / name)}
    return raw


def _beside_each(folder: Path, uses: Any, names: Collection[str]) -> Any:
    """What an entry uses, with directories taken from the recipe's folder; what may be a candidate's name is one."""

    def beside(each: Any) -> Any:
        candidate = isinstance(each, str) and (each in names or re.sub(r"-\d+$", "", each) in names)
        return str(folder / each) if isinstance(each, str) and not candidate and (folder / each).is_dir() else each

    return {key: beside(each) for key, each in uses.items()} if isinstance(uses, dict) else [*map(beside, uses)]


def _beside(folder: Path, source: str) -> str:
    """Files and folders lie beside the recipe; any other name is left to the datasets library."""
    if not source.strip() or source == STDIN or is_address(source):
        return source
    path, split = folder / Path(source).expanduser(), SPLIT.fullmatch(source)
    local = path.exists() or suffix_of(path) in SUFFIXES or (split is not None and (folder / split["name"]).is_dir())
    return str(path) if local or source.startswith(".") else source


def build_recipe(file: Path | None, flags: Mapping[str, Any], default_methods: Sequence[str] = ()) -> Recipe:
    """A recipe file with flags over it.

    Args:
        flags: nested as a recipe is, but for four. `recipe` names a bundled one, over which the file is laid.
            `methods` lists names: of candidates or methods that the file has, whose settings there hold, or of other
            methods. `set` lists texts such as `r=1` or `lora.r=1`, their values as in YAML. `init_from` is of the one
            candidate there is, or makes one.
        default_methods: the candidates where neither names any.

    Raises:
        TanzakuError: a key that is unknown or missing, or a value that does not fit, and where it stands.
    """
    keys = {key: value for key, value in flags.items() if key not in ("recipe", "methods", "set", "init_from")}
    own = load_recipe(file) if file is not None else {}
    if (name := flags.get("recipe")) is not None:
        whole = bundled(name)
        for where, given in ((file, own.get("task")), ("--task", flags.get("task"))):
            if given is not None and given != whole.get("task"):
                raise TanzakuError(f"{where} is of task {given!r}, and the recipe {name} of {whole.get('task')!r}")
        own = laid_over(whole, own)
    raw = laid_over(own, keys)
    task = task_in(raw)
    try:
        recipe = schema(task).model_validate(raw)
    except ValidationError as error:
        raise TanzakuError(complaint(error, str(file or ""), sections(task), keys)) from None
    recipe = _measured(recipe)
    _check_metric(recipe, recipe.train.metric, "metric", "train", keys, file)
    _check_metric(recipe, recipe.compare.rank_by, "rank_by", "compare", keys, file)
    for entry in recipe.methods:
        _check_metric(recipe, entry.train.get("metric"), "metric", f"{entry.method}: train", {}, file)
    entries = named(recipe.methods)
    start = flags.get("init_from")
    by_default = default_methods if not entries and start is None else ()
    if names := flags.get("methods") or by_default:
        entries = named(
            [entry for name in names for entry in _meant(entries, name) or [MethodEntry.model_validate(name)]]
        )
    if start is not None:
        entries = [_started(entries, start)]
    for assignment in flags.get("set", []):
        entries = _assigned(entries, assignment)
    compare = recipe.compare.model_copy(update={"rank_by": recipe.ranked_by.name})
    return recipe.model_copy(update={"methods": entries, "compare": compare})


def bundled_names() -> list[str]:
    """Recipes that come with Tanzaku."""
    return sorted(path.stem for path in _BUNDLED.glob("*.yaml"))


def bundled(name: str) -> dict[str, Any]:
    """One of them; a TanzakuError with the nearest name if there is none."""
    if name not in (known := bundled_names()):
        raise TanzakuError(
            f"--recipe is {name!r}{nearest(name, known)}, expected one of {listed(known)}; a file of your own is given "
            "without --recipe"
        )
    return read_yaml(_BUNDLED / f"{name}.yaml")


def _started(entries: Sequence[MethodEntry], start: str) -> MethodEntry:
    """The one candidate, going on from an adapter; without one, a candidate of that adapter's method."""
    if len(entries) > 1:
        whose = listed(str(entry.name) for entry in entries)
        raise TanzakuError(
            f"--init-from is of one candidate, and there are {len(entries)}: {whose}; name one with --method, or write "
            "init_from beside it in the recipe"
        )
    if entries:
        return entries[0].model_copy(update={"init_from": start})
    from tanzaku.storage.starts import method_from

    return named([MethodEntry.model_validate({method_from(Path(start).expanduser()).name: None, "init_from": start})])[
        0
    ]


def _check_metric(
    recipe: Recipe, value: Any, key: str, section: str, flags: Mapping[str, Any], file: Path | None
) -> None:
    """A TanzakuError unless the value is a metric of the recipe's task, or something that is checked elsewhere."""
    known = [metric.name for metric in recipe.metrics]
    if isinstance(value, str) and value not in known:
        where = flag(key) if key in flags.get(section, {}) else f"{file or 'the recipe'}: {section}.{key}"
        raise TanzakuError(
            f"{where} is {value!r}, and {recipe.task} has no such metric; expected {listed(known)}"
            f"{nearest(value, known)}"
        )


def laid_over(raw: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it is written, with flags over it that are nested alike."""
    raw = {key: {} if key in SECTIONS and value is None else value for key, value in {"data": {}, **raw}.items()}
    raw |= {"model": as_block(raw["model"])} if "model" in raw else {}
    for key, value in flags.items():
        below = raw.get(key, {})
        if not isinstance(value, Mapping):
            raw[key] = value
        elif isinstance(below, Mapping):  # else the schema tells that the file's section is none
            raw[key] = {**below, **value}
    return raw


def named(entries: Sequence[MethodEntry]) -> list[MethodEntry]:
    """The candidates, each with a name of its own: lora, lora-2 where none was given."""
    taken = [entry.name for entry in entries if entry.name is not None]
    if twice := [name for name in taken if taken.count(name) > 1]:
        raise TanzakuError(f"two candidates are named {twice[0]!r}; give each a name of its own")
    out = []
    for entry in entries:
        if entry.name is None:
            numbers = (f"{entry.method}-{n}" for n in count(2))
            name = next(name for name in chain([entry.method], numbers) if name not in taken)
            taken.append(name)
            entry = entry.model_copy(update={"name": name})
        out.append(entry)
    return out


def _meant(entries: list[MethodEntry], name: str) -> list[MethodEntry]:
    """The candidate of that name, or else all of that method."""
    return [e for e in entries if e.name == name] or [e for e in entries if e.method == name]


def _assigned(entries: list[MethodEntry], assignment: str) -> list[MethodEntry]:
    """The candidates with one more setting, from `r=1` or `lora.r=1`."""
    left, equals, text = assignment.partition("=")
    target, _, key = left.strip().rpartition(".")
    names = [str(entry.name) for entry in entries]
    if not equals or not key:
        raise TanzakuError(f"--set {assignment}: expected a setting and its value, such as r=1 or lora.r=1")
    if not target and len(entries) != 1:
        fix = f"say whose it is, as in {names[0]}.{assignment}" if names else "name one with --method"
        raise TanzakuError(f"--set {assignment}: there are {len(entries)} candidates; {fix}")
    meant = _meant(entries, target) if target else entries
    if not meant:
        raise TanzakuError(
            f"--set {assignment}: no candidate is named {target!r}{nearest(target, names)}; there are {listed(names)}"
        )
    value = parse_yaml(text, f"--set {assignment}")
    return [
        entry.model_copy(
            update={"uses": _uses(value)} if key == "uses" else {"settings": {**entry.settings, key: value}}
        )
        if entry in meant
        else entry
        for entry in entries
    ]


def jobs_of(recipe: Recipe) -> list[Job]:
    """The candidates, ready to be trained, where each stands for itself; settings of methods are checked here.

    Raises:
        TanzakuError: an unknown method, a setting that it has not or that does not fit, or a space.
    """
    from tanzaku.train.results import Job  # with torch below it, which a bad recipe shall not wait for

    jobs = []
    for entry in named(recipe.methods):
        for key, space in spaces_of(entry).items():
            raise TanzakuError(
                f"candidate {entry.name!r}: {key} has a {space.kind}, and train takes one setting; "
                f"give {key} one value, or use tanzaku compare"
            )
        uses = {label: Path(used) for label, used in used_by(entry, []).items()}
        jobs.append(Job(str(entry.name), *checked(entry, recipe.train), uses=uses, init_from=start_of(entry)))
    return jobs


def start_of(entry: MethodEntry) -> Path | None:
    """The directory of the adapter that a candidate goes on from."""
    return None if entry.init_from is None else Path(entry.init_from).expanduser()


def used_by(entry: MethodEntry, entries: Sequence[MethodEntry]) -> dict[str, str | Path]:
    """What an entry uses, by its method's names: another's name, or the directory of an adapter.

    Raises:
        TanzakuError: neither, or the method uses none, or it needs some.
    """
    from tanzaku.methods import METHODS, method_named

    method, others = method_named(entry.method), [str(each.name) for each in entries if each.name != entry.name]
    if method.uses_others != bool(entry.uses):
        which = listed(name for name, each in METHODS.items() if each.uses_others)
        raise TanzakuError(
            f"candidate {entry.name!r}: found uses, and {entry.method} is not made of other adapters; {which} are"
            if entry.uses
            else f"candidate {entry.name!r}: {entry.method} is made of other adapters; name candidates or directories "
            "in the recipe, as in uses: [a, b]"
        )
    out: dict[str, str | Path] = {}
    made = {str(each.name) for each in entries if each.uses}
    for label, used in entry.uses.items():
        if used in made:
            raise TanzakuError(f"candidate {entry.name!r} uses {used!r}, which is made of others itself")
        if used in others:
            out[label] = used
        elif Path(used).expanduser().is_dir():
            out[label] = Path(used).expanduser()
        else:
            there = f"; other candidates are {listed(others)}" if others else ""
            raise TanzakuError(
                f"candidate {entry.name!r} uses {used!r}, which is no other candidate and no adapter's directory"
                f"{nearest(used, others)}{there}"
            )
    return out


def spaces_of(entry: MethodEntry) -> dict[str, Space]:
    """The settings for which a candidate has a space instead of a value: the method's and those of its `train`.

    Raises:
        TanzakuError: an unknown method or setting, or a space that cannot be.
    """
    from tanzaku.methods import method_named

    method = method_named(entry.method)
    method.check_names(entry.settings)
    hints, found = get_type_hints(method), {}
    for key, value in (*entry.settings.items(), *entry.train.items()):
        try:
            space = space_of(value, mapping=key in entry.settings and _takes_mappings(hints[key]))
        except TanzakuError as error:
            raise TanzakuError(f"candidate {entry.name!r}: {key}: {error}") from None
        if space is not None:
            found[key] = space
            if entry.init_from is not None and key in entry.settings:
                raise TanzakuError(
                    f"candidate {entry.name!r}: {key} has a {space.kind}, and {entry.init_from}, where it begins, "
                    "has one value; only what stands in its train section may be searched"
                )
    return found


def checked(entry: MethodEntry, train: TrainSettings) -> tuple[Method, TrainSettings]:
    """A candidate's method, and how it is trained: the run's settings with its own over them.

    Raises:
        TanzakuError: an unknown method, or a setting that it has not or that does not fit.
    """
    from tanzaku.methods import method_named
    from tanzaku.train.results import for_method

    method_named(entry.method).check_names(entry.settings)  # an unknown name is told better than pydantic would
    try:
        own = TrainSettings.model_validate({**train.model_dump(), **entry.train})
        used = {"adapters": [*entry.uses]} if entry.uses else {}
        method = _adapter(entry.method).validate_python({**used, **entry.settings})
        method = _as_begun(entry, method)
        return method, for_method(own, method)
    except ValidationError as error:
        raise TanzakuError(complaint(error, f"candidate {entry.name!r}", {"": TrainSettings}, {})) from None


def _as_begun(entry: MethodEntry, method: Method) -> Method:
    """The method of the adapter that a candidate goes on from, if it does; what the candidate says of it must be so."""
    if (start := start_of(entry)) is None:
        return method
    from tanzaku.storage.starts import method_from

    try:
        kept = method_from(start)
    except TanzakuError as error:
        raise TanzakuError(f"candidate {entry.name!r}: init_from: {error}") from None
    if kept.name != method.name:
        raise TanzakuError(
            f"candidate {entry.name!r}: its method is {method.name}, and {start}, which it goes on from, is an adapter "
            f"of {kept.name}; write {kept.name}, or leave init_from out"
        )
    for key in entry.settings:
        asked, there = getattr(method, key), getattr(kept, key)
        if asked != there and not (isinstance(asked, list) and isinstance(there, list) and {*asked} == {*there}):
            raise TanzakuError(
                f"candidate {entry.name!r}: {key} is {asked!r}, and {start}, which it goes on from, has {there!r}; "
                "leave it out"
            )
    return kept


@cache  # for the many candidates of a grid: it takes longer to build than to use
def _adapter(method: str) -> TypeAdapter[Method]:
    from tanzaku.methods import METHODS

    return TypeAdapter(METHODS[method])


def _takes_mappings(hint: Any) -> bool:
    try:
        TypeAdapter(hint).validate_python({})
    except ValidationError:
        return False
    return True
