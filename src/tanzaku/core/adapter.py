"""One attached adapter, as it stands in the tree of its model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from tanzaku.core.method import AttentionStrip, Method, Strip, TokenStrip
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.models.families import Base


class Adapter(nn.Module):
    """One adapter: a method's settings and its strips, which stand in the tree below it by the paths of their sites."""

    def __init__(self, name: str, method: Method, strips: list[tuple[str, Strip]], base: Base):
        super().__init__()
        self.name, self.method, self.base = name, method, base
        self._strips: list[tuple[str, Strip]] = []
        self._wanted: dict[str, bool] | None = None  # while nothing of it requires gradients: what does otherwise
        self._guards: list[Any] = []
        self.followed: torch.device | None = None  # where the model was when the strips were last moved to their sites
        for path, strip in strips:
            self.add(path, strip)

    def add(self, path: str, strip: Strip, *, first: bool = False) -> None:
        """Hang one more strip; `first`, so that what others do at the site is done to what it computes."""
        strip.trained = any(p.requires_grad for p in strip.parameters())
        tree.hang(self, path or ("prompt" if isinstance(strip, TokenStrip) else "weights"), strip)
        self._strips.insert(0 if first else len(self._strips), (path, strip))

    @property
    def paths(self) -> list[str]:
        """The paths of the sites."""
        return [path for path, _ in self._strips]

    def at(self) -> Iterator[tuple[str, Strip]]:
        """(path, strip) in the order they were hung."""
        yield from self._strips

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the path of their site, each once; none is the adapter's own beside its strips'."""
        seen: set[int] = set()
        if not recurse:
            return
        for path, strip in self.at():
            for name, parameter in strip.named_parameters():
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

    def _in_tree(self) -> Iterator[tuple[str, nn.Parameter]]:
        # By the path of their site two strips may have parameters of one name.
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
    def virtual(self) -> int:
        """Tokens that it puts before a row's own."""
        return sum(strip.num_virtual_tokens for _, strip in self.at() if isinstance(strip, TokenStrip))

    @property
    def before(self) -> int:
        """Positions that it takes before a row's first token."""
        offsets = (strip.position_offset for _, strip in self.at() if isinstance(strip, AttentionStrip))
        return self.virtual + max(offsets, default=0)


def _late(name: str, gradients: Any) -> None:
    raise TanzakuError(f"a backward pass reaches {name!r}, which is not active any more; activate it again before it")
