"""Checkpointed layers, which run again in the backward pass and keep the route of their first run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any

import torch

from tanzaku.core import dropout
from tanzaku.core.in_force import InForce
from tanzaku.core.sites import Sites
from tanzaku.errors import TanzakuError


class KeptRoute:
    """A layer's checkpointing function. The layer runs again in the backward pass, maybe in another thread, and the
    route may be another then: it keeps its own."""

    def __init__(self, sites: Sites, checkpoint: Callable[..., Any]):
        self.sites, self.checkpoint = sites, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        force = self.sites.in_force()
        function = dropout.replayed(function)
        return self.checkpoint(function if force is None else _Replay(self.sites, force, function), *args, **kwargs)


class _Replay:
    def __init__(self, sites: Sites, force: InForce, function: Callable[..., Any]):
        self.sites, self.force, self.function = sites, force, function
        self.context = copy_context()  # with what adapter layers have written for this pass
        self.bare = False  # whether it ran first without a graph, as reentrant checkpointing has it
        ends = (next((s for _, s in reversed(stack) if s.trained), None) for stack in force.stacks)
        self.training = [p for layer in ends if layer is not None for p in [*layer.parameters()][:1] if p.requires_grad]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.context.run(self._run, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not all(p.requires_grad for p in self.training):
            raise TanzakuError(
                "a backward pass reaches a layer whose adapter is not active any more; activate it again before it"
            )
        if self.bare and torch.is_grad_enabled():
            # Each layer's backward pass frees all that it goes through: what layers share is computed for each anew.
            for shared in self.force.shared:
                if any(p.requires_grad for p in shared.parameters()):
                    shared.refresh()
        self.bare = not torch.is_grad_enabled()
        before, whole = self.sites.here(), self.force.whole
        self.sites.put((self.force,))
        try:
            with nullcontext() if whole is None else self.sites.weights[""].within(whole):
                return self.function(*args, **kwargs)
        finally:
            self.sites.put(before)
