"""LoRA-XS: the frame is the weight's largest directions, and comes with the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tanzaku as tz
from close import assert_close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.lora_xs import CoreDelta


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_identity_in_the_middle_adds_the_best_approximation(kind: str) -> None:
    model = tiny(kind, "lm")
    adapter = tz.attach(model, tz.LoRAXS(r=4, lora_alpha=4), "x")
    path, layer = next(adapter.at())
    assert isinstance(layer, CoreDelta) and tz.count(model, "x").trainable == 16 * len([*adapter.at()])
    layer.lora_xs_R.copy_(torch.eye(4))
    module = model.get_submodule(path)
    weight = module.weight if kind == "llama" else module.weight.t()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert_close(layer.delta(module), u[:, :4] * s[:4] @ v[:4])


@torch.no_grad()
def test_a_file_brings_its_frame(tmp_path: Path) -> None:
    """Singular vectors may come out with other signs elsewhere: those of the file are in force."""
    model, other = tiny("llama"), tiny("llama")
    adapter = tz.attach(model, tz.LoRAXS(r=4), "x", seed=0)
    scatter([p for _, p in adapter.trained()])
    for _, layer in adapter.at():
        if isinstance(layer, CoreDelta):
            layer.lora_xs_A.neg_()
    tz.save(model, "x", tmp_path / "x")
    tz.load(other, tmp_path / "x", "x")
    tz.activate(model, "x")
    tz.activate(other, "x")
    assert_close(other(**batch(model)).logits, model(**batch(model)).logits)
    assert not [name for name, _ in manager_of(model).get("x").trained() if "lora_xs_A" in name]


def test_mistakes() -> None:
    with pytest.raises(tz.TanzakuError, match=r"lora_xs: found r=20 for .*v_proj, expected 1 to its 16 singular"):
        tz.attach(tiny("llama"), tz.LoRAXS(r=20), "x")
