"""Libraries that ask `isinstance(..., peft.PeftModel)` and build by `peft.get_peft_model`, where HF PEFT is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from close import GRADIENT, RUN, assert_close
from compat.test_model import logits, wrapped
from models import tiny
from tanzaku import TanzakuError
from tanzaku.compat import peft as compat

KINDS = {
    "SEQ_CLS": ("cls", "PeftModelForSequenceClassification"),
    "CAUSAL_LM": ("lm", "PeftModelForCausalLM"),
    None: ("base", "PeftModel"),
}


@pytest.mark.parametrize("task", KINDS)
def test_a_model_is_seen_as_pefts(task: str | None) -> None:
    head, name = KINDS[task]
    base = tiny("llama", head)
    model = compat.get_peft_model(base, compat.LoraConfig(task_type=task))
    for kind in (peft.PeftModel, getattr(peft, name), PreTrainedModel, type(base), compat.PeftModel):
        assert isinstance(model, kind), kind
    assert not isinstance(model, peft.PeftMixedModel) and not isinstance(base, peft.PeftModel)
    assert model.__class__.__name__ == type(base).__name__ and type(model) is getattr(compat, name)
    assert issubclass(model.__class__, peft.PeftModel)
    bare = compat.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), compat.LoraConfig(target_modules=["0"]))
    assert isinstance(bare, peft.PeftModel) and not isinstance(bare, PreTrainedModel)


def test_configurations_are_seen_as_pefts() -> None:
    for name in ("LoraConfig", "IA3Config", "PromptTuningConfig", "PrefixTuningConfig"):
        config = getattr(compat, name)()
        assert isinstance(config, getattr(peft, name)) and isinstance(config, peft.PeftConfig)
        assert isinstance(config, getattr(compat, name)) and type(config) is getattr(compat, name)
    assert isinstance(compat.PrefixTuningConfig(), peft.PromptLearningConfig)
    assert not isinstance(compat.LoraConfig(), peft.IA3Config)


def test_peft_builds_our_models_from_our_configurations() -> None:
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny("llama", "cls", num_labels=2), compat.LoraConfig(task_type="SEQ_CLS", r=2))
    assert type(model) is compat.PeftModelForSequenceClassification
    assert_close(logits(model), logits(tiny("llama", "cls", num_labels=2)))
    theirs = peft.get_peft_model(tiny("llama", "cls"), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    assert type(theirs) is peft.PeftModelForSequenceClassification and not isinstance(theirs, compat.PeftModel)
    layer = next(m for m in model.modules() if isinstance(m, compat.tuners.tuners_utils.BaseTunerLayer))
    assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)


def test_what_puts_layers_into_a_model_says_so() -> None:
    with pytest.raises(TanzakuError, match="makes no layers inside of a model"):
        tiny("llama", "lm").add_adapter(compat.LoraConfig())
    with pytest.raises(TanzakuError, match=r"wrap the model with its get_peft_model\(\)"):
        peft.inject_adapter_in_model(
            compat.LoraConfig(target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(2, 2))
        )


def test_hf_peft_is_not_loaded_for_it() -> None:
    code = """
import sys, torch
from tanzaku.compat.peft import LoraConfig, PeftModel, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
assert isinstance(model, PeftModel) and model.__class__ is PeftModel, model.__class__
assert not any(name.split(".")[0] == "peft" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_before_it_is_made() -> None:
    """A class that is asked for something before its own __init__ says that it has it not."""
    for kind in (compat.PeftModel, compat.PeftModelForCausalLM, compat.tuners.LoraModel):
        new = kind.__new__(kind)
        assert not hasattr(new, "anything") and not hasattr(new, "base_model")


# -- TRL


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(100))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def losses(library: Any, kind: str, how: str, config: str, folder: Path) -> tuple[Any, list[float]]:
    import trl  # seconds, for these tests alone

    torch.manual_seed(5)
    settings: Any = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    base, own = tiny("llama", "lm"), eval(config, vars(library).copy())
    given: Any = (
        {"model": library.get_peft_model(base, own)} if how == "wrapped" else {"model": base, "peft_config": own}
    )
    if kind == "SFT":
        rows = [{"text": " ".join(f"w{(i * 7 + j) % 90}" for j in range(5 + i % 4))} for i in range(8)]
    else:
        rows = [{"prompt": "w1 w2", "chosen": f" w{i} w3", "rejected": f" w{i + 9} w4 w5"} for i in range(8)]
    arguments = getattr(trl, f"{kind}Config")(**settings)
    trainer = getattr(trl, f"{kind}Trainer")(
        **given, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    trainer.train()
    return trainer.model, [each["loss"] for each in trainer.state.log_history if "loss" in each]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "LoraConfig(task_type='CAUSAL_LM', r=2)",
        "IA3Config(task_type='CAUSAL_LM')",
        "PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3)",
    ],
    ids=["lora", "ia3", "prompt_tuning"],
)
@pytest.mark.parametrize("how", ["wrapped", "configuration"])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_trains_alike(kind: str, how: str, config: str, tmp_path: Path) -> None:
    theirs, ours = (losses(library, kind, how, config, tmp_path) for library in (peft, compat))
    assert isinstance(ours[0], compat.PeftModel) and type(ours[0]).__module__.startswith("tanzaku")
    assert len(ours[1]) == 3
    assert_close(ours[1], theirs[1], RUN)
    found = dict(ours[0].named_parameters())
    for key, parameter in theirs[0].named_parameters():
        if parameter.requires_grad:
            assert_close(found[key], parameter, GRADIENT)
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()


def test_a_wrapper_in_sentence_transformers_place() -> None:
    """What holds the wrapper as a module sees its parameters, by names that its state has, too."""

    class Holder(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.auto_model = model

    model = wrapped(compat, "LoraConfig(task_type='SEQ_CLS', r=2)")
    holder = Holder(model)
    trained = [name for name, p in holder.named_parameters() if p.requires_grad]
    assert len(trained) == 9
    assert all(f"auto_model.{name}" in trained for name, p in model.named_parameters() if p.requires_grad)
    assert set(trained) <= set(holder.state_dict())
    assert not holder.load_state_dict(holder.state_dict()).missing_keys
