"""AdaLoRA by PEFT's names."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import AdaLoraConfig
from tanzaku.compat.peft.layers import AdaLoraLayer, SVDLinear
from tanzaku.compat.peft.tuner import AdaLoraModel

__all__ = ["AdaLoraConfig", "AdaLoraLayer", "AdaLoraModel", "SVDLinear"]
__getattr__ = absent_from(__name__, __all__)
