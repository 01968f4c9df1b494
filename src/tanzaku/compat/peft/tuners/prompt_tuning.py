"""Prompt tuning by PEFT's names."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import PromptTuningConfig, PromptTuningInit

__all__ = ["PromptTuningConfig", "PromptTuningInit"]
__getattr__ = absent_from(__name__, __all__)
