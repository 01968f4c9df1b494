"""TinyLoRA: how many vectors there are, what they weigh, and files without the random matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tanzaku as tz
from close import assert_close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.methods.tinylora import TinyDelta


@pytest.mark.parametrize(("tying", "vectors"), [(0.0, 4), (0.5, 2), (0.7, 1), (1.0, 1)])
def test_modules_share_vectors(tying: float, vectors: int) -> None:
    model = tiny("llama")
    adapter = tz.attach(model, tz.TinyLoRA(u=3, weight_tying=tying, modules_to_save=[]), "x")
    assert tz.count(model, "x").trainable == 3 * vectors
    groups = [layer.group for _, layer in adapter.at() if isinstance(layer, TinyDelta)]
    assert groups == sorted(groups) and len(set(groups)) == vectors


@torch.no_grad()
def test_the_change_is_of_the_weights_own_directions() -> None:
    model = tiny("llama")
    adapter = tz.attach(model, tz.TinyLoRA(r=2, u=3, init_weights="uniform"), "x", seed=0)
    for path, layer in adapter.at():
        if isinstance(layer, TinyDelta):
            u, _, v = torch.linalg.svd(model.get_submodule(path).weight, full_matrices=False)
            delta = layer.delta(model.get_submodule(path))
            assert delta.abs().max() > 1e-4
            assert_close(u[:, :2] @ (u[:, :2].t() @ delta @ v[:2].t()) @ v[:2], delta)


@torch.no_grad()
@pytest.mark.parametrize("saved", [True, False])
def test_random_matrices_are_saved_or_drawn_again(saved: bool, tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama")
    adapter = tz.attach(model, tz.TinyLoRA(u=3, save_projection=saved, projection_seed=9), "x", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.save(model, "x", tmp_path / "x")
    found = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert any("tinylora_P" in key for key in found) == saved
    tz.load(other, tmp_path / "x", "x")
    tz.activate(model, "x")
    tz.activate(other, "x")
    assert_close(other(**batch(model)).logits, model(**batch(model)).logits)
