"""What a run is told: a YAML recipe, flags over it, and the candidates they name. One schema for both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_serializer, model_validator

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.tasks.data import SUFFIXES
from tanzaku.train.settings import TrainSettings
from tanzaku.yamls import parse_yaml, read_yaml

if TYPE_CHECKING:
    from tanzaku.method import Method
    from tanzaku.train.results import Job

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class DataSettings(BaseModel):
    """Where the rows are and what their columns are called."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str = Field(min_length=1, description="training rows: .tsv, .csv, .jsonl, .parquet or a dataset")
    valid: str | None = Field(None, min_length=1, description="validation rows")
    test: str | None = Field(None, min_length=1, description="test rows")
    text: str = Field("text", description="column of the text")
    text_pair: str | None = Field(None, description="column of a second text")
    label: str = Field("label", description="column of the label")


class MethodEntry(BaseModel):
    """One candidate: `lora`, or `{lora: {r: 1}}`, with its own `name` and `train` settings where it has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    settings: dict[str, Any] = {}
    name: str | None = None
    train: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_item(cls, item: Any) -> Any:
        if isinstance(item, str):
            return {"method": item}
        form = "a method's name or {name: {setting: value}}"
        if not isinstance(item, Mapping):
            raise TanzakuError(f"found {item!r}, expected {form}")
        methods = [key for key in item if key not in ("name", "train")]
        if len(methods) != 1:
            raise TanzakuError(f"found {listed(map(str, methods)) or 'no method'}, expected {form}, one method an item")
        settings = item[methods[0]] or {}
        if not isinstance(settings, Mapping):
            raise TanzakuError(f"found {settings!r} as settings of {methods[0]}, expected a mapping such as {{r: 8}}")
        train = item.get("train") or {}
        if not isinstance(train, Mapping):
            raise TanzakuError(f"found train: {train!r}, expected a mapping such as {{epochs: 3}}")
        for key in train:
            if key not in TrainSettings.model_fields:
                known = nearest(str(key), TrainSettings.model_fields)
                raise TanzakuError(f"train has no key {str(key)!r}{known}")
        if "max_length" in train:
            raise TanzakuError("texts are cut once for all candidates; set max_length in the recipe's train section")
        settings = {str(key): value for key, value in settings.items()}
        return {"method": methods[0], "settings": settings, "name": item.get("name"), "train": dict(train)}

    @model_serializer
    def _to_item(self) -> dict[str, Any]:
        """The form that a recipe has, so that results.json holds one that can be run again."""
        item: dict[str, Any] = {self.method: self.settings}
        return item | ({"name": self.name} if self.name else {}) | ({"train": self.train} if self.train else {})


class Recipe(BaseModel):
    """A whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="a Hub name, a directory, a .gguf file, or embedded")
    task: Literal["classification"] = Field("classification", description="what is learned")
    data: DataSettings
    train: TrainSettings = TrainSettings()
    methods: list[MethodEntry] = []
    out: str | None = Field(None, min_length=1, description="directory of the run; runs/<verb>-<time> by default")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where the model runs")


_SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {(): Recipe, ("data",): DataSettings, ("train",): TrainSettings}


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe as it is written, with its relative data and model paths taken from its own folder.

    Raises:
        TanzakuError: no file, no YAML (with the line), or no mapping of keys.
    """
    path = Path(path)
    raw = read_yaml(path)
    if isinstance(data := raw.get("data"), dict):
        near = {
            key: _beside(path.parent, data[key])
            for key in ("train", "valid", "test")
            if isinstance(data.get(key), str)
        }
        raw["data"] = {**data, **near}
    if isinstance(model := raw.get("model"), str) and _is_model(path.parent, model):
        raw["model"] = str(path.parent / Path(model).expanduser())
    return raw


def _beside(folder: Path, source: str) -> str:
    """A file or a dataset's folder is beside the recipe; any other name is left for the datasets library."""
    path = folder / Path(source).expanduser()
    named = folder / source.rpartition(":")[0] if ":" in source else path
    here = path.exists() or named.exists() or path.suffix.lower() in SUFFIXES
    return str(path) if source.strip() and here else source


def _is_model(folder: Path, model: str) -> bool:
    return model.startswith((".", "~")) or model.endswith(".gguf") or (folder / model / "config.json").is_file()


def build_recipe(file: Path | None, flags: Mapping[str, Any], default_methods: Sequence[str] = ()) -> Recipe:
    """A recipe file with flags over it.

    Args:
        file: the recipe, if there is one.
        flags: nested as a recipe is. `methods` lists names: of candidates or methods in the file, whose settings
            then hold, or else of methods. `set` lists texts such as `r=1` or `lora.r=1`, values as in YAML.
        default_methods: the candidates where neither names any.

    Raises:
        TanzakuError: an unknown key, a value that does not fit or one that is missing, and where it was.
    """
    raw = load_recipe(file) if file is not None else {}
    keys = {key: value for key, value in flags.items() if key not in ("methods", "set")}
    for key, value in keys.items():
        if isinstance(value, Mapping):
            section = raw.get(key) or {}
            # A section that is no mapping is told by the schema.
            raw[key] = {**section, **value} if isinstance(section, Mapping) and (value or key in raw) else raw.get(key)
        else:
            raw[key] = value
    raw = {key: value for key, value in raw.items() if value is not None}
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise TanzakuError(_complaint(error, file, keys)) from None
    entries = _chosen(recipe.methods, flags.get("methods") or ()) or [MethodEntry(method=n) for n in default_methods]
    for assignment in flags.get("set") or ():
        entries = _assigned(entries, assignment)
    return recipe.model_copy(update={"methods": entries})
