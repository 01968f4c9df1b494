"""LoRA by PEFT's names."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import LoraConfig, LoraRuntimeConfig
from tanzaku.compat.peft.layers import Conv2d, Embedding, Linear, LoraLayer
from tanzaku.compat.peft.tuner import LoraModel
from tanzaku.compat.peft.tuners.lora import config as config
from tanzaku.compat.peft.tuners.lora import layer as layer
from tanzaku.compat.peft.tuners.lora import model as model

__all__ = ["Conv2d", "Embedding", "Linear", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig"]
__getattr__ = absent_from(__name__, __all__)
