"""PEFT's layers, by the names that programs read, beside HF PEFT's."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from close import assert_close, close
from compat.program import CONFIGS
from compat.test_model import logits, scatter, wrapped
from models import batch, tiny
from tanzaku import TanzakuError
from tanzaku.compat import peft as compat
from tanzaku.compat.peft import LoraConfig, get_peft_model
from tanzaku.compat.peft.tuners.lora import LoraLayer
from tanzaku.compat.peft.tuners.tuners_utils import BaseTunerLayer
from tanzaku.compat.peft.utils import ModulesToSaveWrapper, _get_submodules

PLACES = {
    "": [
        "AdaLoraConfig",
        "LoraConfig",
        "PeftModel",
        "get_peft_model",
        "get_model_status",
        "prepare_model_for_kbit_training",
    ],
    "peft_model": ["PeftModel", "PeftModelForCausalLM"],
    "config": ["PeftConfig", "PromptLearningConfig"],
    "mapping": ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"],
    "helpers": ["rescale_adapter_scale", "check_if_peft_model"],
    "tuners": ["LoraConfig", "LoraModel", "PrefixTuningConfig", "AdaptionPromptConfig"],
    "tuners.lora": ["LoraConfig", "LoraLayer", "LoraModel", "Linear", "Embedding", "Conv2d"],
    "tuners.lora.config": ["LoraConfig"],
    "tuners.lora.layer": ["LoraLayer", "Linear"],
    "tuners.lora.model": ["LoraModel"],
    "tuners.adalora": ["AdaLoraConfig", "AdaLoraModel", "SVDLinear"],
    "tuners.ia3": ["IA3Config", "IA3Model"],
    "tuners.adaption_prompt": ["AdaptionPromptConfig", "AdaptionPromptModel"],
    "tuners.prompt_tuning": ["PromptTuningConfig", "PromptTuningInit"],
    "tuners.p_tuning": ["PromptEncoderConfig", "PromptEncoderReparameterizationType"],
    "tuners.prefix_tuning": ["PrefixTuningConfig"],
    "tuners.tuners_utils": ["BaseTuner", "BaseTunerLayer", "check_target_module_exists", "inspect_matched_modules"],
    "utils": ["TaskType", "PeftType", "_get_submodules", "ModulesToSaveWrapper", "SAFETENSORS_WEIGHTS_NAME"],
    "utils.other": ["ModulesToSaveWrapper", "prepare_model_for_kbit_training"],
    "utils.peft_types": ["PeftType", "TaskType"],
    "utils.save_and_load": ["get_peft_model_state_dict", "set_peft_model_state_dict", "load_peft_weights"],
    "utils.constants": ["CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME"],
}


@pytest.mark.parametrize("place", PLACES)
def test_names_are_where_pefts_are(place: str) -> None:
    for library in ("peft", "tanzaku.compat.peft"):
        found = importlib.import_module(f"{library}.{place}".rstrip("."))
        assert all(hasattr(found, name) for name in PLACES[place]), library
    if place not in ("peft_model", "config", "utils.constants", "utils.other", "utils.save_and_load"):
        with pytest.raises(ImportError, match=r"tanzaku\.compat\.peft.* has no 'OSFModel'.*; it has "):
            getattr(found, "OSFModel")  # noqa: B009


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3"])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_layers_have_pefts_parts(name: str, kind: str) -> None:
    """Names of modules and of parameters in a walk, and what each layer holds."""
    models = [wrapped(library, CONFIGS[name], kind) for library in (peft, compat)]
    theirs, ours = (dict(model.named_modules()) for model in models)
    parts = ("lora", "ia3", "ranknum", "modules_to_save")
    wanted = {key for key in theirs if any(part in key for part in parts)}
    # Of DoRA, and of a module that is whole below another name.
    assert {key for key in wanted if not key.endswith(("original_module", "magnitude_vector"))} <= set(ours)
    layers = {key for key, module in theirs.items() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)}
    mine = {k for k, m in ours.items() if isinstance(m, BaseTunerLayer) and not isinstance(m, ModulesToSaveWrapper)}
    assert mine == layers != set()
    for key in layers:
        a, b = theirs[key], ours[key]
        for part in a.adapter_layer_names:
            if part == "lora_magnitude_vector":
                continue
            values, own = getattr(a, part), getattr(b, part)
            assert list(own.keys()) == list(values.keys())
            for each in values:
                x, y = (v[each].weight if isinstance(v[each], nn.Module) else v[each] for v in (values, own))
                assert x.shape == y.shape and y.requires_grad
        if name != "ia3":
            assert dict(b.scaling) == dict(a.scaling) and dict(b.lora_alpha) == dict(a.lora_alpha)
        if name == "lora":
            assert dict(b.r) == dict(a.r) and repr(b).startswith("lora.Linear(")
            assert_close(b.get_delta_weight("default"), a.get_delta_weight("default"))
        assert b.active_adapters == ["default"] and not b.merged and not b.disable_adapters
        assert (b.in_features, b.out_features) == (a.in_features, a.out_features)
        assert_close(b.base_layer.weight, a.base_layer.weight)


def test_a_layer_is_the_bases_own_module() -> None:
    """It is reached by any path, has its own type, and computes without adapters by its base_layer."""
    base = tiny("llama", "cls", num_labels=2)
    module = base.model.layers[0].self_attn.q_proj
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2))
    scatter(model)
    assert model.model is base and model.base_model.model is base
    assert (
        model.model.model.layers[0].self_attn.q_proj
        is module
        is dict(model.named_modules())["base_model.model.model.layers.0.self_attn.q_proj"]
    )
    assert isinstance(module, nn.Linear) and isinstance(module, LoraLayer)
    x = torch.randn(1, 2, 32)
    assert not close(module(x), module.base_layer(x))
    assert_close(module.base_layer(x), nn.functional.linear(x, module.weight))
    parent, target, last = _get_submodules(model, "base_model.model.model.layers.0.self_attn.q_proj")
    assert target is module and getattr(parent, last) is module
    assert model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default").weight.shape == (
        2,
        32,
    )
    model.unload()
    assert type(module) is nn.Linear and not isinstance(module, LoraLayer) and "lora" not in repr(base)


def test_a_layers_parameters_are_the_adapters() -> None:
    """What a program writes into them is what the model computes with."""
    model = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2, lora_dropout=0.5)")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = logits(model)
    for layer in layers:
        layer.scaling["default"] *= 2
        assert isinstance(layer.lora_dropout["default"], nn.Dropout) and layer.lora_dropout["default"].p == 0.5
        layer.lora_dropout["default"].p = 0.0
    assert not close(logits(model), before)
    for layer in layers:
        layer.scale_layer(0.5)
    assert_close(logits(model), before)
    model.train()
    assert_close(logits(model), before)  # no dropout is left
    with compat.helpers.rescale_adapter_scale(model, 0.0):
        off = logits(model)
    assert_close(logits(model), before)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.zero_()
    assert_close(logits(model), off)
    layers[0].lora_A["default"].weight = nn.Parameter(torch.full((2, 32), 3.0))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert float(dict(model.named_parameters())[name].detach().max()) == 3.0


def test_what_a_layer_cannot_do_says_so() -> None:
    model = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2)")
    layer: Any = next(module for module in model.modules() if isinstance(module, LoraLayer))
    for call, expected in {
        "merge": (lambda: layer.merge(), "merge_adapter"),
        "set": (lambda: layer.set_adapter("x"), r"call set_adapter\(\) of the model"),
        "put": (lambda: layer.lora_A.__setitem__("x", nn.Linear(1, 1)), "add_adapter"),
        "take": (lambda: layer.lora_A.__delitem__("default"), "delete_adapter"),
        "scale": (lambda: layer.scaling.__setitem__("x", 1.0), "cannot be set"),
    }.values():
        with pytest.raises(TanzakuError, match=expected):
            call()


def test_containers_follow_adapters() -> None:
    model = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2)")
    layer: Any = next(module for module in model.modules() if isinstance(module, LoraLayer))
    a, scaling = layer.lora_A, layer.scaling
    assert layer.lora_A is a and layer.scaling is scaling
    model.add_adapter("other", LoraConfig(task_type="SEQ_CLS", r=4))
    assert sorted(layer.lora_A) == ["default", "other"] and layer.r == {"default": 2, "other": 4}
    model.delete_adapter("default")
    assert "default" not in a and "default" not in scaling and list(layer.lora_A) == ["other"]


def test_copies_of_modules() -> None:
    models = [wrapped(library, "LoraConfig(task_type='SEQ_CLS', r=2)", "roberta") for library in (peft, compat)]
    theirs, ours = (model.base_model.model.classifier for model in models)
    assert isinstance(ours, ModulesToSaveWrapper) and isinstance(ours.original_module, type(theirs.original_module))
    for part in ("modules_to_save.default.dense.weight", "original_module.dense.weight"):
        first, _, rest = part.partition(".")
        a, b = (getattr(each, first) for each in (theirs, ours))
        assert_close(b.get_parameter(rest), a.get_parameter(rest))
    x = torch.randn(1, 3, 32)
    assert_close(ours.original_module(x), theirs.original_module(x))
    assert_close(ours.modules_to_save["default"](x), theirs.modules_to_save["default"](x))
    assert not close(ours.original_module(x), ours.modules_to_save["default"](x))


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_prompt_encoders(name: str) -> None:
    models = [wrapped(library, CONFIGS[name]) for library in (peft, compat)]
    theirs, ours = (dict(model.prompt_encoder.named_parameters()) for model in models)
    assert list(ours) == list(theirs) and all(p.requires_grad for p in ours.values())
    for key, parameter in theirs.items():
        assert_close(ours[key], parameter)
    a, b = (model.get_prompt_embedding_to_save("default") for model in models)
    assert_close(b, a)
    if name != "prefix_tuning":
        assert_close(models[1].get_prompt(2), models[0].get_prompt(2))
        assert list(models[1].prompt_tokens["default"]) == [0, 1, 2]
    else:
        for x, y in zip(models[1].get_prompt(2).layers, models[0].get_prompt(2).layers, strict=True):
            assert_close(x.keys, y.keys)
    with torch.no_grad():
        next(models[1].prompt_encoder.parameters()).add_(1.0)
    assert not close(logits(models[1]), logits(models[0]))


def test_the_gate_of_llama_adapter() -> None:
    model = wrapped(compat, CONFIGS["llama_adapter"])
    layer: Any = model.base_model.model.model.layers[-1].self_attn
    assert layer.adaption_prompt.shape == (1, 4, 32) and layer.adaption_gate.requires_grad
    assert isinstance(layer.model, type(tiny("llama").model.layers[0].self_attn))


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "llama_adapter"])
def test_copies_and_pickles(name: str) -> None:
    model = wrapped(compat, CONFIGS[name])
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(logits(other), expected)
        layers = [module for module in other.modules() if isinstance(module, BaseTunerLayer)]
        assert layers and all(layer._at.model is other for layer in layers)
        with torch.no_grad():
            for _, parameter in other._adapter_parameters():
                parameter.mul_(1.5)
        assert_close(logits(model), expected)
        assert not close(logits(other), expected)


def test_a_copy_of_a_part_is_of_no_wrapped_model() -> None:
    model = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2)")
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    assert type(copy.deepcopy(layer)) is nn.Linear
    base = copy.deepcopy(model.get_base_model())
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert_close(base(**batch(tiny("llama", "cls"), padding=None)).logits, logits(model))


def test_hooks_on_a_layer_run() -> None:
    model, seen = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2)"), []
    hooks: list[RemovableHandle] = [
        module.register_forward_hook(lambda m, i, o: seen.append(o))
        for module in model.modules()
        if isinstance(module, LoraLayer)
    ]
    logits(model)
    assert len(seen) == len(hooks) == 4


def test_status() -> None:
    models = [wrapped(library, "LoraConfig(task_type='SEQ_CLS', r=2)") for library in (peft, compat)]
    for model, library in zip(models, (peft, compat), strict=True):
        model.add_adapter("other", library.LoraConfig(task_type="SEQ_CLS", r=1))
    for change in (lambda m: None, lambda m: m.set_adapter("other"), lambda m: m.merge_adapter()):
        for model in models:
            change(model)
        theirs, ours = (vars(model.get_model_status()) for model in models)
        a, b = ([vars(layer) for layer in model.get_layer_status()] for model in models)
        if models[1].merged_adapters:
            # In PEFT a merged model stays "irregular": its layers of whole modules are never marked.
            assert theirs.pop("merged_adapters") == "irregular" and ours.pop("merged_adapters") == ["other"]
            assert [a.pop(), b.pop()][0]["merged_adapters"] == []
        assert ours == theirs and b == a
    with pytest.raises(TypeError, match="prefix tuning"):
        wrapped(compat, CONFIGS["prefix_tuning"]).get_model_status()


def test_matched_modules() -> None:
    found = [
        library.tuners.tuners_utils.inspect_matched_modules(
            library.get_peft_model(
                tiny("llama"), library.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
            )
        )["matched"]
        for library in (peft, compat)
    ]
    assert found[1] == [path.replace("base_model.model.", "") for path in found[0]] != []
