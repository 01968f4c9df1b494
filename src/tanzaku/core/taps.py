"""Taps: what one module reads, for a layer of the same adapter that stands at a later one.

A parallel adapter reads the residual stream where a sublayer takes it, and adds to it where the sublayer gives it back.
A tap stands at the first place and keeps what the rows of its stack have there until the layer at the second takes it,
in the same pass.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from tanzaku.core.method import ModuleLayer
from tanzaku.core.routing import running_route
from tanzaku.errors import TanzakuError
from tanzaku.support.context import Local


class _Note(NamedTuple):
    by: Tap
    number: int  # of the stack whose rows they are: an adapter may be in several
    at: nn.Module
    value: Tensor
    times: int = 1  # that a stack has the adapter


# Of this thread and task, like the route. What is noted at one module is taken before another one notes: so what nobody
# took, as where a checkpointed layer runs again only as far as it must, goes with the next.
_notes: Local[tuple[_Note, ...]] = Local("tanzaku_notes")


def mark() -> tuple[_Note, ...] | None:
    """What is noted now: what runs again shall find it again."""
    return _notes.get()


def rewind(noted: tuple[_Note, ...] | None) -> None:
    """Go back to what :func:`mark` gave."""
    _notes.set(noted)


class Tap(ModuleLayer):
    """Notes what its module reads, and returns it as it is. It has no parameters."""

    edits_input = True
    edits_output = False

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        number = running_route()[1]
        notes = [n for n in _notes.get() or () if n.at is module]
        again = sum(n.times for n in notes if n.by is self and n.number == number and n.value is x)
        kept = [n for n in notes if not (n.by is self and n.number == number)]
        _notes.set((*kept, _Note(self, number, module, x, again + 1)))
        return x

    def take(self) -> Tensor:
        """What the rows that run now had there, once."""
        number = running_route()[1]
        notes = _notes.get() or ()
        found = next((note for note in notes if note.by is self and note.number == number), None)
        if found is None:
            raise TanzakuError(
                "an adapter adds to what it read before, and read nothing in this pass: the module where it reads "
                "did not run before"
            )
        left = [found._replace(times=found.times - 1)] if found.times > 1 else []
        _notes.set((*(note for note in notes if note is not found), *left) or None)
        return found.value
