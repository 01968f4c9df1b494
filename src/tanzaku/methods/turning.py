"""What methods share that turn a module's input: y = W (R x), with R orthogonal, or nearly."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tanzaku.core.delta import lies_turned, without_autocast
from tanzaku.core.method import ModuleLayer
from tanzaku.core.routing import in_equal_shares
from tanzaku.models.families import features
from tanzaku.models.quantize import full_weight


class TurnedInput(ModuleLayer):
    """The module reads R x. Its weight is not read, so that it may be quantised; merged, it becomes W R.

    Attributes:
        p: probability of leaving a part of R out, in training.
    """

    edits_input, edits_output = True, False
    p: float = 0.0

    @staticmethod
    def turn(layers: Sequence[Any], x: Tensor, p: float) -> Tensor:
        """R x of x (layers, tokens, in), the tokens of each of several alike layers by its own R, computed in the type
        of x, which has at least full precision."""
        raise TypeError(f"{type(layers[0]).__name__} defines no turn()")

    def alike(self) -> Hashable:
        """What layers have in common whose R are made together."""
        raise TypeError(f"{type(self).__name__} defines no alike()")

    def turned(self, x: Tensor, training: bool) -> Tensor:
        """R x, (..., in), as :meth:`turn`."""
        return self.turn([self], x.reshape(1, -1, x.shape[-1]), self.p if training else 0.0).view(x.shape)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.batched_inputs([self], (len(x),), module, x)

    def batch_key(self, module: nn.Module) -> Hashable | None:
        # What is left out is drawn for each adapter by itself.
        return None if self.p and module.training else (self.alike(), next(self.parameters()).dtype)

    @staticmethod
    def batched_inputs(layers: Sequence[TurnedInput], sizes: tuple[int, ...], module: nn.Module, x: Tensor) -> Tensor:
        first = layers[0]
        kind = torch.promote_types(next(first.parameters()).dtype, torch.float32)

        def turned(x: Tensor) -> Tensor:
            each = x.to(kind).reshape(len(layers), -1, x.shape[-1])
            return first.turn(layers, each, first.p if module.training else 0.0).view(x.shape).to(x.dtype)

        with without_autocast(x):
            return in_equal_shares(sizes, turned, x)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        weight, n_in = full_weight(module), features(module)[0]
        # What R makes of each unit vector are its columns.
        columns = self.turned(torch.eye(n_in, dtype=weight.dtype, device=weight.device), training=False)
        return {"weight": columns @ weight if lies_turned(module) else weight @ columns.t()}


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """x (layers, tokens, in) cut into vectors, each times its own of `blocks` (layers, blocks, size, size) from the
    right; one block alone is for all of a layer's."""
    parts = torch.unflatten(x, -1, (-1, blocks.shape[-1]))
    if blocks.shape[1] == 1:
        return torch.bmm(parts.flatten(1, 2), blocks[:, 0]).view(x.shape)
    return torch.einsum("ntbi,nbij->ntbj", parts, blocks).flatten(-2)


def some_left_out(blocks: Tensor, p: float) -> Tensor:
    """`blocks` (..., size, size), each with probability p replaced by the identity."""
    if not p:
        return blocks
    number = blocks.shape[:-2]
    kept = nn.functional.dropout(blocks.new_ones(number.numel()), p) > 0
    return torch.where(kept.view(*number, 1, 1), blocks, unit(blocks))


def unit(like: Tensor) -> Tensor:
    """The identity of blocks (..., size, size)."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def cayley(skew: Tensor) -> Tensor:
    """The orthogonal matrices (I - S) (I + S)^-1 of skew-symmetric ones, (..., size, size)."""
    one = unit(skew).expand_as(skew)
    turned: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
    return turned
