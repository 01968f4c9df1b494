"""Layers of an adapter that is read by another, and not trained by it, though rows beside these may train it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tanzaku.support.context import Local

M = TypeVar("M", bound=nn.Module)

_frozen: Local[bool] = Local("tanzaku_frozen")


def frozen(layer: M) -> M:
    """A layer that computes with the very numbers of this one, and through which gradients reach what it reads alone.

    Where nothing of it is being trained, it is the layer itself.
    """
    return layer if not any(p.requires_grad for p in layer.parameters()) else _twin(layer)


def _twin(module: M) -> M:
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {n: None if p is None else p.detach() for n, p in module._parameters.items()}
    twin.__dict__["_modules"] = {n: None if m is None else _twin(m) for n, m in module._modules.items()}
    return twin


def untrained() -> AbstractContextManager[None]:
    """A block in which what layers share with others of their adapter is read as if it was no one's to train."""
    return _frozen.within(True)


def as_read(value: Any) -> Any:
    """What layers share, as the layer that runs may read it."""
    if not _frozen.get():
        return value
    return tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, value)
