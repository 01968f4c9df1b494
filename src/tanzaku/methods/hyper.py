"""HyperFormer: one network writes the adapters of all layers, from what it learns of each layer and of each task.

    z = h(task, layer, place),  D = H_D z,  U = H_U z,  y' = y + U g(D y),  H_U = 0 at first

task, layer and place (behind attention, or behind the feed-forward) are vectors that are learned, and h a network of
two layers. What H_D and H_U learn in one layer or from one task serves all.

Karimi Mahabadi et al. 2021, arXiv 2106.04489 (HyperFormer++). Its adapters have a norm of the result, which is written,
too; here they have none, so that they change nothing at first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tanzaku.core.context import task_ids
from tanzaku.core.delta import in_full
from tanzaku.core.method import About, AdapterLayer, Method, ModuleLayer, Place, trainable
from tanzaku.core.routing import in_equal_shares
from tanzaku.core.shared import Shared, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.errors import nearest
from tanzaku.methods.parts import Projection, activation, activations, bottleneck_of
from tanzaku.models.families import Sublayer, features, weight_of
from tanzaku.support.refs import Ref


class Written(NamedTuple):
    """Adapters of all tasks at one place: `down` (tasks, bottleneck, width) and its bias (tasks, bottleneck), `up`
    (tasks, width, bottleneck) and its bias (tasks, width)."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


class Hypernetwork(Shared):
    """The network, and what it learns of tasks, layers and places.

    Args:
        sites: where adapters are. width: of the residual stream.
    """

    place = "hypernetwork"

    def __init__(self, how: Hyper, sites: Sequence[Sublayer], width: int, bottleneck: int, like: Tensor):
        super().__init__()
        size, kinds = how.embedding_dim, sorted({site.kind for site in sites})
        layers = sorted({site.number for site in sites})
        self.width, self.bottleneck = width, bottleneck
        self.at = [(layers.index(site.number), kinds.index(site.kind)) for site in sites]

        def drawn(t: Tensor) -> None:
            nn.init.normal_(t)

        self.tasks = trainable(how.num_tasks, size, like=like, fill=drawn)
        self.layers = trainable(len(layers), size, like=like, fill=drawn)
        self.kinds = trainable(len(kinds), size, like=like, fill=drawn)
        self.hidden = Projection(3 * size, how.hidden_dim, like)
        self.out = Projection(how.hidden_dim, size, like)
        self.down = Projection(size, bottleneck * (width + 1), like)
        self.up = Projection(size, width * (bottleneck + 1), like)
        if like.device.type != "meta":
            for part in (self.hidden, self.out):
                nn.init.xavier_uniform_(part.weight)
            nn.init.normal_(self.down.weight, std=(size * width) ** -0.5)  # so that D y is of the size of y
            # H_U stays zero, and its bias.

    def compute(self) -> list[Written]:
        places = torch.stack([torch.cat([self.layers[layer], self.kinds[kind]]) for layer, kind in self.at])
        tasks, number = self.tasks.shape[0], len(self.at)
        known = torch.cat([self.tasks[:, None].expand(-1, number, -1), places[None].expand(tasks, -1, -1)], dim=-1)
        z = self.out(torch.relu(self.hidden(known)))
        down, down_bias = self.down(z).split([self.bottleneck * self.width, self.bottleneck], dim=-1)
        up, up_bias = self.up(z).split([self.bottleneck * self.width, self.width], dim=-1)
        shape = (tasks, number, self.bottleneck, self.width)
        # All places at once: a gradient of each by itself would be one of all places, most of it zeros.
        parts = (part.unbind(1) for part in (down.reshape(shape), down_bias, up.reshape(shape).mT, up_bias))
        return [Written(*each) for each in zip(*parts, strict=True)]


class HyperLayer(ModuleLayer):
    """An adapter behind one sublayer, which the network writes."""

    def __init__(self, network: Hypernetwork, number: int, act: str):
        super().__init__()
        self.network, self.number = Ref(network), number
        self.activation, self.act = act, activation(act)
        self.width = network.width

    def written(self) -> Written:
        """The adapters at this place."""
        found: Written = reached(self.network).value()[self.number]
        return found

    def batch_key(self, module: nn.Module) -> Hashable | None:
        network = reached(self.network)
        if len(network.tasks) > 1:  # its rows are asked for their tasks
            return None
        return (self.activation, network.bottleneck, network.tasks.dtype)

    @staticmethod
    def batched_outputs(
        layers: Sequence[HyperLayer], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        parts = zip(*(layer.written() for layer in layers), strict=True)
        down, down_bias, up, up_bias = (torch.cat(part) for part in parts)

        def change(_: Tensor, y: Tensor) -> Tensor:
            z = y.to(down.dtype).reshape(len(layers), -1, y.shape[-1])
            inner = layers[0].act(torch.baddbmm(down_bias[:, None], z, down.mT))
            return (z + torch.baddbmm(up_bias[:, None], inner, up.mT)).view(y.shape)

        return in_equal_shares(sizes, lambda y: in_full(change, down, y, y).to(y.dtype), y)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        down, down_bias, up, up_bias = self.written()
        own = None if len(down) == 1 else self._own(y, len(down))

        def change(_: Tensor, y: Tensor) -> Tensor:
            z = y.to(down.dtype)
            # Of all tasks, which is little: a row's own is what is left of it.
            inner: Tensor = self.act(torch.einsum("...w,tbw->...tb", z, down) + down_bias)
            bias = up_bias[0]
            if own is not None:
                mine = own.view(len(own), *[1] * (y.dim() - 2), -1).to(z)
                inner, bias = inner * mine[..., None], mine @ up_bias
            changed: Tensor = z + torch.einsum("...tb,twb->...w", inner, up) + bias
            return changed

        return in_full(change, down, y, y).to(y.dtype)

    def _own(self, y: Tensor, tasks: int) -> Tensor:
        """(rows, tasks): one where the task is the row's own."""
        ids = task_ids(y, tasks)
        return ids[:, None] == torch.arange(tasks, device=ids.device)


@dataclass
class Hyper(Method):
    """A hypernetwork that writes bottleneck adapters.

    With more than one task, rows say theirs: `tz.route(model, entries, context={"task_ids": (rows,)})`.

    Args:
        num_tasks: how many tasks there are.
        reduction_factor: the layers' width, divided by the bottleneck's.
        non_linearity: g, by transformers' name.
        embedding_dim: of the vectors of tasks, layers and places, and of z. hidden_dim: of the network's first layer.
        mh_adapter, output_adapter: whether there are adapters after self-attention and after the feed-forward.
    """

    name = "hyper"
    peft_type = "HYPER"
    paper = "arXiv 2106.04489"
    summary = "bottleneck adapters of all layers and tasks, which one network writes"
    about = About(
        where="what attention and feed-forward add to the residual stream",
        parameters="embedding_dim * (tasks + layers + 2 + bottleneck * (2 * width + 1) + width) and two small layers",
        cost="two small products a sublayer, and writing all adapters once a pass",
        choose="for several related tasks at once, of which some have few rows: route rows with their task_ids",
        limits="writes for one width alone; is not linear, so it cannot be merged",
    )
    in_peft = False
    by_default = False
    learning_rate = 3e-4  # the paper's
    # As bottleneck adapters: widths, and a decade around the paper's rate.
    space = spaces(reduction_factor=Choice((8, 16, 32)), learning_rate=Range(1e-4, 3e-3, log=True))

    num_tasks: int = 1
    reduction_factor: float = 16
    non_linearity: str = "gelu"
    embedding_dim: int = 64
    hidden_dim: int = 128
    mh_adapter: bool = True
    output_adapter: bool = True

    def row_data(self) -> Mapping[str, int]:
        return {"task_ids": self.num_tasks} if self.num_tasks > 1 else {}

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        for key in ("num_tasks", "embedding_dim", "hidden_dim"):
            self.require(getattr(self, key) > 0, f"{key}={getattr(self, key)}", "1 or more")
        act = str(self.non_linearity).lower()
        found = f"non_linearity={self.non_linearity!r}{nearest(act, activations())}"
        self.require(act in activations(), found, "one of transformers' activations")
        base, copied = place.base, self.copied(place.base)
        kinds = {"attention": self.mh_adapter, "feed_forward": self.output_adapter, "cross": self.mh_adapter}
        sites = [site for site in base.sublayers() if kinds[site.kind] and not copied(site.out)]
        self.require(
            bool(sites),
            f"a {type(base.model).__name__} without {' or '.join(k for k, v in kinds.items() if v) or 'any adapter'}",
            "one that a pass shows: linear layers whose result is added to the residual stream",
        )
        outs = [base.model.get_submodule(site.out) for site in sites]
        widths = sorted({features(out)[1] for out in outs})
        self.require(len(widths) == 1, f"sublayers of widths {widths}", "one width, which one network can write for")
        bottleneck = bottleneck_of(self, widths[0], self.reduction_factor)
        network = Hypernetwork(self, sites, widths[0], bottleneck, weight_of(outs[0]))
        yield "", network
        for number, site in enumerate(sites):
            yield site.out, HyperLayer(network, number, act)
