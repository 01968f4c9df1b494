"""PVeRA: numbers that are drawn in training, for each job its own, and their means elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tanzaku as tz
from close import assert_close, close
from interop.oracle import copy_trained, in_peft, inputs, logits, scatter
from models import batch, tiny
from tanzaku.core.shared import Frozen
from tanzaku.errors import TanzakuError


def test_one_draw_is_pefts() -> None:
    """With one target the same seed draws the same numbers in the same order, after those of dropout."""
    base = tiny("llama", "cls")
    given = inputs(base, "pvera")
    settings = {"r": 4, "pvera_dropout": 0.3, "target_modules": ["q_proj", "down_proj"]}
    theirs = in_peft(base, "pvera", settings).train()
    adapter = tz.attach(base, tz.PVeRA.from_settings(settings), "a")
    scatter([p for _, p in adapter.trained()])
    copy_trained(adapter, theirs)
    tz.activate(base, "a")
    base.train()
    outs = []
    for model in (base, theirs):
        torch.manual_seed(5)
        outs.append(logits(model, given))
    assert_close(outs[0], outs[1])
    assert not close(outs[0], logits(base.eval(), given))


@torch.no_grad()
@pytest.mark.parametrize("saved", [True, False])
def test_a_file_without_the_projection_draws_it_again(saved: bool, tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama")
    adapter = tz.attach(model, tz.PVeRA(r=4, save_projection=saved, projection_prng_key=5), "x", seed=0)
    shared = next(layer for _, layer in adapter.at() if isinstance(layer, Frozen))
    assert {n: tuple(t.shape) for n, t in shared.named_buffers()} == {"pvera_A": (8, 32), "pvera_B": (32, 4)}
    scatter([p for _, p in adapter.trained()])
    tz.save(model, "x", tmp_path / "x")
    keys = load_file(tmp_path / "x" / "adapter_model.safetensors").keys()
    assert ("base_model.pvera_A" in keys) == saved
    tz.load(other, tmp_path / "x", "x")
    tz.activate(model, "x")
    tz.activate(other, "x")
    assert_close(other(**batch(model)).logits, model(**batch(model)).logits)


def test_numbers_drawn_outside_of_training_are_refused() -> None:
    with pytest.raises(TanzakuError, match="found sample_at_inference=True, expected False"):
        tz.attach(tiny("llama"), tz.PVeRA(r=4, sample_at_inference=True), "x")
