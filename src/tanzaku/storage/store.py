"""Adapters on disk, in HF PEFT's form: adapter_config.json and adapter_model.safetensors, written once for all methods.

Beside them lies tanzaku.json: what the adapter was made for, so that a wrong base or a damaged file is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import PreTrainedModel

from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import adapters, attach, detach
from tanzaku.core.manager import AdapterManager, manager_of
from tanzaku.core.method import AdapterLayer, Copy, Method
from tanzaku.core.programs import write_adapters_by
from tanzaku.core.shared import Shared
from tanzaku.core.survey import may_not_run, survey
from tanzaku.core.weights import BiasCopy, WeightCopy, copied_in, copy_of
from tanzaku.errors import TanzakuError, TooLarge, listed
from tanzaku.files.untrusted import Allowance, from_file, is_there
from tanzaku.files.writing import apart, check_kind, directory_beside, recover, to_disk
from tanzaku.merging.merge import before_merging
from tanzaku.methods import METHODS
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.models.heads import Part, heads_of, resized, task_head
from tanzaku.models.quantize import elsewhere
from tanzaku.storage import adapterhub
from tanzaku.storage.card import CARD, card, digest_of, kept

CONFIG, TENSORS, META = "adapter_config.json", "adapter_model.safetensors", "tanzaku.json"
PARTS = "parts"  # where an adapter's directory has those that it uses
_METADATA = {"format": "pt"}
FORMAT = 2  # of tanzaku.json

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


def save(
    model: nn.Module,
    name: str,
    path: str | Path,
    *,
    meta: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    format: Literal["peft", "adapterhub"] = "peft",
) -> Path:
    """Write adapter `name` into the directory `path`, whole or not at all. A model card (README.md) that somebody
    changed there stays as it is.

    Args:
        format: "peft", with tanzaku.json and a card; or "adapterhub", as the Adapters library reads it, which has no
            place for either, nor for a head.
        meta: what the adapter's user needs to know (labels, columns); goes to tanzaku.json.
        training: what the model card tells of the run; see :func:`tanzaku.storage.card.training_record`.

    Raises:
        TanzakuError: `path` is a file, or cannot be written; or the format has no such adapter.
    """
    manager = manager_of(model)
    adapter = manager.get(name)
    if format not in ("peft", "adapterhub"):
        raise TanzakuError(f"save: found format={format!r}, expected 'peft' or 'adapterhub'")
    hub = None if format == "peft" else (adapterhub.config_of(manager.base, adapter), adapterhub.tensors_of(adapter))
    if hub is not None and (meta or training):
        raise TanzakuError("save: AdapterHub's form has no place for meta or training; leave them out")
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise TanzakuError(f"{target} is a file; expected a directory to save the adapter in")
    # Where the path is a link, the directory that it names is replaced, not the link.
    target = target.resolve() if target.is_symlink() else target
    if hub is not None:
        with _writing(target), directory_beside(target) as beside:
            save_file(apart(hub[1]), beside / adapterhub.TENSORS)
            (beside / CONFIG).write_text(_json(hub[0]), encoding="utf-8")
            if (text := kept(target)) is not None:
                (beside / CARD).write_text(text, encoding="utf-8")
        return Path(path)
    with _writing(target), directory_beside(target) as beside:
        _write(manager, adapter, beside, target, meta or {}, training or {})
    adapter.meta = meta or {}
    return Path(path)


def _write(
    manager: AdapterManager,
    adapter: Adapter,
    folder: Path,
    before: Path,
    meta: dict[str, Any],
    training: dict[str, Any],
) -> str:
    """Write an adapter, with those that it uses below it, into an empty directory; the checksum of its tensors.

    Args:
        before: the directory in whose place it comes.
    """
    uses = {}
    for label, there in adapter.method.used().items():
        part, into = manager.get(there), folder / PARTS / label
        into.mkdir(parents=True)
        tensors_of_it = _write(manager, part, into, before / PARTS / label, part.meta, {})
        uses[label] = {"sha256": tensors_of_it, "settings": _settings_of(config_of(manager, part), into)}
    tensors = _tensors(manager, adapter)
    with ThreadPoolExecutor(2) as aside:
        save_file(tensors, folder / TENSORS, metadata=_METADATA)
        checksum = aside.submit(_sha256, folder / TENSORS)
        aside.submit(to_disk, folder / TENSORS)  # so that little is left to wait for at the end
        about = {
            "format": FORMAT,
            "method": adapter.method.name,
            "base": describe(manager.base, adapter),
            "copies": _recorded(adapter),
            "meta": meta,
            **({"uses": uses} if uses else {}),
        }
        config = config_of(manager, adapter)
        known = hasattr(transformers, type(manager.model).__name__)
        text = card(adapter.method, config, meta, training, tensors, known)
        about |= {"card": digest_of(text), "sha256": checksum.result()}
        (folder / CONFIG).write_text(_json(config), encoding="utf-8")
        (folder / META).write_text(_json(about), encoding="utf-8")
        (folder / CARD).write_text(kept(before) or text, encoding="utf-8")
    return checksum.result()


def _tensors(manager: AdapterManager, adapter: Adapter) -> dict[str, Tensor]:
    """All tensors of an adapter's file."""
    return apart({**_resized_embeddings(manager, adapter), **{k: t for k, (t, _) in entries(adapter).items()}})


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TanzakuError(f"cannot write {target}: {reason}; nothing there was changed") from None


write_adapters_by(save)


def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    strict: bool = True,
    method: Method | None = None,
    any_base: bool = False,
    keep_head: bool = True,
) -> Adapter:
    """Attach the adapter saved in the directory `path`, by Tanzaku, by HF PEFT or by the Adapters library (AdapterHub),
    or below it by `save_pretrained` of a model in which it was active.

    Args:
        strict: missing, unexpected, mis-shaped or non-finite tensors and another base are errors; otherwise warnings,
            and the adapter keeps its initial values where the file has none that fit.
        method: take these settings instead of the file's.
        any_base: another base than the adapter was made for is a warning, though all else is `strict`.
        keep_head: False leaves a head in the file where it is: the adapter's own is that of a new one.

    Raises:
        TanzakuError: no adapter there, a damaged file, another base, or settings this version does not know.
    """
    folder = adapter_dir(Path(path))
    with from_file(folder):
        return _load(model, folder, name, strict, method, any_base or not strict, keep_head)


def adapter_dir(folder: Path) -> Path:
    """The adapter's directory: the given one, or the only one below it where `save_pretrained` wrote it."""
    recover(folder)
    place = folder / tree.PLACE
    if (folder / CONFIG).is_file() or not place.is_dir():
        return folder
    # What is being written beside an adapter has a hidden name.
    found = sorted(each for each in place.iterdir() if (each / CONFIG).is_file() and not each.name.startswith("."))
    if len(found) > 1:
        raise TanzakuError(f"{folder} has the adapters {listed(p.name for p in found)}; load one, such as {found[0]}")
    return found[0] if found else folder


def _load(
    model: nn.Module,
    folder: Path,
    name: str,
    strict: bool,
    method: Method | None,
    any_base: bool,
    keep_head: bool,
) -> Adapter:
    config = read_config(folder)
    if adapterhub.is_one(config):
        return _load_from_hub(model, folder, config, name, strict, method, any_base)
    about = read_about(folder)
    _check_tensors(folder)
    with ThreadPoolExecutor(1) as aside:  # a checksum takes as long as all the rest, and needs no lock
        checksum = None if about is None else aside.submit(_sha256, folder / TENSORS)
        tensors = read_tensors(folder)
        named = (about or {}).get("method")  # several may have files of one type
        method = method_of(config, folder, named) if method is None else copy.deepcopy(method)
        if about is not None and checksum is not None:
            _check_base(model, about.get("base") or {}, folder, not any_base)
            if about.get("sha256") not in (None, checksum.result()):
                raise TanzakuError(f"{folder / TENSORS} is damaged: its checksum is not the one written beside it")
    if about is None:
        method.modules_to_save = _ending(model, method.modules_to_save)
        method._as_peft = True
        _drop_strangers(model, method)
    elif not keep_head:
        method.modules_to_save = _but_heads(model, method.modules_to_save)
    else:
        method._copies = _copies(model, about.get("copies"), method.modules_to_save or [], folder)
    with bringing(model, method, name) as brought:
        _bring_parts(model, method, folder, (about or {}).get("uses"), brought, any_base)
        adapter = _attached(model, method, name, tensors, folder)
    adapter.meta = (about or {}).get("meta") or {}
    with _attached_or_not(model, name):
        if not keep_head:
            tensors = _with_new_head(model, adapter, tensors, (about or {}).get("copies"))
        _own_embeddings(model, adapter, tensors)
        _fill(model, adapter, tensors, folder, about, strict)
    return adapter


def _but_heads(model: nn.Module, names: list[str] | None) -> list[str] | None:
    """Paths of modules that are trained whole, without those that make a task's head here, or are nowhere in it."""
    there, heads = {path for path, _ in tree.named_modules(model)}, task_head(model)
    return [name for name in names or [] if name in there and not any(part.has(name) for part in heads)] or None


def _with_new_head(model: nn.Module, adapter: Adapter, tensors: dict[str, Tensor], copies: Any) -> dict[str, Tensor]:
    """A file's tensors, with the head's as they are in the adapter, and without those of a head that has no place."""
    own, heads = entries(adapter), task_head(model)
    places = {id(layer): path for path, layer in adapter.at() if isinstance(layer, WeightCopy)}
    new = {
        key: torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach()
        for key, (tensor, layer) in own.items()
        if any(part.path == (path := places.get(id(layer))) or (path and part.has(path)) for part in heads)
    }
    recorded = [str(each.get("path")) for each in copies or []] or [*_HEADS]
    base = {key: _base_name(adapter.method, key) for key in tensors}
    strange = {key for key in base.keys() - own.keys() if any(base[key].startswith(f"{path}.") for path in recorded)}
    return {key: tensor for key, tensor in tensors.items() if key not in strange} | new


def _load_from_hub(
    model: nn.Module,
    folder: Path,
    config: dict[str, Any],
    name: str,
    strict: bool,
    method: Method | None,
    any_base: bool,
) -> Adapter:
    tensors = read_tensors(folder, adapterhub.TENSORS)
    method = adapterhub.method_of(config, folder / CONFIG) if method is None else copy.deepcopy(method)
    if problem := adapterhub.check_base(Base.of(model), config):
        if not any_base:
            raise TanzakuError(f"{folder} was made for {problem}; load the base that it names")
        warnings.warn(f"{folder} was made for {problem}", stacklevel=3)
    adapter = _attached(model, method, name, tensors, folder)
    with _attached_or_not(model, name):
        keys = {(id(layer), each): key for key, each, _, layer in _entries(adapter)}
        tensors = adapterhub.ours(adapter, tensors, lambda layer, each: keys[id(layer), each])
        _fill(model, adapter, tensors, folder, None, strict)
    return adapter


def _attached(model: nn.Module, method: Method, name: str, tensors: dict[str, Tensor], folder: Path) -> Adapter:
    """An adapter to be filled with a file's tensors."""
    # What a file holds is past its beginning: no initial text is read, and an MLP that wrote the tensors is gone.
    method.inference_mode = True
    method._to_fill = True
    # Initial values are drawn by a seed, so that loading leaves torch's global generator alone.
    numbers = [*tensors.values(), *tree.parameters(model)]
    try:
        with Allowance(sum(tensor.numel() for tensor in numbers)):
            adapter = attach(model, method, name, seed=0)
    except TooLarge as error:
        raise TanzakuError(f"{folder / CONFIG}: {method.largest()}: {error}") from None
    adapter.method._to_fill = False
    return adapter


@contextmanager
def _attached_or_not(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block an adapter is filled; one that cannot be is detached."""
    try:
        yield
    except BaseException:
        detach(model, name)
        raise


# -- adapters that an adapter uses


class Bringing:
    """Attaches what an adapter uses, under names beside its own, and tells its method which these are."""

    def __init__(self, model: nn.Module, method: Method, name: str):
        self.model, self.method, self.name = model, method, name
        self.names: list[str] = []

    def bring(self, label: str, folder: Path, any_base: bool = False) -> None:
        """Attach what is in the folder as what the method calls `label`."""
        if not folder.is_dir():
            raise TanzakuError(f"it uses {label!r}, of which there is no adapter in {folder}")
        names = (f"{self.name}-{label}{'-' * k}" for k in count())
        free = next(name for name in names if name not in adapters(self.model))
        load(self.model, folder, free, any_base=any_base)
        self.names.append(free)
        self.method._under = {**self.method._under, label: free}


@contextmanager
def bringing(model: nn.Module, method: Method, name: str) -> Iterator[Bringing]:
    """Within the block, adapters are attached that `method` uses, which is attached as `name` by its end, and they go
    when it goes."""
    block = Bringing(model, method, name)
    try:
        yield block
        manager_of(model).get(name).brought = block.names
    except BaseException:
        for each in reversed(block.names):
            detach(model, each)
        raise


def _bring_parts(
    model: nn.Module, method: Method, folder: Path, recorded: Any, block: Bringing, any_base: bool
) -> None:
    """Attach what an adapter's file has been made with, where the very same is not attached under its name."""
    digests = recorded if isinstance(recorded, dict) else {}
    elsewhere = {} if recorded is not None else method.brings()
    for label, said in elsewhere.items():
        part = folder / said if (folder / said).is_dir() else Path(said)
        if part.is_dir() and method_in(part).uses_others:
            raise TanzakuError(f"{part} is made of other adapters itself, which those of {folder} cannot be")
        block.bring(label, part, any_base)
    for label in method.uses() if not elsewhere else ():
        expected = digests.get(label)
        if not isinstance(expected, dict) or not isinstance(expected.get("sha256"), str):
            known = listed(map(repr, digests)) or "none"
            raise TanzakuError(f"{folder / META} does not say which {label!r} the adapter uses; it tells of {known}")
        if label in adapters(model) and digest(model, label) == expected:
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-]+", label) or not (folder / PARTS / label).is_dir():
            raise TanzakuError(
                f"{folder} uses the adapter {label!r}, which is neither in {folder / PARTS / label} nor attached"
            )
        part = folder / PARTS / label
        _check_tensors(part)
        config = read_config(part)
        if not adapterhub.is_one(config) and method_of(config, part).uses_others:
            raise TanzakuError(f"{part} is made of other adapters itself, which those of {folder} cannot be")
        if _sha256(part / TENSORS) != expected["sha256"] or _settings_of(config, part) != expected.get("settings"):
            raise TanzakuError(f"{folder / PARTS / label} is not the adapter that {folder} was trained with")
        block.bring(label, folder / PARTS / label, any_base)


def method_in(path: str | Path) -> Method:
    """The method, with its settings, of the adapter in a directory."""
    folder = adapter_dir(Path(path))
    config = read_config(folder)
    if adapterhub.is_one(config):
        return adapterhub.method_of(config, folder / CONFIG)
    return method_of(config, folder, (read_about(folder) or {}).get("method"))


def digest(model: nn.Module, name: str) -> dict[str, str]:
    """What tells an attached adapter from others: the checksum that the file of its tensors would have, and that of
    the settings that its mathematics depends on."""
    manager = manager_of(model)
    adapter = manager.get(name)
    tensors = hashlib.sha256(to_bytes(_tensors(manager, adapter), metadata=_METADATA)).hexdigest()
    return {"sha256": tensors, "settings": _settings_of(config_of(manager, adapter), Path(name))}


# Which modules, which the tensors' names tell, and what says nothing of what is computed.
_BESIDE = ("target_modules", "exclude_modules", "modules_to_save", "task_type", "inference_mode")


def _settings_of(config: dict[str, Any], folder: Path) -> str:
    """A checksum of the settings that a configuration stands for."""
    method = method_of(config, folder)
    told = {key: value for key, value in method.settings().items() if key not in _BESIDE}
    return hashlib.sha256(json.dumps([method.name, told], sort_keys=True, default=str).encode()).hexdigest()


def read_meta(path: str | Path) -> dict[str, Any]:
    """What :func:`save` was given as `meta`; an error where the directory holds no tanzaku.json."""
    about = read_about(adapter_dir(Path(path)))
    if about is None:
        raise TanzakuError(f"{path} has no {META}; expected an adapter directory written by tanzaku")
    meta = about.get("meta")
    return meta if isinstance(meta, dict) else {}


def checksum(path: str | Path) -> str:
    """Of all that the adapter's directory says and holds."""
    folder = adapter_dir(Path(path))
    there = [folder / name for name in (CONFIG, TENSORS, META) if (folder / name).is_file()]
    return hashlib.sha256(" ".join(map(_sha256, there)).encode()).hexdigest()


# -- names and shapes


def entries(adapter: Adapter) -> dict[str, tuple[Tensor, AdapterLayer]]:
    """Every tensor of the adapter by its key in the file, with the adapter layer it belongs to."""
    return {key: (tensor, layer) for key, _, tensor, layer in _entries(adapter)}


def _entries(adapter: Adapter) -> Iterator[tuple[str, str, Tensor, AdapterLayer]]:
    """(key in the file, name in the adapter layer, tensor, adapter layer) of every tensor."""
    targets = {path for path, s in adapter.at() if not isinstance(s, BiasCopy | WeightCopy)}
    for path, layer in adapter.at():
        # Where PEFT keeps what it wrapped.
        wrapped = "base_layer." if path and path in targets and isinstance(layer, BiasCopy | WeightCopy) else ""
        for name, tensor in layer.export().items():
            key = _key(adapter.method, path, wrapped + name)
            if isinstance(layer, Shared) and key != name:
                key = layer.file_prefix + name
            yield key, name, tensor, layer


def _key(method: Method, path: str, name: str) -> str:
    if name in method.without_prefix:
        return name
    return f"{method.file_prefix}{path}.{name}" if path else method.file_prefix + name


def _ending(model: nn.Module, names: list[str] | None) -> list[str] | None:
    """Paths of what `modules_to_save` names in a file of PEFT's: all that end with a name, even inside a word."""
    if not names:
        return names
    paths = [path for path, _ in tree.named_modules(model)]
    found = [[path for path in paths if path.endswith(name)] or [name] for name in names]
    # PEFT writes both of its names for a classifier's head, whichever the model has.
    known = [path for each in found for path in each if path in paths or path not in _HEADS]
    return list(dict.fromkeys(known))


def _drop_strangers(model: nn.Module, method: Method) -> None:
    """Leave out targets that are no modules here: in a model of several adapters PEFT's "all-linear" lists wrappers of
    its own, too. Nothing is lost by it: a tensor without a place is an error."""
    targets = getattr(method, "target_modules", None)
    if isinstance(targets, list):
        paths = [path.split(".") for path, _ in tree.named_modules(model)]
        ends = {".".join(path[at:]) for path in paths for at in range(len(path))}
        method.target_modules = [name for name in targets if name in ends] or targets  # type: ignore[attr-defined]


# -- copies of modules


def _recorded(adapter: Adapter) -> list[dict[str, Any]]:
    """What of the base the adapter has copies of, for tanzaku.json: another base may have other heads."""
    layers = [(path, layer) for path, layer in adapter.at() if isinstance(layer, WeightCopy) and not layer.resized]
    times = Counter(key for _, layer in layers for key in {id(t) for t in layer.tensors.values()})
    out = []
    for path, layer in layers:
        each: dict[str, Any] = {"path": path}
        module = adapter.base.model.get_submodule(path)
        if set(layer.tensors) != set(Part.of(path, module).tensors(module)):
            each["names"] = list(layer.tensors)
        each["trained"] = layer.trained
        if any(times[id(t)] > 1 for t in layer.tensors.values()):
            each["tied"] = True
        out.append(each)
    return out


def _copies(model: nn.Module, recorded: Any, settings: list[str], folder: Path) -> list[Copy] | None:
    """What :func:`_recorded` wrote; None where an older version did not.

    Args:
        settings: `modules_to_save`, which go together with the copies.
    """
    if recorded is None:
        return None
    damaged = TanzakuError(f"{folder / META} is damaged: its copies are no modules' paths")
    if not isinstance(recorded, list) or not all(isinstance(each, dict) for each in recorded):
        raise damaged
    modules = dict(tree.named_modules(model))
    out = []
    for each in recorded:
        path, names = each.get("path"), each.get("names")
        if not isinstance(path, str) or not (names is None or isinstance(names, list)):
            raise damaged
        if path in modules:  # if not, its tensors have no place, which is told where they are read
            part = Part.of(path, modules[path])
            if names is not None:
                part = Part(path, tuple(n for n in part.tensors(modules[path]) if n in names), whole=False)
            out.append(Copy(part, trained=bool(each.get("trained")), tied=bool(each.get("tied"))))
    paths = [each["path"] for each in recorded]
    for name in settings:
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            raise TanzakuError(
                f"modules_to_save: {name!r} matches no module that {folder} has a copy of, which are "
                f"{listed(paths) or 'none'}"
            )
    return out


# -- embeddings of a base whose vocabulary was resized


def _resized_embeddings(manager: AdapterManager, adapter: Adapter) -> dict[str, Tensor]:
    """The base's embeddings by their keys in the file, where its vocabulary is not that of its own configuration: the
    vectors of new tokens are drawn at random, and without them the adapter could not be used again. PEFT does alike.
    """
    model = manager.model
    if not resized(model):
        return {}
    targets = {path for path, s in adapter.at() if not isinstance(s, WeightCopy)}
    embeddings = _embeddings(model)
    return {
        _key(adapter.method, path, f"base_layer.{name}" if path in targets else name): parameter
        for path, module in tree.named_modules(model)
        if id(module) in embeddings
        for name, parameter in module.named_parameters()
    }


def _embeddings(model: nn.Module) -> set[int]:
    """Ids of the modules at the vocabulary's two ends."""
    ends = (getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output"))
    try:
        return {id(get()) for get in ends} - {id(None)}
    except NotImplementedError:  # a model that reads no token ids
        return set()


def _own_embeddings(model: nn.Module, adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """Give the adapter its own copy of an embedding that the file has with other vectors for its last tokens.

    Those are new tokens, which PEFT writes with the whole embedding. The base keeps its own: other adapters of the same
    base may have others. Tensors of weights that are tied to such an embedding are added to `tensors`.
    """
    expected = entries(adapter)
    found = {_base_name(adapter.method, key): key for key in tensors if key not in expected}
    if not found:
        return
    embeddings = _embeddings(model)
    tied: dict[int, list[str]] = {}
    at: dict[str, nn.Parameter] = {}
    for name, parameter in tree.named_parameters(model, remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
        at[name] = parameter
    copies: dict[str, dict[str, nn.Parameter]] = {}
    for name, key in found.items():
        path = name.rpartition(".")[0]
        if name not in at or path in copies or id(model.get_submodule(path)) not in embeddings:
            continue
        if not _new_rows(at[name].detach().cpu(), tensors[key]):
            continue
        own = copy_of(model.get_submodule(path)).requires_grad_(False).own
        for other in tied[id(at[name])]:
            there, _, last = other.rpartition(".")
            copies.setdefault(there, {})[last] = own[name.rpartition(".")[2]]
            tensors.setdefault(found.get(other, _key(adapter.method, there, last)), tensors[key])
    for path, weights in copies.items():
        # First, so that what the adapter does to the embedding is done to its own copy.
        adapter.add(path, WeightCopy(weights, resized=True), first=True)


def _new_rows(base: Tensor, file: Tensor) -> bool:
    """Whether the first half of the rows at least is the base's, and a later one is not."""
    if base.shape != file.shape or not file.is_floating_point():
        return False
    same = torch.isclose(base.float(), file.float(), rtol=0.02, atol=1e-4).view(len(base), -1).all(dim=1)
    return not same.all() and int((~same).int().argmax()) >= len(base) / 2


# -- filling an adapter from a file


def _base_name(method: Method, key: str) -> str:
    """The base's own name of what a file's key may name."""
    return key.removeprefix(method.file_prefix).replace("base_layer.", "")


def _beside(method: Method, key: str, tensors: dict[str, Tensor], base: dict[str, nn.Parameter]) -> bool:
    """Whether `key` is one of those that PEFT writes beside an adapter's own, with nothing new in it."""
    if ".original_module." in key:  # under a module that is trained whole: never used
        return True
    if ".modules_to_save." in key:  # the bias of such a module, a second time
        first = tensors.get(key.replace(".modules_to_save.", "."))
        return first is not None and torch.equal(first, tensors[key])
    # An embedding that is targeted, or was resized, is written with the base's own weight.
    own = base.get(_base_name(method, key))
    return own is not None and _alike(own.detach().cpu(), tensors[key])


def _alike(a: Tensor, b: Tensor) -> bool:
    # The base may be loaded in another precision than it had then; other weights differ by far more.
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=0.02, atol=1e-4)


def _at_what_never_runs(model: nn.Module, method: Method, key: str) -> bool:
    """Whether a tensor is of an adapter at a module that never runs: PEFT has some there, to no effect."""
    paths, path = {p for p, _ in tree.named_modules(model)}, key.removeprefix(method.file_prefix)
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return bool(path) and may_not_run(model, path) and survey(Base.of(model)).never_runs(Base.of(model), path)


def _strange(model: nn.Module, method: Method, keys: list[str], tensors: dict[str, Tensor]) -> Iterator[str]:
    """What is wrong with the keys that the adapter has no place for."""
    base = dict(tree.named_parameters(model, remove_duplicate=False)) if keys else {}
    unexpected = []
    for key in keys:
        spare = key.rpartition(".")[2] in method.repeats
        if spare or _beside(method, key, tensors, base) or _at_what_never_runs(model, method, key):
            continue
        own = base.get(_base_name(method, key))
        if own is None:
            unexpected.append(key)
        elif own.shape == tensors[key].shape:
            yield f"{key} is the weight of another base"
        else:
            found, here = tuple(tensors[key].shape), tuple(own.shape)
            resize = id(model.get_submodule(_base_name(method, key).rpartition(".")[0])) in _embeddings(model)
            fix = f" (resize it first: model.resize_token_embeddings({found[0]}))" if resize and found else ""
            yield f"{key} is {found}, and the model's {here}{fix}"
    if unexpected:
        yield f"unexpected {listed(unexpected, 3)}"


def _fill(
    model: nn.Module,
    adapter: Adapter,
    tensors: dict[str, Tensor],
    folder: Path,
    about: dict[str, Any] | None,
    strict: bool,
) -> None:
    expected = list(_entries(adapter))
    keys = {key for key, *_ in expected}
    problems = []
    absent = [(key, name, layer) for key, name, _, layer in expected if key not in tensors]
    missing = [(key, _not_trained(name, layer)) for key, name, layer in absent if name not in layer.found_again]
    if kept := [key for key, spare in missing if spare]:
        warnings.warn(f"{folder} holds no {listed(kept)}: the model's own is used", stacklevel=3)
    if lost := [key for key, spare in missing if not spare]:
        problems.append(f"missing {listed(lost, 3)}")
    problems += _strange(model, adapter.method, [key for key in tensors if key not in keys], tensors)
    local: dict[AdapterLayer, dict[str, Tensor]] = {}
    for key, name, tensor, layer in expected:
        here = local.setdefault(layer, {})
        here[name] = tensor
        if key not in tensors:
            continue
        found = tensors[key]
        # PEFT writes a second set of an encoder-decoder's vectors, which nothing reads.
        twice = key == "prompt_embeddings" and found.shape[1:] == tensor.shape[1:] and len(found) == 2 * len(tensor)
        if found.shape != tensor.shape and not twice:
            problems.append(f"{key} is {tuple(found.shape)}, expected {tuple(tensor.shape)}")
        elif found.is_floating_point() != tensor.is_floating_point():
            kind = "floating point numbers" if tensor.is_floating_point() else str(tensor.dtype)
            problems.append(f"{key} is {found.dtype}, expected {kind}".replace("torch.", ""))
        else:
            here[name] = found
            if not found.float().isfinite().all():
                problems.append(f"{key} holds numbers that are not finite")
    if problems:
        then = ((about or {}).get("base") or {}).get("architecture")
        own = type(model).__name__
        other = f" (it was made for {then}, and this is {own})" if then not in (None, own) else ""
        message = f"{folder} does not fit this model and method: {listed(problems, 4)}{other}"
        if strict:
            raise TanzakuError(message)
        warnings.warn(f"{message}; what does not fit keeps its initial value", stacklevel=3)
    exported = {(id(layer), name): tensor for _, name, tensor, layer in expected}
    for layer, named in local.items():
        if type(layer).restore is AdapterLayer.restore:
            # What such a layer exports are its own tensors: filling them at once spares a walk for each.
            for name, tensor in named.items():
                exported[id(layer), name].copy_(tensor)
        elif named:
            layer.restore(named)


def _not_trained(name: str, layer: AdapterLayer) -> bool:
    """Whether a tensor is a copy of the base's that is not trained: of a head, or of running statistics."""
    return isinstance(layer, WeightCopy) and (not layer.trained or name not in layer.own)


def method_of(config: dict[str, Any], folder: Path, named: Any = None) -> Method:
    """The method that the adapter_config.json in a folder describes; settings that change the mathematics must be
    known.

    Args:
        named: its name, where tanzaku.json has one.
    """
    where = folder / CONFIG
    kind = config.get("peft_type")
    fit = [m for m in METHODS.values() if m.peft_type == str(kind).removeprefix(_OURS)]
    cls = next((m for m in fit if m.name == named), fit[0] if fit else None)
    if cls is None:
        known = ", ".join(dict.fromkeys(m.peft_type for m in METHODS.values()))
        raise TanzakuError(f"{where}: peft_type is {kind!r}; this version reads {known}")
    fields = {f.name for f in dataclasses.fields(cls)}
    harmless = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", *_INERT}
    for key, value in config.items():
        if key not in fields and key not in harmless and value not in (None, False, {}, [], "", "none"):
            raise TanzakuError(
                f"{where}: {key}={value!r} is a setting that this version does not know; use it with HF PEFT"
            )
    settings = {key: value for key, value in config.items() if key in fields}
    # PEFT writes null for a pattern that nobody gave, where the method has an empty one.
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if settings.get(key, 0) is None]
    for key in patterns:
        if not cls.takes(key, None):
            settings.pop(key)
    return cls.from_settings(settings)


# Settings that PEFT writes with a value although nothing uses them.
_INERT = {
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}


def config_of(manager: AdapterManager, adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    method = adapter.method
    own = type(manager.model).__name__
    task = method.task_type
    if task is None and isinstance(manager.model, PreTrainedModel):
        task = next((t for end, t in _TASKS.items() if own.endswith(end)), None)
    settings = {key: value for key, value in method.settings().items() if value != method.not_in_peft.get(key, ...)}
    # Whole paths: of a mere name PEFT takes all that ends with it, "norm" for "input_layernorm" too.
    copies = {path: s for path, s in adapter.at() if isinstance(s, WeightCopy)}
    whole = [path for path, s in copies.items() if path and s.trained]
    if whole and method.in_peft:
        settings["modules_to_save"] = whole
    if task in _NEEDS_HEAD and method.trains_head and method.file_prefix == Method.file_prefix:
        # By these tasks PEFT takes the head from the file, and cannot read one without; by none it leaves the base's.
        task = task if any(path.endswith(_HEADS) for path in copies) else None
    if task is None and isinstance(manager.model, PreTrainedModel):
        # Where the task does not tell, PEFT's AutoPeftModel reads the base's class here.
        settings["auto_mapping"] = {"base_model_class": own, "parent_library": type(manager.model).__module__}
    kind = method.file_type(manager.base)
    if "" in copies and method.in_peft and not kind.startswith(_OURS):
        kind = _OURS + kind  # parameters of the model itself, which PEFT cannot name
    settings.update(
        peft_type=kind,
        task_type=task,
        base_model_name_or_path=getattr(manager.model, "name_or_path", "") or None,
        inference_mode=True,
    )
    return method.to_peft(settings)


_OURS = "TANZAKU_"
_HEADS = ("classifier", "score", "qa_outputs")
_NEEDS_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


# -- the base an adapter was made for


def describe(base: Base, adapter: Adapter) -> dict[str, Any]:
    """Architecture, and some numbers read off each of the base's weights: enough to tell another base from this one.

    Weights that the adapter has its own copy of are left out, as is a classifier's head: it is drawn anew each time.
    """
    carried = copied_in((path, layer) for path, layer in adapter.at() if path or adapter.method.shares_batch)
    weights = _sample(base, carried | _heads(base))
    return {"model_type": base.kind, "architecture": type(base.model).__name__, "weights": weights}


# Where numbers are read in a flat weight: places that do not depend on its size, so that rows added for new tokens
# move none.
_PLACES = [5 * 8**k for k in range(14)]
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _heads(base: Base) -> set[str]:
    return {name for part in heads_of(base.model) for name in part.parameters}


def _sample(base: Base, left_out: set[str], names: set[str] | None = None) -> dict[str, str]:
    """For each weight its shape and a few numbers, such as "48x32: 0.125 -0.5". Quantised weights, those of other
    processes and those that are nowhere in memory tell nothing, and are left out."""
    merged = before_merging(base.model)
    picked: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}
    places: dict[Any, Tensor] = {}
    for name, parameter in tree.named_parameters(base.model):
        size = parameter.numel()
        plain = type(parameter) is nn.Parameter and parameter.dtype in _READABLE
        if not plain or size <= _PLACES[0] or name in left_out or (names is not None and name not in names):
            continue
        weight = merged.get(name, parameter).detach()
        if weight.is_meta:
            path, _, last = name.rpartition(".")
            kept = elsewhere(base.model.get_submodule(path), last)
            if kept is None:
                continue
            weight = kept[0]
        count, kind = sum(place < size for place in _PLACES), (weight.device, weight.dtype)
        if (count, kind) not in places:
            places[count, kind] = torch.tensor(_PLACES[:count], device=weight.device)
        picked.setdefault(kind, []).append((name, weight, weight.take(places[count, kind])))
    out = {}
    for each in picked.values():
        numbers = iter(torch.cat([values for _, _, values in each]).float().tolist())  # one transfer a device
        for name, weight, values in each:
            read = " ".join([f"{next(numbers):.9g}" for _ in range(len(values))])
            out[name] = f"{'x'.join(map(str, weight.shape))}: {read}"
    return out


def _check_base(model: nn.Module, described: dict[str, Any], folder: Path, strict: bool) -> None:
    base = Base.of(model)
    problem = None
    if described.get("model_type") != base.kind:
        problem = f"a {described.get('model_type')!r} model, and this one is {base.kind!r}"
    else:
        problem = _other_weights(base, described.get("weights") or {}, folder)
    if problem:
        message = f"{folder} was made for {problem}"
        if strict:
            raise TanzakuError(message + "; load the base that it names")
        warnings.warn(message, stacklevel=3)


def check_made_for(model: nn.Module, path: str | Path) -> None:
    """A TanzakuError where the adapter in a directory was made for another base than this, as far as it tells."""
    folder = adapter_dir(Path(path))
    about = read_about(folder)
    if about is not None:
        _check_base(model, about.get("base") or {}, folder, strict=True)


def _other_weights(base: Base, theirs: dict[str, str], folder: Path) -> str | None:
    """How the base that a file describes differs from this one, or None."""
    damaged = TanzakuError(f"{folder / META} is damaged: its weights are no shapes and numbers")
    if not isinstance(theirs, dict):
        raise damaged
    ours = _sample(base, set(), set(theirs))
    if theirs and not ours:
        # No weight of that name; where none can be read at all, there is nothing to tell.
        return "a base with other layers" if _sample(base, _heads(base)) else None
    try:
        changed = {name: (_parsed(theirs[name]), _parsed(mine)) for name, mine in ours.items() if theirs[name] != mine}
    except (ValueError, AttributeError):
        raise damaged from None
    embeddings = _embeddings(base.model) if changed else set()
    for name, ((shape, _), (here, _)) in changed.items():
        # Rows of an embedding are tokens: their number may have changed.
        tokens = id(base.model.get_submodule(name.rpartition(".")[0])) in embeddings
        if shape != here and not (tokens and shape[1:] == here[1:]):
            return f"a base with other layers ({name} was {shape}, and is {here} here)"
    differing = _differing({name: (a, b) for name, ((_, a), (_, b)) in changed.items()})
    return f"a base with other weights (they differ at {listed(differing, 3)})" if differing else None


def _parsed(text: str) -> tuple[tuple[int, ...], list[float]]:
    shape, _, numbers = text.partition(":")
    return tuple(int(n) for n in shape.split("x")), [float(n) for n in numbers.split()]


def _differing(pairs: dict[str, tuple[list[float], list[float]]]) -> list[str]:
    """Names of the weights whose numbers are others, by more than the rounding of one of them to half precision."""
    common = [(a[: len(b)], b[: len(a)]) for a, b in pairs.values()]
    weight = torch.tensor([i for i, (a, _) in enumerate(common) for _ in a], dtype=torch.long)
    a, b = (torch.tensor([x for pair in common for x in pair[side]]) for side in (0, 1))

    def some(where: Tensor) -> Tensor:  # for each weight, whether it is so of any of its numbers
        return torch.zeros(len(common)).index_add_(0, weight, where.float()) > 0

    same = torch.isclose(a, b, rtol=1e-6, atol=0, equal_nan=True)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = some(a != a.to(dtype)) != some(b != b.to(dtype))
        same |= rounded[weight] & torch.isclose(a, b, rtol=torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)
    return [name for name, other in zip(pairs, some(~same).tolist(), strict=True) if other]


# -- files


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise TanzakuError(f"{folder} is no directory; expected an adapter's, with {CONFIG} and {TENSORS}")
    if not is_there(folder / CONFIG):
        found = sorted(path.name for path in folder.iterdir())
        base = "config.json" in found and any(name.startswith("model") for name in found)
        fix = "; it is a model's, and no adapter was active when it was saved" if base else ""
        raise TanzakuError(f"{folder} has no {CONFIG}; found {listed(found) or 'nothing'}{fix}")
    return _read_object(folder / CONFIG)


def read_about(folder: Path) -> dict[str, Any] | None:
    if not is_there(folder / META):
        return None
    about = _read_object(folder / META)
    version = about.get("format", FORMAT)
    if type(version) is not int or not 0 < version <= FORMAT:
        newer = "; a newer tanzaku has written it: upgrade" if type(version) is int and version > FORMAT else ""
        raise TanzakuError(f"{folder / META}: format is {version!r}, and this version reads 1 to {FORMAT}{newer}")
    return about


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        check_kind(path)
        raise TanzakuError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise TanzakuError(f"{path} is damaged: found a {type(value).__name__}, expected an object")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def read_tensors(folder: Path, name: str = TENSORS) -> dict[str, Tensor]:
    path = _check_tensors(folder, name)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError) as error:
        check_kind(path)
        raise TanzakuError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _check_tensors(folder: Path, name: str = TENSORS) -> Path:
    path = folder / name
    if not is_there(path):
        pickled = next((p for p in ("adapter_model.bin", "pytorch_adapter.bin") if (folder / p).exists()), None)
        hint = f"; {pickled} is a pickle, which is never read: save it as safetensors" if pickled else ""
        raise TanzakuError(f"{folder} has no {name}{hint}")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
