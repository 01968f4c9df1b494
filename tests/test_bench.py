"""The benchmarks run; what they measure is measured on the machine that asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import accelerations, concurrent, files, gpu, methods_quality, t_few
from bench.quality import poems
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tanzaku.compare.journal import Journal

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def test_the_table_of_the_gpu_on_a_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.table("cpu", numbers=(2,), lengths=(5,), rows=2, **SMALL)
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [["| bfloat16", "2", "5"], ["| float32", "2", "5"]]


def test_without_a_gpu_it_says_so() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            gpu.table()


def test_both_libraries_train_every_candidate() -> None:
    model = gpu.model_of(torch.float32, "cpu", **SMALL)
    data = concurrent.equal_rows(2, 5, 100)
    theirs, ours = concurrent.race(model, concurrent.loras(2, r=2), data, rounds=1)
    assert theirs > 0 and ours > 0
    assert concurrent.flops(model, 2, data) == 4 * 2 * 2 * 5 * 2 * (4 * 32 * 32 + 3 * 32 * 64)


def test_the_table_of_files_on_a_small_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MANY", 5)
    files.compare(gpu.model_of(torch.float32, "cpu", **SMALL).eval(), rounds=1)
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(files.WHAT.values())


def test_the_table_of_accelerations_on_a_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    accelerations.table(rounds=1, batches={"ragged": (3, 7), "one": (4,)}, **SMALL, head_dim=16)
    lines = [line.split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    assert [line[0].removeprefix("| ") for line in lines[2:]] == ["nothing", *accelerations.ACCELERATIONS]
    assert lines[0][1:3] == ["ragged", "one"] and all(float(line[1]) > 0 and float(line[2]) > 0 for line in lines[3:])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model in a directory, with a tokenizer that knows few letters."""
    letters = {letter: at for at, letter in enumerate(["<pad>", "<unk>", *"。、のにはを春雨剣夜王茶"])}
    core = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "model")
    config = LlamaConfig(**{**SMALL, "hidden_size": 16, "intermediate_size": 16}, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_table_of_quality_goes_on_where_it_was_stopped(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ["--model", str(small), "--out", str(tmp_path / "run"), "--workers", "1"]
    how += ["--trials", "2", "--folds", "2", "--repeats", "1", "--epochs", "1", "--batch-size", "8"]
    names = ["ia3", "c3a", "average", *how]
    keep, kept = Journal.keep, list[str]()

    def until(stop: int) -> None:
        def counted(journal: Journal, record: dict[str, Any]) -> None:
            keep(journal, record)
            kept.append(str(journal.folder.parent / record["name"]))
            if len(kept) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "keep", counted)

    # Out of time at once; then in LoRA's runs; then in those of the next method.
    methods_quality.table([*names, "--minutes", "0"])
    assert "\nlora: not run" in capsys.readouterr().out and not kept
    for stop, told in ((4, "\nlora: under way, 4 runs ended"), (8, "\nia3: under way, 2 runs ended")):
        until(stop)
        methods_quality.table(names)
        said = capsys.readouterr()
        assert told in said.out and "\nc3a: not run" in said.out and "stopped; the same command" in said.err
    until(0)
    methods_quality.table(names)
    out = capsys.readouterr().out
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert lines[0] == f"| {' | '.join(methods_quality.COLUMNS)} |".split(" | ")
    assert {line[0] for line in lines[1:]} == {"| `lora`", "| `ia3`"}
    assert "1 x 2 folds, 2 settings each, 1 epochs in batches of 8" in out
    assert "\nc3a failed: " in out and "expected a divisor of 16" in out and "adapters: average" in out
    (ia3,) = (line for line in lines if line[0] == "| `ia3`")
    (lora,) = (line for line in lines if line[0] == "| `lora`")
    less = float(ia3[3].split()[0]) - float(lora[3].split()[0])
    assert abs(float(ia3[4].split()[0]) - less) < 0.002 and "ia3" in ia3[7] and lora[4] == "-"
    # Nothing was trained twice, LoRA beside the other one neither, and a table that is whole trains nothing.
    assert len(kept) == len(set(kept)) and not any("/ia3/" in name and "lora" in name for name in kept)
    monkeypatch.setattr(Journal, "keep", None)
    methods_quality.table(names)
    assert capsys.readouterr().out.splitlines()[1:] == out.splitlines()[1:]
    with pytest.raises(SystemExit, match="was begun with"):
        methods_quality.table([*names, "--epochs", "2"])
    with pytest.raises(SystemExit, match="unknown method 'ia33'"):
        methods_quality.table(["ia33", *how])
    for flag, found in (("--trials", "0"), ("--folds", "1"), ("--epochs", "x")):
        with pytest.raises(SystemExit):
            methods_quality.table([*names, flag, found])
        assert f"found '{found}', expected a whole number" in capsys.readouterr().err


def test_rows_that_choose_a_setting_judge_none(small: Path) -> None:
    bench = methods_quality.Bench(methods_quality._options().parse_args(["--model", str(small)]), small)
    assert bench.choosing.valid is not None and bench.judging.valid is bench.judging.test is None
    choosing = {*bench.choosing.train.texts, *bench.choosing.valid.texts}
    assert not choosing & {*bench.judging.train.texts}
    every = poems(str(small))
    assert every.valid is not None and every.test is not None
    assert choosing == {*every.valid.texts, *every.test.texts} and bench.judging.train.texts == every.train.texts
    # As many steps: three passes of four fifths of 162 rows, and seven of 54.
    assert bench.epochs_to_choose == 7


def test_the_table_of_few_rows_goes_on_where_it_was_stopped(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def question(at: int) -> dict[str, Any]:
        return {
            "question": "春の雨" * (1 + at % 2),
            **{f"choice{n}": "王茶夜剣雨"[n] for n in range(5)},
            "label": at % 5,
        }

    def pair(at: int) -> dict[str, Any]:
        return {
            "sentence1": "春の雨",
            "sentence2": "夜" * at,
            "label": ("entailment", "neutral", "contradiction")[at % 3],
        }

    for name, row in (("jcommonsenseqa", question), ("jnli", pair)):
        for split, rows in (("train", range(1, 13)), ("valid", range(13, 19))):
            lines = [json.dumps(row(at)) for at in rows]
            (tmp_path / f"{name}.{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    how = ["--data", str(tmp_path), "--model", str(small), "--out", str(tmp_path / "run"), "--steps", "2"]
    how += ["--rows", "4", "--seeds", "2", "--valid", "5"]
    keep, kept = Journal.keep, list[str]()

    def stopped(journal: Journal, record: dict[str, Any]) -> None:
        keep(journal, record)
        kept.append(record["name"])
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "keep", stopped)
    t_few.table(how)
    said = capsys.readouterr()
    assert "stopped; the same command goes on" in said.err and "LoRA (1 seeds)" in said.out
    t_few.table(how)
    out = capsys.readouterr().out
    assert len(kept) == len({*kept}) == 2 * 5, "nothing is trained twice"
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| j")]
    candidates = [
        ["jcommonsenseqa", "the base"],
        ["jcommonsenseqa", "T-Few (2 seeds)"],
        ["jcommonsenseqa", "LoRA (2 seeds)"],
    ]
    candidates += [
        ["jnli", "the base"],
        ["jnli", "T-Few (2 seeds)"],
        ["jnli", "LoRA (2 seeds)"],
        ["jnli", "LoRA, head (2 seeds)"],
    ]
    assert [[line[0].removeprefix("| "), line[2]] for line in lines] == candidates
    assert all(0 <= float(line[4].split()[0]) <= 1 for line in lines)
    with pytest.raises(SystemExit, match="was begun with"):
        t_few.table([*how, "--valid", "4"])
