"""HF PEFT's names on Tanzaku: `from tanzaku.compat.peft import LoraConfig, get_peft_model` in place of `from peft`.

A program changes its import line and nothing else; the model it gets goes to transformers' Trainer as it is. What is
missing here, and what differs, is in docs/compat.md. What is missing is an error by name, never a silent other thing.
"""

from __future__ import annotations

from tanzaku.compat.peft import helpers as helpers
from tanzaku.compat.peft import tuners as tuners
from tanzaku.compat.peft import utils as utils
from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from tanzaku.compat.peft.config import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    CPTConfig,
    EvaConfig,
    IA3Config,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    XLoraConfig,
)
from tanzaku.compat.peft.config import (
    __version__ as __version__,
)
from tanzaku.compat.peft.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from tanzaku.compat.peft.mapping import get_peft_config, get_peft_model
from tanzaku.compat.peft.more import *  # noqa: F403 (each method's that has no other)
from tanzaku.compat.peft.more import __all__ as _more
from tanzaku.compat.peft.peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from tanzaku.compat.peft.starts import initialize_lora_eva_weights, preprocess_loraga
from tanzaku.compat.peft.status import get_layer_status, get_model_status
from tanzaku.compat.peft.tuner import AdaLoraModel, AdaptionPromptModel, IA3Model, LoraModel, XLoraModel
from tanzaku.compat.peft.utils import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

__all__ = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CPTConfig",
    "EvaConfig",
    "IA3Config",
    "IA3Model",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "XLoraConfig",
    "XLoraModel",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    *_more,
]

__getattr__ = absent_from(__name__, [*__all__, "__version__"])
