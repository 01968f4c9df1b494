"""Adapters on disk, in HF PEFT's form: adapter_config.json and adapter_model.safetensors, written once for all methods.

Beside them lies tanzaku.json: what the adapter was made for, so that a wrong base or a damaged file is an error.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tanzaku.errors import TanzakuError, listed
from tanzaku.host import Adapter, Host, attach, detach, host_of
from tanzaku.method import Method, Strip
from tanzaku.methods import METHODS
from tanzaku.weights import BiasStrip, WeightStrip

CONFIG, TENSORS, META = "adapter_config.json", "adapter_model.safetensors", "tanzaku.json"

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def save(model: nn.Module, name: str, path: str | Path, *, meta: dict[str, Any] | None = None) -> Path:
    """Write adapter `name` into the directory `path`, whole or not at all.

    Args:
        meta: what the adapter's user needs to know (labels, columns); goes to tanzaku.json.

    Raises:
        TanzakuError: `path` is a file, or cannot be written.
    """
    host = host_of(model)
    adapter = host.get(name)
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise TanzakuError(f"{target} is a file; expected a directory to save the adapter in")
    tensors = {key: t.contiguous().cpu() for key, (t, _) in entries(adapter).items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise TanzakuError(f"cannot write {target}: {error.strerror}; choose another directory") from None
    try:
        save_file(tensors, beside / TENSORS, metadata={"format": "pt"})
        about = {
            "format": 1,
            "base": describe(host),
            "sha256": _sha256(beside / TENSORS),
            "meta": meta or {},
        }
        (beside / CONFIG).write_text(_json(config_of(host, adapter)), encoding="utf-8")
        (beside / META).write_text(_json(about), encoding="utf-8")
        beside.chmod(0o755)
        _replace(beside, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TanzakuError(f"cannot write {target}: {reason}; nothing there was changed") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def load(model: nn.Module, path: str | Path, name: str = "default", *, strict: bool = True) -> Adapter:
    """Attach the adapter saved in the directory `path`, by Tanzaku or by HF PEFT.

    Args:
        strict: missing, unexpected or mis-shaped tensors and another base are errors; otherwise warnings.

    Raises:
        TanzakuError: no adapter there, a damaged file, another base, or settings this version does not know.
    """
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    about = _read_about(folder)
    method = method_of(config)
    if about is not None:
        if about.get("sha256") not in (None, _sha256(folder / TENSORS)):
            raise TanzakuError(f"{folder / TENSORS} is damaged: its checksum is not the one written beside it")
        _check_base(model, about.get("base") or {}, folder, strict)
    method.modules_to_save = _ending(model, method.modules_to_save)
    adapter = attach(model, method, name)
    try:
        _fill(model, adapter, tensors, folder, strict)
    except BaseException:
        detach(model, name)
        raise
    return adapter


def read_meta(path: str | Path) -> dict[str, Any]:
    """What :func:`save` was given as `meta`; an error where the directory holds no tanzaku.json."""
    about = _read_about(Path(path))
    if about is None:
        raise TanzakuError(f"{path} has no {META}; expected an adapter directory written by tanzaku")
    meta = about.get("meta")
    return meta if isinstance(meta, dict) else {}


# -- names and shapes


def entries(adapter: Adapter) -> dict[str, tuple[Tensor, Strip]]:
    """Every tensor of the adapter by its key in the file, with the strip it belongs to."""
    targets = {path for path, s in adapter.at() if not isinstance(s, BiasStrip | WeightStrip)}
    out = {}
    for path, strip in adapter.at():
        for name, tensor in strip.export().items():
            if isinstance(strip, BiasStrip) and path in targets:
                name = f"base_layer.{name}"  # where PEFT keeps what it wrapped
            out[_key(adapter.method, path, name)] = (tensor, strip)
    return out


def _key(method: Method, path: str, name: str) -> str:
    if name == "prompt_embeddings":
        return name
    return f"{method.file_prefix}{path}.{name}" if path else method.file_prefix + name


def _ending(model: nn.Module, names: list[str] | None) -> list[str] | None:
    """Paths of what a file's `modules_to_save` names: all that end with a name, even inside a word, as PEFT has it."""
    if not names:
        return names
    paths = [path for path, _ in model.named_modules()]
    found = [[path for path in paths if path.endswith(name)] or [name] for name in names]
    # PEFT writes both of its names for a classifier's head, whichever the model has.
    known = [path for each in found for path in each if path in paths or path not in _HEADS]
    return list(dict.fromkeys(known))


def _beside(model: nn.Module, method: Method, key: str, tensors: dict[str, Tensor]) -> bool:
    """Whether `key` is one of those that PEFT writes beside an adapter's own, with nothing new in it."""
    if ".original_module." in key:  # under a module that is trained whole: never used
        return True
    if ".modules_to_save." in key:  # the bias of such a module, a second time
        first = tensors.get(key.replace(".modules_to_save.", "."))
        return first is not None and torch.equal(first, tensors[key])
    # A targeted embedding is written with the base's own weight.
    own = dict(type(model).named_parameters(model)).get(key.removeprefix(method.file_prefix).replace("base_layer.", ""))
    return own is not None and _alike(own.detach().cpu(), tensors[key])


def _alike(a: Tensor, b: Tensor) -> bool:
    # The base may be loaded in another precision than it had then; other weights differ by far more.
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=0.02, atol=1e-4)


def _fill(model: nn.Module, adapter: Adapter, tensors: dict[str, Tensor], folder: Path, strict: bool) -> None:
    expected = entries(adapter)
    problems = []
    optional = {
        key
        for key, (_, s) in expected.items()
        if isinstance(s, WeightStrip) and not any(p.requires_grad for p in s.parameters())
    }
    missing = [key for key in expected if key not in tensors]
    if kept := [key for key in missing if key in optional]:
        warnings.warn(f"{folder} holds no {listed(kept)}: the model's own is used", stacklevel=3)
    if missing := [key for key in missing if key not in optional]:
        problems.append(f"missing {listed(missing, 3)}")
    unexpected = [key for key in tensors if key not in expected]
    if unexpected := [key for key in unexpected if not _beside(model, adapter.method, key, tensors)]:
        problems.append(f"unexpected {listed(unexpected, 3)}")
    shaped = {}
    for key, (tensor, strip) in expected.items():
        if key not in tensors:
            continue
        found = tensors[key].shape
        fits = found == tensor.shape or (
            key == "prompt_embeddings" and found[1:] == tensor.shape[1:] and found[0] == 2 * tensor.shape[0]
        )
        if not fits:
            problems.append(f"{key} is {tuple(found)}, expected {tuple(tensor.shape)}")
        else:
            shaped[key] = strip
    if problems:
        message = f"{folder} does not fit this model and method: {'; '.join(problems[:4])}"
        if strict:
            raise TanzakuError(message)
        warnings.warn(message, stacklevel=3)
    for path, strip in adapter.at():
        local = {}
        for name, tensor in strip.export().items():
            keys = [_key(adapter.method, path, n) for n in (name, f"base_layer.{name}")]
            found_key = next((k for k in keys if k in shaped), None)
            local[name] = tensor if found_key is None else tensors[found_key]
        if local:
            strip.restore(local)


def method_of(config: dict[str, Any]) -> Method:
    """The method that an adapter_config.json describes; settings that change the mathematics must be known."""
    kind = config.get("peft_type")
    cls = next((m for m in METHODS.values() if m.peft_type == str(kind).removeprefix("TANZAKU_")), None)
    if cls is None:
        known = ", ".join(m.peft_type for m in METHODS.values())
        raise TanzakuError(f"{CONFIG}: peft_type is {kind!r}; this version reads {known}")
    fields = {f.name for f in dataclasses.fields(cls)}
    harmless = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", *_INERT}
    for key, value in config.items():
        if key not in fields and key not in harmless and value not in (None, False, {}, [], "", "none"):
            raise TanzakuError(f"{CONFIG}: {key}={value!r} is a setting that this version does not know")
    settings = {key: value for key, value in config.items() if key in fields}
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key, 0) is None and kind != "ADALORA":
            settings.pop(key)
    return cls.from_settings(settings)


# Settings that PEFT writes with a value although nothing uses them.
_INERT = {
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "corda_config",
    "loftq_config",
}


def config_of(host: Host, adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json of an adapter."""
    method = adapter.method
    own = type(host.model).__name__
    task = method.task_type or next((t for end, t in _TASKS.items() if own.endswith(end)), None)
    settings = method.settings()
    # Whole paths: of a mere name PEFT takes all that ends with it, "norm" for "input_layernorm" too.
    copies = {path: s for path, s in adapter.at() if isinstance(s, WeightStrip)}
    whole = [path for path, s in copies.items() if any(p.requires_grad for p in s.parameters())]
    if whole and method.name not in _ONLY_HERE:
        settings["modules_to_save"] = whole
    if task in _NEEDS_HEAD and method.trains_head and method.file_prefix == Method.file_prefix:
        # By these tasks PEFT takes the head from the file, and cannot read one without; by none it leaves the base's.
        task = task if any(path.endswith(_HEADS) for path in copies) else None
    settings.update(
        peft_type=method.file_type(host.base),
        task_type=task,
        base_model_name_or_path=getattr(host.model, "name_or_path", "") or None,
        inference_mode=True,
    )
    if method.name not in _ONLY_HERE:
        settings = {k: v for k, v in settings.items() if k not in ("prefix_init_text",)}
        if method.name == "prefix_tuning":
            settings.pop("tokenizer_name_or_path", None)
        if method.name == "llama_adapter" and not settings["modules_to_save"]:
            settings.pop("modules_to_save")
        if settings.get("total_step", 0) is None:
            # PEFT reads no file without a number, though only a training run uses it; here each sets its own.
            settings["total_step"] = settings["tinit"] + settings["tfinal"] + 1
    return settings


_ONLY_HERE = {"full", "head"}
_HEADS = ("classifier", "score", "qa_outputs")
_NEEDS_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


# -- the base an adapter was made for


def describe(host: Host) -> dict[str, Any]:
    """Architecture, and some numbers read off the base's weights: enough to tell another base from this one."""
    sample = {}
    if all(p.device.type != "meta" for p in host.model.parameters()):
        sample = _sample(host)
    return {"model_type": host.base.kind, "architecture": type(host.model).__name__, "sample": sample}


def _sample(host: Host) -> dict[str, list[float]]:
    heads = tuple(f"{name}." for name in host.base.head_names())
    weights = [
        (name, p)
        for name, p in type(host.model).named_parameters(host.model)
        if p.is_floating_point() and p.dim() == 2 and not name.startswith(heads or ("\0",))
    ]
    chosen = weights[:: max(1, len(weights) // 6)][:6]
    return {name: [float(x) for x in p.detach().flatten()[:: max(1, p.numel() // 8)][:8]] for name, p in chosen}


def _check_base(model: nn.Module, base: dict[str, Any], folder: Path, strict: bool) -> None:
    fresh = model.__dict__.get("_tanzaku_host") or Host(model)
    mine = describe(fresh)
    problem = None
    if base.get("model_type") != mine["model_type"]:
        problem = f"a {base.get('model_type')!r} model, and this one is {mine['model_type']!r}"
    else:
        theirs, ours = base.get("sample") or {}, mine["sample"]
        for name in theirs.keys() & ours.keys():
            a, b = torch.tensor(theirs[name]), torch.tensor(ours[name])
            if not _alike(a, b):
                problem = f"a base with other weights (they differ at {name})"
                break
        if problem is None and theirs and ours and not theirs.keys() & ours.keys():
            problem = "a base with other layers"
    if problem:
        message = f"{folder} was made for {problem}"
        if strict:
            raise TanzakuError(message + "; load the base that it names")
        warnings.warn(message, stacklevel=3)


# -- files


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise TanzakuError(f"{folder} is no directory; expected an adapter's, with {CONFIG} and {TENSORS}")
    if not (folder / CONFIG).is_file():
        raise TanzakuError(f"{folder} has no {CONFIG}; found {listed(p.name for p in folder.iterdir()) or 'nothing'}")
    return _read_object(folder / CONFIG)


def _read_about(folder: Path) -> dict[str, Any] | None:
    return _read_object(folder / META) if (folder / META).is_file() else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TanzakuError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise TanzakuError(f"{path} is damaged: found a {type(value).__name__}, expected an object")
    return value


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        hint = (
            "; adapter_model.bin is a pickle, which is never read: save it as safetensors" if pickled.exists() else ""
        )
        raise TanzakuError(f"{folder} has no {TENSORS}{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, OverflowError) as error:
        raise TanzakuError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _replace(new: Path, target: Path) -> None:
    """Put directory `new` in the place of `target` at one instant, where the system can exchange two names."""
    if not target.exists():
        new.rename(target)
        return
    exchange, here = 2, -100
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None or renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange):
        old = new.with_name(new.name + ".old")
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
