"""Text that jobs write while they train: those that come to an epoch's end together write in one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tanzaku as tz
from models import tiny
from tanzaku.tasks import inference
from tanzaku.tasks.data import Table
from tanzaku.tasks.generation import Generation, GenerationSettings
from tanzaku.tasks.task import TaskData
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings

WORDS = ["<pad>", "</s>", "warm", "cold", "rain", "wind", "sea", "spring", "winter"]
KINDS = {
    "lora": tz.LoRA(r=2, target_modules="all-linear", lora_dropout=0.1),
    "ia3": tz.IA3(),
    "prompt": tz.PromptTuning(num_virtual_tokens=3),
}


def data() -> TaskData:
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    prompts = ["warm rain", "cold", "spring sea wind", "winter rain", "warm", "cold wind"]
    table = Table({"prompt": prompts, "completion": [" sea", " rain", " warm", " cold", " spring", " winter"]}, "rows")
    own = GenerationSettings(train="rows", max_new_tokens=4, sample=3)
    task = Generation.learn({"train": table}, own).told_by(tokenizer)
    split = task.encode(table, "train", tokenizer, 20, own)
    return TaskData(split, split, split, task)


def jobs(names: list[str]) -> list[Job]:
    settings = TrainSettings(epochs=2, batch_size=2, learning_rate=0.01, metric="chrf", restore_best=True)
    return [Job(name, KINDS[name], settings) for name in names]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Any]]]:
    """Who wrote in each batch."""
    found: list[list[Any]] = []
    decode = inference.decode

    def seen(model: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        found.append([*prompts])
        return decode(model, prompts, *args, **options)

    monkeypatch.setattr(inference, "decode", seen)
    yield found


def test_jobs_write_in_one_batch_what_each_would_alone(batches: list[list[Any]]) -> None:
    rows = data()
    together = train_jobs(tiny("llama", "lm", vocab_size=len(WORDS)), rows, jobs([*KINDS]), workers=1)
    # Two samples, and all validation and all test rows at the end.
    assert list(map(sorted, batches)) == [sorted(KINDS)] * 4
    for result in together:
        [alone] = train_jobs(tiny("llama", "lm", vocab_size=len(WORDS)), rows, jobs([result.name]), workers=1)
        assert result.status == alone.status == "done"
        assert [p["text"] for p in result.predictions or []] == [p["text"] for p in alone.predictions or []]
        for mine, other in zip(result.epochs, alone.epochs, strict=True):
            assert mine.valid == pytest.approx(other.valid, rel=1e-4, nan_ok=True)


def test_one_that_cannot_write_does_not_stop_the_others(
    batches: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = inference.decode

    def broken(model: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        if "ia3" in prompts:
            raise tz.TanzakuError("the scores of token 1 of row 1 are nan, expected numbers")
        return decode(model, prompts, *args, **options)

    monkeypatch.setattr(inference, "decode", broken)
    found = train_jobs(tiny("llama", "lm", vocab_size=len(WORDS)), data(), jobs([*KINDS]), workers=1)
    assert {result.name: result.status for result in found} == {"lora": "done", "ia3": "failed", "prompt": "done"}


def test_a_loss_that_is_no_number_is_not_that_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six validation rows the sample has three, and the one that is broken is none of these."""
    records = Generation.records

    def broken(self: Any, outputs: Any, batch: Any) -> Any:
        found = records(self, outputs, batch)
        found["loss"][[example.target == "cold" for example in batch.examples]] = math.nan
        return found

    monkeypatch.setattr(Generation, "records", broken)
    [found] = train_jobs(tiny("llama", "lm", vocab_size=len(WORDS)), data(), jobs(["lora"]), workers=1)
    assert found.epochs and all(math.isnan(epoch.valid["loss"]) for epoch in found.epochs)


def test_under_a_limit_of_memory_each_writes_alone(batches: list[list[Any]]) -> None:
    train_jobs(tiny("llama", "lm", vocab_size=len(WORDS)), data(), jobs(["lora", "ia3"]), workers=1, memory=2**40)
    assert batches and all(len(each) == 1 for each in batches)
