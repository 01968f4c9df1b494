"""X-LoRA beside HF PEFT's: logits from the same weights, and files both ways. PEFT finds its adapters in models alone
whose layers lie below "model."."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tanzaku as tz
from close import assert_close, close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.errors import TanzakuError

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"layerwise_scalings": True, "softmax_temperature": 0.5, "global_scaling_weight": 2.0},
    "deep": {"xlora_depth": 3, "xlora_size": 8, "enable_softmax": False},
    "no dropout": {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0},
    "best": {"top_k_lora": 2},
    "shares of the best": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
}
EXPERTS = [
    tz.LoRA(r=2, modules_to_save=[]),
    tz.LoRA(r=3, lora_alpha=5, modules_to_save=[]),
    tz.LoRA(r=1, modules_to_save=[]),
]


def experts(base: Any, folder: Path) -> dict[str, str]:
    """Directories of trained LoRA adapters, by the numbers that PEFT has for them."""
    out = {}
    for number, method in enumerate(EXPERTS):
        adapter = tz.attach(base, copy.deepcopy(method), f"e{number}", seed=number)
        scatter([p for _, p in adapter.trained()], seed=number)
        tz.save(base, f"e{number}", folder / f"e{number}")
        out[str(number)] = str(folder / f"e{number}")
    tz.detach(base)
    return out


def in_peft(base: Any, folders: dict[str, str], settings: dict[str, Any]) -> peft.PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = peft.XLoraConfig(adapters=folders, hidden_size=32, task_type="CAUSAL_LM", **settings)
        theirs = peft.get_peft_model(copy.deepcopy(base), made).eval()
    scatter([p for n, p in theirs.named_parameters() if "classifier" in n])
    return theirs


def saved(theirs: peft.PeftModel, folder: Path) -> None:
    """What PEFT writes, with its gate by the names that PEFT reads. It leaves out the gate's first layer, 0, since one
    of the adapters is called so, too."""
    theirs.save_pretrained(folder)
    gate = {name: p.detach().clone() for name, p in theirs.named_parameters() if "classifier" in name}
    assert "base_model.internal_xlora_classifier.layers.0.weight" in gate
    assert not any(".layers.0." in name for name in load_file(folder / "adapter_model.safetensors"))
    save_file(gate, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def reopened(base: Any, folder: Path, name: str = "parts") -> peft.PeftModel:
    """What PEFT reads, told where the adapters are, as it wants to be."""
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.adapters = {key: str(folder / path) for key, path in config.adapters.items()}
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, config=config).eval()


def said(model: Any, given: dict[str, Tensor]) -> Tensor:
    return model(**given).logits[given["attention_mask"].bool()]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("case", SETTINGS)
def test_both_ways(kind: str, case: str, tmp_path: Path) -> None:
    base = tiny(kind, "lm", use_cache=False)
    fresh, given = copy.deepcopy(base), batch(base, padding="right")
    folders = experts(base, tmp_path)
    theirs = in_peft(base, folders, SETTINGS[case])
    saved(theirs, tmp_path / "theirs")
    expected, bare = said(theirs, given), said(base, given)
    assert not close(expected, bare)
    assert tz.load(base, tmp_path / "theirs", "a").method.name == "xlora"
    tz.activate(base, "a")
    assert_close(said(base, given), expected)
    tz.save(base, "a", tmp_path / "copy")
    assert_close(said(reopened(fresh, tmp_path / "copy"), given), expected)
    tz.detach(base)
    assert tz.load(base, tmp_path / "copy", "b").method.name == "xlora"
    tz.activate(base, "b")
    assert_close(said(base, given), expected)


def test_what_peft_writes_by_itself_lacks_the_gate(tmp_path: Path) -> None:
    base = tiny("llama", "lm", use_cache=False)
    in_peft(base, experts(base, tmp_path), {}).save_pretrained(tmp_path / "theirs")
    with pytest.raises(TanzakuError, match=r"missing base_model.internal_xlora_classifier.layers.0.weight"):
        tz.load(base, tmp_path / "theirs", "a")
    assert tz.adapters(base) == []


@pytest.mark.parametrize("where", [".", "no/where"])
def test_directories_that_hold_no_expert(where: str, tmp_path: Path) -> None:
    base = tiny("llama", "lm", use_cache=False)
    saved(in_peft(base, experts(base, tmp_path), {}), tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    told = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**told, "adapters": {"0": where, "1": where}}), encoding="utf-8")
    expected = "is made of other adapters itself" if where == "." else r"uses '0', of which there is no adapter in no"
    with pytest.raises(TanzakuError, match=expected):
        tz.load(base, tmp_path / "theirs", "a")
