"""What a training step of each method takes beside HF PEFT's: `python -m bench methods [NAME ...]`.

The model is a random Gemma 3 classifier of the embedded model's width and a third of its layers, rows are of 32 tokens,
and both libraries have the same settings, the method's own. Steps take turns in one process. The last column is a row
of each of eight adapters beside eight rows of one: what it costs that they are eight.

On one thread (`OMP_NUM_THREADS=1`) it is the processor's time that is counted, which other programs lengthen less.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import tanzaku as tz
from bench.accelerations import model_of
from bench.subjects import STEPS, Stepper, batch_of
from tanzaku.core.manager import manager_of
from tanzaku.core.routing import Route
from tanzaku.engine.accelerations import Accelerations
from tanzaku.engine.memory import LiveBytes
from tanzaku.errors import TanzakuError
from tanzaku.methods import METHODS, method_named
from tanzaku.tasks.task import Batch, Example

# Settings without which a method is not what a user would train on a small model.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "adalora": {"total_step": STEPS},
    "bitfit": {"bias_scope": "add"},
    "c3a": {"block_size": 128},
    "cpt": {"cpt_token_ids": [*range(10, 30)]},
    "llama_adapter": {"adapter_layers": 2},
    "trainable_tokens": {"token_indices": [*range(10, 30)]},
    "vblora": {"vector_length": 128},
}
PARTS = ("part-0", "part-1", "part-2")  # LoRA adapters that those are made of which are made of others
ROUNDS = {1: 9, 8: 5}


def ours(model: PreTrainedModel, name: str, adapters: int = 1) -> Stepper:
    """Tanzaku's step of so many adapters, which share its rows out."""
    if METHODS[name].uses_others:
        for at, part in enumerate(PARTS):
            tz.attach(model, tz.LoRA(), part, seed=100 + at)
    made = [tz.attach(model, method(name), f"bench-{at}", seed=at) for at in range(adapters)]
    for adapter in made:
        adapter.method.prepare(adapter, STEPS)
    accelerations = Accelerations(made[0].base).__enter__()
    if made[0].method.shares_batch:
        accelerations.take(math.inf)
    model.train()
    route = Route.of([adapter.name for adapter in made])
    manager_of(model).switch(route)

    def forward(batch: dict[str, Tensor]) -> Tensor:
        rows, length = batch["input_ids"].shape
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        together = Batch(inputs, {}, [Example({"input_ids": range(length)})] * rows)
        owners = [adapter for adapter in made for _ in range(rows // adapters)]
        with accelerations.batch(together, owners, route):
            loss = cross_entropy(model(**inputs, use_cache=False).logits, batch["labels"])
        penalties = [adapter.method.penalty(adapter) for adapter in made]
        return loss + sum(penalty for penalty in penalties if penalty is not None)

    def after(step: int) -> None:
        for adapter in made:
            adapter.method.after_step(adapter, step)

    return Stepper(forward, [p for adapter in made for _, p in adapter.trained()], after)


def theirs(model: PreTrainedModel, name: str) -> Stepper:
    """HF PEFT's, with the settings that both have.

    Raises:
        Exception: whatever PEFT says where it has not this method for this model.
    """
    import peft

    shadow = copy.deepcopy(model)
    settings = tz.attach(shadow, method(name), "settings").method.settings()
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(METHODS[name].peft_type)]
    known = {field.name for field in dataclasses.fields(kind)}
    given = {key: value for key, value in settings.items() if key in known and value is not None}
    wrapped: Any = peft.get_peft_model(model, kind(**{**given, "task_type": "SEQ_CLS"}))
    wrapped.train()
    after: Callable[[int], None] = getattr(wrapped.base_model, "update_and_allocate", lambda step: None)
    of_tasks = bool(known & {"n_tasks", "num_tasks"})

    def forward(batch: dict[str, Tensor]) -> Tensor:
        of_one = {"task_ids": torch.zeros(len(batch["labels"]), dtype=torch.long)} if of_tasks else {}
        loss: Tensor = wrapped(**batch, **of_one).loss
        return loss

    return Stepper(forward, [p for p in wrapped.parameters() if p.requires_grad], after)


def method(name: str) -> tz.Method:
    parts = {"adapters": [*PARTS]} if METHODS[name].uses_others else {}
    return METHODS[name].from_settings({**SETTINGS.get(name, {}), **parts})


def in_turns(steppers: Mapping[str, Stepper], rows: int) -> dict[str, float]:
    """Milliseconds a step of each: medians."""
    batch = {key: x % 1000 if key == "input_ids" else x for key, x in batch_of(rows).items()}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seen: dict[str, list[float]] = {name: [] for name in steppers}
    for round_ in range(ROUNDS[rows] + 2):
        for name, stepper in steppers.items():
            began = clock()
            stepper.step(batch)
            if round_ >= 2:
                seen[name].append(clock() - began)
    return {name: statistics.median(values) * 1e3 for name, values in seen.items()}


def peak(stepper: Stepper) -> float:
    """MiB that the tensors of a step of eight rows hold at most."""
    batch = {key: x % 1000 if key == "input_ids" else x for key, x in batch_of(8).items()}
    stepper.step(batch)
    with LiveBytes() as live:
        stepper.step(batch)
    return live.peak / 2**20


def row_of(name: str, model: PreTrainedModel) -> str:
    """A line of the table."""
    one = {"ours": ours(copy.deepcopy(model), name)}
    if METHODS[name].in_peft and not METHODS[name].uses_others:  # PEFT reads parts from directories alone
        try:
            one["theirs"] = theirs(copy.deepcopy(model), name)
        except Exception:  # whatever PEFT says of a model that it has no such method for
            one.pop("theirs", None)
    times = {rows: in_turns(one, rows) for rows in (1, 8)}
    memory = {who: peak(stepper) for who, stepper in one.items()}
    cells = [f"`{name}`"]
    for found, unit in ((times[1], "ms"), (times[8], "ms"), (memory, "MiB")):
        beside = f"{found['theirs']:.0f}, {found['ours'] / found['theirs']:.2f}" if "theirs" in found else "-"
        cells.append(f"{found['ours']:.0f} {unit} ({beside})")
    if METHODS[name].shares_batch:
        eight = in_turns({"one": one["ours"], "eight": ours(copy.deepcopy(model), name, 8)}, 8)
        cells.append(f"{eight['eight'] / eight['one']:.2f}")
    else:
        cells.append("-")
    return f"| {' | '.join(cells)} |"


def table(names: Sequence[str]) -> None:
    """Print the Markdown table of the methods named, or of all."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = model_of()
    print("| method | one row (HF PEFT, ratio) | eight rows | peak of a step of eight | eight adapters, by one |")
    print("|---|---|---|---|---|")
    for name in names or METHODS:
        method_named(name)
        try:
            print(row_of(name, model), flush=True)
        except TanzakuError as error:
            print(f"| `{name}` | {error} | | | |", flush=True)
