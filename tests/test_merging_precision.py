"""Merging beside its law: what rounding takes, merging for good, and quantised bases."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification, TorchAoConfig

import tanzaku as tz
from close import GRADIENT, HALF, PASS, assert_close, tolerance
from models import batch, tiny
from tanzaku.core.manager import manager_of
from tanzaku.models.quantize import full_weight, quantised


@torch.no_grad()
def opened(model: nn.Module, method: tz.Method, name: str = "a", scale: float = 0.2) -> tz.Adapter:
    adapter = tz.attach(model, method, name, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapter


def logits(model: nn.Module, name: str | None = None) -> torch.Tensor:
    inputs = batch(model)
    with torch.no_grad():
        if name is None:
            return model(**inputs).logits.float()
        with tz.route(model, [name] * 4):
            return model(**inputs).logits.float()


# -- what rounding takes


def test_nothing_is_lost_in_full_precision() -> None:
    model = tiny("llama")
    opened(model, tz.LoRA(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tz.merge(model, "a")
    lost = tz.rounding(model)
    assert (lost.mean, lost.worst) == (0, 0) and "nothing" in str(lost)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_takes_is_measured(dtype: torch.dtype) -> None:
    """By hand, for the one matrix; a smaller change loses more of itself, and says so."""
    shares = []
    for scale in (0.2, 0.002):
        model = tiny("llama", "lm").to(dtype)
        opened(model, tz.LoRA(r=2, target_modules=["layers.0.self_attn.q_proj"]), scale=scale)
        module = model.model.layers[0].self_attn.q_proj
        layer = next(iter(dict(manager_of(model).get("a").at()).values()))
        delta = layer.delta(module).detach()
        exact = module.weight.float() + delta
        said = pytest.warns(UserWarning, match=r"rounding to b?float16 lost .*load the base in float32")
        with said if scale == 0.002 else contextlib.nullcontext():
            tz.merge(model, "a")
        off, least = (module.weight.float() - exact).abs(), (exact.to(dtype).float() - exact).abs()
        assert (off <= least + tolerance(exact)).all(), "summed in full, rounded once"
        lost = tz.rounding(model)
        assert_close(lost.worst, float(off.norm() / delta.norm()), GRADIENT)
        assert lost.at.endswith("q_proj.weight")
        shares.append(lost.mean)
    assert 0 < shares[0] < shares[1] / 10


def test_a_value_out_of_range_is_an_error() -> None:
    """Also without anything to take back: nothing has changed."""
    model = tiny("llama").half()
    adapter = opened(model, tz.LoRA(r=2))
    with torch.no_grad():
        adapter.trained()[-3][1].fill_(1e7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for keep in (True, False):
        with pytest.raises(tz.TanzakuError, match=r"would hold .*, expected at most 6.55e\+04 in torch.float16"):
            tz.merge(model, "a", keep=keep)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- for good


def test_merged_for_good() -> None:
    """The adapter is gone, no second copy is held, and the base can take another."""
    model = tiny("llama")
    opened(model, tz.LoRA(r=2))
    gone = weakref.ref(manager_of(model).get("a"))
    expected = logits(model, "a")
    tz.merge(model, "a", keep=False)
    assert_close(logits(model), expected)
    gc.collect()
    assert tz.adapters(model) == [] and gone() is None
    with pytest.raises(tz.TanzakuError, match="for good"):
        tz.unmerge(model)
    opened(model, tz.IA3(), "b")
    expected = logits(model, "b")
    tz.merge(model, "b")
    assert_close(logits(model), expected)
    tz.unmerge(model)


def test_tied_weights_that_the_adapter_has_whole() -> None:
    """Own copies of both ends of a tie merge where they are one tensor, and not where they are two."""
    model = tiny("gemma3", "lm")
    opened(model, tz.LoRA(r=2, modules_to_save=["embed_tokens", "lm_head"]))
    before = model.lm_head.weight.clone()
    with pytest.raises(tz.TanzakuError, match="is tied to"):
        tz.merge(model, "a")
    assert torch.equal(model.lm_head.weight, before) and torch.equal(model.model.embed_tokens.weight, before)


# -- quantised bases


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def bits(**settings: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**settings, llm_int8_skip_modules=["score"])


def ao(name: str) -> TorchAoConfig:
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)(), modules_to_not_convert=["score"])


# What an adapter on the quantised base and the same one merged have in common: bitsandbytes computes in bfloat16 here,
# and its 8 bits quantise what goes into a layer, too, as torchao's dynamic ones do.
COARSE, FINE = (4 * HALF, torch.bfloat16), (PASS, torch.float32)
QUANTISED = {
    "nf4": (lambda: bits(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32), COARSE),
    "nested": (lambda: bits(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True), COARSE),
    "int8": (lambda: bits(load_in_8bit=True), COARSE),
    "torchao-int8": (lambda: ao("Int8WeightOnlyConfig"), FINE),
    "torchao-dynamic": (lambda: ao("Int8DynamicActivationInt8WeightConfig"), COARSE),
    "torchao-float8": (lambda: ao("Float8WeightOnlyConfig"), FINE),
}
all_formats = pytest.mark.parametrize(
    "form", [pytest.param(f, marks=needs("torchao" if "torchao" in f else "bitsandbytes")) for f in QUANTISED]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", hidden_size=64, intermediate_size=64, attention_bias=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantise(folder: Path, form: str) -> nn.Module:
    config = QUANTISED[form][0]()
    return LlamaForSequenceClassification.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


@all_formats
def test_adapters_on_a_quantised_base(form: str, folder: Path, tmp_path: Path) -> None:
    """They train, are saved and loaded; merging asks for a plain base, and then takes back whatever it did."""
    model = quantise(folder, form)
    adapter = tz.attach(model, tz.LoRA(r=2), "a", seed=0)
    with tz.route(model, ["a"] * 4):  # first: bitsandbytes does not train on a CPU after a pass in evaluation mode
        model.train()(**batch(model)).logits.square().sum().backward()
    model.eval()
    base = logits(model)
    trained = {name: p for name, p in adapter.trained() if "lora_B" in name or "score" in name}
    if form == "torchao-dynamic":  # it has no backward pass
        trained = {name: p for name, p in trained.items() if "score" in name}
    assert all(p.grad.any() for p in trained.values())
    tz.save(model, "a", tmp_path / "adapter")
    tz.load(model, tmp_path / "adapter", "again")
    assert_close(logits(model, "again"), logits(model, "a"), HALF, dtype=torch.bfloat16)
    tz.detach(model, "again")
    opened(model, tz.IA3(), "ia3")
    for name, method in (("a", "lora"), ("ia3", "ia3")):
        with torch.no_grad():
            for _, parameter in adapter.trained():
                parameter.add_(0.05)
        expected = logits(model, name)
        with pytest.raises(tz.TanzakuError, match=f"{method}: .* is quantised .*dequantize=True"):
            tz.merge(model, name)
        modules = dict(model.named_modules())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            tz.merge(model, name, dequantize=True)
        assert not any(quantised(m) for m in model.modules())
        assert all(type(p) is nn.Parameter and p.is_floating_point() for p in model.parameters())
        roundings, dtype = QUANTISED[form][1]
        assert_close(logits(model), expected, roundings, dtype=dtype)
        tz.unmerge(model)
        assert dict(model.named_modules()) == modules
        assert_close(logits(model), base, HALF, dtype=torch.bfloat16)


@all_formats
def test_a_dequantised_base_is_saved_plain(form: str, folder: Path, tmp_path: Path) -> None:
    model = quantise(folder, form)
    opened(model, tz.LoRA(r=2))
    q_proj = model.model.layers[0].self_attn.q_proj
    exact = full_weight(q_proj) + next(s for p, s in manager_of(model).get("a").at()).delta(q_proj)
    down = full_weight(model.model.layers[1].mlp.down_proj)
    tz.merge(model, "a", dequantize=True, keep=False)
    model.save_pretrained(tmp_path / "plain")
    plain = LlamaForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert not hasattr(plain.config, "quantization_config")
    assert_close(logits(plain), logits(model))
    assert_close(plain.model.layers[0].self_attn.q_proj.weight, exact)
    assert_close(plain.model.layers[1].mlp.down_proj.weight, down)
    original = LlamaForSequenceClassification.from_pretrained(folder).model.layers[1].mlp.down_proj.weight
    assert (down - original).norm() / original.norm() < 0.2


@needs("bitsandbytes")
@pytest.mark.parametrize("form", ["nf4", "nested"])
def test_four_bits_as_a_cpu_lays_them_out(form: str, folder: Path) -> None:
    """Evaluation on a CPU may repack the weight; what is read stays what it was, but for scales in bfloat16."""
    module = quantise(folder, form).model.layers[0].mlp.down_proj
    before = full_weight(module)
    with torch.no_grad():
        module(torch.randn(2, module.in_features))
    assert_close(full_weight(module), before, 1, dtype=torch.bfloat16)


def test_a_format_without_a_reader_is_named() -> None:
    class Packed(nn.Linear):
        pass

    model = tiny("llama", "lm")
    packed = Packed(32, 32, bias=False)
    packed.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.float8_e4m3fn), requires_grad=False)
    model.model.layers[0].self_attn.q_proj = packed
    opened(model, tz.LoRA(r=2))
    for dequantize in (False, True):
        with pytest.raises(tz.TanzakuError, match=r"Packed .* of torch.float8_e4m3fn, which has no reader"):
            tz.merge(model, "a", dequantize=dequantize)
    with pytest.raises(tz.TanzakuError, match="Identity without a weight"):
        full_weight(nn.Identity())
