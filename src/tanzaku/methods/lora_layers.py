"""LoRA's layers: at matrices, convolutions and embeddings; from a start that is counted from; from an invocation on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tanzaku.core.combining import Combining
from tanzaku.core.delta import WeightDelta
from tanzaku.core.method import trainable
from tanzaku.core.survey import tensors
from tanzaku.core.weights import with_tensors
from tanzaku.errors import TanzakuError, listed
from tanzaku.methods.activated import Invocation, in_force
from tanzaku.methods.dora import Magnitude
from tanzaku.methods.lora_starts import (
    product_of,
)
from tanzaku.methods.low_rank import Low, LowRankDelta
from tanzaku.models.families import features, weight_of
from tanzaku.support.refs import Ref


class LoraDelta(LowRankDelta):
    """For matrices: linear layers, Conv1D and quantised layers of any kind, since only input and output are seen.

    Attributes:
        watch: what is done in the layer's place until it has started from rows, of which it sees some.
    """

    watch: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None

    def __init__(self, module: nn.Module, r: int, scaling: float, dropout: float, init: Any):
        super().__init__()
        self.r, self.scaling, self.dropout = r, scaling, dropout
        n_in, n_out = features(module)
        weight = weight_of(module)
        self.lora_A = Low(trainable(*self._shape_a(module, n_in), like=weight))
        self.lora_B = Low(trainable(*self._shape_b(module, n_out), like=weight))
        if self.lora_A.weight.device.type != "meta":
            initialise(self, module, init)

    def _shape_a(self, module: nn.Module, n_in: int) -> tuple[int, ...]:
        return (self.r, n_in)

    def _shape_b(self, module: nn.Module, n_out: int) -> tuple[int, ...]:
        return (n_out, self.r)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return super().outputs(module, x, y) if self.watch is None else self.watch(module, x, y)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        return None if self.watch is not None else super().batch_key(module)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        return self.pair()

    @torch.no_grad()
    def resize(self, a: Tensor, scaling: float) -> None:
        """Have the rank of another A, (r, in), and that A; B is zero."""
        self.r, self.scaling = len(a), scaling
        old = self.lora_A.weight, self.lora_B.weight
        self.lora_A.weight = nn.Parameter(a.to(old[0], copy=True), requires_grad=old[0].requires_grad)
        self.lora_B.weight = nn.Parameter(old[1].new_zeros(len(old[1]), len(a)), requires_grad=old[1].requires_grad)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B, as the layer computes with them."""
        return self.lora_A.weight, self.lora_B.weight

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.pair()

    def combine(self, module: nn.Module, given: Sequence[Any], weights: Sequence[float], by: Combining) -> None:
        combine_factors(self, module, given, weights, by)

    def hold(self, module: nn.Module, change: Tensor) -> None:
        hold_change((self.lora_A.weight, self.lora_B.weight), module, change / self.scaling)


class _Start(nn.Module):
    """What A or B was at first, which is no parameter."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", torch.zeros_like(weight, requires_grad=False))

    weight: Tensor


class StartedDelta(LoraDelta):
    """LoRA that starts at a product B0 A0 which is no zero, and adds what has come to it: (alpha / r) (B A - B0 A0) x.

    Elsewhere B0 A0 is taken out of the base's weight, which here other adapters share. So A0 and B0 are kept beside A
    and B, and a file has plain LoRA of twice the rank, [B, -B0] [A; A0], which any reader reads.

    Args:
        to_fill: A and B come from a file that has them alone, as HF PEFT writes it; A0 and B0 are what they were there.
        alone: files have them alone, since whoever reads one finds A0 and B0 again in the base's weight.
    """

    def __init__(self, module: nn.Module, r: int, scaling: float, dropout: float, to_fill: bool, alone: bool):
        super().__init__(module, r, scaling, dropout, None)
        self.to_fill, self.alone = to_fill, alone
        self.start_A, self.start_B = _Start(self.lora_A.weight), _Start(self.lora_B.weight)

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor, counted: bool = True) -> None:
        """Start at A (r, in) and B (out, r).

        Args:
            counted: their product is a part of the base's weight, which is left to it.
        """
        self.lora_A.weight.copy_(a)
        self.lora_B.weight.copy_(b)
        self.start_A.weight.copy_(a).mul_(counted)
        self.start_B.weight.copy_(b).mul_(counted)

    def pair(self) -> tuple[Tensor, Tensor]:
        a = torch.cat([self.lora_A.weight, self.start_A.weight])
        return a, torch.cat([self.lora_B.weight, -self.start_B.weight], 1)

    def hidden(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        if not (self.dropout and module.training):
            return super().hidden(module, x, a)
        # Of what was the base's, nothing is dropped.
        own, start = super().hidden(module, x, a[: self.r]), F.linear(x.to(a.dtype), a[self.r :])
        return torch.cat([own, start], -1)

    def export(self) -> dict[str, Tensor]:
        a, b = (self.lora_A.weight, self.lora_B.weight) if self.to_fill or self.alone else self.pair()
        rest = {key: t for key, t in super().export().items() if key.partition(".")[0] not in _STARTED}
        return {"lora_A.weight": a.detach(), "lora_B.weight": b.detach(), **rest}

    def hold(self, module: nn.Module, change: Tensor) -> None:
        raise TanzakuError("convert: found a start that is counted from, expected init_lora_weights=true")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        own = super().export()
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        for name, tensor in tensors.items():
            if name.partition(".")[0] not in _STARTED:
                own[name].copy_(tensor)
        own["lora_A.weight"].copy_(a[: self.r])
        own["lora_B.weight"].copy_(b[:, : self.r])
        if len(a) > self.r:
            own["start_A.weight"].copy_(a[self.r :])
            own["start_B.weight"].copy_(-b[:, self.r :])
        self.to_fill = False


_NOT_YET = (
    "lora: found an adapter that starts from what the base does with rows, and has seen none; call "
    "tanzaku.calibrate(model, name, batches) before training"
)


class _Untrained(torch.autograd.Function):
    """The same tensor, through which there is no backward pass yet."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, by: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise TanzakuError(_NOT_YET)


def not_yet(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """In the place of a layer that waits for rows: nothing is changed, and nothing is trained, in no mode."""
    if torch.is_grad_enabled() and module.training:
        raise TanzakuError(_NOT_YET)
    return cast(Tensor, _Untrained.apply(y, y.new_zeros((), requires_grad=True)))  # type: ignore[no-untyped-call]


_STARTED = ("lora_A", "lora_B", "start_A", "start_B")


class ActivatedDelta(LoraDelta):
    """LoRA from where it is invoked in each row."""

    reads_places = True

    def __init__(self, module: nn.Module, invocation: Invocation, *settings: Any):
        super().__init__(module, *settings)
        self.invocation = Ref(invocation)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        invocation = self.invocation()
        assert invocation is not None
        return torch.where(in_force(invocation.value(), y), super().outputs(module, x, y), y)

    def batch_key(self, module: nn.Module) -> None:
        return None

    def hold(self, module: nn.Module, change: Tensor) -> None:
        raise TanzakuError("convert: found alora_invocation_tokens, expected none: a weight is always in force")

    def factors(self) -> Any:
        return None  # it is no change of a weight: what a token gets depends on those before it

    def merged(self, module: nn.Module) -> None:
        return None


class LoraConv2d(LoraDelta):
    """A is a convolution of the base's shape to r channels, B a 1 x 1 convolution back."""

    def batch_key(self, module: nn.Module) -> None:
        return None

    def _shape_a(self, module: nn.Module, n_in: int) -> tuple[int, ...]:
        conv = cast(nn.Conv2d, module)
        return (self.r, n_in // conv.groups, *conv.kernel_size)

    def _shape_b(self, module: nn.Module, n_out: int) -> tuple[int, ...]:
        return (n_out, self.r // cast(nn.Conv2d, module).groups, 1, 1)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        conv = cast(nn.Conv2d, module)
        a, b = self.lora_A.weight, self.lora_B.weight
        x = self.dropped(module, x, a)
        h = conv._conv_forward(x, a, None)  # with its kind of padding
        return (y + F.conv2d(h, b, groups=conv.groups) * self.scaling).to(y.dtype)

    def delta(self, module: nn.Module) -> Tensor:
        # A group of output channels reads its own part of the rank, as in the two convolutions.
        a, b = self.lora_A.weight.flatten(1), self.lora_B.weight.flatten(1)
        groups = self.r // b.shape[1]
        parts = b.view(groups, -1, b.shape[1]) @ a.view(groups, b.shape[1], -1)
        return parts.flatten(0, 1).view(-1, *self.lora_A.weight.shape[1:]) * self.scaling


class LoraEmbedding(WeightDelta):
    """For embeddings: A holds a vector of r numbers a token. B starts at random and A at zero.

    Some find out for themselves what to look up, such as positions from a mask: these look A up in the same way.
    """

    def __init__(self, module: nn.Embedding, r: int, scaling: float, init: Any):
        super().__init__()
        self.scaling = scaling
        scaled = hasattr(module, "embed_scale") and len(inspect.signature(module.forward).parameters) == 1
        self.reads_call = type(module).forward is not nn.Embedding.forward and not scaled  # type: ignore[misc]
        weight = module.weight
        normal = None if init is False else nn.init.normal_
        self.lora_embedding_A = trainable(
            r, module.num_embeddings, like=weight, fill=nn.init.normal_ if init is False else None
        )
        self.lora_embedding_B = trainable(module.embedding_dim, r, like=weight, fill=normal or nn.init.normal_)

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        embedding = cast(nn.Embedding, module)
        if (rows := self.lora_embedding_A.shape[1]) != len(embedding.weight):
            raise TanzakuError(
                f"the embedding has {len(embedding.weight)} tokens, and the adapter was attached when it had {rows}: "
                "detach it, resize, and attach it again"
            )
        h = F.embedding(x, self.lora_embedding_A.t(), embedding.padding_idx)
        # Some models scale embedded tokens inside the embedding module, and PEFT scales the change alike.
        scale = getattr(module, "embed_scale", None)
        change = h @ self.lora_embedding_B.t() * self.scaling
        return (y + (change if scale is None else change * scale)).to(y.dtype)

    def outputs_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        h = type(module).forward(with_tensors(module, {"weight": self.lora_embedding_A.t()}), *args, **kwargs)
        h = next(x for _, x in tensors(h))
        return (y + h @ self.lora_embedding_B.t() * self.scaling).to(y.dtype)

    def delta(self, module: nn.Module) -> Tensor:
        return self.lora_embedding_B @ self.lora_embedding_A * self.scaling

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A, self.lora_embedding_B

    def combine(self, module: nn.Module, given: Sequence[Any], weights: Sequence[float], by: Combining) -> None:
        combine_factors(self, module, given, weights, by)

    def hold(self, module: nn.Module, change: Tensor) -> None:
        hold_change((self.lora_embedding_A, self.lora_embedding_B), module, change / self.scaling)


class DoraDelta(Magnitude, LoraDelta):
    """LoRA with a magnitude, for matrices."""


class DoraStarted(Magnitude, StartedDelta):
    """LoRA with a magnitude that starts at a product."""


class DoraConv2d(Magnitude, LoraConv2d):
    """LoRA with a magnitude, for convolutions."""


class DoraEmbedding(Magnitude, LoraEmbedding):
    """LoRA with a magnitude, for embeddings."""


def hold_change(pair: tuple[Tensor, Tensor], module: nn.Module, change: Tensor) -> None:
    """Give A and B in place the product that is nearest to a change. A grouped convolution's have no such."""
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        raise TanzakuError(f"convert: found a convolution in {module.groups} groups, which has no nearest product")
    a, b = product_of(change.flatten(1), pair[0].shape[0])
    pair[0].zero_()[: len(a)] = a.view(-1, *pair[0].shape[1:])
    pair[1].zero_()[:, : len(a)] = b.view(len(b), -1, *pair[1].shape[2:])


Factored = LoraDelta | LoraEmbedding


def combine_factors(
    layer: Factored, module: nn.Module, given: Sequence[Factored], weights: Sequence[float], by: Combining
) -> None:
    """Give `layer` what becomes of the factors of others: side by side, decomposed anew, or each by itself.

    Raises:
        TanzakuError: a grouped convolution, whose factors cannot be put together, or ranks that differ.
    """
    pairs = [each.factors() for each in given]
    if isinstance(module, nn.Conv2d) and module.groups > 1 and (by.svd is not None or by.how == "cat"):
        where = f"{tuple(module.weight.shape)} in {module.groups} groups"
        raise TanzakuError(f"combine: found a convolution {where}; expected how='linear' or another without svd")
    scaled = [w * each.scaling for each, w in zip(given, weights, strict=True)]
    own_a, own_b = layer.factors()
    if by.how == "cat":
        a = torch.cat([a * w for (a, _), w in zip(pairs, scaled, strict=True)])
        b = torch.cat([b for _, b in pairs], 1)
    elif by.svd is not None:
        # The change is computed as the weight lies, which is how PEFT's draws are laid out.
        turned = isinstance(module, Conv1D | nn.Embedding)
        deltas = [each.delta(module).flatten(1) for each in given]
        change = by.rule([d.t().contiguous() if turned else d for d in deltas], weights)
        a, b = by.svd(change.t() if turned else change, own_a.shape[0])
        a, b = a.view(-1, *own_a.shape[1:]), b.view(*b.shape, *own_b.shape[2:])
    else:
        if len(ranks := {a.shape[0] for a, _ in pairs}) > 1:
            raise TanzakuError(f"combine: found ranks {listed(map(str, sorted(ranks)))}; use how='cat' or 'svd'")
        # The sign goes to one of the factors, or it would cancel in their product.
        roots = [math.sqrt(abs(w)) for w in scaled]
        a = by.rule([a for a, _ in pairs], [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)])
        b = by.rule([b for _, b in pairs], roots)
    # Where fewer singular values or adapters are there than the new rank has room for, the rest is zero.
    own_a.zero_()[: a.shape[0]] = a
    own_b.zero_()[:, : b.shape[1]] = b


def initialise(layer: LoraDelta, module: nn.Module, init: Any) -> None:
    """Fill A and B in place as `init_lora_weights` says; None leaves zeros."""
    if init is None:
        return
    a, b = layer.lora_A.weight, layer.lora_B.weight
    if init is True or init is False:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    elif init == "gaussian":
        nn.init.normal_(a, std=1 / layer.r)
    else:  # "orthogonal"
        if layer.r % 2:
            raise TanzakuError(f"lora: found r={layer.r}, expected an even rank for init_lora_weights='orthogonal'")
        q = torch.linalg.qr(torch.randn(layer.r, layer.r))[0]
        n_in, n_out = features(module)
        with torch.no_grad():
            a.copy_(torch.randn(n_in, layer.r // 2).mm(q[0::2]).t() / 10)
            b.copy_(torch.randn(layer.r // 2, n_out).t().mm(q[1::2]) / 10)
