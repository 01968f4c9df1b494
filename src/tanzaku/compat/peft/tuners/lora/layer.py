"""LoRA's layers."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.layers import Conv2d, Embedding, Linear, LoraLayer

__all__ = ["Conv2d", "Embedding", "Linear", "LoraLayer"]
__getattr__ = absent_from(__name__, __all__)
