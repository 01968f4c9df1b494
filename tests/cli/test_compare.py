"""`tanzaku compare` and `tanzaku demo`: what they write and say, and how they go on after being cut off."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from cli_kit import ROWS, Tanzaku, assert_refused, results_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from close import GRADIENT, assert_close
from tanzaku.cli import compare as verb
from tanzaku.cli import demo
from tanzaku.cli.live import Live
from tanzaku.compare import comparison, tables
from tanzaku.compare.comparison import Comparison
from tanzaku.methods import METHODS
from tanzaku.tasks.task import LOSS
from tanzaku.train.events import EventLog, read_events
from tanzaku.train.scheduler import JobScheduler
from tiers import costly

WHOLE: dict[str, Any] = {}  # what the run that nobody cuts off ends with
DATA = Path(demo.__file__).parents[1] / "data"
ADJECTIVES, NOUNS = ("warm", "cold"), ("spring", "winter", "rain", "wind", "sea", "of", "the", "a")


def rows(number: int, seed: int) -> str:
    draw = random.Random(seed)
    lines: dict[str, None] = {}  # each once
    while len(lines) < number:
        words = [draw.choice(ADJECTIVES), *(draw.choice(NOUNS) for _ in range(draw.randint(1, 5)))]
        label = "mild" if words[0] == "warm" else "harsh"
        lines[f"{' '.join(draw.sample(words, len(words)))}\t{label}\n"] = None
    return "text\tlabel\n" + "".join(lines)


@pytest.fixture
def plenty(work: Path) -> Path:
    """`work` with rows enough for folds, and a recipe of every kind of entry."""
    for seed, (name, number) in enumerate({"train": 24, "valid": 12, "test": 10}.items()):
        (work / f"{name}.tsv").write_text(rows(number, seed), encoding="utf-8")
    recipe = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["methods"] = [
        {"lora": {"r": {"grid": [1, 2]}}},
        {"ia3": {}, "train": {"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}}},
        "head",
    ]
    recipe["compare"] = {"trials": None, "wave": 3, "seeds": 2, "finalists": 2}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return work


def told(out: Path) -> dict[str, Any]:
    """What a comparison found, without what depends on the clock or on the company that a job had."""
    found = results_of(out)
    keep = ("name", "status", "rank", "finalist", "adapter", "scores", "mean", "interval", "test")
    return {
        "candidates": [{key: each[key] for key in keep} for each in found["candidates"]],
        "verdict": found["verdict"],
        "trials": [(t["name"], t["status"], t["kept"]) for search in found["search"] for t in search["trials"]],
        "jobs": sorted((job["name"], job["status"], len(job["epochs"])) for job in found["jobs"]),
        "predictions": found["rows"]["predictions"],
    }


def assert_alike(found: Any, expected: Any) -> None:
    """Equal, numbers to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_alike(a, b)
    elif isinstance(expected, float):
        assert_close(found, expected, GRADIENT, scale=1)
    else:
        assert found == expected


def test_a_comparison_of_every_kind_of_entry(plenty: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("compare", "recipe.yaml", "--out", "run")
    assert (said.code, said.err) == (0, "")
    found = results_of(plenty / "run")
    assert found["status"] == "done" and found["design"]["runs"] == 2
    assert [c["rank"] for c in found["candidates"]] == [1, 2, 3, 4]
    assert {c["origin"] for c in found["candidates"]} == {"grid", "search", "recipe"}
    means = [c["mean"] for c in found["candidates"]]
    assert means == sorted(means, reverse=True)
    assert len(found["search"][0]["trials"]) == 16 and sum(t["kept"] for t in found["search"][0]["trials"]) == 1
    assert {t["status"] for t in found["search"][0]["trials"]} == {"done", "stopped"}
    assert len(found["comparisons"]) == 6
    # The test rows are for the finalists alone, whose adapters are kept and work.
    finalists = [c["name"] for c in found["candidates"] if c["finalist"]]
    assert finalists == [c["name"] for c in found["candidates"][:2]]
    assert [c["name"] for c in found["candidates"] if c["test"]] == finalists == [*found["rows"]["predictions"]]
    assert sorted(path.name for path in (plenty / "run" / "adapters").iterdir()) == sorted(finalists)
    for sentence in found["verdict"]["sentences"]:
        assert sentence in said.out
    assert said.out.startswith("report: run/report.html") and said.out.count("run/report.html") == 2
    assert "<title>" in (plenty / "run" / "report.html").read_text(encoding="utf-8")
    table = pq.read_table(plenty / "run" / "epochs.parquet")
    assert table.num_rows == sum(len(job["epochs"]) for job in found["jobs"])
    adapters = [f"run/adapters/{name}" for name in finalists]
    lines = tanzaku("predict", "--adapters", *adapters, "--data", "test.tsv", "--out", "p.jsonl")
    assert lines.code == 0
    for row, line in enumerate((plenty / "p.jsonl").read_text(encoding="utf-8").splitlines()):
        for name in finalists:
            expected = found["rows"]["predictions"][name][row]
            assert_close([*json.loads(line)["adapters"][name]["probabilities"].values()], expected)


def test_what_is_cheaper_is_held_to_the_figures_beside_the_ranking_one(
    plenty: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [], comparison.losses

    def losses(scored: Any, design: Any, best: str) -> dict[str, float]:
        asked.append(design.metric.name)
        return dict.fromkeys(real(scored, design, best), math.inf)

    def good(scored: Any, design: Any, best: str) -> dict[str, float]:
        return dict.fromkeys(real(scored, design, best), 0.0)

    found = {}
    for name, replaced in (("held", losses), ("free", good)):
        monkeypatch.setattr(comparison, "losses", replaced)
        assert tanzaku("compare", "recipe.yaml", "--margin", "1", "--finalists", "1", "--out", name).code == 0
        found[name] = results_of(plenty / name)
    assert set(asked) == {"accuracy"}  # beside the ROC-AUC of two classes
    held, free = (found[name]["verdict"] for name in ("held", "free"))
    assert held["cheapest"] == held["best"] and free["cheapest"] == "head" != free["best"]
    # Whoever is recommended is tested and kept, be it no finalist by its place.
    chosen = [each for each in found["free"]["candidates"] if each["finalist"]]
    assert all(each["test"] and each["adapter"] for each in chosen)
    assert {each["name"] for each in chosen} == {free["best"], "head"}


def test_folds(plenty: Path, tanzaku: Tanzaku) -> None:
    """Every row is held out once a repeat; finalists are trained again on all rows."""
    flags = ["--folds", "3", "--repeats", "2", "--finalists", "1", "--method", "lora", "--set", "lora.r=2"]
    recipe = yaml.safe_load((plenty / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["compare"], recipe["methods"] = {}, ["lora", "head"]
    (plenty / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    said = tanzaku("compare", "recipe.yaml", *flags, "--method", "head", "--out", "run")
    assert (said.code, said.err) == (0, "")
    found = results_of(plenty / "run")
    design = found["design"]
    assert (design["kind"], design["folds"], design["repeats"], design["runs"]) == ("folds", 3, 2, 6)
    assert (design["train_rows"], design["valid_rows"]) == (24, 12)
    stages = [(job["candidate"], job["stage"]) for job in found["jobs"]]
    best = found["candidates"][0]["name"]
    assert stages.count((best, "measure")) == 6 and stages.count((best, "final")) == 1
    assert sum(stage == "final" for _, stage in stages) == 1
    places = {(job["repeat"], job["fold"]) for job in found["jobs"] if job["stage"] == "measure"}
    assert places == {(repeat, fold) for repeat in range(2) for fold in range(3)}


def test_all_small_methods_by_default(work: Path, model_dir: Path, tanzaku: Tanzaku) -> None:
    flags = ["--train", "train.tsv", "--epochs", "1", "--folds", "2"]
    assert tanzaku("compare", "--model", model_dir, *flags, "--out", "run").code == 0
    found = results_of(work / "run")
    assert {c["name"] for c in found["candidates"]} == {name for name, method in METHODS.items() if method.by_default}
    assert {c["status"] for c in found["candidates"]} == {"done"}


@pytest.mark.parametrize("tested", [True, False])
def test_what_is_said_of_three_labels_and_one_rate(work: Path, model_dir: Path, tanzaku: Tanzaku, tested: bool) -> None:
    """Macro F1 and accuracy of the test rows, of which nothing is said where there are none; whose rate it was."""
    for split, before in (("train", ""), ("valid", "the "), ("test", "a ")):
        text = "".join(
            f"{before}{words}\t{label}\n" for words, label in [*ROWS, ("rain wind", "odd"), ("sea of sea", "odd")]
        )
        (work / f"{split}.tsv").write_text(f"text\tlabel\n{text}", encoding="utf-8")
    flags = [
        "--model",
        model_dir,
        "--train",
        "train.tsv",
        "--valid",
        "valid.tsv",
        "--method",
        "head",
        "--method",
        "ia3",
    ]
    flags += ["--epochs", "1", "--seeds", "2", "--learning-rate", "1e-3"]
    said = tanzaku("compare", *flags, *(["--test", "test.tsv"] if tested else []), "--out", "run")
    assert said.code == 0, said.err
    for words in ("test accuracy", "test macro F1", "test ROC-AUC", "test: the finalists' predictions"):
        assert (words in said.out) == tested
    for name in ("head", "ia3"):
        assert f"{name}: its learning rate, 0.001, was shared with other methods and not searched" in said.out


def test_an_adapter_of_a_run_that_is_done_or_not(work: Path, tanzaku: Tanzaku) -> None:
    """Who mistypes a name is not told to resume; who looks for what a run has not come to is."""
    assert tanzaku("compare", "recipe.yaml", "--seeds", "1", "--out", "run").code == 0
    said = tanzaku("predict", "run/adapters/lorra", "--data", "test.tsv")
    assert_refused(said, "there is no adapter run/adapters/lorra", "did you mean 'lora'")
    assert "--resume" not in said.err
    found = json.loads((work / "run" / "results.json").read_text(encoding="utf-8"))
    (work / "run" / "results.json").write_text(json.dumps(found | {"status": "interrupted"}), encoding="utf-8")
    said = tanzaku("predict", "run/adapters/head", "--data", "test.tsv")
    assert_refused(said, "the run in run is not done", "tanzaku compare --resume --out run")


def test_one_run_each_gives_no_verdict(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("compare", "recipe.yaml", "--method", "lora", "--method", "head", "--seeds", "1", "--out", "run")
    assert said.code == 0 and "One run each" in said.out
    assert results_of(work / "run")["comparisons"][0]["p"] is None


def test_a_memory_limit(work: Path, tanzaku: Tanzaku) -> None:
    flags = ["--method", "lora", "--method", "head", "--seeds", "1", "--out", "run"]
    assert_refused(tanzaku("compare", "recipe.yaml", *flags, "--memory", "1MB"), "memory limit", "allow more")
    assert_refused(tanzaku("compare", "recipe.yaml", *flags, "--memory", "8 apples"), "8 apples", "8GB")
    assert tanzaku("compare", "recipe.yaml", *flags, "--memory", "64GB", "--overwrite").code == 0
    assert results_of(work / "run")["design"]["memory_limit_bytes"] == 64 * 10**9


def test_bad_designs_are_refused_before_the_model_is_loaded(work: Path, tanzaku: Tanzaku) -> None:
    assert_refused(tanzaku("compare", "recipe.yaml", "--folds", "1"), "--folds", "2")
    assert_refused(tanzaku("compare", "recipe.yaml", "--repeats", "2"), "folds")
    assert_refused(tanzaku("compare", "recipe.yaml", "--folds", "9"), "too few for 9 folds", "--folds 6")


@pytest.fixture
def bundled(work: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demos' own recipes, cut to a few rows and moved to the tiny model."""
    package = work / "package" / "data"
    for recipe, _ in demo.DEMOS.values():
        content = yaml.safe_load((DATA / recipe).read_text(encoding="utf-8")) | {"model": str(model_dir)}
        folder = Path(content["data"]["train"]).parent.name
        shutil.copytree(DATA / folder, package / folder)
        for file in (package / folder).glob("*.tsv"):
            file.write_text("".join(file.read_text(encoding="utf-8").splitlines(True)[:25]), encoding="utf-8")
        (package / recipe).write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.setattr(demo.resources, "files", lambda _: package.parent)


def test_demo(work: Path, bundled: None, tanzaku: Tanzaku) -> None:
    said = tanzaku("demo", "--epochs", "1", "--methods", "lora,head", "--methods", "full")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("report: runs/demo/report.html") and "before training" not in said.out
    assert {c["name"] for c in results_of(work / "runs" / "demo")["candidates"]} == {"lora", "head", "full"}
    assert tanzaku("demo", "--epochs", "1", "--methods", "head").code == 0  # its own results are replaced
    assert [path.name for path in (work / "runs" / "demo" / "adapters").iterdir()] == ["head"]
    assert tanzaku("demo", "--resume").code == 0
    assert_refused(tanzaku("demo", "--epochs", "0"), "--epochs is '0'")
    assert_refused(tanzaku("demo", "--task", "regression"), "--task is 'regression'", "classification, generation")


def test_demo_of_text(work: Path, model_dir: Path, bundled: None, tanzaku: Tanzaku) -> None:
    """What is written for three test rows is shown before training, by the base, and after, by all."""
    said = tanzaku("demo", "--task", "generation", "--epochs", "1")
    assert (said.code, said.err) == (0, "")
    out = work / "runs" / "demo-generation"
    assert said.out.startswith("report: runs/demo-generation/report.html") and not (work / "runs" / "demo").exists()
    results = results_of(out)
    assert results["design"]["metric"] == "exact_match" and results["rows"]["split"] == "test"
    assert sorted(results["rows"]["predictions"]) == ["ia3", "lora"]
    _, before, after = (part.split("\n\n")[0] for part in re.split(r"(?:before|after) training\n", said.out))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    words = AutoTokenizer.from_pretrained(model_dir)
    expected: dict[bool, list[str]] = {False: [], True: []}
    with (work / "package/data/dates/test.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[:3]
    for at, row in enumerate(rows):
        ids = words(row["prompt"], return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        bare = {"expected": row["completion"], "the base": words.decode(written, skip_special_tokens=True)}
        adapters = {name: found[at]["text"] for name, found in results["rows"]["predictions"].items()}
        for trained, lines in expected.items():
            lines.append(row["prompt"])
            lines += [f"  {name:8}  {text}".rstrip() for name, text in (bare | (adapters if trained else {})).items()]
    assert (before.splitlines()[:9], after.splitlines()) == (expected[False], expected[True])
    again = tanzaku("demo", "--task", "generation", "--resume")
    assert again.code == 0 and after in again.out


# -- stopping and going on


def test_one_failed_candidate_does_not_stop_the_others(work: Path, tanzaku: Tanzaku) -> None:
    recipe = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["methods"] = [{"lora": {}, "name": "wild", "train": {"learning_rate": 1e30, "epochs": 3}}, "head"]
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    said = tanzaku("compare", "recipe.yaml", "--out", "run", "--seeds", "2")
    assert said.code == 1
    assert said.err.count("\n") == 1 and "1 of 2 candidates failed; candidate 'wild' failed" in said.err
    found = {c["name"]: c for c in results_of(work / "run")["candidates"]}
    assert (found["wild"]["status"], found["head"]["status"]) == ("failed", "done")
    assert (found["wild"]["rank"], found["head"]["rank"]) == (None, 1)
    assert_refused(tanzaku("train", "recipe.yaml", "--method", "wild", "--out", "other"), "'wild' failed")


def test_ctrl_c_says_how_to_go_on(plenty: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    tanzaku("compare", "recipe.yaml", "--out", "whole")
    job_done = Live.job_done

    def stop_at_sixth(self: Live, *args: Any) -> None:
        job_done(self, *args)
        if self.ended == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Live, "job_done", stop_at_sixth)
        said = tanzaku("compare", "recipe.yaml", "--out", "run")
    assert said.code == 130 and "go on with tanzaku compare --resume --out run" in said.err
    assert results_of(plenty / "run")["status"] == "interrupted"
    done = len(list((plenty / "run" / "state" / "jobs").iterdir()))
    assert 0 < done < len(results_of(plenty / "whole")["jobs"])
    assert tanzaku("compare", "--resume", "--out", "run").code == 0
    assert_alike(told(plenty / "run"), told(plenty / "whole"))
    events = read_events(plenty / "run" / "events.jsonl")
    ended = [event.job for event in events if event.kind == "job_done" and event.figures["status"] != "interrupted"]
    assert sorted(map(str, ended)) == [name for name, *_ in told(plenty / "whole")["jobs"]], "the end of each, once"
    assert [e.figures["status"] for e in events if e.kind == "run_done"] == ["interrupted", "done"]
    assert [e.figures["resumed"] for e in events if e.kind == "run_started"] == [False, True]
    assert {e.figures["stage"] for e in events if e.kind == "stage"} == {"search", "measure", "test"}


def test_what_is_done_so_far_is_reported_as_jobs_end(
    plenty: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As jobs end, and not more often than now and then."""
    seen: list[tuple[str, int, int]] = []
    write = tables.write_epochs

    def noting(results: Any, metrics: Any, path: Path) -> None:
        write(results, metrics, path)
        seen.append((results["status"], len(results["jobs"]), pq.read_metadata(path).num_rows))

    monkeypatch.setattr(tables, "write_epochs", noting)
    command = ["compare", "recipe.yaml", "--method", "lora", "--method", "head", "--workers", "1", "--out", "run"]
    assert tanzaku(*command).code == 0
    often, total = len(seen), seen[-1][1]
    assert seen[0] == ("running", 0, 0) and seen[-1] == ("done", 6, 12) and often < 8
    seen.clear()
    monkeypatch.setattr(verb, "_REST", 0)
    monkeypatch.setattr(verb, "_APART", 0)
    assert tanzaku(*command, "--overwrite").code == 0
    assert [jobs for status, jobs, _ in seen if status == "running"] == [*range(total + 1), total]
    page = (plenty / "run" / "report.html").read_text(encoding="utf-8")
    assert "still running" not in page


def test_a_full_disk_while_events_are_written_loses_no_job(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: EventLog, line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventLog, "_write", full)
    said = tanzaku("compare", "recipe.yaml", "--out", "run")
    assert (
        said.code == 0 and said.out.count("cannot write run/events.jsonl: No space left on device; the run goes") == 1
    )
    assert results_of(work / "run")["status"] == "done"


def test_resuming_the_wrong_thing(plenty: Path, tanzaku: Tanzaku) -> None:
    assert_refused(tanzaku("compare", "--resume"), "no run of tanzaku compare in runs", "--out")
    assert_refused(tanzaku("compare", "--resume", "--out", "nowhere"), "nowhere holds no run")
    assert tanzaku("compare", "recipe.yaml", "--out", "run").code == 0
    assert_refused(tanzaku("compare", "--resume", "--out", "run", "--epochs", "3"), "leave --epochs out")
    assert_refused(tanzaku("compare", "--resume", "--out", "run", "--method", "ia3"), "leave --method out")
    assert_refused(tanzaku("compare", "--resume", "--out", "run", "--model", "embedded"), "leave --model out")
    assert_refused(
        tanzaku("compare", "recipe.yaml", "--resume", "--out", "run", "--epochs", "3"), "another train.epochs"
    )
    before = results_of(plenty / "run")
    assert tanzaku("compare", "recipe.yaml", "--resume", "--out", "run").code == 0  # nothing is left to do
    assert results_of(plenty / "run")["jobs"] == before["jobs"]
    (plenty / "valid.tsv").write_text(rows(12, 8), encoding="utf-8")
    assert_refused(tanzaku("compare", "--resume", "--out", "run"), "rows have changed")


def test_finished_jobs_are_not_trained_again(plenty: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tanzaku("compare", "recipe.yaml", "--out", "run").code == 0
    gone = sorted((plenty / "run" / "state" / "jobs").glob("lora-r2--*.json"))[0]
    gone.unlink()
    (plenty / "run" / "state" / "tested.json").unlink()
    begun: list[str] = []
    add = JobScheduler.add
    monkeypatch.setattr(
        JobScheduler, "add", lambda self, jobs: (begun.extend(job.name for job in jobs), add(self, jobs))[1]
    )
    assert tanzaku("compare", "--resume", "--out", "run").code == 0
    assert begun == [gone.stem]


def test_an_open_precision_is_settled_once(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on has what it began with, whatever a machine would choose by then; the base is loaded for it."""
    recipe = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["train"] = {**recipe.get("train", {}), "epochs": 1, "precision": "auto"}
    recipe["methods"] = ["ia3", {"lora": {}, "train": {"precision": "auto"}}]
    recipe["compare"] = {"seeds": 1}

    def say(**changes: Any) -> None:
        (work / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}), encoding="utf-8")

    def here(chosen: str) -> None:
        monkeypatch.setattr(
            "tanzaku.engine.precision.precision_for",
            lambda device, weights: chosen if weights is torch.bfloat16 else "fp32",
        )

    say()
    here("bf16")
    assert tanzaku("compare", "recipe.yaml", "--out", "run").code == 0
    here("fp32")
    said = tanzaku("compare", "recipe.yaml", "--resume", "--out", "run")
    assert said.code == 0, said.err
    found = results_of(work / "run")
    assert {c["train_settings"]["precision"] for c in found["candidates"]} == {"bf16"}
    assert found["recipe"]["train"]["precision"] == found["recipe"]["methods"][1]["train"]["precision"] == "bf16"

    here("bf16")
    say(methods=["ia3", {"lora": {}, "train": {"precision": "fp32"}}])  # whose base is in fp32
    assert tanzaku("compare", "recipe.yaml", "--out", "mixed").code == 0
    assert {c["train_settings"]["precision"] for c in results_of(work / "mixed")["candidates"]} == {"fp32"}
    say(methods=["ia3", {"lora": {}, "train": {"precision": {"grid": ["auto", "fp32"]}}}])
    for more in ([], ["--dry-run"]):
        said = tanzaku("compare", "recipe.yaml", "--out", "grid", *more)
        assert_refused(said, "found precision auto as one of several", "settled as a run begins")


@pytest.mark.parametrize("moment", costly([17], [2, 25, 43]))
def test_jobs_under_way_go_on_from_their_last_epoch(
    plenty: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Cut off when so many epochs are over, at a rung, behind one, or while measuring: none is trained again."""
    if "epochs" not in WHOLE:
        assert tanzaku("compare", "recipe.yaml", "--epochs", "4", "--out", "whole").code == 0
        WHOLE["epochs"] = told(plenty / "whole")
    over: list[tuple[str, int]] = []

    def note(_: Live, job: str, figures: Any) -> None:
        over.append((job, figures["epoch"]))
        if len(over) == moment:
            raise KeyboardInterrupt

    monkeypatch.setattr(Live, "epoch_done", note)
    assert tanzaku("compare", "recipe.yaml", "--epochs", "4", "--out", "run").code == 130
    assert any((plenty / "run" / "state" / "under_way").iterdir())
    assert tanzaku("compare", "--resume", "--out", "run").code == 0
    assert not (plenty / "run" / "state" / "under_way").exists()
    assert len(over) == len(set(over)) == sum(epochs for _, _, epochs in WHOLE["epochs"]["jobs"])
    assert_alike(told(plenty / "run"), WHOLE["epochs"])


def test_a_job_a_rung_ahead_waits_for_the_others() -> None:
    """After a kill one may be at its third epoch and another at its first: each is judged at its own rung, by all."""

    def at(*losses: float) -> Any:
        return SimpleNamespace(epochs=[SimpleNamespace(valid={"loss": loss}) for loss in losses])

    def judged(**epochs: int) -> tuple[list[str], list[str]]:
        scheduler: Any = SimpleNamespace(waiting=epochs, results=results, queued=[])
        return Comparison._halved(comparison, scheduler, [["a", "b", "c", "d"]])

    comparison: Any = SimpleNamespace(settings=SimpleNamespace(reduction=2), metric=LOSS)
    comparison._epochs = partial(Comparison._epochs, comparison)
    results = {"a": at(0.3, 0.2, 0.1), "b": at(0.4), "c": at(0.5), "d": at(0.6)}
    assert judged(a=3, b=1) == ([], ["a"])
    assert judged(a=3, b=1, c=1) == (["c"], ["a"])
    results["b"] = at(0.4, 0.3, 0.2)
    assert judged(a=3, b=3) == (["b"], [])


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "workers"), costly([(5, 1), (17, 2)], [(1, 1), (1, 2), (9, 2), (17, 1), (20, 1)]))
def test_kill_9(plenty: Path, tanzaku: Tanzaku, moment: int, workers: int) -> None:
    """Killed when so many jobs are in the journal, in the search or while measuring, it ends as if it had not been."""
    rows = ["--rows-per-step", "4", "--workers", str(workers)]
    command = [sys.executable, "-m", "tanzaku", "compare", "recipe.yaml", *rows, "--out"]
    if "jobs" not in WHOLE:
        assert tanzaku("compare", "recipe.yaml", "--rows-per-step", "4", "--out", "whole").code == 0
        WHOLE["jobs"] = told(plenty / "whole")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([*command, "run"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    jobs = plenty / "run" / "state" / "jobs"
    while running.poll() is None and (not jobs.is_dir() or len(list(jobs.glob("*.json"))) < moment):
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert tanzaku("compare", "--resume", "--out", "run").code == 0
    assert_alike(told(plenty / "run"), WHOLE["jobs"])
