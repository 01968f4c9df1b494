"""Files: what PEFT writes Tanzaku reads, what Tanzaku writes PEFT reads, with equal logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

import tanzaku as tz
from close import HALF, assert_close, tolerance
from interop.oracle import (
    CONFIGS,
    PLAIN,
    PREFIXES,
    PROMPT_LEARNING,
    SOFT_PROMPTS,
    both,
    in_peft,
    in_reach,
    inputs,
    logits,
    loss_of,
    method,
    reopened,
    scatter,
    train,
)
from models import batch, config_of, tiny
from tiers import tiered

BASES = {
    "llama": ("cls", "lm"),
    "mistral": ("cls", "lm"),
    "gemma3": ("cls", "lm"),
    "qwen2": ("cls",),
    "gpt2": ("lm",),
    "opt": ("lm",),
    "bert": ("cls",),
    "roberta": ("cls",),
    "t5": ("lm",),
    "bart": ("lm",),
}
# What PEFT has no default for.
NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("mistral", name): {"target_modules": ["q_proj", "v_proj"]} for name in ("adalora", "vblora")
}


def plain_cases() -> list[Any]:
    """Every method with its plain settings, on every base where PEFT has it."""
    return [
        pytest.param(kind, head, name, {**PLAIN[name], **NEEDED.get((kind, name), {})}, id=f"{kind}-{head}-{name}")
        for kind, heads in BASES.items()
        for head in heads
        for name in CONFIGS
        if in_reach(kind, name)
    ]


# (base, head, method, settings beside the plain ones), by what they try.
VARIANTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "embedding": ("llama", "lm", "lora", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding-scaled": ("gemma3", "lm", "lora", {"target_modules": ["embed_tokens"]}),
    "embedding-conv1d": ("gpt2", "lm", "lora", {"target_modules": ["wte", "wpe", "c_attn", "c_proj"]}),
    "embedding-bert": ("bert", "cls", "lora", {"target_modules": ["word_embeddings", "query"]}),
    "bias-all-bert": ("bert", "cls", "lora", {"bias": "all"}),
    "bias-all-gpt2": ("gpt2", "lm", "lora", {"bias": "all"}),
    "bias-all-bart": ("bart", "lm", "lora", {"bias": "all"}),
    "bias-lora-only": ("roberta", "cls", "lora", {"bias": "lora_only"}),
    "bias-adalora": ("opt", "lm", "adalora", {"bias": "all"}),
    "patterns": (
        "llama",
        "cls",
        "lora",
        {"rank_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 1}, "alpha_pattern": {r"layers\.1\..*": 5}},
    ),
    "rslora": ("llama", "cls", "lora", {"use_rslora": True, "r": 4}),
    "alpha": ("qwen2", "cls", "lora", {"lora_alpha": 32, "lora_dropout": 0.5}),
    "save-lm-head": ("llama", "lm", "lora", {"modules_to_save": ["lm_head"]}),
    "save-embedding": ("mistral", "cls", "lora", {"modules_to_save": ["embed_tokens", "score"]}),
    "save-norm-ia3": ("llama", "lm", "ia3", {"modules_to_save": ["norm"]}),
    "all-linear-llama": ("llama", "lm", "lora", {"target_modules": "all-linear"}),
    "all-linear-cls": ("llama", "cls", "lora", {"target_modules": "all-linear"}),
    "all-linear-gpt2": ("gpt2", "lm", "lora", {"target_modules": "all-linear"}),
    "all-linear-roberta": ("roberta", "cls", "lora", {"target_modules": "all-linear"}),
    "all-linear-t5": ("t5", "lm", "lora", {"target_modules": "all-linear"}),
    "all-linear-adalora": ("qwen2", "cls", "adalora", {"target_modules": "all-linear"}),
    "layers": ("llama", "cls", "lora", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "layers-named": (
        "bert",
        "cls",
        "lora",
        {"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "layer"},
    ),
    "regex": ("llama", "cls", "lora", {"target_modules": r".*layers\.0\.(self_attn|mlp)\.(q|up)_proj"}),
    "exclude": ("opt", "lm", "lora", {"exclude_modules": ["layers.0.self_attn.v_proj"]}),
    "vit": ("vit", "cls", "lora", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    "vit-conv": (
        "vit",
        "cls",
        "lora",
        {"target_modules": ["projection", "fc1"], "modules_to_save": ["classifier"]},
    ),
    "vit-all-linear": ("vit", "cls", "lora", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "ia3-targets": ("llama", "cls", "ia3", {"target_modules": ["up_proj", "o_proj"], "feedforward_modules": []}),
    "ia3-feedforward": (
        "qwen2",
        "cls",
        "ia3",
        {"target_modules": r".*\.(k_proj|o_proj)", "feedforward_modules": r".*\.o_proj"},
    ),
    "ia3-conv": (
        "vit",
        "cls",
        "ia3",
        {"target_modules": ["projection", "fc2"], "feedforward_modules": ["fc2"], "modules_to_save": ["classifier"]},
    ),
    "prompt-sampled": ("llama", "cls", "prompt_tuning", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prompt-head": ("llama", "lm", "prompt_tuning", {"modules_to_save": ["lm_head"]}),
    "p-lstm": (
        "llama",
        "cls",
        "p_tuning",
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2, "encoder_dropout": 0.3},
    ),
    "p-lstm-t5": ("t5", "lm", "p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}),
    "p-width": ("gpt2", "lm", "p_tuning", {"encoder_hidden_size": None}),
    "prefix-projected": (
        "llama",
        "cls",
        "prefix_tuning",
        {"prefix_projection": True, "encoder_hidden_size": 20},
    ),
    "prefix-projected-bert": ("bert", "cls", "prefix_tuning", {"prefix_projection": True}),
    "prefix-zero": ("gpt2", "lm", "prefix_tuning", {"init_weights": "zero"}),
}


def variant_cases() -> list[Any]:
    return [
        pytest.param(kind, head, name, {**PLAIN[name], **more}, id=case)
        for case, (kind, head, name, more) in VARIANTS.items()
    ]


CASES = tiered(plain_cases()) + variant_cases()
# PEFT's LLaMA-Adapter trains nothing beside itself; a head that Tanzaku's trained along is read by it all the same.
OURS = [
    *CASES,
    pytest.param(
        "llama",
        "lm",
        "llama_adapter",
        {**PLAIN["llama_adapter"], "modules_to_save": ["lm_head"]},
        id="llama-adapter-head",
    ),
    pytest.param("vit", "cls", "lora", {"r": 2}, id="vit-default"),
    # PEFT would train the head along with these.
    pytest.param("llama", "cls", "lora", {"r": 2, "modules_to_save": ["norm"]}, id="headless"),
    pytest.param("bert", "cls", "ia3", {"modules_to_save": []}, id="headless-ia3"),
]


def pools_another_token(kind: str, name: str) -> bool:
    """Where PEFT's logits are not what the adapter means: see test_differences.py."""
    return (name in SOFT_PROMPTS and kind in ("bert", "roberta")) or (name == "llama_adapter" and kind == "gpt2")


@pytest.mark.parametrize(("kind", "head", "name", "settings"), CASES)
def test_a_file_of_pefts_loads_here(kind: str, head: str, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny(kind, head)
    given = inputs(base, name)
    theirs = in_peft(base, name, settings)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected, plain = logits(theirs, given), logits(base, given)
        assert (expected - plain).abs().max() > 1e-2, "the adapter changes nothing, so nothing was compared"
        adapter = tz.load(base, tmp_path, "a")
        assert adapter.method.name == name
        tz.activate(base, "a")
        if not pools_another_token(kind, name):
            assert_close(logits(base, given), expected)
        # Back again: PEFT gets the same numbers from Tanzaku's copy of its file.
        tz.save(base, "a", tmp_path / "copy")
        assert_close(logits(reopened(tiny(kind, head), tmp_path / "copy"), given), expected)


@pytest.mark.parametrize(("kind", "head", "name", "settings"), OURS)
def test_a_file_of_ours_loads_there(kind: str, head: str, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny(kind, head)
    given = inputs(base, name)
    if name in PREFIXES and base.config.is_encoder_decoder:
        # The layout that PEFT reads, for which a file of PEFT's is asked.
        settings = {**settings, "num_transformer_submodules": 2}
    with torch.no_grad():
        plain = logits(base, given)
    adapter = tz.attach(base, method(name, settings), "a", seed=3)
    train(base, adapter, given)
    tz.save(base, "a", tmp_path / "a")
    with torch.no_grad():
        ours = logits(base, given)
        assert (ours - plain).abs().max() > 1e-3, "the adapter changes nothing, so nothing was compared"
        theirs = reopened(tiny(kind, head), tmp_path / "a")
        if not pools_another_token(kind, name):
            assert_close(logits(theirs, given), ours)


def pruned_by_peft(model: peft.PeftModel, given: dict[str, Any], steps: int = 4) -> list[int]:
    """Train PEFT's AdaLoRA until values are cut; the ranks left, matrix by matrix."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(1, steps + 1):
        loss_of(model, given).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]


@pytest.mark.parametrize(("kind", "head"), [("llama", "cls"), ("gpt2", "lm"), ("t5", "lm")])
def test_pruned_adalora_of_pefts(kind: str, head: str, tmp_path: Path) -> None:
    base = tiny(kind, head)
    given = batch(base)
    theirs = in_peft(base, "adalora", {"init_r": 4, "target_r": 1, "total_step": 5, "tinit": 1})
    ranks = pruned_by_peft(theirs, given)
    assert 0 < sum(ranks) < 4 * len(ranks)
    theirs.save_pretrained(tmp_path)
    adapter = tz.load(base, tmp_path, "a")
    left = [len(layer.export()["lora_E"]) for _, layer in adapter.at() if hasattr(layer, "lora_E")]
    assert left == ranks
    tz.activate(base, "a")
    tz.save(base, "a", tmp_path / "copy")
    with torch.no_grad():
        expected = logits(theirs, given)
        assert_close(logits(base, given), expected)
        assert_close(logits(reopened(tiny(kind, head), tmp_path / "copy"), given), expected)


@pytest.mark.parametrize("target", [1, 0.5])
def test_pruned_adalora_of_ours(target: float, tmp_path: Path) -> None:
    base = tiny("llama", "cls")
    given = batch(base)
    adapter = tz.attach(base, tz.AdaLoRA(init_r=4, target_r=target), "a", seed=0)
    train(base, adapter, given, steps=4)
    tz.save(base, "a", tmp_path / "a")
    pattern = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(sum(kept) for kept in pattern.values()) == 4 * target
    with torch.no_grad():
        ours, theirs = logits(base, given), logits(reopened(tiny("llama", "cls"), tmp_path / "a"), given)
    assert_close(theirs, ours)


def test_adalora_that_no_loop_counted_steps_for(tmp_path: Path) -> None:
    base = tiny("llama", "cls")
    tz.attach(base, tz.AdaLoRA(init_r=2, target_r=1, tinit=3), "a", seed=0)
    tz.save(base, "a", tmp_path / "a")
    assert reopened(tiny("llama", "cls"), tmp_path / "a").peft_config["default"].init_r == 2


def test_an_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    settings = {"target_modules": ["embed_tokens"]}
    in_peft(tiny("llama", "lm"), "lora", settings).save_pretrained(tmp_path)
    with pytest.raises(tz.TanzakuError, match=r"embed_tokens\.base_layer\.weight"):
        tz.load(tiny("llama", "lm", seed=1), tmp_path, "a")


@pytest.mark.parametrize(
    ("kind", "head", "name", "kind_in_file"),
    [
        ("llama", "cls", "full", "FULL"),
        ("llama", "cls", "head", "HEAD"),
        ("t5", "lm", "prefix_tuning", "TANZAKU_PREFIX_TUNING"),
        ("bart", "lm", "prefix_tuning", "TANZAKU_PREFIX_TUNING"),
    ],
)
def test_what_peft_cannot_read_it_refuses(kind: str, head: str, name: str, kind_in_file: str, tmp_path: Path) -> None:
    base = tiny(kind, head)
    tz.attach(base, tz.METHODS[name](), "a")
    tz.save(base, "a", tmp_path / "a")
    with pytest.raises(Exception, match=rf"\b{kind_in_file}\b"):
        reopened(tiny(kind, head), tmp_path / "a")
    tz.detach(base, "a")
    assert tz.load(base, tmp_path / "a", "b").method.name == name


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
@torch.no_grad()
def test_heads_of_other_tasks(auto: type, tmp_path: Path) -> None:
    """PEFT's file trains the head along; a file of Tanzaku's that trains none is read by PEFT all the same."""
    torch.manual_seed(0)
    base = auto.from_config(config_of("bert", num_labels=2)).eval()
    fresh = copy.deepcopy(base)
    given = batch(base)
    theirs = in_peft(base, "lora", PLAIN["lora"])
    theirs.save_pretrained(tmp_path / "theirs")
    tz.load(base, tmp_path / "theirs", "a")
    adapter = tz.attach(base, tz.LoRA(r=2), "b", seed=0)
    scatter([p for _, p in adapter.trained()])
    tz.save(base, "b", tmp_path / "ours")
    for name, other in {"a": theirs, "b": reopened(fresh, tmp_path / "ours")}.items():
        with tz.route(base, [name]):
            ours = base(**given).to_tuple()
        for mine, expected, bare in zip(ours, other(**given).to_tuple(), fresh(**given).to_tuple(), strict=True):
            assert_close(mine, expected)
            assert not torch.allclose(expected, bare, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_base_in_bf16(name: str, tmp_path: Path) -> None:
    base = tiny("llama", "cls").to(torch.bfloat16)
    given = inputs(base, name)
    theirs = in_peft(base, name, PLAIN[name])
    for key, parameter in theirs.named_parameters():
        if key.endswith("adaption_gate"):  # beyond the roundings of half precision
            parameter.mul_(4)
    theirs.save_pretrained(tmp_path)
    bare, expected = logits(base, given), logits(theirs, given)
    tz.load(base, tmp_path, "a")
    tz.activate(base, "a")
    ours = logits(base, given)
    assert ours.dtype == torch.bfloat16
    assert_close(ours, expected, HALF)
    assert (expected - bare).abs().max() > 2 * tolerance(expected, HALF)


@pytest.mark.parametrize("name", [*PROMPT_LEARNING, "llama_adapter"])
@torch.no_grad()
def test_eager_attention(name: str, tmp_path: Path) -> None:
    base, theirs = both("llama", "cls", name, tmp_path, attn_implementation="eager")
    given = inputs(base, name)
    assert_close(logits(base, given), logits(theirs, given))


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_bias": True},
        {"layer_replication": [(0, 2), (0, 1)]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_changes_the_mathematics_is_refused_by_name(setting: dict[str, Any], tmp_path: Path) -> None:
    base = tiny("llama", "cls")
    in_peft(base, "lora", setting).save_pretrained(tmp_path)
    with pytest.raises(tz.TanzakuError, match=next(iter(setting))):
        tz.load(base, tmp_path, "a")
