"""VB-LoRA: pieces are mixtures of one bank, and files may hold the mixtures alone, as HF PEFT's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tanzaku as tz
from close import assert_close
from interop.oracle import in_peft, reopened, scatter
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.vblora import MixedDelta, VectorBank

SETTINGS: dict[str, Any] = {"r": 2, "vector_length": 8, "num_vectors": 6, "topk": 3, "init_vector_bank_bound": 1.0}


@torch.no_grad()
def test_a_piece_is_a_mixture_of_the_largest() -> None:
    model = tiny("llama")
    adapter = tz.attach(model, tz.VBLoRA(**SETTINGS), "x", seed=0)
    banks = [layer for _, layer in adapter.at() if isinstance(layer, VectorBank)]
    assert len(banks) == 1
    bank = banks[0].vblora_vector_bank
    layer = next(layer for _, layer in adapter.at() if isinstance(layer, MixedDelta))
    layer.vblora_logits_A[1, 2] = torch.tensor([0.0, 1.0, -5.0, 1.0, -5.0, 1.0])
    layer.vblora_logits_B[3, 1] = torch.tensor([9.0, 9.0, 9.0, -40.0, -40.0, -40.0])
    a, b = layer.matrices(model)
    assert_close(a[1, 16:24], bank[[1, 3, 5]].mean(0))
    assert_close(b[24:32, 1], bank[:3].mean(0))


@torch.no_grad()
def test_files_of_mixtures_alone(tmp_path: Path) -> None:
    """Much smaller, and to the same effect, both ways."""
    base, fresh = tiny("llama", "lm"), tiny("llama", "lm")
    given = batch(base)
    settings = {**SETTINGS, "save_only_topk_weights": True}
    theirs = in_peft(base, "vblora", settings)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(**given).logits
    tz.load(base, tmp_path / "theirs", "x")
    tz.activate(base, "x")
    assert_close(base(**given).logits, expected)
    tz.save(base, "x", tmp_path / "ours")
    names = {key.rpartition(".")[2] for key in load_file(tmp_path / "ours" / "adapter_model.safetensors")}
    assert names == {
        "vblora_vector_bank",
        *(f"vblora_logits_{side}_topk_{what}" for side in "AB" for what in ("indices", "weights")),
    }
    assert_close(reopened(fresh, tmp_path / "ours")(**given).logits, expected)


def test_what_is_read_of_mixtures_alone_can_be_trained_on(tmp_path: Path) -> None:
    model = tiny("llama", "lm")
    tz.attach(model, tz.VBLoRA(**SETTINGS, save_only_topk_weights=True), "x", seed=0)
    tz.save(model, "x", tmp_path / "x")
    adapter = tz.load(model, tmp_path / "x", "y")
    scatter([p for _, p in adapter.trained()], scale=1e-3)
    tz.activate(model, "y")
    model(**batch(model)).logits.square().sum().backward()
    for name, parameter in adapter.trained():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for layer in manager_of(model).get("y").children():
        assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"vector_length": 6}, "vector_length=6 for .*expected a divisor of 32"),
        ({"topk": 7}, "topk=7, expected 1 to num_vectors=6"),
    ],
)
def test_mistakes(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), tz.VBLoRA(**{**SETTINGS, **settings}), "x")
