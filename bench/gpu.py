"""Training many candidates on a GPU, beside HF PEFT: random weights in the shape of llm-jp-3-1.8b."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from bench.concurrent import equal_rows, loras, peak_bytes, race

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 99584,
}


def model_of(dtype: torch.dtype, device: str, **shape: int) -> LlamaForSequenceClassification:
    """A classifier with random weights on `device`."""
    config = LlamaConfig(**{**SHAPE, **shape}, pad_token_id=0, num_labels=2)
    with torch.device(device):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForSequenceClassification(config)
        finally:
            torch.set_default_dtype(before)


def table(
    device: str = "cuda",
    numbers: Sequence[int] = (8, 16),
    lengths: Sequence[int] = (32, 128, 256),
    rows: int = 12,
    **shape: int,
) -> None:
    """Print the Markdown table."""
    if device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("bench gpu: there is no CUDA device")
        print(f"{torch.cuda.get_device_name()}\n")
    print(
        "| base | LoRA candidates | tokens a row | HF PEFT, one after another | Tanzaku, at once | times faster | MiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        model = model_of(dtype, device, **shape)
        for number in numbers:
            for tokens in lengths:
                data = equal_rows(rows, tokens, int(model.config.vocab_size))
                peft, own = race(model, loras(number), data)
                memory = peak_bytes(model, loras(number), data) / 2**20
                print(
                    f"| {str(dtype).removeprefix('torch.')} | {number} | {tokens} | {peft:.2f} s | {own:.2f} s | "
                    f"{peft / own:.2f} | {memory:.0f} |",
                    flush=True,
                )
        del model
