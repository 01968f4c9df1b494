"""The arithmetic of a run that leaves it open."""

from __future__ import annotations

from typing import Literal

import torch

from tanzaku.engine.onednn import available, speeds

# Products are about half of what a step does on a CPU; the rest of it gains little, and casts cost something.
_PAYS = 0.6


def precision_for(device: torch.device, weights: torch.dtype | None) -> Literal["bf16", "fp32"]:
    """`bf16` on a device with units for it: a GPU that has them, or a processor whose bf16 products were measured to
    take less than three fifths of the time, over weights of that type; else `fp32`.

    Args:
        weights: the type of the frozen ones. Where others would be cast at every product, little is gained.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu" or weights != torch.bfloat16 or not available(torch.bfloat16):
        return "fp32"
    return "bf16" if speeds(torch.bfloat16).total < _PAYS * speeds(torch.float32).total else "fp32"
