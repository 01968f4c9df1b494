"""One attached adapter, as it stands in the tree of its model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from tanzaku.core.method import AdapterLayer, AttentionLayer, Method, ModuleLayer, TokenLayer
from tanzaku.core.shared import Shared
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import Base


class Adapter(nn.Module):
    """One adapter: a method's settings and its layers, which stand in the tree below it by the paths of their sites."""

    def __init__(self, name: str, method: Method, layers: list[tuple[str, AdapterLayer]], base: Base):
        super().__init__()
        self.name, self.method, self.base = name, method, base
        self.meta: dict[str, Any] = {}  # what its file said, or says, of its use
        self.brought: list[str] = []  # names of adapters that it uses, and that were attached for it alone
        self._layers: list[tuple[str, AdapterLayer]] = []
        self._wanted: dict[str, bool] | None = None  # while nothing of it requires gradients: what does otherwise
        self._guards: list[Any] = []
        self.followed: torch.device | None = (
            None  # where the model was when the adapter layers were last moved to their sites
        )
        for path, layer in layers:
            self.add(path, layer)

    def add(self, path: str, layer: AdapterLayer, *, first: bool = False) -> None:
        """Hang one more adapter layer; `first`, so that what others do at the site is done to what it computes."""
        layer.trained = any(p.requires_grad for p in layer.parameters())
        tree.attach(self, path or _place(layer), layer)
        self._layers.insert(0 if first else len(self._layers), (path, layer))

    @property
    def paths(self) -> list[str]:
        """The paths of the sites."""
        return [path for path, _ in self._layers]

    def at(self) -> Iterator[tuple[str, AdapterLayer]]:
        """(path, adapter layer) in the order they were attached."""
        yield from self._layers

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the path of their site, each once; none is the adapter's own beside its adapter layers'."""
        seen: set[int] = set()
        if not recurse:
            return
        for path, layer in self.at():
            for name, parameter in layer.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield ".".join(part for part in (prefix, path, name) if part), parameter

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that training changes, whether the adapter is in force just now or not."""
        wanted = self._wanted
        if wanted is None:
            return [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        flags = {id(p): wanted.get(name, False) for name, p in self._in_tree()}
        return [(name, p) for name, p in self.named_parameters() if flags[id(p)]]

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What is trained, as an optimizer takes it: with the learning rates that the method makes of one."""
        factors: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trained():
            factors.setdefault(self.method.rate_of(name), []).append(parameter)
        return [{"params": params, "lr": learning_rate * factor} for factor, params in factors.items()]

    def _in_tree(self) -> Iterator[tuple[str, nn.Parameter]]:
        # By the path of their site two adapter layers may have parameters of one name.
        return super().named_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guards": []}

    @torch.inference_mode(False)
    def require_gradients(self, wanted: bool) -> None:
        """Let all that is trained require gradients, or nothing of it. What a program froze stays so.

        Autograd would pass over a parameter that requires none when a backward pass reaches it. A pass that was
        computed before is an error then.
        """
        if wanted and self._wanted is not None:
            for guard in self._guards:
                guard.remove()
            self._guards = []
            flags, self._wanted = self._wanted, None
            for name, parameter in self._in_tree():
                parameter.requires_grad_(flags.get(name, False))
        elif not wanted and self._wanted is None:
            self._wanted = {name: p.requires_grad for name, p in self._in_tree()}
            for _, parameter in self._in_tree():
                if parameter.requires_grad:
                    node = get_gradient_edge(parameter).node
                    self._guards.append(node.register_prehook(partial(_late, self.name)))
                parameter.requires_grad_(False)

    @property
    def whole_rows(self) -> bool:
        """Whether a layer reads more of a row than one token."""
        return any(layer.whole_rows for _, layer in self.at() if isinstance(layer, ModuleLayer))

    @property
    def reads_padding(self) -> bool:
        """Whether rows depend on how they are padded."""
        return any(layer.reads_padding for _, layer in self.at() if isinstance(layer, ModuleLayer))

    @property
    def untrimmed(self) -> bool:
        """Whether a layer reads what two modules have."""
        return any(layer.untrimmed for _, layer in self.at() if isinstance(layer, ModuleLayer))

    @property
    def virtual(self) -> int:
        """Tokens that it puts before a row's own."""
        return sum(layer.num_virtual_tokens for _, layer in self.at() if isinstance(layer, TokenLayer))

    @property
    def before(self) -> int:
        """Positions that it takes before a row's first token."""
        offsets = (layer.position_offset for _, layer in self.at() if isinstance(layer, AttentionLayer))
        return self.virtual + max(offsets, default=0)


def _place(layer: AdapterLayer) -> str:
    """What a layer that is at no module of the base is called in the tree."""
    if isinstance(layer, Shared):
        return layer.place
    return "prompt" if isinstance(layer, TokenLayer) else "weights"


def _late(name: str, gradients: Any) -> None:
    raise TanzakuError(f"a backward pass reaches {name!r}, which is not active any more; activate it again before it")
