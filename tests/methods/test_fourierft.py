"""FourierFT: few numbers, at places that a seed gives, spread over the whole change."""

from __future__ import annotations

import pytest
import torch

import tanzaku as tz
from close import GRADIENT, assert_close
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.fourierft import FourierDelta


def layers(method: tz.FourierFT) -> list[tuple[torch.nn.Module, FourierDelta]]:
    model = tiny("llama")
    tz.attach(model, method, "x", seed=0)
    found = manager_of(model).get("x").at()
    return [(model.get_submodule(path), layer) for path, layer in found if isinstance(layer, FourierDelta)]


@torch.no_grad()
def test_the_change_has_the_coefficients_at_their_places() -> None:
    module, layer = layers(tz.FourierFT(n_frequency=12, scaling=3.0))[0]
    # Of a real matrix the transform has each coefficient and, half as large, its mirror image.
    transformed = torch.fft.fft2(layer.delta(module)) / 3.0
    expected = torch.zeros(32, 32).flatten().index_put((layer.places,), layer.fourierft_spectrum).view(32, 32)
    mirrored = expected.flip(0, 1).roll((1, 1), (0, 1))
    assert_close(transformed.real, (expected + mirrored) / 2)
    assert torch.linalg.matrix_rank(layer.delta(module)) > 8


@pytest.mark.parametrize("tokens", [5, 500])
def test_tokens_or_the_matrix_are_transformed_to_one_effect(tokens: int) -> None:
    """Whichever is less: with its gradients."""
    module, layer = layers(tz.FourierFT(n_frequency=12, scaling=3.0))[0]
    layer.requires_grad_(True)
    x = torch.randn(tokens, 1, 32, requires_grad=True)
    found = layer.outputs(module, x, torch.zeros(tokens, 1, 32))
    expected = x @ layer.delta(module).t()
    assert_close(found, expected)
    wanted = [x, layer.fourierft_spectrum]
    own, whole = (torch.autograd.grad(each.square().sum(), wanted) for each in (found, expected))
    assert_close(own, whole, GRADIENT)


def test_modules_of_one_shape_share_their_places_and_a_seed_draws_others() -> None:
    first, second, *_ = (layer for module, layer in layers(tz.FourierFT(n_frequency=12)) if module.out_features == 32)
    assert torch.equal(first.places, second.places)
    assert not torch.equal(first.places, layers(tz.FourierFT(n_frequency=12, random_loc_seed=1))[0][1].places)


def test_another_number_by_pattern() -> None:
    found = layers(tz.FourierFT(n_frequency=12, n_frequency_pattern={"v_proj": 5}))
    assert {(module.out_features, len(layer.fourierft_spectrum)) for module, layer in found} == {(32, 12), (16, 5)}


def test_mistakes() -> None:
    with pytest.raises(tz.TanzakuError, match=r"n_frequency=2000 .*expected 1 to the 1024 numbers of its matrix"):
        layers(tz.FourierFT(n_frequency=2000))
