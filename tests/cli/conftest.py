"""A model and a tokenizer small enough to train in a second, data for them, and the command line in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import ROWS, TEXTS, Said, Tanzaku, write_tsv
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tanzaku.cli import main

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "warm", "cold", "spring", "winter", "rain", "the", "a", "wind", "of", "sea"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bart_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """An encoder-decoder with the same tokenizer."""
    path = tmp_path_factory.mktemp("bart")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, path)
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=len(WORDS), **sizes, **heads, **special, forced_eos_token_id=None)
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture
def work(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with train.tsv, valid.tsv, test.tsv and recipe.yaml in it."""
    monkeypatch.chdir(tmp_path)
    for name, before in (("train", ""), ("valid", "the "), ("test", "a ")):  # no row is in two of them
        write_tsv(tmp_path / f"{name}.tsv", [(before + text, label) for text, label in ROWS])
    (tmp_path / "recipe.yaml").write_text(
        f"model: {model_dir}\n"
        "data: {train: train.tsv, valid: valid.tsv, test: test.tsv}\n"
        "train: {epochs: 2, batch_size: 2, learning_rate: 1e-2, max_length: 8}\n"
        "methods:\n  - lora: {r: 2}\n",
        encoding="utf-8",
    )
    return tmp_path


@pytest.fixture
def tanzaku(capfd: pytest.CaptureFixture[str]) -> Tanzaku:
    def run(*args: Any) -> Said:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Said(code, out, err)

    return run


@pytest.fixture
def recipe_of_texts(work: Path) -> Path:
    """A recipe of the task generation in a folder below the current directory, beside its rows."""
    folder = work / "job"
    folder.mkdir()
    for split, before in (("train", ""), ("valid", "the "), ("test", "a ")):
        rows = [{"prompt": before + text, "completion": " cold" if "cold" in text else " warm"} for text in TEXTS]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    text = Path("recipe.yaml").read_text(encoding="utf-8").replace(".tsv", ".jsonl")
    text = text.replace("data: {", "task: generation\ndata: {max_new_tokens: 3, ")
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder / "recipe.yaml"
