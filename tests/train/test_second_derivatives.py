"""Derivatives of derivatives, as gradient penalties take them: right or refused, and never a silent zero."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tanzaku
from close import GRADIENT, assert_close
from tanzaku.core.routing import Ragged, _Pack, _Pad
from tanzaku.engine.attention import _Rows, row_attention
from tanzaku.engine.gates import _SILU, _Gated
from tanzaku.engine.norms import _Norm
from tanzaku.engine.products import Directions, _Product, _TrainedProduct
from tanzaku.engine.text_head import _Losses
from tanzaku.methods.lora_layers import _Untrained
from tanzaku.methods.low_rank import _LowRank

for module in pkgutil.walk_packages(tanzaku.__path__, "tanzaku."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
RAGGED = Ragged.short((1, 3), torch.device("cpu"))
MASKS = [torch.zeros(1, 1), torch.zeros(3, 3)]


class Vocabulary:
    """A head of four words, which says what each is worth."""

    def _part(self, whole: None, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.square().sum(-1), targets > 0


# Each of the package's own functions, of x (4, 4), and what it computes there.
USES: dict[type, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]] = {
    _LowRank: (lambda x: _LowRank.apply(x, x, (1, 3), 0.5, *[W[:2]] * 2, *[W[:, :2]] * 2), None),
    _Pad: (lambda x: RAGGED.pack(RAGGED.pad(x).sin()), torch.sin),
    _Pack: (lambda x: RAGGED.pack(RAGGED.pad(x).exp()), torch.exp),
    _Rows: (lambda x: row_attention(*[x[:, None]] * 3, [1, 3], [1, 3], MASKS, 0.5), None),
    _Gated: (lambda x: _Gated.apply(x, x, *_SILU), None),
    _Norm: (lambda x: _Norm.apply(x, W[0], torch.tensor(1e-6)), None),
    _Product: (lambda x: _Product.apply(x.sin(), W, None, None, None, Directions(), None), None),
    _Losses: (lambda x: _Losses.apply(x, torch.arange(4), Vocabulary(), 3)[0], None),
    _TrainedProduct: (lambda x: _TrainedProduct.apply(x.sin(), W, None, Directions()), None),
}


def test_every_function_is_tried() -> None:
    own = {f for f in torch.autograd.Function.__subclasses__() if f.__module__.partition(".")[0] == "tanzaku"}
    assert own - {_Untrained} == USES.keys()  # which has no first one either


@pytest.mark.parametrize("function", USES, ids=lambda f: f.__name__)
def test_a_second_derivative_is_right_or_refused(function: type) -> None:
    use, plain = USES[function]
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    if plain is None:
        with pytest.raises(tanzaku.TanzakuError, match="second derivatives"):
            torch.autograd.grad(use(x).sum(), x, create_graph=True)
        assert torch.autograd.grad(use(x).sum(), x)[0].isfinite().all()
        return
    second, expected = (
        torch.autograd.grad(torch.autograd.grad(f(x).sum(), x, create_graph=True)[0].square().sum(), x)[0]
        for f in (use, plain)
    )
    assert_close(second, expected, GRADIENT)
