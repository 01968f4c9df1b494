"""The model card: README.md beside an adapter, with the front matter that the Hugging Face Hub reads.

It is made from the settings, the record of the run and the sizes of the tensors alone, so that one adapter has one
card: no dates, no names of directories, and no paths of the machine that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from torch import Tensor

from tanzaku.errors import TanzakuError
from tanzaku.files.writing import finite
from tanzaku.models.task_types import AUTO_CLASSES, PIPELINES
from tanzaku.support.numbers import written
from tanzaku.support.versions import VERSION, versions_of
from tanzaku.tasks import task_in
from tanzaku.tasks.probe import BUNDLED
from tanzaku.tasks.task import LOSS, Probe, Task

CARD = "README.md"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_EMBEDDED, _EMBEDDED_ID = "embedded", "google/gemma-3-270m"
_HIDDEN = {"base_model_name_or_path", "inference_mode", "peft_type", "revision", "task_type", "tokenizer_name_or_path"}
_LIBRARIES = ("torch", "transformers", "peft")


def card(
    method: Any,
    config: dict[str, Any],
    meta: dict[str, Any],
    training: dict[str, Any],
    tensors: Mapping[str, Tensor],
    known: bool = True,
) -> str:
    """The text of an adapter's card.

    Args:
        method: for its name, its summary and its paper.
        config: the adapter's adapter_config.json.
        meta: what is kept for its user, of which the model and the task are told.
        training: what :func:`training_record` makes, or nothing.
        tensors: those of its file.
        known: whether transformers has the class of the model, and Tanzaku did not make one for the task.
    """
    ours = str(config["peft_type"]).startswith("TANZAKU_") or not method.in_peft
    numbers = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    hub, base = _base(str(meta.get("model") or config.get("base_model_name_or_path") or ""))
    kind = str(config.get("task_type"))
    auto, pipeline = AUTO_CLASSES.get(kind, "AutoModel"), PIPELINES.get(kind)
    task = _task(meta)
    metrics = _metrics(task, training)
    outputs = None if task is None else task.model_settings().get("num_labels")
    number = "" if outputs is None else f", num_labels={outputs}"
    context = {
        "front": _front(method, hub, pipeline, training, metrics, ours),
        "title": f"{method.name} adapter of {base or 'an unnamed model'}",
        "what": _what(method, hub, base),
        "start": _start(meta),
        "answers": "" if task is None else task.answers(),
        "rows": [(split, f"{n:,}", training.get("files", {}).get(split, "")) for split, n in _pairs(training, "rows")],
        "figures": _figures(training, metrics),
        "held": _held(training),
        "parameters": f"{numbers:,}",
        "size": f"{size / 1000:,.0f}",
        "training": bool(training.get("settings")),
        "settings": _settings(config, training),
        "tanzaku": _tanzaku(auto, hub, number) if known or task is None else _made_here(hub),
        "predict": task is not None,
        "peft": "" if ours else _peft(auto, hub, number),
        "known": known or task is None,
        "vllm": _vllm(config, hub) if _runs_in_vllm(config, ours) else "",
        "versions": ", ".join(f"{name} {version}" for name, version in _versions().items()),
    }
    return _shape().render(context).rstrip() + "\n"


@cache
def _shape() -> Template:
    # Markdown is no HTML: what could be taken for markup is escaped by `md`.
    loader = PackageLoader("tanzaku", "storage")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    environment.filters["md"] = escaped
    return environment.get_template("card.md.j2")


def escaped(text: Any) -> str:
    """Text that markdown shows as it is, in one line."""
    plain = " ".join(str(text).split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", plain)


def kept(folder: Path) -> str | None:
    """The card in an adapter's directory where somebody wrote or changed it: saving again leaves it as it is."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    try:
        given = json.loads((folder / "tanzaku.json").read_text(encoding="utf-8"))["card"]
    except (OSError, ValueError, KeyError, TypeError):
        given = None
    return None if digest_of(text) == given else text


def digest_of(text: str) -> str:
    """What tells a card that was changed."""
    return hashlib.sha256(text.encode()).hexdigest()


def training_record(
    result: Any, rows: dict[str, int], files: dict[str, str], probe: Probe | None = None
) -> dict[str, Any]:
    """What a run tells the card: how many rows, the names of their files, the settings and the final figures, and what
    it has of a text that nothing was trained on."""
    record = {
        "files": files,
        "rows": rows,
        "settings": result.train_settings,
        "epochs": len(result.epochs),
        "valid": result.valid,
        "test": result.test,
        **({} if probe is None else {"held": {**probe.to_json(), "own": result.held_perplexity}}),
    }
    return {key: finite(value) for key, value in record.items()}


# -- its parts


def _task(meta: Mapping[str, Any]) -> Task | None:
    """The task that an adapter was trained for, if Tanzaku trained it."""
    try:
        return task_in(meta, "")
    except (TanzakuError, LookupError):
        return None  # what its user wrote by hand


def _start(meta: Mapping[str, Any]) -> str:
    """Which adapter it goes on from, if it does."""
    found = meta.get("init_from")
    if not isinstance(found, dict) or not isinstance(found.get("sha256"), str):
        return ""
    return f"It goes on from the adapter {found.get('adapter')} (sha256 of its files {found['sha256']})."


def _metrics(task: Task | None, training: Mapping[str, Any]) -> dict[str, str]:
    """Names on the Hub of the metrics that the record has."""
    if task is not None:
        return {metric.name: metric.hub or metric.name for metric in sorted(task.metrics, key=lambda m: m is LOSS)}
    return {key: key for split in ("valid", "test") for key in training.get(split) or {}}


def _front(
    method: Any,
    hub: str | None,
    pipeline: str | None,
    training: dict[str, Any],
    known: Mapping[str, str],
    ours: bool,
) -> str:
    tags = [str(method.name).replace("_", "-"), "tanzaku"]
    front: dict[str, Any] = {"library_name": "tanzaku" if ours else "peft"}
    if hub is not None:
        front["base_model"] = hub
        tags.insert(0, f"base_model:adapter:{hub}")
    if pipeline is not None:
        front["pipeline_tag"] = pipeline
    front["tags"] = tags
    split = next((each for each in ("test", "valid") if training.get(each)), None)
    if split is not None and pipeline is not None:
        metrics = [
            {"type": kind, "name": key, "value": round(training[split][key], 4)}
            for key, kind in known.items()
            if training[split].get(key) is not None
        ]
        name = training.get("files", {}).get(split) or split
        result = {
            "task": {"type": pipeline},
            "dataset": {"name": name, "type": name, "split": split},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": f"{method.name} adapter", "results": [result]}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()


def _what(method: Any, hub: str | None, base: str | None) -> str:
    of = f"{base} (4 bit, as pip brings it with tanzaku)" if hub == _EMBEDDED_ID and base == _EMBEDDED else base
    paper = f" ({method.paper})" if method.paper != "-" else ""
    return f"An adapter by {method.name}{paper}: {method.summary}. Its base model is {of or 'not named'}."


def _base(name: str) -> tuple[str | None, str | None]:
    """(the base's name on the Hub, the name to show); a path of some machine has none on the Hub."""
    if name == _EMBEDDED:
        return _EMBEDDED_ID, _EMBEDDED
    if not name:
        return None, None
    if _HUB_ID.fullmatch(name) and not name.endswith(".gguf") and not Path(name).is_dir():
        return name, name
    return None, re.split(r"[/\\]", name.rstrip("/\\"))[-1] or None


def _pairs(training: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    found = training.get(key) or {}
    return [(split, found[split]) for split in ("train", "valid", "test") if split in found]


def _figures(training: dict[str, Any], known: Mapping[str, str]) -> list[tuple[str, list[tuple[str, str]]]]:
    out = []
    for split in ("valid", "test"):
        if found := training.get(split):
            out.append((split, [(key, written(found[key], 4)) for key in known if found.get(key) is not None]))
    # One table: what one split lacks is left out of the other.
    both = set.intersection(*({key for key, _ in values} for _, values in out)) if out else set()
    return [(split, [pair for pair in values if pair[0] in both]) for split, values in out]


def _held(training: Mapping[str, Any]) -> str:
    """What the base has forgotten, in a sentence."""
    found = training.get("held") or {}
    if found.get("own") is None or found.get("base") is None:
        return ""
    text = "a text that comes with Tanzaku" if found["text"] == BUNDLED else found["text"]
    figures = f"base {written(found['base'], 2)}, with this adapter {written(found['own'], 2)}"
    return f"Perplexity on held text ({text}, {found['tokens']:,} tokens, which nothing was trained on): {figures}."


def _settings(config: dict[str, Any], training: dict[str, Any]) -> str:
    shown: dict[str, Any] = {
        key: value for key, value in config.items() if key not in _HIDDEN and value not in (None, False, {}, [])
    }
    if training.get("settings"):
        shown["training"] = {key: value for key, value in training["settings"].items() if value is not None}
    return yaml.safe_dump(shown, sort_keys=True, allow_unicode=True).rstrip() if shown else ""


def _loaded(auto: str, hub: str | None, number: str, where: str) -> list[str]:
    base = json.dumps(hub or "BASE")
    return [f"from transformers import {auto}", where, f"model = {auto}.from_pretrained({base}{number})"]


def _tanzaku(auto: str, hub: str | None, number: str) -> str:
    lines = _loaded(auto, hub, number, "import tanzaku as tz")
    return "\n".join([*lines, 'tz.load(model, "DIRECTORY", name="mine")', 'tz.activate(model, "mine")'])


def _made_here(hub: str | None) -> str:
    return "\n".join(
        [
            "import json",
            "from pathlib import Path",
            "import tanzaku as tz",
            "from tanzaku.models.loading import load_for",
            "from tanzaku.tasks import task_in",
            'about = json.loads(Path("DIRECTORY/tanzaku.json").read_text(encoding="utf-8"))["meta"]',
            f'model, tokenizer = load_for({json.dumps(hub or "BASE")}, task_in(about, "tanzaku.json"))',
            'tz.load(model, "DIRECTORY", name="mine")',
            'tz.activate(model, "mine")',
        ]
    )


def _peft(auto: str, hub: str | None, number: str) -> str:
    lines = _loaded(auto, hub, number, "from peft import PeftModel")
    return "\n".join([*lines, 'model = PeftModel.from_pretrained(model, "DIRECTORY")'])


def _runs_in_vllm(config: dict[str, Any], ours: bool) -> bool:
    """vLLM reads LoRA of generating models, without weights beside it and with one rank."""
    plain = config.get("bias", "none") == "none"
    extra = any(config.get(key) for key in ("modules_to_save", "rank_pattern", "alpha_pattern", "use_dora"))
    return (
        not ours
        and config.get("peft_type") == "LORA"
        and config.get("task_type") == "CAUSAL_LM"
        and plain
        and not extra
    )


def _vllm(config: dict[str, Any], hub: str | None) -> str:
    rank = int(config.get("r", 8))
    allowed = next((each for each in (8, 16, 32, 64, 128, 256, 320, 512) if each >= rank), rank)
    return f"$ vllm serve {hub or 'BASE'} --enable-lora --max-lora-rank {allowed} --lora-modules mine=DIRECTORY"


def _versions() -> dict[str, str]:
    return {"tanzaku": VERSION, **versions_of(_LIBRARIES)}
