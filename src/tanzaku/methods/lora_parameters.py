"""LoRA of parameters that no linear layer has: stacked experts', which a module multiplies by itself.

    W_e + (alpha / r) B_e A_e  for each expert e, in place of W_e while the module runs

It is LoRA's setting `target_parameters`, as in HF PEFT. The changed weights are made anew for each pass, since a hook
sees what goes into such a module and not what its experts multiply.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from tanzaku.core.method import trainable
from tanzaku.core.weights import OwnWeights, check_in_reach
from tanzaku.models import tree
from tanzaku.models.families import Base


class Factors(nn.Module):
    """A and B of one parameter, (experts, out, in) or (experts, in, out), or a matrix (out, in).

    Attributes:
        lora_A: holds (r experts, in). lora_B: holds (out, r experts), whose columns are first of all experts.
    """

    def __init__(self, weight: nn.Parameter, turned: bool, r: int, scaling: float):
        super().__init__()
        self.experts = weight.shape[0] if weight.dim() == 3 else 1
        n_out, n_in = weight.shape[-2:]
        self.turned = turned and weight.dim() == 3
        if self.turned:
            n_out, n_in = n_in, n_out
        self.r, self.scaling = r, scaling
        self.lora_A, self.lora_B = nn.Module(), nn.Module()
        self.lora_A.register_parameter("weight", trainable(r * self.experts, n_in, like=weight))
        self.lora_B.register_parameter("weight", trainable(n_out, r * self.experts, like=weight))

    def draw(self, zero: bool) -> None:
        """Draw A, and B too where the product shall not be zero."""
        for low in (self.lora_A,) if zero else (self.lora_A, self.lora_B):
            weight = low.get_parameter("weight")
            if not weight.is_meta:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def delta(self) -> Tensor:
        """The change, in the parameter's shape."""
        a = self.lora_A.get_parameter("weight").view(self.experts, self.r, -1)
        b = self.lora_B.get_parameter("weight").view(-1, self.r, self.experts).permute(2, 0, 1)
        change = b @ a * self.scaling
        if self.turned:
            return change.mT
        return change


class ParameterDelta(OwnWeights):
    """Changes of some of a module's parameters.

    Args:
        factors: by the parameters' names, in the module's order.
    """

    def __init__(self, factors: Mapping[str, Factors]):
        super().__init__()
        self.factors_of = nn.ModuleDict(dict(factors))

    def _factors(self) -> Iterator[tuple[str, Factors]]:
        for name, factors in self.factors_of.items():
            assert isinstance(factors, Factors)
            yield name, factors

    def factors(self) -> list[Factors]:
        """Of each parameter, in order."""
        return [factors for _, factors in self._factors()]

    @property
    def own(self) -> dict[str, nn.Parameter]:
        return {f"factors_of.{name}": p for name, p in self.factors_of.named_parameters()}

    def below(self, part: str) -> bool:
        return not part

    @contextmanager
    def swapped(self, module: nn.Module, part: str = "") -> Iterator[None]:
        table = module._parameters
        before = {}
        try:
            for name, factors in () if part else self._factors():
                original = before[name] = table[name]
                assert original is not None
                self.check_here(original)
                check_in_reach(module)
                table[name] = original + factors.delta().view_as(original).to(original.dtype)  # type: ignore[assignment]
            yield
        finally:
            table.update(before)

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        full = {name: module.get_parameter(name).detach() for name, _ in self._factors()}
        return {name: full[name].float() + factors.delta().view_as(full[name]) for name, factors in self._factors()}

    # In PEFT each wraps the one before it.

    def keys(self) -> dict[str, str]:
        """Of every tensor, by its name here, the name that it has in files."""
        names = [name for name, _ in self._factors()]
        inside = {name: "base_layer." * (len(names) - 1 - at) for at, name in enumerate(names)}
        return {
            f"factors_of.{name}.{low}.weight": f"{inside[name]}{low}.weight"
            for name in names
            for low in ("lora_A", "lora_B")
        }

    def export(self) -> dict[str, Tensor]:
        own = super().export()
        return {key: own[held] for held, key in self.keys().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore({held: tensors[key] for held, key in self.keys().items()})


def parameters_at(base: Base, names: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """By the path of its module, the parameters whose path is a name or ends with it, in the module's order."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for path, module in tree.named_modules(base.model):
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is not None and any(full == each or full.endswith(f".{each}") for each in names):
                found.setdefault(path, {})[name] = parameter
    return found
