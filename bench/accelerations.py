"""What each acceleration is worth here: a training step with all of them, and with all but one.

Steps take turns in one process, each with and without in the same round, so that whatever else the machine does falls
on both alike; the ratio is the median over rounds. The model is a random Gemma 3 classifier of the embedded model's
width and a third of its layers.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence

import torch
from transformers import Gemma3ForSequenceClassification, Gemma3TextConfig, PreTrainedModel

import tanzaku as tz
from tanzaku.core.manager import manager_of
from tanzaku.engine.accelerations import ACCELERATIONS, Accelerations
from tanzaku.engine.names import AUTO
from tanzaku.models.families import Base
from tanzaku.tasks.task import Batch, Example

# Name -> tokens of the rows of a step, each of another LoRA job.
BATCHES = {
    "four rows of 20 tokens": (20, 20, 20, 20),
    "rows of 8 to 60 tokens": (8, 20, 41, 60),
    "one row of 20 tokens": (20,),
}


def model_of(**changes: int) -> PreTrainedModel:
    """A random Gemma 3 classifier, its weights drawn alike in each run."""
    sizes = {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 1000,
    }
    torch.manual_seed(0)
    config = Gemma3TextConfig(**{**sizes, **changes}, num_labels=2, pad_token_id=0, query_pre_attn_scalar=256)
    return Gemma3ForSequenceClassification(config)


class Step:
    """A step of LoRA jobs that share a batch, one row each: forward and backward, and an optimizer of each."""

    def __init__(self, model: PreTrainedModel, lengths: Sequence[int]):
        self.model, self.base = model, Base.of(model)
        self.names = [f"lora{number}" for number in range(len(lengths))]
        self.adapters = [tz.attach(model, tz.LoRA(r=1), name, seed=at) for at, name in enumerate(self.names)]
        self.optimizers = [
            torch.optim.AdamW([p for _, p in adapter.trained()], lr=1e-4, fused=True) for adapter in self.adapters
        ]
        generator = torch.Generator().manual_seed(0)
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.randint(5, model.config.vocab_size, (length,), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        self.batch = Batch(inputs, {}, [Example({"input_ids": range(length)}) for length in lengths])

    def seconds(self, accelerations: Accelerations) -> float:
        """Of a step by these, after another that nobody times."""
        with accelerations, tz.route(self.model, self.names):
            accelerations.take(math.inf)
            for _ in range(2):
                began = time.perf_counter()
                with accelerations.batch(self.batch, self.adapters, manager_of(self.model).route):
                    logits = self.model(**self.batch.inputs, use_cache=False).logits
                    logits.square().sum().backward()
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                seconds = time.perf_counter() - began
        return seconds


def times(model: PreTrainedModel, lengths: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by what is left out of all ("": nothing), round by round."""
    step = Step(model, lengths)
    choices = {"": AUTO, **{name: f"no-{name}" for name in ACCELERATIONS}}
    made = {without: Accelerations(step.base, wanted) for without, wanted in choices.items()}
    seen: dict[str, list[float]] = {without: [] for without in made}
    for _ in range(rounds):
        for without, accelerations in made.items():
            seen[without].append(step.seconds(accelerations))
    for name in step.names:
        tz.detach(model, name)
    return seen


def table(rounds: int = 9, batches: Mapping[str, Sequence[int]] = BATCHES, **changes: int) -> None:
    """Print the Markdown table: the time of a step with all, and how many times as long it takes without each."""
    warnings.filterwarnings("ignore")
    model = model_of(**changes).train()
    found = {title: times(model, lengths, rounds) for title, lengths in batches.items()}
    print("| without | " + " | ".join(found) + " | what it is |")
    print("|---" * (len(found) + 2) + "|")
    whole = (f"{statistics.median(seen['']) * 1e3:.0f} ms" for seen in found.values())
    print("| nothing | " + " | ".join(whole) + " | all of them |")
    for name, kind in ACCELERATIONS.items():
        ratios = (
            statistics.median(slow / fast for slow, fast in zip(seen[name], seen[""], strict=True))
            for seen in found.values()
        )
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + f" | {kind.summary} |", flush=True)
