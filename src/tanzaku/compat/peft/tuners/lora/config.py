"""LoRA's configuration."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import LoraConfig, LoraRuntimeConfig

__all__ = ["LoraConfig", "LoraRuntimeConfig"]
__getattr__ = absent_from(__name__, __all__)
