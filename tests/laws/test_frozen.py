"""Law 3: the base stays what it was, tensor by tensor and bit by bit."""

import torch
from variants import all_kinds, all_methods, all_variants, attached, bamboo, losses, plain_logits

import tanzaku as tz
from close import assert_close
from models import batch
from tanzaku.core.manager import manager_of
from tanzaku.models import tree
from tiers import in_families


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_bitwise(model, before):
    after = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("tanzaku.")}
    assert list(after) == list(before)
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype, key
        assert torch.equal(tensor, before[key]), key


def train(model, name, steps=3):
    """Steps of AdamW on all that `model.parameters()` gives while the adapter is active."""
    adapter = manager_of(model).get(name)
    tz.activate(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    adapter.method.prepare(adapter, steps)
    for step in range(1, steps + 1):
        losses(plain_logits(model, batch(model, seed=step))).sum().backward()
        optimizer.step()
        adapter.method.after_step(adapter, step)
        optimizer.zero_grad()


@all_variants
def test_training_changes_no_tensor_of_the_base(name, variant):
    """After steps of an optimizer with weight decay, the base is bitwise what it was, attached and detached."""
    model = bamboo()
    inputs = batch(model)
    before, modules = snapshot(model), [path for path, _ in tree.named_modules(model)]
    expected = plain_logits(model, inputs)
    adapter = attached(model, name, variant)
    start = {key: p.clone() for key, p in adapter.trained()}
    model.train()
    train(model, name)
    assert all(not torch.equal(p, start[key]) for key, p in adapter.trained())
    assert_bitwise(model, before)
    assert [path for path, _ in tree.named_modules(model)] == modules
    model.eval()
    tz.activate(model, None)
    assert_close(plain_logits(model, inputs), expected)
    tz.detach(model)
    assert_bitwise(model, before)
    assert_close(plain_logits(model, inputs), expected)


@in_families(("kind", "head"), [("gpt2", "lm"), ("bert", "cls"), ("t5", "lm"), ("gemma3", "cls")])
@all_methods
def test_other_families(name, kind, head):
    """The same with tied embeddings, Conv1D, post-norm encoders and encoder-decoders."""
    model = bamboo(kind, head)
    before = snapshot(model)
    expected = plain_logits(model, batch(model))
    attached(model, name)
    train(model, name, steps=1)
    assert_bitwise(model, before)
    tz.detach(model)
    assert_close(plain_logits(model, batch(model)), expected)


@all_kinds
def test_attach_freezes_and_detach_restores_the_flags(name):
    """With an adapter nothing of the base asks for a gradient; without the last one each tensor asks as before."""
    model = bamboo()
    frozen = model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    tz.attach(model, tz.LoRA(r=1), "other")
    attached(model, name, as_="mine")
    assert not any(p.requires_grad for p in model.parameters())
    tz.detach(model, "mine")
    assert not any(p.requires_grad for p in model.parameters())
    tz.detach(model)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert not frozen.requires_grad
    assert tz.adapters(model) == []


@all_kinds
def test_no_gradient_reaches_the_base(name):
    """A backward pass leaves no gradient on a tensor of the base."""
    model = bamboo()
    attached(model, name)
    with tz.route(model, [name] * 4):
        losses(plain_logits(model, batch(model))).sum().backward()
    assert all(p.grad is None for p in model.state_dict(keep_vars=True).values())
