"""Where LoRA's A and B start, as functions of the weight that they change.

Each takes a weight (out, in) in full precision, a rank and LoRA's scaling, and gives A (r, in) and B (out, r). Their
product is no zero: what LoRA adds is counted from it, see `StartedDelta` in `lora.py`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

PISSA = re.compile(r"pissa(?:_niter_([1-9]\d{0,3}))?")


def pissa(weight: Tensor, r: int, scaling: float, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """The principal singular values and vectors, a root of the values on either side.

    Meng et al. 2024, arXiv 2404.02948.

    Args:
        steps: of subspace iteration by a random matrix, which takes a fraction of the time; None decomposes exactly.
    """
    if steps is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=steps)
        vh = v.t()
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def olora(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R of the weight's QR decomposition.

    Büyükakyüz 2024, arXiv 2406.01775.
    """
    q, rest = torch.linalg.qr(weight)
    return rest[:r].clone(), q[:, :r].clone()


def loftq(weight: Tensor, r: int, scaling: float, bits: int, rounds: int) -> tuple[Tensor, Tensor]:
    """The best product of rank r for what quantisation takes from the weight, quantisation and product by turns.

    Li et al. 2023, arXiv 2310.08659.

    Args:
        bits: 4 (NF4 in blocks of 64) or 8 (whole numbers by rows).
    """
    rest = weight
    for _ in range(rounds):
        lost = weight - (_nf4(rest) if bits == 4 else _int8(rest))
        a, b = product_of(lost / scaling, r)
        rest = weight - scaling * b @ a
    return a, b


def product_of(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), whose product is the best approximation of a matrix by its rank."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


# Quantiles of the normal distribution, as QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E) has them.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_BLOCK = 64


def _nf4(weight: Tensor) -> Tensor:
    """The weight as it comes back from NF4."""
    codes = torch.tensor(_NF4, dtype=weight.dtype, device=weight.device)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    nearest = torch.bucketize(blocks / scale, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).flatten()[: len(flat)].view_as(weight)


def _int8(weight: Tensor) -> Tensor:
    """The weight as it comes back from whole numbers of 8 bits, by rows."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale).round() * scale
