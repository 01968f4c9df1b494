"""The methods of a wrapped model, beside HF PEFT's."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tanzaku as tz
from close import GRADIENT, assert_close, close
from compat.program import CONFIGS
from models import batch, tiny
from tanzaku.compat import peft as compat
from tanzaku.compat.peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiers import in_families


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


# PEFT has LLaMA-Adapter for no encoder.
@in_families(
    ("kind", "name"), [(k, n) for k in ("llama", "bert") for n in CONFIGS if (k, n) != ("bert", "llama_adapter")]
)
def test_parameters_have_pefts_names_and_first_values(kind: str, name: str) -> None:
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
        assert_close(parameter, theirs[key])


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
        assert_close(mine, other)
    assert not close(ours[0], ours[1])


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
        assert_close(mine, other, GRADIENT, at=f"step {step}")


def test_a_prompt_is_there_while_the_wrapper_runs() -> None:
    model = wrapped(compat, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    plain = logits(tiny("llama", "cls", num_labels=2))
    assert not close(logits(model), plain)
    assert_close(logits(model.get_base_model()), plain)
    with model.disable_adapter():
        assert_close(logits(model), plain)


def test_methods_share_a_batch(tmp_path: Path) -> None:
    """PEFT takes one type of adapter a model; here a batch may have several."""
    model = wrapped(compat, LoraConfig(task_type="SEQ_CLS", r=2))
    model.add_adapter("ia3", IA3Config(task_type="SEQ_CLS"))
    alone = logits(model)
    rows = logits(model, adapter_names=["default", "ia3", "__base__", "default"])
    assert_close(rows[0], alone[0])
    with model.disable_adapter():
        assert_close(logits(model)[2], rows[2])
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
    assert_close(logits(again), expected)
    with torch.no_grad():
        for _, parameter in model._adapter_parameters():
            parameter.add_(1.0)
    assert not close(logits(model), expected)
    model.load_adapter(tmp_path, "default")
    assert_close(logits(model), expected)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert_close(logits(model), expected)
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
    assert_close(logits(other), logits(model))
    scatter(other, 3)
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert_close(logits(other), logits(model))
    for bad, found in ({"x": torch.ones(1)}, "missing"), ({**tensors, "x": torch.ones(1)}, "unexpected are x"):
        with pytest.raises(tz.TanzakuError, match=found):
            compat.set_peft_model_state_dict(other, bad)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_is_its_own(name: str) -> None:
    model = wrapped(compat, CONFIGS[name])
    expected = logits(model)
    other = copy.deepcopy(model)
    assert_close(logits(other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert_close(logits(model), expected)
    assert not close(logits(other), expected)


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
        assert_close(losses[1], losses[0], GRADIENT)
    theirs = dict(models[0].named_parameters())
    for key, parameter in models[1].named_parameters():
        assert_close(parameter, theirs[key], GRADIENT, at=key)
    waiting = wrapped(compat, AdaLoraConfig(init_r=4, target_r=1))
    with pytest.raises(tz.TanzakuError, match="total_step"):
        waiting.update_and_allocate(1)


def test_a_model_of_no_task_leaves_its_head() -> None:
    theirs, ours = (wrapped(library, "LoraConfig(r=2)") for library in (peft, compat))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert_close(logits(ours), logits(theirs))


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
    assert_close(again(**given).logits, model.eval()(**given).logits)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "vit"])
def test_biases_have_pefts_names(bias: str, kind: str, tmp_path: Path) -> None:
    """As in PEFT, a trained bias stands where the base's own does; files go both ways."""
    models = []
    for library in (peft, compat):
        torch.manual_seed(5)
        config = library.LoraConfig(task_type="SEQ_CLS", bias=bias, target_modules="all-linear", r=2)
        models.append(library.get_peft_model(tiny(kind, "cls", num_labels=2), config).eval())
        scatter(models[-1])
    theirs, ours = models
    expected, found = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert found.keys() == expected.keys() and set(ours.state_dict()) == set(theirs.state_dict())
    assert {k for k, p in found.items() if p.requires_grad} == {k for k, p in expected.items() if p.requires_grad}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    given = batch(tiny(kind, "cls"), padding=None)
    assert_close(ours(**given).logits, theirs(**given).logits, GRADIENT)
    assert not ours.load_state_dict(ours.state_dict()).missing_keys
    for model, other in (ours, peft.PeftModel), (theirs, PeftModel):
        model.save_pretrained(tmp_path / other.__module__)
        again = other.from_pretrained(tiny(kind, "cls", num_labels=2), tmp_path / other.__module__).eval()
        assert_close(again(**given).logits, theirs(**given).logits, GRADIENT)


def test_one_adapter_has_biases() -> None:
    for library in (peft, compat):
        model = library.get_peft_model(tiny("bert"), library.LoraConfig(bias="lora_only"))
        with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
            model.add_adapter("other", library.LoraConfig(bias="all"))
        assert list(model.peft_config) == ["default"]
        model.add_adapter("other", library.LoraConfig())


def test_a_disabled_adapter_requires_no_gradients() -> None:
    """As in PEFT; what was frozen stays frozen afterwards, where PEFT lets it require them."""
    for library in (peft, compat):
        model = wrapped(library, "LoraConfig(task_type='SEQ_CLS', r=2)")
        trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora" in name]
        with model.disable_adapter():
            assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" in name)
            with model.disable_adapter():
                pass
            assert not model.has_active_enabled_adapter
        assert [name for name, p in model.named_parameters() if p.requires_grad and "lora" in name] == trained
        model.set_requires_grad("default", False)
        with model.disable_adapter():
            pass
        thawed = any(p.requires_grad for p in model.parameters())
        assert thawed is (library is peft)


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_may_say_the_precision(name: str, dtype: torch.dtype) -> None:
    """With autocast_adapter_dtype=False an adapter has its base's type; a copy of a head always has its own."""
    for autocast in (True, False):
        found = []
        for library in (peft, compat):
            base = tiny("llama", "cls", num_labels=2).to(dtype)
            config = eval(CONFIGS[name], vars(library).copy())
            model = library.get_peft_model(base, config, autocast_adapter_dtype=autocast)
            found.append({key: p.dtype for key, p in model.named_parameters()})
        assert found[1] == found[0]
        assert (dtype in {d for key, d in found[1].items() if "lora" in key or "ia3" in key}) is not autocast
        out = model(**batch(base), labels=torch.tensor([0, 1, 1, 0]))
        out.loss.backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


def test_several_adapters_merge() -> None:
    outs = []
    for library in (peft, compat):
        model = wrapped(library, "LoraConfig(r=2)")
        for number, name in enumerate(("two", "three")):
            model.add_adapter(name, library.LoraConfig(r=2))
            model.set_adapter(name)
            scatter(model, number)
        out = []
        for names in (["default", "two"], ["three"]):
            model.merge_adapter(names)
            out.append(logits(model))
        assert model.base_model.model.model.layers[0].self_attn.q_proj.merged_adapters == ["default", "two", "three"]
        with pytest.raises(ValueError, match=r"Cannot delete adapter.* while they are merged"):
            model.delete_adapter("two")
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter(["two"])
        with model.disable_adapter():
            out.append(logits(model))
        model.unmerge_adapter()
        out += [logits(model), logits(model.merge_and_unload(adapter_names=["three", "default"]))]
        outs.append(out)
    for mine, other in zip(outs[1], outs[0], strict=True):
        assert_close(mine, other, GRADIENT)
    broken = wrapped(compat, "LoraConfig(r=2)")
    with torch.no_grad():
        next(p for p in broken.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        broken.merge_and_unload(safe_merge=True)


def test_one_of_two_copies_of_a_module_is_in_its_place() -> None:
    for library in (peft, compat):
        model = wrapped(library, "LoraConfig(task_type='SEQ_CLS', r=2)")
        model.add_adapter("other", library.LoraConfig(task_type="SEQ_CLS", r=2))
        with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
            model.base_model.set_adapter(["default", "other"])


def test_a_base_is_wrapped_again() -> None:
    """As in a notebook's cell that is run twice: a new adapter takes the old one's place, and that is said."""
    base = tiny("llama", "cls", num_labels=2)
    first = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2))
    scatter(first)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        second = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4))
    assert_close(logits(second), logits(tiny("llama", "cls", num_labels=2)))
    assert {p.shape[0] for name, p in second.named_parameters() if "lora_A" in name} == {4}
    second.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
    tz.detach(base)
    tz.attach(base, tz.LoRA(r=1), "mine")
    with pytest.raises(tz.TanzakuError, match="named 'mine' is attached already"):
        get_peft_model(base, LoraConfig(), "mine")


def test_another_checkpoint_of_the_base_is_a_warning(tmp_path: Path) -> None:
    """Programs put an adapter of one checkpoint onto another: PEFT takes it in silence."""
    model = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2)")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was made for a base with other weights"):
        again = PeftModel.from_pretrained(tiny("llama", "cls", num_labels=2, seed=9), tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama", "cls", num_labels=2, seed=9), tmp_path).eval()
    assert_close(logits(again), logits(theirs))


def test_the_bases_state(tmp_path: Path) -> None:
    model, plain = (
        wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2, bias='all')"),
        tiny("llama", "cls", num_labels=2),
    )
    state = compat.get_base_model_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items())
    doubled = {key: 2 * tensor for key, tensor in plain.state_dict().items()}
    assert compat.set_base_model_state_dict(model, doubled).missing_keys == []
    assert torch.equal(model.base_model.model.score.weight, doubled["score.weight"])
    with pytest.raises(tz.TanzakuError, match=r"missing are .*and 1 more"):
        compat.set_base_model_state_dict(model, dict(list(doubled.items())[4:]))


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_a_prompt_foretells_the_first_token(config: str, padding: str | None) -> None:
    """The loss of a causal model is PEFT's; with padding on the left it is that of the text padded on the right."""
    lengths = [9, 7, 8, 6]
    out = []
    for library in (peft, compat):
        text = f"{config}(task_type='CAUSAL_LM', num_virtual_tokens=3, modules_to_save={['lm_head']})"
        model = wrapped(library, text, head="lm")
        ids = torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        side = "right" if library is peft and padding == "left" else padding  # PEFT puts padding into the prompt
        for row, length in enumerate(lengths if padding else ()):
            at = slice(length, None) if side == "right" else slice(0, 9 - length)
            kept = ids[row, :length].clone()
            mask[row, at], ids[row, at] = 0, 0
            ids[row, mask[row] == 1] = kept
        labels = ids.masked_fill(mask == 0, -100)
        found = model(input_ids=ids, attention_mask=mask, labels=labels)
        found.loss.backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
        out.append((found.loss, grads, found.logits))
        if library is compat:
            assert found.logits.shape[1] == 9
            with torch.no_grad():
                again = model(input_ids=ids, attention_mask=mask).logits
                assert_close(again[mask == 1], found.logits[mask == 1])
    assert_close(out[1][0], out[0][0])
    for key, gradient in out[0][1].items():
        assert_close(out[1][1][key], gradient, GRADIENT)


def test_trainers_checkpoint_is_read_by_load_adapter(tmp_path: Path) -> None:
    """Of P-tuning an adapter's file has what the network wrote; beside it Trainer left the network."""
    model = wrapped(compat, CONFIGS["p_tuning"])
    model.save_pretrained(tmp_path, state_dict=model.state_dict())  # as Trainer does
    before, optimizer = logits(model), list(model.parameters())
    scatter(model, 3)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_close(logits(model.eval()), before)
    assert all(a is b for a, b in zip(model.parameters(), optimizer, strict=True))
    scatter(model, 4)
    expected = logits(model)
    model.save_pretrained(tmp_path)  # by hand: what Trainer left there is older now
    model.load_adapter(tmp_path, "default")
    assert_close(logits(model), expected)


def test_a_base_for_quantised_training() -> None:
    base = compat.prepare_model_for_kbit_training(tiny("llama", "lm").to(torch.bfloat16))
    assert {p.dtype for p in base.parameters()} == {torch.float32} and not any(
        p.requires_grad for p in base.parameters()
    )


@pytest.mark.parametrize("how", ["svd", "linear", "cat", "ties", "magnitude_prune_svd", None])
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
def test_weighted_adapters(kind: str, how: str | None) -> None:
    if kind == "IA3Config" and how is not None:
        pytest.skip("(IA)3 has one rule")
    options: dict[str, Any] = {} if how is None else {"combination_type": how}
    if how in ("ties", "magnitude_prune_svd"):
        options["density"] = 0.5
    outs = []
    for library in (peft, compat):
        more = {"r": 2} if kind == "LoraConfig" else {}
        model = wrapped(library, getattr(library, kind)(**more))
        model.add_adapter("other", getattr(library, kind)(**more))
        model.set_adapter("other")
        scatter(model, 4)
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "new", **options)
        assert model.active_adapters == ["other"]
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".new" in name)
        model.set_adapter("new")
        outs.append(logits(model))
        assert type(model.peft_config["new"]).__name__ == kind
    assert_close(outs[1], outs[0], GRADIENT)
    with pytest.raises(tz.TanzakuError, match="'new' already exists"):
        model.add_weighted_adapter(["default"], [1.0], "new")
    with pytest.raises(tz.TanzakuError, match=r"Adapter deflaut does not exist.*did you mean 'default'"):
        model.add_weighted_adapter(["deflaut"], [1.0], "newer")
