"""Law 6: a change of weights can be folded into them and taken out again; any other method says that it is none."""

import pytest
import torch
from accelerate import cpu_offload
from torch.nn.utils import parametrize
from variants import CASES, attach, attached, bamboo, logits, method, opened, plain_logits

import tanzaku as tz
from close import GRADIENT, assert_close
from models import batch
from tanzaku.core.manager import manager_of
from tanzaku.core.method import ModuleLayer
from tanzaku.methods import METHODS
from tiers import in_families

MERGEABLE = [case for case in CASES if METHODS[case[0]].mergeable]
UNMERGEABLE = [case for case in CASES if case not in MERGEABLE]
MERGEABLE_METHODS = [name for name, m in METHODS.items() if m.mergeable]
OTHERS = [("gpt2", "lm"), ("gpt2", "cls"), ("bert", "cls"), ("t5", "lm"), ("bart", "cls"), ("gemma3", "lm")]


def assert_merges(model, name):
    inputs = batch(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = plain_logits(model, inputs)
    expected = logits(model, [name] * 4, inputs)
    assert not torch.allclose(expected, base, atol=1e-2)
    assert tz.merge(model, name) is model
    assert_close(plain_logits(model, inputs), expected)
    assert manager_of(model).route is None
    assert tz.unmerge(model) is model
    after = model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert_close(plain_logits(model, inputs), base)
    assert_close(logits(model, [name] * 4, inputs), expected)


@pytest.mark.parametrize(("name", "variant"), MERGEABLE, ids=["-".join(case) for case in MERGEABLE])
def test_merged_equals_unmerged(name, variant):
    """Merged without hooks equals routed, and unmerging gives the base back bit for bit."""
    model = bamboo()
    attached(model, name, variant)
    assert_merges(model, name)


@in_families(("kind", "head"), OTHERS)
@pytest.mark.parametrize("name", MERGEABLE_METHODS)
def test_other_families(name, kind, head):
    """The same over Conv1D, fused projections, several stacks and tied embeddings."""
    model = bamboo(kind, head)
    if name == "head" and head == "lm":  # a head is only merged where its weight is not the embedding's too
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    adapter = attached(model, name)
    layers = [(model.get_submodule(path), layer) for path, layer in adapter.at() if isinstance(layer, ModuleLayer)]
    if any(layer.merged(module) is None for module, layer in layers):
        assert name in ("bitfit", "beft"), "which give modules biases that they have no place for"
        with pytest.raises(tz.TanzakuError, match="cannot be merged"):
            tz.merge(model, name)
    else:
        assert_merges(model, name)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart", "gemma3"])
@pytest.mark.parametrize("name", ["head", "lora"])
def test_half_of_a_tied_weight_is_an_error(kind, name):
    """Merging into an embedding would change the head as well: an error, and nothing has changed."""
    model = bamboo(kind, "lm")
    # The encoder-decoders' `shared` is the table that others are tied to, and never runs by itself.
    table = "wte" if kind == "gpt2" else "embed_tokens"
    opened(tz.attach(model, tz.Head() if name == "head" else tz.LoRA(r=2, target_modules=[table]), "mine"))
    base = plain_logits(model, batch(model))
    with pytest.raises(tz.TanzakuError, match="is tied to"):
        tz.merge(model, "mine")
    assert_close(plain_logits(model, batch(model)), base)


def test_merging_an_active_adapter_counts_it_once():
    """After training with activate(), a merge ends the route."""
    model = bamboo()
    attached(model, "lora")
    inputs = batch(model)
    tz.activate(model, "lora")
    expected = plain_logits(model, inputs)
    tz.merge(model, "lora")
    assert_close(plain_logits(model, inputs), expected)
    assert not any(name.startswith("tanzaku.") for name in model.state_dict())


@pytest.mark.parametrize(("name", "variant"), UNMERGEABLE, ids=["-".join(case) for case in UNMERGEABLE])
def test_what_cannot_be_merged_says_so(name, variant):
    """The error names the method, and nothing has changed."""
    model = bamboo()
    attached(model, name, variant)
    base = plain_logits(model, batch(model))
    with pytest.raises(tz.TanzakuError, match=f"{name} is no change of weights"):
        tz.merge(model, name)
    assert_close(plain_logits(model, batch(model)), base)


@pytest.mark.parametrize("name", MERGEABLE_METHODS)
def test_a_merged_base_reads_as_a_plain_model(name, tmp_path):
    """A merged model is saved and loaded by transformers alone."""
    model = bamboo()
    attached(model, name)
    inputs = batch(model)
    expected = logits(model, [name] * 4, inputs)
    tz.merge(model, name)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert_close(plain_logits(plain, inputs), expected)


def test_a_merged_adapter_is_not_routed_a_second_time():
    model = bamboo()
    attached(model, "lora")
    inputs = batch(model)
    expected = logits(model, ["lora"] * 4, inputs)
    tz.merge(model, "lora")
    for again in (lambda: tz.activate(model, "lora"), lambda: tz.route(model, ["lora", None, None, None]).__enter__()):
        with pytest.raises(tz.TanzakuError, match="lora is merged into the base's weights and would count twice"):
            again()
    with torch.no_grad():
        assert_close(model(**inputs).logits, expected)
        tz.unmerge(model)
        tz.activate(model, "lora")
        assert_close(model(**inputs).logits, expected)


def test_what_a_parametrization_computes_is_not_merged_into():
    model = bamboo()
    place = model.model.layers[0].self_attn
    parametrize.register_parametrization(place.q_proj, "weight", torch.nn.Tanh())
    attached(model, "lora")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(tz.TanzakuError, match=r"q_proj\.weight is no tensor .* \(a parametrization"):
        tz.merge(model, "lora")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_one_merge_at_a_time():
    """A second merge, and an unmerge without one, are errors."""
    model = bamboo()
    attached(model, "lora")
    attached(model, "ia3")
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
    attached(model, "lora")
    attached(model, "ia3")
    inputs = batch(model)
    model.score.weight.data.copy_(torch.eye(3, 32))  # both adapters copy the head: the upper one's counts
    stacked = logits(model, [("lora", "ia3")] * 4, inputs)
    tz.merge(model, "lora")
    assert_close(logits(model, ["ia3"] * 4, inputs), stacked)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (tz.LoRA(r=2, target_modules=["embed_tokens"]), r"tied to lm_head.weight, which 'a' leaves as it is"),
        (tz.LoRA(r=2, target_modules=["embed_tokens", "lm_head"]), r"tied to \S*, which 'a' changes to other values"),
        (tz.LoRA(r=2, modules_to_save=["embed_tokens", "lm_head"]), r"tied to \S*, which 'a' changes to other values"),
    ],
    ids=["one", "both", "copies"],
)
def test_tied_weights_say_what_happens_to_the_other_end(settings, match):
    model = bamboo(head="lm", tie_word_embeddings=True)
    tz.attach(model, settings, "a", seed=0)
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(tz.TanzakuError, match=match):
        tz.merge(model, "a")
    assert model.lm_head.weight is model.get_input_embeddings().weight and torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("name", MERGEABLE_METHODS)
def test_what_is_not_in_memory_is_not_merged_into(name, tmp_path):
    model = bamboo(head="lm")
    attached(model, name)
    tz.save(model, name, tmp_path / "a")
    tz.detach(model)
    cpu_offload(model)
    tz.load(model, tmp_path / "a", name)
    with pytest.raises(tz.TanzakuError, match=r"not in memory .*load the base whole"):
        tz.merge(model, name)
    with torch.device("meta"):
        empty = type(model)(model.config)
    attach(empty, method(name), name)
    with pytest.raises(tz.TanzakuError, match="not in memory"):
        tz.merge(empty, name)


@pytest.mark.parametrize(
    ("first", "second"), [("oft", "lora"), ("hra", "oft"), ("lora", "hira"), ("lora", "peanut"), ("lora", "full")]
)
def test_a_stack_whose_order_would_count_is_not_merged(first, second):
    """A pass turns what a module reads before all else, and shows each adapter the base's own weight."""
    model = bamboo()
    attached(model, first)
    attached(model, second)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(tz.TanzakuError, match=f"'{first}' and '{second}' both change"):
        tz.merge(model, (first, second))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("first", "second"), [("lora", "oft"), ("loha", "vera"), ("ia3", "lora"), ("hira", "lora"), ("full", "lora")]
)
def test_a_stack_that_adds_up_is_merged(first, second):
    model = bamboo()
    attached(model, first)
    attached(model, second)
    inputs = batch(model, rows=2)
    expected = logits(model, [(first, second)] * 2, inputs)
    tz.merge(model, (first, second))
    assert_close(plain_logits(model, inputs), expected, GRADIENT)
