"""Trainer's checkpoints: they hold the adapter alone, and training goes on from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

from close import RUN, assert_close
from compat.program import CONFIGS, ROWS
from models import tiny
from tanzaku.compat import peft as compat
from tanzaku.compat.peft import LoraConfig, PeftModel, get_peft_model


def trainer(model: Any, folder: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{"num_train_epochs": 2, "learning_rate": 0.05, "weight_decay": 1.0, **more},
        per_device_train_batch_size=2,
        save_strategy="epoch",
        eval_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    # Trainer drops columns that the base's forward does not name.
    rows = [{**e.inputs, "labels": e.target, "poem": "unread"} for e in ROWS.train.examples]
    data = datasets.Dataset.from_list(rows)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data.select(range(4)))


def wrapped(name: str) -> tuple[PreTrainedModel, PeftModel]:
    torch.manual_seed(7)
    base = tiny("llama", "cls", num_labels=2)
    return base, get_peft_model(base, eval(CONFIGS[name], vars(compat).copy()))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    _, model = wrapped(name)
    trainer(model, tmp_path / "whole").train()
    folder = tmp_path / "whole" / "checkpoint-4"
    base = {f"base_model.model.{key}" for key in tiny("llama", "cls").state_dict()}
    assert not (load_file(folder / "model.safetensors").keys() & base), "the adapter alone"
    assert (folder / "adapter_config.json").is_file()

    _, again = wrapped(name)
    for parameter in again.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(folder))
    expected, found = model.state_dict(), again.state_dict()
    assert_close(found, expected, RUN)


@pytest.mark.parametrize("name", ["lora", "p_tuning"])
def test_the_best_model_is_loaded_at_the_end(name: str, tmp_path: Path) -> None:
    _, model = wrapped(name)
    done = trainer(model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    done.train()  # by the greatest loss, the best is not always the last
    best = Path(done.state.best_model_checkpoint or "")
    losses = [each["eval_loss"] for each in done.state.log_history if "eval_loss" in each]
    assert_close(done.evaluate()["eval_loss"], max(losses))
    for key, tensor in load_file(best / "model.safetensors").items():
        assert torch.equal(model.state_dict()[key], tensor)


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    _, model = wrapped("lora")
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine too")
    model.save_pretrained(tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "tanzaku.json"}
    assert found == {"checkpoint-9", "notes.txt", "README.md", *files}
    text = (tmp_path / "README.md").read_text()
    assert text.endswith("---\nmine too") and "library_name: peft" in text  # as in PEFT, the Hub learns what it is
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_checkpointed_layers_train_alike(tmp_path: Path) -> None:
    weights = []
    for more in ({}, {"gradient_checkpointing": True}):
        for name in ("lora", "prefix_tuning"):
            _, model = wrapped(name)
            trainer(model, tmp_path / f"{name}{len(more)}", **more).train()
            weights.append({key: p for key, p in model.named_parameters() if p.requires_grad})
    for plain, checkpointed in zip(weights[:2], weights[2:], strict=True):
        for key, tensor in plain.items():
            assert_close(checkpointed[key], tensor)


def test_a_quantised_base_is_trained(tmp_path: Path) -> None:
    """Trainer refuses a quantised model unless it says that it has an adapter."""
    base = tiny("llama", "cls", num_labels=2)
    base.is_quantized = True
    base.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(base, tmp_path)
    trainer(get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=1)), tmp_path)


WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] == "peft" else find(name, *more)
sys.modules["peft"] = None
import torch
from transformers.utils import is_peft_available
assert not is_peft_available()
from compat.test_trainer import trainer
from models import tiny
from tanzaku.compat.peft import LoraConfig, get_peft_model
for folder, resume in (("whole", None), ("again", "whole/checkpoint-4")):
    torch.manual_seed(7)
    model = get_peft_model(tiny("llama", "cls", num_labels=2), LoraConfig(task_type="SEQ_CLS", r=1), "poems")
    trainer(model, folder).train(resume_from_checkpoint=resume)
    model.save_pretrained(folder)
"""


@pytest.mark.slow
def test_hf_peft_need_not_be_there(tmp_path: Path) -> None:
    here = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(here)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    first, second = (load_file(tmp_path / run / "poems" / "adapter_model.safetensors") for run in ("whole", "again"))
    assert first
    assert_close(second, first, RUN)
