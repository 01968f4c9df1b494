"""An adapter's own copies of weights that the base has: whole modules, or one bias."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tanzaku.errors import TanzakuError
from tanzaku.method import ModuleStrip, Strip, trainable
from tanzaku.quantize import plain


class WeightStrip(Strip):
    """The adapter's own copy of a module's weights, used in their place while the module runs.

    `parameters_by_name` maps the module's parameter names to the adapter's; tied parameters appear once.
    """

    def __init__(self, own: dict[str, nn.Parameter]):
        super().__init__()
        self.names = list(own)
        self.copies = nn.ParameterList(dict.fromkeys(own.values()))
        order = {id(p): i for i, p in enumerate(self.copies)}
        self.slot = {name: order[id(p)] for name, p in own.items()}

    @property
    def own(self) -> dict[str, nn.Parameter]:
        return {name: cast(nn.Parameter, self.copies[i]) for name, i in self.slot.items()}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        seen: set[int] = set()
        for name, parameter in self.own.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def export(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named_parameters()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[name])

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """The module with this strip's weights in place of its own."""
        owners = []
        for name, parameter in self.own.items():
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            original = owner._parameters[last]
            owners.append((owner, last, original))
            owner._parameters[last] = cast(nn.Parameter, as_used(parameter, original))
        try:
            yield
        finally:
            for owner, last, original in owners:
                owner._parameters[last] = original


def copy_of(module: nn.Module) -> WeightStrip:
    """An adapter's own, trainable copy of every weight below `module`; tied weights stay tied."""
    copies: dict[int, nn.Parameter] = {}
    own = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not plain(parameter):
            raise TanzakuError(f"cannot copy {name!r}: it holds quantised values ({type(parameter).__name__})")
        if id(parameter) not in copies:
            # As in `trainable`: half precision trains badly, so the copy is in full.
            full = parameter.dtype if parameter.dtype == torch.float64 else torch.float32
            copies[id(parameter)] = nn.Parameter(parameter.detach().to(full, copy=True))
        own[name] = copies[id(parameter)]
    return WeightStrip(own)


class BiasStrip(ModuleStrip):
    """The adapter's own copy of a bias; the rest of the module stays the base's."""

    def __init__(self, module: nn.Module):
        super().__init__()
        own = cast(Tensor, module.bias).detach()
        self.bias = trainable(*own.shape, like=own, fill=lambda bias: bias.copy_(own))

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        change = (self.bias - cast(Tensor, module.bias)).to(y.dtype)
        return y + (change[:, None, None] if isinstance(module, nn.Conv2d) else change)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        return {"bias": self.bias.detach().clone()}


def as_used(own: Tensor, original: Tensor | None) -> Tensor:
    """The adapter's weight in the type that the base computes in; under autocast any type will do."""
    if original is None or own.dtype == original.dtype or torch.is_autocast_enabled(own.device.type):
        return own
    return own.to(original.dtype)
