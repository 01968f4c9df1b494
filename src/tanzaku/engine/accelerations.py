"""Passes through a frozen model at less cost, in training and prediction alike: all that makes them cheap, together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from torch import Tensor

from tanzaku.core.routing import Route
from tanzaku.engine.gates import FrozenGates
from tanzaku.engine.norms import FrozenNorms
from tanzaku.engine.packing import Packing
from tanzaku.engine.products import FrozenProducts, Tokens
from tanzaku.engine.trim import PooledOnly, pooled_columns
from tanzaku.models.families import Base


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


class Accelerations:
    """Of one model. A context manager: while entered, the model's frozen modules are fast."""

    def __init__(self, base: Base):
        self.pooled, self.packing = PooledOnly(base), Packing(base)
        self.products, self.norms, self.gates = FrozenProducts(base), FrozenNorms(base), FrozenGates(base)
        self._entered = ExitStack()

    def __enter__(self) -> Accelerations:
        for part in (self.packing, self.products, self.norms, self.gates):
            self._entered.enter_context(part)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    @contextmanager
    def reading(
        self,
        batch: Batch,
        virtual: Sequence[int],
        lowest: Sequence[int],
        route: Route | None,
    ) -> Iterator[None]:
        """Within the block, which holds the backward pass too, the model's passes are for the logits of the batch.

        Args:
            virtual: tokens that each row's adapter puts before its own. lowest: the layer of its lowest adapter.
            route: the batch's own, by which it is packed where this model can have that; None: it shall not be.
        """
        lead, tokens_in = max(virtual), next(iter(batch.inputs.values()))
        if not self.packing.possible:
            route = None
        read = None
        if route is not None and self.pooled.pad is not None:
            columns = pooled_columns(tokens_in, self.pooled.pad).tolist()
            read = [before + column for before, column in zip(virtual, columns, strict=True)]
        tokens = Tokens(
            width=lead + batch.width,
            starts=[0] * len(virtual),
            lengths=[before + length for before, length in zip(virtual, batch.lengths, strict=True)],
            lowest=lowest,
            device=tokens_in.device,
            packed=route is not None,
            read=read,
        )
        short = self.pooled.reading(tokens_in, virtual) if route is None else self.packing.reading(tokens, route)
        with short, self.products.reading(tokens):
            yield
