"""DoRA: a weight as magnitudes and directions, of which LoRA changes the directions.

    y = m (W + D) x / ||W + D|| + b,  D = (alpha / r) B A,  m = ||W|| at first, norms over what an output feature reads

The norm is a constant in the backward pass (section 4.3 of the paper). It is LoRA's setting `use_dora`, as in HF PEFT.

Liu et al. 2024, arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, base_matrix
from tanzaku.core.method import trainable
from tanzaku.core.weights import in_memory
from tanzaku.models.families import features, weight_of

_HELD, _BARE = "lora_magnitude_vector.weight", "lora_magnitude_vector"  # in the tree, and in PEFT's files


class Magnitude(WeightDelta):
    """Put before a `WeightDelta` among the bases of a class: what that changes are directions, with a magnitude each.

    Attributes:
        lora_magnitude_vector: holds the `weight`, (out,); of a convolution (1, out, 1, 1).
    """

    reads_weight = True

    def __init__(self, module: nn.Module, *settings: Any):
        super().__init__(module, *settings)
        width = module.embedding_dim if isinstance(module, nn.Embedding) else features(module)[1]
        shape = (1, width, 1, 1) if isinstance(module, nn.Conv2d) else (width,)
        self.lora_magnitude_vector = nn.Module()
        self.lora_magnitude_vector.register_parameter("weight", trainable(*shape, like=weight_of(module)))
        self.measure(module)

    @property
    def magnitude(self) -> Tensor:
        return cast(Tensor, self.lora_magnitude_vector.weight)

    def export(self) -> dict[str, Tensor]:
        return {_BARE if name == _HELD else name: tensor for name, tensor in super().export().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore({_HELD if name == _BARE else name: tensor for name, tensor in tensors.items()})

    @torch.no_grad()
    def measure(self, module: nn.Module) -> None:
        """Set the magnitude to what the weight has, so that nothing is changed by it yet."""
        if not self.magnitude.is_meta:
            self.magnitude.copy_(self._norm(module))

    @torch.no_grad()
    def _norm(self, module: nn.Module) -> Tensor:
        with torch.autocast(self.magnitude.device.type, enabled=False):
            norm: Tensor = (base_matrix(module) + super().delta(module)).flatten(1).norm(dim=1)
        # Of a feature whose weights are all zero, as in pruned models, nothing is left to divide.
        return norm.clamp_min(torch.finfo(norm.dtype).tiny).view_as(self.magnitude)

    def gain(self, module: nn.Module) -> Tensor:
        """What the changed weight is multiplied by, in the shape of the magnitude."""
        return self.magnitude / self._norm(module)

    def delta(self, module: nn.Module) -> Tensor:
        base, direction = base_matrix(module), super().delta(module)
        gain = self.gain(module).view(-1, *[1] * (base.dim() - 1))
        return (gain - 1) * base + gain * direction

    def hold(self, module: nn.Module, change: Tensor) -> None:
        super().hold(module, change)
        self.measure(module)  # so that the magnitude is that of the changed weight

    def factors(self) -> Any:
        return None  # a rescaled weight is no product of two

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and module.training:
            return WeightDelta.outputs(self, module, x, y)  # as in PEFT, the base reads the dropped numbers, too
        own = self._unbiased(module, y)
        return (y + (self.gain(module) * super().outputs(module, x, own) - own)).to(y.dtype)

    def outputs_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        return (self.gain(module) * super().outputs_of(module, args, kwargs, y)).to(y.dtype)

    def _unbiased(self, module: nn.Module, y: Tensor) -> Tensor:
        """What the module's weight made, without its bias."""
        own = y.to(self.magnitude.dtype)
        if getattr(module, "bias", None) is None:
            return own
        bias = in_memory(module, "bias").to(own)
        return own - (bias.view(-1, 1, 1) if isinstance(module, nn.Conv2d) else bias)

    @staticmethod
    def batched_outputs(
        layers: Sequence[Any], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        own = layers[0]._unbiased(module, y)
        changed = super(Magnitude, type(layers[0])).batched_outputs(layers, sizes, module, x, own)
        gains = [layer.gain(module).expand(size, -1) for layer, size in zip(layers, sizes, strict=True)]
        gain = torch.cat(gains).view(len(y), *[1] * (y.dim() - 2), -1)
        return cast(Tensor, (y + (gain * changed - own)).to(y.dtype))
