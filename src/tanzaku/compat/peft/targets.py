"""Which modules a configuration means, where PEFT is more lenient than a method by itself.

A list of names is often one for several models: PEFT takes it as long as one of its names is here. So does this, and
says what it leaves out.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tanzaku.compat.peft.config import PeftConfig
from tanzaku.compat.peft.errors import NoMatchingPeftModuleError, PeftWarning
from tanzaku.compat.peft.tuner import check_target_module_exists, named
from tanzaku.core.targeted import matches
from tanzaku.errors import listed, nearest
from tanzaku.models import tree
from tanzaku.models.families import Base


def fit(config: PeftConfig, base: nn.Module) -> None:
    """Leave out of `config`, a copy, what names nothing here.

    Raises:
        NoMatchingPeftModuleError: nothing is left to adapt.
    """
    settings: Any = config
    targets = getattr(config, "target_modules", None)
    if not targets or config.is_adaption_prompt:
        return
    if isinstance(targets, str) and targets.lower() == "all-linear":
        settings.target_modules = all_linear(config, base)
        return
    paths = [path for path, _ in tree.named_modules(base) if path]
    found = [path for path in paths if check_target_module_exists(config, path)]
    excluded = getattr(config, "exclude_modules", None)
    copied = config.modules_to_save or ()
    left_out = [path for path in paths if excluded and named(excluded, path)]
    if not found:
        out = {*left_out, *(path for path in paths if any(f".{name}." in f".{path}." for name in copied))}
        raise NoMatchingPeftModuleError(_nothing(settings, base, paths, out))
    if excluded and not left_out:
        warnings.warn(
            f"You have passed exclude_modules={excluded!r} but no modules were excluded. Please check that "
            "exclude_modules was set correctly.",
            PeftWarning,
            stacklevel=5,
        )
    if not isinstance(targets, str):
        here = [name for name in targets if any(named([name], path) for path in paths)]
        if strange := sorted(set(targets) - set(here)):
            warnings.warn(
                f"target_modules: {listed(strange)} match no module of {type(base).__name__}; adapted are "
                f"{listed(sorted(here))}",
                PeftWarning,
                stacklevel=5,
            )
        settings.target_modules = type(targets)(here)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, None)
        if not patterns or config.peft_type == "ADALORA":
            continue
        kept = {name: value for name, value in patterns.items() if any(matches(name, path) for path in found)}
        if strange := sorted(set(patterns) - set(kept)):
            warnings.warn(
                f"{key}: {strange} did not match any targeted module, and have no effect", RuntimeWarning, stacklevel=5
            )
        setattr(settings, key, kept)


def all_linear(config: PeftConfig, base: nn.Module) -> list[str]:
    """Names of all linear layers but the output embeddings or, of a classifier, its head."""
    modules = dict(tree.named_modules(base))
    ends = getattr(base, "get_output_embeddings", lambda: None)()
    heads = [ends] if ends is not None else []
    if ends is None and config.task_type == "SEQ_CLS":
        heads = [getattr(base, name, None) for name in ("score", "classifier")]
    skipped = [*(config.modules_to_save or []), *(getattr(config, "exclude_modules", None) or [])]
    paths = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and not any(module is head for head in heads)
        and not any(f".{name}." in f".{path}." for name in skipped)
    ]
    if not paths:
        raise NoMatchingPeftModuleError(f"target_modules='all-linear': {type(base).__name__} has no linear layer left")
    # Last names are easier to read, where they mean the same.
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if {path for path in modules if named(names, path)} == set(paths) else paths


def _nothing(config: Any, base: nn.Module, paths: list[str], excluded: set[str]) -> str:
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    if set(paths) <= excluded:
        return f"All modules were excluded. Found exclude_modules={config.exclude_modules!r}: leave some of {targets!r}"
    candidates = Base.of(base).candidates()
    more = "".join(
        f" You specified {key!r}: {getattr(config, key)!r}."
        for key in ("layers_to_transform", "layers_pattern")
        if getattr(config, key, None) is not None
    )
    if not excluded:
        near = nearest(targets if isinstance(targets, str) else targets[0], candidates)
        return (
            f"Target modules {targets!r} not found in the base model{near}; candidates are {listed(candidates)}.{more}"
        )
    return (
        "No modules were targeted for adaptation. This might be caused by a combination of mismatched target modules "
        f"and excluded modules, or of modules in modules_to_save: found target_modules={targets!r}, "
        f"exclude_modules={config.exclude_modules!r}, modules_to_save={config.modules_to_save!r}; candidates are "
        f"{listed(candidates)}.{more}"
    )
