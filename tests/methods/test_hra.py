"""HRA: its two products are the reflections one after another, and keep lengths."""

from __future__ import annotations

import pytest
import torch

import tanzaku as tz
from close import PASS, assert_close
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.hra import Reflections


def reflections(method: tz.HRA) -> Reflections:
    model = tiny("llama")
    tz.attach(model, method, "x", seed=0)
    return next(layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, Reflections))


@torch.no_grad()
@pytest.mark.parametrize("r", [1, 4, 7])
def test_two_products_are_the_reflections_in_order(r: int) -> None:
    layer = reflections(tz.HRA(r=r, init_weights=False))
    x = torch.randn(5, 32)
    expected = x
    for u in layer.hra_u.t().flip(0):  # the last one is nearest to the input
        u = u / u.norm()
        expected = expected - 2 * (expected @ u)[:, None] * u
    found = layer.turned(x, training=False)
    assert_close(found, expected)
    assert_close(found.norm(dim=1), x.norm(dim=1))


@torch.no_grad()
def test_orthogonal_planes_are_one_reflection_of_their_span() -> None:
    layer = reflections(tz.HRA(r=3, apply_GS=True))
    within = layer.hra_u.t()  # what lies in the span is turned round, and what is orthogonal to it stays
    assert_close(layer.turned(within, training=False), -within, 4 * PASS)
    across = torch.linalg.svd(layer.hra_u, full_matrices=True)[0][:, 3:].t()
    assert_close(layer.turned(across, training=False), across, 4 * PASS)


def test_an_odd_number_does_not_start_as_the_identity_and_an_even_one_does() -> None:
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert_close(reflections(tz.HRA(r=4)).turned(x, training=False), x)
        assert not torch.allclose(reflections(tz.HRA(r=3)).turned(x, training=False), x, atol=1e-2)


def test_mistakes() -> None:
    with pytest.raises(tz.TanzakuError, match="hra: found r=0, expected 1 reflection or more"):
        tz.attach(tiny("llama"), tz.HRA(r=0), "x")
    with pytest.raises(tz.TanzakuError, match="expected 32 or less with apply_GS"):
        tz.attach(tiny("llama"), tz.HRA(r=40, apply_GS=True), "x")
