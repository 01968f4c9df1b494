"""Text by several adapters in one batch, beside the same adapters one after another."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import tanzaku as tz
from tanzaku.models.loading import load_base
from tanzaku.tasks.decoding import Decoding, decode

PROMPT, NEW, ROWS = 32, 16, 2  # tokens of a prompt, of what is written, and prompts of each adapter


def table(numbers: Sequence[int] = (1, 8), rounds: int = 3) -> None:
    """Print the Markdown table: seconds for all texts, the best of some rounds, in turns."""
    warnings.filterwarnings("ignore")
    model, _ = load_base("embedded", AutoModelForCausalLM, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 200_000, (ROWS, PROMPT), generator=generator).tolist()
    for seed in range(max(numbers)):
        tz.attach(model, tz.LoRA(r=8, init_lora_weights=False), f"a{seed}", seed=seed)
    model.generation_config.eos_token_id = None  # all texts are of one length
    print("| LoRA adapters, r=8 | in one batch | one after another | faster |")
    print("|---|---|---|---|")
    for number in numbers:
        names = [f"a{at}" for at in range(number)]
        ways: dict[str, Callable[[], int]] = {
            "together": lambda names=names: written(model, names, prompts),
            "apart": lambda names=names: sum(written(model, [name], prompts) for name in names),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for way, run in ways.items():
                began = time.perf_counter()
                assert run() == number * ROWS * NEW
                best[way] = min(best[way], time.perf_counter() - began)
        print(
            f"| {number} | {best['together']:.1f} s | {best['apart']:.1f} s | {best['apart'] / best['together']:.2f} |",
            flush=True,
        )


def written(model: PreTrainedModel, names: Sequence[str], prompts: list[list[int]]) -> int:
    """Tokens that were written for all."""
    settings = Decoding(max_new_tokens=NEW)
    return sum(len(each.tokens) for each in decode(model, dict.fromkeys(names, prompts), settings, 0))
