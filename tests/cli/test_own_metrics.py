"""A metric of the user's own: `my_file.py:function` in a recipe or a flag, wherever the task's metrics stand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_kit import TEXTS, Tanzaku, assert_refused, results_of

import tanzaku as tz
from tanzaku.models.loading import load_for
from tanzaku.tasks import task_in

CODE = """
def harshness(text, reference):
    return 1 + abs(len(text) - len(reference)) / 100

harshness.better, harshness.bounds = "lower", (1, float("inf"))

def polite(text, reference):
    return text.startswith("the")
"""


@pytest.fixture
def recipe(recipe_of_texts: Path) -> Path:
    """A recipe of the task generation in a folder below the current directory, beside its rows and `mine.py`."""
    (recipe_of_texts.parent / "mine.py").write_text(CODE, encoding="utf-8")
    return recipe_of_texts


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def say(recipe: Path, **sections: str) -> None:
    """Add lines to sections of the recipe, or sections."""
    text = recipe.read_text(encoding="utf-8")
    for name, line in sections.items():
        text = (
            text.replace("train: {epochs", f"train: {{{line}, epochs") if name == "train" else f"{text}{name}: {line}\n"
        )
    recipe.write_text(text, encoding="utf-8")


def test_it_is_a_metric_of_the_run(recipe: Path, tanzaku: Tanzaku) -> None:
    say(recipe, train="metric: mine.py:harshness", measure="[mine.py:polite]")
    said = tanzaku("train", recipe, "--restore-best", "--out", "run")
    assert said.code == 0, said.err
    assert "harshness" in said.out and "polite" in said.out
    results = results_of(Path("run"))
    [job] = results["jobs"]
    texts = [each["text"] for each in job["predictions"]]
    expected = [
        1 + abs(len(text) - len(" cold" if "cold" in of else " warm") + 1) / 100
        for text, of in zip(texts, TEXTS, strict=True)
    ]
    assert job["test"]["harshness"] == pytest.approx(sum(expected) / len(expected))
    assert job["test"]["polite"] == sum(text.startswith("the") for text in texts) / len(texts)
    by_epoch = [epoch["valid"]["harshness"] for epoch in job["epochs"]]
    assert by_epoch[job["best_epoch"] - 1] == min(by_epoch)  # the function says that less is better
    card = Path("run/adapters/lora/README.md").read_text(encoding="utf-8")
    assert "harshness" in card and str(recipe.parent) not in card
    assert results["recipe"]["measure"] == [f"{recipe.parent}/mine.py:{name}" for name in ("polite", "harshness")]


def test_candidates_are_ranked_by_it(recipe: Path, tanzaku: Tanzaku) -> None:
    options = ["--method", "lora", "--method", "ia3", "--workers", "2", "--seeds", "2", "--sample", "3"]
    said = tanzaku("compare", recipe, *options, "--rank-by", "job/mine.py:harshness", "--out", "run")
    assert said.code == 0, said.err
    results = results_of(Path("run"))
    assert results["design"]["metric"] == "harshness" and results["recipe"]["compare"]["rank_by"] == "harshness"
    means = [each["mean"] for each in results["candidates"]]
    assert means == sorted(means) and min(means) >= 1  # the least is the best
    [pair] = results["comparisons"]
    assert pair["p"] is not None and "harshness" in results["base"]["scores"]
    for each in results["candidates"]:
        by_row = results["rows"]["figures"][each["name"]]
        assert len(by_row) == len(TEXTS) and sum(by_row) / len(by_row) == pytest.approx(each["test"]["harshness"])
    assert len(results["rows"]["base_figures"]) == len(TEXTS)
    assert "By the mean harshness" in Path("run/report.html").read_text(encoding="utf-8")
    again = tanzaku("compare", "--resume", "--out", "run")
    assert again.code == 0, again.err


def test_a_file_that_changed_is_noticed_by_resume(
    recipe: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tanzaku.cli.display import Display

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    say(recipe, train="metric: mine.py:harshness")
    with monkeypatch.context() as patch:
        patch.setattr(Display, "epoch_done", stop)
        assert tanzaku("train", recipe, "--out", "run").code == 130
    mine = recipe.parent / "mine.py"
    mine.write_text(CODE + "# another\n", encoding="utf-8")
    assert_refused(tanzaku("train", "--resume", "--out", "run"), "the file of harshness has changed", "--overwrite")
    mine.write_text(CODE, encoding="utf-8")
    again = tanzaku("train", "--resume", "--out", "run")
    assert again.code == 0, again.err


BAD = {
    "no.py:f": (["there is no", "no.py"], ""),
    "mine.py:rude": (["has no function rude", "polite"], ""),
    "mine.py:f": (["returned 'a' (str)", "expected a number"], "def f(text, reference):\n    return 'a'\n"),
    "mine.py:g": (["raised ZeroDivisionError", "(line 10)", "the text ''"], "def g(a, b):\n    return 1 / len(a)\n"),
    "mine.py:chrf": (["chrf is a metric already"], "def chrf(a, b): return 1\n"),
}


@pytest.mark.parametrize("named", BAD)
@pytest.mark.parametrize("by", ["--rank-by", "--metric", "recipe"])
def test_what_is_wrong_with_it_is_told_before_the_model_is_loaded(
    recipe: Path, tanzaku: Tanzaku, named: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tanzaku.models import loading

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_for", load)
    parts, code = BAD[named]
    (recipe.parent / "mine.py").write_text(CODE + code, encoding="utf-8")
    if by == "recipe":
        say(recipe, compare=f"{{rank_by: {named}}}")
    flags = [] if by == "recipe" else [by, f"job/{named}"]
    assert_refused(tanzaku("compare", recipe, *flags, "--out", "run"), *parts)
    assert not Path("run").exists()


def test_it_compares_texts_that_are_written(recipe: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--metric", "job/mine.py:polite", "--out", "run")
    assert_refused(said, "task classification writes none", "generation")
    twice = ["--measure", "job/mine.py:polite", "--measure", "other.py:polite"]
    shutil.copy(recipe.parent / "mine.py", "other.py")
    assert_refused(tanzaku("train", recipe, *twice, "--out", "run"), "two functions are named polite")
    for split in ("train", "valid", "test"):
        path = recipe.parent / f"{split}.jsonl"
        path.write_text("".join(_line({"text": text}) for text in TEXTS), encoding="utf-8")
    allow = ["--allow", "duplicates-across-splits"]
    said = tanzaku("train", recipe, *allow, "--measure", "job/mine.py:polite", "--out", "run")
    assert_refused(said, "for rows of plain text nothing is")


def test_no_code_is_run_that_an_adapters_file_names(recipe: Path, tanzaku: Tanzaku, model_dir: Path) -> None:
    """Neither from where it was trained, nor from where it lies."""
    said = tanzaku("train", recipe, "--measure", "job/mine.py:polite", "--out", "run")
    assert said.code == 0, said.err
    adapter = Path("run/adapters/lora")
    about = json.loads((adapter / "tanzaku.json").read_text(encoding="utf-8"))["meta"]
    assert about["measured"][0]["file"] == "mine.py" and "job" not in json.dumps(about["measured"])
    trap = f"open({str(Path('ran').absolute())!r}, 'w')\n" + CODE
    for folder in (recipe.parent, adapter, Path()):
        (folder / "mine.py").write_text(trap, encoding="utf-8")
    said = tanzaku("predict", adapter, "--data", recipe.parent / "test.jsonl", "--out", "out.jsonl")
    assert said.code == 0, said.err
    task = task_in(about, "")
    assert task is not None and [metric.name for metric in task.metrics][-1] == "polite"
    model, _ = load_for(str(model_dir), task)
    tz.load(model, adapter, name="mine")
    assert not Path("ran").exists()


@pytest.mark.parametrize("verb", ["train", "compare"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_run_is_kept_whose_metric_fails_at_a_row(
    recipe: Path, tanzaku: Tanzaku, verb: str, split: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that its function has not met before: all other figures, adapters and predictions are there."""
    name = f"odd_{verb}_{split}"  # what fails is told once
    code = f"def {name}(text, reference):\n    return 1 / (reference.strip() != 'odd')\n"
    (recipe.parent / "mine.py").write_text(CODE + code, encoding="utf-8")
    rows = [{"prompt": f"{split} sea", "completion": " warm"}, {"prompt": f"{split} wind", "completion": " odd"}]
    (recipe.parent / f"{split}.jsonl").write_text("".join(map(_line, rows)), encoding="utf-8")
    workers = ["--workers", "1"] if verb == "compare" else []
    said = tanzaku(verb, recipe, *workers, "--measure", f"job/mine.py:{name}", "--out", "run")
    assert said.code == 0, said.err
    assert "raised ZeroDivisionError" in caplog.text
    results = results_of(Path("run"))
    for each in results["candidates" if verb == "compare" else "jobs"]:
        assert Path("run", each["adapter"]).is_dir() and each["test"]["exact_match"] is not None
        found = (
            each["test"][name]
            if split == "test"
            else (each["scores"][name][0] if verb == "compare" else each["valid"][name])
        )
        assert found is None
