"""C3A: a change made of circulant blocks, each of which one row of numbers gives.

    y = W x + (1 / in) C x,  each block of C a circular correlation with its kernel, by fast Fourier transforms

Chen et al. 2024, arXiv 2407.19342.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, without_autocast
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Range, spaces
from tanzaku.core.targeted import TargetedWithBiases, pattern
from tanzaku.models.families import features, weight_of


class CirculantDelta(WeightDelta):
    """`c3a_kernel` (out / block, in / block, block)."""

    def __init__(self, module: nn.Module, block: int, init: Any):
        super().__init__()
        n_in, n_out = features(module)
        fill: Any = None
        if init == "gaussian":
            fill = nn.init.normal_
        elif init == "kaiming_uniform":
            fill = partial(nn.init.uniform_, a=-1 / math.sqrt(n_in), b=1 / math.sqrt(n_in))
        elif init is not True:
            most = math.sqrt(6 / (n_in + n_out))
            fill = partial(nn.init.uniform_, a=-most, b=most)
        self.c3a_kernel = trainable(n_out // block, n_in // block, block, like=weight_of(module), fill=fill)

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        kernel = self.c3a_kernel.to(torch.promote_types(self.c3a_kernel.dtype, torch.float32))
        block = kernel.shape[-1]
        with without_autocast(x):
            parts = torch.fft.rfft(torch.unflatten(x.to(kernel.dtype), -1, (-1, block)))
            # (..., in / block, frequencies) with (out / block, in / block, frequencies), block by block.
            product = torch.einsum("...nf,mnf->...mf", parts, torch.fft.rfft(kernel).conj())
            change: Tensor = torch.fft.irfft(product, n=block)
            return change.flatten(-2) / x.shape[-1]

    def delta(self, module: nn.Module) -> Tensor:
        n_in, like = features(module)[0], self.c3a_kernel
        return self.added(module, torch.eye(n_in, device=like.device, dtype=like.dtype)).t()


@dataclass
class C3A(TargetedWithBiases):
    """Circular convolution adaptation.

    Args:
        block_size: of a circulant block; it divides a module's inputs and outputs.
        block_size_pattern: another size for paths that end with the key or match it.
        init_weights: "xavier_uniform" (or False), "kaiming_uniform" and "gaussian" start with kernels at random, True
            with none, which changes nothing.
        bias: "none", "all" or "c3a_only": which biases are trained too.
    """

    name = "c3a"
    peft_type = "C3A"
    paper = "arXiv 2407.19342"
    summary = "a change of circulant blocks"
    about = About(
        where="query and value projections: y + C x / in, C of circulant blocks",
        parameters="in out / block a matrix",
        cost="fast Fourier transforms of blocks of the input and of the output",
        choose="for a change of full rank at LoRA's number of parameters",
        limits="blocks must divide inputs and outputs; wants high rates; starts with a small change unless "
        "init_weights=True",
    )
    by_default = False
    mergeable = True
    chosen_only_here: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    targets_by_kind: ClassVar[Any] = {
        **TargetedWithBiases.targets_by_kind,
        **dict.fromkeys(("gpt2", "gpt_bigcode"), ("down",)),
    }
    own_biases = "c3a_only"
    learning_rate = 3e-1  # HF PEFT's method comparison (MetaMathQA, blocks of 64): the change is divided by in.
    # Around PEFT's rate; what block divides a model's matrices is the model's.
    space = spaces(learning_rate=Range(1e-2, 1.0, log=True))

    block_size: int = 256
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | str = "xavier_uniform"

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        inits = (True, False, "xavier_uniform", "kaiming_uniform", "gaussian")
        expected = "true, false, 'xavier_uniform', 'kaiming_uniform' or 'gaussian'"
        self.require(self.init_weights in inits, f"init_weights={self.init_weights!r}", expected)
        self.check_bias()
        found = self.find_fitting(place.base)
        self.check_patterns(found, self.block_size_pattern)
        for path, module in found:
            block, sizes = int(pattern(self.block_size_pattern, path, self.block_size)), features(module)
            ok = block > 0 and all(size % block == 0 for size in sizes)
            expected = f"a divisor of {math.gcd(*sizes)}, for {sizes[0]} inputs and {sizes[1]} outputs"
            self.require(ok, f"block_size={block} for {path}", expected)
            yield path, CirculantDelta(module, block, self.init_weights)
        yield from self.biases(place.base, [path for path, _ in found])
