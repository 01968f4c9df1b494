"""What methods share that turn a module's input: y = W (R x), with R orthogonal, or nearly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tanzaku.core.delta import lies_turned, without_autocast
from tanzaku.core.method import ModuleLayer
from tanzaku.models.families import features
from tanzaku.models.quantize import full_weight


class TurnedInput(ModuleLayer):
    """The module reads R x. Its weight is not read, so that it may be quantised; merged, it becomes W R."""

    edits_input, edits_output = True, False

    def turned(self, x: Tensor, training: bool) -> Tensor:
        """R x, (..., in), computed in the type of x, which has at least full precision."""
        raise TypeError(f"{type(self).__name__} defines no turned()")

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        kind = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        with without_autocast(x):
            return self.turned(x.to(kind), module.training).to(x.dtype)

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        weight, n_in = full_weight(module), features(module)[0]
        # What R makes of each unit vector are its columns.
        columns = self.turned(torch.eye(n_in, dtype=weight.dtype, device=weight.device), training=False)
        return {"weight": columns @ weight if lies_turned(module) else weight @ columns.t()}


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """x (..., in) cut into vectors, each times its own of `blocks` (blocks, size, size) from the right; one block alone
    is for all of them."""
    parts = torch.unflatten(x, -1, (-1, blocks.shape[-1]))
    if len(blocks) == 1:
        return (parts @ blocks[0]).flatten(-2)
    return torch.einsum("...bi,bij->...bj", parts, blocks).flatten(-2)


def some_left_out(blocks: Tensor, p: float) -> Tensor:
    """`blocks` (blocks, size, size), each with probability p replaced by the identity."""
    if not p:
        return blocks
    kept = nn.functional.dropout(blocks.new_ones(len(blocks)), p) > 0
    return torch.where(kept[:, None, None], blocks, unit(blocks))


def unit(like: Tensor) -> Tensor:
    """The identity of blocks (..., size, size)."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def cayley(skew: Tensor) -> Tensor:
    """The orthogonal matrices (I - S) (I + S)^-1 of skew-symmetric ones, (blocks, size, size)."""
    one = unit(skew).expand_as(skew)
    turned: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
    return turned
