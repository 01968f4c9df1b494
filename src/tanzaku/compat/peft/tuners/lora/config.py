"""LoRA's configuration."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import CordaConfig, EvaConfig, LoraConfig, LoraGAConfig, LoraRuntimeConfig

__all__ = ["CordaConfig", "EvaConfig", "LoraConfig", "LoraGAConfig", "LoraRuntimeConfig"]
__getattr__ = absent_from(__name__, __all__)
