"""`data.weight`: a column says what a row's loss counts in training."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_kit import ROWS, Tanzaku, assert_refused
from safetensors.torch import load_file

from close import RUN, close


def write(path: Path, weights: Sequence[str], before: str = "", column: str = "counts") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        out.writerow(["text", "label", column])
        out.writerows((before + text, label, weight) for (text, label), weight in zip(ROWS, weights, strict=True))


def trained(tanzaku: Tanzaku, out: str, *flags: str) -> dict[str, float]:
    said = tanzaku("train", "recipe.yaml", "--out", out, *flags)
    assert said.code == 0, said.err
    tensors = load_file(f"{out}/adapters/lora/adapter_model.safetensors")
    return {key: tensor.sum().item() for key, tensor in tensors.items()}


@pytest.mark.parametrize("size", ["1", "3"])
def test_weights_reach_the_training_rows(size: str, work: Path, tanzaku: Tanzaku) -> None:
    plain = trained(tanzaku, "plain", "--batch-size", size)
    write(work / "train.tsv", ["7"] * 6)
    assert close(trained(tanzaku, "alike", "--batch-size", size, "--weight", "counts"), plain, RUN)
    write(work / "train.tsv", ["1", "0", "0.5", "0", "3", "1e-3"])
    own = trained(tanzaku, "own", "--batch-size", size, "--weight", "counts")
    assert not close(own, plain, RUN)


def test_folds_train_on_validation_rows_too(work: Path, tanzaku: Tanzaku) -> None:
    write(work / "train.tsv", "123123")
    flags = ["compare", "recipe.yaml", "--weight", "counts", "--out", "run"]
    assert_refused(tanzaku(*flags, "--folds", "2"), "valid.tsv has no column 'counts'", "--weight")
    write(work / "valid.tsv", "111111", "the ")
    said = tanzaku(*flags, "--folds", "2")
    assert said.code == 0, said.err


def test_resume_refuses_rows_of_other_weights(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    from tanzaku.cli.display import Display

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write(work / "train.tsv", "123123")
    with monkeypatch.context() as patch:
        patch.setattr(Display, "epoch_done", stop)
        assert tanzaku("train", "recipe.yaml", "--weight", "counts", "--out", "run").code == 130
    write(work / "train.tsv", "123124")
    assert_refused(tanzaku("train", "--resume", "--out", "run"), "the rows have changed")
    write(work / "train.tsv", "123123")
    assert tanzaku("train", "--resume", "--out", "run").code == 0


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        (["1", "1", "-0.5", "1", "1", "1"], ["row 3", "'counts' is -0.5", "0 or more"]),
        (["1", "", "1", "1", "1", "1"], ["row 2", "'counts' has no number"]),
        (["1", "1", "1", "inf", "1", "1"], ["row 4", "'counts'", "'inf'", "finite"]),
        (["1", "1", "1", "1", "nan", "1"], ["row 5", "'counts'", "'nan'"]),
        (["1", "1", "1", "1", "1", "much"], ["row 6", "'counts'", "'much'", "3.5"]),
        (["0"] * 6, ["'counts' of train.tsv is 0 in all rows"]),
    ],
)
def test_what_is_no_weight_is_refused(weights: list[str], parts: list[str], work: Path, tanzaku: Tanzaku) -> None:
    write(work / "train.tsv", weights)
    for verb in (["train", "recipe.yaml", "--out", "run"], ["check", "recipe.yaml"]):
        assert_refused(tanzaku(*verb, "--weight", "counts"), *parts)
    assert not Path("run").exists()


def test_a_weight_is_a_column_of_its_own(work: Path, tanzaku: Tanzaku) -> None:
    write(work / "train.tsv", "111111")
    flags = ["train", "recipe.yaml", "--out", "run", "--weight"]
    assert_refused(tanzaku(*flags, "count"), "no column 'count'", "did you mean 'counts'")
    assert_refused(tanzaku(*flags, "label"), "--label and --weight both name the column 'label'")
