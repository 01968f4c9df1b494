"""A configuration and a model give a model with an adapter."""

from __future__ import annotations

from typing import Any

from torch import nn

from tanzaku.compat.peft.config import CONFIGS as PEFT_TYPE_TO_CONFIG_MAPPING
from tanzaku.compat.peft.config import PeftConfig
from tanzaku.compat.peft.peft_model import BY_TASK, PeftModel
from tanzaku.errors import TanzakuError

__all__ = ["PEFT_TYPE_TO_CONFIG_MAPPING", "get_peft_config", "get_peft_model"]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Wrap `model` with a new adapter, by the class that `peft_config.task_type` names.

    Args:
        mixed: False; adapters of several methods go into any model, by `add_adapter`.
        revision: of the base, noted in the settings.
    """
    if mixed:
        raise TanzakuError("get_peft_model: found mixed=True, expected False: add_adapter takes any method")
    if not isinstance(peft_config, PeftConfig):
        raise TanzakuError(f"found {type(peft_config).__name__}, expected a configuration such as LoraConfig(r=8)")
    if revision is not None:
        peft_config.revision = revision
    kind = BY_TASK.get(str(peft_config.task_type), PeftModel)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration that a dictionary describes, by its `peft_type`."""
    return PeftConfig.from_peft_type(**config_dict)
