"""Averages of adapters: what each of several frozen adapters would add, by weights.

    y' = y + sum_k w_k d_k,  d_k what adapter k adds to y

Unlike an average of weights (`tz.combine`), it is of adapters of any kinds and ranks. That weights may be learnt from
few rows is Huang et al. 2023, LoraHub, arXiv 2307.13269; averages of outputs, Wang et al. 2022, arXiv 2205.12410.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tanzaku.core.method import About, trainable
from tanzaku.core.space import Range, spaces
from tanzaku.methods.composed import Composed, ComposedLayer, Layers, Site


class AverageLayer(ComposedLayer):
    """The parts' weights at one site."""

    def __init__(self, site: Site, parts: Sequence[Layers], weights: Sequence[float], like: Tensor, learned: bool):
        super().__init__(site, parts)
        self.of = "average" if site.does == "outputs" else "average_inputs"
        own = trainable(len(weights), like=like, fill=lambda w: w.copy_(torch.tensor(weights)))
        own.requires_grad_(learned)
        self.register_parameter(self.of, own)

    def made(self, read: Tensor, changes: Tensor) -> Tensor:
        return torch.einsum("p,...ps->...s", getattr(self, self.of), changes)


@dataclass
class Average(Composed):
    """A weighted average of what attached adapters do, which stay frozen.

    Args:
        weights: of each adapter, in their order, as shares of their sum; None: equal ones.
        learned: they are where training begins, for each module by itself. Where nothing is learned, a classifier's
            head is, unless modules_to_save is empty.
    """

    name = "average"
    peft_type = "ADAPTER_AVERAGE"
    paper = "arXiv 2307.13269"
    summary = "a weighted average of what several trained adapters would add"
    about = About(
        where="the modules that its adapters change, which all change the same ones",
        parameters="modules * adapters",
        cost="every adapter's own",
        choose="with a few dozen rows of a task that is like those that the adapters were trained for",
        limits="cannot be merged; needs all its adapters, which its files bring along",
    )
    learning_rate = 1e-2  # a few numbers, of which a step has to move each visibly
    space = spaces(learning_rate=Range(1e-3, 1e-1, log=True))  # a decade each way

    weights: list[float] | None = None
    learned: bool = True

    def layer(self, site: Site, parts: Sequence[Layers], size: int, like: Tensor) -> ComposedLayer:
        given = [1.0] * len(parts) if self.weights is None else self.weights
        self.require(len(given) == len(parts), f"weights={given}", f"{len(parts)}, one for each of {self.adapters}")
        total = sum(given)
        self.require(abs(total) > 1e-6, f"weights={given}", "weights whose sum is not zero")
        return AverageLayer(site, parts, [weight / total for weight in given], like, self.learned)
