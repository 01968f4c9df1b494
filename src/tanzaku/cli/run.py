"""What `train`, `compare` and `demo` share: check everything that is cheap, then load the model and the rows."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.support.numbers import written

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tanzaku.cli.display import Display
    from tanzaku.core.method import Method
    from tanzaku.models.settings import ModelSettings
    from tanzaku.recipe.schema import Recipe
    from tanzaku.tasks.prepare import Tables
    from tanzaku.tasks.task import Probe, Task, TaskData
    from tanzaku.train.settings import TrainSettings


class Tried(Protocol):
    """What a run is to train: a candidate, or a job."""

    @property
    def name(self) -> str: ...

    @property
    def method(self) -> Method: ...

    @property
    def settings(self) -> TrainSettings: ...

    @property
    def uses(self) -> Mapping[str, str | Path]:
        """Candidates, or directories of adapters, that the method uses by its names for them."""
        ...

    @property
    def init_from(self) -> Path | None:
        """The directory of the adapter that it goes on from."""
        ...


_MANY = 100  # settings of methods whose check takes seconds


class Interrupted(Exception):
    """Ctrl-C; says what was kept and how to go on."""


@dataclass
class Sitting:
    """A run that is about to train: where it writes, and what it was told."""

    command: str
    recipe: Recipe
    out: Path
    device: str
    tables: Tables
    show: int | None = None  # training rows that are printed; None: as many as the task's runs have
    starts: dict[str, str] = field(default_factory=dict)  # checksums of adapters that are gone on from, by candidate
    begun: bool = False  # whether the directory holds this run
    clock: float = field(default_factory=time.monotonic)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def load(self, display: Display, methods: Sequence[Tried]) -> tuple[PreTrainedModel, TaskData]:
        """The model on its device, and the rows; each method is attached to a model without weights first.

        Raises:
            TanzakuError: no such model, rows that cannot be encoded, or a method that does not fit the model.
        """
        from tanzaku.cli.rows import show_rows
        from tanzaku.compare.resamples import resamples
        from tanzaku.models.loading import load_for, load_tokenizer

        recipe = self.recipe
        tokenizer = load_tokenizer(recipe.model.name, on_progress=display.say)
        data = _encoded(recipe, self.tables, tokenizer)
        display.data(data, recipe.train.max_length)
        folded = _folded(self.command, recipe)
        for split in data.splits():
            for line in data.task.remarks(split) if folded or split.name != "train" else ():
                display.say(line)
        # What is learnt of a text is easily not what was meant.
        show = int(data.task.decoding is not None) if self.show is None else self.show
        show_rows(display, self.tables, data.train, tokenizer, show)
        if self.command != "train":  # a class that is too rare for the folds is told before the model is loaded
            resamples(data, recipe.compare.design(data.valid is not None), recipe.train.seed)
        self.starts = _starts(methods)
        _say_starts(display, methods, data.task)
        _check_starts(recipe, methods, data, self.device, folded)
        kind = _dtype([each.settings for each in methods])
        model, _ = load_for(recipe.model, data.task, dtype=kind, seed=recipe.train.seed)
        if len(distinct := _distinct(methods)) > _MANY:
            display.say(f"checking {len(distinct):,} settings of methods against the model")
        before = _check_fit(model, methods, data, recipe.train.max_length, self.device, folded)
        model.to(self.device)
        display.say(f"model: {recipe.model.name}, {model.num_parameters():,} parameters, on {self.device}")
        probe = _probe(recipe, data, model, tokenizer, before, methods[0].settings)
        if probe is not None:
            display.say(
                f"held text: {probe.name}, {probe.tokens:,} tokens; the base's perplexity is {written(probe.base, 2)}"
            )
        return model, replace(data, probe=probe)

    def about(self, data: TaskData) -> dict[str, Any]:
        """What results.json says of the run itself."""
        from tanzaku.cli.machine import machine, versions
        from tanzaku.cli.record import data_record

        return {
            "command": self.command,
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": versions(),
            "device": self.device,
            "machine": machine(self.device),
            "data": data_record(data),
            "forgetting": None if data.probe is None else data.probe.to_json(),
            "started": self.started.isoformat(timespec="seconds"),
        }

    def meta(self, data: TaskData) -> dict[str, Any]:
        """What is kept beside an adapter, for prediction."""
        return {
            "task": self.recipe.task,
            "model": portable(self.recipe.model.name),
            **loaded_as(self.recipe.model),
            **data.task.to_json(),
            "max_length": self.recipe.train.max_length,
            "files": {
                split: Path(source).name
                for split in ("train", "valid", "test")
                if (source := getattr(self.recipe.data, split)) is not None
            },
        }


def rehearse(command: str, recipe: Recipe, methods: Sequence[Tried], show: int | None = None) -> None:
    """Check what a run checks of its settings, its rows and the model, without weights, and print what `tanzaku check`
    prints.

    Raises:
        TanzakuError: bad input.
        typer.Exit: with code 1, a check of the rows would stop training.
    """
    from tanzaku.cli.card import show_card
    from tanzaku.compare.resamples import resamples
    from tanzaku.models.loading import outline_for

    device, folded = _check_settings(command, recipe, methods)
    tables = show_card(recipe.kind, recipe.data, recipe.model.name, recipe.train.max_length, folded, show)
    _check_metrics(command, recipe, methods, tables.task)
    model, tokenizer = outline_for(recipe.model, tables.task)
    data = _encoded(recipe, tables, tokenizer)
    if command != "train":
        resamples(data, recipe.compare.design(data.valid is not None), recipe.train.seed)
    _check_fit(model, methods, data, recipe.train.max_length, device, folded)


def _encoded(recipe: Recipe, tables: Tables, tokenizer: Any) -> TaskData:
    """The rows as tokens, and their task with the metrics of the recipe, whose functions are called for a row: what
    they do wrong shall not come out after hours."""
    from tanzaku.tasks.prepare import encode

    own = recipe.own_metrics
    data = encode(replace(tables, task=tables.task.measured_by(own)), tokenizer, recipe.train.max_length)
    for metric in own:
        metric.try_out(str(data.train.examples[0].target))
    return data


def _probe(
    recipe: Recipe, data: TaskData, model: PreTrainedModel, tokenizer: Any, before: int, settings: TrainSettings
) -> Probe | None:
    """The held text with what the base has of it.

    Args:
        before: virtual tokens at most, which have to find room beside its windows.
    """
    from tanzaku.core.positions import room
    from tanzaku.models.families import Base
    from tanzaku.tasks.inference import check_rows, perplexity_of
    from tanzaku.tasks.probe import probe_text, sha256_of
    from tanzaku.tasks.task import Probe
    from tanzaku.train.step import autocast

    if (named := probe_text(recipe.forgetting)) is None:
        return None
    name, text = named
    limit = room(Base.of(model))
    longest = recipe.train.max_length if limit is None else min(recipe.train.max_length, limit - before)
    if (rows := data.task.probe(text, tokenizer, longest)) is None:
        return None
    check_rows(Base.of(model), rows, longest)
    with autocast(model.device, settings.precision):
        base = perplexity_of(model, data.task, rows, data.pad_token_id, settings.accelerations)
    return Probe(name, rows, sha256_of(text), base)


def _check_probe(recipe: Recipe) -> None:
    """A TanzakuError where a held text is given to a task that foretells none, or cannot be read."""
    from tanzaku.tasks import TASKS
    from tanzaku.tasks.probe import BUNDLED, NONE, probe_text
    from tanzaku.tasks.task import Task

    if recipe.forgetting not in (BUNDLED, NONE) and recipe.kind.probe is Task.probe:
        which = listed(name for name, kind in TASKS.items() if kind.probe is not Task.probe)
        raise TanzakuError(
            f"forgetting is {recipe.forgetting!r}, and task {recipe.task} has no perplexity of a text; leave it out, "
            f"since it is of {which}"
        )
    probe_text(recipe.forgetting)


def _check_settings(command: str, recipe: Recipe, methods: Sequence[Tried]) -> tuple[str, bool]:
    """What takes no look at rows or model; the device, and whether rows are cut into folds."""
    from tanzaku.cli.machine import device_named, quieten

    for each in methods:
        _check_sense(recipe, each.name, each.settings)
    _check_probe(recipe)
    for tracker in dict.fromkeys(each.settings.tracker for each in methods):
        _check_tracker(tracker)
    quieten()
    return device_named(recipe.device), _folded(command, recipe)


def _folded(command: str, recipe: Recipe) -> bool:
    """Whether training rows are validation rows in turn."""
    return command != "train" and recipe.compare.design(recipe.data.valid is not None).folds is not None


@contextmanager
def sitting(
    command: str,
    recipe: Recipe,
    methods: Sequence[Tried],
    overwrite: bool,
    resume: bool,
    show: int | None = None,
) -> Iterator[Sitting]:
    """Check all that is cheap to check, and make the run's directory. One that stays empty goes again.

    Raises:
        TanzakuError: bad input.
    """
    from tanzaku.cli.record import locked, prepare_out
    from tanzaku.tasks.prepare import read_tables

    if resume and overwrite:
        raise TanzakuError("--resume goes on with a run, and --overwrite replaces it; give one of the two")
    device, folded = _check_settings(command, recipe, methods)
    tables = read_tables(recipe.kind, recipe.data, folded)
    _check_metrics(command, recipe, methods, tables.task)
    out = Path(recipe.out).expanduser() if recipe.out else _new(command)
    for each in methods if overwrite else ():
        if each.init_from is not None and out.resolve() in each.init_from.resolve().parents:
            raise TanzakuError(
                f"candidate {each.name!r} goes on from {each.init_from}, which --overwrite would remove with {out}; "
                "choose another --out"
            )
    fresh = not out.is_dir()
    if fresh:
        prepare_out(out, overwrite)
    with locked(out):
        if not fresh and not resume:
            prepare_out(out, overwrite)
        run = Sitting(command, recipe, out, device, tables, show, begun=resume)
        try:
            yield run
        except KeyboardInterrupt:
            raise Interrupted(_how_to_go_on(run)) from None
        finally:
            # They go only if they are empty: a run that could not begin leaves nothing.
            with suppress(OSError):
                out.rmdir()
                if recipe.out is None:
                    out.parent.rmdir()


def _new(command: str) -> Path:
    name = f"runs/{command}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(path for path in map(Path, names) if not path.exists())


def _how_to_go_on(run: Sitting) -> str:
    from tanzaku.cli.record import clear, only_leftovers

    if run.begun and not only_leftovers(run.out):
        return f"interrupted; go on with tanzaku {run.command} --resume --out {run.out}"
    if run.begun:
        clear(run.out)
    return "interrupted; nothing was finished yet, so run the same command again"


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what `precision: auto` is on this machine: a run that goes on, here or elsewhere, keeps it."""
    there = [recipe.train.precision, *(entry.train.get("precision") for entry in recipe.methods)]
    if "auto" not in there:
        return recipe
    import torch

    from tanzaku.cli.machine import device_named
    from tanzaku.engine.precision import precision_for

    # Weights are bf16 where all compute in it, and not where anything says otherwise.
    half = recipe.model.dtype in ("auto", "bfloat16") and all(each in (None, "auto", "bf16") for each in there)
    device = torch.device(device_named(recipe.device))
    here = {"precision": precision_for(device, torch.bfloat16 if half else None)}
    entries = [
        entry.model_copy(update={"train": entry.train | here}) if entry.train.get("precision") == "auto" else entry
        for entry in recipe.methods
    ]
    run = recipe.train.model_copy(update=here) if recipe.train.precision == "auto" else recipe.train
    return recipe.model_copy(update={"train": run, "methods": entries})


def loaded_as(model: ModelSettings) -> dict[str, Any]:
    """What is kept beside an adapter of how its base was loaded, if something was said of it."""
    said = model.to_json()
    return {} if isinstance(said, str) else {"loading": {key: value for key, value in said.items() if key != "name"}}


def portable(model: str) -> str:
    """A model's name as it can be loaded from any directory."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() and model != "embedded" else model


def _check_sense(recipe: Recipe, name: str, settings: TrainSettings) -> None:
    from tanzaku.tasks import TASKS
    from tanzaku.tasks.task import Task

    folds = recipe.compare.folds is not None
    if recipe.data.valid is None and not folds and (settings.patience is not None or settings.restore_best):
        key = "restore_best" if settings.restore_best else "patience"
        raise TanzakuError(f"candidate {name!r}: {key} needs validation rows; give --valid, or leave it out")
    if settings.class_weights and recipe.kind.class_weights is Task.class_weights:
        which = listed(task for task, kind in TASKS.items() if kind.class_weights is not Task.class_weights)
        raise TanzakuError(
            f"candidate {name!r}: class_weights weighs classes, and {recipe.task} has none; leave it out, since it is "
            f"of {which}"
        )
    if settings.focal_gamma and not recipe.kind.has_focal:
        which = listed(task for task, kind in TASKS.items() if kind.has_focal)
        raise TanzakuError(
            f"candidate {name!r}: focal_gamma is {settings.focal_gamma:g}, and {recipe.task} has no focal loss; "
            f"leave it out, since it is of {which}"
        )


def _check_metrics(command: str, recipe: Recipe, methods: Sequence[Tried], task: Task) -> None:
    """A TanzakuError where these very rows have no figure of a metric that their task has elsewhere."""
    known = [metric.name for metric in task.metrics] + [metric.name for metric in recipe.own_metrics]
    asked = {} if command == "train" else {"rank_by": recipe.ranked_by.name}
    asked |= {f"metric of candidate {each.name!r}": each.settings.metric for each in methods}
    for where, name in asked.items():
        if name not in known:
            fix = "use --rank-by loss" if where == "rank_by" else "use --metric loss"
            raise TanzakuError(
                f"{where} is {name}, and these rows ({task.describe()}) have {listed(known)} alone; {fix}"
            )


def _distinct(methods: Sequence[Tried]) -> list[Tried]:
    """The first candidate of each settings of a method: how it is trained is nothing to the model."""
    first: dict[str, Tried] = {}
    for each in methods:
        first.setdefault(repr((each.method, each.uses, each.init_from)), each)
    return list(first.values())


def _check_fit(
    model: PreTrainedModel,
    methods: Sequence[Tried],
    data: TaskData,
    max_length: int,
    device: str,
    folded: bool,
) -> int:
    """Attach every method to a copy without weights, so that the last of many does not fail after hours; the most
    virtual tokens that one has."""
    import torch

    from tanzaku.core.attach import attach, detach
    from tanzaku.errors import TooLarge
    from tanzaku.models.families import Base
    from tanzaku.storage.starts import begin
    from tanzaku.storage.store import check_made_for, method_in
    from tanzaku.tasks.inference import check_rows

    # Whether text is written for the rows of each split: for training rows where they are validation rows in turn.
    written = {split.name: data.task if folded or split.name != "train" else None for split in data.splits()}
    for split in data.splits():
        check_rows(Base.of(model), split, max_length, task=written[split.name])
    with torch.device("meta"):
        twin = type(model)(model.config)
    others, most = {each.name: each.method for each in methods}, 0
    for each in _distinct(methods):
        name, method = each.name, each.method
        if method.task_type not in (None, kind := data.task.peft_type):
            raise TanzakuError(
                f"candidate {name!r}: task_type is {method.task_type!r}, and what is trained is of the task "
                f"{data.task.name}; expected {kind!r}, or leave it out"
            )
        try:
            method, brought = copy.copy(method), {}
            for label, used in each.uses.items():
                brought[label] = f"{name}-{label}"
                attach(twin, others[used] if isinstance(used, str) else method_in(used), brought[label])
            method._under = brought
            if each.init_from is None:
                adapter = attach(twin, method, name)
            else:
                adapter = begin(twin, method, name, each.init_from, data.task)
                check_made_for(model, each.init_from)
            adapter.brought = [*brought.values()]
            _check_row_data(adapter.method, data)
            if data.task.decoding is not None and (setting := adapter.method.reads_ends()):
                raise TanzakuError(
                    f"{setting} goes by where a row ends, which text that is being written does not show; set it to 0"
                )
            if not adapter.trained():
                raise TanzakuError("nothing of it is trained; let it learn something, such as a head")
            _check_memory(sum(parameter.numel() for _, parameter in adapter.trained()), method.largest(), device)
            for split in data.splits() if adapter.before else ():
                check_rows(Base.of(model), split, max_length, adapter, task=written[split.name])
            most = max(most, adapter.before)
            detach(twin, name)
        except TooLarge as error:
            raise TanzakuError(f"candidate {name!r}: {method.largest()}: {error}") from None
        except TanzakuError as error:
            raise TanzakuError(f"candidate {name!r}: {error}") from None
        except (RuntimeError, TypeError, OverflowError) as error:  # sizes that torch itself cannot count
            raise TanzakuError(f"candidate {name!r}: {method.largest()}: {str(error).splitlines()[0]}") from None
    return most


def _starts(methods: Sequence[Tried]) -> dict[str, str]:
    from tanzaku.storage.store import checksum

    return {each.name: checksum(each.init_from) for each in methods if each.init_from is not None}


def _say_starts(display: Display, methods: Sequence[Tried], task: Task) -> None:
    """Which candidates that go on from an adapter have a new head."""
    from tanzaku.storage.starts import said

    for each in _distinct(methods):
        if each.init_from is not None and (line := said(each.init_from, task)) is not None:
            display.say(f"{each.name} {line}")


def _check_starts(recipe: Recipe, methods: Sequence[Tried], data: TaskData, device: str, folded: bool) -> None:
    """Check what goes on from an adapter against the model without its weights: all but whether these are the same."""
    from tanzaku.models.loading import outline_for

    if begun := [each for each in methods if each.init_from is not None]:
        outline, _ = outline_for(recipe.model, data.task)
        _check_fit(outline, begun, data, recipe.train.max_length, device, folded)


def _check_row_data(method: Method, data: TaskData) -> None:
    """A TanzakuError where a method reads of rows what these do not say."""
    from tanzaku.tasks.row_tasks import CONTEXT

    tasks = data.task.row_tasks
    for key, number in method.row_data().items():
        if key != CONTEXT or tasks is None:
            raise TanzakuError(
                f"num_tasks is {number}, and rows do not say which task they are of; name the "
                "column that does with --task-id, or leave num_tasks at 1"
            )
        if number != len(tasks.names):
            raise TanzakuError(
                f"num_tasks is {number}, and column {tasks.column!r} of the training rows has "
                f"{len(tasks.names)}: {listed(tasks.names)}"
            )
        if (named := method.task_names()) is not None and (*named,) != tasks.names:
            odd = sorted({*named} ^ {*tasks.names})[0]
            raise TanzakuError(
                f"the settings tell of tasks {listed(named)}, and column {tasks.column!r} of the training rows has "
                f"{listed(tasks.names)}{nearest(odd, named if odd in tasks.names else tasks.names)}"
            )


def _check_memory(trained: int, largest: str, device: str) -> None:
    import torch

    from tanzaku.engine.memory import free

    # In fp32: the parameter, its gradient, and the two means of AdamW.
    needed = 16 * trained
    there = torch.cuda.mem_get_info()[0] if device == "cuda" else free()
    if needed > there:
        raise TanzakuError(
            f"{largest}: {trained:,} trained parameters take {needed / 1e9:,.1f} GB with gradients and AdamW's means, "
            f"and {there / 1e9:,.1f} GB are free; choose a smaller one"
        )


def _check_tracker(name: str | None) -> None:
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(each) for each in LOGGER_TYPE_TO_CLASS]
    if name not in known:
        raise TanzakuError(f"tracker is {name!r}{nearest(name, known)}, expected one of {listed(known)}")
    if name not in {each.value for each in get_available_trackers()}:
        package = {"comet_ml": "comet-ml"}.get(name, name)
        raise TanzakuError(f"tracker {name!r} is not installed: pip install {package}, or leave it out")


def _dtype(settings: Sequence[TrainSettings]) -> torch.dtype:
    """Of the frozen weights: bf16 halves them where every candidate computes in it; adapters stay in fp32."""
    import torch

    return torch.bfloat16 if all(each.precision == "bf16" for each in settings) else torch.float32
