"""Configurations: what PEFT takes, in its order, and what files of other versions hold."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedModel

from compat.test_keywords import KINDS, NEEDED
from models import tiny
from tanzaku import TanzakuError
from tanzaku.compat import peft as compat
from tanzaku.compat.peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model

ENUMS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"task_type": TaskType.CAUSAL_LM},
    "PromptTuningConfig": {
        "task_type": TaskType.CAUSAL_LM,
        "prompt_tuning_init": compat.PromptTuningInit.RANDOM,
        "num_virtual_tokens": 3,
    },
    "PromptEncoderConfig": {
        "task_type": TaskType.CAUSAL_LM,
        "encoder_reparameterization_type": compat.PromptEncoderReparameterizationType.LSTM,
        "num_virtual_tokens": 3,
    },
    "PrefixTuningConfig": {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 3},
    "IA3Config": {"task_type": TaskType.CAUSAL_LM},
    "AdaLoraConfig": {"task_type": TaskType.CAUSAL_LM, "total_step": 5},
    "AdaptionPromptConfig": {"task_type": TaskType.CAUSAL_LM, "adapter_len": 2, "adapter_layers": 1},
}


@pytest.mark.parametrize("kind", ENUMS)
def test_enums_are_saved(kind: str, tmp_path: Path) -> None:
    """In the configuration, the adapter's files and the card's YAML."""
    config = getattr(compat, kind)(**ENUMS[kind])
    config.save_pretrained(tmp_path / "config")
    assert getattr(compat, kind).from_pretrained(tmp_path / "config") == config
    model = get_peft_model(tiny("llama", "lm"), config)
    model.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    for key, value in ENUMS[kind].items():
        assert settings[key] == (value.value if hasattr(value, "value") else value)
    front = yaml.safe_load((tmp_path / "model" / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "peft"
    again = PeftModel.from_pretrained(tiny("llama", "lm"), tmp_path / "model")
    assert again.peft_config["default"].task_type == TaskType.CAUSAL_LM


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_pefts(kind: str) -> None:
    ours, theirs = getattr(compat, kind), getattr(peft, kind)
    order = list(inspect.signature(theirs).parameters)
    assert list(inspect.signature(ours).parameters) == order
    needed = {"total_step": 10} if kind == "AdaLoraConfig" else {}
    plain, found = theirs("CAUSAL_LM", None, **needed), ours("CAUSAL_LM", None, **needed)
    assert found.task_type == plain.task_type and found.peft_type == plain.peft_type
    with pytest.raises(TanzakuError, match="task_type is given twice"):
        ours("CAUSAL_LM", task_type="CAUSAL_LM")
    assert LoraConfig("CAUSAL_LM", None, None, None, None, None, False, 4, ["q_proj"]).r == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_may_be_named(kind: str) -> None:
    config = getattr(compat, kind)(**NEEDED.get(kind, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = getattr(compat, kind)(peft_type=config.peft_type.value, **NEEDED.get(kind, {}))
    assert again == config and again.peft_type is config.peft_type
    with pytest.warns(UserWarning, match="peft_type='OSF' has no effect"):
        getattr(compat, kind)(peft_type="OSF", **NEEDED.get(kind, {}))
    assert compat.get_peft_config({"peft_type": config.peft_type, **NEEDED.get(kind, {})}) == config


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_later_version(kind: str, tmp_path: Path) -> None:
    """A key that says nothing is passed over, aloud; one that says something could change what the adapter computes."""
    config = getattr(compat, kind)(**NEEDED.get(kind, {}))
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "later": None, "off": False, "none": [], "runtime_config": {"x": 1}}))
    with pytest.warns(UserWarning) as caught:
        assert PeftConfig.from_pretrained(tmp_path, revision=None) == config
    texts = [str(each.message) for each in caught]
    assert any(f"['later', 'none', 'off'] for class {kind}" in text for text in texts)
    path.write_text(json.dumps({**settings, "later": "something"}))
    with pytest.raises(TanzakuError, match="has no setting 'later'"):
        PeftConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps({"foo": 1}))
    with pytest.raises(TypeError, match=r"missing required keys: {'peft_type'}"):
        PeftConfig.from_pretrained(tmp_path)


def test_what_a_later_peft_saves_is_loaded(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny("llama", "lm"), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "next_variant": None}))
    with pytest.warns(UserWarning, match="next_variant"):
        again = PeftModel.from_pretrained(tiny("llama", "lm"), tmp_path)
    assert again.peft_config["default"].r == 2


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind: str) -> None:
    config = getattr(compat, kind)(**NEEDED.get(kind, {}))
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and type(again) is type(config) and again is not config
    assert dataclasses.replace(config, task_type="CAUSAL_LM").task_type == "CAUSAL_LM"
    assert type(dataclasses.replace(config, task_type="CAUSAL_LM")) is type(config)
    assert type(config).from_peft_type(**config.to_dict()) == config
    assert json.loads(json.dumps(config.settings()))


def test_names_are_sets() -> None:
    config = LoraConfig(target_modules=["b", "a", "a"], exclude_modules=["c"])
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}
    assert config.settings()["target_modules"] == ["a", "b"]
    assert compat.IA3Config(target_modules=["a"], feedforward_modules=["a"]).feedforward_modules == {"a"}


REFUSED = {
    "a negative penalty": (lambda: compat.AdaLoraConfig(total_step=9, orth_reg_weight=-1), "orth_reg_weight"),
    "no steps to prune in": (lambda: compat.AdaLoraConfig(total_step=9, tinit=5, tfinal=4), "budgeting phase"),
    "layers of an expression": (
        lambda: LoraConfig(target_modules=".*q_proj", layers_to_transform=[0]),
        "`layers_to_transform` cannot be used when `target_modules` is a str",
    ),
    "a pattern of no layers": (
        lambda: LoraConfig(target_modules=["q_proj"], layers_pattern="layers"),
        "`layers_to_transform` must also be specified",
    ),
    "feed-forward elsewhere": (
        lambda: compat.IA3Config(target_modules=["k"], feedforward_modules=["q"]),
        "should be a subset of `target_modules`",
    ),
    "another beginning": (
        lambda: LoraConfig(init_lora_weights="loftq"),
        r"loftq.*tanzaku\.LoRA has a start of that name",
    ),
    "a text without a tokenizer": (
        lambda: compat.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"),
        "tokenizer_name_or_path can't be None",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_do_not_go_together(what: str) -> None:
    call, expected = REFUSED[what]
    with pytest.raises(TanzakuError, match=expected):
        call()


def test_the_programs_own_configuration_is_kept(tmp_path: Path) -> None:
    """As in PEFT: what a program holds is what the model has, is completed, and is what is saved."""
    base = tiny("llama", "cls", num_labels=2)
    base.name_or_path = "somebody/base"
    config = LoraConfig(task_type="SEQ_CLS", base_model_name_or_path="other/base")
    with pytest.warns(UserWarning, match="renamed from 'other/base' to 'somebody/base'"):
        model = get_peft_model(base, config)
    assert model.peft_config["default"] is config is model.base_model.peft_config["default"]
    assert config.target_modules == {"q_proj", "v_proj"} and config.modules_to_save == ["score"]
    assert config.base_model_name_or_path == "somebody/base"
    config.base_model_name_or_path, config.revision = "edited/base", "v2"
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("edited/base", "v2")
    own = LoraConfig(task_type="SEQ_CLS")
    again = PeftModel.from_pretrained(tiny("llama", "cls", num_labels=2), tmp_path, config=own)
    assert again.peft_config["default"] is own and own.inference_mode
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        PeftModel.from_pretrained(tiny("llama", "cls"), tmp_path, config=3)  # type: ignore[arg-type]


def test_a_list_may_be_for_several_models() -> None:
    """As in PEFT, one name that is here is enough; that the others are not is said."""
    with pytest.warns(UserWarning, match="query, value match no module"):
        model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj", "query", "value"]))
    assert model.peft_config["default"].target_modules == {"q_proj"}
    model = get_peft_model(tiny("llama"), LoraConfig(modules_to_save=["classifier", "score", "qa_outputs"]))
    assert model.peft_config["default"].modules_to_save == ["score"]
    with pytest.warns(RuntimeWarning, match=r"rank_pattern: \['q_porj'\] did not match"):
        get_peft_model(tiny("llama"), LoraConfig(rank_pattern={"q_porj": 2}, target_modules=["q_proj"]))
    with pytest.raises(compat.NoMatchingPeftModuleError, match=r"Target modules .* not found in the base model"):
        get_peft_model(tiny("llama"), LoraConfig(target_modules=["query"]))
    with pytest.raises(compat.NoMatchingPeftModuleError, match="No modules were targeted"):
        get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]))
    with pytest.raises(TanzakuError, match="modules_to_save: 'head' matches no module"):
        get_peft_model(tiny("llama"), LoraConfig(modules_to_save=["head"]))


def distilbert() -> PreTrainedModel:
    config = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=3)
    return DistilBertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("kind", "head", "names", "task"),
    [
        ("distilbert", "cls", None, "SEQ_CLS"),  # "classifier" is the end of "pre_classifier", too
        ("bert", "cls", ["dense"], "SEQ_CLS"),
        ("llama", "lm", ["norm"], "CAUSAL_LM"),
        ("llama", "lm", ["embed_tokens", "head"], None),
        ("t5", "lm", ["layer_norm"], "SEQ_2_SEQ_LM"),
    ],
)
def test_modules_to_save_are_those_that_end_with_a_name(
    kind: str, head: str, names: list[str] | None, task: str | None, tmp_path: Path
) -> None:
    """As in PEFT: the same parameters are trained, and saved by the same keys."""
    found = {}
    for library in (peft, compat):
        targets = ["q_lin"] if kind == "distilbert" else "all-linear"
        config = library.LoraConfig(r=2, target_modules=targets, modules_to_save=names, task_type=task)
        base = distilbert() if kind == "distilbert" else tiny(kind, head)
        model = library.get_peft_model(base, config)
        model.save_pretrained(tmp_path / library.__name__, save_embedding_layers=False)
        trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
        saved = load_file(tmp_path / library.__name__ / "adapter_model.safetensors")
        found[library.__name__] = trained, {key for key in saved if "lora_" not in key}
    theirs, ours = found.values()
    assert ours == theirs and len(ours[0]) > 1


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_all_linear_layers_are_pefts(kind: str, task: str | None) -> None:
    """Also of a classifier whose head no task trains: in PEFT it is a linear layer like the others."""
    found = []
    for library in (peft, compat):
        torch.manual_seed(0)
        config = library.LoraConfig(task_type=task, target_modules="all-linear", bias="all")
        model = library.get_peft_model(tiny(kind, "cls" if kind != "t5" else "lm"), config)
        found.append({name for name, p in model.named_parameters() if p.requires_grad})
    assert found[1] == found[0]
