"""For these tests: without PEFT's advice."""

from advice import without_advice

__all__ = ["without_advice"]
