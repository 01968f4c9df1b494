"""Invertible adapters, a part of MAD-X: an additive coupling of what enters the first layer, undone before the output
embeddings, so that a language's tokens are moved on the way in and back on the way out.

    y1 = x1 + F(x2),  y2 = x2 + G(y1)        x2 = y2 - G(y1),  x1 = y1 - F(x2)

Pfeiffer et al. 2020, arXiv 2005.00052; the coupling is NICE's, Dinh et al. 2014, arXiv 1410.8516.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tanzaku.core.delta import in_full
from tanzaku.core.method import ModuleLayer
from tanzaku.methods.parts import Projection, activation
from tanzaku.support.refs import Ref


class Coupling(ModuleLayer):
    """At the first layer of a model, whose input of `size` numbers a token it changes."""

    hub = "invertible_adapters"
    edits_input = True
    edits_output = False

    def __init__(self, size: int, hidden: tuple[int, int], act: str, like: Tensor):
        super().__init__()
        self.cut, rest = size // 2, size - size // 2
        self.act = activation(act)
        self.F = nn.ModuleDict({"0": Projection(rest, hidden[1], like), "2": Projection(hidden[1], self.cut, like)})
        self.G = nn.ModuleDict({"0": Projection(self.cut, hidden[0], like), "2": Projection(hidden[0], rest, like)})
        for net in (self.F, self.G):
            weight = net["0"].weight
            if isinstance(weight, Tensor) and weight.device.type != "meta":
                nn.init.normal_(weight, std=0.02)  # and the last matrix stays zero, which changes nothing

    def _net(self, net: nn.ModuleDict, x: Tensor) -> Tensor:
        out = net["2"](self.act(net["0"](x)))
        assert isinstance(out, Tensor)
        return out

    @property
    def like(self) -> Tensor:
        """A tensor of the type that it computes in."""
        return next(self.parameters())

    def there(self, x: Tensor) -> Tensor:
        """y of x."""
        one, two = x.to(self.like.dtype).tensor_split([self.cut], dim=-1)
        one = one + self._net(self.F, two)
        return torch.cat([one, two + self._net(self.G, one)], dim=-1)

    def back(self, y: Tensor) -> Tensor:
        """x of y."""
        one, two = y.to(self.like.dtype).tensor_split([self.cut], dim=-1)
        two = two - self._net(self.G, one)
        return torch.cat([one - self._net(self.F, two), two], dim=-1)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return in_full(lambda x, _: self.there(x), self.like, x, x).to(x.dtype)


class Inverse(ModuleLayer):
    """At the output embeddings: what they read, with a coupling undone. It has no parameters of its own."""

    edits_input = True
    edits_output = False
    undoes = True

    def __init__(self, of: Coupling):
        super().__init__()
        self.of = Ref(of)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        of = self.of()
        assert of is not None
        return in_full(lambda x, _: of.back(x), of.like, x, x).to(x.dtype)
