"""PEFT's enumerations."""

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
__getattr__ = absent_from(__name__, __all__)
