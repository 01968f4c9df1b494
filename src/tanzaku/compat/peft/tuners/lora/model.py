"""LoRA's tuner."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.tuner import LoraModel

__all__ = ["LoraModel"]
__getattr__ = absent_from(__name__, __all__)
