"""The machine a run is on: its device, what it is, and the versions of the libraries that matter."""

from __future__ import annotations

import os
import platform
from typing import Any

from tanzaku.errors import TanzakuError
from tanzaku.support.versions import VERSION, versions_of

_LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "scikit-learn", "peft")


def quieten() -> None:
    """Keep other libraries' notices and bars off the terminal: a run says what matters itself."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def device_named(name: str) -> str:
    """`auto` is CUDA, else Apple's MPS, else the CPU; a device that is not there is an error."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    if not there[name]:
        has = ", ".join(device for device, found in there.items() if found)
        raise TanzakuError(f"device {name!r} is not there; this machine and this build of torch have {has}")
    return name


def machine(device: str) -> dict[str, Any]:
    """What a reader of the figures needs to know, and nothing that names the machine."""
    import psutil  # type: ignore[import-untyped]

    about = {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device == "cuda":
        import torch

        about["gpu"] = torch.cuda.get_device_name()
    return about


def versions() -> dict[str, str]:
    """Versions of Python, of Tanzaku and of the libraries that are installed."""
    return {"python": platform.python_version(), "tanzaku": VERSION, **versions_of(_LIBRARIES)}
