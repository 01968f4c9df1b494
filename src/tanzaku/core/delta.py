"""A change of a module's weight, written once for every kind of module: LoRA and its kin are a `delta` each."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tanzaku.core.method import ModuleLayer
from tanzaku.models.families import features
from tanzaku.models.quantize import full_weight

# How HF PEFT starts what is not zero: uniform, up to the root of 1 / the numbers that are summed up.
kaiming = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))


def in_full(change: Callable[[Tensor, Tensor], Tensor], weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """change(x, y), small products with `weight`, in full precision also where what is around them is in half: on CPUs,
    whose units of half precision are for large products. Small ones start faster without."""
    half = y.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if not half or y.device.type != "cpu" or weight.dtype != torch.float32:
        return change(x, y)
    with torch.autocast("cpu", enabled=False):
        return change(x.float(), y.float()).to(y.dtype)


def base_matrix(module: nn.Module) -> Tensor:
    """The module's own weight in full precision, laid out as :meth:`WeightDelta.delta` is, wherever it is kept."""
    return laid_out(module, full_weight(module))


def laid_out(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as the module has it, as :meth:`WeightDelta.delta` is laid out, and back."""
    return weight.t() if lies_turned(module) else weight


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which what is computed beside x has the types that it is given: for functions that know no half."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class WeightDelta(ModuleLayer):
    """y + f(x; delta), where f is what the module does with its weight: the same as a module with weight W + delta.

    The module's own weight is not read, so that it may be quantised or kept elsewhere. A method overrides
    :meth:`delta`, and :meth:`added` (or :meth:`outputs`) if there is a cheaper way than by the whole matrix.

    Attributes:
        dropout: probability of dropping a number that the change reads, in training.
    """

    dropout: float = 0.0

    def delta(self, module: nn.Module) -> Tensor:
        """The change as a linear layer would hold it: (out, in); of a convolution (out, in / groups, *kernel); of an
        embedding (width, tokens)."""
        raise TypeError(f"{type(self).__name__} defines no delta()")

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(A, B), (r, in) and (out, r), of which the change is `scaling` times the product; None: it is no such."""
        return None

    def dropped(self, module: nn.Module, x: Tensor, like: Tensor) -> Tensor:
        """What the change reads, in the type of its parameters."""
        return F.dropout(x.to(like.dtype), self.dropout, module.training)

    def added(self, module: nn.Module, x: Tensor) -> Tensor:
        """f(x; delta): what is added to the module's output. Overridden where there is a cheaper way than by the whole
        matrix."""
        delta = self.dropped_delta(module)
        if isinstance(module, nn.Embedding):
            # Some models scale embedded tokens inside of the module.
            return F.embedding(x, delta.t(), module.padding_idx) * getattr(module, "embed_scale", 1.0)
        x = self.dropped(module, x, delta)
        if isinstance(module, nn.Conv2d):
            return cast(Tensor, module._conv_forward(x, delta, None))  # with its kind of padding
        return F.linear(x, delta)

    def dropped_delta(self, module: nn.Module) -> Tensor:
        """The change as a pass uses it: in training a method may leave out a part of it."""
        return self.delta(module)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (y + self.added(module, x)).to(y.dtype)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        weight = full_weight(module)
        delta = self.delta(module).to(weight.dtype)
        return {"weight": weight + laid_out(module, delta)}

    def hold(self, module: nn.Module, change: Tensor) -> None:
        """Become the nearest that there is to a change, laid out as :meth:`delta`, in place; see `tanzaku.convert`."""
        raise TypeError(f"{type(self).__name__} defines no hold()")


def lies_turned(module: nn.Module) -> bool:
    """Whether a module's weight is (in, out), and not (out, in) as a linear layer's."""
    return isinstance(module, Conv1D | nn.Embedding)


def shape_of(module: nn.Module, path: str = "") -> tuple[int, ...]:
    """The shape of a change: see :meth:`WeightDelta.delta`."""
    if isinstance(module, nn.Embedding):
        return (module.embedding_dim, module.num_embeddings)
    n_in, n_out = features(module, path)
    if isinstance(module, nn.Conv2d):
        return (n_out, n_in // module.groups, *module.kernel_size)
    return (n_out, n_in)
