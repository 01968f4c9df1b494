"""The command line from end to end, on a tiny model: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import catalogue
from cli_kit import Tanzaku, assert_refused, results_of

from tanzaku.cli import VERBS, demo
from tanzaku.cli.display import Display
from tanzaku.files.writing import finite
from tanzaku.methods import METHODS
from tanzaku.train import scheduler as scheduling

DATA = Path(demo.__file__).parents[1] / "data"

HEAVY = {"torch", "transformers", "numpy", "tanzaku.recipe.schema"}
LIGHT = {*HEAVY, "pydantic", "yaml"}  # which some versions of typer read values with

# -- help and exit codes


def test_help_of_a_command(tanzaku: Tanzaku) -> None:
    said = tanzaku("help")
    assert said.code == 0 and said.out == tanzaku("--help").out
    for verb in ("train", "predict", "methods"):
        said = tanzaku("help", verb)
        assert (said.code, said.err) == (0, "") and said.out == tanzaku(verb, "--help").out
    assert_refused(tanzaku("help", "trian"), "no command 'trian' (did you mean 'train'?)")


OPTIONS = {
    "train --lr 1": " (did you mean '--learning-rate'?); tanzaku train --help",
    "train --learning-rat 1": " (did you mean '--learning-rate'?)",
    "train --batch_size 1": " (did you mean '--batch-size'?)",
    "train --quiet": "; tanzaku train --help lists them",
    "predict --jsn": " (did you mean '--json'?)",
    "--versoin": " (did you mean '--version'?); tanzaku --help",
}


@pytest.mark.parametrize("words", OPTIONS)
def test_options_that_are_none(tanzaku: Tanzaku, words: str) -> None:
    option = next(word for word in words.split() if word.startswith("--"))
    assert_refused(tanzaku(*words.split()), f"there is no option {option}{OPTIONS[words]}")


def test_libraries_keep_still(tanzaku: Tanzaku, capfd: pytest.CaptureFixture[str]) -> None:
    assert tanzaku("--version").code == 0  # before anything is imported
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    assert capfd.readouterr().err == ""


def test_a_terminal_that_knows_few_letters(work: Path) -> None:
    command = [sys.executable, "-m", "tanzaku", "train", "recipe.yaml", "--out", "run"]
    words = iter(["sea", "rain", "wind", "cold", "warm", "sun"])
    for name in ("train", "valid", "test"):
        rows = "text\tlabel\n" + "".join(f"{next(words)}\t{label}\n" for label in ("春", "冬"))
        (work / f"{name}.tsv").write_text(rows, encoding="utf-8")
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert b"labels \\u51ac, \\u6625" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "sklearn", "scipy", "numpy", "datasets", "rich")
    code = f"import sys, tanzaku.cli; sys.exit(','.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({}, ("1", "1000")),
        ({"THP_MEM_ALLOC_ENABLE": "0", "GOMP_SPINCOUNT": "5"}, ("0", "5")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("1", None)),  # a spin count would override it
    ],
)
def test_torch_is_prepared_before_it_is_there(chosen: dict[str, str], expected: tuple[str, str | None]) -> None:
    """Large pages, and threads that soon fall asleep; unless the user has said otherwise."""
    names = ("THP_MEM_ALLOC_ENABLE", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    code = (
        "import os, sys; from tanzaku.cli import main; main(['--version']);"
        f"print(tuple(os.environ.get(name) for name in {names[:2]}), 'torch' in sys.modules)"
    )
    given = {key: value for key, value in os.environ.items() if key not in names} | chosen
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given)
    assert done.stdout.splitlines()[-1] == f"{expected} False"


def test_help_and_version(tanzaku: Tanzaku) -> None:
    for args in (["--help"], ["train", "--help"], ["compare", "-h"], ["predict", "-h"], ["demo", "-h"]):
        said = tanzaku(*args)
        assert (said.code, said.err) == (0, "") and "Usage: tanzaku" in said.out
    assert tanzaku("--version").out.startswith("tanzaku 0.")
    assert tanzaku().code == 2


@pytest.mark.parametrize("args", [["trian"], ["train", "--epoch", "1"], ["train", "a", "b"], ["predict"]])
def test_usage_errors(tanzaku: Tanzaku, args: list[str]) -> None:
    assert_refused(tanzaku(*args), "--help")


# -- what runs leave


def test_train(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert (said.code, said.err) == (0, "")
    assert "\x1b" not in said.out and "\r" not in said.out
    for part in (
        "6 training, 6 validation, 6 test rows",
        "training loss",
        "macro F1",
        "confusion",
        "run/adapters/lora",
    ):
        assert part in said.out
    found = results_of(work / "run")
    assert (found["command"], found["device"], found["data"]["task"]["labels"]) == (
        "train",
        "cpu",
        ["harsh", "mild"],
    )
    assert found["data"]["rows"] == {"train": 6, "valid": 6, "test": 6}
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    (job,) = found["jobs"]
    assert (job["name"], job["status"], len(job["epochs"])) == ("lora", "done", 2)
    assert len(job["predictions"]) == 6 and len(job["confusion"]) == 2
    assert (work / "run" / job["adapter"] / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in (work / "run").iterdir()) == ["adapters", "events.jsonl", "results.json"]


def test_train_from_flags_alone_without_valid_and_test(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "--model", model_dir, "--train", "train.tsv", "--method", "ia3", "--epochs", "1")
    assert said.code == 0
    (out,) = (work / "runs").iterdir()
    (job,) = results_of(out)["jobs"]
    assert (job["method"], job["test"], job["confusion"], job["train_settings"]["epochs"]) == ("ia3", None, None, 1)


def test_a_recipe_in_results_runs_again(work: Path, tanzaku: Tanzaku) -> None:
    tanzaku("train", "recipe.yaml", "--out", "first")
    (work / "again.yaml").write_text(json.dumps(results_of(work / "first")["recipe"]), encoding="utf-8")
    assert tanzaku("train", "again.yaml", "--out", "second").code == 0
    one, two = (results_of(work / name)["jobs"][0]["predictions"] for name in ("first", "second"))
    assert one == two


def test_the_recipe_may_be_elsewhere(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    assert tanzaku("train", "../recipe.yaml", "--out", "run").code == 0
    assert (work / "elsewhere" / "run" / "results.json").is_file()


def test_cut_texts_are_counted(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--max-length", "2", "--out", "run")
    assert "2 of 6 training texts were cut at 2 tokens" in said.out
    assert results_of(work / "run")["data"]["truncated"] == {"train": 2, "valid": 6, "test": 6}


def test_methods(tanzaku: Tanzaku) -> None:
    table = json.loads(tanzaku("methods", "--json").out)
    assert [row["name"] for row in table] == list(METHODS)
    assert {"peft_type", "mergeable", "paper", "summary", "settings"} <= set(table[0])
    said = tanzaku("methods")
    assert said.code == 0 and all(name in said.out for name in METHODS)
    assert catalogue.FILE.read_text(encoding="utf-8") == catalogue.content(), "python -m bench catalogue --write"
    assert catalogue.DOCUMENT.read_text(encoding="utf-8") == catalogue.document(), "python -m bench catalogue --write"


@pytest.mark.parametrize(("words", "spared"), [("methods", HEAVY), ("methods --json", HEAVY), ("--help", LIGHT)])
def test_what_starts_at_once(words: str, spared: set[str]) -> None:
    """Neither a list of methods nor one of verbs waits for libraries that it has no use for."""
    program = "import sys; from tanzaku.cli import main\nprint(main(sys.argv[1:]), *sys.modules, file=sys.stderr)"
    said = subprocess.run([sys.executable, "-c", program, *words.split()], capture_output=True, text=True, check=True)
    code, *imported = said.stderr.split()
    assert code == "0" and said.stdout and not spared & {*imported}


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_verbs_says_what_they_say(verb: str, tanzaku: Tanzaku) -> None:
    assert tanzaku(verb, "--help").out.splitlines()[2].strip() == VERBS[verb]


def test_the_bundled_recipes_are_sound() -> None:
    from tanzaku.recipe.schema import build_recipe, jobs_of
    from tanzaku.tasks.prepare import read_tables

    for task, (file, _) in demo.DEMOS.items():
        recipe = build_recipe(DATA / file, {})
        assert (recipe.task, recipe.model.name) == (task, "embedded")
        assert "test" in read_tables(recipe.kind, recipe.data).tables

    recipe = build_recipe(DATA / "demo.yaml", {})
    named = {name for name, method in METHODS.items() if method.by_default or name == "full"}
    assert {job.name for job in jobs_of(recipe)} == named
    assert read_tables(recipe.kind, recipe.data).task.to_json()["labels"] == ["0", "1"]


# -- stopping and failing


def test_interrupted_early_leaves_nothing(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "step_done", stop)
        said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert (said.code, said.err.count("\n")) == (130, 1) and "run the same command again" in said.err
    monkeypatch.setattr("tanzaku.models.loading.load_for", stop)
    said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert (said.code, said.err.count("\n")) == (130, 1) and "run the same command again" in said.err
    assert not (work / "run").exists()


def test_a_full_disk(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, *args: Any, **options: Any) -> int:
        if path.name.startswith(".results.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "run"), "cannot write run/results.json: No space left")


def test_an_error_nobody_foresaw_is_one_line_too(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(scheduling, "train_jobs", fail)
    assert_refused(tanzaku("train", "recipe.yaml"), "KeyError", "--debug")


def test_debug_shows_the_traceback(tanzaku: Tanzaku, work: Path) -> None:
    for args in (["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]):
        said = tanzaku(*args)
        assert said.code == 2 and "Traceback" in said.err
        assert said.err.splitlines()[-1].startswith("tanzaku: error: there is no recipe no.yaml")


def test_figures_that_are_no_numbers_are_null_in_json() -> None:
    found = finite({"a": [float("nan"), 1.0], "b": (float("inf"), "x"), "c": 2})
    assert found == {"a": [None, 1.0], "b": [None, "x"], "c": 2}
