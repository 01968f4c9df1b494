"""Bad input: one line that says what was found and how to mend it, exit code 2, nothing left behind."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_kit import Tanzaku, assert_refused, write_tsv


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda work: (work / name).write_bytes(content)


def _nothing(work: Path) -> None:
    pass


ABSENT = "cuda" if sys.platform == "darwin" else "mps"
HEAD = b"text\tlabel\n"
BAD: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "missing data file": (_nothing, ["--train", "tarin.tsv"], ["no file tarin.tsv", "did you mean 'train.tsv'"]),
    "empty data file": (_write("train.tsv", b""), [], ["train.tsv is empty"]),
    "header alone": (_write("valid.tsv", HEAD), [], ["valid.tsv", "no rows"]),
    "missing column": (_nothing, ["--text", "txt"], ["no column 'txt'", "did you mean 'text'", "text, label"]),
    "missing label column": (_nothing, ["--label", "class"], ["no column 'class'", "text, label"]),
    "unseen label": (_write("valid.tsv", HEAD + b"rain\tsoft\n"), [], ["'soft' in valid.tsv row 1", "harsh, mild"]),
    "one class only": (_write("train.tsv", HEAD + b"rain\tmild\nsea\tmild\n"), [], ["only the label 'mild'"]),
    "no label": (_write("train.tsv", HEAD + b"rain\tmild\nsea\t\n"), [], ["train.tsv row 2 has no label"]),
    "broken line": (_write("train.tsv", HEAD + b"rain\n"), [], ["train.tsv line 2", "found 1, expected 2"]),
    "open quote": (_write("train.tsv", HEAD + b'"rain\tmild\n'), [], ["train.tsv line 2", "never closed"]),
    "text without tokens": (_write("test.tsv", HEAD + b"  \tmild\n"), [], ["test.tsv row 1", "no tokens"]),
    "wrong encoding": (
        _write("train.tsv", HEAD + "東京\tmild\n".encode("shift_jis")),
        [],
        ["train.tsv is not UTF-8 at line 2", "cp932 or cp1252", "--encoding"],
    ),
    "target that matches nothing": (_nothing, ["--set", "target_modules=[q_prj]"], ["'lora'", "q_prj"]),
    "rank 0": (_nothing, ["--set", "r=0"], ["r=0", "1 or more"]),
    "too many virtual tokens": (
        _nothing,
        ["--method", "prompt_tuning", "--set", "num_virtual_tokens=64"],
        ["64 virtual tokens", "64 positions"],
    ),
    "unknown method": (_nothing, ["--method", "lorra"], ["unknown method 'lorra'", "did you mean 'lora'"]),
    "unknown setting": (_nothing, ["--set", "rr=1"], ["no setting 'rr'", "did you mean 'r'"]),
    "bad value": (_nothing, ["--batch-size", "two"], ["--batch-size is 'two'", "integer"]),
    "two methods": (_nothing, ["--method", "lora", "--method", "ia3"], ["one method", "lora, ia3", "compare"]),
    "no model": (_nothing, ["--model", "./nowhere"], ["no model at './nowhere'"]),
    "model without a tokenizer": (_nothing, ["--model", "bare"], ["'bare' has no tokenizer"]),
    "no room for text": (_nothing, ["--max-length", "0"], ["--max-length is '0'"]),
    "patience without validation": (
        lambda work: write_recipe(work, data={"train": "train.tsv"}),
        ["--patience", "1"],
        ["'lora'", "patience needs validation rows"],
    ),
    "output is a file": (_nothing, ["--out", "recipe.yaml"], ["recipe.yaml is a file"]),
    "output below a file": (_nothing, ["--out", "recipe.yaml/run"], ["cannot write recipe.yaml/run", "another --out"]),
    "device that is not there": (_nothing, ["--device", ABSENT], [f"device '{ABSENT}' is not there", "cpu"]),
}


def write_recipe(work: Path, **changes: Any) -> None:
    recipe = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8")) | changes
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(work: Path, model_dir: Path, tanzaku: Tanzaku, name: str) -> None:
    break_it, flags, says = BAD[name]
    shutil.copytree(model_dir, work / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    break_it(work)
    before = sorted(work.rglob("*"))
    assert_refused(tanzaku("train", "recipe.yaml", *flags), *says)
    assert sorted(work.rglob("*")) == before


def test_bad_data_is_told_before_anything_is_loaded(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("tanzaku.models.load_tokenizer", load)
    monkeypatch.setattr("tanzaku.models.load_classifier", load)
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "recipe.yaml"), "is a file")
    write_tsv(work / "test.tsv", [("rain", "soft")])
    assert_refused(tanzaku("train", "recipe.yaml"), "'soft'")


def test_the_last_candidate_is_checked_before_the_first_is_trained(work: Path, tanzaku: Tanzaku) -> None:
    flags = ["--method", "head", "--method", "lora", "--set", "lora.target_modules=[q_prj]"]
    said = tanzaku("compare", "recipe.yaml", *flags)
    assert_refused(said, "candidate 'lora'", "q_prj")
    assert "head" not in said.out


def test_a_run_is_not_overwritten_unless_asked(work: Path, tanzaku: Tanzaku) -> None:
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "run"), "run is not empty", "--overwrite")
    said = tanzaku("train", "recipe.yaml", "--method", "head", "--out", "run", "--overwrite")
    assert (said.code, [path.name for path in (work / "run" / "adapters").iterdir()]) == (0, ["head"])
    (work / "mine").mkdir()
    (work / "mine" / "adapters").write_text("precious", encoding="utf-8")
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "mine", "--overwrite"), "no run")
    assert (work / "mine" / "adapters").is_file()
