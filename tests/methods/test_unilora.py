"""Uni-LoRA: every number of the matrices is one of theta's, each equally often; files need only theta and a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.methods.unilora import ProjectedDelta


def layers(adapter: tz.Adapter) -> list[ProjectedDelta]:
    return [layer for _, layer in adapter.at() if isinstance(layer, ProjectedDelta)]


@torch.no_grad()
def test_the_projection_keeps_lengths() -> None:
    """Each of theta's numbers stands at n places, divided by the root of n."""
    model = tiny("llama")
    settings = tz.UniLoRA(r=2, theta_d_length=15, init_weights=False, modules_to_save=[])
    adapter = tz.attach(model, settings, "x", seed=0)
    assert tz.count(model, "x").trainable == 15
    (theta,) = (p for _, p in adapter.trained())
    numbers = torch.cat([m.flatten() for layer in layers(adapter) for m in layer.matrices(model)])
    assert_close(numbers.norm(), theta.norm())
    places = torch.cat([layer.unilora_indices_A.flatten() for layer in layers(adapter)])
    places = torch.cat([places, *(layer.unilora_indices_B.flatten() for layer in layers(adapter))])
    counts = torch.bincount(places)
    assert len(counts) == 15 and counts.max() - counts.min() <= 1


@torch.no_grad()
@pytest.mark.parametrize("saved", [True, False])
def test_files(saved: bool, tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama")
    settings = tz.UniLoRA(r=2, theta_d_length=16, init_weights=False, save_indices=saved, proj_seed=4)
    tz.attach(model, settings, "x", seed=0)
    tz.save(model, "x", tmp_path / "x")
    keys = load_file(tmp_path / "x" / "adapter_model.safetensors").keys()
    assert "base_model.unilora_theta_d" in keys and any("indices" in key for key in keys) == saved
    tz.load(other, tmp_path / "x", "x")
    tz.activate(model, "x")
    tz.activate(other, "x")
    assert_close(other(**batch(model)).logits, model(**batch(model)).logits)


def test_places_outside_of_theta_are_no_file(tmp_path: Path) -> None:
    model = tiny("llama", "lm")
    tz.attach(model, tz.UniLoRA(r=2, theta_d_length=16, save_indices=True), "x", seed=0)
    tz.save(model, "x", tmp_path / "x")
    tz.detach(model)
    (tmp_path / "x" / "tanzaku.json").unlink()
    file = tmp_path / "x" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for key, tensor in tensors.items() if "indices_A" in key)[0, 0] = 16
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(tz.TanzakuError, match="unilora_indices_A lie outside of theta"):
        tz.load(model, tmp_path / "x", "x")
