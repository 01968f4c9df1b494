"""Attaching, routing, activating, counting, detaching."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig

import tanzaku as tz
from close import assert_close, close
from models import NEEDED, attach, batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.core.method import AdapterLayer, ModuleLayer, Place
from tanzaku.methods import METHODS
from tanzaku.support.refs import Ref

SMALL = {**NEEDED, "adalora": {"init_r": 8}}


def opened(model, method, name, value=0.1):
    adapter = attach(model, method, name, seed=0)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.add_(value)
    return adapter


@pytest.fixture
def model():
    return tiny("llama")


def compute(model):
    with torch.no_grad():
        return model(**batch(model)).logits


# -- counting


def test_count_of_a_billion_parameters_without_memory():
    """Figures of a 1.8B classifier with LoRA of rank 1, on the meta device."""
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=7168,
        vocab_size=99584,
        num_labels=2,
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    tz.attach(model, tz.LoRA(r=1), "lora")
    assert str(tz.count(model, "lora")) == (
        "trainable params: 200,704 || all params: 1,663,870,976 || trainable%: 0.0121"
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_counts_on_meta_as_on_a_device(name):
    """No method needs the base's values to be counted."""
    settings = SMALL.get(name, {})
    real = tiny("llama")
    with torch.device("meta"):
        empty = type(real)(real.config)
    for each in (real, empty):
        attach(each, METHODS[name].from_settings(settings), "x")
    assert tz.count(real, "x") == tz.count(empty, "x")
    trained = sum(p.numel() for _, p in manager_of(real).get("x").trained())
    assert tz.count(real, "x").trainable == trained > 0


def test_count_of_the_active_adapter_counts_it_once(model):
    """An active adapter's parameters, which model.parameters() shows, are not counted twice."""
    tz.attach(model, tz.LoRA(r=2), "lora")
    before = tz.count(model, "lora")
    tz.activate(model, "lora")
    assert tz.count(model, "lora") == before


# -- activate()


@pytest.mark.parametrize("name", METHODS)
def test_activate_shows_parameters_to_optimizers(model, name):
    """Adapters stand below `tanzaku.NAME`; those that are active require gradients and are in the state_dict."""
    settings = SMALL.get(name, {})
    keys, base = list(model.state_dict()), [key for key, _ in model.named_parameters()]
    adapter = attach(model, METHODS[name].from_settings(settings), "mine")
    tz.attach(model, tz.LoRA(r=1), "other")
    trained = {id(p) for _, p in adapter.trained()}
    assert trained and not any(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == keys
    tz.activate(model, "mine")
    shown = [key for key, _ in model.named_parameters() if key not in base]
    assert all(key.startswith("tanzaku.") for key in shown)
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    own = [key for key in model.state_dict() if key not in keys]
    assert {*own} >= {k for k in shown if ".mine." in k} and all(".mine." in key for key in own)
    tz.activate(model, None)
    assert not any(p.requires_grad for p in model.parameters())
    assert {id(p) for _, p in adapter.trained()} == trained
    assert list(model.state_dict()) == keys
    tz.detach(model)
    assert [key for key, _ in model.named_parameters()] == base
    assert all(p.requires_grad for p in model.parameters())


def test_activate_routes_every_batch_until_changed(model):
    """Batches of any size go through the active adapter, stacks too, and zero_grad and clipping reach it."""
    opened(model, tz.LoRA(r=2), "lora")
    opened(model, tz.IA3(), "ia3")
    base = compute(model)
    tz.activate(model, "lora")
    with_lora = compute(model)
    tz.activate(model, ("lora", "ia3"))
    stacked = compute(model)
    with tz.route(model, [("lora", "ia3")] * 4):
        assert_close(compute(model), stacked)
    assert_close(compute(model), stacked)
    assert not close(with_lora, base) and not close(stacked, with_lora)
    model(**batch(model, rows=3)).logits.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained if p is not None and p.dim() > 1 and p.shape[0] != 3)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    model.zero_grad()
    assert all(p.grad is None for p in trained)
    tz.activate(model, None)
    assert_close(compute(model), base)


def test_detaching_the_active_adapter_ends_it(model):
    """Detaching what is active leaves the base, and other adapters attached."""
    base = compute(model)
    opened(model, tz.LoRA(r=2), "lora")
    opened(model, tz.IA3(), "ia3")
    tz.activate(model, "lora")
    tz.detach(model, "ia3")
    assert not close(compute(model), base)
    tz.detach(model, "lora")
    assert_close(compute(model), base)
    assert tz.adapters(model) == []
    assert not any(name.startswith("tanzaku") for name, _ in model.named_parameters())


# -- route()


def test_nested_routes_are_restored(model):
    """The inner block's route ends with it, also by an error, and the outer one is in force again."""
    opened(model, tz.LoRA(r=2), "lora")
    opened(model, tz.PrefixTuning(num_virtual_tokens=2), "prefix")
    opened(model, tz.PromptTuning(num_virtual_tokens=2), "prompt")
    base = compute(model)
    with tz.route(model, ["lora", None, "prefix", "prompt"]):
        outer = compute(model)
        with tz.route(model, ["prompt"] * 4):
            inner = compute(model)
            with tz.route(model, [None] * 4):
                assert_close(compute(model), base)
            assert_close(compute(model), inner)
        assert_close(compute(model), outer)
        with pytest.raises(KeyError), tz.route(model, ["prefix"] * 4):
            raise KeyError
        assert_close(compute(model), outer)
        with pytest.raises(tz.TanzakuError), tz.route(model, ["nobody"] * 4):
            pass
        assert_close(compute(model), outer)
    assert_close(compute(model), base)


def test_a_route_inside_an_active_adapter(model):
    """After the block the active adapter is in force again."""
    opened(model, tz.LoRA(r=2), "lora")
    base = compute(model)
    tz.activate(model, "lora")
    active = compute(model)
    with tz.route(model, [None] * 4):
        assert_close(compute(model), base)
    assert_close(compute(model), active)


def test_detaching_inside_a_route(model):
    """An adapter of the route in force goes at once; leaving the block does not bring it back."""
    opened(model, tz.LoRA(r=2), "lora")
    opened(model, tz.IA3(), "ia3")
    base = compute(model)
    with tz.route(model, ["lora", "ia3", None, None]):
        tz.detach(model, "lora")
        assert_close(compute(model), base)
    assert_close(compute(model), base)
    with tz.route(model, ["ia3"] * 4):
        with tz.route(model, [None] * 4):
            tz.detach(model, "ia3")
        assert_close(compute(model), base)


def test_detaching_the_active_adapter_inside_a_route(model):
    """The route in force stays; after the block there is no active adapter to come back to."""
    opened(model, tz.LoRA(r=2), "lora")
    opened(model, tz.IA3(), "ia3")
    base = compute(model)
    tz.activate(model, "lora")
    with tz.route(model, ["ia3"] * 4):
        before = compute(model)
        tz.detach(model, "lora")
        assert_close(compute(model), before)
    assert_close(compute(model), base)


def test_two_models_do_not_share_adapters():
    """Routes and hooks belong to one model."""
    one, two = tiny("llama"), tiny("llama")
    opened(one, tz.PrefixTuning(num_virtual_tokens=2), "x")
    opened(two, tz.LoRA(r=2), "x")
    base = tiny("llama")(**batch(one)).logits
    with tz.route(one, ["x"] * 4):
        assert_close(compute(two), base)
        with tz.route(two, ["x"] * 4):
            both = compute(one), compute(two)
        assert_close(compute(one), both[0])
    assert not close(both[0], both[1])


# -- names and other mistakes


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a/b", "../x", "x\n", "é"])
def test_names_are_letters_digits_and_dashes(model, name):
    """A name that could not be part of a path or a route is an error."""
    with pytest.raises(tz.TanzakuError, match="expected letters, digits"):
        tz.attach(model, tz.LoRA(r=1), name)
    assert all(p.requires_grad for p in model.parameters())


def test_a_name_is_taken_once(model):
    """Attaching under a name in use is an error and changes nothing."""
    adapter = tz.attach(model, tz.LoRA(r=1), "x")
    with pytest.raises(tz.TanzakuError, match="'x' is attached already"):
        tz.attach(model, tz.IA3(), "x")
    assert manager_of(model).get("x") is adapter


def test_unknown_names_give_the_nearest(model):
    """Routing, counting, activating and detaching an unknown name say which are there."""
    for use in (tz.count, tz.activate, tz.detach, tz.merge):
        with pytest.raises(tz.TanzakuError, match="has no adapter"):
            use(model, "lorra")
    tz.attach(model, tz.LoRA(r=1), "lora")
    for use in (tz.count, tz.activate, tz.detach, tz.merge):
        with pytest.raises(tz.TanzakuError, match=r"'lorra' \(did you mean 'lora'\?\)"):
            use(model, "lorra")
    assert torch.isfinite(compute(model)).all()


def test_a_method_is_an_instance(model):
    """A class or a name in place of settings is an error that shows the form."""
    for wrong in (tz.LoRA, "lora", {"r": 1}):
        with pytest.raises(tz.TanzakuError, match="expected a method such as"):
            tz.attach(model, wrong, "x")


def test_an_error_while_attaching_leaves_the_model_alone(model):
    """A target that matches nothing freezes nothing and leaves no manager."""
    with pytest.raises(tz.TanzakuError):
        tz.attach(model, tz.LoRA(target_modules=["nothing"]), "x")
    assert all(p.requires_grad for p in model.parameters())
    assert tz.adapters(model) == []


def test_a_seed_draws_the_same_weights_whatever_came_before(model):
    """The seed of an adapter decides its weights, and the global generator stays where it was."""
    torch.manual_seed(1)
    one = tz.attach(model, tz.PromptTuning(num_virtual_tokens=2), "one", seed=7)
    next_draw = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), next_draw)
    two = tz.attach(model, tz.PromptTuning(num_virtual_tokens=2), "two", seed=7)
    three = tz.attach(model, tz.PromptTuning(num_virtual_tokens=2), "three", seed=8)
    values = [dict(a.named_parameters())["prompt_embeddings"] for a in (one, two, three)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


# -- devices and types


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_follows_its_model_to_another_device(name):
    """After model.to("meta") the adapter's tensors are moved when routed; there is no mix of devices."""
    settings = SMALL.get(name, {})
    model = tiny("llama")
    adapter = attach(model, METHODS[name].from_settings(settings), "x")
    model.to("meta")
    with tz.route(model, ["x"] * 4):
        assert {p.device.type for _, p in adapter.named_parameters()} == {"meta"}


def test_half_precision_base_and_full_precision_adapter(model):
    """On a base of bf16 the adapter is fp32; one that was there before is moved with its model, as in PEFT."""
    before = tz.attach(model, tz.LoRA(r=2), "before")
    model.to(torch.bfloat16)
    after = tz.attach(model, tz.LoRA(r=2), "after")
    assert {p.dtype for _, p in before.trained()} == {torch.bfloat16}
    assert {p.dtype for _, p in after.trained()} == {torch.float32}
    with tz.route(model, ["before", "after", None, None]):
        assert compute(model).dtype == torch.bfloat16


def test_one_settings_object_serves_several_models():
    """Each model's own defaults are used, and the settings stay as they were given."""
    settings = tz.IA3()
    paths = []
    for kind in ("llama", "gemma3"):
        adapter = tz.attach(tiny(kind), settings, "a")
        paths.append({path.rsplit(".", 1)[-1] for path in adapter.paths})
    assert paths == [{"k_proj", "v_proj", "down_proj", "score"}, {"q_proj", "v_proj", "down_proj", "score"}]
    assert settings == tz.IA3()


@pytest.mark.parametrize("modules", [["norm"], []])
def test_a_heads_weights_are_never_left_out_of_the_file(modules, tmp_path):
    """Beside other modules_to_save the head is trained, as in PEFT; with none it is saved as it was."""
    one, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.score.weight.normal_()
    adapter = tz.attach(one, tz.LoRA(r=2, modules_to_save=modules), "a")
    assert any(name.startswith("score") for name, _ in adapter.trained()) == bool(modules)
    tz.save(one, "a", tmp_path / "a")
    tz.load(other, tmp_path / "a", "a")
    given = batch(one)
    with torch.no_grad(), tz.route(one, ["a"]), tz.route(other, ["a"]):
        assert_close(one(**given).logits, other(**given).logits)


@dataclass
class Mean(tz.Method):
    """Half of what another adapter adds at each of its sites."""

    name = "mean"
    peft_type = "MEAN"
    paper = summary = "-"
    of: str = ""

    def uses(self) -> list[str]:
        return [self.of]

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        for path, layer in place.adapters[self.of].at():
            if isinstance(layer, ModuleLayer):
                yield path, Half(layer)


class Half(ModuleLayer):
    def __init__(self, layer: ModuleLayer):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.layer = Ref(layer)

    def outputs(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        layer = self.layer()
        assert layer is not None
        return y + self.gate * (layer.outputs(module, x, y) - y)


def test_an_adapter_that_uses_another() -> None:
    """It reads the other's layers, owns none of them, and keeps the other attached."""
    model = tiny("llama", "lm")
    lora = tz.attach(model, tz.LoRA(r=2, init_lora_weights=False), "lora", seed=0)
    half = tz.attach(model, Mean("lora"), "half")
    owned = {id(p) for p in lora.parameters()}
    assert owned.isdisjoint(id(p) for p in half.parameters()) and len(half.trained()) == len([*lora.at()])
    twin = tiny("llama", "lm")
    tz.attach(twin, tz.LoRA(r=2, init_lora_weights=False, lora_alpha=4), "lora", seed=0)
    tz.activate(model, "half")
    tz.activate(twin, "lora")
    assert_close(compute(model), compute(twin))
    with pytest.raises(tz.TanzakuError, match="'lora' cannot be detached while 'half' uses it: detach 'half' first"):
        tz.detach(model, "lora")
    tz.detach(model, "half")
    tz.detach(model, "lora")
    with pytest.raises(tz.TanzakuError, match="no adapter named 'gone'"):
        tz.attach(model, Mean("gone"), "x")
