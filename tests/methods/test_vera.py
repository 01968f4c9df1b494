"""VeRA: one projection for all layers, in files or drawn again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tanzaku as tz
from close import assert_close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.shared import Frozen
from tanzaku.methods.vera import VeraDelta


def test_all_layers_read_one_projection() -> None:
    model = tiny("llama")
    adapter = tz.attach(model, tz.VeRA(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=[]), "x")
    shared = [layer for _, layer in adapter.at() if isinstance(layer, Frozen)]
    assert len(shared) == 1 and {n: tuple(t.shape) for n, t in shared[0].named_buffers()} == {
        "vera_A": (4, 48),
        "vera_B": (32, 4),
    }
    assert tz.count(model, "x").trainable == sum(4 + 32 for _, layer in adapter.at() if isinstance(layer, VeraDelta))


@torch.no_grad()
@pytest.mark.parametrize("saved", [True, False])
def test_a_file_without_the_projection_draws_it_again(saved: bool, tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama")
    adapter = tz.attach(model, tz.VeRA(r=4, save_projection=saved, projection_prng_key=5), "x", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.save(model, "x", tmp_path / "x")
    keys = load_file(tmp_path / "x" / "adapter_model.safetensors").keys()
    assert ("base_model.vera_A" in keys) == saved
    tz.load(other, tmp_path / "x", "x")
    tz.activate(model, "x")
    tz.activate(other, "x")
    assert_close(other(**batch(model)).logits, model(**batch(model)).logits)


def test_the_projection_follows_the_model_to_another_type() -> None:
    model = tiny("llama")
    tz.attach(model, tz.VeRA(r=4), "x")
    model.double()
    frozen = next(layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, Frozen))
    assert {t.dtype for t in frozen.buffers()} == {torch.float64}
    assert not [name for name, p in model.named_parameters() if "vera_A" in name]
