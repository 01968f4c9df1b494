"""CorDA's data."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.starts import preprocess_corda

__all__ = ["preprocess_corda"]
__getattr__ = absent_from(__name__, __all__)
