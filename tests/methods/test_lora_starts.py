"""Starts of LoRA that are read off the base's weight: HF PEFT's numbers and files, over a base that stays as it is."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig

import tanzaku as tz
from close import assert_close
from interop.oracle import both, in_peft, inputs, logits, method, reopened, scatter
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.lora_starts import loftq, pissa, signed

STARTS = {
    "pissa": ("llama", "cls", {"init_lora_weights": "pissa", "lora_alpha": 3}),
    "pissa-conv1d": ("gpt2", "lm", {"init_lora_weights": "pissa"}),
    "pissa-dora": ("llama", "lm", {"init_lora_weights": "pissa", "use_dora": True}),
    "olora": ("llama", "lm", {"init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"v_proj": 3}}),
    "loftq": ("llama", "cls", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 2}}),
}


def layers(adapter, end):
    return [(path, layer) for path, layer in adapter.at() if path.endswith(end)]


@pytest.mark.parametrize(("kind", "head", "settings"), STARTS.values(), ids=STARTS)
def test_starts_as_the_base_which_stays_as_it_is(kind, head, settings):
    model = tiny(kind, head)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    given = batch(model)
    bare = logits(model, given)
    adapter = tz.attach(model, method("lora", {"r": 2, **settings}), "a", seed=0)
    for _, layer in layers(adapter, ("q_proj", "c_attn")):
        assert (layer.lora_B.weight @ layer.lora_A.weight).abs().max() > 1e-4
    tz.activate(model, "a")
    assert_close(logits(model, given), bare)
    tz.detach(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("kind", "head", "settings"), STARTS.values(), ids=STARTS)
def test_files_are_plain_lora_of_twice_the_rank(kind, head, settings, tmp_path):
    """PEFT and Tanzaku read them alike, on the base as it is."""
    model = tiny(kind, head)
    given = batch(model)
    adapter = tz.attach(model, method("lora", {"r": 2, **settings}), "a", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.activate(model, "a")
    expected = logits(model, given)
    tz.save(model, "a", tmp_path)
    tz.load(model, tmp_path, "b")
    tz.detach(model, "a")
    found = layers(tz.load(model, tmp_path, "c"), ("q_proj", "c_attn"))
    assert {layer.r for _, layer in found} == {4}
    tz.activate(model, "b")
    assert_close(logits(model, given), expected)
    tz.detach(model)
    assert_close(logits(reopened(model, tmp_path), given), expected)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "start" in key]


@pytest.mark.parametrize("name", ["pissa", "pissa-conv1d", "pissa-dora", "olora"])
def test_files_of_peft_are_read_as_peft_reads_them(name, tmp_path):
    """They hold A and B alone, of a base that PEFT changes when it reads them."""
    kind, head, settings = STARTS[name]
    base, theirs = both(kind, head, "lora", tmp_path / "theirs", {"r": 2, **settings})
    given = inputs(base, "lora")
    expected = logits(theirs, given)
    assert_close(logits(base, given), expected)
    tz.save(base, "a", tmp_path / "ours")
    tz.detach(base)
    assert_close(logits(reopened(base, tmp_path / "ours"), given), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_is_peft_s(init):
    model = tiny("llama")
    settings = {"r": 3, "init_lora_weights": init, "target_modules": ["q_proj"], "lora_alpha": 5}
    adapter = tz.attach(copy.deepcopy(model), method("lora", settings), "a", seed=0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for path, layer in layers(adapter, "q_proj"):
        theirs = wrapped.get_submodule(f"base_model.model.{path}")
        a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        if init == "pissa":  # of singular vectors either sign is right
            a, b = signed(a, b)
        assert_close(layer.lora_A.weight, a)
        assert_close(layer.lora_B.weight, b)


def test_signs_of_singular_vectors_are_settled():
    """Which of the two a library gives depends on roundings."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 6), torch.randn(5, 3)
    flips = torch.tensor([1.0, -1.0, -1.0])
    one, other = signed(a, b), signed(a * flips[:, None], b * flips)
    assert_close(one, other)
    assert_close(one[1] @ one[0], b @ a)
    assert (one[0].abs().max(1).values == one[0].max(1).values).all()


def test_a_faster_start_is_nearly_the_exact_one():
    torch.manual_seed(0)
    weight = torch.randn(40, 5) @ torch.randn(5, 30) + 0.01 * torch.randn(40, 30)
    products = [b @ a for a, b in (pissa(weight, 5, 2.0), pissa(weight, 5, 2.0, steps=4))]
    assert_close(products[0] * 2, weight, scale=30, roundings=2**15)
    assert (products[0] - products[1]).norm() < 1e-3 * products[0].norm()


def test_what_quantisation_takes_is_bitsandbytes_own():
    """The start makes up for it, the more so the more rounds."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(48, 128)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    lost = weight - bnb.functional.dequantize_4bit(packed, state)
    a, b = loftq(weight, 48, 2.0, 4, 1)
    # Where a number lies in the middle of two codes, either is right.
    assert (2 * b @ a - lost).abs().gt(1e-4).float().mean() < 0.01

    def left(rounds):
        a, b = loftq(weight, 8, 1.0, 4, rounds)
        packed, state = bnb.functional.quantize_4bit(weight - (b @ a if rounds > 1 else 0), quant_type="nf4")
        return (weight - bnb.functional.dequantize_4bit(packed, state) - b @ a).norm()

    assert left(1) < 0.9 * lost.norm()


def test_a_quantised_base_gets_back_what_it_lost(tmp_path):
    """A and B start at it: the weights before quantisation are in the checkpoint."""
    pytest.importorskip("bitsandbytes")
    exact = tiny("llama", "cls", hidden_size=64, intermediate_size=64)
    exact.save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score"],
    )
    rough = type(exact).from_pretrained(tmp_path / "base", quantization_config=bits, device_map="cpu").eval()
    given = batch(exact)
    expected, bare = logits(exact, given), logits(rough, given)
    settings = {"init_lora_weights": "loftq", "target_modules": "all-linear", "modules_to_save": [], "lora_alpha": 64}
    tz.attach(rough, tz.LoRA(r=32, **settings), "a", seed=0)
    tz.activate(rough, "a")
    assert (logits(rough, given) - expected).norm() < 0.5 * (bare - expected).norm()
    rough.config._name_or_path = str(tmp_path / "nowhere")
    with pytest.raises(tz.TanzakuError, match=r"before quantisation was found in no safetensors of .*nowhere"):
        tz.attach(rough, tz.LoRA(r=32, **settings), "b", seed=0)


def test_dropout_leaves_the_start_alone():
    """What was the base's is computed of all numbers, as in PEFT, where it is left in the base."""
    model = tiny("llama")
    settings = tz.LoRA(r=2, init_lora_weights="pissa", lora_dropout=0.99999, target_modules=["q_proj"])
    path, layer = layers(tz.attach(model, settings, "a", seed=0), "q_proj")[0]
    module = model.get_submodule(path).train()
    x = torch.randn(3, 5, 32)
    start = layer.start_B.weight @ layer.start_A.weight * layer.scaling
    assert_close(layer.outputs(module, x, module(x)), module(x) - x @ start.t(), scale=4)


def test_what_does_not_start_so_is_refused(tmp_path):
    model = tiny("llama")
    with pytest.raises(tz.TanzakuError, match=r"found r=33 for .*, expected at most 32, the rank of its weight"):
        tz.attach(model, tz.LoRA(r=33, init_lora_weights="pissa"), "a")
    with pytest.raises(tz.TanzakuError, match=r"found model\.embed_tokens, a Embedding, with"):
        tz.attach(model, tz.LoRA(r=2, init_lora_weights="olora", target_modules=["embed_tokens"]), "a")
    for wrong in ("pizza", "pissa_niter_0", "pissa_niter_"):
        with pytest.raises(tz.TanzakuError, match=f"found init_lora_weights='{wrong}', expected true, false"):
            tz.attach(model, tz.LoRA(r=2, init_lora_weights=wrong), "a")
    for wrong in ({"loftq_bits": 3}, {"loftq_iter": 0}, {"bits": 4}):
        with pytest.raises(tz.TanzakuError, match=r"expected loftq_bits \(4 or 8\) and loftq_iter"):
            tz.attach(model, tz.LoRA(r=2, init_lora_weights="loftq", loftq_config=wrong), "a")
    with pytest.raises(tz.TanzakuError, match="adalora: found init_lora_weights='pissa'"):
        tz.attach(model, tz.AdaLoRA(init_lora_weights="pissa"), "a")
    in_peft(model, "lora", {"r": 2}).save_pretrained(tmp_path)
    text = (
        (tmp_path / "adapter_config.json")
        .read_text()
        .replace('"init_lora_weights": true', '"init_lora_weights": "loftq"')
    )
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(tz.TanzakuError, match="a base which HF PEFT changed by loftq"):
        tz.load(model, tmp_path, "a")


def test_combined_starts_are_plain_lora():
    model = tiny("llama")
    for name in ("a", "b"):
        adapter = tz.attach(model, tz.LoRA(r=2, init_lora_weights="pissa", modules_to_save=[]), name, seed=0)
        scatter([p for _, p in adapter.trained()], seed=ord(name))
    tz.combine(model, ["a", "b"], "c", how="cat")
    changes = []
    for name in ("a", "b", "c"):
        _, layer = layers(manager_of(model).get(name), "q_proj")[0]
        changes.append(layer.delta(nn.Identity()))
    assert_close((changes[0] + changes[1]) / 2, changes[2])
