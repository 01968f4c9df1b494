"""What `isinstance` says of models and configurations where HF PEFT is loaded, too.

Libraries that train (TRL, transformers, accelerate) ask `isinstance(model, peft.PeftModel)` and
`isinstance(config, peft.PeftConfig)`, and build models by `peft.get_peft_model`. Where HF PEFT is loaded, ours answer
yes, and a model built from a configuration of ours is ours. HF PEFT is never loaded for it.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from tanzaku.errors import TanzakuError


def theirs(module: str, name: str) -> Any:
    """A name of HF PEFT's, where it is loaded."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and found.__module__.partition(".")[0] == "peft" else None


# Our configuration, layer and function that builds a model: what this is imported by.
_ours: list[tuple[type, type, Any]] = []


def bridge_to(config: type, layer: type, build: Any) -> None:
    """Say which are ours."""
    _ours[:] = [(config, layer, build)]


def seen_as(own: type, base: nn.Module | None, module: str) -> type:
    """The class that an object answers with when it is asked for `__class__`: one that is a subclass of all it may be
    taken for.

    Args:
        own: the object's own class. base: the model that it stands for. module: where HF PEFT has classes of its name.
    """
    first = type(base) if isinstance(base, PreTrainedModel) else own
    other = next((found for each in own.__mro__ if (found := theirs(module, each.__name__)) is not None), None)
    if other is None:
        return first
    _bridge()
    return _both(first, other)


@cache
def _both(first: type, second: type) -> type:
    class Meta(type(first)):  # type: ignore[misc]
        def mro(cls) -> list[type]:
            more = [each for each in second.__mro__ if each not in first.__mro__]
            return [cast(type, cls), *first.__mro__[:-1], *more, object]

    names = {"__module__": first.__module__, "__qualname__": first.__qualname__, "__doc__": first.__doc__}
    return cast(type, Meta(first.__name__, (first,), {**names, "made_from": first}))


@cache
def _bridge() -> None:
    """Let HF PEFT build our models from our configurations, and know our layers."""
    PeftConfig, BaseTunerLayer, get_peft_model = _ours[0]
    model, tuner = (theirs("peft.peft_model", "PeftModel"), theirs("peft.tuners.tuners_utils", "BaseTuner"))
    layer = theirs("peft.tuners.tuners_utils", "BaseTunerLayer")

    def new_model(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("peft_config", args[1] if len(args) > 1 else None)
        if not issubclass(type(config), PeftConfig):
            return object.__new__(cls)
        return get_peft_model(*args, **kwargs)

    def new_tuner(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("peft_config", args[1] if len(args) > 1 else None)
        for each in config.values() if isinstance(config, dict) else [config]:
            if issubclass(type(each), PeftConfig):
                raise TanzakuError(
                    f"{type(each).__name__} of tanzaku.compat.peft makes no layers inside of a model (add_adapter, "
                    "inject_adapter_in_model); wrap the model with its get_peft_model(), or use HF PEFT's own"
                )
        return object.__new__(cls)

    if model is not None and "__new__" not in model.__dict__:
        model.__new__ = new_model
    if tuner is not None and "__new__" not in tuner.__dict__:
        tuner.__new__ = new_tuner
    if layer is not None:
        layer.register(BaseTunerLayer)
