"""SHiRA: how many numbers of a matrix, where they are, and files that say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tanzaku as tz
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.shira import SparseDelta


def layers(model: torch.nn.Module) -> list[SparseDelta]:
    return [layer for _, layer in manager_of(model).get("x").at() if isinstance(layer, SparseDelta)]


@torch.no_grad()
def test_as_many_numbers_as_lora_and_no_other_changes() -> None:
    model = tiny("llama")
    tz.attach(model, tz.SHiRA(r=2, random_seed=3), "x", seed=0)
    tz.attach(model, tz.LoRA(r=2), "lora", seed=0)
    assert tz.count(model, "x").trainable == tz.count(model, "lora").trainable
    layer = layers(model)[0]
    layer.shira_weight.fill_(1.0)
    delta = layer.delta(model.model.layers[0].self_attn.q_proj)
    assert delta.sum() == len(layer.shira_weight) == 2 * (32 + 32) and set(delta.flatten().tolist()) == {0.0, 1.0}


def test_places_outside_of_the_matrix_are_no_file(tmp_path: Path) -> None:
    model = tiny("llama", "lm")
    tz.attach(model, tz.SHiRA(r=2), "x", seed=0)
    tz.save(model, "x", tmp_path / "x")
    tz.detach(model)
    (tmp_path / "x" / "tanzaku.json").unlink()
    file = tmp_path / "x" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("shira_indices"))
    tensors[key][0, 0] = 32
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(tz.TanzakuError, match="shira_indices lie outside of a matrix of 32 x 32"):
        tz.load(model, tmp_path / "x", "x")


def test_places_stay_whole_numbers_in_half_precision() -> None:
    model = tiny("llama")
    tz.attach(model, tz.SHiRA(r=2), "x", seed=0)
    before = layers(model)[0].shira_indices.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layers(model)[0].shira_indices, before)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (tz.SHiRA(r=17), "r=17 for .*q_proj, expected 1 to 16, of a matrix of 32 x 32"),
        (tz.SHiRA(r=2, mask_type="mine"), "mask_type='mine', expected 'random'"),
    ],
)
def test_mistakes(method: tz.SHiRA, match: str) -> None:
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(tiny("llama"), method, "x")
