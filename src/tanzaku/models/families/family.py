"""Roles: what the layers of a model do, under names that all families share."""

from __future__ import annotations

from dataclasses import dataclass

# What a layer with weights may be. A fused projection is several at once. `mixer` is what reads the input of a block
# that mixes tokens without attention: a state-space or linear-attention layer's input projections, convolutions.
ROLES = ("query", "key", "value", "out", "gate", "up", "down", "mixer")


@dataclass(frozen=True)
class Family:
    """What is known of one family by its name: last names of its modules by role, and what cannot be seen in a model.

    A family without names has its roles found by structure (see `structure.py`).
    """

    query: str | None = None
    key: str | None = None
    value: str | None = None
    out: str | None = None
    gate: str | None = None
    up: str | None = None
    down: str | None = None
    attention: str | None = None
    # Modules of a layer, in order, behind which only the pooled token matters in the last layer: each adds its result
    # to a residual. None where a layer is built in another way.
    trim: tuple[str, ...] | None = None

    @property
    def named(self) -> bool:
        """Whether the table names the family's layers."""
        return self.query is not None

    def names(self, roles: tuple[str, ...]) -> list[str]:
        """Last names of modules in these roles; what is no role is a name itself."""
        names = [getattr(self, role, None) if role in ROLES else role for role in roles]
        return list(dict.fromkeys(name for name in names if name is not None))
