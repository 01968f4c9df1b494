"""GLoRA: a module's weight and bias, scaled and shifted.

    W' = W + W * A + B,  b' = b + b * D + E + W C

A and B are products of low rank, a number for each output, or one number; C is a product or a number for each input; D
and E are a number for each output or one. Where there is no bias, there are no C, D and E.

Chavan et al. 2023, arXiv 2306.07967, who choose the forms layer by layer with an evolutionary search: here they are
settings, which `tanzaku compare` can search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, base_matrix, kaiming
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import Targeted
from tanzaku.core.weights import in_memory
from tanzaku.models.families import features, weight_of

# Of A and B, of C, and of D and E.
FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


class Product(nn.Module):
    """`Xd` (rows, r), zero at first, times `Xu` (r, columns)."""

    def __init__(self, rows: int, columns: int, r: int, like: Tensor, init: bool):
        super().__init__()
        self.Xd = trainable(rows, r, like=like, fill=None if init else kaiming)
        self.Xu = trainable(r, columns, like=like, fill=kaiming)

    def value(self) -> Tensor:
        return self.Xd @ self.Xu

    def of(self, x: Tensor) -> Tensor:
        """x by the matrix, as a linear layer has it."""
        return F.linear(F.linear(x, self.Xu.to(x.dtype)), self.Xd.to(x.dtype))

    def scaled(self, weight: Tensor, x: Tensor) -> Tensor:
        """x by a weight whose numbers are scaled by the matrix's."""
        return F.linear(x, weight * self.value())


class Numbers(nn.Module):
    """`X`, zero at first: numbers of a shape that is broadcast."""

    def __init__(self, *shape: int, like: Tensor, init: bool):
        super().__init__()
        self.X = trainable(*shape, like=like, fill=None if init else lambda t: nn.init.normal_(t, std=0.02))

    def value(self) -> Tensor:
        return self.X

    def of(self, x: Tensor) -> Tensor:
        """x by a matrix (out, in) whose rows have one number each, or all have one."""
        return x.sum(-1, keepdim=True) * self.X.flatten()

    def scaled(self, weight: Tensor, x: Tensor) -> Tensor:
        """x by a weight whose rows are scaled."""
        return F.linear(x, weight) * self.X.flatten()


class ScaledAndShifted(WeightDelta):
    """The parts `glora_A` to `glora_E`, as far as the settings and the module have them."""

    reads_weight = True

    def __init__(self, module: nn.Module, method: GLoRA):
        super().__init__()
        n_in, n_out = features(module)
        like, r, init = weight_of(module), method.r, method.init_weights
        biased = module._parameters.get("bias") is not None
        shapes = {"A": (n_out, n_in), "B": (n_out, n_in), "C": (n_in, 1), "D": (n_out,), "E": (n_out,)}

        def part(form: str, rows: int, columns: int | None) -> Product | Numbers | None:
            if form == "lora":
                return Product(rows, cast(int, columns), r, like, init)
            if form == "none":
                return None
            shape = (1,) if form == "constant" else (rows,) if columns is None else (rows, 1)
            return Numbers(*shape, like=like, init=init)

        self.glora_A, self.glora_B = (part(method.config_A_B, n_out, n_in) for _ in range(2))
        self.glora_C = part(method.config_C if biased else "none", n_in, 1)
        self.glora_D, self.glora_E = (part(method.config_D_E if biased else "none", n_out, None) for _ in range(2))
        # What PEFT's files have in the place of parts that are not there.
        self.absent = {f"glora_{key}.zeros": s for key, s in shapes.items() if getattr(self, f"glora_{key}") is None}

    def export(self) -> dict[str, Tensor]:
        return super().export() | {name: torch.zeros(shape) for name, shape in self.absent.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore({name: tensor for name, tensor in tensors.items() if name not in self.absent})

    def delta(self, module: nn.Module) -> Tensor:
        weight = base_matrix(module)
        if self.glora_A is None or self.glora_B is None:
            return torch.zeros_like(weight)
        return weight * self.glora_A.value() + self.glora_B.value()

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        # Of all, only a product that scales the weight has to be made whole.
        assert self.glora_A is not None and self.glora_B is not None
        weight = base_matrix(module)
        x = x.to(weight.dtype)
        return self.glora_A.scaled(weight, x) + self.glora_B.of(x)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = y if self.glora_A is None else y + self.added(module, x)
        bias = self.bias_change(module)
        return (out if bias is None else out + bias).to(y.dtype)

    def bias_change(self, module: nn.Module) -> Tensor | None:
        """What is added to the bias, (out,); None: nothing."""
        parts: list[Tensor] = []
        if self.glora_D is not None and self.glora_E is not None:
            scale = self.glora_D.value()
            parts = [in_memory(module, "bias").to(scale) * scale + self.glora_E.value()]
        if self.glora_C is not None:
            weight = base_matrix(module)
            parts += [(weight @ self.glora_C.value().to(weight.dtype)).squeeze(-1)]
        return sum(parts[1:], parts[0]) if parts else None

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        out = dict(super().merged(module) or {}) if self.glora_A is not None else {}
        bias = self.bias_change(module)
        if bias is not None:
            own = cast(Tensor, module.bias).detach()
            out["bias"] = own.to(bias) + bias
        return out


@dataclass
class GLoRA(Targeted):
    """Generalised LoRA.

    Args:
        r: rank of what is "lora". config_A_B: "lora", "vector" (a number for each output), "constant" or "none".
        config_C: "lora", "vector" (a number for each input) or "none".
        config_D_E: "vector" (a number for each output), "constant" or "none".
        init_weights: True starts with no change, False at random.
        bias: "none"; PEFT's other words train the bias that D and E scale and shift.
    """

    name = "glora"
    peft_type = "GLORA"
    paper = "arXiv 2306.07967"
    summary = "weights and biases scaled and shifted, by products of low rank or single numbers"
    about = About(
        where="query and value projections: (W + W * A + B) x + b + b * D + E + W C",
        parameters="2 r (in + out) a matrix, and r (in + 1) + 2 where it has a bias; 2 out with config_A_B vector",
        cost="the weight is read, scaled and multiplied with, for each adapter of a batch",
        choose="where both LoRA and HiRA do well; with config_A_B vector, as a richer (IA)3",
        limits="as slow as training full matrices",
    )
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA), whose default it takes; 5e-4 for vectors.
    # Its forms, and as for LoRA, whose numbers it has.
    space = spaces(
        r=Choice((2, 4, 8, 16)), config_A_B=Choice(("lora", "vector")), learning_rate=Range(5e-5, 5e-3, log=True)
    )

    r: int = 8
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True
    bias: str = "none"

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(self.r > 0, f"r={self.r}", "a rank of 1 or more")
        self.require(self.bias == "none", f"bias={self.bias!r}", "'none', and config_D_E for changes of biases")
        for key, forms in FORMS.items():
            form = getattr(self, key)
            self.require(form in forms, f"{key}={form!r}", f"{', '.join(map(repr, forms[:-1]))} or {forms[-1]!r}")
        for path, module in self.find_fitting(place.base):
            layer = ScaledAndShifted(module, self)
            found = f"config_A_B='none' and nothing else for {path}"
            without = " and a bias" if module._parameters.get("bias") is None else ""
            self.require(any(True for _ in layer.parameters()), found, f"a part that learns{without}")
            yield path, layer
