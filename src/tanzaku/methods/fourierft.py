"""FourierFT: a few coefficients of the change's Fourier transform, at places drawn once.

    y = W x + scaling Re(F^-1(C)) x,  C zero but at n_frequency places

Gao et al. 2024, arXiv 2405.03003.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tanzaku.core.delta import WeightDelta, shape_of, without_autocast
from tanzaku.core.method import About, AdapterLayer, Place, home, trainable
from tanzaku.core.routing import in_equal_shares, split
from tanzaku.core.space import Range, spaces
from tanzaku.core.targeted import TargetedWithBiases, pattern
from tanzaku.models.families import weight_of


class SparseSpectrum(WeightDelta):
    """Coefficients (n,) at places of the flat matrix that a seed gives, the same for all modules of one shape."""

    places: Tensor

    def __init__(self, module: nn.Module, seed: int, scaling: float):
        super().__init__()
        self.shape, self.scaling = shape_of(module), scaling
        self.seed = seed

    def place(self, module: nn.Module, number: int) -> None:
        """Draw the places. They are in no file: a seed gives them."""
        size, device = self.shape[0] * self.shape[1], home(weight_of(module))
        # A large model on the meta device has matrices whose places take long to draw.
        drawn = torch.empty(number, dtype=torch.long) if device.type == "meta" else places(size, number, self.seed)
        self.register_buffer("places", drawn.to(device, copy=True), persistent=False)

    def spread(self, numbers: Tensor) -> Tensor:
        """The matrix that has these numbers at the places, and zeros elsewhere; in full precision."""
        kind = torch.promote_types(numbers.dtype, torch.float32)
        flat = numbers.new_zeros(self.shape[0] * self.shape[1], dtype=kind)
        return flat.index_put((self.places,), numbers.to(kind)).view(self.shape)


@lru_cache(maxsize=8)
def places(size: int, number: int, seed: int) -> Tensor:
    """So many different places of `size`, as HF PEFT draws them."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:number].clone()


class FourierDelta(SparseSpectrum):
    """`fourierft_spectrum` (n,), real coefficients."""

    def __init__(self, module: nn.Module, number: int, method: FourierFT):
        super().__init__(module, method.random_loc_seed, method.scaling)
        fill = None if method.init_weights else nn.init.normal_
        self.fourierft_spectrum = trainable(number, like=weight_of(module), fill=fill)
        self.place(module, number)

    def delta(self, module: nn.Module) -> Tensor:
        spectrum: Tensor = torch.fft.ifft2(self.spread(self.fourierft_spectrum))
        return spectrum.real * self.scaling

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.batched_outputs([self], (len(y),), module, x, y)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        return (self.seed, len(self.places), self.scaling, self.fourierft_spectrum.dtype)

    @staticmethod
    def batched_outputs(
        layers: Sequence[FourierDelta], sizes: tuple[int, ...], module: nn.Module, x: Tensor, y: Tensor
    ) -> Tensor:
        first, tokens = layers[0], x.numel() // x.shape[-1]
        if tokens * len(first.places) > len(layers) * math.prod(first.shape):
            each = zip(layers, split(x, sizes), split(y, sizes), strict=True)
            return torch.cat([WeightDelta.outputs(layer, module, *own) for layer, *own in each])
        # F^-1(C) is F^-1 C F^-1, of the numbers of outputs and of inputs: tokens are transformed in place of matrices,
        # of which there is one for each adapter, and of a token's numbers a place takes one, to give one.
        rows, columns = first.places // first.shape[1], first.places % first.shape[1]
        kind = torch.promote_types(first.fourierft_spectrum.dtype, torch.float32)
        numbers = torch.stack([layer.fourierft_spectrum.to(kind) for layer in layers], dim=1)[..., None]

        def changed(x: Tensor, y: Tensor) -> Tensor:
            read = torch.fft.ifft(x.reshape(-1, x.shape[-1]).to(kind)).t().index_select(0, columns)
            given = (read.view(len(columns), len(layers), -1) * numbers).view(read.shape)
            spectrum = given.new_zeros(first.shape[0], read.shape[1]).index_add(0, rows, given)
            added: Tensor = torch.fft.ifft(spectrum, dim=0).real.t().view(y.shape)
            return (y + added * first.scaling).to(y.dtype)

        with without_autocast(x):
            return in_equal_shares(sizes, changed, x, y)


@dataclass
class SpectrumTuning(TargetedWithBiases):
    """Settings of methods that train a few coefficients of a transform.

    Args:
        n_frequency: coefficients a matrix. scaling: a factor of the change.
        random_loc_seed: draws where the coefficients are.
        n_frequency_pattern: another number for paths that end with the key or match it.
    """

    # HF PEFT's choice where queries, keys and values are one matrix.
    targets_by_kind: ClassVar[Any] = {
        **TargetedWithBiases.targets_by_kind,
        **dict.fromkeys(("gpt2", "gpt_bigcode"), ("down",)),
    }

    def number_of(self, path: str, module: nn.Module, usual: int, by_pattern: dict[str, int]) -> int:
        """Coefficients of one module."""
        number, size = int(pattern(by_pattern, path, usual)), shape_of(module, path)[0] * shape_of(module)[1]
        self.require(0 < number <= size, f"n_frequency={number} for {path}", f"1 to the {size} numbers of its matrix")
        return number


@dataclass
class FourierFT(SpectrumTuning):
    """Fourier transform for fine-tuning.

    Args:
        n_frequency: coefficients a matrix. scaling: a factor of the change; large, since each coefficient is spread
            over all of it.
        random_loc_seed: draws where the coefficients are.
        n_frequency_pattern: another number for paths that end with the key or match it.
        init_weights: False starts with coefficients at random, as the paper does, True with none.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "fourier_only": which biases are trained too.
    """

    name = "fourierft"
    peft_type = "FOURIERFT"
    paper = "arXiv 2405.03003"
    summary = "a few coefficients of the change's Fourier transform"
    about = About(
        where="query and value projections: y + scaling Re(F^-1(C)) x, C with n_frequency numbers",
        parameters="n_frequency a matrix",
        cost="transforms of each token; of many tokens, one of each matrix's size, and a product with it",
        choose="for very small files with a change of full rank",
        limits="starts with a change at random unless init_weights=True; with many tokens as slow as full matrices",
    )
    by_default = False
    mergeable = True
    own_biases = "fourier_only"
    nonzero = ("scaling",)
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA), whose default it takes.
    # Three decades above PEFT's rate: a coefficient is spread over the whole matrix, and has far to go.
    space = spaces(learning_rate=Range(1e-4, 1e-1, log=True))

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.check_seed("random_loc_seed")
        self.check_bias()
        found = self.find_fitting(place.base)
        self.check_patterns(found, self.n_frequency_pattern)
        for path, module in found:
            number = self.number_of(path, module, self.n_frequency, self.n_frequency_pattern)
            yield path, FourierDelta(module, number, self)
        yield from self.biases(place.base, [path for path, _ in found])
