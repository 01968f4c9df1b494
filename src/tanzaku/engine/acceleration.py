"""The contract of an acceleration: something that makes a pass cheap, and changes nothing but rounding.

It is made once for a model, entered while a scheduler or a prediction has the model, and told of each batch before its
forward pass. Each can be switched off by itself (`names.py`), and one law holds for all that are registered
(`accelerations.py`): logits and gradients are those without it, and the model is left as it was.
"""

from __future__ import annotations

from abc import ABC
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Self

from tanzaku.core.routing import Route
from tanzaku.engine.layout import Layout
from tanzaku.engine.order import Order
from tanzaku.engine.products import Products
from tanzaku.models.families import Base


class Common:
    """What the accelerations of one model share: its order of execution, the products of its linear layers, and
    whether rows of a packed batch are attended one by one."""

    def __init__(self, base: Base):
        self.base = base
        self.order = Order(base)
        self.products = Products(base, self.order)
        self.attends_rows = False


class Acceleration(ABC):
    """One acceleration of one model. A context manager: while it is entered, the model's passes are cheap.

    Args:
        common: of the model, the same for all of its accelerations.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line

    def __init__(self, common: Common):
        self.common, self.base = common, common.base

    @property
    def possible(self) -> bool:
        """Whether the model, as it is now, is of a kind that it is for; on others it does nothing."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the model as it was."""
        self.free()

    def batch(self, layout: Layout, route: Route | None) -> AbstractContextManager[None]:
        """Around the forward and backward pass of one batch.

        Args:
            route: the batch's own, where it is packed.
        """
        return nullcontext()

    def take(self, room: float) -> int:
        """Take memory if that makes it faster and there is plenty: for jobs that share the model, which then is frozen.

        Args:
            room: bytes that may be taken, if the machine has them.

        Returns:
            Bytes taken.
        """
        return 0

    def free(self) -> int:
        """Give back what was taken; bytes freed."""
        return 0


class OfProducts(Acceleration):
    """One that changes how linear layers multiply: it sets what it wants in `common.products`."""

    def __enter__(self) -> Self:
        self.common.products.hold()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.common.products.release()

    def batch(self, layout: Layout, route: Route | None) -> AbstractContextManager[None]:
        return self.common.products.batch(layout)
