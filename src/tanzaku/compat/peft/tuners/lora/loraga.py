"""LoRA-GA's data."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.starts import preprocess_loraga

__all__ = ["preprocess_loraga"]
__getattr__ = absent_from(__name__, __all__)
