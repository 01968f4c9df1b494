"""References to what a part of a model does not own, and the prompts that hold some."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch, tiny
from tanzaku.support.refs import Ref


class Holder(nn.Module):
    def __init__(self, target):
        super().__init__()
        self.target = Ref(target)


def test_nothing_of_the_module_is_the_holders():
    linear = nn.Linear(2, 2)
    holder = Holder(linear)
    assert holder.target() is linear
    assert not list(holder.parameters()) and not holder.state_dict() and list(holder.modules()) == [holder]


@pytest.mark.parametrize("order", [1, -1])
def test_a_deep_copy_refers_to_the_copy_whichever_comes_first(order):
    linear = nn.Linear(2, 2)
    copied = copy.deepcopy(nn.ModuleList([linear, Holder(linear)][::order]))
    holder, other = copied[::-order] if order == 1 else copied
    assert holder.target() is other is not linear


@pytest.mark.parametrize("times", [1, 2])
def test_a_deep_copy_of_the_holder_alone_refers_to_nothing(times):
    holder = Holder(nn.Linear(2, 2))
    for _ in range(times):
        holder = copy.deepcopy(holder)
    assert holder.target() is None


def test_a_copy_of_a_copy_keeps_what_it_has():
    linear = nn.Linear(2, 2)
    pair = nn.ModuleList([Holder(linear), linear])
    for _ in range(2):
        pair = copy.deepcopy(pair)
    assert pair[0].target() is pair[1]


def test_a_reference_in_a_circle():
    """A module that holds a reference to what holds it."""
    whole = nn.Module()
    whole.part = Holder(whole)
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert other.part.target() is other is not whole


def test_pickling_keeps_the_module():
    linear = nn.Linear(2, 2)
    alone = pickle.loads(pickle.dumps(Holder(linear)))
    assert torch.equal(alone.target().weight, linear.weight)
    pair = pickle.loads(pickle.dumps(copy.deepcopy([Holder(linear), linear])))
    assert pair[0].target() is pair[1]


# -- prompts


def layers(model, method):
    adapter = tz.attach(model, method, "x", seed=0)
    return nn.ModuleList([layer for _, layer in adapter.at()])


PREFIX = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize(
    ("kind", "method"), [("llama", tz.PrefixTuning(**PREFIX)), ("t5", tz.PrefixTuning(**PREFIX))], ids=["llama", "t5"]
)
def test_a_copied_prefix_is_its_own(kind, method, again):
    """After a forward pass, too: what it wrote then is the original's, and has a graph that nobody can copy."""
    model = tiny(kind, "lm")
    own = layers(model, method)
    with tz.route(model, ["x"] * 4):
        model(**batch(model))
    other = again(own)
    before = [[t.detach().clone() for t in layer.keys_values()] for layer in own[1:]]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert {id(p) for p in own.parameters()}.isdisjoint(map(id, other.parameters()))
    for layer, tensors in zip(other[1:], before, strict=True):
        assert not any(t.any() for t in layer.keys_values())
        assert all(t.any() for t in tensors)
    for layer, tensors in zip(own[1:], before, strict=True):
        assert_close(layer.keys_values(), tensors)


def test_a_layer_that_is_copied_alone_says_so():
    layer = copy.deepcopy(layers(tiny("llama", "lm"), tz.PrefixTuning(**PREFIX))[1])
    with pytest.raises(tz.TanzakuError, match="copy the whole adapter"):
        layer.keys_values()


def test_a_copied_prompt_encoder_has_no_model():
    model = tiny("llama", "lm")
    method = tz.PTuning(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    (own,) = layers(model, method)
    other = copy.deepcopy(own).eval()
    assert other.model() is None and own.model() is model
    assert_close(other.vectors(), own.vectors())
    both = copy.deepcopy(nn.ModuleList([own, model]))
    assert both[0].model() is both[1]


def test_threads_do_not_share_what_a_prefix_writes():
    """A thread that writes without a graph, between another's passes through the layers, takes no gradient from it."""
    model = tiny("llama", "lm")
    own = layers(model, tz.PrefixTuning(**PREFIX))
    tz.activate(model, "x")

    def elsewhere():
        with torch.no_grad():
            own[0].refresh()

    tz.activate(model, "x")  # so that gradients are taken
    own[0].refresh()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    sum(t.sum() for layer in own[1:] for t in layer.keys_values()).backward()
    assert all(p.grad is not None for p in own.parameters())


def test_a_checkpointed_layer_reads_what_was_written_for_its_own_pass():
    """Another pass, without a graph, comes between the forward and the backward pass."""
    model = tiny("llama", "lm").train()
    layers(model, tz.PrefixTuning(**PREFIX))
    tz.activate(model, "x")
    inputs = batch(model)

    def gradients(between):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        between()
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def evaluate():
        with torch.no_grad():
            model(**inputs)

    expected = gradients(lambda: None)
    assert expected
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(evaluate)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], GRADIENT)
