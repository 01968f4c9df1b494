"""`tanzaku convert`: an adapter as LoRA, which more programs read, and what is lost of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from cli_kit import Tanzaku, assert_refused
from transformers import AutoTokenizer

import tanzaku as tz
from close import GRADIENT, assert_close
from tanzaku.models.loading import load_classifier

LABELS = ["mild", "harsh"]


@torch.no_grad()
def trained(model_dir: Path, out: Path, method: tz.Method) -> Path:
    model = load_classifier(str(model_dir), 2, id2label=dict(enumerate(LABELS)), dtype=torch.float32)
    adapter = tz.attach(model, method, "mine", seed=0)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    meta = {"model": str(model_dir), "labels": LABELS, "text": "text", "max_length": 8, "text_pair": None}
    return tz.save(model, "mine", out, meta=meta)


def said_by(model_dir: Path, adapter: Path) -> torch.Tensor:
    model = load_classifier(str(model_dir), 2, id2label=dict(enumerate(LABELS)), dtype=torch.float32)
    tz.load(model, adapter, "mine")
    given = AutoTokenizer.from_pretrained(model_dir)(["warm rain of spring", "a cold wind"], padding=True)
    with torch.no_grad(), tz.route(model, ["mine"] * 2):
        logits: torch.Tensor = model(**given.convert_to_tensors("pt")).logits
        return logits


def test_an_adapter_becomes_lora(model_dir: Path, work: Path, tanzaku: Tanzaku) -> None:
    """With rank enough it says the same, head and labels included; with less, what was lost of each weight."""
    adapter = trained(model_dir, work / "adapter", tz.IA3())
    said = tanzaku("convert", adapter, "--out", "lora", "--r", 16)
    assert said.code == 0, said.err
    assert json.loads(Path("lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    # Through factors of a singular value decomposition.
    assert_close(said_by(model_dir, Path("lora")), said_by(model_dir, adapter), GRADIENT)
    assert tanzaku("predict", "lora", "--data", "test.tsv").code == 0
    said = tanzaku("convert", adapter, "--out", "less", "--r", 1)
    lines = [line for line in said.err.splitlines() if "%" in line and line.endswith(".weight")]
    shares = [float(line.partition("%")[0]) for line in lines]
    assert len(lines) == 6 and shares == sorted(shares, reverse=True)
    assert "of a tensor's change was lost (at most" in said.err


def test_what_cannot_be_converted(model_dir: Path, work: Path, tanzaku: Tanzaku) -> None:
    prompt = trained(model_dir, work / "prompt", tz.PromptTuning(num_virtual_tokens=2))
    lora = trained(model_dir, work / "lora", tz.LoRA(r=2))
    assert_refused(tanzaku("convert", prompt, "--out", "x"), "prompt_tuning is no change of weights")
    assert_refused(tanzaku("convert", lora), "convert needs --out")
    assert_refused(tanzaku("convert", lora, "--out", "x", "--to", "ia3"), "--to is 'ia3', expected lora")
    assert_refused(tanzaku("convert", lora, "--out", "prompt"), "--out prompt is there already")
    assert not Path("x").exists()
