"""WaveFT: a few coefficients of the change's wavelet transform, at places drawn once.

    y = W x + scaling T^-1(C) x,  T one level of a wavelet transform along both sides, C zero but at n_frequency places

Bilican et al. 2025, arXiv 2505.12532.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.delta import shape_of
from tanzaku.core.method import About, AdapterLayer, Place, trainable
from tanzaku.core.space import Range, spaces
from tanzaku.methods.fourierft import SparseSpectrum, SpectrumTuning
from tanzaku.models.families import weight_of

_WAVELETS = {"haar": 1, **{f"db{n}": n for n in range(1, 11)}}  # Daubechies' by their vanishing moments


class WaveletDelta(SparseSpectrum):
    """`waveft_spectrum` (n,), coefficients."""

    def __init__(self, module: nn.Module, number: int, method: WaveFT):
        super().__init__(module, method.random_loc_seed, method.scaling)
        self.moments = _WAVELETS[method.wavelet_family] if method.use_idwt else 0
        fill = None if method.init_weights else lambda t: t.normal_(std=0.01)
        self.waveft_spectrum = trainable(number, like=weight_of(module), fill=fill)
        self.place(module, number)

    def delta(self, module: nn.Module) -> Tensor:
        matrix = self.spread(self.waveft_spectrum)
        return (inverse_wavelet(matrix, self.moments) if self.moments else matrix) * self.scaling


def inverse_wavelet(coefficients: Tensor, moments: int) -> Tensor:
    """The matrix of one shape with `coefficients` (rows, columns), whose quarters are what is smooth along both sides,
    along the columns, along the rows, and along neither."""
    low, high = filters(moments)
    more = len(low) - 2  # coefficients beyond a matrix's own that its edges depend on
    sizes = coefficients.shape
    padded = [(size + more + 1) // 2 * 2 for size in sizes]
    before = [(wide - size) // 2 for wide, size in zip(padded, sizes, strict=True)]
    after = [wide - size - at for wide, size, at in zip(padded, sizes, before, strict=True)]
    whole = F.pad(coefficients, (before[1], after[1], before[0], after[0]))
    quarters = whole.view(2, padded[0] // 2, 2, padded[1] // 2).transpose(1, 2).flatten(0, 1)
    pairs = [torch.outer(rows, columns) for rows, columns in ((low, low), (high, low), (low, high), (high, high))]
    kernels = torch.stack(pairs)[:, None].to(whole)
    # The order of the quarters is (top left, top right, bottom left, bottom right), as HF PEFT pairs them with filters.
    made = F.conv_transpose2d(quarters[None], kernels, stride=2)[0, 0]
    start = [more + (wide - more - size) // 2 for wide, size in zip(padded, sizes, strict=True)]
    return made[start[0] : start[0] + sizes[0], start[1] : start[1] + sizes[1]]


@lru_cache
def filters(moments: int) -> tuple[Tensor, Tensor]:
    """Daubechies' orthogonal filters of so many vanishing moments, low and high: the spectral factor whose roots lie in
    the unit circle (Daubechies 1988)."""
    power = [math.comb(moments - 1 + k, k) for k in range(moments)]
    middle = 1 - 2 * np.roots(power[::-1]).astype(complex)
    roots = middle - np.sqrt(middle**2 - 1)
    roots = np.where(abs(roots) < 1, roots, 1 / roots)
    factor = np.real(np.poly([*[-1.0] * moments, *roots]))
    low = torch.tensor(factor * math.sqrt(2) / factor.sum())
    signs = torch.tensor([(-1.0) ** i for i in range(len(low))], dtype=low.dtype)
    return low, signs * low.flip(0)


@dataclass
class WaveFT(SpectrumTuning):
    """Wavelet fine-tuning.

    Args:
        n_frequency: coefficients a matrix. scaling: a factor of the change.
        wavelet_family: "db1" (also "haar") to "db10", Daubechies' wavelets.
        use_idwt: False trains numbers of the matrix itself.
        random_loc_seed: draws where the coefficients are.
        n_frequency_pattern: another number for paths that end with the key or match it.
        proportional_parameters: share the numbers of all matrices out by their size.
        init_weights: True starts with coefficients of zero, False at random.
        fan_in_fan_out: kept for PEFT's files; the kind of module tells how its weight lies.
        bias: "none", "all" or "waveft_only": which biases are trained too.
    """

    name = "waveft"
    peft_type = "WAVEFT"
    paper = "arXiv 2505.12532"
    summary = "a few coefficients of the change's wavelet transform"
    about = About(
        where="query and value projections: y + scaling T^-1(C) x, C with n_frequency numbers",
        parameters="n_frequency a matrix",
        cost="a transform of each matrix's size, and a product with it",
        choose="for very small files with a change of full rank, local in the matrix",
        limits="as slow as training full matrices",
    )
    by_default = False
    mergeable = True
    own_biases = "waveft_only"
    nonzero = ("scaling",)
    learning_rate = 1e-4  # HF PEFT's method comparison (MetaMathQA, 5000 coefficients), whose default it takes.
    # Two decades above PEFT's rate: a coefficient stands for several numbers, scaled by 25.
    space = spaces(learning_rate=Range(5e-5, 1e-2, log=True))

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        found_here = f"wavelet_family={self.wavelet_family!r}"
        self.require(self.wavelet_family in _WAVELETS, found_here, f"one of {', '.join(_WAVELETS)}")
        self.check_seed("random_loc_seed")
        self.check_bias()
        found = self.find_fitting(place.base)
        self.check_patterns(found, self.n_frequency_pattern)
        sizes = [math.prod(shape_of(module)) for _, module in found]
        for (path, module), size in zip(found, sizes, strict=True):
            if self.proportional_parameters:
                share = size / sum(sizes) * self.n_frequency * len(found)
                number = self.number_of(path, module, max(1, round(share)), {})
            else:
                number = self.number_of(path, module, self.n_frequency, self.n_frequency_pattern)
            yield path, WaveletDelta(module, number, self)
        yield from self.biases(place.base, [path for path, _ in found])
