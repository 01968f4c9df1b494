"""Inference with many adapters in one batch: beside the base alone, and beside HF PEFT's `adapter_names`."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

import tanzaku as tz
from bench.subjects import TOKENS
from tanzaku.models.loading import load_classifier

ROWS = 32


def table(numbers: Sequence[int] = (1, 8, 32), rounds: int = 7) -> None:
    """Print the Markdown table: seconds of one forward pass, medians in turns."""
    warnings.filterwarnings("ignore")
    base = load_classifier("embedded", 2).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200_000, (ROWS, TOKENS), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    print("| LoRA adapters, r=8 | base alone | Tanzaku | over the base | HF PEFT | over the base |")
    print("|---|---|---|---|---|---|")
    for number in numbers:
        names = [f"a{i}" for i in range(number)]
        rows = [names[row * number // ROWS] for row in range(ROWS)]
        passes = {
            "base": alone(copy.deepcopy(base), inputs),
            "tanzaku": ours(copy.deepcopy(base), names, rows, inputs),
            "peft": theirs(copy.deepcopy(base), names, rows, inputs),
        }
        t = turns(passes, rounds)
        print(
            f"| {number} | {t['base'] * 1e3:.0f} ms | {t['tanzaku'] * 1e3:.0f} ms | {t['tanzaku'] / t['base']:.2f} | "
            f"{t['peft'] * 1e3:.0f} ms | {t['peft'] / t['base']:.2f} |",
            flush=True,
        )


def turns(passes: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    seen: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            for name, run in passes.items():
                began = time.perf_counter()
                run()
                if round_:
                    seen[name].append(time.perf_counter() - began)
    return {name: sorted(values)[len(values) // 2] for name, values in seen.items()}


def alone(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    return lambda: model(**inputs, use_cache=False).logits


def ours(
    model: PreTrainedModel, names: Sequence[str], rows: Sequence[str], inputs: dict[str, torch.Tensor]
) -> Callable[[], object]:
    for seed, name in enumerate(names):
        tz.attach(model, tz.LoRA(r=8, init_lora_weights=False), name, seed=seed)

    def run() -> object:
        with tz.route(model, list(rows)):
            return model(**inputs, use_cache=False).logits

    return run


def theirs(
    model: PreTrainedModel, names: Sequence[str], rows: Sequence[str], inputs: dict[str, torch.Tensor]
) -> Callable[[], object]:
    import peft

    # Without a task, so that PEFT adds no head of its own to each adapter: it cannot route those by row.
    config = peft.LoraConfig(r=8, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.eval()
    return lambda: wrapped(**inputs, use_cache=False, adapter_names=list(rows)).logits
