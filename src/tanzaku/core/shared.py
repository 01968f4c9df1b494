"""What several layers of an adapter have in common: owned, trained and saved once, computed once a pass.

A prefix that one network writes for all layers, matrices that all layers share, a hypernetwork: the method yields it
with the path "", and the layers that read it hold a `Ref` to it and ask for its :meth:`Shared.value`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from tanzaku.core.frozen import as_read
from tanzaku.core.method import AdapterLayer
from tanzaku.errors import TanzakuError
from tanzaku.support.refs import Ref


class _Written(NamedTuple):
    by: weakref.ref[Shared]
    versions: tuple[int, ...]
    value: Any


# What was computed for the forward pass that runs in this context. It is no part of the module: another thread has its
# own, copies and files have none of it, and a checkpointed layer that runs again finds that of its own pass.
_written: ContextVar[tuple[_Written, ...]] = ContextVar("written", default=())


class Shared(AdapterLayer):
    """Parameters that several layers of one adapter read.

    Attributes:
        place: what it is called in the adapter's part of the tree.
        file_prefix: what its tensors' names begin with in a file; HF PEFT keeps what layers share beside the model.
    """

    place: ClassVar[str] = "shared"
    file_prefix: ClassVar[str] = "base_model."
    reads_first_pass: ClassVar[bool] = False  # `compute_of` wants what the bare base makes of the text: first_pass.py

    def compute(self) -> Any:
        """What the layers read: tensors, or what holds some."""
        raise TypeError(f"{type(self).__name__} defines no compute()")

    def compute_of(self, given: Mapping[str, Any]) -> Any:
        """As :meth:`compute`, for a pass whose entrance is given this by the names of its `forward`."""
        return self.compute()

    def refresh(self, given: Mapping[str, Any] | None = None) -> None:
        """Compute it for the pass that begins. Called before the first layer, outside of checkpointed ones: there it
        would be part of what is computed twice, and layers would not share its gradient."""
        for like in (given or {}).values():
            if isinstance(like, Tensor):
                self.check_here(like)
        others = tuple(each for each in _written.get() if each.by() not in (None, self))
        value = self.compute() if given is None else self.compute_of(given)
        _written.set((*others, _Written(weakref.ref(self), self._versions(), value)))

    def value(self) -> Any:
        """What was computed for this pass, or, outside of one, what it would be."""
        found = next((each for each in _written.get() if each.by() is self), None)
        if found is None or (found.versions != self._versions() and not torch.compiler.is_compiling()):
            return as_read(self.compute())
        return as_read(found.value)

    def _versions(self) -> tuple[int, ...]:
        # Another pass, another optimizer step: what was written before it is old.
        if torch.compiler.is_compiling():
            return ()
        return (torch.is_grad_enabled(), *(p._version for p in self.parameters() if not p.is_inference()))


class Frozen(Shared):
    """Tensors that all layers read and nobody trains, such as random projections.

    Args:
        saved: whether files hold them. If not, they must come out the same when the method is built again.
    """

    def __init__(self, tensors: dict[str, Tensor], saved: bool):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=saved)

    def compute(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())


S = TypeVar("S", bound=Shared)


def reached(ref: Ref[S]) -> S:
    """What a layer's reference leads to.

    Raises:
        TanzakuError: the layer was copied without it.
    """
    found = ref()
    if found is None:
        raise TanzakuError("this layer was copied without what all layers of its adapter share: copy the whole adapter")
    return found
