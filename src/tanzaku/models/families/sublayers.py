"""Sublayers: attention and feed-forward, and the residual stream that they read and add to.

    layer norm first     r' = r + f(norm(r))     "pre-LN": LLaMA, GPT-2, T5, ViT
    layer norm last      r' = norm(r + f(r))     "post-LN": BERT, BART

Which of them it is, and where r and the sum can be met, is read off one traced pass: modules that have to do with one
tensor have to do with one node of autograd's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tanzaku.models.families.trace import Passed, Trace

Kind = Literal["attention", "cross", "feed_forward"]


class Ends(NamedTuple):
    """The first and the last layer with weights of a sublayer, by their paths."""

    kind: Kind
    first: str
    last: str


@dataclass(frozen=True)
class Sublayer:
    """One sublayer, and the modules at which the residual stream around it can be met. r is the stream that it reads.

    Args:
        kind: what it does. number: of its layer, in order of first execution, from 0.
        out: the module that returns what is added to r, but for dropout and scaling.
        residual: a module that reads r; None where no one does, or what is added to is more than r.
        norm: in post-LN models, the norm that reads the sum. None: the model is pre-LN.
        end: in pre-LN models, a module that returns the sum; None where only the code of the layer has it.
    """

    kind: Kind
    number: int
    out: str
    residual: str | None = None
    norm: str | None = None
    end: str | None = None

    @property
    def known(self) -> bool:
        """Whether it was seen what becomes of its result."""
        return self.residual is not None or self.end is not None


def sublayers_of(trace: Trace, ends: Sequence[Ends], block_of: Callable[[str], str]) -> list[Sublayer]:
    """The sublayers between these ends, in order of first execution."""
    passed = {each.path: each for each in trace.passed}
    order = {call.path: number for number, call in enumerate(trace.calls)}
    ends = sorted(
        (each for each in ends if {each.first, each.last} <= passed.keys()), key=lambda each: order[each.last]
    )
    places = {each.path: at for at, each in enumerate(trace.passed)}
    lasts = [places[each.last] for each in ends]
    numbers: dict[str, int] = {}
    found = []
    for at, each in enumerate(ends):
        number = numbers.setdefault(block_of(each.last), len(numbers))
        # What has to do with the sum runs before the next sublayer is over, or, side by side with that, the one after.
        behind = trace.passed[lasts[at] : lasts[at + 2] if at + 2 < len(lasts) else None]
        before = trace.passed[: places[each.first] + 1]
        found.append(_found(each, number, before, behind, passed[each.last]))
    return found


def _found(ends: Ends, number: int, before: Sequence[Passed], behind: Sequence[Passed], last: Passed) -> Sublayer:
    """A sublayer, by the modules up to its first layer and those from its last one on."""
    first = before[-1]
    norm_first = next((each for each in reversed(before) if _is_norm(each) and each.returned is first.read), None)
    # The sublayer reads r itself, or a norm does first.
    readers = [each for each in (first, norm_first) if each is not None and each.read is not None]
    stops = (last.returned, *(each.read for each in readers))
    for reader in readers:
        returning = {each.path: _added(each.returned, last.returned, reader.read, stops) for each in behind}
        reading = {each.path: _added(each.read, last.returned, reader.read, stops) for each in behind}
        end = next((path for path, beside in returning.items() if beside == []), None)
        if end is None:
            norm = next((each for each in behind if _is_norm(each) and reading[each.path] == []), None)
            # In a post-LN model the sum goes on through the norm alone.
            if norm is not None and reader is first and not any(_goes_on(each.returned, norm.read) for each in behind):
                return Sublayer(ends.kind, number, ends.last, residual=reader.path, norm=norm.path)
        if end is not None or [] in reading.values():
            return Sublayer(ends.kind, number, ends.last, residual=reader.path, end=end)
        # Attention and feed-forward side by side add to one r: the sum is that of both.
        both = next((path for path, beside in returning.items() if beside), None)
        if both is not None and ends.kind == "feed_forward":
            return Sublayer(ends.kind, number, ends.last, end=both)
        if both is not None:
            return Sublayer(ends.kind, number, ends.last, residual=reader.path)
    return Sublayer(ends.kind, number, ends.last)


def _is_norm(each: Passed) -> bool:
    return "norm" in type(each.module).__name__.lower()


def _added(node: Any, last: Any, stream: Any, stops: Sequence[Any]) -> list[Any] | None:
    """What a sum has beside what a sublayer returned and the stream that it is added to; None: it is no sum of both."""
    terms = list(_terms(node, stops))
    own = [term for term in terms if term is not stream and _comes_of(term, last)]
    if len(own) != 1 or sum(term is stream for term in terms) != 1:
        return None
    return [term for term in terms if term is not stream and term is not own[0]]


def _goes_on(node: Any, stream: Any) -> bool:
    """Whether something is a sum of the stream and more."""
    terms = list(_terms(node, (stream,)))
    return len(terms) > 1 and any(term is stream for term in terms)


# Operations that hand on the numbers that they are given.
_SAME = ("View", "Reshape", "Clone", "ToCopy", "Alias", "Squeeze", "Transpose", "Permute", "Contiguous")


def _terms(node: Any, stops: Sequence[Any]) -> Iterator[Any]:
    """The terms of a sum."""
    queue = [node]
    while queue:
        each = queue.pop()
        if each is None:
            continue
        before = [] if any(each is stop for stop in stops) else [more for more, _ in each.next_functions]
        same = len(before) == 1 and any(word in each.name() for word in _SAME)
        if same or (before and each.name().startswith("AddBackward")):
            queue += before
        else:
            yield each


def _comes_of(node: Any, last: Any) -> bool:
    """Whether something is made of one layer's result alone, as by dropout, scaling or a norm."""
    queue, seen, met = [node], set(), False
    while queue:
        each = queue.pop()
        if each is last:
            met = True
            continue
        if each in seen:
            continue
        seen.add(each)
        before = [more for more, _ in each.next_functions if more is not None]
        if not before:  # another result
            return False
        queue += before
    return met
