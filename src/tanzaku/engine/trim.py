"""Skip what a decoder's classifier never reads: the last layer's work on all tokens but the one that is pooled.

A decoder classifier takes its logits at one position a row, the last token that is no padding. In the last layer only
keys and values of the other positions matter. Behind its attention, hidden states of the pooled position alone are
passed through the output projection and the feed-forward; their sum with the residual is right at that position, and
the other positions, which nobody reads, get numbers without meaning. Loss and gradients are those of the whole layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification

from tanzaku.core.routing import Route
from tanzaku.engine.acceleration import Common, OfProducts
from tanzaku.engine.layout import Layout
from tanzaku.models.families import Base


def last_layer_modules(base: Base, asking: bool = False) -> list[nn.Module]:
    """The output projection and feed-forward of the last layer, where the model is known to pool one token.

    Args:
        asking: and its queries' projection.
    """
    family = base.family
    if family is None or family.trim is None or not isinstance(base.model, GenericForSequenceClassification):
        return []
    layers = getattr(base.backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    query = [f"{family.attention}.{family.query}"] if asking and family.query != family.key else []
    return [layers[-1].get_submodule(path) for path in (*query, *family.trim)]


def pooled_columns(base: Base, input_ids: Tensor) -> list[int] | None:
    """Of each row, where its last token is that is no padding, which a decoder's classifier pools; None: no such model.

    A row's own last tokens may be the padding token, where that is also the end of a text.

    Args:
        input_ids: (rows, tokens).
    """
    pad = getattr(base.config, "pad_token_id", None)
    if pad is None or not last_layer_modules(base):
        return None
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return cast(list[int], (columns * (input_ids != pad)).argmax(-1).tolist())


class LastToken(OfProducts):
    """Of the last layer, what lies behind its attention for the pooled token alone. In a packed batch it alone has a
    query, too: products leave out the other tokens. In a padded one they are taken out of what the modules read."""

    name = "last_token"
    summary = "a decoder classifier's last layer passes on the token alone that is pooled"

    def __init__(self, common: Common):
        super().__init__(common)
        self.modules = last_layer_modules(self.base)
        asking = last_layer_modules(self.base, asking=True)
        self.pooled = {id(module) for part in asking for module in part.modules()}
        self._at: Tensor | None = None
        self._shape = (0, 0)

    @property
    def possible(self) -> bool:
        return bool(self.modules)

    def __enter__(self) -> Self:
        self.common.products.pooled = self.pooled
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.common.products.pooled = set()

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if self._at is None or x.dim() != 3 or x.shape[:2] != self._shape or x.shape[1] == 1:
            return None  # one token is nothing to trim; and of another shape they were trimmed before
        return (x[torch.arange(x.shape[0], device=x.device), self._at].unsqueeze(1), *args[1:])

    @contextmanager
    def batch(self, layout: Layout, route: Route | None) -> Iterator[None]:
        """See :meth:`Acceleration.batch`."""
        if layout.packed or layout.read is None or not self.modules:
            with super().batch(layout, route):
                yield
            return
        self._at, self._shape = torch.tensor(layout.read, device=layout.device), layout.shape
        handles = [module.register_forward_pre_hook(self._keep) for module in self.modules]
        try:
            with super().batch(layout, route):
                yield
        finally:
            self._at = None
            for handle in handles:
                handle.remove()
