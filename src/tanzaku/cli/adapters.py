"""What verbs that take adapters share: which directories are meant, what they say of themselves, and their base."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanzaku.cli.record import BEGUN, command_of, is_done
from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.files.writing import recover
from tanzaku.models.task_types import AUTO_CLASSES
from tanzaku.tasks import task_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tanzaku.core.method import Method
    from tanzaku.tasks.task import Task

_HEADS = re.compile(r"(^|\.)(score|classifier|classification_head)\.")


@dataclass(frozen=True)
class Saved:
    """What an adapter's directory says of the model it was made for."""

    name: str
    path: Path
    method: Method
    base: str | None
    kind: str | None  # the model's class, or one of transformers' Auto classes
    task: Task | None  # if Tanzaku trained it
    width: int | None = field(default=None)  # outputs of its head
    answers: str | None = field(default=None)


def note(line: str) -> None:
    print(line, file=sys.stderr)


# -- which directories


def check_paths(paths: Sequence[Path]) -> None:
    if not paths:
        raise TanzakuError("no adapter is named; expected directories, as in runs/poems/adapters/lora (predict --help)")
    seen: dict[Path, Path] = {}
    for path in paths:
        recover(path)
        if not path.is_dir():
            if (cut := next((out for out in path.parents if (out / BEGUN).is_file()), None)) and not is_done(cut):
                verb = command_of(cut)
                raise TanzakuError(
                    f"there is no adapter {path}: the run in {cut} is not done; if it was cut off, go on with it by "
                    f"tanzaku {verb} --resume --out {cut}"
                )
            raise TanzakuError(f"there is no adapter {path}{_neighbour(path)}")
        inside = sorted(str(each.parent) for each in path.glob("adapters/*/adapter_config.json"))
        if inside and not (path / "adapter_config.json").exists():
            raise TanzakuError(f"{path} holds a run and is no adapter; its adapters are {listed(inside)}")
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            again = f"{path} is given twice" if path == other else f"{other} and {path} are one adapter"
            raise TanzakuError(f"{again}; name each adapter once")


def _neighbour(path: Path) -> str:
    """What is wrong with a path, and the nearest name in the last of its folders that is there."""
    if path.exists():
        return ": that is a file; expected an adapter's directory"
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    folders = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir())
    folder = "" if missing == path else f", nor a folder {missing}"
    near = nearest(missing.name, folders) or (f"; {missing.parent} has {listed(folders)}" if folders else "")
    return folder + near


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each directory, as the command's help says; what no adapter's name may hold becomes `-`."""
    # From the last part up, as typed: a link has the name that it was given.
    full = [path.resolve() if ".." in path.parts else path.absolute() for path in paths]
    parts = [[_clean(part) for part in reversed(path.parts[1:])] or ["adapter"] for path in full]
    shared = Counter(each[0] for each in parts)
    names: list[str] = []
    for each in parts:
        name = each[0]
        if shared[name] > 1:
            alike = [other for other in parts if other[0] == name]
            depths = range(1, min(map(len, alike)))
            apart = next((d for d in depths if len({other[d] for other in alike}) == len(alike)), None)
            name = name if apart is None else f"{each[apart]}-{name}"
        number = next(n for n in range(1, len(paths) + 1) if _numbered(name, n) not in names)
        names.append(_numbered(name, number))
    return names


def _clean(part: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_-]+", part):
        return part
    return re.sub(r"[^A-Za-z0-9_-]+", "-", part).strip("-") or "adapter"


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


# -- the adapters and their base


def read_adapter(name: str, path: Path) -> Saved:
    from tanzaku.storage import adapterhub
    from tanzaku.storage.store import META, TENSORS, adapter_dir, method_of, read_about, read_config

    path = adapter_dir(path)
    config, about = read_config(path), read_about(path) or {}
    if adapterhub.is_one(config):
        raise TanzakuError(
            f"{path} is an adapter in AdapterHub's form, which says nothing of a task or a base; expected one of a "
            "run, or of HF PEFT. tz.load reads it in Python, and tz.save writes it anew"
        )
    meta, base = (found if isinstance(found := about.get(key), dict) else {} for key in ("meta", "base"))
    task = task_in(meta, f"{path / META}: meta.")
    kind = base.get("architecture") or AUTO_CLASSES.get(str(config.get("task_type")))
    named = meta.get("model") or config.get("base_model_name_or_path")
    return Saved(
        name=name,
        path=path,
        method=method_of(config, path, about.get("method")),
        base=named if isinstance(named, str) and named else None,
        kind=kind if isinstance(kind, str) else None,
        task=task,
        width=_width(path / TENSORS) if task is None else task.model_settings().get("num_labels"),
        answers=None if task is None else task.describe(),
    )


def _width(tensors: Path) -> int | None:
    """Outputs of the head in a file: the fewest rows of a matrix in it."""
    from safetensors import SafetensorError, safe_open

    from tanzaku.files.untrusted import is_there

    try:
        if not is_there(tensors):
            return None
        with safe_open(tensors, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys() if _HEADS.search(key)]  # noqa: SIM118
    except (OSError, SafetensorError):
        return None  # what ails the file is told where it is loaded
    return min((shape[0] for shape in shapes if len(shape) == 2), default=None)


def agreed(given: Sequence[Saved], key: str, what: str, fix: str) -> Any:
    """What all adapters say; an error where they differ. Those that say nothing follow the others."""
    said = [(each, getattr(each, key)) for each in given if getattr(each, key) is not None]
    for each, value in said[1:]:
        if value != said[0][1]:
            raise TanzakuError(
                f"adapters with different {what}: {said[0][0].path} has {_shown(said[0][1])}, {each.path} has "
                f"{_shown(value)}; {fix}"
            )
    return said[0][1] if said else None


def _shown(value: Any) -> str:
    return listed(value) if isinstance(value, tuple) else repr(value)


def check_mergeable(adapter: Saved) -> None:
    if not adapter.method.mergeable:
        from tanzaku.methods import METHODS

        able = listed(name for name, method in METHODS.items() if method.mergeable)
        raise TanzakuError(
            f"{adapter.path}: {adapter.method.name} is no change of weights, so it cannot be merged; use it as an "
            f"adapter (tanzaku predict), or train one of {able}"
        )


def load_base_of(
    name: str, given: Sequence[Saved], dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model in the class that the adapters were made for, with their task's settings, and its tokenizer."""
    import transformers

    from tanzaku.models.loading import agree_on_padding, load_base, load_tokenizer, read_config, reads_text

    one_by_one = "merge them one by one"
    kind = _kind_of(given, one_by_one)
    agreed(given, "answers", "answers", one_by_one)
    width = agreed(given, "width", "numbers of outputs", one_by_one)
    task = next((each.task for each in given if each.task is not None), None)
    if kind is not None and not hasattr(transformers, kind):
        raise TanzakuError(
            f"{given[0].path} was trained on a {kind}, which transformers {transformers.__version__} has not, so "
            "nothing would load the merged model; use it as an adapter (tanzaku predict)"
        )
    expected = f"expected a task_type in {given[0].path / 'adapter_config.json'}, one of {listed(AUTO_CLASSES)}"
    auto = _own_class(name, expected) if kind is None else getattr(transformers, kind)
    made_for, config = getattr(auto, "config_class", None), read_config(name, on_progress=note)
    if made_for is not None and not isinstance(config, made_for):
        raise TanzakuError(
            f"{given[0].path} was made for a {made_for.model_type!r} model, and {name!r} is {config.model_type!r}; "
            "expected the model that the adapter was trained on (--model)"
        )
    settings: dict[str, Any] = {}
    if task is not None:
        settings = task.model_settings()
    elif width is not None:
        settings = _outputs_of(name, width)
    model, fresh = load_base(name, auto, dtype=dtype, on_progress=note, **settings)
    model.__dict__["_tanzaku_fresh"] = fresh
    tokenizer: PreTrainedTokenizerBase | None = None
    if reads_text(model):
        if type(model).__name__.endswith("ForSequenceClassification"):
            tokenizer = load_tokenizer(name, on_progress=note)
            agree_on_padding(name, model, tokenizer)
        else:
            tokenizer = _plain_tokenizer(name)
    return model, tokenizer


def load_whole(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model in the class that its own config names, and its tokenizer."""
    from tanzaku.models.loading import load_base

    model, fresh = load_base(name, _own_class(name, "expected one in its config.json"), dtype=dtype, on_progress=note)
    if fresh:
        raise TanzakuError(f"{name} lacks {listed(fresh, 3)} of a {type(model).__name__}; expected a whole model")
    return model, _plain_tokenizer(name)


def _kind_of(given: Sequence[Saved], fix: str) -> str | None:
    """The class of the model that the adapters were made for. Another library's names an Auto class by its head."""
    import transformers

    def has(auto: str, kind: str) -> bool:
        known = getattr(getattr(transformers, auto, None), "_model_mapping", None)
        classes = getattr(known, "_model_mapping", {}).values()
        return any(kind == each or kind in each for each in classes if isinstance(each, tuple) or kind == each)

    exact = [each for each in given if each.kind is not None and not each.kind.startswith("Auto")]
    autos = {each.kind for each in given if each.kind is not None and each.kind.startswith("Auto")}
    if exact and all(has(auto, str(each.kind)) for auto in autos for each in exact):
        given = exact
    found: str | None = agreed(given, "kind", "kinds of model", fix)
    return found


def _own_class(name: str, fix: str) -> Any:
    """The class that a model's own config names."""
    import transformers

    from tanzaku.models.loading import read_config

    found = (read_config(name, on_progress=note).architectures or [None])[0]
    auto = getattr(transformers, found or "", None)
    if auto is None:
        raise TanzakuError(f"{name!r} names no architecture that transformers has ({found}); {fix}")
    return auto


def _outputs_of(name: str, width: int) -> dict[str, Any]:
    """The base's own names of outputs where it has as many, else numbered ones."""
    from tanzaku.models.loading import read_config

    own = read_config(name, on_progress=note).id2label or {}
    return {} if len(own) == width else {"num_labels": width}


def _plain_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer as it is; none where it has none."""
    from tanzaku.models.loading import read_tokenizer

    try:
        return read_tokenizer(name, on_progress=note)
    except TanzakuError as error:
        note(f"no tokenizer is written: {error}")
        return None


def attach_saved(model: PreTrainedModel, given: Sequence[Saved]) -> str:
    """Attach the adapters. What the checkpoint lacks must come from one of them."""
    import tanzaku as tz
    from tanzaku.core.manager import manager_of
    from tanzaku.core.weights import WeightCopy

    for each in given:
        tz.load(model, each.path, each.name)
    manager = manager_of(model)
    covered = {path for each in given for path, s in manager.get(each.name).at() if isinstance(s, WeightCopy)}
    lacking = [key for key in model.__dict__.pop("_tanzaku_fresh") if not any(_below(key, path) for path in covered)]
    if lacking:
        raise TanzakuError(
            f"neither the base nor {given[0].path} has {listed(lacking, 3)} of a {type(model).__name__}, which would "
            "stay random; expected the model that the adapter was trained on (--model)"
        )
    return given[0].name


def _below(key: str, path: str) -> bool:
    return not path or key.startswith(f"{path}.")
