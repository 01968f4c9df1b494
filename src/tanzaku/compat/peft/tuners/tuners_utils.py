"""What PEFT's tuners and layers share."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.layers import BaseTunerLayer
from tanzaku.compat.peft.tuner import BaseTuner, check_target_module_exists, inspect_matched_modules

__all__ = ["BaseTuner", "BaseTunerLayer", "check_target_module_exists", "inspect_matched_modules"]
__getattr__ = absent_from(__name__, __all__)
