"""Tanzaku: one frozen model, many adapters at once.

Names are imported when first used, so that `import tanzaku` and `tanzaku --help` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tanzaku.support.versions import VERSION

__version__ = VERSION

_HOME = {
    "Adapter": "tanzaku.core.adapter",
    **dict.fromkeys(("Count", "activate", "adapters", "attach", "count", "detach", "route"), "tanzaku.core.attach"),
    **dict.fromkeys(("load", "save"), "tanzaku.storage.store"),
    **dict.fromkeys(("merge", "rounding", "unmerge"), "tanzaku.merging.merge"),
    "combine": "tanzaku.merging.combine",
    **dict.fromkeys(("export_adapter", "export_model"), "tanzaku.export.gguf"),
    **dict.fromkeys(
        (
            "METHODS",
            "IA3",
            "AdaLoRA",
            "Full",
            "Head",
            "LlamaAdapter",
            "LoRA",
            "PTuning",
            "PrefixTuning",
            "PromptTuning",
        ),
        "tanzaku.methods",
    ),
    "Method": "tanzaku.core.method",
    "TanzakuError": "tanzaku.errors",
}

__all__ = [
    "IA3",
    "METHODS",
    "AdaLoRA",
    "Adapter",
    "Count",
    "Full",
    "Head",
    "LlamaAdapter",
    "LoRA",
    "Method",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "TanzakuError",
    "activate",
    "adapters",
    "attach",
    "combine",
    "count",
    "detach",
    "export_adapter",
    "export_model",
    "load",
    "merge",
    "rounding",
    "route",
    "save",
    "unmerge",
]

if TYPE_CHECKING:
    from tanzaku.core.adapter import Adapter
    from tanzaku.core.attach import Count, activate, adapters, attach, count, detach, route
    from tanzaku.core.method import Method
    from tanzaku.errors import TanzakuError
    from tanzaku.export.gguf import export_adapter, export_model
    from tanzaku.merging.combine import combine
    from tanzaku.merging.merge import merge, rounding, unmerge
    from tanzaku.methods import (
        IA3,
        METHODS,
        AdaLoRA,
        Full,
        Head,
        LlamaAdapter,
        LoRA,
        PrefixTuning,
        PromptTuning,
        PTuning,
    )
    from tanzaku.storage.store import load, save


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tanzaku' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
