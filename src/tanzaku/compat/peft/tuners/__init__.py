"""PEFT's configurations, tuners and layers, by method."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    LoraRuntimeConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
)
from tanzaku.compat.peft.tuner import AdaLoraModel, AdaptionPromptModel, IA3Model, LoraModel
from tanzaku.compat.peft.tuners import adalora as adalora
from tanzaku.compat.peft.tuners import adaption_prompt as adaption_prompt
from tanzaku.compat.peft.tuners import ia3 as ia3
from tanzaku.compat.peft.tuners import lora as lora
from tanzaku.compat.peft.tuners import p_tuning as p_tuning
from tanzaku.compat.peft.tuners import prefix_tuning as prefix_tuning
from tanzaku.compat.peft.tuners import prompt_tuning as prompt_tuning
from tanzaku.compat.peft.tuners import tuners_utils as tuners_utils

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "IA3Config",
    "IA3Model",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
]
__getattr__ = absent_from(__name__, __all__)
