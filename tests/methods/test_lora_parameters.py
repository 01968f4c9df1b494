"""LoRA of stacked experts: HF PEFT's logits and files, beside other rows, training and merging."""

import copy

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tanzaku as tz
from close import GRADIENT, assert_close
from interop.oracle import reopened, scatter
from models import VOCAB, lively

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
KINDS = {
    "mixtral": (SMALL, ["experts.gate_up_proj", "mlp.experts.down_proj"]),
    "gpt_oss": ({**SMALL, "head_dim": 16}, ["experts.down_proj", "experts.gate_up_proj"]),
    "one": (SMALL, ["layers.1.mlp.experts.down_proj"]),
}


def made(kind):
    settings, targets = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral" if kind == "one" else kind, **settings))
    lively(model)
    return model.eval(), targets


def ids(rows=4):
    return torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_files_are_peft_s(kind, tmp_path):
    base, targets = made(kind)
    more = {"target_modules": ["q_proj"]} if kind == "mixtral" else {"target_modules": []}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_parameters=targets, task_type="CAUSAL_LM", **more)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    scatter([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    given = ids()
    expected = theirs(input_ids=given).logits
    tz.load(base, tmp_path / "theirs", "a")
    tz.activate(base, "a")
    assert_close(base(input_ids=given).logits, expected)
    tz.save(base, "a", tmp_path / "ours")
    tz.merge(base, "a")
    assert_close(base(input_ids=given).logits, expected)
    tz.unmerge(base)
    tz.detach(base)
    assert (base(input_ids=given).logits - expected).abs().max() > 0.01
    assert_close(reopened(base, tmp_path / "ours")(input_ids=given).logits, expected)


def test_rows_of_several_adapters_share_a_batch():
    """Logits and gradients of each row are what they are alone, and stacks add up."""
    model, targets = made("mixtral")
    adapters = {}
    for number, name in enumerate("ab"):
        settings = tz.LoRA(r=2, target_parameters=targets, target_modules=["q_proj"] if name == "b" else None)
        adapters[name] = tz.attach(model, settings, name, seed=number)
        scatter([p for _, p in adapters[name].trained()], seed=number)
    given, entries = ids(5), ["a", None, "b", ("a", "b"), "a"]
    with tz.route(model, entries):
        mixed = model(input_ids=given).logits
    trained = [p for _, p in adapters["a"].trained()]
    found = torch.autograd.grad(mixed[0].square().sum(), trained)
    for row, entry in enumerate(entries):
        with tz.route(model, [entry]):
            alone = model(input_ids=given[row : row + 1]).logits[0]
        assert_close(mixed[row], alone)
        if row == 0:
            assert_close(list(found), list(torch.autograd.grad(alone.square().sum(), trained)), GRADIENT, scale=2**-4)
    bare = mixed[1]
    assert all((mixed[row] - bare).abs().max() > 0.05 for row in (0, 2, 3))


def test_starts_as_the_base_which_stays_as_it_is():
    model, targets = made("mixtral")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bare = model(input_ids=ids()).logits
    adapter = tz.attach(model, tz.LoRA(r=2, target_parameters=targets), "a", seed=0)
    assert {path.rpartition(".")[2] for path in adapter.paths} == {"experts"}
    tz.activate(model, "a")
    assert torch.equal(model(input_ids=ids()).logits, bare)
    optimizer = torch.optim.SGD([p for _, p in adapter.trained()], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    tz.activate(model, None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_parameters": ["experts.up"]}, r"'experts\.up', which ends no parameter's path"),
        ({"lora_dropout": 0.1}, "with dropout, DoRA"),
        ({"init_lora_weights": "pissa"}, "with dropout, DoRA"),
        ({"target_parameters": ["input_layernorm.weight"]}, "expected a matrix, or matrices of several experts"),
    ],
)
def test_what_is_refused(settings, match):
    model, targets = made("mixtral")
    with pytest.raises(tz.TanzakuError, match=match):
        tz.attach(model, tz.LoRA(**{"r": 2, "target_parameters": targets, **settings}), "a")
