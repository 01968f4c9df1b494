"""RandLoRA: bases are HF PEFT's, and add up to a change of full rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tanzaku as tz
from close import assert_close
from interop.oracle import in_peft, scatter
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.shared import Frozen
from tanzaku.methods.randlora import RandomBases


@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_bases_are_pefts(kind: dict[str, Any]) -> None:
    settings = {"r": 5, "projection_prng_key": 7, "target_modules": ["q_proj", "down_proj"], **kind}
    model = tiny("llama")
    theirs: Any = in_peft(model, "randlora", settings).base_model
    tz.attach(model, tz.RandLoRA(**settings), "x")
    frozen = next(layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, Frozen))
    for name, tensor in frozen.named_buffers():
        assert_close(tensor, getattr(theirs, name)["default"].float())


@torch.no_grad()
def test_a_change_of_full_rank() -> None:
    model = tiny("llama")
    adapter = tz.attach(model, tz.RandLoRA(r=8), "x", seed=0)
    scatter([p for _, p in adapter.trained()])
    for path, layer in adapter.at():
        if isinstance(layer, RandomBases):
            delta = layer.delta(model.get_submodule(path))
            assert torch.linalg.matrix_rank(delta) == min(delta.shape)


@torch.no_grad()
def test_a_file_without_bases_draws_them_again(tmp_path: Path) -> None:
    model, other = tiny("llama"), tiny("llama")
    adapter = tz.attach(model, tz.RandLoRA(r=8, randlora_alpha=8, save_projection=False), "x", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.save(model, "x", tmp_path / "x")
    assert not [key for key in load_file(tmp_path / "x" / "adapter_model.safetensors") if "randlora_A" in key]
    tz.load(other, tmp_path / "x", "x")
    tz.activate(model, "x")
    tz.activate(other, "x")
    assert_close(other(**batch(model)).logits, model(**batch(model)).logits)
