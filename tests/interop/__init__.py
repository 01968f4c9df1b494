"""Tanzaku beside HF PEFT: the same files, the same numbers."""
