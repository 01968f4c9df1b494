"""Leave out of products with frozen weights what nobody reads.

- Padding: rows of unlike length share a batch, and what stands at padded places is never read.
- In the backward pass, below its lowest adapter, a row: nothing there wants a gradient. A row that trains a head alone
  costs no backward pass, whatever its neighbours need.
"""

from __future__ import annotations

from typing import Self

from tanzaku.engine.acceleration import OfProducts


class SkipUnneeded(OfProducts):
    """See above; padding is left out where a batch has some."""

    name = "skip_unneeded"
    summary = "products leave out padding and, in the backward pass, rows that train nothing below"

    @property
    def possible(self) -> bool:
        return bool(self.common.products.layers)

    def __enter__(self) -> Self:
        self.common.products.skips = True
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.common.products.skips = False
