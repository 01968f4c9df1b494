"""The methods, one file each, and their registry. Adding a method is a file and a line here."""

from __future__ import annotations

from tanzaku.core.method import Method
from tanzaku.errors import TanzakuError, nearest
from tanzaku.methods.adalora import AdaLoRA
from tanzaku.methods.full import Full
from tanzaku.methods.head import Head
from tanzaku.methods.ia3 import IA3
from tanzaku.methods.llama_adapter import LlamaAdapter
from tanzaku.methods.lora import LoRA
from tanzaku.methods.p_tuning import PTuning
from tanzaku.methods.prefix_tuning import PrefixTuning
from tanzaku.methods.prompt_tuning import PromptTuning

__all__ = [
    "IA3",
    "METHODS",
    "AdaLoRA",
    "Full",
    "Head",
    "LlamaAdapter",
    "LoRA",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "method_named",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (LoRA, AdaLoRA, PromptTuning, PTuning, PrefixTuning, IA3, LlamaAdapter, Full, Head)
}


def method_named(name: str) -> type[Method]:
    """The method of that name, or an error with the nearest one."""
    if name not in METHODS:
        raise TanzakuError(f"unknown method {name!r}{nearest(name, METHODS)}; methods are {', '.join(METHODS)}")
    return METHODS[name]
