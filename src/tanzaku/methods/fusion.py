"""AdapterFusion: attention over what several frozen adapters would add, by what they look at.

    y' = y + V sum_k p_k d_k,  p = softmax over k of (Q x) . (K d_k),  V = identity at first

d_k is what adapter k adds to y, and x what the adapters look at: what bottlenecks read, and else y itself. Pfeiffer et
al. 2021, arXiv 2005.00247.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.method import About, Attached, trainable
from tanzaku.core.space import Range, spaces
from tanzaku.methods.composed import Composed, ComposedLayer, Layers, Site
from tanzaku.methods.parts import Projection


class Attention(nn.Module):
    """Attention of each token over the parts. Keys have no bias: it would add the same to all scores of a token."""

    def __init__(self, size: int, like: Tensor, value: bool):
        super().__init__()
        self.query = Projection(size, size, like)
        self.key = nn.ParameterDict({"weight": trainable(size, size, like=like)})
        self.value = nn.ParameterDict({"weight": trainable(size, size, like=like, fill=nn.init.eye_)} if value else {})
        if like.device.type != "meta":
            for weight in (self.query.weight, self.key["weight"]):
                nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        """(..., size), of x (..., size) and d (..., parts, size)."""
        # (Q x) . (K d) as ((Q x) K) . d: one product for all parts.
        asked = self.query(x) @ self.key["weight"]
        scores = torch.einsum("...s,...ps->...p", asked, d)
        mixed = torch.einsum("...p,...ps->...s", scores.softmax(-1), d)
        return F.linear(mixed, self.value["weight"]) if self.value else mixed


class FusionLayer(ComposedLayer):
    """Attention at one site."""

    def __init__(self, site: Site, parts: Sequence[Layers], size: int, like: Tensor, value: bool):
        super().__init__(site, parts)
        # A module may have both kinds of sites, and each has its tensors below the module's path.
        self.of = "fusion" if site.does == "outputs" else "fusion_inputs"
        self.add_module(self.of, Attention(size, like, value))

    @property
    def attention(self) -> Attention:
        """Its network."""
        found = getattr(self, self.of)
        assert isinstance(found, Attention)
        return found

    def made(self, read: Tensor, changes: Tensor) -> Tensor:
        return self.attention(read, changes)  # type: ignore[no-any-return]


@dataclass
class AdapterFusion(Composed):
    """AdapterFusion over attached adapters, which stay frozen; a classifier's head is trained along.

    Args:
        value: V is trained; without it, what is mixed is added as it is.
        regularization: a factor of the sum of (V - identity)^2, which is added to the loss.
    """

    name = "fusion"
    peft_type = "ADAPTER_FUSION"
    paper = "arXiv 2005.00247"
    summary = "attention over what several trained adapters would add"
    about = About(
        where="the modules that its adapters change, which all change the same ones",
        parameters="modules * (3 * width^2 + width)",
        cost="every adapter's own, and three products of the width's square a module",
        choose="to use what was learnt for several tasks or on several data sets in another one with fewer rows",
        limits="is not linear, so it cannot be merged; needs all its adapters, which its files bring along",
    )
    learning_rate = 5e-5  # the paper's
    space = spaces(learning_rate=Range(1e-5, 1e-3, log=True))  # from a fifth of the paper's to twenty times it

    value: bool = True
    regularization: float = 0.01

    def layer(self, site: Site, parts: Sequence[Layers], size: int, like: Tensor) -> ComposedLayer:
        return FusionLayer(site, parts, size, like, self.value)

    def penalty(self, adapter: Attached) -> Tensor | None:
        if not self.value or not self.regularization:
            return None
        values = [each.attention.value["weight"] for _, each in adapter.at() if isinstance(each, FusionLayer)]
        apart = [(v - torch.eye(len(v), device=v.device, dtype=v.dtype)).square().sum() for v in values]
        return self.regularization * torch.stack([each.to(apart[0].device) for each in apart]).sum()
