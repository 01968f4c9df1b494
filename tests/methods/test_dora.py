"""LoRA's magnitudes: the same numbers and gradients as HF PEFT, for every kind of module, and what goes with them."""

import copy

import peft
import pytest
import torch
from torch import nn

import tanzaku as tz
from close import GRADIENT, assert_close
from interop.oracle import both, in_peft, inputs, logits, loss_of, reopened, scatter
from models import batch, tiny
from tanzaku.compat import peft as compat

DORA = {"r": 2, "use_dora": True, "lora_alpha": 3}
KINDS = {
    "linear": ("llama", "cls", {}),
    "conv1d": ("gpt2", "lm", {}),
    "embedding": ("gemma3", "lm", {"target_modules": ["embed_tokens", "q_proj"]}),
    "with-biases": ("bert", "cls", {"bias": "lora_only"}),
}


@pytest.mark.parametrize(("kind", "head", "more"), KINDS.values(), ids=KINDS)
def test_equal_logits_and_files_both_ways(kind, head, more, tmp_path):
    base, theirs = both(kind, head, "lora", tmp_path / "theirs", {**DORA, **more})
    given = inputs(base, "lora")
    expected = logits(theirs, given)
    assert_close(logits(base, given), expected)
    tz.save(base, "a", tmp_path / "ours")
    tz.detach(base)
    assert (logits(base, given) - expected).abs().max() > 0.1
    assert_close(logits(reopened(base, tmp_path / "ours"), given), expected)


def test_a_convolution(tmp_path):
    """PEFT keeps (1, out, 1, 1) magnitudes there."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)

        def forward(self, x):
            return self.conv(x)

    base, x = Net().eval(), torch.randn(2, 3, 9, 9)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["conv"], **DORA)).eval()
    scatter([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    tz.load(base, tmp_path, "a")
    tz.activate(base, "a")
    assert_close(base(x), theirs(x))
    tz.merge(base, "a")
    assert_close(base(x), theirs(x))


def test_the_norm_is_a_constant_in_the_backward_pass():
    """Gradients are PEFT's, which detaches the norm; those of the whole formula are others."""
    base = tiny("llama", "cls")
    theirs = in_peft(base, "lora", {**DORA, "target_modules": ["q_proj"]})
    adapter = tz.attach(base, tz.LoRA(**DORA, target_modules=["q_proj"]), "a", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.activate(base, "a")
    renamed = dict(adapter.trained())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                short = name.removeprefix("base_model.model.").replace(".default", "")
                parameter.copy_(renamed[short.replace("modules_to_save.", "")])
    given = batch(base)
    loss_of(base, given).backward()
    loss_of(theirs, given).backward()
    found = {n: p.grad for n, p in renamed.items() if "lora" in n}
    expected = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if "lora" in n and p.requires_grad
    }
    assert found.keys() == expected.keys() and len(found) == 6
    assert_close(found, expected, GRADIENT, scale=2**-4)


@pytest.mark.parametrize("init", [True, False], ids=str)
def test_starts_with_the_magnitudes_of_the_weights(init):
    """So it changes nothing that LoRA with the same start does not: not one bit with B at zero."""
    model, given = tiny("llama"), batch(tiny("llama"))
    settings = {"r": 2, "init_lora_weights": init}
    tz.attach(model, tz.LoRA(**settings), "lora", seed=0)
    tz.attach(model, tz.LoRA(**settings, use_dora=True), "dora", seed=0)
    out = []
    for name in (None, "lora", "dora"):
        with torch.no_grad(), tz.route(model, [name] * 4):
            out.append(model(**given).logits)
    assert_close(out[1], out[2])
    assert torch.equal(out[0], out[2]) == init


def test_dropout_leaves_numbers_out_of_all_that_is_added():
    """With every number dropped only the base is left, as it is in PEFT."""
    model = tiny("llama")
    adapter = tz.attach(model, tz.LoRA(**DORA, lora_dropout=0.99999, target_modules=["q_proj"]), "a", seed=0)
    scatter([p for name, p in adapter.trained() if "lora" in name])
    path, layer = next(at for at in adapter.at() if at[0].endswith("q_proj"))
    module = model.get_submodule(path)
    x = torch.randn(3, 5, 32)
    y = module(x)
    assert not torch.allclose(layer.outputs(module, x, y), y, atol=1e-2)
    module.train()
    assert torch.equal(layer.outputs(module, x, y), y)


def test_names_and_start_are_peft_s_under_its_names():
    base, settings = tiny("llama", "lm"), {**DORA, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    found, expected = {}, {}
    for library, named in ((compat, found), (peft, expected)):
        torch.manual_seed(3)
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**settings))
        named.update({name: p for name, p in model.named_parameters() if p.requires_grad})
    assert found.keys() == expected.keys() and any("magnitude" in name for name in found)
    assert_close(found, expected)


def test_magnitudes_have_no_rule_to_be_combined_by():
    model = tiny("llama")
    for name in ("a", "b"):
        tz.attach(model, tz.LoRA(**DORA), name, seed=0)
    with pytest.raises(tz.TanzakuError, match="more than a product B A"):
        tz.combine(model, ["a", "b"], "c")


def test_adalora_has_none():
    with pytest.raises(tz.TanzakuError, match="adalora: found use_dora, expected LoRA"):
        tz.attach(tiny("llama"), tz.AdaLoRA(use_dora=True), "a")
