"""Skip what a decoder's classifier never reads: the last layer's work on all tokens but the one that is pooled.

A decoder classifier takes its logits at one position a row, the last token that is no padding. In the last layer only
keys and values of the other positions matter. Behind its attention, hidden states of the pooled position alone are
passed through the output projection and the feed-forward; their sum with the residual is right at that position, and
the other positions, which nobody reads, get numbers without meaning. Loss and gradients are those of the whole layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification

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


def pooled_columns(input_ids: Tensor, pad: int) -> Tensor:
    """(rows,): where each row's last token is that is no padding, which a decoder's classifier pools.

    A row's own last tokens may be the padding token, where that is also the end of a text.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (columns * (input_ids != pad)).argmax(-1)


class PooledOnly:
    """Hooks for one model; a no-op where its layers are of an unknown kind."""

    def __init__(self, base: Base):
        self.modules = last_layer_modules(base)
        self.pad = getattr(base.config, "pad_token_id", None)
        self._at: Tensor | None = None
        self._length = 0

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if self._at is None or x.dim() != 3 or x.shape[1] in (1, *range(self._length)):
            return None  # one token is nothing to trim; and fewer than there are were trimmed before
        return (x[torch.arange(x.shape[0], device=x.device), self._at].unsqueeze(1), *args[1:])

    @contextmanager
    def reading(self, input_ids: Tensor, virtual: Sequence[int]) -> Iterator[None]:
        """Within the block, the model's forward pass is for the logits of these rows (rows, length) alone, `virtual`
        tokens before each."""
        if not self.modules or self.pad is None:
            yield
            return
        self._at = pooled_columns(input_ids, self.pad) + torch.tensor(virtual, device=input_ids.device)
        self._length = input_ids.shape[1]
        handles = [module.register_forward_pre_hook(self._keep) for module in self.modules]
        try:
            yield
        finally:
            self._at = None
            for handle in handles:
                handle.remove()
