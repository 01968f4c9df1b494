"""LLaMA-Adapter by PEFT's names."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import AdaptionPromptConfig
from tanzaku.compat.peft.layers import AdaptedAttention
from tanzaku.compat.peft.tuner import AdaptionPromptModel

__all__ = ["AdaptedAttention", "AdaptionPromptConfig", "AdaptionPromptModel"]
__getattr__ = absent_from(__name__, __all__)
