"""Law 4: every trained parameter learns."""

import torch
import torch.nn.functional as F
from variants import (
    KINDS_BESIDE_LLAMA,
    all_kinds,
    all_methods,
    all_variants,
    assert_equal_gradients,
    attach,
    attached,
    bamboo,
    gradients,
    logits,
    losses,
    method,
    plain_logits,
)

import tanzaku as tz
from close import close
from models import batch
from tiers import in_families


def loss_under(model, name, rows=6):
    return losses(logits(model, [name] * rows, batch(model, rows=rows))).sum()


@all_variants
def test_every_trained_parameter_gets_a_gradient(name, variant):
    """Gates and zero matrices are opened first, or what lies behind them could not learn."""
    model = bamboo()
    adapter = attached(model, name, variant)
    assert adapter.trained()
    for key, gradient in gradients(loss_under(model, name), adapter).items():
        assert gradient.any(), f"{key} learns nothing"


@in_families(("kind", "head"), KINDS_BESIDE_LLAMA)
@all_methods
def test_every_trained_parameter_gets_a_gradient_in_other_families(name, kind, head):
    """The same where projections are fused, positions are learned or the model has two stacks."""
    model = bamboo(kind, head)
    adapter = attached(model, name)
    for key, gradient in gradients(loss_under(model, name), adapter).items():
        assert gradient.any(), f"{key} learns nothing"


@all_variants
def test_a_closed_adapter_begins_to_learn(name, variant):
    """As it is first attached, some parameter has a gradient: zero matrices and gates do open."""
    model = bamboo()
    adapter = attach(model, method(name, variant), "fresh", seed=0)
    assert any(g.any() for g in gradients(loss_under(model, "fresh"), adapter).values())


@all_kinds
def test_gradients_after_a_forward_without_them(name):
    """A no_grad forward before, under the same route or another, leaves no stale tensor behind."""
    model = bamboo()
    adapter = attached(model, name)
    expected = gradients(loss_under(model, name), adapter)
    inputs = batch(model, rows=6)
    with tz.route(model, [name] * 6):
        with torch.no_grad():
            plain_logits(model, inputs)
        again = losses(plain_logits(model, inputs)).sum()
    assert_equal_gradients(gradients(again, adapter), expected)
    with torch.inference_mode():
        logits(model, [name], batch(model, rows=3, seed=5))
    assert_equal_gradients(gradients(loss_under(model, name), adapter), expected)


@all_kinds
def test_gradients_survive_a_forward_before_backward(name):
    """Another forward pass between a loss and its backward pass does not change the gradient."""
    model = bamboo()
    adapter = attached(model, name)
    expected = gradients(loss_under(model, name), adapter)
    loss = loss_under(model, name)
    with torch.no_grad():
        logits(model, [name] * 2, batch(model, rows=2, seed=5))
    assert_equal_gradients(gradients(loss, adapter), expected)


@all_kinds
def test_two_steps_without_retaining_graphs(name):
    """Nothing computed in one step is reused in the next: no tensor of a freed graph, no value of old weights."""
    model = bamboo()
    adapter = attached(model, name)
    first = loss_under(model, name)
    first.backward()
    with torch.no_grad():
        for _, parameter in adapter.trained():
            parameter.sub_(0.05 * parameter.grad)
            parameter.grad = None
    second = loss_under(model, name)
    second.backward()
    assert not close(first, second)


@all_variants
def test_the_loss_of_a_tiny_task_falls(name, variant):
    """A method as it is attached fits six rows better than the base does, with AdamW."""
    model = bamboo()
    adapter = attach(model, method(name, variant), "fresh", seed=0)
    inputs, labels = batch(model, rows=6), torch.arange(6) % 3
    tz.activate(model, "fresh")
    model.train()
    steps = 25
    adapter.method.prepare(adapter, steps)
    optimizer = torch.optim.AdamW([p for _, p in adapter.trained()], lr=0.03)
    history = []
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(**inputs).logits, labels)
        history.append(loss.item())
        penalty = adapter.method.penalty(adapter)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        adapter.method.after_step(adapter, step)
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        final = F.cross_entropy(model(**inputs).logits, labels).item()
    assert final < 0.8 * history[0], history
