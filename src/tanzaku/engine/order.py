"""In which order a model's modules first run: how deep each lies, as gradients see it.

What ran before an adapter's module cannot depend on the adapter, so its input needs no gradient for it. That is seen on
the model's first pass with gradients, and not read off the numbers in paths: a model may have two towers that count
their layers alike, and may run one layer several times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.method import TokenLayer
from tanzaku.models import tree
from tanzaku.models.families import Base

ABOVE = 10**9  # more modules than any model has


class Order:
    """Of one model. Until its first pass was seen, everything needs every gradient."""

    def __init__(self, base: Base):
        self.base = base
        self._first: dict[int, int] = {}  # id of a module -> how many began before it
        self._again: set[int] = set()  # those that ran several times
        self._lowest: WeakKeyDictionary[Adapter, int] = WeakKeyDictionary()

    def depth(self, module: nn.Module) -> int:
        """How many modules begin before this one; ABOVE where that is not known, or where it runs several times: then
        anything may lie before it."""
        return ABOVE if id(module) in self._again else self._first.get(id(module), ABOVE)

    def lowest(self, adapter: Adapter | None) -> int:
        """The depth of the first module at which an adapter trains something, and a module before it needs no
        gradient: -1 where that may be any, ABOVE where nothing is trained."""
        if adapter is None:
            return ABOVE
        if not self._first:
            return -1
        if adapter not in self._lowest:
            trained = [(path, layer) for path, layer in adapter.at() if layer.trained]
            self._lowest[adapter] = min((self._at(path, layer) for path, layer in trained), default=ABOVE)
        return self._lowest[adapter]

    def _at(self, path: str, layer: nn.Module) -> int:
        if isinstance(layer, TokenLayer):
            return -1  # its tokens enter before all layers, wherever it is attached
        return self._first.get(id(self.base.model.get_submodule(path)), -1)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the block the model's first pass that has gradients is watched, unless one was already."""
        if self._first or not torch.is_grad_enabled():
            yield
            return
        first: dict[int, int] = {}
        again: set[int] = set()

        def begins(module: nn.Module, args: Any) -> None:
            if id(module) in first:
                again.add(id(module))
            first.setdefault(id(module), len(first))

        def ends(module: nn.Module, args: Any, output: Any) -> None:
            # Checkpointed layers run again later, in the backward pass.
            self._first, self._again = first, again
            stop()

        def stop() -> None:
            for handle in handles:
                handle.remove()

        handles = [module.register_forward_pre_hook(begins) for module in tree.modules(self.base.model)]
        handles.append(self.base.model.register_forward_hook(ends))
        try:
            yield
        finally:
            stop()
