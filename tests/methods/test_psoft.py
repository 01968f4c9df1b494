"""PSOFT: a rotation within the weight's largest directions, which its file does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from interop.oracle import scatter
from models import tiny
from tanzaku.methods.psoft import PlaneRotation


def first(**settings: Any) -> tuple[torch.nn.Module, PlaneRotation]:
    model = tiny("llama")
    adapter = tz.attach(model, tz.PSOFT(**{"r": 4, **settings}), "x", seed=0)
    scatter([p for _, p in adapter.trained()])
    path, layer = next(adapter.at())
    assert isinstance(layer, PlaneRotation)
    return model.get_submodule(path), layer


@torch.no_grad()
def test_angles_and_lengths_in_the_plane_stay() -> None:
    """A rotation alone keeps the singular values of the weight."""
    module, layer = first(psoft_mag_a=False, psoft_mag_b=False)
    core = layer.core()
    assert_close(core @ core.t(), torch.eye(4))
    changed = module.weight + layer.delta(module)
    assert (changed - module.weight).abs().max() > 1e-2
    assert_close(torch.linalg.svdvals(changed), torch.linalg.svdvals(module.weight))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"ab_svd_init": "pissa_init"}, {"psoft_alpha": 7}], ids=str)
def test_the_frame_times_one_is_the_weights_own_part(settings: dict[str, Any]) -> None:
    module, layer = first(**settings)
    u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
    assert_close(layer.up @ layer.down * layer.scaling, u[:, :4] * s[:4] @ v[:4])


@torch.no_grad()
def test_a_randomised_decomposition_goes_by_its_seed() -> None:
    before = torch.get_rng_state()
    one, again, other = (first(psoft_svd="lowrank", random_seed=seed)[1] for seed in (3, 3, 4))
    assert torch.equal(one.up, again.up) and not torch.equal(one.up, other.up)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 20}, "r=20 for .*v_proj, expected 2 to its 16 singular values"),
        ({"psoft_svd": "half"}, "psoft_svd='half', expected 'full' or 'lowrank'"),
        ({"psoft_alpha": 0}, "psoft_alpha=0, expected a number above 0"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        first(**settings)
