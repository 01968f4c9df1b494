"""An adapter's directory as PEFT writes it: the settings that a program keeps, and the model card for the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel

from tanzaku.compat.peft.config import PeftConfig, PeftType, plain
from tanzaku.compat.peft.layers import own_class
from tanzaku.errors import TanzakuError
from tanzaku.storage.card import CARD, digest_of, kept
from tanzaku.storage.store import CONFIG, META, save


def write(base: nn.Module, name: str, config: PeftConfig, target: Path) -> None:
    """Write adapter `name` into `target`. Whole files take the place of old ones, and what else lies there stays."""
    if target.exists() and not target.is_dir():
        raise TanzakuError(f"{target}: Provided path should be a directory, not a file")
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=target) as beside:
        new = save(base, name, Path(beside, "adapter"))
        settings = json.loads((new / CONFIG).read_text(encoding="utf-8"))
        settings |= {key: plain(getattr(config, key)) for key in _OF_PROGRAMS if getattr(config, key) is not None}
        if config.task_type is None:
            # By no task PEFT's AutoPeftModel reads the base's class here.
            kind = own_class(base)
            mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            settings |= {"task_type": None, "auto_mapping": config.auto_mapping or mapping}
        _write(new / CONFIG, settings)
        theirs = kept(target)
        text = _card(theirs or (new / CARD).read_text(encoding="utf-8"), base, config)
        (new / CARD).write_text(text, encoding="utf-8")
        if theirs is None:
            about = json.loads((new / META).read_text(encoding="utf-8"))
            _write(new / META, {**about, "card": digest_of(text)})
        for path in new.iterdir():
            path.replace(target / path.name)


def tag(folder: Path, tags: list[str]) -> None:
    """Add tags to the model card in a directory."""
    card = ModelCard.load(folder / CARD)
    card.data.tags = sorted({*(card.data.tags or []), *tags})
    card.save(folder / CARD)


# Settings that tell where an adapter comes from and change nothing: a program's own are kept.
_OF_PROGRAMS = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version")


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(text: str, base: nn.Module, config: PeftConfig) -> str:
    """The card with what the Hub reads of an adapter. What somebody wrote below it stays."""
    if not text.lstrip().startswith("---"):
        text = f"---\nlibrary_name: peft\n---\n{text}"
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    if data.library_name is None:
        data.library_name = "peft"
    tags = {*(data.tags or []), *(getattr(base, "model_tags", None) or [])}
    if config.peft_type == PeftType.LORA:
        tags.add("lora")
    if isinstance(base, PreTrainedModel):
        tags.add("transformers")
        name = base.name_or_path
        if name and not Path(name).exists():  # of the Hub; a path of this machine means nothing there
            tags.add(f"base_model:adapter:{name}")
            data.base_model = name
    data.tags = sorted(tags)
    if config.task_type == "CAUSAL_LM" and data.pipeline_tag is None:
        data.pipeline_tag = "text-generation"
    return str(card)
