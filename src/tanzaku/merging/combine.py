"""Making one adapter of several: weighted sums, truncated decompositions, TIES and DARE.

The rules and their results are those of HF PEFT's `add_weighted_adapter`:

- `linear`: the weighted sum of A and of B. `cat`: A and B side by side, the exact sum. `svd`: the exact sum, cut to the
  largest singular values.
- `ties`: of each the largest values; the sign that most agree on; the mean of those that agree.
- `dare_linear`: values dropped at random, the rest scaled up; their sum. `dare_ties`: the same, and signs as in ties.
- `magnitude_prune`: of each the largest values; their sum.

These work on A and B each by itself; with `_svd` behind the name, on the change B A, which is then decomposed.

TIES: Yadav et al. 2023, arXiv 2306.01708. DARE: Yu et al. 2023, arXiv 2311.03099.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import attach, detach
from tanzaku.core.combining import Combining
from tanzaku.core.manager import manager_of
from tanzaku.core.method import AdapterLayer
from tanzaku.core.weights import WeightCopy
from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.methods import METHODS
from tanzaku.models import tree

_RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
HOW = (*_RULES, "cat", "svd", *(f"{rule}_svd" for rule in _RULES[1:]))
SIGNS = ("total", "frequency")
MEAN = "mean"


@dataclass
class _Rule:
    """How tensors of one shape become one."""

    name: str
    density: float
    sign: str
    generator: torch.Generator | None

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        if self.density < 1 and self.name != "linear":
            prune = self._dropped if self.name.startswith("dare") else self._largest
            tensors = [prune(tensor) for tensor in tensors]
        stack = torch.stack(list(tensors))
        weighted = stack * torch.tensor(weights, device=stack.device).view(-1, *[1] * (stack.dim() - 1))
        if not self.name.endswith("ties"):
            return weighted.sum(0)
        votes = stack if self.sign == "total" else stack.sign()
        elected = torch.where(votes.sum(0) >= 0, 1, -1)
        agree = stack.sign() == elected
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _largest(self, tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        at = flat.abs().topk(int(self.density * flat.numel())).indices
        return torch.zeros_like(flat).index_copy(0, at, flat[at]).view_as(tensor)

    def _dropped(self, tensor: Tensor) -> Tensor:
        keep = torch.bernoulli(torch.full_like(tensor, self.density), generator=self.generator)
        return tensor * keep / self.density


@dataclass
class _Svd:
    """What becomes of a combined change: its largest singular values."""

    clamp: float | None
    full_matrices: bool
    driver: str | None

    def __call__(self, change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(A, B) of a change (out, in): B A is its best approximation of that rank."""
        try:
            u, s, vh = torch.linalg.svd(change, full_matrices=self.full_matrices, driver=self.driver)
        except RuntimeError as error:
            raise TanzakuError(f"combine: the decomposition failed: {str(error).splitlines()[0]}") from None
        b, a = u[:, :rank] * s[:rank], vh[:rank]
        if self.clamp is not None:
            most = torch.quantile(torch.cat([b.flatten(), a.flatten()]), self.clamp)
            a, b = a.clamp(-most, most), b.clamp(-most, most)
        return a, b


@torch.no_grad()
def combine(
    model: nn.Module,
    adapters: Sequence[str],
    name: str = "combined",
    *,
    weights: Sequence[float] | None = None,
    how: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    copies: str | None = None,
    seed: int | None = None,
) -> Adapter:
    """Make one adapter of several LoRA, or several (IA)3, adapters and attach it as `name`. Those stay as they are.

    Args:
        adapters: their names. weights: one each, also negative; equal shares that sum to one by default.
        how: one of `HOW`, by HF PEFT's names. `cat` and `svd` are exact up to their rank; `linear` sums A and B each by
            itself, a rough approximation. (IA)3 has `linear` alone: the weighted sum of the factors.
        density: share of the values that are kept, above 0 and up to 1; for ties, dare and magnitude_prune.
        majority_sign_method: whether "total" (sums) or "frequency" (counts) elects a sign; for ties.
        svd_rank: of the result, the largest rank of the adapters by default. svd_clamp: a quantile that bounds the
            factors' values. svd_full_matrices, svd_driver: as in `torch.linalg.svd`; for svd.
        copies: of which adapter the result takes a classifier's head and other modules that several have copies of, or
            "mean" for their weighted mean. None: that is an error, as in HF PEFT.
        seed: of what dare drops; torch's global generator draws it otherwise.

    Raises:
        TanzakuError: adapters of other or different methods, settings out of range or that `how` does not use, ranks or
            sites that do not go together, or a name already taken.
    """
    manager = manager_of(model)
    parts = [manager.get(each) for each in adapters]
    shares = _weights(parts, weights)
    _check_how(how, parts, density, majority_sign_method, svd_rank, svd_clamp, svd_driver)
    _check_copies(parts, copies)
    method = parts[0].method
    kinds = list(dict.fromkeys(part.method.name for part in parts))
    if len(kinds) > 1:
        raise TanzakuError(f"combine: found methods {listed(kinds)}, expected one; stack them in a route instead")
    if method.combines_by is None:
        able = listed(name for name, each in METHODS.items() if each.combines_by)
        raise TanzakuError(
            f"combine: {method.name} has no rule to combine; expected one of {able} (a route stacks any methods)"
        )
    generator = None
    if seed is not None:
        generator = torch.Generator(next(parts[0].parameters()).device).manual_seed(seed)
    name_of_rule = "linear" if how in ("svd", "cat") else how.removesuffix("_svd")
    rule = _Rule(name_of_rule, 1.0 if density is None else density, majority_sign_method, generator)
    svd = _Svd(svd_clamp, svd_full_matrices, svd_driver) if how.endswith("svd") else None
    by = Combining(how, rule, svd, svd_rank, partial(targets_of, parts))
    new: Any = method.combined(parts, by)
    new = dataclasses.replace(new, target_modules=by.names(_sites(parts)), exclude_modules=None)
    new.modules_to_save = whole_copies(parts)
    adapter = attach(model, new, name, seed=0)  # the draws of its start are overwritten, and cost the caller none
    try:
        for path, layer in adapter.at():
            found = [(s, w) for part, w in zip(parts, shares, strict=True) for s in _own(part, path, layer)]
            if found and not isinstance(layer, WeightCopy):
                module = model.get_submodule(path)
                try:
                    layer.combine(module, [s for s, _ in found], [w for _, w in found], by)
                except TanzakuError as error:
                    raise TanzakuError(f"{error}, at {path}") from None
        fill_copies(adapter, parts, shares, copies)
    except BaseException:
        detach(model, name)
        raise
    return adapter


# -- one site


def _own(part: Adapter, path: str, like: AdapterLayer) -> list[AdapterLayer]:
    """The adapter layer that `part` has at a path for what `like` does there, if any."""
    return [s for p, s in part.at() if p == path and isinstance(s, type(like))]


# -- the settings of the result


def _sites(parts: list[Adapter]) -> list[str]:
    """Paths that any of the adapters changes, but for whole modules."""
    return list(dict.fromkeys(p for part in parts for p, s in part.at() if not isinstance(s, WeightCopy)))


def targets_of(parts: list[Adapter], paths: Sequence[str]) -> list[str]:
    """The last names of the paths where they name these sites and no other; else the paths themselves."""
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    base = parts[0].base
    whole = {p for part in parts for p, s in part.at() if isinstance(s, WeightCopy)}
    reach = {
        path
        for path, _ in tree.named_modules(base.model)
        if path.rsplit(".", 1)[-1] in names and not any(f"{path}.".startswith(f"{w}.") for w in whole)
    }
    return names if reach == set(paths) else [*paths]


def whole_copies(parts: list[Adapter]) -> list[str] | None:
    """Modules that the result has whole copies of, beside a classifier's head."""
    heads = parts[0].base.head_names()
    found = {p for part in parts for p, s in part.at() if isinstance(s, WeightCopy) and p not in heads}
    if found:
        return sorted(found)
    return [] if heads and all(part.method.modules_to_save == [] for part in parts) else None


# -- copies of whole modules


def _copies(adapter: Adapter) -> dict[str, WeightCopy]:
    return {path: s for path, s in adapter.at() if isinstance(s, WeightCopy)}


def _check_copies(parts: list[Adapter], copies: str | None) -> None:
    names = [part.name for part in parts]
    if copies is not None and copies not in (*names, MEAN):
        raise TanzakuError(
            f"combine: found copies={copies!r}, expected {MEAN!r} or one of {listed(names)}{nearest(copies, names)}"
        )
    if copies is None:
        counts: dict[str, list[str]] = {}
        for part in parts:
            for path in _copies(part):
                counts.setdefault(path, []).append(part.name)
        for path, owners in counts.items():
            if not _one([_copies(part)[path] for part in parts if part.name in owners]):
                raise TanzakuError(
                    f"combine: {listed(owners)} each have their own {path}; say whose to take with copies="
                    f"{owners[0]!r}, or copies={MEAN!r} for the weighted mean"
                )


def _one(layers: list[WeightCopy]) -> bool:
    """Whether several copies of a module are one and the same."""
    first, *others = layers
    return all(torch.equal(t, other.tensors[key]) for other in others for key, t in first.tensors.items())


def fill_copies(adapter: Adapter, parts: list[Adapter], weights: list[float], copies: str | None) -> None:
    for path, layer in _copies(adapter).items():
        found = [
            (part.name, _copies(part)[path], w) for part, w in zip(parts, weights, strict=True) if path in _copies(part)
        ]
        own = [s for name, s, _ in found if copies == name]
        if not own and _one(every := [s for _, s, _ in found]):
            own = every
        if not own and copies != MEAN:
            raise TanzakuError(
                f"combine: {copies!r} has no {path} of its own; expected {listed(n for n, _, _ in found)}"
            )
        total = sum(w for _, _, w in found)
        if not own and abs(total) < 1e-6:
            raise TanzakuError(f"combine: the weights of {path} sum to 0, which has no mean; take one with copies=NAME")
        for key, tensor in layer.tensors.items():
            if own:
                tensor.copy_(own[0].tensors[key])
            else:
                tensor.copy_(torch.stack([s.tensors[key] * (w / total) for _, s, w in found]).sum(0))


# -- what was asked for


def _weights(parts: list[Adapter], weights: Sequence[float] | None) -> list[float]:
    if not parts:
        raise TanzakuError("combine: found no adapters, expected the names of some")
    if weights is None:
        return [1 / len(parts)] * len(parts)
    if len(weights) != len(parts):
        raise TanzakuError(f"combine: found {len(weights)} weights for {len(parts)} adapters, expected one each")
    if not all(math.isfinite(w) for w in weights):
        raise TanzakuError(f"combine: found weights {listed(map(str, weights))}, expected finite numbers")
    return [float(w) for w in weights]


def _check_how(
    how: str,
    parts: list[Adapter],
    density: float | None,
    sign: str,
    rank: int | None,
    clamp: float | None,
    driver: str | None,
) -> None:
    if how not in HOW:
        raise TanzakuError(f"combine: found how={how!r}{nearest(how, HOW)}, expected one of {', '.join(HOW)}")
    if sign not in SIGNS:
        raise TanzakuError(f"combine: found majority_sign_method={sign!r}, expected 'total' or 'frequency'")
    prunes, decomposes = how not in ("linear", "cat", "svd"), how.endswith("svd")
    if prunes and density is None:
        raise TanzakuError(f"combine: how={how!r} needs density, the share of values to keep, as in density=0.5")
    if density is not None and not 0 < density <= 1:
        raise TanzakuError(f"combine: found density={density}, expected a share above 0 and up to 1")
    if rank is not None and rank < 1:
        raise TanzakuError(f"combine: found svd_rank={rank}, expected 1 or more")
    if clamp is not None and not 0 <= clamp <= 1:
        raise TanzakuError(f"combine: found svd_clamp={clamp}, expected a quantile from 0 to 1")
    unused = _given(density=density) if not prunes else []
    unused += _given(svd_rank=rank, svd_clamp=clamp, svd_driver=driver) if not decomposes else []
    unused += ["majority_sign_method"] if sign != "total" and "ties" not in how else []
    if unused:
        raise TanzakuError(f"combine: how={how!r} makes no use of {listed(unused)}; leave it out")
    if prunes and len(parts) == 1:
        raise TanzakuError(f"combine: found one adapter for how={how!r}, expected several, or 'linear', 'cat' or 'svd'")


def _given(**settings: Any) -> list[str]:
    return [key for key, value in settings.items() if value is not None]
