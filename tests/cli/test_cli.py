"""The command line from end to end, on a tiny model: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_kit import Tanzaku, assert_refused, results_of

from tanzaku.cli import demo, record
from tanzaku.cli.display import Display
from tanzaku.methods import METHODS
from tanzaku.train import loop

DATA = Path(demo.__file__).parents[1] / "data"

# -- help and exit codes


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "sklearn", "scipy", "numpy", "datasets", "rich")
    code = f"import sys, tanzaku.cli; sys.exit(','.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


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
    assert (found["command"], found["device"], found["data"]["labels"]) == ("train", "cpu", ["harsh", "mild"])
    assert found["data"]["rows"] == {"train": 6, "valid": 6, "test": 6}
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    (job,) = found["jobs"]
    assert (job["name"], job["status"], len(job["epochs"])) == ("lora", "done", 2)
    assert len(job["predictions"]) == 6 and len(job["confusion"]) == 2
    assert (work / "run" / job["adapter"] / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in (work / "run").iterdir()) == ["adapters", "results.json"]


def test_train_from_flags_alone_without_valid_and_test(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "--model", model_dir, "--train", "train.tsv", "--method", "ia3", "--epochs", "1")
    assert said.code == 0
    (out,) = (work / "runs").iterdir()
    (job,) = results_of(out)["jobs"]
    assert (job["method"], job["test"], job["confusion"], job["train_settings"]["epochs"]) == ("ia3", None, None, 1)


def test_compare_ranks_its_candidates(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("compare", "recipe.yaml", "--method", "lora", "--method", "head", "--out", "run", "--epochs", "1")
    assert (said.code, said.err) == (0, "")
    for part in ("lora (1 of 2)", "head (2 of 2)", "(95% interval)", "16.7 points", "One run", "run/results.json"):
        assert part in said.out
    assert [job["name"] for job in results_of(work / "run")["jobs"]] == ["lora", "head"]


def test_compare_takes_all_small_methods_by_default(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    flags = ["--train", "train.tsv", "--epochs", "1", "--set", "llama_adapter.adapter_layers=1", "--out", "run"]
    assert tanzaku("compare", "--model", model_dir, *flags).code == 0
    found = results_of(work / "run")
    assert {job["name"] for job in found["jobs"]} == set(METHODS) - {"full"}
    assert {job["status"] for job in found["jobs"]} == {"done"}


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
    assert results_of(work / "run")["data"]["truncated"] == {"train": 2, "valid": 2, "test": 2}


def test_methods(tanzaku: Tanzaku) -> None:
    table = json.loads(tanzaku("methods", "--json").out)
    assert [row["name"] for row in table] == list(METHODS)
    assert {"peft_type", "mergeable", "paper", "summary", "settings"} <= set(table[0])
    said = tanzaku("methods")
    assert said.code == 0 and all(name in said.out for name in METHODS)


def test_demo(work: Path, model_dir: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    # The demo's own recipe, cut to a few rows and moved to the tiny model.
    package = work / "package" / "data"
    shutil.copytree(DATA / "poems", package / "poems")
    for file in (package / "poems").glob("*.tsv"):
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(True)[:25]), encoding="utf-8")
    bundled = DATA / "demo.yaml"
    content = yaml.safe_load(bundled.read_text(encoding="utf-8")) | {"model": str(model_dir)}
    (package / "demo.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.setattr(demo.resources, "files", lambda _: package.parent)
    said = tanzaku("demo", "--epochs", "1", "--methods", "lora,head", "--methods", "full")
    assert (said.code, said.err) == (0, "")
    assert [job["name"] for job in results_of(work / "runs" / "demo")["jobs"]] == ["lora", "head", "full"]
    assert tanzaku("demo", "--epochs", "1", "--methods", "head").code == 0  # its own results are replaced
    assert [path.name for path in (work / "runs" / "demo" / "adapters").iterdir()] == ["head"]
    assert_refused(tanzaku("demo", "--epochs", "0"), "--epochs is '0'")


def test_the_bundled_recipe_is_sound() -> None:
    from tanzaku.recipe import build_recipe, jobs_of
    from tanzaku.tasks.prepare import read_classification

    recipe = build_recipe(DATA / "demo.yaml", {})
    assert {job.name for job in jobs_of(recipe)} == set(METHODS)
    assert len(read_classification(recipe.data).labels) == 2


# -- stopping and failing


def test_interrupted_keeps_what_is_finished(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch_done = Display.epoch_done

    def stop_at_head(self: Display, job: Any, record: Any) -> None:
        if job.name == "head":
            raise KeyboardInterrupt
        epoch_done(self, job, record)

    monkeypatch.setattr(Display, "epoch_done", stop_at_head)
    flags = ["--method", "lora", "--method", "head", "--method", "ia3"]
    said = tanzaku("compare", "recipe.yaml", *flags, "--out", "run")
    assert said.code == 130
    line = "interrupted; run keeps lora; go on with --method head --method ia3 and another --out"
    assert said.err == f"tanzaku: {line}\n"
    assert [job["status"] for job in results_of(work / "run")["jobs"]] == ["done", "interrupted"]
    assert [path.name for path in (work / "run" / "adapters").iterdir()] == ["lora"]


def test_interrupted_early_leaves_nothing(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "step_done", stop)
        said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert (said.code, said.err.count("\n")) == (130, 1) and "run the same command again" in said.err
    monkeypatch.setattr("tanzaku.models.load_classifier", stop)
    said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert (said.code, said.err.count("\n")) == (130, 1) and "run the same command again" in said.err
    assert not (work / "run").exists()


def test_one_failed_candidate_does_not_stop_the_others(work: Path, tanzaku: Tanzaku) -> None:
    recipe = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["methods"] = [{"full": {}, "name": "wild", "train": {"learning_rate": 1e30, "epochs": 3}}, "head"]
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    said = tanzaku("compare", "recipe.yaml", "--out", "run")
    assert said.code == 1
    assert said.err.count("\n") == 1 and "1 of 2 candidates failed; candidate 'wild' failed" in said.err
    found = results_of(work / "run")
    assert [job["status"] for job in found["jobs"]] == ["failed", "done"]
    assert_refused(tanzaku("train", "recipe.yaml", "--method", "wild", "--out", "other"), "'wild' failed")


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

    monkeypatch.setattr(loop, "train_jobs", fail)
    assert_refused(tanzaku("train", "recipe.yaml"), "KeyError", "--debug")


def test_debug_shows_the_traceback(tanzaku: Tanzaku, work: Path) -> None:
    for args in (["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]):
        said = tanzaku(*args)
        assert said.code == 2 and "Traceback" in said.err
        assert said.err.splitlines()[-1].startswith("tanzaku: error: there is no recipe no.yaml")


def test_figures_that_are_no_numbers_are_null_in_json() -> None:
    found = record.finite({"a": [float("nan"), 1.0], "b": (float("inf"), "x"), "c": 2})
    assert found == {"a": [None, 1.0], "b": [None, "x"], "c": 2}
