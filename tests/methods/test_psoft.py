"""PSOFT: a rotation within the weight's largest directions; its file holds them, and PEFT finds them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tanzaku as tz
from close import assert_close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.methods import lora_xs, psoft
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
    assert_close(layer.psoft_up @ layer.psoft_down * layer.scaling, u[:, :4] * s[:4] @ v[:4])


@torch.no_grad()
def test_a_randomised_decomposition_goes_by_its_seed() -> None:
    before = torch.get_rng_state()
    one, again, other = (first(psoft_svd="lowrank", random_seed=seed)[1] for seed in (3, 3, 4))
    assert torch.equal(one.psoft_up, again.psoft_up) and not torch.equal(one.psoft_up, other.psoft_up)
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


def test_a_file_holds_the_directions_that_it_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular vectors of another machine may have other signs: PEFT's files leave them to it, ours do not."""
    base = tiny("llama")
    adapter = tz.attach(base, tz.PSOFT(r=4), "a", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.save(base, "a", tmp_path / "a")
    given = batch(base)
    with torch.no_grad(), tz.route(base, ["a"] * len(given["input_ids"])):
        expected = base(**given).logits

    def turned(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, ...]:
        u, s, v = lora_xs.largest_singular(weight, r)
        signs = torch.tensor([1.0, -1.0]).repeat(r)[:r]
        return u * signs, s, v * signs[:, None]

    monkeypatch.setattr(psoft, "largest_singular", turned)
    again = tiny("llama")
    tz.load(again, tmp_path / "a", "a")
    with torch.no_grad(), tz.route(again, ["a"] * len(given["input_ids"])):
        assert_close(again(**given).logits, expected)
