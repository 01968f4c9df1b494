"""The methods of a wrapped model, beside HF PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tanzaku as tz
from compat.program import CONFIGS
from models import batch, tiny
from tanzaku.compat import peft as compat
from tanzaku.compat.peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model


def wrapped(library: Any, config: str | Any, kind: str = "llama", head: str = "cls") -> Any:
    """A model of either library with one adapter whose weights are away from where they start."""
    torch.manual_seed(5)
    settings = eval(config, vars(library).copy()) if isinstance(config, str) else config
    model = library.get_peft_model(tiny(kind, head, num_labels=2), settings).eval()
    scatter(model)
    return model


@torch.no_grad()
def scatter(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def logits(model: Any, **more: Any) -> Tensor:
    given = batch(tiny("llama", "cls"), padding=None)
    return model(**given, **more).logits


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_parameters_have_pefts_names_and_first_values(name: str, kind: str) -> None:
    if (kind, name) == ("bert", "llama_adapter"):
        pytest.skip("PEFT has LLaMA-Adapter for no encoder")
    made = []
    for library in (peft, compat):
        torch.manual_seed(3)
        model = library.get_peft_model(tiny(kind, "cls", num_labels=2), eval(CONFIGS[name], vars(library).copy()))
        made.append((model, torch.rand(1)))
    (theirs, after), (ours, ours_after) = made
    assert torch.equal(after, ours_after), "as many random numbers were drawn"
    expected, found = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    for key, parameter in expected.items():
        assert found[key].requires_grad == parameter.requires_grad, key
        assert torch.equal(found[key], parameter), key
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert set(ours.state_dict()) == set(theirs.state_dict()) - {"word_embeddings.weight"}
    assert ours.peft_config["default"].peft_type == theirs.peft_config["default"].peft_type
    for attribute in ("active_adapter", "active_adapters", "device", "dtype"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert isinstance(ours, type(theirs.get_base_model())) and isinstance(ours, PeftModel)
    assert type(getattr(ours.base_model, "model", None)) is type(getattr(theirs.base_model, "model", None))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig"])
def test_every_beginning_is_pefts(kind: str, init: Any) -> None:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    if kind == "AdaLoraConfig":
        settings = {"init_r": 4, "target_r": 2, "total_step": 5, "target_modules": ["q_proj"]}
    elif init == "orthogonal":
        settings["target_modules"] = ["q_proj"]
    made = []
    for library in (peft, compat):
        torch.manual_seed(3)
        made.append(library.get_peft_model(tiny("llama"), getattr(library, kind)(**settings, init_lora_weights=init)))
    theirs = dict(made[0].named_parameters())
    for key, parameter in made[1].named_parameters():
        torch.testing.assert_close(parameter, theirs[key], rtol=0, atol=0)


def test_two_adapters() -> None:
    both = []
    for library in (peft, compat):
        model = wrapped(library, "LoraConfig(task_type='SEQ_CLS', r=2)")
        model.add_adapter("other", library.LoraConfig(task_type="SEQ_CLS", r=1))
        assert model.active_adapter == "default"
        counts = [model.get_nb_trainable_parameters()]
        model.set_adapter("other")
        scatter(model, 2)
        counts.append(model.get_nb_trainable_parameters())
        out = [logits(model)]
        with model.disable_adapter():
            out.append(logits(model))
        mixed = ["default", "__base__", "other", "default"]
        out.append(logits(model, adapter_names=mixed))
        model.set_adapter("default")
        out.append(logits(model))
        model.delete_adapter("other")
        out.append(logits(model))
        assert list(model.peft_config) == ["default"]
        both.append((counts, out))
    (counts, theirs), (ours_counts, ours) = both
    assert ours_counts == counts
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)


def test_merging() -> None:
    found = []
    for library in (peft, compat):
        model = wrapped(library, "LoraConfig(task_type='SEQ_CLS', r=2)")
        out = [logits(model)]
        model.merge_adapter()
        out.append(logits(model))
        with model.disable_adapter():
            out.append(logits(model))
        model.unmerge_adapter()
        out.append(logits(model))
        plain = model.merge_and_unload()
        assert type(plain) is type(tiny("llama", "cls")) and not hasattr(plain, "peft_config")
        out.append(logits(plain))
        again = wrapped(library, "LoraConfig(task_type='SEQ_CLS', r=2)").unload()
        out.append(logits(again))
        found.append(out)
    for step, (mine, other) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda text, n=step: f"step {n}: {text}")


def test_a_prompt_is_there_while_the_wrapper_runs() -> None:
    model = wrapped(compat, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    plain = logits(tiny("llama", "cls", num_labels=2))
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    assert torch.equal(logits(model.get_base_model()), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_methods_share_a_batch(tmp_path: Path) -> None:
    """PEFT takes one type of adapter a model; here a batch may have several."""
    model = wrapped(compat, LoraConfig(task_type="SEQ_CLS", r=2))
    model.add_adapter("ia3", IA3Config(task_type="SEQ_CLS"))
    alone = logits(model)
    rows = logits(model, adapter_names=["default", "ia3", "__base__", "default"])
    torch.testing.assert_close(rows[0], alone[0], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model)[2], rows[2])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and (tmp_path / "ia3" / "adapter_config.json").is_file()
    model.save_pretrained(tmp_path / "one", selected_adapters=["ia3"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["ia3"]


@pytest.mark.parametrize("name", CONFIGS)
def test_loading(name: str, tmp_path: Path) -> None:
    model = wrapped(compat, CONFIGS[name])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama", "cls", num_labels=2), tmp_path)
    assert type(again) is type(model) and not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(logits(again), expected)
    with torch.no_grad():
        for _, parameter in model._adapter_parameters():
            parameter.add_(1.0)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), expected)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    if name == "p_tuning":
        with pytest.raises(tz.TanzakuError, match="a network wrote"):
            PeftModel.from_pretrained(tiny("llama", "cls", num_labels=2), tmp_path, is_trainable=True)
    else:
        on = PeftModel.from_pretrained(tiny("llama", "cls", num_labels=2), tmp_path, is_trainable=True)
        assert on.get_nb_trainable_parameters()[0] == wrapped(compat, CONFIGS[name]).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", ["lora", "ia3", "prompt_tuning"])
def test_state_dicts(name: str) -> None:
    model, other = (wrapped(compat, CONFIGS[name]) for _ in range(2))
    scatter(other, 3)
    tensors = compat.get_peft_model_state_dict(model)
    assert compat.set_peft_model_state_dict(other, {k: t.clone() for k, t in tensors.items()}).missing_keys == []
    assert torch.equal(logits(other), logits(model))
    scatter(other, 3)
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(logits(other), logits(model))
    for bad, found in ({"x": torch.ones(1)}, "missing"), ({**tensors, "x": torch.ones(1)}, "unexpected are x"):
        with pytest.raises(tz.TanzakuError, match=found):
            compat.set_peft_model_state_dict(other, bad)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_is_its_own(name: str) -> None:
    model = wrapped(compat, CONFIGS[name])
    expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(other), expected, atol=1e-3)


def test_adalora_allocates_as_pefts_does() -> None:
    models = [
        wrapped(library, "AdaLoraConfig(task_type='SEQ_CLS', init_r=4, target_r=1, total_step=6, orth_reg_weight=0.3)")
        for library in (peft, compat)
    ]
    given = batch(tiny("llama", "cls"), padding=None)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in models]
    for step in range(1, 7):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(**given, labels=torch.tensor([0, 1, 1, 0])).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    theirs = dict(models[0].named_parameters())
    for key, parameter in models[1].named_parameters():
        torch.testing.assert_close(parameter, theirs[key], rtol=1e-4, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
    waiting = wrapped(compat, AdaLoraConfig(init_r=4, target_r=1))
    with pytest.raises(tz.TanzakuError, match="total_step"):
        waiting.update_and_allocate(1)


def test_a_model_of_no_task_leaves_its_head() -> None:
    theirs, ours = (wrapped(library, "LoraConfig(r=2)") for library in (peft, compat))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_generation() -> None:
    given = batch(tiny("llama", "lm"), padding="left")
    texts = []
    for library in (peft, compat):
        model = wrapped(library, "LoraConfig(task_type='CAUSAL_LM', r=2)", head="lm")
        model.add_adapter("other", library.LoraConfig(task_type="CAUSAL_LM", r=1))
        names = ["default", "__base__", "other", "default"]
        settings = {"max_new_tokens": 5, "do_sample": False}
        texts.append([model.generate(**given, **settings), model.generate(**given, **settings, adapter_names=names)])
    for mine, other in zip(*texts, strict=True):
        assert torch.equal(mine, other)


def test_an_adapter_finds_its_base(tmp_path: Path) -> None:
    base: PreTrainedModel = tiny("llama", "lm")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    scatter(model)
    model.save_pretrained(tmp_path / "adapter")
    again = compat.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    given = batch(tiny("llama", "lm"))
    torch.testing.assert_close(again(**given).logits, model.eval()(**given).logits)
