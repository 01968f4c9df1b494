"""Files both ways over the matrix of families, tasks and methods, in fp32 and bf16; several adapters in one model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bench.catalogue import LEFT_OUT
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

import tanzaku as tz
from close import HALF, PASS, assert_close, tolerance
from interop.oracle import CONFIGS, PLAIN, PREFIXES, PROMPT_LEARNING, SOFT_PROMPTS, in_reach, method, scatter
from models import NEEDED, attach, batch, config_of, lively, tiny
from tiers import in_families

# Family -> tasks that test_files.py leaves out.
TASKS = {
    "llama": ("TOKEN_CLS", "FEATURE_EXTRACTION"),
    "gemma3": ("FEATURE_EXTRACTION",),
    "qwen2": ("CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"),
    "gpt2": ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"),
    "bert": ("TOKEN_CLS", "FEATURE_EXTRACTION"),
    "t5": ("TOKEN_CLS", "FEATURE_EXTRACTION"),
    "vit": ("SEQ_CLS", "FEATURE_EXTRACTION"),
}
IN_BF16 = {
    "llama": ("CAUSAL_LM",),
    "gemma3": ("SEQ_CLS",),
    "qwen2": ("SEQ_CLS",),
    "gpt2": ("CAUSAL_LM",),
    "bert": ("TOKEN_CLS",),
    "t5": ("SEQ_2_SEQ_LM",),
    "vit": ("SEQ_CLS",),
}
HEADS = {"SEQ_CLS": "cls", "CAUSAL_LM": "lm", "SEQ_2_SEQ_LM": "lm", "FEATURE_EXTRACTION": "base"}
HEAD_NAMES = {"llama": "score", "gemma3": "score", "qwen2": "score"}
# PEFT has no default targets for these.
VIT = {
    **{name: {"target_modules": ["q_proj", "v_proj"]} for name in CONFIGS},
    "ln_tuning": {"target_modules": ["layernorm_before"]},
    "ia3": {"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]},
}


def compared(kind: str, task: str, name: str) -> bool:
    """Whether PEFT has the method there and both sides compute one thing; test_differences.py tells where not."""
    if name == "llama_adapter":
        return kind == "llama" and task != "TOKEN_CLS"
    if name == "trainable_tokens":
        return kind != "vit" and task != "TOKEN_CLS"  # where PEFT's own fails
    if kind == "vit":
        return name not in PROMPT_LEARNING
    if not in_reach(kind, name):
        return False
    # T5's tagger is an encoder alone, where PEFT's soft prompts have no place; its prefix is the decoder's.
    return kind != "t5" or not ((name in PROMPT_LEARNING and task == "TOKEN_CLS") or name in PREFIXES)


def cases(tasks: dict[str, tuple[str, ...]]) -> list[Any]:
    return [
        pytest.param(kind, task, name, id=f"{kind}-{task}-{name}")
        for kind, each in tasks.items()
        for task in each
        for name in CONFIGS
        if compared(kind, task, name)
    ]


def base_of(kind: str, task: str) -> PreTrainedModel:
    if task != "TOKEN_CLS":
        return tiny(kind, HEADS[task])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForTokenClassification.from_config(config_of(kind))
        lively(model)
    return model.eval()


def settings_of(kind: str, task: str, name: str) -> dict[str, Any]:
    more = VIT[name] if kind == "vit" else {}
    if kind == "vit" and task == "SEQ_CLS":
        more = {**more, "modules_to_save": ["classifier"]}
    return {**PLAIN[name], **more}


def in_peft(model: PreTrainedModel, task: str, name: str, settings: dict[str, Any]) -> peft.PeftModel:
    task_type = None if model.config.model_type == "vit" and task == "SEQ_CLS" else task
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = CONFIGS[name](**copy.deepcopy(settings), task_type=task_type)
        wrapped = peft.get_peft_model(copy.deepcopy(model), made).eval()
    scatter([p for p in wrapped.parameters() if p.requires_grad])
    return wrapped


def given_to(model: PreTrainedModel, task: str, name: str) -> dict[str, Tensor]:
    """A padded batch, but for soft prompts on classifiers, which PEFT pools at the padding."""
    if "pixel_values" in (made := batch(model, padding=None if name in SOFT_PROMPTS else "right")):
        return made
    made.setdefault("attention_mask", torch.ones_like(made["input_ids"]))
    if model.config.is_encoder_decoder and task == "FEATURE_EXTRACTION":
        made["decoder_input_ids"] = made["input_ids"][:, :5]
    return made


def said(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Logits or hidden states at the row's own tokens: PEFT's have the virtual ones too, and at padding any will do."""
    out = model(**given)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    if found.dim() == 3 and "input_ids" in given and "decoder_input_ids" not in given:
        found = found[:, -given["input_ids"].shape[1] :][given["attention_mask"].bool()]
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, HALF if found.dtype == torch.bfloat16 else PASS)


def differ(changed: Tensor, bare: Tensor) -> None:
    least = 2 * tolerance(bare, HALF) if bare.dtype == torch.bfloat16 else 1e-2
    assert (changed - bare).abs().max() > least, "the adapter changes nothing, so nothing was compared"


@torch.no_grad()
def widen_gates(adapted: nn.Module) -> None:
    """So that what is changed by gates, and by factors of what is small, is beyond the roundings of half precision."""
    for key, parameter in adapted.named_parameters():
        if key.endswith("adaption_gate"):
            parameter.mul_(4)
        elif any(name in key for name in ("c3a_kernel", "hira_B", "tinylora_v", "vera_lambda_b")):
            parameter.mul_(10)


@torch.no_grad()
def both_ways(base: PreTrainedModel, task: str, name: str, settings: dict[str, Any], folder: Path) -> None:
    """A file of PEFT's here, that file written here and read by PEFT, and a file of Tanzaku's own read by PEFT."""
    fresh = copy.deepcopy(base)
    given = given_to(base, task, name)
    theirs = in_peft(base, task, name, settings)
    widen_gates(theirs)
    theirs.save_pretrained(folder / "theirs")
    # In bf16 PEFT's AdaLoRA does not say quite the same before its file is read as after.
    half = base.dtype == torch.bfloat16
    expected, bare = said(reopened(fresh, folder / "theirs") if half else theirs, given), said(base, given)
    differ(expected, bare)
    adapter = tz.load(base, folder / "theirs", "a")
    assert adapter.method.name == name
    tz.activate(base, "a")
    assert_same(said(base, given), expected)
    tz.save(base, "a", folder / "copy")
    assert_same(said(reopened(fresh, folder / "copy"), given), expected)
    head = HEAD_NAMES.get(base.config.model_type, "classifier")
    whole = {"modules_to_save": [head]} if task == "TOKEN_CLS" else {}
    own = tz.attach(base, method(name, {**settings, **whole}), "b", seed=3)
    scatter([p for _, p in own.trained()])
    widen_gates(own)
    tz.activate(base, "b")
    ours = said(base, given)
    differ(ours, bare)
    tz.save(base, "b", folder / "ours")
    assert_same(said(reopened(fresh, folder / "ours"), given), ours)


def reopened(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@in_families(("kind", "task", "name"), cases(TASKS))
def test_both_ways(kind: str, task: str, name: str, tmp_path: Path) -> None:
    both_ways(base_of(kind, task), task, name, settings_of(kind, task, name), tmp_path)


@in_families(("kind", "task", "name"), cases(IN_BF16))
def test_both_ways_in_bf16(kind: str, task: str, name: str, tmp_path: Path) -> None:
    base = base_of(kind, task).to(torch.bfloat16)
    both_ways(base, task, name, settings_of(kind, task, name), tmp_path)


@torch.no_grad()
def test_several_adapters_under_their_own_names(tmp_path: Path) -> None:
    """PEFT writes each but the default one into a directory of its name; each says the same here, also in one batch."""
    base = tiny("llama", "cls")
    fresh = copy.deepcopy(base)
    given = batch(base)
    theirs = in_peft(base, "SEQ_CLS", "lora", {"r": 2})
    theirs.add_adapter("second", peft.LoraConfig(r=3, target_modules=["k_proj"], task_type="SEQ_CLS"))
    theirs.add_adapter("third", peft.LoraConfig(r=1, target_modules="all-linear", task_type="SEQ_CLS"))
    for number, name in enumerate(("second", "third")):
        theirs.set_adapter(name)
        scatter([p for p in theirs.parameters() if p.requires_grad], seed=number + 2)
    theirs.save_pretrained(tmp_path)
    expected = {}
    for name, folder in {"default": tmp_path, "second": tmp_path / "second", "third": tmp_path / "third"}.items():
        theirs.set_adapter(name)
        expected[name] = said(theirs, given)
        tz.load(base, folder, name)
        tz.activate(base, name)
        assert_close(said(base, given), expected[name])
        tz.save(base, name, tmp_path / "ours" / name)
    names = ["third", "default", "second", "third"]
    with tz.route(base, names):
        mixed = said(base, given)
    assert_close(mixed, torch.stack([expected[name][row] for row, name in enumerate(names)]))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours" / "second", adapter_name="second").eval()
    for name in ("third", "default"):
        again.load_adapter(str(tmp_path / "ours" / name), adapter_name=name)
    for name, logits in expected.items():
        again.set_adapter(name)
        assert_close(said(again, given), logits)


# -- a vocabulary that was resized, and what only Tanzaku has


RESIZED = {
    "llama": ("llama", "CAUSAL_LM", {"r": 2}, {}),
    "llama-tied": ("llama", "CAUSAL_LM", {"r": 2}, {"tie_word_embeddings": True}),
    "llama-cls": ("llama", "SEQ_CLS", {"r": 2}, {}),
    "llama-targeted": ("llama", "SEQ_CLS", {"r": 2, "target_modules": ["embed_tokens", "v_proj"]}, {}),
    "llama-saved": ("llama", "CAUSAL_LM", {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "gemma3-tied": ("gemma3", "CAUSAL_LM", {"r": 2}, {"tie_word_embeddings": True}),
    "gpt2-tied": ("gpt2", "CAUSAL_LM", {"r": 2}, {}),
    "bert": ("bert", "SEQ_CLS", {"r": 2}, {}),
    "t5-tied": ("t5", "SEQ_2_SEQ_LM", {"r": 2}, {}),
}
NEW = 3


def resized(model: PreTrainedModel, folder: Path, seed: int) -> PreTrainedModel:
    """The model as it is in `folder`, with tokens added whose vectors are drawn anew."""
    made = type(model).from_pretrained(folder).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made.resize_token_embeddings(made.config.vocab_size + NEW, mean_resizing=False)
        rows = made.get_input_embeddings().weight
        rows.data[-NEW:] = torch.randn(NEW, rows.shape[1])
        if (out := made.get_output_embeddings()) is not None:
            out.weight.data[-NEW:] = rows.data[-NEW:]
    return made


@pytest.mark.parametrize(("kind", "task", "settings", "config"), RESIZED.values(), ids=RESIZED)
@torch.no_grad()
def test_new_tokens(kind: str, task: str, settings: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    """The vectors of added tokens go with the adapter, both ways; the base and its bare rows keep their own."""
    small = tiny(kind, HEADS[task], **config)
    small.save_pretrained(tmp_path / "base")
    first, second, third = (resized(small, tmp_path / "base", seed) for seed in (1, 2, 3))
    size = small.config.vocab_size
    given = batch(first, padding=None)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["input_ids"][:, 3:5] = torch.tensor([size, size + 2])
    if kind == "t5":
        given["decoder_input_ids"][:, 1] = size + 1
    theirs = in_peft(first, task, "lora", settings)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, bare = theirs(**given).logits, second(**given).logits
    tz.load(second, tmp_path / "theirs", "a")
    with tz.route(second, ["a"] * 3 + [None]):
        mixed = second(**given).logits
    assert_close(mixed[:3], expected[:3])
    assert_close(mixed[3], bare[3])
    tz.activate(second, "a")
    assert_close(second(**given).logits, expected)
    tz.save(second, "a", tmp_path / "ours")
    assert_close(reopened(third, tmp_path / "ours")(**given).logits, expected)
    tz.load(third, tmp_path / "ours", "b")
    tz.activate(third, "b")
    assert_close(third(**given).logits, expected)
    if "modules_to_save" not in settings:
        with pytest.raises(
            tz.TanzakuError, match=rf"resize_token_embeddings\({small.config.vocab_size + NEW}\)|expected"
        ):
            tz.load(small, tmp_path / "ours", "c")


@torch.no_grad()
def test_new_tokens_of_an_adapter_made_here(tmp_path: Path) -> None:
    """An adapter on a resized vocabulary is written with the embeddings, and only then."""
    small = tiny("llama", "lm")
    small.save_pretrained(tmp_path / "base")
    first, second = (resized(small, tmp_path / "base", seed) for seed in (1, 2))
    given = batch(first)
    given["input_ids"][:, 1] = small.config.vocab_size + 1
    scatter([p for _, p in tz.attach(first, tz.LoRA(r=2), "a", seed=0).trained()])
    tz.save(first, "a", tmp_path / "a")
    tz.activate(first, "a")
    expected = said(first, given)
    assert_close(said(reopened(second, tmp_path / "a"), given), expected)
    tz.load(second, tmp_path / "a", "b")
    tz.activate(second, "b")
    assert_close(said(second, given), expected)
    plain = type(small).from_pretrained(tmp_path / "base")
    tz.attach(plain, tz.LoRA(r=2), "a", seed=0)
    tz.save(plain, "a", tmp_path / "plain")
    assert not [key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors") if "embed_tokens" in key]


def test_every_method_that_peft_has_is_compared() -> None:
    """The others have tests of their own: PEFT wants a task with each row of multitask prompts and of Polytropon, other
    adapters for X-LoRA, and has CPT for causal language models alone; P-tuning v2 is its prefix."""
    elsewhere = {"multitask_prompt_tuning", "poly", "p_tuning_v2", "cpt", "xlora"}
    compared = {name for name, m in tz.METHODS.items() if m.in_peft} - elsewhere
    assert compared == CONFIGS.keys()
    # And what is left out is told, with the reason.
    here = {method.peft_type for method in tz.METHODS.values()}
    assert {kind.value for kind in peft.PeftType} - here == LEFT_OUT.keys()


ONLY_HERE = [name for name, m in tz.METHODS.items() if m.peft_type not in set(peft.PeftType)]


@pytest.mark.parametrize("name", ONLY_HERE)
def test_peft_names_the_type_that_it_does_not_have(name: str, tmp_path: Path) -> None:
    """A method that only Tanzaku has is written in the same form, under a type of its own, which PEFT refuses."""
    base = tiny("llama", "cls")
    fresh = copy.deepcopy(base)
    attach(base, tz.METHODS[name](**NEEDED.get(name, {})), "a", seed=0)
    tz.save(base, "a", tmp_path / "a")
    with pytest.raises(KeyError, match=tz.METHODS[name].peft_type):
        reopened(fresh, tmp_path / "a")
    assert tz.load(fresh, tmp_path / "a", "b").method.name == name
