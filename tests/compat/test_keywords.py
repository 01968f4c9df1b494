"""No keyword is silently ignored: what is not supported is an error that says what is."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import peft
import pytest

from compat.program import CONFIGS
from models import tiny
from tanzaku import TanzakuError
from tanzaku.compat import peft as compat
from tanzaku.compat.peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tanzaku.compat.peft.more import MORE

KINDS = [
    *(text.partition("(")[0] for text in CONFIGS.values()),
    "CPTConfig",
    *(n for n in MORE if n.endswith("Config")),
]
# They say how something is done that other keywords, which are errors here, ask for.
INERT = ("megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "corda_config")
NEEDED = {
    "AdaLoraConfig": {"total_step": 10},
    "AdaptionPromptConfig": {"adapter_len": 2, "adapter_layers": 1},
    "CPTConfig": {"task_type": "CAUSAL_LM"},
    **{f"{kind}Config": {"num_virtual_tokens": 2} for kind in ("PromptTuning", "PromptEncoder", "PrefixTuning")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_keyword_of_pefts_is_supported_or_an_error(kind: str) -> None:
    needed = NEEDED.get(kind, {})
    ours, theirs = getattr(compat, kind), getattr(peft, kind)
    plain, known = theirs(**needed), {field.name for field in dataclasses.fields(ours)}
    for field in dataclasses.fields(theirs):
        value = getattr(plain, field.name)
        if field.name in known or field.name == "peft_type":
            continue
        ours(**needed, **{field.name: value})  # PEFT's own default changes nothing
        if field.name not in INERT:
            with pytest.raises(TanzakuError, match=rf"{kind}: found {field.name}=True, which is not supported"):
                ours(**needed, **{field.name: True})
    for name in known & {field.name for field in dataclasses.fields(theirs)}:
        if name not in ("target_modules", "exclude_modules", "peft_version", "lora_dropout", *needed):
            assert getattr(ours(**needed), name) == getattr(plain, name), f"the default of {name}"


BAD: dict[str, tuple[Any, str]] = {
    "a typo": (lambda: LoraConfig(lora_alhpa=4), "did you mean 'lora_alpha'"),
    "a later typo": (lambda: setattr(LoraConfig(), "ranks", 4), "LoraConfig has no setting 'ranks'"),
    "a type": (lambda: LoraConfig(r="8"), "r is '8', expected int"),
    "a task": (lambda: LoraConfig(task_type="SEQ_CLASS"), "Invalid task type: 'SEQ_CLASS'.*did you mean 'SEQ_CLS'"),
    "no tokens": (
        lambda: get_peft_model(tiny("llama"), compat.PromptTuningConfig()),
        "num_virtual_tokens is missing",
    ),
    "no method": (lambda: PeftConfig(), "expected one of AdaLoraConfig"),
    "another method": (lambda: PeftConfig.from_peft_type(peft_type="OSF"), "found peft_type='OSF'"),
    "beginning": (lambda: wrap(init_lora_weights="loftq"), "loftq"),
    "no configuration": (lambda: get_peft_model(tiny("llama"), {"r": 8}), "found dict"),
    "mixed": (lambda: get_peft_model(tiny("llama"), LoraConfig(), mixed=True), "mixed=True"),
    "twice": (lambda: get_peft_model(wrap(), LoraConfig()), "add_adapter"),
    "the same name": (lambda: wrap().add_adapter("default", LoraConfig()), "already"),
    "no such adapter": (lambda: wrap().set_adapter("defualt"), "did you mean 'default'"),
    "a pickle": (lambda: wrap().save_pretrained("x", safe_serialization=False), "safe_serialization=False"),
    "the hub": (lambda: wrap().save_pretrained("x", push_to_hub=True), "push_to_hub=True"),
    "no directory": (lambda: PeftModel.from_pretrained(tiny("llama"), "no/where"), "no/where"),
    "no repository": (lambda: PeftModel.from_pretrained(tiny("llama"), "no/where", token="t"), "no directory on this"),
    "a keyword": (lambda: PeftModel.from_pretrained(tiny("llama"), "x", tokn="t"), "tokn='t'"),
    "a pickle to read": (lambda: wrap().load_adapter("x", "b", use_safetensors=False), "use_safetensors=False"),
    "names and rows": (lambda: wrap()(**rows(), adapter_names=["default"] * 3), "got 3 and 2 respectively"),
    "tasks": (lambda: wrap()(**rows(), task_ids=1), "task_ids=1"),
    "allocation": (lambda: wrap().update_and_allocate(1), "adalora"),
}


def wrap(**settings: Any) -> PeftModel:
    return get_peft_model(tiny("llama"), LoraConfig(task_type="SEQ_CLS", **settings))


def rows() -> dict[str, Any]:
    import torch

    return {"input_ids": torch.ones(2, 3, dtype=torch.long)}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, expected = BAD[name]
    with pytest.raises(TanzakuError, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ImportError, match=r"no 'OSFConfig'.*; it has AdaLoraConfig"):
        from tanzaku.compat.peft import OSFConfig  # noqa: F401
    with pytest.raises(ImportError, match="no 'inject_adapter_in_model'"):
        getattr(compat, "inject_adapter_in_model")  # noqa: B009
    with pytest.raises(AttributeError, match=r"add_weighed_adapter.*did you mean 'add_weighted_adapter'"):
        wrap().add_weighed_adapter()
    assert not hasattr(wrap(), "hotswap_adapter")


def test_names_are_where_pefts_are() -> None:
    for module, names in {
        "peft_model": ["PeftModel", "PeftModelForSequenceClassification", "PeftModelForCausalLM"],
        "config": ["PeftConfig"],
        "mapping": ["get_peft_config", "PEFT_TYPE_TO_CONFIG_MAPPING"],
        "utils": ["TaskType", "PeftType", "get_peft_model_state_dict", "set_peft_model_state_dict"],
        "auto": ["AutoPeftModelForCausalLM"],
    }.items():
        for library in ("peft", "tanzaku.compat.peft"):
            found = importlib.import_module(f"{library}.{module}")
            assert all(hasattr(found, name) for name in names), f"{library}.{module}"
    assert all(hasattr(peft, name) for name in compat.__all__)
