"""Trained adapters as predict and chat use them: what they say of themselves, and their base with them on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tanzaku.cli.adapters import note
from tanzaku.errors import TanzakuError, flag, listed
from tanzaku.models.settings import ModelSettings
from tanzaku.tasks import TASKS, kind_in
from tanzaku.tasks.cells import short

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tanzaku.tasks.task import Task

PRECISIONS = ("fp32", "bf16", "fp16")
LONGEST = 2**24  # tokens of a text, more than any model reads


@dataclass(frozen=True)
class Trained:
    name: str  # in the output and on the model
    path: Path
    task: Task
    model: str
    max_length: int
    precision: str
    loading: dict[str, Any] = field(default_factory=dict)  # of the base, beside its name


def read_trained(name: str, path: Path, asked: dict[str, Any], precision: str | None) -> Trained:
    """What is known of an adapter; a flag overrules what it says."""
    from tanzaku.storage.store import adapter_dir, read_about

    # What Python has saved without a word on its task is as much known as HF PEFT's.
    known = _ours if (read_about(adapter_dir(path)) or {}).get("meta") else _foreign
    return known(name, path, {key: value for key, value in asked.items() if value is not None}, precision)


def _ours(name: str, path: Path, asked: dict[str, Any], precision: str | None) -> Trained:
    """What Tanzaku has written beside an adapter."""
    from tanzaku.storage.store import META, read_meta

    meta = {"precision": "fp32", **read_meta(path)}
    whose = f"{path / META}: meta."
    for key in ("model", "max_length"):
        if meta.get(key) is None and key not in asked:
            raise TanzakuError(
                f"{path} does not say its {key}; expected an adapter that tanzaku train or compare has written"
            )
    model, length = asked.get("model", meta.get("model")), asked.get("max_length", meta.get("max_length"))
    if not isinstance(model, str):
        raise TanzakuError(f"{whose}model is {short(model)}, expected a name; give --model")
    if type(length) is not int or not 0 < length <= LONGEST:
        raise TanzakuError(f"{whose}max_length is {short(length)}, expected 1 to {LONGEST}; give --max-length")
    if meta["precision"] not in PRECISIONS:
        raise TanzakuError(f"{whose}precision is {short(meta['precision'])}, expected {listed(PRECISIONS)}")
    if (kind := kind_in({**meta, **asked})) is None:
        raise TanzakuError(f"{whose}task is {short(meta.get('task'))}, expected one of {listed(TASKS)}")
    _check_flags(kind, asked, path)
    task = kind.from_json({**meta, **kind.overruled(asked, meta, path)}, whose)
    loading = meta.get("loading") or {}
    try:
        ModelSettings.model_validate({**loading, "name": model})
    except (ValidationError, TypeError):
        raise TanzakuError(f"{whose}loading is {short(loading)}, expected dtype and attention by their names") from None
    return Trained(name, path, task, model, length, precision or meta["precision"], loading)


def _check_flags(kind: type[Task], asked: Mapping[str, Any], path: Path) -> None:
    """A flag of another task would be passed over in silence."""
    for key in asked.keys() - {"model", "max_length"} - kind.overrides.keys():
        raise TanzakuError(f"{flag(key)} says nothing of {path}, an adapter for the task {kind.name}; leave it out")


def _foreign(name: str, path: Path, asked: dict[str, Any], precision: str | None) -> Trained:
    """What files in HF PEFT's form and the base say of an adapter."""
    from tanzaku.cli.adapters import read_adapter
    from tanzaku.models.loading import read_config, read_tokenizer
    from tanzaku.storage.store import read_config as adapter_config

    found = read_adapter(name, path)
    named = adapter_config(found.path).get("task_type")
    known = dict.fromkeys(each.peft_type for each in TASKS.values())
    if named not in known:
        raise TanzakuError(
            f"{path} is an adapter for {'no task' if named is None else repr(named)}, which is not predicted with; "
            f"expected task_type {listed(map(repr, known))}"
        )
    base = asked.get("model") or found.base
    if base is None:
        raise TanzakuError(f"{path} does not name its base model; say with --model where it is")
    config = read_config(base, on_progress=note)
    kind = next(each for each in TASKS.values() if each.peft_type == named and each.fits(found.width, config))
    _check_flags(kind, asked, path)
    task = kind.of_base(config, found.width, asked, str(path), base)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [read_tokenizer(base, on_progress=note).model_max_length, positions or LONGEST, LONGEST]
    return Trained(name, path, task, base, int(asked.get("max_length") or min(limits)), precision or "fp32")


def check_base(adapters: Sequence[Trained], one_by_one: str) -> None:
    """Adapters in one pass have one base, loaded in one way."""
    for adapter in adapters:
        if adapters[0].model != adapter.model:
            found = f"{adapters[0].path} has {adapters[0].model!r}, {adapter.path} has {adapter.model!r}"
            fix = f"{one_by_one}, or say with --model where the one base of both is"
            raise TanzakuError(f"adapters with different base models: {found}; {fix}")
        if adapters[0].loading != adapter.loading:
            first, second = (each.loading or "nothing" for each in (adapters[0], adapter))
            found = f"{adapters[0].path} says {first}, {adapter.path} says {second}"
            raise TanzakuError(f"adapters whose base was loaded differently: {found}; {one_by_one}")


def load_model(adapters: Sequence[Trained], task: Task, device: str) -> PreTrainedModel:
    """The base of adapters that have one, on a device, and these on it."""
    import torch

    from tanzaku.models.loading import load_for

    half = all(adapter.precision == "bf16" for adapter in adapters)  # as in training
    kind = torch.bfloat16 if half else torch.float32
    first = adapters[0]
    model, _ = load_for(ModelSettings(name=first.model, **first.loading), task, dtype=kind)
    _attach(model, adapters)
    return model.to(device)


def _attach(model: PreTrainedModel, adapters: Sequence[Trained]) -> None:
    """Attach the adapters to the model, and say what is not as one might expect."""
    from tanzaku.core.weights import copied_in
    from tanzaku.models.heads import left_random
    from tanzaku.storage.store import load

    for adapter in adapters:
        loaded = load(model, adapter.path, adapter.name)
        if drawn := left_random(model, copied_in(loaded.at())):
            raise TanzakuError(
                f"neither {adapter.path} nor its base has {listed(drawn, 3)}, which would stay random; expected the "
                "model that the adapter was trained on (--model)"
            )
        if len(adapters) > 1 and adapter.name != adapter.path.name:
            note(f"{adapter.name} is {adapter.path}")
        if len(adapters) > 1 and not loaded.method.shares_batch:
            note(f"{adapter.name} ({loaded.method.name}) changes every weight: it takes a pass of its own")
