"""Prefix tuning by PEFT's names."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import PrefixTuningConfig

__all__ = ["PrefixTuningConfig"]
__getattr__ = absent_from(__name__, __all__)
