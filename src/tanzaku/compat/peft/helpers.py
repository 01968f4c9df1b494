"""Small helpers of programs that use PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from tanzaku.compat.peft.absent import absent_from
from tanzaku.compat.peft.config import PeftConfig
from tanzaku.compat.peft.errors import WrongType
from tanzaku.compat.peft.layers import LoraLayer
from tanzaku.errors import TanzakuError

__all__ = ["check_if_peft_model", "rescale_adapter_scale"]
__getattr__ = absent_from(__name__, __all__)


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a directory, or a repository on the Hub, holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except TanzakuError:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block, what LoRA adds is multiplied by `multiplier`.

    Raises:
        TanzakuError: `multiplier` is no number, or no layer of the model has LoRA.
    """
    if not isinstance(multiplier, int | float):
        raise WrongType(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise TanzakuError("scaling is only supported for models with `LoraLayer`s; this one has none")
    before = [layer.scaling.copy() for layer in layers]
    for layer, scaling in zip(layers, before, strict=True):
        layer.scaling = {name: value * multiplier for name, value in scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
