"""Sequence to sequence through the command line: what is its own beside what every task has."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import Tanzaku, assert_refused, results_of
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tanzaku.models import loading

TEXTS = ["warm rain", "cold wind of winter", "sea of rain", "warm sea", "cold spring", "winter"]
METHODS = ["lora", "prompt_tuning", "prefix_tuning"]


def written(path: str, *rows: Any) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def rows(work: Path, bart_dir: Path) -> list[str]:
    """Flags of a run on rows whose columns have other names."""
    every = [{"ja": text, "en": "warm" if "warm" in text else "a cold sea"} for text in TEXTS]
    written("train.jsonl", *every)
    written("valid.jsonl", *({"ja": f"of {text}", "en": "warm"} for text in TEXTS))
    written("new.jsonl", *({"ja": f"the {text}"} for text in TEXTS), {"ja": ""})
    columns = ["--source", "ja", "--target", "en", "--source-prefix", "a ", "--max-new-tokens", "5"]
    options = ["--epochs", "2", "--batch-size", "2", "--learning-rate", "0.02", "--max-length", "8"]
    return ["--task", "seq2seq", "--model", str(bart_dir), "--train", "train.jsonl", *columns, *options]


def texts(tanzaku: Tanzaku, *args: Any) -> Any:
    said = tanzaku("predict", *args, "--data", "new.jsonl", "--json")
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


def test_adapters_answer_together_as_they_do_alone(rows: list[str], tanzaku: Tanzaku, bart_dir: Path) -> None:
    for name in METHODS:
        said = tanzaku("train", *rows, "--method", name, "--out", name)
        assert said.code == 0, said.err
    paths = [f"{name}/adapters/{name}" for name in METHODS]
    together = texts(tanzaku, "--adapters", *paths)
    drawn = ("--temperature", "1.2", "--seed", "3")
    assert len({line["predicted"] for line in texts(tanzaku, paths[0], *drawn)}) > 3
    for path, name in zip(paths, METHODS, strict=True):
        alone = texts(tanzaku, path)
        assert [line["predicted"] for line in alone] == [line["adapters"][name]["predicted"] for line in together]
        assert alone[-1]["predicted"] is None, "there is nothing to read"

    # As HF PEFT leaves it, nothing says what stood before the sources.
    expected = texts(tanzaku, paths[0])
    about = json.loads(Path(paths[0], "adapter_config.json").read_text(encoding="utf-8"))
    assert about["task_type"] == "SEQ_2_SEQ_LM"
    shutil.copytree(paths[0], "theirs")
    Path("theirs/tanzaku.json").unlink()
    said_so = ["--source", "ja", "--source-prefix", "a ", "--max-new-tokens", "5"]
    assert texts(tanzaku, "theirs", *said_so) == expected
    assert_refused(tanzaku("predict", "theirs", "--data", "new.jsonl"), "no column 'source'")

    said = tanzaku("merge", paths[0], "--out", "merged")
    assert said.code == 0, said.err
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("merged").eval(), AutoTokenizer.from_pretrained("merged")
    for line in expected[:3]:
        ids = tokenizer(f"a {line['ja']}", return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=5, num_beams=1, do_sample=False)
        assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == line["predicted"]


def test_full_fine_tuning_and_a_report(rows: list[str], tanzaku: Tanzaku) -> None:
    written("valid.jsonl", *({"ja": f"of {text}", "en": "warm"} for text in TEXTS))
    options = ["--valid", "valid.jsonl", "--method", "full", "--method", "ia3", "--workers", "1", "--seeds", "2"]
    said = tanzaku("compare", *rows, *options, "--out", "run")
    assert said.code == 0, said.err
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "of warm rain" in page and "a of warm" not in page, "rows are shown as they stand in the file"
    assert results_of(Path("run"))["design"]["metric"] == "chrf"


def test_a_chat_reads_sources(rows: list[str], tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tanzaku("train", *rows, "--method", "lora", "--out", "run").code == 0
    expected = texts(tanzaku, "run/adapters/lora")[0]["predicted"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the warm rain\n"))
    said = tanzaku("chat", "run/adapters/lora")
    assert said.code == 0, said.err
    assert expected in said.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("warm\n"))
    assert_refused(tanzaku("chat", "run/adapters/lora", "--template"), "no chat template")


@pytest.mark.parametrize("task", ["seq2seq", "generation"])
def test_a_model_of_the_other_kind(
    task: str, rows: list[str], tanzaku: Tanzaku, model_dir: Path, bart_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before weights are read."""

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loading, "_pretrained", read)
    if task == "seq2seq":
        wrong = [str(model_dir) if part == str(bart_dir) else part for part in rows]
        assert_refused(tanzaku("train", *wrong, "--method", "lora"), "no encoder-decoder", "task: generation")
    else:
        written("pairs.jsonl", {"prompt": "a", "completion": " sea"})
        said = tanzaku(
            "train", "--task", "generation", "--model", bart_dir, "--train", "pairs.jsonl", "--method", "lora"
        )
        assert_refused(said, "is an encoder-decoder", "task: seq2seq")


BAD: dict[str, tuple[list[str], list[str]]] = {
    "no such column": (["--target", "fr"], ["no column 'fr'", "--target"]),
    "one column": (["--target", "ja"], ["--source and --target both name the column 'ja'"]),
    "long sources": (["--max-length", "3"], ["2 of 6 rows", "more than 3 tokens", "--max-length 5"]),
    "long targets": (["--max-target-length", "2"], ["more than 2 tokens of the target", "--max-target-length 4"]),
    "no room": (
        ["--max-new-tokens", "64", "--valid", "valid.jsonl"],
        ["65 tokens of a text", "64 positions", "--max-new-tokens 63"],
    ),
    "no languages": (["--target-lang", "en_XX"], ["marks no languages"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_before_training(case: str, rows: list[str], tanzaku: Tanzaku) -> None:
    options, says = BAD[case]
    assert_refused(tanzaku("train", *rows, *options, "--method", "lora", "--out", "run"), *says)
    assert not Path("run").exists()


@pytest.mark.parametrize("limit", [["--max-length", "4"], ["--max-target-length", "3"]], ids=["source", "target"])
def test_long_rows_are_left_out_or_cut(limit: list[str], rows: list[str], tanzaku: Tanzaku) -> None:
    """By either of their texts: the cold wind of winter goes, or what is not warm."""
    said = tanzaku("train", *rows, *limit, "--too-long", "drop", "--method", "lora", "--out", "run")
    assert said.code == 0, said.err
    gone = 1 if "--max-length" in limit else 4
    most, target = (4, 128) if gone == 1 else (8, 3)
    told = f"{gone} of 6 training rows (train.jsonl) have more than {most} tokens, or {target} of a target"
    assert told in " ".join(said.out.split())
    assert results_of(Path("run"))["data"]["rows"] == {"train": 6 - gone}
    said = tanzaku("train", *rows, *limit, "--too-long", "cut", "--method", "lora", "--out", "cut")
    assert f"{gone} of 6 training texts were cut at {most} tokens, or {target} of a target" in said.out
    said = tanzaku("train", *rows, "--max-target-length", "1", "--too-long", "drop", "--method", "lora")
    assert_refused(said, "all 6 rows", "or 1 of a target", "allow more")


def test_texts_of_all_positions_leave_none_for_a_prompt(rows: list[str], tanzaku: Tanzaku) -> None:
    written("train.jsonl", {"ja": "warm " * 60, "en": "sea"}, {"ja": "rain", "en": "warm " * 60})
    options = ["--max-length", "64", "--max-new-tokens", "3"]
    said = tanzaku("train", *rows, *options, "--method", "prompt_tuning", "--set", "num_virtual_tokens=10")
    assert_refused(said, "has 61 tokens at max_length 64 and 10 virtual ones", "64 positions")
    said = tanzaku("train", *rows, *options, "--method", "prefix_tuning", "--set", "num_virtual_tokens=10")
    assert_refused(said, "a target of 61 tokens and 10 of a prefix", "--max-target-length 54")


def test_rows_are_shown_with_what_is_learnt(rows: list[str], tanzaku: Tanzaku) -> None:
    said = tanzaku("train", *rows, "--method", "lora", "--out", "run")
    assert said.code == 0, said.err
    assert "a|warm|rain" in said.out and "warm|</s>" in said.out


def test_translations_as_datasets_have_them(rows: list[str], tanzaku: Tanzaku) -> None:
    """A dictionary by language in one column."""
    assert tanzaku("train", *rows, "--method", "lora", "--out", "plain").code == 0
    for name in ("train", "new"):
        lines = [json.loads(line) for line in Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        written(f"{name}.jsonl", *({"id": n, "translation": line} for n, line in enumerate(lines)))
    nested = [{"ja": "translation.ja", "en": "translation.en"}.get(part, part) for part in rows]
    said = tanzaku("train", *nested, "--method", "lora", "--out", "run")
    assert said.code == 0, said.err
    found = texts(tanzaku, "run/adapters/lora")
    assert [*found[0]] == ["id", "translation", "predicted"]
    losses = [results_of(Path(out))["jobs"][0]["epochs"][-1]["train_loss"] for out in ("plain", "run")]
    assert losses[0] == pytest.approx(losses[1])
    odd = ["translation.fr" if part == "translation.ja" else part for part in nested]
    assert_refused(tanzaku("train", *odd, "--method", "lora"), "no column 'translation.fr'", "id, translation")
    said = tanzaku("predict", "run/adapters/lora", "--data", "new.jsonl", "--source", "translation.fr")
    assert_refused(said, "no column 'translation.fr'")


def test_own_metrics_and_long_rows_are_those_of_generation(rows: list[str], tanzaku: Tanzaku) -> None:
    """But for what the base forgets, of which such models have no figure."""
    Path("mine.py").write_text("def short(text, reference):\n    return len(text) < 99\n", encoding="utf-8")
    every = [{"ja": f"the {text}", "en": "warm"} for text in (*TEXTS, "rain " * 20)]
    written("valid.jsonl", *every)
    flags = ["--valid", "valid.jsonl", "--measure", "mine.py:short", "--too-long", "drop", "--method", "lora"]
    said = tanzaku("train", *rows, *flags, "--out", "run")
    assert said.code == 0, said.err
    assert "1 of 7 validation rows (valid.jsonl) have more than 8 tokens, or" in said.out
    results = results_of(Path("run"))
    [job] = results["jobs"]
    assert job["valid"]["short"] == 1 and len(job["predictions"]) == 6
    assert results["forgetting"] is None and job["held_perplexity"] is None
    Path("held.txt").write_text("the sea", encoding="utf-8")
    said = tanzaku("train", *rows, "--method", "lora", "--forgetting", "held.txt", "--out", "other")
    assert_refused(said, "task seq2seq has no perplexity of a text", "generation")
