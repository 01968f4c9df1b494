"""Helpers of programs that train with PEFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tanzaku.compat.peft.layers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from tanzaku.models.quantize import plain

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "_get_submodules",
    "infer_device",
    "prepare_model_for_kbit_training",
]


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, its last name) of the module at a path. PEFT's name is private, and programs use it."""
    parent, _, last = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), last


def infer_device() -> str:
    """The kind of accelerator that is here, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a base, bring what is not quantised of it to fp32, and checkpoint its layers where it is quantised.

    Args:
        use_gradient_checkpointing: of a quantised base. gradient_checkpointing_kwargs: how, as transformers has it.
        auto_clear_cache: give back what the accelerator's allocator keeps afterwards.
    """
    quantised = bool(getattr(model, "is_quantized", False))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if plain(parameter) and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if quantised and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()  # type: ignore[operator]
        model.gradient_checkpointing_enable(options)  # type: ignore[operator]
    return model
