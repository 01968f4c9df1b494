"""How several adapters of one method become one, as methods and their layers are told it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Combining:
    """What was asked for.

    Attributes:
        how: by HF PEFT's names; see :func:`tanzaku.combine`.
        rule: of tensors of one shape and their weights, the one that takes their place.
        svd: of a matrix (out, in) and a rank, A (rank, in) and B (out, rank), whose product is its best approximation;
            None where `how` decomposes nothing.
        rank: of the result, if somebody asked for one.
        names: of paths, what `target_modules` would say of exactly these.
    """

    how: str
    rule: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    svd: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None
    rank: int | None
    names: Callable[[Sequence[str]], list[str]]
