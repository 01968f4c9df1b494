"""Methods whose configurations and tuners need nothing of their own here: each is made of the method.

Settings have PEFT's names, and stand here in PEFT's order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tanzaku.compat.peft.config import CONFIGS, PeftConfig, PeftType, PromptLearningConfig
from tanzaku.compat.peft.tuner import PREFIXES, TUNERS, BaseTuner
from tanzaku.core.method import Method
from tanzaku.methods import METHODS

# PEFT's name of the method -> how its classes' names begin, and its parameters' names; its settings in order.
_KINDS: dict[str, tuple[str, str, str]] = {
    "LN_TUNING": ("LNTuning", "ln_tuning_", "target_modules exclude_modules modules_to_save"),
}


def _config(method: type[Method], name: str, order: tuple[str, ...]) -> type[PeftConfig]:
    own = {field.name for field in dataclasses.fields(method)}
    parts: dict[str, Any] = {
        "__doc__": f"{method.__name__} by PEFT's names: :class:`tanzaku.{method.__name__}` has the settings.",
        "__module__": __name__,
        "method": method,
        "peft_type": PeftType(method.peft_type),
        "order": order,
        "elsewhere": dict.fromkeys(key for key in order if key not in own),
    }
    first = PromptLearningConfig if method.lengthens_rows else PeftConfig
    return dataclasses.dataclass(init=False)(type(name, (first, method), parts))


MORE: dict[str, type[Any]] = {}
for _method in METHODS.values():
    if _method.in_peft and _method.peft_type in _KINDS and _method.peft_type not in CONFIGS:
        _name, _prefix, _order = _KINDS[_method.peft_type]
        _made = _config(_method, f"{_name}Config", tuple(_order.split()))
        CONFIGS[_method.peft_type] = MORE[_made.__name__] = _made
        PREFIXES[_method.peft_type] = _prefix or "prompt_encoder."
        if _prefix:
            _parts = {"prefix": _prefix, "__module__": __name__, "__doc__": f"With {_method.__name__}."}
            TUNERS[_method.peft_type] = MORE[f"{_name}Model"] = type(f"{_name}Model", (BaseTuner,), _parts)

__all__ = list(MORE)
globals().update(MORE)
