"""Law 1: outputs, losses and gradients of a row are what they are without the other rows."""

import pytest
import torch
from variants import (
    KINDS_BESIDE_LLAMA,
    all_methods,
    all_variants,
    assert_isolated,
    attached,
    bamboo,
    full_bamboo,
    logits,
    losses,
    opened,
    pairs,
    rows_of,
    sharing,
)

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch
from tanzaku.core.manager import manager_of
from tanzaku.methods import METHODS
from tiers import costly

ENTRIES = [*METHODS, None]


@pytest.mark.parametrize(("a", "b"), pairs(ENTRIES))
def test_rows_of_a_beside_rows_of_b(a, b):
    """Rows of any method beside rows of any other equal the same rows alone; who cannot share says so."""
    model = full_bamboo()
    other = b and f"{b}-2"
    entries = [a, other, other, a, other]
    inputs = batch(model, rows=5)
    unshared = [n for n in (a, b) if n and not METHODS[n].shares_batch]
    if unshared and a != other:
        with pytest.raises(tz.TanzakuError, match=f"{unshared[0]}.*alone"):
            logits(model, entries, inputs)
    else:
        assert_isolated(model, entries, inputs)


@pytest.mark.parametrize("name", [*METHODS, None], ids=str)
def test_rows_of_one_adapter(name):
    """A row's numbers do not depend on its neighbours, for methods that share a batch and those that do not."""
    model = full_bamboo()
    inputs = batch(model, rows=3)
    together = logits(model, [name] * 3, inputs)
    for row in range(3):
        assert_close(together[row : row + 1], logits(model, [name], rows_of(inputs, [row])))


@pytest.mark.parametrize(("first", "second"), pairs(sharing()))
def test_stacks(first, second):
    """A tuple stacks: its rows beside its parts, another order and bare rows equal its rows alone."""
    model = full_bamboo()
    stack = (first, f"{second}-2")
    inputs = batch(model, rows=6)
    entries = [first, stack, None, tuple(reversed(stack)), f"{second}-2", stack]
    assert_isolated(model, entries, inputs)
    with torch.no_grad():
        out = logits(model, [first, stack, f"{second}-2"], rows_of(inputs, [1, 1, 1]))
    # A head and a full copy replace what lies below them, and vectors of tokens those of the same tokens; every other
    # pair adds up.
    if "head" not in (first, second) and not (first == second == "trainable_tokens"):
        assert not torch.allclose(out[0], out[1], atol=1e-3)
        assert not torch.allclose(out[1], out[2], atol=1e-3)


ELSEWHERE = [(*family, padding) for family in KINDS_BESIDE_LLAMA for padding in ("right", "left")]
SOME = [("bert", "cls", "right"), ("gpt2", "lm", "left"), ("t5", "lm", "right"), ("gemma3", "cls", "right")]


@pytest.mark.parametrize(("kind", "head", "padding"), costly(SOME, [each for each in ELSEWHERE if each not in SOME]))
def test_every_method_in_one_batch(kind, head, padding):
    """One batch with a row or two of every method, in other families and heads."""
    model = full_bamboo(kind, head)
    names = sharing()
    entries = [None, *names[::2], *names[1::2], names[0], None, f"{names[2]}-2"]
    assert_isolated(model, entries, batch(model, rows=len(entries), padding=padding))


@pytest.mark.parametrize(
    ("attention", "padding"),
    costly(
        [("sdpa", "left"), ("eager", "right")], [("sdpa", "right"), ("eager", "left"), ("sdpa", None), ("eager", None)]
    ),
)
def test_attention_implementations_and_padding(attention, padding):
    """The same on LLaMA for each attention function, and without a mask."""
    model = full_bamboo(attention=attention)
    entries = [*sharing(), None, *(f"{n}-2" for n in sharing())]
    assert_isolated(model, entries, batch(model, rows=len(entries), padding=padding))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_multiple_of_the_route_expands_it(kind):
    """A batch of twice the rows repeats each entry in place, as beams do."""
    model = full_bamboo(kind)
    entries = ["lora", None, "prompt_tuning", "prefix_tuning"]
    inputs = batch(model, rows=8)
    twice = [entry for entry in entries for _ in range(2)]
    assert_close(logits(model, entries, inputs), logits(model, twice, inputs))


@pytest.mark.parametrize("names", [["lora", None], ["ia3", "head"], ["prompt_tuning", None], ["prefix_tuning", "lora"]])
def test_any_other_size_is_an_error(names):
    """A batch that is no whole multiple of the route says both numbers."""
    model = full_bamboo()
    with pytest.raises(tz.TanzakuError, match="route has 2 entries and the batch 3 rows"):
        logits(model, names, batch(model, rows=3))
    logits(model, names, batch(model, rows=2))  # the error leaves a model that works


@all_methods
def test_a_whole_training_run(name):
    """Parameters after steps of AdamW in a mixed batch equal those after the same steps alone."""
    mixed, alone = bamboo(), bamboo()
    partner = "prompt_tuning" if name != "prompt_tuning" else "lora"
    ours = attached(mixed, name)
    attached(mixed, partner, as_="partner")
    theirs = attached(alone, name)
    shares = METHODS[name].shares_batch
    entries = [name, "partner", name, "partner"] if shares else [name] * 4
    at = [row for row, entry in enumerate(entries) if entry == name]
    steps = 4
    for model, adapter, only in ((mixed, ours, False), (alone, theirs, True)):
        # A large eps: AdamW would blow rounding errors of tiny gradients up to full steps.
        optimizers = [
            torch.optim.AdamW([p for _, p in a.trained()], lr=1e-2, eps=1e-2)
            for a in manager_of(model).adapters.values()
        ]
        adapter.method.prepare(adapter, steps)
        for step in range(1, steps + 1):
            inputs = batch(model, seed=step)
            out = logits(model, [name] * len(at), rows_of(inputs, at)) if only else logits(model, entries, inputs)
            loss = losses(out).sum()
            if (penalty := adapter.method.penalty(adapter)) is not None:
                loss = loss + penalty
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            adapter.method.after_step(adapter, step)
            for optimizer in optimizers:
                optimizer.zero_grad()
    expected = dict(theirs.named_parameters())
    start = dict(attached(bamboo(), name).trained())
    for key, parameter in ours.named_parameters():
        assert_close(parameter, expected[key], GRADIENT, at=key)
    assert any(not torch.equal(p, start[key]) for key, p in ours.trained())


@all_variants
def test_every_setting(name, variant):
    """The settings of each method, beside virtual tokens and bare rows."""
    model = bamboo()
    attached(model, name, variant)
    attached(model, "prompt_tuning", as_="beside")
    entries = [name, "beside", None, name] if METHODS[name].shares_batch else [name] * 4
    assert_isolated(model, entries, batch(model, rows=4))


def test_many_adapters_of_one_method():
    """Sixteen LoRAs of different ranks, one a row, each as if alone."""
    model = bamboo()
    names = [f"lora{i}" for i in range(16)]
    for i, name in enumerate(names):
        opened(tz.attach(model, tz.LoRA(r=1 + i % 5), name, seed=i), i)
    assert_isolated(model, names, batch(model, rows=16))
