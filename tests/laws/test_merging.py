"""Law 6: a change of weights can be folded into them and taken out again; any other method says that it is none."""

import pytest
import torch
from variants import CASES, all_methods, all_variants, bamboo, hang, logits, opened, plain_logits

import tanzaku as tz
from models import batch
from tanzaku.methods import METHODS

MERGEABLE = [case for case in CASES if METHODS[case[0]].mergeable]
OTHERS = [("gpt2", "lm"), ("gpt2", "cls"), ("bert", "cls"), ("t5", "lm"), ("bart", "cls"), ("gemma3", "lm")]


def assert_merges(model, name):
    inputs = batch(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = plain_logits(model, inputs)
    expected = logits(model, [name] * 4, inputs)
    assert not torch.allclose(expected, base, atol=1e-2)
    assert tz.merge(model, name) is model
    torch.testing.assert_close(plain_logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert tz.unmerge(model) is model
    after = model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert torch.equal(plain_logits(model, inputs), base)
    assert torch.equal(logits(model, [name] * 4, inputs), expected)


@pytest.mark.parametrize(("name", "variant"), MERGEABLE, ids=["-".join(case) for case in MERGEABLE])
def test_merged_equals_unmerged(name, variant):
    """Merged without hooks equals routed, and unmerging gives the base back bit for bit."""
    model = bamboo()
    hang(model, name, variant)
    assert_merges(model, name)


@pytest.mark.parametrize(("kind", "head"), OTHERS)
@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.mergeable])
def test_other_families(name, kind, head):
    """The same over Conv1D, fused projections, several stacks and tied embeddings."""
    model = bamboo(kind, head)
    if name == "head" and head == "lm":  # a head is only merged where its weight is not the embedding's too
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    hang(model, name)
    assert_merges(model, name)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart", "gemma3"])
@pytest.mark.parametrize("name", ["head", "lora"])
def test_half_of_a_tied_weight_is_an_error(kind, name):
    """Merging into an embedding would change the head as well: an error, and nothing has changed."""
    model = bamboo(kind, "lm")
    table = {"gpt2": "wte", "gemma3": "embed_tokens"}.get(kind, "shared")
    opened(tz.attach(model, tz.Head() if name == "head" else tz.LoRA(r=2, target_modules=[table]), "mine"))
    base = plain_logits(model, batch(model))
    with pytest.raises(tz.TanzakuError, match="is tied to"):
        tz.merge(model, "mine")
    assert torch.equal(plain_logits(model, batch(model)), base)


def test_merging_an_active_adapter_counts_it_once():
    """After training with activate(), a merge ends the route."""
    model = bamboo()
    hang(model, "lora")
    inputs = batch(model)
    tz.activate(model, "lora")
    expected = plain_logits(model, inputs)
    tz.merge(model, "lora")
    torch.testing.assert_close(plain_logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert not any(".tanzaku." in f".{name}" for name, _ in model.named_parameters())


@all_variants
def test_what_cannot_be_merged_says_so(name, variant):
    """The error names the method, and nothing has changed."""
    if METHODS[name].mergeable:
        return
    model = bamboo()
    hang(model, name, variant)
    base = plain_logits(model, batch(model))
    with pytest.raises(tz.TanzakuError, match=f"{name} is no change of weights"):
        tz.merge(model, name)
    assert torch.equal(plain_logits(model, batch(model)), base)


@all_methods
def test_a_merged_base_reads_as_a_plain_model(name, tmp_path):
    """A merged model is saved and loaded by transformers alone."""
    if not METHODS[name].mergeable:
        return
    model = bamboo()
    hang(model, name)
    inputs = batch(model)
    expected = logits(model, [name] * 4, inputs)
    tz.merge(model, name)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain_logits(plain, inputs), expected, rtol=1e-5, atol=1e-5)


def test_one_merge_at_a_time():
    """A second merge, and an unmerge without one, are errors."""
    model = bamboo()
    hang(model, "lora")
    hang(model, "ia3")
    with pytest.raises(tz.TanzakuError, match="no adapter is merged"):
        tz.unmerge(model)
    tz.merge(model, "lora")
    with pytest.raises(tz.TanzakuError, match="'lora' is merged already"):
        tz.merge(model, "ia3")
    tz.unmerge(model)
    tz.merge(model, "ia3")


def test_a_stack_is_its_parts_in_order():
    """IA3 over LoRA scales the changed output: what a merged LoRA with IA3 on top computes."""
    model = bamboo()
    hang(model, "lora")
    hang(model, "ia3")
    inputs = batch(model)
    model.score.weight.data.copy_(torch.eye(3, 32))  # both adapters copy the head: the upper one's counts
    stacked = logits(model, [("lora", "ia3")] * 4, inputs)
    tz.merge(model, "lora")
    torch.testing.assert_close(logits(model, ["ia3"] * 4, inputs), stacked, rtol=1e-5, atol=1e-5)
