"""LoRA by PEFT's names."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import EvaConfig, LoraConfig, LoraGAConfig, LoraRuntimeConfig
from tanzaku.compat.peft.layers import Conv2d, Embedding, Linear, LoraLayer
from tanzaku.compat.peft.starts import initialize_lora_eva_weights, preprocess_loraga
from tanzaku.compat.peft.tuner import LoraModel
from tanzaku.compat.peft.tuners.lora import config as config
from tanzaku.compat.peft.tuners.lora import corda as corda
from tanzaku.compat.peft.tuners.lora import eva as eva
from tanzaku.compat.peft.tuners.lora import layer as layer
from tanzaku.compat.peft.tuners.lora import loraga as loraga
from tanzaku.compat.peft.tuners.lora import model as model

__all__ = [
    "Conv2d",
    "Embedding",
    "EvaConfig",
    "Linear",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "initialize_lora_eva_weights",
    "preprocess_loraga",
]
__getattr__ = absent_from(__name__, __all__)
