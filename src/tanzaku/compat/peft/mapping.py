"""A configuration and a model give a model with an adapter."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import CONFIGS as PEFT_TYPE_TO_CONFIG_MAPPING
from tanzaku.compat.peft.config import PeftConfig
from tanzaku.compat.peft.isinstances import bridge_to
from tanzaku.compat.peft.layers import BaseTunerLayer
from tanzaku.compat.peft.peft_model import BY_TASK, PeftModel, wrapped_again
from tanzaku.compat.peft.peft_model import BY_TASK as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from tanzaku.compat.peft.tuner import PREFIXES as PEFT_TYPE_TO_PREFIX_MAPPING
from tanzaku.compat.peft.tuner import TUNERS as PEFT_TYPE_TO_TUNER_MAPPING
from tanzaku.errors import TanzakuError

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
]
__getattr__ = absent_from(__name__, __all__)


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
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with revision "
                f"{revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    name, before = getattr(model, "name_or_path", None) or None, peft_config.base_model_name_or_path
    if before is not None and before != name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{name}'. Please ensure that "
            "the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    wrapped_again(model, adapter_name)
    kind = BY_TASK.get(str(peft_config.task_type), PeftModel)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration that a dictionary describes, by its `peft_type`."""
    return PeftConfig.from_peft_type(**config_dict)


bridge_to(PeftConfig, BaseTunerLayer, get_peft_model)
