"""(IA)3 by PEFT's names."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import IA3Config
from tanzaku.compat.peft.layers import IA3Layer
from tanzaku.compat.peft.tuner import IA3Model

__all__ = ["IA3Config", "IA3Layer", "IA3Model"]
__getattr__ = absent_from(__name__, __all__)
