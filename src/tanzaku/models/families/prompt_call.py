"""Keys and values that an attention layer's own code makes of a prompt: any projections, norms and latent spaces."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tanzaku.support.context import Local


class _Like(NamedTuple):
    """A tensor of positions that turns nothing: `shape` has None for the number of tokens."""

    shape: tuple[int | None, ...]
    fill: int
    kind: str

    def of(self, prompt: Tensor) -> Tensor:
        dtype = {"float": prompt.dtype, "complex": torch.complex64, "int": torch.long}[self.kind]
        shape = [prompt.shape[1] if n is None else n for n in self.shape]
        return torch.full(shape, self.fill, dtype=dtype, device=prompt.device)


@dataclass
class PromptCall:
    """Arguments of an attention layer's forward() for a prompt, (1, n, width), that has no position and sees itself."""

    name: str
    width: int
    given: dict[str, Any]

    def arguments(self, prompt: Tensor) -> dict[str, Any]:
        def filled(value: Any) -> Any:
            if isinstance(value, _Like):
                return value.of(prompt)
            if isinstance(value, MutableMapping):  # that layers leave things in for each other
                return {}
            return tuple(map(filled, value)) if type(value) is tuple else value

        return {self.name: prompt} | {name: filled(value) for name, value in self.given.items()}

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int) -> PromptCall | None:
        """From a call of `module`; None where it reads something that a prompt has no counterpart of."""
        takes = list(inspect.signature(type(module).forward).parameters)[1:]
        name, width = "", 0
        given: dict[str, Any] = {}
        for key, value in {**dict(zip(takes, args, strict=False)), **kwargs}.items():
            if not name and isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
                name, width = key, value.shape[-1]
            elif "mask" in key or "bias" in key or value is None:
                given[key] = None
            elif isinstance(value, bool | int | float | str | MutableMapping):
                given[key] = {} if isinstance(value, MutableMapping) else value
            elif isinstance(value, Tensor | tuple) and any(word in key for word in ("position", "rotary", "freq")):
                given[key] = _unturned(value)
            elif isinstance(value, Tensor):
                return None
        return cls(name, width, {key: value for key, value in given.items() if key in takes}) if name else None


def _unturned(value: Any) -> Any:
    if isinstance(value, tuple):  # a rotation's cosine and sine
        return tuple(_unturned(each)._replace(fill=1 - at) for at, each in enumerate(value))
    if not value.is_floating_point() and not value.is_complex():
        return _Like((*value.shape[:-1], None), 0, "int")
    return _Like((*value.shape[:-2], None, value.shape[-1]), 1, "complex" if value.is_complex() else "float")


class _Caught(Exception):
    def __init__(self, key: Tensor, value: Tensor):
        super().__init__("keys and values were asked for by tanzaku.models.families.prompt_call.keys_values")
        self.found = key, value


_catching: Local[bool] = Local("_catching")


def catch(key: Tensor, value: Tensor) -> None:
    """To be called by an attention function: ends the layer's pass where its keys and values alone are asked for."""
    if _catching.get():
        raise _Caught(key, value)


def keys_values(module: nn.Module, how: PromptCall, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each (1, kv_heads, n, dim), that `module` computes of a prompt, (1, n, width).

    Its attention must go through a function that calls :func:`catch`.
    """
    try:
        with _catching.within(True):
            module(**how.arguments(prompt))
    except _Caught as caught:
        return caught.found
    raise RuntimeError(f"{type(module).__name__} did not come to its attention function")
