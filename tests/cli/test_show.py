"""Rows as the model reads them: `--show`, and what every run that learns text prints."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from cli_kit import Tanzaku, assert_refused
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tanzaku.cli.display import Display
from tanzaku.cli.rows import pieces

ROWS = [("the warm", "rain of spring"), ("a cold wind", "of winter"), ("warm sea", "rain")]
SHOWN = ["the|warm|[[rain|of|spring|</s>]]", "a|cold|wind|[[of|winter|</s>]]", "warm|sea|[[rain|</s>]]"]


@pytest.fixture
def text_recipe(work: Path) -> None:
    """recipe.yaml is of generation."""
    rows = [{"prompt": f"{prompt} ", "completion": completion} for prompt, completion in ROWS]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Path("recipe.yaml").read_text(encoding="utf-8").split("data:")[0]
    recipe += "task: generation\ndata: {train: train.jsonl, max_new_tokens: 2}\n"
    recipe += "train: {epochs: 1, max_length: 8}\nmethods: [lora]\n"
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")


@pytest.mark.usefixtures("text_recipe")
@pytest.mark.parametrize("command", [["train", "recipe.yaml"], ["compare", "recipe.yaml", "--folds", "3"]])
def test_a_run_that_learns_text_shows_what_is_learnt(command: list[str], tanzaku: Tanzaku) -> None:
    said = tanzaku(*command, "--out", "run")
    assert said.code == 0, said.err
    expected = f"the first row, token by token as the model reads it; what is learnt is in [[ ]]\n{SHOWN[0]}\n"
    assert expected in said.out and SHOWN[1] not in said.out
    said = tanzaku(*command, "--out", "two", "--show", "2")
    assert f"what is learnt is in [[ ]]\n{SHOWN[0]}\n{SHOWN[1]}\n" in said.out and SHOWN[2] not in said.out
    assert "the first row" not in tanzaku(*command, "--out", "none", "--show", "0").out
    assert_refused(tanzaku(*command, "--out", "x", "--show", "-1"), "--show", "greater than or equal to 0")


@pytest.mark.usefixtures("text_recipe")
def test_check_and_dry_runs_show_as_many(tanzaku: Tanzaku) -> None:
    whole = "\n".join(SHOWN)
    said = tanzaku("check", "recipe.yaml")
    assert said.code == 0 and said.out.endswith(f"{whole}\n"), said.out + said.err
    one = tanzaku("check", "recipe.yaml", "--show", "1").out
    assert one.endswith(f"reads it; what is learnt is in [[ ]]\n{SHOWN[0]}\n")
    assert tanzaku("train", "recipe.yaml", "--dry-run", "--show", "1").out == one
    assert tanzaku("train", "recipe.yaml", "--dry-run").out == said.out
    assert tanzaku("check", "recipe.yaml", "--show", "99").out == said.out


def test_other_tasks_show_rows_where_that_is_asked_for(work: Path, tanzaku: Tanzaku) -> None:
    shown = "token by token as the model reads them\nmild: the|warm|rain|of|spring\nharsh: a|cold|wind|of|winter\n"
    said = tanzaku("train", "recipe.yaml", "--show", "2", "--out", "run")
    assert said.code == 0 and shown in said.out
    assert "token by token" not in tanzaku("train", "recipe.yaml", "--out", "quiet").out
    assert shown in tanzaku("check", "recipe.yaml", "--show", "2").out


@pytest.mark.usefixtures("text_recipe")
def test_a_long_row_shows_where_learning_begins_and_stops(model_dir: Path, tanzaku: Tanzaku) -> None:
    row = {"prompt": "warm " * 200 + "sea ", "completion": "cold " * 200 + "wind"}
    Path("train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    said = tanzaku("check", "train.jsonl", "--task", "generation", "--model", model_dir, "--max-length", "500")
    assert said.code == 0, said.err + said.out
    line = said.out.splitlines()[-1]
    assert line.startswith("warm|warm|") and "|warm|sea|[[cold|cold|" in line and line.endswith("cold|wind|</s>]]")
    assert line.count("...") == 4 and len(line) < 500
    left_out = sum(int(each.split()[0]) for each in line.split("...")[1::2])
    assert left_out + line.count("|") + 1 - 2 == 201 + 202


def test_a_terminal_shows_it_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display()
    for system, expected in (("standard", "the|\x1b[7mrain\x1b[0m|of\n"), (None, "the|[[rain]]|of\n")):
        file = io.StringIO()
        display.console = Console(force_terminal=True, color_system=system, file=file, width=80)  # type: ignore[arg-type]
        display.marked([("the", False), ("rain", True), ("of", False)], between="|")
        assert file.getvalue() == expected


def test_tokens_of_one_character_are_shown_together() -> None:
    core = Tokenizer(
        models.BPE(vocab={each: at for at, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert list(pieces(tokenizer, tokenizer("a春b").input_ids)) == ["a", "春", "b"]
    assert list(pieces(tokenizer, tokenizer("春").input_ids[:2])) == ["\ufffd"]
