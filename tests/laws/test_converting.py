"""An adapter as the nearest one of another method, and what is lost of it."""

import pytest
import torch
from torch import nn
from variants import attached, bamboo, logits, opened

import tanzaku as tz
from close import assert_close
from models import batch, tiny
from tanzaku.core.manager import manager_of

WHOLE = {"lora": 2, "adalora": 3, "ia3": 32}  # ranks that hold all of a change


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("kind", "head"), [("llama", "cls"), ("gpt2", "lm"), ("bert", "cls")])
def test_with_rank_enough_nothing_is_lost(name, kind, head, tmp_path):
    """The same logits, a classifier's own head included, and a file of plain LoRA."""
    model = bamboo(kind, head)
    attached(model, name)
    given = batch(model)
    expected = logits(model, [name] * 4, given)
    found = tz.convert(model, name, "lora", r=48)
    assert found.adapter.name == f"{name}-lora" and found.adapter.method.name == "lora"
    matrices = {key: lost for key, lost in found.lost.items() if not key.endswith("bias")}
    assert max(matrices.values()) < 1e-3
    if matrices.keys() == found.lost.keys():
        assert_close(logits(model, [f"{name}-lora"] * 4, given), expected)
    assert_close(logits(model, [name] * 4, given), expected)
    tz.save(model, f"{name}-lora", tmp_path)
    tz.load(model, tmp_path, "again")


def test_of_all_changes_of_a_rank_it_is_the_nearest():
    model = tiny("llama", "lm")
    opened(tz.attach(model, tz.LoRA(r=6, target_modules=["q_proj"]), "a", seed=0))
    found = tz.convert(model, "a", "lora", "b", r=2, lora_alpha=5)
    for path, layer in manager_of(model).get("a").at():
        module = model.get_submodule(path)
        s = torch.linalg.svdvals(layer.delta(module))
        lost = (s[2:].square().sum() / s.square().sum()).sqrt()
        assert found.lost[f"{path}.weight"] == pytest.approx(float(lost), rel=1e-4)
    assert "at most" in str(found)


def test_other_kinds_of_modules_and_dora():
    """Embeddings, a convolution, and a change that LoRA turns into a direction and a magnitude."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv, self.linear = nn.Embedding(7, 8), nn.Conv2d(1, 3, 2), nn.Linear(7, 4)

        def forward(self, ids):
            return self.linear(self.conv(self.table(ids)[:, None]).mean(1))

    model, ids = Net().eval(), torch.arange(6).view(2, 3)
    opened(tz.attach(model, tz.LoRA(r=2, target_modules=["table", "conv", "linear"]), "a", seed=0))
    tz.activate(model, "a")
    expected = model(ids)
    for settings in ({}, {"use_dora": True}):
        found = tz.convert(model, "a", "lora", "b", r=4, **settings)
        assert max(found.lost.values()) < 1e-4
        tz.activate(model, "b")
        assert_close(model(ids), expected)
        tz.activate(model, None)
        tz.detach(model, "b")


def test_full_fine_tuning_as_lora():
    """What it does to matrices is nearly held, and what it does to norms is said to be lost."""
    model = bamboo()
    attached(model, "full")
    given = batch(model)
    expected = logits(model, ["full"] * 4, given)
    found = tz.convert(model, "full", "lora", r=128)
    gone = {name for name, lost in found.lost.items() if lost == 1}
    assert gone and all("norm" in name or name.endswith("bias") for name in gone)
    assert max(lost for name, lost in found.lost.items() if name not in gone) < 1e-3
    own = dict(manager_of(model).get("full").at())[""].tensors
    with torch.no_grad():
        for name in gone:
            model.get_parameter(name).copy_(own[name])
    assert_close(logits(model, ["full-lora"] * 4, given), expected)


def test_what_cannot_be_converted_says_so():
    model = bamboo()
    for name in ("prompt_tuning", "lora", "bitfit"):
        attached(model, name)
    before = tz.adapters(model)
    for name, to, settings, match in (
        ("prompt_tuning", "lora", {}, "prompt_tuning is no change of weights, so 'prompt_tuning' is nothing"),
        ("lora", "ia3", {}, "ia3 cannot hold a given change of weights; expected one of lora"),
        ("lora", "lara", {}, "did you mean 'lora'"),
        ("bitfit", "lora", {}, r"'bitfit' \(bitfit\) changes no matrix"),
        ("lora", "lora", {"r": 0}, "a rank of 1 or more"),
        ("lora", "lora", {"init_lora_weights": "pissa"}, "expected init_lora_weights=true"),
    ):
        with pytest.raises(tz.TanzakuError, match=match):
            tz.convert(model, name, to, "new", **settings)
    assert tz.adapters(model) == before
