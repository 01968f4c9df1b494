"""Passes through a frozen model at less cost, in training and prediction alike: all that makes them cheap, together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor

from tanzaku.core.adapter import Adapter
from tanzaku.core.routing import Route
from tanzaku.engine.acceleration import Acceleration, Common
from tanzaku.engine.attention import RowAttention
from tanzaku.engine.gates import FrozenGates
from tanzaku.engine.layout import Layout
from tanzaku.engine.names import AUTO, chosen
from tanzaku.engine.norms import FrozenNorms
from tanzaku.engine.onednn import OneDNN, PrepackedWeights
from tanzaku.engine.packing import Packing
from tanzaku.engine.skipping import SkipUnneeded
from tanzaku.engine.trim import LastToken, pooled_columns
from tanzaku.models.families import Base

# All there are, in the order of `names.NAMES`; a new one stands in both, and the law of accelerations then tests it.
ACCELERATIONS: dict[str, type[Acceleration]] = {
    kind.name: kind
    for kind in (
        Packing,
        RowAttention,
        LastToken,
        SkipUnneeded,
        OneDNN,
        PrepackedWeights,
        FrozenNorms,
        FrozenGates,
    )
}


class Batch(Protocol):
    """Rows for one pass, as a task collates them: see :class:`tanzaku.tasks.task.Batch`."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """By `forward`'s names, [B, T]."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Own tokens of each row."""
        ...

    @property
    def width(self) -> int:
        """T."""
        ...

    @property
    def decoder_lengths(self) -> list[int]:
        """Tokens of each row that an encoder-decoder's decoder reads; 0: it reads none of its own."""
        ...

    @property
    def decoder_width(self) -> int:
        """As many as the longest has, or more."""
        ...


class Accelerations:
    """Of one model. A context manager: while entered, the model's frozen modules are fast.

    Args:
        wanted: which; see :func:`tanzaku.engine.names.chosen`, which tells of names that are not known.
    """

    def __init__(self, base: Base, wanted: str = AUTO):
        self.base, self.common = base, Common(base)
        self.members = {name: ACCELERATIONS[name](self.common) for name in chosen(wanted)}
        self._entered = ExitStack()

    def __enter__(self) -> Accelerations:
        for member in self.members.values():
            self._entered.enter_context(member)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    @property
    def packs(self) -> bool:
        """Whether batches are packed where a route is given."""
        return Packing.name in self.members and self.members[Packing.name].possible

    def depth(self, adapter: Adapter) -> int:
        """How deep its lowest trained layer lies: see :meth:`tanzaku.engine.order.Order.lowest`."""
        return self.common.order.lowest(adapter)

    def take(self, room: float) -> int:
        """Take memory that makes passes faster, if there is plenty; bytes taken of `room`."""
        taken = 0
        for member in self.members.values():
            taken += member.take(room - taken)
        return taken

    def free(self) -> int:
        """Give it back; bytes freed."""
        return sum(member.free() for member in self.members.values())

    @contextmanager
    def batch(self, batch: Batch, adapters: Sequence[Adapter | None], route: Route | None) -> Iterator[None]:
        """Within the block, which holds the backward pass too, the model's passes are for the logits of the batch.

        Args:
            adapters: of each row; None: it is bare.
            route: the batch's own, by which it is packed where this model can have that; None: it shall not be.
        """
        inputs = next(iter(batch.inputs.values()))
        virtual = [0 if adapter is None else adapter.virtual for adapter in adapters]
        # Where a layer reads more of a row than one token, nothing of any row is left out.
        each = {id(adapter): adapter for adapter in adapters if adapter is not None}.values()
        whole = any(adapter.whole_rows for adapter in each)
        packed = route is not None and self.packs and not whole
        trims = packed or not any(adapter.untrimmed for adapter in each)
        columns = pooled_columns(self.base, inputs) if trims and not whole else None
        width = max(virtual) + batch.width
        own = [before + length for before, length in zip(virtual, batch.lengths, strict=True)]
        lowest = [self.common.order.lowest(adapter) for adapter in adapters]
        # Where an encoder and a decoder read as many tokens, nothing tells which a module has: none is left out.
        whole = whole or batch.decoder_width == width
        starts = [0] * len(virtual)

        def laid(width: int, lengths: list[int], **more: Any) -> Layout:
            return Layout(width, starts, [width] * len(starts) if whole else lengths, lowest, inputs.device, **more)

        layout = laid(
            width,
            own,
            packed=packed,
            read=None if columns is None else [v + column for v, column in zip(virtual, columns, strict=True)],
            decoder=laid(batch.decoder_width, batch.decoder_lengths) if batch.decoder_width else None,
        )
        with ExitStack() as stack:
            stack.enter_context(self.common.order.recorded())
            for member in self.members.values():
                stack.enter_context(member.batch(layout, route if packed else None))
            yield
