"""Dropout of rows that share a batch: each job draws from random numbers of its own.

torch's dropout draws one mask for a whole tensor from one generator, so that what a row loses depends on its
neighbours, on padding, and on what was drawn before. Within :class:`JobDropout` every random number that torch
draws, for the base or an adapter, is a job's own: it is drawn for the job's rows and tokens alone, from a generator
seeded by the job, its batch and the number of the call. So a job loses the same numbers whatever shares its batch, and
a checkpointed layer that runs again loses them again.

What cannot be told apart by job is refused where several jobs share the batch, and drawn by the job's own generator
where it is alone: a layer that is left out by chance (LayerDrop), tokens that experts have gathered, rows that another
dimension than the first counts.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tanzaku.core.routing import Route
from tanzaku.errors import TanzakuError
from tanzaku.models import tree
from tanzaku.support.context import Local
from tanzaku.support.seeds import seed_of, seeded


@dataclass
class JobSlice:
    """One job's part of a batch: its rows, and how many virtual and own tokens it would have alone; and its decoder's
    tokens, where an encoder-decoder reads others there (None: the same)."""

    rows: slice
    virtual: int
    tokens: int
    seed: int  # of this batch of this job
    calls: int = 0
    drew: bool = False
    left_out: bool = False  # some layer may have been, by chance
    decoded: int | None = None


class JobDropout(TorchFunctionMode):
    """Within the block, random numbers are split by `shares`, in the order of the route's stacks.

    Args:
        width: the longest own text of the batch, in tokens; lead: the most virtual tokens of any share.
        foreign: generators that the model may draw from besides torch's: see :func:`foreign_generators`.
        decoded: tokens of an encoder-decoder's decoder, where it reads others. By their number a dimension of a tensor
            is known for one of these or of those: where both are as many, jobs for which that makes a difference
            cannot share a batch.
    """

    def __init__(
        self,
        route: Route,
        shares: Sequence[JobSlice],
        width: int,
        lead: int,
        foreign: Sequence[Foreign] = (),
        decoded: int | None = None,
    ) -> None:
        super().__init__()
        self.route, self.shares, self.width, self.lead = route, shares, width, lead
        self.decoded = width if decoded is None else decoded  # a classifier's decoder has no virtual tokens
        alike = decoded == lead + width
        self._unclear = alike and any(share.virtual + share.tokens != share.decoded for share in shares)
        self.rows = shares[-1].rows.stop
        self.by_heads = False  # a first dimension counts rows and heads
        self._foreign = foreign
        self._states: list[Any] = []
        self._generators: dict[torch.device, torch.Generator] = {}
        self._before: JobDropout | None = None

    def __enter__(self) -> JobDropout:
        self._before = _current.get()
        _current.set(self)
        self._states = [state() for _, state in self._foreign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _current.set(self._before)
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if not error[0]:
            for (name, state), before in zip(self._foreign, self._states, strict=True):
                if state() != before:
                    raise TanzakuError(
                        f"the model drew from the generator of {name}, which no job has of its own (as for layerdrop, "
                        "mask_time_prob and mask_feature_prob of speech models): set these to 0"
                    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replace = _REPLACED.get(func)
        return func(*args, **(kwargs or {})) if replace is None else replace(self, func, *args, **(kwargs or {}))

    # -- what a call draws

    def key(self, share: JobSlice) -> int:
        """The seed of the next call in this share."""
        share.calls += 1
        share.drew = True
        return seed_of(share.seed, share.calls)

    def generator(self, share: JobSlice, device: torch.device) -> torch.Generator:
        """The generator of the next call in this share."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(self.key(share))

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """`x` with a share p of each job's numbers lost, and the rest scaled up."""

        def mask(out: Tensor, generator: torch.Generator) -> Tensor:
            out.bernoulli_(1 - p, generator=generator)
            return out.mul_(1 / (1 - p)) if p < 1 else out.zero_()

        return x * self.drawn("dropout", torch.ones_like(x, requires_grad=False), mask)

    def drawn(self, what: str, out: Tensor, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        """`out`, filled with each job's own numbers. Where a place belongs to no token of a job it stays as it is."""
        for share, part, columns in self._parts(what, out):
            numbers = torch.empty([len(c) for c in columns], device=out.device, dtype=out.dtype)
            part[_grid(columns, out.device)] = draw(numbers, self.generator(share, out.device))
        return out

    def _parts(self, what: str, x: Tensor) -> Iterator[tuple[JobSlice, Tensor, list[Sequence[int]]]]:
        """(share, its part of a tensor, in each dimension the places that are its own)."""
        at = self.route.at
        active = self.shares if at is None else [self.shares[at]]
        rows = self.rows if at is None else active[0].rows.stop - active[0].rows.start
        apart = len(self.shares) > 1 and (at is None or self.route.base_runs)
        widths = {self.decoded, self.lead + self.width}
        odd = _odd.get()
        if odd is None and x.dim() == 2 and x.shape[0] != rows and x.shape[0] in {rows * width for width in widths}:
            x = torch.unflatten(x, 0, (rows, -1))  # the tokens of all rows, one after another
        whole = x.dim() == 0 or x.shape[0] % rows > 0 or (x.dim() == 2 and x.shape[0] != rows)
        tokens = [d for d in range(x.dim()) if _is_token(x, d) or (d == 2 and x.dim() == 3 and self.by_heads)]
        if self._unclear and len(self.shares) > 1 and any(x.shape[d] == self.decoded for d in tokens):
            self.refuse(f"{what} of {self.decoded} tokens, as many as an encoder and a decoder have here")
        if apart and (odd is not None or whole or any(x.shape[d] not in {1, *widths} for d in tokens)):
            self.refuse(odd or f"{what} of {' x '.join(map(str, x.shape)) or 'one number'}")
        if whole:
            yield active[0], x, [range(n) for n in x.shape]
            return
        each = x.shape[0] // rows
        for share in active:
            part = x[share.rows.start * each : share.rows.stop * each] if at is None else x
            yield (
                share,
                part,
                [
                    self._columns(share, n, d == x.dim() - 1 and d > 1) if d in tokens else range(n)
                    for d, n in enumerate(part.shape)
                ],
            )

    def refuse(self, what: str) -> NoReturn:
        """Say that some random numbers are no job's own."""
        raise TanzakuError(
            f"{what}: these random numbers cannot be told apart by job, so {len(self.shares)} jobs cannot share a "
            "batch; train them one by one, or set the rate to 0"
        )

    def _columns(self, share: JobSlice, size: int, keys: bool) -> Sequence[int]:
        """The places of a share's own tokens among `size`; an adapter's keys stand in front of the layer's own."""
        front = size - self.route.keys if keys and self.route.keys is not None else 0
        if size - front == self.lead + self.width:
            own: Sequence[int] = range(share.virtual + share.tokens)  # fillers are behind them
        elif size - front == self.decoded:
            own = range(share.tokens if share.decoded is None else share.decoded)
        else:
            return range(size)
        return [*range(front), *(front + place for place in own)]

    def one(self) -> JobSlice | None:
        """The job that draws, if there is but one."""
        at = self.route.at
        shares = self.shares if at is None else [self.shares[at]]
        return shares[0] if len(shares) == 1 and not (len(self.shares) > 1 and self.route.base_runs) else None

    def in_force(self) -> bool:
        """Whether this thread is inside of the block."""
        return any(torch._C._get_function_stack_at(i) is self for i in range(torch._C._len_torch_function_stack()))


_current: Local[JobDropout] = Local("tanzaku_dropout")
_odd: Local[str] = Local("tanzaku_dropout_odd")


# -- the model


class OddDropout:
    """A hook for dropout modules of which a base is known to drop something else than rows first."""

    def __init__(self, path: str, shared: bool):
        self.path, self.shared = path, shared

    def enter(self, module: nn.Module, args: Any) -> None:
        """What the module drops is no job's own, or has its rows elsewhere."""
        if _current.get() is not None and module.training:
            _odd.set(_SHARED if self.shared else self.path)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Behind it all is as ever."""
        _odd.set(None)


_SHARED = ""  # in the place of a path


def watch(model: nn.Module, odd: Iterable[tuple[str, bool]]) -> list[RemovableHandle]:
    """Hang hooks on dropout modules.

    Args:
        odd: paths, and whether what the module drops is shared by all rows, as relative positions are. Nothing of it is
            lost then, for one job as for several, and a warning says so.
    """
    handles = []
    names = set()
    for path, shared in odd:
        hook, module = OddDropout(path, shared), model.get_submodule(path)
        if shared and getattr(module, "p", 0) > 0:
            names.add(f"{type(model.get_submodule(path.rpartition('.')[0])).__name__}.{path.rpartition('.')[2]}")
        handles += [module.register_forward_pre_hook(hook.enter)]
        handles += [module.register_forward_hook(hook.leave, always_call=True)]
    if names:
        warnings.warn(
            f"{', '.join(sorted(names))} would drop from a table that all rows read: it belongs to no job, so nothing "
            "of it is dropped",
            stacklevel=3,
        )
    return handles


Foreign = tuple[str, Callable[[], Any]]


def foreign_generators(model: nn.Module) -> list[Foreign]:
    """Generators besides torch's, which no job has of its own, from which a model's code may draw: their names, and
    what tells their states."""
    files = [
        vars(sys.modules[name]) for name in {type(m).__module__ for m in tree.modules(model)} if name in sys.modules
    ]
    out: list[Foreign] = []
    if any(file.get(name) is np for file in files for name in ("np", "numpy")):
        out.append(("numpy", _numpy_state))
    if any(file.get("random") is random for file in files):
        out.append(("random", random.getstate))
    return out


def _numpy_state() -> Any:
    _, keys, *rest = cast(Any, np.random.get_state())
    return keys.tobytes(), rest


def mark() -> list[int] | None:
    """How many calls each share of the noise in force has made."""
    mode = _current.get()
    return None if mode is None else [share.calls for share in mode.shares]


def rewind(mark: list[int] | None, number: int) -> None:
    """Let a share draw again what it drew after `mark`: the base has run for its rows in vain."""
    mode = _current.get()
    if mode is not None and mark is not None:
        mode.shares[number].calls = mark[number]


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, drawing what its first run draws whenever it runs: for layers that run again in the backward pass."""
    mode, first = _current.get(), mark()
    if mode is None or first is None:
        return function
    runs = 0

    def run(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            return function(*args)
        now = [share.calls for share in mode.shares]
        for share, calls in zip(mode.shares, first, strict=True):
            share.calls = calls
        try:
            # On a GPU the backward pass has a thread of its own, in which the mode is not in force.
            with nullcontext() if mode.in_force() else copy.copy(mode):
                return function(*args)
        finally:
            for share, calls in zip(mode.shares, now, strict=True):
                share.calls = calls

    return run


def _is_token(x: Tensor, dim: int) -> bool:
    """Whether a dimension counts tokens: of hidden states (rows, tokens, hidden), of attention (rows, heads, queries,
    keys)."""
    return (x.dim() == 3 and dim == 1) or (x.dim() == 4 and dim >= 2)


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
    mode: JobDropout, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0 or _odd.get() == _SHARED:
        return input
    return input.copy_(mode.dropped(input, p)) if inplace else mode.dropped(input, p)


def _torch_dropout(mode: JobDropout, func: Any, input: Tensor, p: float, train: bool) -> Any:
    return _dropout(mode, func, input, p, train)


def _torch_dropout_(mode: JobDropout, func: Any, input: Tensor, p: float, train: bool) -> Any:
    return _dropout(mode, func, input, p, train, inplace=True)


def _attention(
    mode: JobDropout,
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
        return mode.dropped(scores.softmax(-1), dropout_p) @ value
    boolean = attn_mask.dtype == torch.bool
    scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
    # A query that may attend to nothing gets nothing, and no gradient.
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return mode.dropped(weights, dropout_p) @ value


def _recurrent(mode: JobDropout, func: Any, *args: Any, **kwargs: Any) -> Any:
    # Between its layers the kernel draws for itself, from torch's own generator.
    rate, training = args[5:7] if isinstance(args[2], list | tuple) else args[6:8]
    if not (rate and training):
        return func(*args, **kwargs)
    if (share := mode.one()) is None:
        mode.refuse(f"dropout within {func.__name__}")
    with seeded(mode.key(share), [args[0].device]):
        return func(*args, **kwargs)


def _composed(mode: JobDropout, func: Any, *args: Any, **kwargs: Any) -> Any:
    # It is written in Python, and what it calls would not pass through here.
    own = types.FunctionType(func.__code__, {**func.__globals__, **_PLAIN}, func.__name__, func.__defaults__)
    own.__kwdefaults__ = func.__kwdefaults__
    within = copy.copy(mode)
    within.by_heads = func is F.multi_head_attention_forward
    within._foreign = ()
    with within:
        return own(*args, **kwargs)


_PLAIN = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_args: False
)


def _refused(mode: JobDropout, func: Any, *args: Any, **kwargs: Any) -> Any:
    # Their masks have other shapes; no model or method here has them.
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    if training:
        raise TanzakuError(f"{func.__name__} draws random numbers that jobs in one batch cannot share")
    return func(*args, **kwargs)


def _in_place(mode: JobDropout, func: Any, input: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
    if generator is not None:  # the caller's own
        return func(input, *args, generator=generator, **kwargs)
    probabilities = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("p")
    if isinstance(probabilities, Tensor):
        return input.copy_(_of_each(mode, torch.bernoulli, probabilities.expand(input.shape)))
    with torch.no_grad():
        mode.drawn(func.__name__, input, lambda out, own: func(out, *args, generator=own, **kwargs))
    return input


def _like(mode: JobDropout, func: Any, input: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
    if generator is not None:
        return func(input, *args, generator=generator, **kwargs)
    name = func.__name__.removesuffix("_like")
    options = {key: kwargs.pop(key) for key in ("requires_grad", "memory_format") if key in kwargs}
    out = torch.empty_like(input, **kwargs)
    return _filled(mode, name, out, args).requires_grad_(bool(options.get("requires_grad", False)))


def _made(mode: JobDropout, func: Any, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
    if generator is not None or kwargs.get("out") is not None:
        return func(*args, generator=generator, **kwargs)
    bounds = 0
    if func is torch.randint:
        bounds = 1 if len(args) < 3 or not isinstance(args[1], int) else 2
        kwargs.setdefault("dtype", torch.int64)
        if "high" in kwargs:
            args, bounds = (kwargs.pop("low", 0), kwargs.pop("high"), *args), 2
    size = kwargs.pop("size", None)
    if size is None:
        size = args[bounds] if len(args) == bounds + 1 and not isinstance(args[bounds], int) else args[bounds:]
    wanted = kwargs.pop("requires_grad", False)
    out = torch.empty(tuple(size), **kwargs)
    if func is torch.rand and out.dim() == 0:
        return _Chance.of(mode, out)
    return _filled(mode, func.__name__, out, args[:bounds]).requires_grad_(bool(wanted))


def _filled(mode: JobDropout, name: str, out: Tensor, bounds: tuple[Any, ...]) -> Tensor:
    draw: Any = {"rand": Tensor.uniform_, "randn": Tensor.normal_, "randint": Tensor.random_}[name]
    if name == "randint" and len(bounds) < 2:
        bounds = (0, *bounds)
    with torch.no_grad():
        return mode.drawn(name, out.zero_(), lambda part, own: draw(part, *bounds, generator=own))


def _uniform(out: Tensor, generator: torch.Generator) -> Tensor:
    return out.uniform_(generator=generator)


def _of_each(mode: JobDropout, func: Any, input: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
    """Functions of a tensor of chances, whose numbers cannot be drawn without it."""
    if generator is not None:
        return func(input, *args, generator=generator, **kwargs)
    if func is torch.bernoulli and not args and not kwargs:
        with torch.no_grad():
            numbers = mode.drawn("bernoulli", torch.ones_like(input), _uniform)
            return (numbers < input).to(input.dtype)
    if (share := mode.one()) is None:
        mode.refuse(func.__name__)
    return func(input, *args, generator=mode.generator(share, input.device), **kwargs)


def _normal(
    mode: JobDropout, func: Any, mean: Any, std: Any = 1.0, *args: Any, generator: Any = None, **kwargs: Any
) -> Any:
    like = next((x for x in (mean, std) if isinstance(x, Tensor)), None)
    if generator is not None or args or kwargs or like is None:
        if generator is None:
            if (share := mode.one()) is None:
                mode.refuse(func.__name__)
            generator = mode.generator(share, like.device if like is not None else torch.device("cpu"))
        return func(mean, std, *args, generator=generator, **kwargs)
    with torch.no_grad():
        out: Tensor = mean + 0 * std
        numbers = mode.drawn("normal", torch.zeros_like(out), lambda part, own: part.normal_(generator=own))
        return mean + std * numbers


def _permuted(mode: JobDropout, func: Any, n: int, *, generator: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if generator is None:
        if (share := mode.one()) is None:
            mode.refuse(func.__name__)
        generator = mode.generator(share, torch.device(device or "cpu"))
    return func(n, generator=generator, device=device, **kwargs)


class _Chance(Tensor):
    """A number between 0 and 1 for the whole batch, as layers draw that are left out by chance. Where it is compared
    with a rate of 0 or 1, or one job draws, all is as ever."""

    dropout: JobDropout
    value: Tensor | None

    @staticmethod
    def of(mode: JobDropout, like: Tensor) -> Tensor:
        out = like.fill_(0.5).as_subclass(_Chance)
        out.dropout, out.value = mode, None
        return out

    def drawn(self) -> Tensor:
        """The number."""
        if self.value is None:
            if (share := self.dropout.one()) is None:
                self.dropout.refuse("a layer that is left out by chance (layerdrop)")
            share.left_out = True
            with torch._C.DisableTorchFunctionSubclass():
                plain = torch.empty((), dtype=self.dtype, device=self.device)
                self.value = plain.uniform_(generator=self.dropout.generator(share, plain.device))
        return self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        certain = func.__name__.strip("_") in ("lt", "le", "gt", "ge") and args[1] in (0, 1)

        def plain(value: Any) -> Any:
            if not isinstance(value, _Chance):
                return value
            with torch._C.DisableTorchFunctionSubclass():
                return value.as_subclass(Tensor) if certain else value.drawn()

        return func(*map(plain, args), **{key: plain(value) for key, value in (kwargs or {}).items()})


_REPLACED: dict[Any, _Replacement] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    torch.dropout_: _torch_dropout_,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys((F.multi_head_attention_forward, F.gumbel_softmax), _composed),
    **dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), _refused),
    **dict.fromkeys((torch.rand, torch.randn, torch.randint), _made),
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), _like),
    **dict.fromkeys(
        (torch.bernoulli, Tensor.bernoulli, torch.multinomial, Tensor.multinomial, torch.poisson), _of_each
    ),
    torch.normal: _normal,
    torch.randperm: _permuted,
    **{
        getattr(Tensor, name): _in_place
        for name in (
            *("bernoulli_", "uniform_", "normal_", "exponential_", "random_"),
            *("geometric_", "log_normal_", "cauchy_"),
        )
    },
}
