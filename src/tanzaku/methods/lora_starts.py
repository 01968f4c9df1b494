"""Where LoRA's A and B start, as functions of the weight that they change, or of what the base does with rows.

Each takes a weight (out, in) in full precision, a rank and LoRA's scaling, and gives A (r, in) and B (out, r). Their
product is no zero: what LoRA adds is counted from it, see `StartedDelta` in `lora.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.calibration import DECODED, OWN
from tanzaku.core.context import context
from tanzaku.core.routing import running_route
from tanzaku.models.families import features

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
    return signed(root[:, None] * vh[:r], u[:, :r] * root)


def signed(a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A and B with the same product, the largest number of each of A's rows positive: of singular vectors either sign
    is right, and which of them a library gives depends on roundings."""
    largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(a)
    return a * sign, a if b is None else b * sign.t()


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
    return signed(root[:, None] * vh[:r], u[:, :r] * root)


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
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    nearest = torch.bucketize(blocks / scale, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).flatten()[: len(flat)].view_as(weight)


def _int8(weight: Tensor) -> Tensor:
    """The weight as it comes back from whole numbers of 8 bits, by rows."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale).round() * scale


# -- starts that are read off what the base does with rows


class Look:
    """Stands in a layer's place while rows pass, sees what its module reads, and changes nothing."""

    module: nn.Module | None = None  # once it was seen
    rows = 0
    enough: float = math.inf  # rows, after which more would change little

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.module = module
        self.rows += len(x)
        with torch.no_grad():
            self.see(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
        return y

    def see(self, x: Tensor) -> None:
        """Note what the module reads, (rows, ..., in)."""

    @property
    def key(self) -> Hashable:
        """Looks of one key see the same in the same rows."""
        return type(self).__name__

    @property
    def done(self) -> bool:
        """Whether no more rows are wanted."""
        return self.rows >= self.enough


class Covariance(Look):
    """For CorDA: the mean of x x^T over passes, each scaled by its largest number as the authors' code does.

    Attributes:
        total: (in, in). passes: how many there were.
    """

    enough = 256  # as the authors take
    total: Tensor | None = None
    passes = 0

    def see(self, x: Tensor) -> None:
        own = own_tokens(x)
        own = own / own.max().abs()
        product = own.t() @ own
        self.total = product if self.total is None else self.total + product
        self.passes += 1


def corda(weight: Tensor, covariance: Tensor, r: int, scaling: float, how: str) -> tuple[Tensor, Tensor]:
    """Singular vectors of the weight times the covariance of what it reads.

    Yang et al. 2024, arXiv 2406.05223.

    Args:
        covariance: (in, in). how: "ipm", the principal ones, or "kpm", the least, which keeps what the base knows.
    """
    eye = torch.eye(len(covariance)).to(covariance)
    damp = 0.01  # as large as its inverse needs to be exact
    while True:
        damped = covariance + eye * (covariance.diagonal().mean() * damp)
        inverse = torch.linalg.inv(damped)
        if (damped @ inverse - eye).norm() < 0.05 or damp > 1e6:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    at = slice(r) if how == "ipm" else slice(len(s) - r, len(s))
    root = (s[at] / scaling).sqrt()
    return signed(root[:, None] * (vh[at] @ inverse), u[:, at] * root)


class Gradient(Look):
    """For LoRA-GA: a change of the weight that is zero, and whose gradient is the weight's own.

    Attributes:
        probe: (out, in), once it was asked for. total: the gradients' sum. passes: how many there were.
    """

    enough = 64
    probe: Tensor | None = None
    total: Tensor | None = None
    passes = 0

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.probe is None:
            self.module = module
            n_in, n_out = features(module)
            self.probe = torch.zeros(n_out, n_in, device=x.device, requires_grad=True)
        self.rows += len(x)
        return y + F.linear(x.to(self.probe.dtype), self.probe).to(y.dtype)

    @torch.no_grad()
    def add(self, gradient: Tensor | None) -> None:
        """Add that of one pass; None: it did not reach the module."""
        if gradient is not None:
            self.total = gradient if self.total is None else self.total + gradient
            self.passes += 1


DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def lora_ga(
    weight: Tensor, gradient: Tensor, r: int, scaling: float, direction: str, scale: str, gamma: float
) -> tuple[Tensor, Tensor]:
    """Singular vectors of the weight's gradient: the first step is nearly that of full fine-tuning.

    Wang et al. 2024, arXiv 2407.05000.

    Args:
        direction, scale, gamma: as `LoRA.lora_ga_config` has them.
    """
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    at = {
        "ArBr": (2 * first + 1, 2 * first),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
        "random": (torch.randperm(2 * r)[:r],) * 2,
    }[direction]
    rows, columns = signed(v.t(), u)
    a, b = rows[at[0]], columns[:, at[1]] * s[at[1]]
    if scale == "stable":
        b = b * (len(weight) ** 0.25 / gamma**0.5)
    elif scale == "weight_svd" and s[at[1]][0] > 0:
        b = b * (torch.linalg.matrix_norm(weight, 2) / s[at[1]][0])
    elif scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return a, b


class Components(Look):
    """For EVA: the principal components of what a module reads, by a decomposition that goes on with each pass.

    Ross et al. 2008 (incremental learning for visual tracking) have how a mean that moves is accounted for.

    Args:
        number: of components, k. tau: how like, as a cosine, two successive ones are that have settled.

    Attributes:
        basis: (k, in). values: (k,), singular values. scatter: the sum of squares around the mean, of all components.
        settled: (k,) booleans.
    """

    def __init__(self, number: int, tau: float):
        self.number, self.tau = number, tau
        self.basis: Tensor | None = None
        self.values, self.mean = torch.empty(0), torch.empty(0)
        self.scatter, self.count = 0.0, 0
        self.settled = torch.zeros(number, dtype=torch.bool)

    @property
    def key(self) -> Hashable:
        return type(self).__name__, self.number, self.tau

    @property
    def done(self) -> bool:
        return bool(self.settled.all())

    def see(self, x: Tensor) -> None:
        self.add(own_tokens(x))

    def add(self, own: Tensor) -> None:
        """Go on with some tokens, (tokens, in). Fewer than there are components are passed over."""
        if len(own) < self.number:
            return
        n, m = self.count, len(own)
        mean = own.mean(0)
        added = own - mean
        if self.basis is not None:
            shift = (self.mean - mean) * math.sqrt(n * m / (n + m))
            added = torch.cat([added, shift[None]])
        self.scatter += float(added.square().sum())
        known = added[:0] if self.basis is None else self.basis * self.values[:, None]
        _, values, basis = torch.linalg.svd(torch.cat([known, added]), full_matrices=False)
        before, self.basis, self.values = self.basis, signed(basis[: self.number])[0], values[: self.number]
        if before is not None:
            self.settled = (F.cosine_similarity(self.basis, before).abs() >= self.tau).cpu()
        self.mean = mean if n == 0 else (n * self.mean + m * mean) / (n + m)
        self.count = n + m

    @property
    def explained(self) -> list[float]:
        """The share of the variance that each component explains, in falling order."""
        return (self.values.square() / max(self.scatter, 1e-30)).tolist()


def shared_out(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Ranks of modules, one at least: the components that explain the most have the rest of the budget.

    Args:
        shares: of each module the share of variance of its components, in falling order.
    """
    order = sorted(((share, path) for path, each in shares.items() for share in each[1:]), key=lambda at: -at[0])
    ranks = dict.fromkeys(shares, 1)
    for _, path in order[: budget - len(ranks)]:
        ranks[path] += 1
    return ranks


def own_tokens(x: Tensor) -> Tensor:
    """What a module reads of the rows' own tokens, (tokens, features): no padding, and nothing that a label masks."""
    route, _, has_rows = running_route()
    for name in (OWN, DECODED) if has_rows and x.dim() == 3 else ():
        if name in route.context and (mask := context(name, x)).shape == x.shape[:2]:
            return x[mask.bool()]
    return x.flatten(0, -2)
