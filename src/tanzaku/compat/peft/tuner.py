"""`model.base_model`, where PEFT has a tuner of the method's own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

from torch import nn

from tanzaku.compat.peft.config import PeftConfig, PeftType
from tanzaku.compat.peft.owner import Owner
from tanzaku.core.weights import BiasCopy, WeightCopy
from tanzaku.files.patterns import groups_of
from tanzaku.models import tree


class BaseTuner(nn.Module):
    """It holds the model, and answers for it and for the wrapper."""

    prefix: ClassVar[str] = ""  # of the names of the method's parameters
    uses_shared_state: ClassVar[bool] = False

    def __init__(self, model: nn.Module, owner: Owner):
        super().__init__()
        self.model = model
        self.__dict__["owner"] = owner  # not a submodule: it holds this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the modules that any adapter changes."""
        found = [
            path
            for adapter in self.__dict__["owner"]._adapters()
            for path, layer in adapter.at()
            if not isinstance(layer, WeightCopy | BiasCopy)
        ]
        return list(dict.fromkeys(found))

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's configuration as a dictionary."""
        config = getattr(model, "config", {"model_type": "custom"})
        if hasattr(config, "to_dict"):
            return cast(dict[str, Any], config.to_dict())
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return dataclasses.asdict(config)
        return cast(dict[str, Any], config)

    def __getattr__(self, name: str) -> Any:
        owner = self.__dict__.get("owner")
        if name in _OF_TUNERS and owner is not None:
            return getattr(owner, name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "_modules" not in self.__dict__:
                raise
            return getattr(self.model, name)


class LoraModel(BaseTuner):
    """With LoRA."""

    prefix = "lora_"


class AdaLoraModel(LoraModel):
    """With AdaLoRA."""


class IA3Model(BaseTuner):
    """With (IA)3."""

    prefix = "ia3_"


class AdaptionPromptModel(BaseTuner):
    """With LLaMA-Adapter."""

    prefix = "adaption_"


class XLoraModel(BaseTuner):
    """With X-LoRA."""

    prefix = "internal_xlora_classifier"


TUNERS: dict[str, type[BaseTuner]] = {
    PeftType.LORA: LoraModel,
    PeftType.ADALORA: AdaLoraModel,
    PeftType.IA3: IA3Model,
    PeftType.ADAPTION_PROMPT: AdaptionPromptModel,
    PeftType.XLORA: XLoraModel,
}
PREFIXES: dict[str, str] = {
    **{kind: tuner.prefix for kind, tuner in TUNERS.items()},
    **dict.fromkeys(
        (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING, PeftType.CPT), "prompt_encoder."
    ),
}
_OF_TUNERS = (
    "active_adapter",
    "active_adapters",
    "add_weighted_adapter",
    "delete_adapter",
    "disable_adapter_layers",
    "enable_adapter_layers",
    "merge_adapter",
    "merge_and_unload",
    "peft_config",
    "set_adapter",
    "set_requires_grad",
    "unload",
    "unmerge_adapter",
    "update_and_allocate",
)


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether the settings target the module at the path `key`.

    As PEFT has it: a string is a regular expression for the whole path, names in a list are ends of it.
    """
    targets, excluded = getattr(config, "target_modules", None), getattr(config, "exclude_modules", None)
    inside = any(f".{name}." in f".{key}." for name in config.modules_to_save or ())
    if not targets or inside or (excluded and named(excluded, key)) or not named(targets, key):
        return False
    layers = getattr(config, "layers_to_transform", None)
    if isinstance(targets, str) or layers in (None, []) or key in targets:
        return True
    patterns = config.layers_pattern
    patterns = [patterns] if isinstance(patterns, str) and patterns else list(patterns or [r"[^.]*"])
    # Without a pattern a list of layers is not the first part of a path.
    lead = r"(?:|.*?\.)" if getattr(config, "layers_pattern", None) else r"(?:.*?\.)"
    for pattern in patterns:
        found = groups_of(pattern, key, lead + r"{}\.(\d+)\..*")
        if found is not None:
            return int(found[-1] or 0) in ([layers] if isinstance(layers, int) else layers)
    return False


def named(names: Any, key: str) -> bool:
    """Whether the module at a path is meant: by a regular expression, or by one of several ends of paths."""
    if isinstance(names, str):
        return groups_of(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Paths of the modules that an adapter's settings target, "matched", and of all others, "unmatched"."""
    base = tuner.get_base_model() if hasattr(tuner, "get_base_model") else tuner.model
    config = tuner.peft_config[adapter_name]
    out: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path, _ in tree.named_modules(base):
        out["matched" if check_target_module_exists(config, path) else "unmatched"].append(path)
    return out
