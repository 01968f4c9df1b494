"""A program as users write it for HF PEFT, run by either library: only the line that imports changes."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from task_data import as_transformers, task

# Rows of one length: with padding, PEFT's soft prompts pool at it (see docs/design.md).
ROWS = task((6,), train=8)

# The shape of the book's listings: a configuration, a wrapped model, Trainer as it is.
PROGRAM = """
import torch
from transformers import Trainer, TrainingArguments
from peft import AdaLoraConfig, AdaptionPromptConfig, IA3Config, LoraConfig, PrefixTuningConfig
from peft import LoHaConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.peft_model import PeftModelForSequenceClassification

class Plain(PeftModelForSequenceClassification):
    def add_adapter(self, adapter_name, peft_config, low_cpu_mem_usage=False):
        called.append(adapter_name)
        return super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage)

called = []
torch.manual_seed(7)
peft_config = {config}
model = Plain(base, peft_config) if direct else get_peft_model(base, peft_config)
model.print_trainable_parameters()
arguments = TrainingArguments(
    output_dir=out,
    num_train_epochs=2,
    learning_rate=0.02,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=4,
    weight_decay=1.0,
    eval_strategy="epoch",
    logging_strategy="epoch",
    save_strategy="epoch",
    remove_unused_columns=False,
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=train, eval_dataset=valid, data_collator=collate,
    compute_metrics=lambda p: {{"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}},
)
trainer.train()
trainer.save_model(out + "/last")
"""

CONFIGS = {
    "lora": "LoraConfig(task_type=TaskType.SEQ_CLS, r=1)",
    "adalora": "AdaLoraConfig(task_type=TaskType.SEQ_CLS, init_r=2, target_r=0.5, total_step=8)",
    "prompt_tuning": "PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3)",
    "p_tuning": "PromptEncoderConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3, encoder_hidden_size=24)",
    "prefix_tuning": "PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3)",
    "ia3": "IA3Config(task_type=TaskType.SEQ_CLS)",
    "loha": "LoHaConfig(task_type=TaskType.SEQ_CLS, r=2)",
    "llama_adapter": "AdaptionPromptConfig(task_type=TaskType.SEQ_CLS, adapter_layers=1, adapter_len=4)",
}


@dataclass
class Run:
    """What a program has printed and left."""

    printed: str
    model: Any
    trainer: Any
    folder: Path
    names: dict[str, Any] = field(repr=False)

    @property
    def logs(self) -> list[dict[str, float]]:
        """Losses and metrics of every epoch, without times."""
        kept = ("loss", "eval_loss", "eval_accuracy", "learning_rate", "step", "grad_norm")
        return [{k: v for k, v in each.items() if k in kept} for each in self.trainer.state.log_history]

    def tensors(self, where: str = "last") -> dict[str, Tensor]:
        return load_file(self.folder / where / "adapter_model.safetensors")


def run(library: str, text: str, folder: Path, base: Any, **names: Any) -> Run:
    """Run a program with `library` in the place of peft."""
    text = text.replace("from peft", f"from {library}")
    assert ROWS.valid is not None
    given = {
        "base": base,
        "out": str(folder),
        "train": ROWS.train.examples,
        "valid": ROWS.valid.examples,
        "collate": lambda examples: as_transformers(ROWS.task.collate(examples, ROWS.pad_token_id)),
        "direct": False,
        **names,
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, library, "exec"), given)
    return Run(printed.getvalue(), given["model"], given.get("trainer"), folder, given)
