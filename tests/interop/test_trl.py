"""TRL's trainers, which know nothing of Tanzaku: what docs/trainers.md says of them, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import tanzaku as tz
from close import assert_close, close
from models import tiny
from tanzaku.cli import main
from tanzaku.compat.peft import LoraConfig, get_peft_model
from tanzaku.models import tree

trl = pytest.importorskip("trl")
PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
ROWS = [
    {"prompt": "w1 w2", "completion": f" w{i} w3", "chosen": f" w{i} w3", "rejected": f" w{i + 9} w4"} for i in range(8)
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a model in it that writes words."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60)), "the", "of", "=", "third", "May", "05-03"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path / "my-model")
    tiny("llama", "lm", vocab_size=len(words)).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**more: Any) -> dict[str, Any]:
    own = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    return {
        **own,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "output_dir": "out",
        **more,
    }


def trainer(kind: str, model: PreTrainedModel, **more: Any) -> Any:
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(ROWS)}
    if kind == "GRPO":
        more |= {"num_generations": 4, "max_completion_length": 5}
        given["reward_funcs"] = lambda completions, **_: [float("w1" in text) for text in completions]
    given["args"] = getattr(trl, f"{kind}Config")(**settings(**more))
    words = PreTrainedTokenizerFast.from_pretrained("my-model")
    return getattr(trl, f"{kind}Trainer")(model=model, processing_class=words, **given)


def loaded(method: tz.Method) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained("my-model")
    tz.attach(model, method, "a", seed=0)
    tz.activate(model, "a")
    return model


def base_of(model: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in tree.parameters(model)]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(torch.tensor([[1, 7, 9, 12]])).logits


def losses(done: Any) -> list[float]:
    return [each["loss"] for each in done.state.log_history if "loss" in each]


# -- the page


@pytest.mark.slow
def test_the_page(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its code, from top to bottom, and its commands."""
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    before, adapters = None, []
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        was = [p.detach().clone() for p in names["model"].parameters() if p.requires_grad] if names else []
        exec(code, names)
        model = names["model"]
        before = before or base_of(AutoModelForCausalLM.from_pretrained("my-model"))
        assert all(torch.equal(a, b) for a, b in zip(before, base_of(model), strict=True))
        if "Trainer" in code:
            now = [p for p in model.parameters() if p.requires_grad]
            assert {id(p) for p in now} == {id(p) for _, p in model.get_submodule("tanzaku.dates").named_parameters()}
            moved = [not torch.equal(a, b) for a, b in zip(was, now, strict=True)] if was else [True]
            assert all(moved), code
            adapters.append(logits(model))
    assert names["written"].shape[0] == 3
    assert not close(adapters[0], logits(AutoModelForCausalLM.from_pretrained("my-model")))
    for name, expected in zip(("dates", "dates-dpo", "dates-grpo"), adapters, strict=True):
        other = AutoModelForCausalLM.from_pretrained("my-model")
        tz.load(other, folder / "adapters" / name, "a")
        tz.activate(other, "a")
        assert_close(logits(other), expected)
    # By the command line, the adapter writes what it wrote here.
    (folder / "prompts.jsonl").write_text('{"prompt": "the third of May ="}\n', encoding="utf-8")
    [line] = re.findall(r"^tanzaku (predict .*)$", text, flags=re.MULTILINE)
    capfd.readouterr()
    assert main(line.split()) == 0
    words, row = names["tokenizer"], names["written"][0, names["asked"]["input_ids"].shape[1] :]
    assert capfd.readouterr().out.splitlines()[1].split("\t")[1] == words.decode(row, skip_special_tokens=True)


# -- references


def test_the_reference_of_dpo(folder: Path) -> None:
    """By itself TRL takes the base that it loads again, with log-probabilities computed before the adapter as it
    begins. For LoRA both are the same. The wrapper has the first without a second model."""
    alone, computed = (loaded(tz.LoRA(r=2)) for _ in range(2))
    first, second = trainer("DPO", alone), trainer("DPO", computed, precompute_ref_log_probs=True)
    assert first.ref_model is not None and not tz.adapters(first.ref_model) and second.ref_model is None
    first.train(), second.train()
    assert losses(first)[0] == pytest.approx(0.6931, abs=1e-4) and losses(first)[-1] < 0.68
    assert_close(logits(alone), logits(computed))
    # Of an adapter that changes something from the start they differ.
    base, own = (
        trainer("DPO", loaded(tz.PromptTuning(num_virtual_tokens=3)), **more)
        for more in ({}, {"precompute_ref_log_probs": True})
    )
    base.train(), own.train()
    assert losses(own)[0] == pytest.approx(0.6931, abs=1e-4) and abs(losses(base)[0] - 0.6931) > 1e-3


def test_the_wrapper_needs_no_second_model(folder: Path) -> None:
    bare = AutoModelForCausalLM.from_pretrained("my-model")
    before = base_of(bare)
    done = trainer("DPO", get_peft_model(bare, LoraConfig(task_type="CAUSAL_LM", r=2)))
    done.train()
    assert done.ref_model is None and tz.adapters(bare) == ["default", "ref"]
    assert losses(done)[0] == pytest.approx(0.6931, abs=1e-4) and losses(done)[-1] < 0.68
    assert all(torch.equal(a, b) for a, b in zip(before, base_of(bare), strict=True))
    assert not close(logits(bare), logits(AutoModelForCausalLM.from_pretrained("my-model")))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rewards(folder: Path, beta: float) -> None:
    model = loaded(tz.IA3())
    before, was = base_of(model), logits(model)
    done = trainer("GRPO", model, beta=beta, temperature=1.0)
    done.train()
    assert (done.ref_model is not None) == bool(beta)
    assert all(torch.equal(a, b) for a, b in zip(before, base_of(model), strict=True))
    assert not close(logits(model), was)


# -- what cannot be trained


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
@pytest.mark.parametrize(
    "method", [tz.LoRA(r=2, target_modules=["q_proj", "lm_head"]), tz.LoRA(r=2, modules_to_save=["lm_head"])]
)
def test_an_adapter_of_the_head_is_refused(folder: Path, kind: str, method: tz.Method) -> None:
    """TRL reads the head's weight past whatever stands at the head."""
    with pytest.raises(tz.TanzakuError, match=r"a has a layer at lm_head, which did not run"):
        trainer(kind, loaded(method)).train()


def test_tokens_that_are_tied_to_the_head_are_refused(folder: Path) -> None:
    model = tiny("llama", "lm", vocab_size=66, tie_word_embeddings=True)
    tz.attach(model, tz.TrainableTokens(token_indices=[7, 9]), "a")
    tz.activate(model, "a")
    with pytest.raises(tz.TanzakuError, match="has a layer at lm_head"):
        trainer("SFT", model).train()


def test_full_fine_tuning_trains_the_head_too(folder: Path) -> None:
    model = loaded(tz.Full())
    before, was = base_of(model), [p.detach().clone() for p in model.parameters() if p.requires_grad]
    trainer("SFT", model).train()
    now = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, base_of(model), strict=True))
    assert len(now) == len(before) and not any(torch.equal(a, b) for a, b in zip(was, now, strict=True))


def test_by_its_own_pass_the_head_is_trained(folder: Path) -> None:
    model = loaded(tz.LoRA(r=2, target_modules=["q_proj", "lm_head"]))
    model(torch.tensor([[1, 7, 9]]), labels=torch.tensor([[1, 7, 9]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
