"""Tanzaku: one frozen model, many adapters at once.

Names are imported when first used, so that `import tanzaku` and `tanzaku --help` cost nothing. The methods are those of
their registry, in `tanzaku.methods`, whose names stand in a table beside it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanzaku.support.versions import VERSION

__version__ = VERSION

_METHODS = [method["class"] for method in json.loads((Path(__file__).parent / "methods" / "methods.json").read_bytes())]
_HOME = {
    "Adapter": "tanzaku.core.adapter",
    **dict.fromkeys(("Count", "activate", "adapters", "attach", "count", "detach", "route"), "tanzaku.core.attach"),
    "calibrate": "tanzaku.core.calibration",
    **dict.fromkeys(("load", "save"), "tanzaku.storage.store"),
    **dict.fromkeys(("merge", "rounding", "unmerge"), "tanzaku.merging.merge"),
    "describe": "tanzaku.methods.descriptions",
    "write_lora": "tanzaku.merging.written",
    "combine": "tanzaku.merging.combine",
    "convert": "tanzaku.merging.convert",
    **dict.fromkeys(("export_adapter", "export_model"), "tanzaku.export.gguf"),
    **dict.fromkeys(("METHODS", *_METHODS), "tanzaku.methods"),
    "Method": "tanzaku.core.method",
    "TanzakuError": "tanzaku.errors",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from tanzaku.core.adapter import Adapter as Adapter
    from tanzaku.core.attach import Count as Count
    from tanzaku.core.attach import activate as activate
    from tanzaku.core.attach import adapters as adapters
    from tanzaku.core.attach import attach as attach
    from tanzaku.core.attach import count as count
    from tanzaku.core.attach import detach as detach
    from tanzaku.core.attach import route as route
    from tanzaku.core.calibration import calibrate as calibrate
    from tanzaku.core.method import Method as Method
    from tanzaku.errors import TanzakuError as TanzakuError
    from tanzaku.export.gguf import export_adapter as export_adapter
    from tanzaku.export.gguf import export_model as export_model
    from tanzaku.merging.combine import combine as combine
    from tanzaku.merging.convert import convert as convert
    from tanzaku.merging.merge import merge as merge
    from tanzaku.merging.merge import rounding as rounding
    from tanzaku.merging.merge import unmerge as unmerge
    from tanzaku.merging.written import write_lora as write_lora
    from tanzaku.methods import *  # noqa: F403
    from tanzaku.methods.descriptions import describe as describe
    from tanzaku.storage.store import load as load
    from tanzaku.storage.store import save as save


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tanzaku' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
