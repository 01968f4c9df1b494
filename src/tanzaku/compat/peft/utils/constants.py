"""Names of PEFT's files."""

from tanzaku.storage.store import CONFIG as CONFIG_NAME
from tanzaku.storage.store import TENSORS as SAFETENSORS_WEIGHTS_NAME

WEIGHTS_NAME = "adapter_model.bin"  # a pickle: neither read nor written here
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"

__all__ = ["CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"]
