"""X-LoRA under PEFT's names: of the same directories the same parameters and logits, and files both ways."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import tanzaku as tz
import tanzaku.compat.peft as compat
from close import GRADIENT, assert_close, close
from interop.test_xlora import SETTINGS, experts, in_peft, reopened, said
from models import batch, tiny


@pytest.mark.parametrize("case", SETTINGS)
def test_it_is_pefts(case: str, tmp_path: Path) -> None:
    base = tiny("llama", "lm", use_cache=False)
    fresh, given = copy.deepcopy(base), batch(base, padding="right")
    folders = experts(base, tmp_path)
    theirs = in_peft(base, folders, SETTINGS[case])
    config = compat.XLoraConfig(adapters=folders, hidden_size=32, task_type="CAUSAL_LM", **SETTINGS[case])
    ours = compat.get_peft_model(copy.deepcopy(fresh), config).eval()
    assert config.adapters == folders and config.to_dict()["adapters"] == folders
    own, others = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs))
    assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in others.items()}
    assert ours.get_nb_trainable_parameters()[0] == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(others[name])
    expected = said(theirs, given).detach()
    assert_close(said(ours, given), expected)
    assert not close(expected, said(fresh, given))
    for model in (ours, theirs):
        said(model, given).square().mean().backward()
    assert_close({n: p.grad for n, p in own.items()}, {n: p.grad for n, p in others.items()}, GRADIENT)
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert_close(said(reopened(fresh, tmp_path / "ours"), given), expected)
        again = compat.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "ours").eval()
        assert_close(said(again, given), expected)
    ours.delete_adapter("default")
    assert tz.adapters(ours.get_base_model()) == []  # those that it brought along go with it


def test_what_is_no_x_lora_says_so(tmp_path: Path) -> None:
    base = tiny("llama", "lm", use_cache=False)
    with pytest.raises(tz.TanzakuError, match="found adapters="):
        compat.get_peft_model(base, compat.XLoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(tz.TanzakuError, match="use_trainable_adapters=True, which is not supported"):
        compat.XLoraConfig(adapters={}, use_trainable_adapters=True)
    nowhere = {"0": str(tmp_path / "a"), "1": str(tmp_path / "b")}
    with pytest.raises(tz.TanzakuError):
        compat.get_peft_model(base, compat.XLoraConfig(task_type="CAUSAL_LM", adapters=nowhere))
    assert tz.adapters(base) == []
