"""`tanzaku check` and `--dry-run`: what they show, and by which code they end."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cli_kit import ROWS, Tanzaku, assert_refused, write_tsv


def test_the_card(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("check", "train.tsv", "valid.tsv", "test.tsv", "--model", model_dir, "--max-length", "4")
    assert (said.code, said.err) == (0, "")
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "rows characters tokens cut at 4 from" in lines
    assert "training 6 8 to 23, median 11 2 to 5, median 2 2 train.tsv" in lines
    assert "validation 6 12 to 27, median 15 3 to 6, median 3 2 valid.tsv" in lines
    assert "label training validation test" in lines
    assert "harsh 3 3 3" in lines
    assert "nothing odd was found" in said.out
    assert "token by token as the model reads them\nmild: the|warm|rain|of\nharsh: a|cold|wind|of\n" in said.out


def test_without_a_model_there_are_no_tokens(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("check", "--train", "train.tsv", "valid.tsv")
    assert said.code == 0
    assert "token" not in said.out
    assert "mild: the warm rain of spring\n" in said.out
    assert "validation" in said.out


def test_a_recipe_is_checked_as_its_run_would_be(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("check", "recipe.yaml")
    assert said.code == 0
    assert "cut at 8" in said.out and "valid.tsv" in said.out
    for verb in ("train", "compare"):
        dry = tanzaku(verb, "recipe.yaml", "--dry-run", "--out", "run")
        assert (dry.code, dry.out, dry.err) == (0, said.out, "")
    assert not (work / "run").exists()


def test_what_would_stop_training_is_a_negative_answer(work: Path, tanzaku: Tanzaku) -> None:
    write_tsv(work / "test.tsv", [("  The ｃOLD sea", "harsh"), ("cold sea", "harsh")])
    said = tanzaku("check", "recipe.yaml")
    assert said.code == 1
    assert "stops training: 1 of the 2 test rows (test.tsv) are also training rows" in said.out
    assert "stops training: 1 of the 2 test rows (test.tsv) are also validation rows" in said.out
    assert tanzaku("train", "recipe.yaml", "--dry-run").code == 1
    assert_refused(tanzaku("train", "recipe.yaml"), "--allow duplicates-across-splits")
    allowed = tanzaku("check", "recipe.yaml", "--allow", "duplicates-across-splits")
    assert allowed.code == 0
    assert "allowed: 1 of the 2 test rows" in allowed.out
    assert tanzaku("train", "recipe.yaml", "--allow", "duplicates-across-splits", "--out", "run").code == 0
    recipe = (work / "recipe.yaml").read_text(encoding="utf-8")
    recipe = recipe.replace("test: test.tsv", "test: test.tsv, allow: [duplicates-across-splits]")
    (work / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert tanzaku("check", "recipe.yaml").code == 0


def test_rows_that_folds_would_share(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    write_tsv(work / "train.tsv", [*ROWS, ROWS[0]])
    assert tanzaku("check", "recipe.yaml").code == 0
    flags = ["--folds", "2", "--dry-run"]
    said = tanzaku("compare", "recipe.yaml", *flags)
    assert said.code == 1
    assert "row 7 repeats row 1" in said.out
    folded_by_default = tanzaku("compare", "--train", "train.tsv", "--model", model_dir, "--dry-run")
    assert (folded_by_default.code, folded_by_default.out.count("stops training")) == (1, 1)
    assert tanzaku("train", "--train", "train.tsv", "--model", model_dir, "--method", "lora", "--dry-run").code == 0
    assert_refused(tanzaku("compare", "recipe.yaml", "--folds", "2"), "--allow duplicates-across-folds")
    allowed = ["--allow", "duplicates-across-folds", "--epochs", "1", "--finalists", "1"]
    assert tanzaku("compare", "recipe.yaml", "--folds", "2", *allowed, "--out", "run").code == 0


def test_control_characters_do_not_reach_the_terminal(work: Path, tanzaku: Tanzaku) -> None:
    write_tsv(work / "train.tsv", [(f"{text}\x1b[2J", f"{label}\x1b[2J") for text, label in [*ROWS, ROWS[0]]])
    said = tanzaku("check", "train.tsv")
    assert said.code == 0
    assert "\x1b" not in said.out and r"\x1b[2J" in said.out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--set", "r=0"], "r=0"),
        (["--set", "target_modules=foo"], "foo"),
        (["--set", "lora_dropout=2"], "lora_dropout=2"),
        (["--restore-best"], "restore_best needs validation rows"),
        (["--patience", "2"], "patience needs validation rows"),
        (["--tracker", "foo"], "tracker is 'foo'"),
        (["--device", "mps"], "mps"),
        (["--max-length", "999"], "999"),
    ],
)
def test_a_dry_run_refuses_what_training_would(work: Path, tanzaku: Tanzaku, flags: list[str], says: str) -> None:
    if flags[-1] == "999":
        (work / "train.tsv").write_text("text\tlabel\n" + f"{'warm ' * 200}\tmild\nsea\tharsh\n", encoding="utf-8")
    args = ["--model", yaml.safe_load((work / "recipe.yaml").read_text())["model"], "--train", "train.tsv"]
    said = tanzaku("train", *args, "--method", "lora", *flags, "--dry-run")
    assert said.code == 2 and says in said.err.splitlines()[-1]
    assert not (work / "runs").exists()


def test_what_is_inferred_is_in_the_card(work: Path, tanzaku: Tanzaku) -> None:
    rows = "".join(f"はるの{text};{label}\n" for text, label in [*ROWS, ROWS[0]])
    (work / "train.csv").write_bytes(f"text;label\n{rows}".encode("cp932"))
    said = tanzaku("check", "train.csv")
    assert (said.code, said.err) == (0, "")
    assert "note: train.csv is read as cp932; --encoding overrules it\n" in said.out
    assert "note: train.csv is separated by semicolons: read so\n" in said.out
    assert "note: repeated rows in train.csv: 1 of 7" in said.out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], ["found no rows", "tanzaku check train.tsv"]),
        (["tarin.tsv"], ["no file tarin.tsv", "did you mean 'train.tsv'"]),
        (["train.tsv", "valid.tsv", "test.tsv", "recipe.yaml"], ["found train.tsv", "at most 3: train, valid, test"]),
        (["train.tsv", "--text", "txt"], ["no column 'txt'", "did you mean 'text'"]),
        (["train.tsv", "--allow", "duplicates"], ["--allow is 'duplicates'", "'duplicates-across-splits'"]),
        (["train.tsv", "--format", "tvs"], ["--format is 'tvs'", "did you mean 'tsv'"]),
        (["train.tsv", "--max-length", "0"], ["--max-length is '0'"]),
        (["train.tsv", "--model", "./nowhere"], ["no model at './nowhere'"]),
        (["train.tsv", "--train", "valid.tsv", "test.tsv", "x", "y"], ["at most 2: valid, test"]),
    ],
)
def test_bad_input(work: Path, tanzaku: Tanzaku, args: list[str], says: list[str]) -> None:
    said = tanzaku("check", *args)
    assert_refused(said, *says)


@pytest.mark.parametrize("flag", ["--train", "--model", "--out", "--text", "--label", "--encoding"])
def test_an_empty_name_is_near_to_nothing(work: Path, tanzaku: Tanzaku, flag: str) -> None:
    said = tanzaku("train", "recipe.yaml", flag, "")
    assert_refused(said, f"{flag} is '', expected a name")
    assert "did you mean" not in said.err
