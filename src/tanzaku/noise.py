"""Dropout of rows that share a batch: each job draws from random numbers of its own.

torch's dropout draws one mask for a whole tensor from one generator, so that what a row loses hangs on its neighbours,
on padding, and on what was drawn before. Within :class:`Noise` every call of dropout, the base's and an adapter's, is
split by job. A job's mask is drawn for its own rows and tokens alone, from a generator seeded by the job, its batch and
the number of the call. So a job loses the same numbers whatever shares its batch, and a checkpointed layer that runs
again loses them again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tanzaku.errors import TanzakuError
from tanzaku.routing import Route

_SIZES_BEYOND = 2**63 - 1
_current: Noise | None = None


@dataclass
class Share:
    """One job's part of a batch: its rows, and how many virtual and own tokens it would have alone."""

    rows: slice
    virtual: int
    tokens: int
    seed: int  # of this batch of this job
    calls: int = 0
    drew: bool = False


class Noise(TorchFunctionMode):
    """Within the block, dropout is split by `shares`, in the order of the route's stacks.

    Args:
        width: the longest own text of the batch, in tokens; lead: the most virtual tokens of any share.
    """

    def __init__(self, route: Route, shares: Sequence[Share], width: int, lead: int):
        super().__init__()
        self.route, self.shares, self.width, self.lead = route, shares, width, lead
        self.rows = shares[-1].rows.stop
        self._generators: dict[torch.device, torch.Generator] = {}
        self._before: Noise | None = None

    def __enter__(self) -> Noise:
        global _current
        self._before, _current = _current, self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        global _current
        _current = self._before
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replace = _REPLACED.get(func)
        return func(*args, **(kwargs or {})) if replace is None else replace(self, func, *args, **(kwargs or {}))

    # -- what a call draws

    def _active(self) -> Sequence[Share]:
        return self.shares if self.route.at is None else [self.shares[self.route.at]]

    def key(self, share: Share) -> int:
        """The seed of the next call in this share."""
        share.calls += 1
        share.drew = True
        return hash((share.seed, share.calls)) & _SIZES_BEYOND

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """`x` with a share p of each job's numbers lost, and the rest scaled up."""
        alone = self.route.at is not None
        if (not alone and x.shape[0] != self.rows) or _unrowed(x, self):
            return x  # a tensor that all rows share belongs to no job: nothing of it is lost
        keep = torch.ones_like(x, requires_grad=False)
        for share in self._active():
            generator = self._generator(x.device).manual_seed(self.key(share))
            part = keep if alone else keep[share.rows]
            at = [self._columns(share, n, d == 3) if _is_token(x, d) else range(n) for d, n in enumerate(part.shape)]
            noise = torch.empty([len(c) for c in at], device=x.device, dtype=x.dtype)
            noise.bernoulli_(1 - p, generator=generator)
            part[_grid(at, x.device)] = noise.mul_(1 / (1 - p)) if p < 1 else noise.zero_()
        return x * keep

    def _columns(self, share: Share, size: int, keys: bool) -> Sequence[int]:
        """The places of a share's own tokens among `size`; an adapter's keys stand in front of the layer's own."""
        front = size - self.route.keys if keys and self.route.keys is not None else 0
        if size - front == self.lead + self.width:
            own: Sequence[int] = range(self.lead - share.virtual, self.lead + share.tokens)
        elif size - front == self.width:  # a decoder, beside an encoder that has the virtual tokens
            own = range(share.tokens)
        else:
            return range(size)
        return [*range(front), *(front + place for place in own)]

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device]

    def in_force(self) -> bool:
        """Whether this thread is inside of the block."""
        return any(torch._C._get_function_stack_at(i) is self for i in range(torch._C._len_torch_function_stack()))


def mark() -> list[int] | None:
    """How many calls each share of the noise in force has made."""
    return None if _current is None else [share.calls for share in _current.shares]


def rewind(mark: list[int] | None, number: int) -> None:
    """Let a share draw again what it drew after `mark`: the base has run for its rows in vain."""
    if _current is not None and mark is not None:
        _current.shares[number].calls = mark[number]


def again(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, drawing what its first run draws whenever it runs: for layers that run again in the backward pass."""
    noise, first = _current, mark()
    if noise is None or first is None:
        return function
    runs = 0

    def run(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            return function(*args)
        now = [share.calls for share in noise.shares]
        for share, calls in zip(noise.shares, first, strict=True):
            share.calls = calls
        try:
            # On a GPU the backward pass has a thread of its own, in which the mode is not in force.
            with nullcontext() if noise.in_force() else copy.copy(noise):
                return function(*args)
        finally:
            for share, calls in zip(noise.shares, now, strict=True):
                share.calls = calls

    return run


def _is_token(x: Tensor, dim: int) -> bool:
    """Whether a dimension counts tokens: of hidden states (rows, tokens, hidden), of attention (rows, heads, queries,
    keys)."""
    return (x.dim() == 3 and dim == 1) or (x.dim() == 4 and dim >= 2)


def _unrowed(x: Tensor, noise: Noise) -> bool:
    """Whether a tensor is a table that rows share, such as relative positions, and only looks like one row."""
    return x.dim() == 3 and x.shape[0] == 1 and x.shape[1] not in (1, noise.width, noise.lead + noise.width)


def _grid(columns: Sequence[Sequence[int]], device: torch.device) -> tuple[Any, ...]:
    """An index of the places where the columns of all dimensions meet."""
    dims = len(columns)
    out: list[Any] = []
    for dim, places in enumerate(columns):
        index = torch.as_tensor(places if isinstance(places, list) else list(places), device=device)
        out.append(index.view([-1 if d == dim else 1 for d in range(dims)]))
    return tuple(out)


# -- the functions that draw

_Replacement = Callable[..., Any]


def _dropout(
    noise: Noise, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0:
        return input
    return input.copy_(noise.dropped(input, p)) if inplace else noise.dropped(input, p)


def _torch_dropout(noise: Noise, func: Any, input: Tensor, p: float, train: bool) -> Any:
    return _dropout(noise, func, input, p, train)


def _torch_dropout_(noise: Noise, func: Any, input: Tensor, p: float, train: bool) -> Any:
    return _dropout(noise, func, input, p, train, inplace=True)


def _attention(
    noise: Noise,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p == 0:
        return func(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    if attn_mask is None:
        return noise.dropped(scores.softmax(-1), dropout_p) @ value
    boolean = attn_mask.dtype == torch.bool
    scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
    # A query that may attend to nothing gets nothing, and no gradient.
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return noise.dropped(weights, dropout_p) @ value


def _lstm(noise: Noise, func: Any, *args: Any, **kwargs: Any) -> Any:
    # Between its layers the kernel draws for itself, from torch's own generator.
    if noise.route.at is None:
        return func(*args, **kwargs)
    share = noise.shares[noise.route.at]
    devices = [args[0].device] if args[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(noise.key(share))
        return func(*args, **kwargs)


def _refused(noise: Noise, func: Any, *args: Any, **kwargs: Any) -> Any:
    # Their masks have other shapes; no model or method here has them.
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    if training:
        raise TanzakuError(f"{func.__name__} draws random numbers that jobs in one batch cannot share")
    return func(*args, **kwargs)


_REPLACED: dict[Any, _Replacement] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    torch.dropout_: _torch_dropout_,
    F.scaled_dot_product_attention: _attention,
    torch.lstm: _lstm,
    **dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), _refused),
}
