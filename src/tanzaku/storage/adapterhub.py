"""Adapters as the Adapters library (AdapterHub) stores them: adapter_config.json and adapter.safetensors.

Its names of tensors and ours, both ways, are here and nowhere else. It calls a tensor

    encoder.layer.0.attention.output.adapters.NAME.adapter_down.0.weight

by where its own class for the model keeps what, which differs by family; by layer and kind of sublayer it is ours.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tanzaku.core.adapter import Adapter
from tanzaku.core.method import AdapterLayer, Method
from tanzaku.core.weights import WeightCopy
from tanzaku.errors import TanzakuError
from tanzaku.methods import METHODS
from tanzaku.models.families import Base, Sublayer

TENSORS = "adapter.safetensors"
VERSION = "adapters.1.3.0"  # whose names these are

# What a bottleneck's parts are called there. Its first norm and its first matrix are a sequence, too.
_PARTS = {"up": "adapter_up", "norm_before": "adapter_norm_before", "norm_after": "adapter_norm_after"}
# Where it keeps adapters, in a layer of which it says nothing else.
_TAILS = {"attention": "attention_adapters", "cross": "cross_attention_adapters", "feed_forward": "output_adapters"}
_PARAMETRIZED = ".parametrizations.weight."  # torch's own name for what a parametrized weight is made of
_KEY = re.compile(
    r"(?:(?P<at>.*)\.)?(?P<table>adapters|refts|shared_parameters|invertible_adapters)\.(?P<name>[^.]+)\.(?P<rest>.+)"
)
_OF_ALL = ("shared_parameters", "invertible_adapters")  # of no layer
_TOWERS = ("decoder", "vision_model", "text_model")  # whose layers are counted by themselves


def is_one(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is that library's."""
    return "peft_type" not in config and isinstance(config.get("config"), dict)


# -- settings


def method_of(config: Mapping[str, Any], where: Path) -> Method:
    """The method that an adapter_config.json describes. A head is none of its file's: the model's own is used."""
    for cls in METHODS.values():
        settings = cls.from_hub(config["config"])
        if settings is None:
            continue
        known = cls.check_names([])
        for key, value in settings.items():
            if key not in known:
                raise TanzakuError(f"{where}: {key}={value!r} is a setting that this version does not know")
        return cls.from_settings({**settings, "modules_to_save": []})
    kind = config["config"].get("architecture")
    raise TanzakuError(f"{where}: found an adapter of architecture {kind!r}, which this version does not know")


def config_of(base: Base, adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json of an adapter.

    Raises:
        TanzakuError: the library has no adapter of this method.
    """
    settings = adapter.method.to_hub()
    if settings is None:
        raise TanzakuError(f"AdapterHub's library reads no adapter of {adapter.method.name}; save it without a format")
    return {
        "config": settings,
        "hidden_size": base.hidden_size,
        "model_class": type(base.model).__name__,
        "model_name": getattr(base.model, "name_or_path", ""),
        "model_type": base.kind,
        "name": adapter.name,
        "version": VERSION,
    }


def check_base(base: Base, config: Mapping[str, Any]) -> str | None:
    """What another base the adapter was made for, or None."""
    kind, size = config.get("model_type"), config.get("hidden_size")
    if kind is not None and kind != base.kind:
        return f"a {kind!r} model, and this one is {base.kind!r}"
    if isinstance(size, int) and size != base.hidden_size:
        return f"a base of width {size}, and this one's is {base.hidden_size}"
    return None


# -- tensors


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors by that library's keys."""
    out: dict[str, Tensor] = {}
    for path, layer in adapter.at():
        if isinstance(layer, WeightCopy):
            if layer.trained:
                warnings.warn(
                    f"{path} is trained along with {adapter.name!r}, and is no part of an adapter's file in "
                    "AdapterHub's form: it is left out",
                    stacklevel=4,
                )
            continue
        for name, tensor in layer.export().items():
            keys = [*_keys(adapter, path, layer, name)]
            if not keys:
                raise TanzakuError(f"save: AdapterHub's form has no place for {path}.{name}; expected format='peft'")
            out.update(dict.fromkeys(keys, tensor))
    return out


def ours(
    adapter: Adapter, tensors: Mapping[str, Tensor], key_of: Callable[[AdapterLayer, str], str]
) -> dict[str, Tensor]:
    """Tensors of that library's file by our keys; what the adapter has no place for keeps its own.

    Args:
        key_of: gives our key for a layer and the name of a tensor in it.
    """
    left = dict(tensors)
    found = {place: key for key in tensors if (place := _place(key)) is not None}
    out = {}
    for path, layer in adapter.at():
        for name in {} if isinstance(layer, WeightCopy) else layer.export():
            for place in map(_place, _keys(adapter, path, layer, name)):
                if place in found and found[place] in left:
                    out[key_of(layer, name)] = left.pop(found[place])
    return {**out, **left}


def _keys(adapter: Adapter, path: str, layer: AdapterLayer, name: str) -> Iterator[str]:
    """That library's keys for one tensor: one, or two of one tensor."""
    if layer.hub in _OF_ALL:
        part_of = "encoder." if layer.hub == "invertible_adapters" and adapter.base.encoder_decoder else ""
        yield f"{_stem(adapter.base)}{part_of}{layer.hub}.{adapter.name}.{name}"
        return
    part, _, rest = name.partition(".")
    rest = f".{rest}" if rest else ""
    if layer.hub == "refts":
        start = f"{_layer(adapter.base, f'{path}.')}.reft_layer.{layer.hub}.{adapter.name}."
        yield start + name.replace(".original", _PARAMETRIZED + "original").replace(".base", _PARAMETRIZED + "0.base")
        return
    site = getattr(layer, "site", None)
    if not isinstance(site, Sublayer):
        return
    start = f"{_home(adapter.base, site)}.{layer.hub}.{adapter.name}."
    if part == "down":
        yield f"{start}adapter_down.{int(getattr(layer, 'norm_before', None) is not None)}{rest}"
        return
    yield f"{start}{_PARTS.get(part, part)}{rest}"
    if part == "norm_before":
        yield f"{start}adapter_down.0{rest}"


def _stem(base: Base) -> str:
    """The path of the backbone, with a dot."""
    if base.backbone is base.model:
        return ""
    name = getattr(base.model, "base_model_prefix", "")
    return f"{name}." if name and hasattr(base.model, name) else ""


def _home(base: Base, site: Sublayer) -> str:
    """Where that library's class for the model keeps the adapters of one sublayer."""
    out = site.out
    if inside := re.match(r"(.+\.layer\.\d+)\.(?:SelfAttention|EncDecAttention|DenseReluDense)\.", out):  # T5
        return inside[1]
    if out.endswith(".output.dense"):  # BERT and its kin
        return out.removesuffix(".dense")
    tail = _TAILS[site.kind]
    if base.kind == "vit" and site.kind == "feed_forward":
        tail = "output.output_adapters"
    if base.kind == "albert" and site.kind == "attention":
        tail = "attention.attention_adapters"
    return f"{_layer(base, out)}.{tail}"


def _layer(base: Base, path: str) -> str:
    """The innermost layer that holds what is at a path, by its name in the library's transformers."""
    inner = re.match(r"(?:.*\.)?\d+(?=\.)", path)
    layer = inner[0] if inner else path
    return re.sub(r"(^|\.)layers\.(\d+)$", r"\1encoder.layer.\2", layer) if base.kind in ("vit", "beit") else layer


def _place(key: str) -> tuple[Any, ...] | None:
    """What a key of that library means, whatever its class for the model keeps where: tower, layer, kind, name."""
    parts = _KEY.fullmatch(key)
    if parts is None:
        return None
    at, table, rest = parts["at"] or "", parts["table"], parts["rest"]
    if table in _OF_ALL:
        return (table, rest)
    tower = tuple(word for word in _TOWERS if word in at.split("."))
    numbers = tuple(int(word) for word in at.split(".") if word.isdecimal())
    return (table, tower, numbers, _kind(at), rest) if numbers else None


def _kind(at: str) -> str:
    """Which sublayer the adapters that are kept there belong to."""
    if of_t5 := re.search(r"\.layer\.(\d)$", at):
        kinds = ("attention", "cross", "feed_forward") if "decoder" in at.split(".") else ("attention", "feed_forward")
        return kinds[min(int(of_t5[1]), len(kinds) - 1)]
    if at.endswith(("cross_attention_adapters", "crossattention.output")):
        return "cross"
    return "attention" if at.endswith(("attention_adapters", "attention.output")) else "feed_forward"
