"""The benchmarks run; what they measure is measured on the machine that asks."""

from __future__ import annotations

import pytest
import torch
from bench import accelerations, concurrent, files, gpu

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
