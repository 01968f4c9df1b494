"""What is measured: each method with the book's settings, in Tanzaku and in HF PEFT, on one model and one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

import tanzaku as tz
from tanzaku.core.manager import manager_of
from tanzaku.core.routing import Route
from tanzaku.engine.accelerations import Accelerations
from tanzaku.models.loading import load_classifier
from tanzaku.tasks.task import Batch, Example

TOKENS = 32
STEPS = 100_000  # a schedule long enough that no measured step is its last
METHODS = ("lora", "adalora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3", "llama_adapter", "full", "head")


def model_for(method: str) -> PreTrainedModel:
    """The embedded Gemma 3 270M; PEFT knows LLaMA-Adapter for Llama alone, so there a random one of that size."""
    if method != "llama_adapter":
        return load_classifier("embedded", 2)
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=262144,
            pad_token_id=0,
            num_labels=2,
        )
    )


def ours(method: str) -> tz.Method:
    """Tanzaku's settings."""
    makers: dict[str, Callable[[], tz.Method]] = {
        "lora": lambda: tz.LoRA(r=1),
        "adalora": lambda: tz.AdaLoRA(init_r=2, target_r=0.5, total_step=STEPS),
        "prompt_tuning": lambda: tz.PromptTuning(num_virtual_tokens=10),
        "p_tuning": lambda: tz.PTuning(num_virtual_tokens=10),
        "prefix_tuning": lambda: tz.PrefixTuning(num_virtual_tokens=10),
        "ia3": lambda: tz.IA3(),
        "llama_adapter": lambda: tz.LlamaAdapter(adapter_layers=8, adapter_len=10),
        "full": lambda: tz.Full(),
        "head": lambda: tz.Head(),
    }
    return makers[method]()


def theirs(method: str) -> Any:
    """HF PEFT's settings, or None for the baselines that PEFT leaves to plain transformers."""
    import peft

    t = {"task_type": "SEQ_CLS"}
    makers: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=1, **t),
        "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=0.5, total_step=STEPS, **t),
        "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=10, **t),
        "p_tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=10, encoder_hidden_size=640, **t),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=10, **t),
        "ia3": lambda: peft.IA3Config(**t),
        "llama_adapter": lambda: peft.AdaptionPromptConfig(adapter_layers=8, adapter_len=10, **t),
        "full": lambda: None,
        "head": lambda: None,
    }
    return makers[method]()


@dataclass
class Stepper:
    """One library's training step: forward, loss, backward, clipping, AdamW and the method's own part."""

    forward: Callable[[dict[str, Tensor]], Tensor]
    trained: list[torch.nn.Parameter]
    after: Callable[[int], None]

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.count = 0

    def step(self, batch: dict[str, Tensor]) -> None:
        self.forward(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.count += 1
        self.after(self.count)
        self.optimizer.zero_grad(set_to_none=True)


def tanzaku_stepper(model: PreTrainedModel, method: str) -> Stepper:
    adapter = tz.attach(model, ours(method), "bench", seed=0)
    settings = adapter.method
    settings.prepare(adapter, STEPS)
    accelerations = Accelerations(adapter.base).__enter__()
    if settings.shares_batch:
        accelerations.take(math.inf)
    model.train()
    route = Route.everywhere("bench")
    manager_of(model).switch(route)

    def forward(batch: dict[str, Tensor]) -> Tensor:
        rows, length = batch["input_ids"].shape
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        together = Batch(inputs, {}, [Example({"input_ids": range(length)})] * rows)
        with accelerations.batch(together, [adapter] * rows, route):
            logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        penalty = settings.penalty(adapter)
        return loss if penalty is None else loss + penalty

    return Stepper(forward, [p for _, p in adapter.trained()], lambda n: settings.after_step(adapter, n))


def peft_stepper(model: PreTrainedModel, method: str, config: Any = None) -> Stepper:
    """`config` stands in for the method's settings above."""
    import peft

    config = config or theirs(method)
    after: Callable[[int], None] = lambda n: None  # noqa: E731
    if config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or name.startswith("score"))
        wrapped: Any = model
    else:
        wrapped = peft.get_peft_model(model, config)
        if method == "adalora":
            after = wrapped.base_model.update_and_allocate
    wrapped.train()
    return Stepper(lambda b: wrapped(**b).loss, [p for p in wrapped.parameters() if p.requires_grad], after)


STEPPERS = {"tanzaku": tanzaku_stepper, "peft": peft_stepper}


def batch_of(rows: int) -> dict[str, Tensor]:
    """Rows of 32 tokens, the same for both."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200_000, (rows, TOKENS), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
