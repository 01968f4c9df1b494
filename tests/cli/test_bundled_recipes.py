"""Recipes that come with Tanzaku: by their names, with a file and flags over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from cli_kit import Tanzaku, assert_refused, results_of

from tanzaku.recipe.schema import build_recipe, bundled, bundled_names

ROOT = Path(__file__).parents[2]
FEW = ["--recipe", "t-few", "--max-steps", "6", "--epochs", "3", "--warmup", "1"]


@pytest.fixture
def rows(work: Path, model_dir: Path) -> list[str]:
    """Flags of rows with choices; the current directory has them."""
    for split, before in (("train", ""), ("valid", "the ")):
        lines = [
            {"prompt": f"{before}{text}", "choice0": " warm sea", "choice1": " cold", "label": at % 2}
            for at, text in enumerate(("warm rain", "cold wind", "spring sea", "winter wind", "a spring", "a winter"))
        ]
        Path(f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return ["--model", str(model_dir), "--train", "train.jsonl", "--valid", "valid.jsonl"]


def test_t_few_is_the_papers() -> None:
    """Its appendices and its code (r-three/t-few, configs/ia3.json and configs/rte.json)."""
    recipe = build_recipe(None, {"recipe": "t-few", "model": {"name": "m"}, "data": {"train": "rows.jsonl"}})
    train = recipe.train
    assert (train.max_steps, train.batch_size, train.learning_rate, train.schedule) == (1000, 8, 3e-3, "linear")
    assert (train.warmup, train.max_grad_norm, train.weight_decay) == (60, 1, 0)
    assert recipe.task == "choice" and recipe.compare.seeds == 5
    assert recipe.data.losses == ["lm", "unlikelihood", "length_normalised"] and recipe.data.length_normalised


def test_the_example_is_laid_over_it() -> None:
    path = ROOT / "examples/t_few.yaml"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["methods"], "what it adds"
    recipe = build_recipe(path, {"recipe": "t-few"})
    assert [entry.name for entry in recipe.methods] == ["t-few", "lora"]
    assert recipe.train.max_steps == 1000 and recipe.data.template == "{{ question }}\nAnswer: "


@pytest.mark.parametrize("name", bundled_names())
def test_every_one_is_a_recipe(name: str) -> None:
    assert build_recipe(None, {"recipe": name, "model": {"name": "m"}, "data": {"train": "rows.jsonl"}}).methods


def test_train_and_go_on(rows: list[str], tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many steps in so many parts; a run that is cut off after its first part ends as one that was not."""
    from tanzaku.cli.display import Display

    said = tanzaku("train", *FEW, *rows, "--out", "whole")
    assert said.code == 0, said.err
    [whole] = results_of(Path("whole"))["jobs"]
    assert whole["method"] == "ia3" and whole["steps"] == 6 and len(whole["epochs"]) == 3
    assert whole["train_settings"]["learning_rate"] == bundled("t-few")["train"]["learning_rate"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "epoch_done", stop)
        assert tanzaku("train", *FEW, *rows, "--out", "run").code == 130
    again = tanzaku("train", "--resume", "--out", "run")
    assert again.code == 0, again.err
    [found] = results_of(Path("run"))["jobs"]
    assert found["steps"] == 6 and found["valid"] == pytest.approx(whole["valid"], rel=1e-4)


@pytest.mark.parametrize("design", [["--folds", "2", "--seeds", "1"], ["--seeds", "2"]])
def test_compare(design: list[str], rows: list[str], tanzaku: Tanzaku) -> None:
    Path("recipe.yaml").write_text(
        f"model: {rows[1]}\ndata: {{train: train.jsonl, valid: valid.jsonl}}\nmethods: [lora, ia3]\n", encoding="utf-8"
    )
    said = tanzaku("compare", "recipe.yaml", *FEW, *design, "--workers", "1", "--out", "run")
    assert said.code == 0, said.err
    results = results_of(Path("run"))
    assert {each["name"] for each in results["candidates"]} == {"lora", "ia3"} and results["base"]["mean"] is not None
    assert results["recipe"]["data"]["losses"] == ["lm", "unlikelihood", "length_normalised"]


def test_one_that_is_not_there(rows: list[str], tanzaku: Tanzaku) -> None:
    assert_refused(tanzaku("train", "--recipe", "t_few", *rows), "--recipe is 't_few'", "did you mean 't-few'")
    assert_refused(tanzaku("train", "--recipe", "./mine.yaml", *rows), "without --recipe")


def test_what_does_not_go_together_is_told(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    Path("other.yaml").write_text("task: generation\nmodel: m\ndata: {train: train.jsonl}\n", encoding="utf-8")
    assert_refused(
        tanzaku("train", "other.yaml", "--recipe", "t-few"), "other.yaml is of task 'generation'", "'choice'"
    )
    said = tanzaku("train", "recipe.yaml", "--max-steps", "2", "--epochs", "5")
    assert_refused(said, "max_steps is 2, and epochs")
    assert "--train" not in said.err
    assert_refused(
        tanzaku("train", "recipe.yaml", "--task", "choice", "--too-long", "drop"), "--too-long: data has no key"
    )
