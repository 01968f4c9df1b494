"""EVA's data."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.starts import forward_fn_dict, initialize_lora_eva_weights

__all__ = ["forward_fn_dict", "initialize_lora_eva_weights"]
__getattr__ = absent_from(__name__, __all__)
