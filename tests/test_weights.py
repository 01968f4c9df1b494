"""An adapter's own copies of modules: their names, ties, copies and files."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tanzaku as tz
from close import GRADIENT, assert_close
from interop.oracle import scatter
from models import batch, tiny
from tanzaku.core.weights import WeightCopy, copy_of


@pytest.mark.parametrize(("kind", "head"), [("llama", "cls"), ("gpt2", "lm"), ("t5", "lm"), ("bart", "lm")])
def test_parameters_stand_in_the_tree_under_the_names_of_the_module(kind, head):
    """So that whoever goes by names, as for weight decay, knows a copy as the module's own; tied weights stand once."""
    model = tiny(kind, head)
    layer = copy_of(model)
    names = [name for name, _ in model.named_parameters()]
    saved = {*names, *(dict(model.named_buffers()).keys() & model.state_dict().keys())}
    assert [name for name, _ in layer.named_parameters()] == names and layer.state_dict().keys() == saved
    assert {f"{path}.{name}" if path else name for path, m in layer.named_modules() for name in m._parameters} == {
        *names
    }
    assert layer.own.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    assert layer.export().keys() == saved
    for name, parameter in layer.own.items():
        assert parameter.data_ptr() != model.get_parameter(name).data_ptr()
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_the_layer_is_one_of_its_own(again):
    model = tiny("gpt2", "lm")
    layer = copy_of(model)
    other = again(layer)
    assert other.own.keys() == layer.own.keys()
    assert other.own["lm_head.weight"] is other.own["transformer.wte.weight"]
    assert not {id(p) for p in other.parameters()} & {id(p) for p in layer.parameters()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert any(p.any() for p in layer.parameters())
    inputs = batch(model)
    before = model(**inputs).logits
    with other.swapped(model):
        assert not model(**inputs).logits.any()
    assert_close(model(**inputs).logits, before)


def test_parameters_that_somebody_replaced_are_the_ones_used():
    """`load_state_dict(assign=True)` and sharding put other objects into the tree."""
    model = tiny("llama", "cls")
    inputs = batch(model)
    full, lora = tz.attach(model, tz.Full(), "full"), tz.attach(model, tz.LoRA(r=2), "lora")
    for layer in (next(full.at())[1], dict(lora.at())["score"]):
        layer.load_state_dict({name: torch.zeros_like(p) for name, p in layer.state_dict().items()}, assign=True)
        assert not any(p.any() for p in layer.own.values()) and not any(t.any() for t in layer.export().values())
    for name in ("full", "lora"):
        with torch.no_grad(), tz.route(model, [name] * 4):
            assert not model(**inputs).logits.any()


def test_names_of_a_module_may_be_those_of_the_strip_itself():
    module = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("own", "export", "_place")})
    layer = copy_of(module)
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert torch.equal(layer.own["own.weight"], module["own"].weight)
    assert isinstance(layer, WeightCopy) and callable(layer.export)


@pytest.mark.parametrize("method", [tz.LoRA(r=2), tz.Full()], ids=["head", "all"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("order", [("taught", "kept"), ("kept", "taught")])
def test_of_a_stack_the_head_that_was_trained_counts(kind, order, method):
    """Wherever its adapter stands: one that leaves the head alone has a copy, too, of what the base had."""
    model, inputs = tiny(kind, "cls"), batch(tiny(kind, "cls"))
    taught = tz.attach(model, method, "taught", seed=0)
    kept = tz.attach(model, tz.LoRA(r=2, modules_to_save=[]), "kept", seed=1)
    for adapter in (taught, kept):
        scatter([p for _, p in adapter.trained()])
    with torch.no_grad(), tz.route(model, [order]):
        found = model(**inputs).logits
        for _, layer in kept.at():
            if isinstance(layer, WeightCopy):
                for tensor in layer.own.values():
                    tensor.zero_()
        assert_close(model(**inputs).logits, found)
    if method.name == "lora" or order[0] == "taught":  # a change of weights that are then replaced is refused
        tz.merge(model, order)
        with torch.no_grad():
            assert_close(model(**inputs).logits, found, GRADIENT)
        tz.unmerge(model)
    tz.activate(model, [*order])
    model(**inputs).logits.square().sum().backward()
    assert all(p.grad is not None for adapter in (taught, kept) for _, p in adapter.trained())
