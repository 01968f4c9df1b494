"""Candidates that are made of others, in `tanzaku compare` and `tanzaku train`: adapters first, then what uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_kit import Tanzaku, assert_refused, results_of

from tanzaku.compare.comparison import Comparison
from tanzaku.train.scheduler import JobScheduler

THREE: list[dict[str, Any]] = [
    {"lora": {"r": 1}, "name": "a"},
    {"lora": {"r": 2}, "name": "b"},
    {"miss": {"r": 2}, "name": "c"},
]
FUSION: dict[str, Any] = {"fusion": {}, "uses": ["a", "b", "c"]}


def recipe(work: Path, *methods: dict[str, Any], **changes: Any) -> Path:
    path = work / "recipe.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**found, **changes, "methods": list(methods)}), encoding="utf-8")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_adapters_and_their_fusion_in_one_comparison(work: Path, tanzaku: Tanzaku, workers: int) -> None:
    recipe(work, *THREE, FUSION, {"average": {"weights": [2.0, 1.0]}, "uses": {"one": "a", "other": "c"}})
    said = tanzaku("compare", "recipe.yaml", "--seeds", 2, "--finalists", 5, "--out", "run", "--workers", workers)
    assert said.code == 0, said.err
    found = results_of(Path("run"))
    assert {c["name"]: c["status"] for c in found["candidates"]} == dict.fromkeys(
        ("a", "b", "c", "fusion", "average"), "done"
    )
    by_name = {c["name"]: c for c in found["candidates"]}
    assert by_name["fusion"]["method_settings"]["adapters"] == ["a", "b", "c"]
    assert by_name["average"]["method_settings"]["adapters"] == ["one", "other"]
    assert names(Path("run/adapters/fusion/parts")) == ["a", "b", "c"]
    # Its parts are what the candidates became on the same rows by the same seed.
    for label, candidate in (("one", "a"), ("other", "c")):
        tensors = "adapter_model.safetensors"
        part = Path("run/adapters/average/parts") / label / tensors
        assert part.read_bytes() == (Path("run/adapters") / candidate / tensors).read_bytes()
    said = tanzaku("predict", "run/adapters/fusion", "--data", "test.tsv", "--format", "jsonl")
    assert said.code == 0 and len(said.out.splitlines()) == 6, said.err
    # The recipe in the results can be run again.
    assert found["recipe"]["methods"][3] == {"fusion": {}, "uses": {"a": "a", "b": "b", "c": "c"}}


def test_a_candidates_name_is_no_folder_beside_the_recipe(work: Path, tanzaku: Tanzaku) -> None:
    """Wherever the command is given."""
    recipe(work, *THREE[:2], {"fusion": {}, "uses": ["a", "b"]})
    for name in ("a", "b"):
        (work / "below" / name).mkdir(parents=True)
    for name in ("recipe.yaml", "train.tsv", "valid.tsv", "test.tsv"):
        (work / name).rename(work / "below" / name)
    assert tanzaku("compare", "below/recipe.yaml", "--seeds", 1, "--out", "run").code == 0
    assert results_of(Path("run"))["recipe"]["methods"][2]["uses"] == {"a": "a", "b": "b"}


def test_folds_fuse_what_was_trained_on_the_same_rows(
    work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}
    add = JobScheduler.add

    def noted(self: JobScheduler, jobs: Any) -> None:
        seen.update({job.name: [path.name for path in job.uses.values()] for job in jobs})
        add(self, jobs)

    monkeypatch.setattr(JobScheduler, "add", noted)
    recipe(work, *THREE[:2], {"fusion": {}, "uses": ["a", "b"]})
    said = tanzaku("compare", "recipe.yaml", "--folds", 2, "--seeds", 1, "--finalists", 1, "--out", "run")
    assert said.code == 0, said.err
    for name, uses in seen.items():
        candidate, _, where = name.partition("--")
        assert uses == ([f"a--{where}", f"b--{where}"] if candidate == "fusion" else [])
    best = results_of(Path("run"))["verdict"]["best"]
    finals = {name for name in seen if name.endswith("--final")}
    assert finals == ({"fusion--final", "a--final", "b--final"} if best == "fusion" else {f"{best}--final"})


def test_a_search_of_a_fusion_trains_its_parts_on_the_searchs_rows(work: Path, tanzaku: Tanzaku) -> None:
    rate = {"train": {"learning_rate": {"choice": [1e-3, 1e-2]}}}
    recipe(work, *THREE[:2], {"fusion": {}, "uses": ["a", "b"], **rate})
    said = tanzaku("compare", "recipe.yaml", "--seeds", 1, "--out", "run")
    assert said.code == 0, said.err
    found = results_of(Path("run"))
    jobs = {job["name"]: job["status"] for job in found["jobs"]}
    assert all(status in ("done", "stopped") for status in jobs.values()), jobs
    assert sum(name.startswith("fusion-s") and "--search" in name for name in jobs) >= 2


def test_trials_search_what_uses_others_and_train_its_parts_as_written(work: Path, tanzaku: Tanzaku) -> None:
    recipe(work, *THREE, {"fusion": {}, "uses": ["a", "b"]})
    said = tanzaku("compare", "recipe.yaml", "--trials", 2, "--seeds", 1, "--out", "run")
    assert said.code == 0, said.err
    assert "since other candidates are made of them: a, b\n" in said.out + said.err
    found = results_of(Path("run"))
    assert [search["entry"] for search in found["search"]] == ["c", "fusion"]
    by_name = {c["name"]: c for c in found["candidates"]}
    assert by_name["a"]["origin"] == by_name["b"]["origin"] == "recipe" and by_name["b"]["method_settings"]["r"] == 2
    (fused,) = [c for c in found["candidates"] if c["method"] == "fusion"]
    assert fused["origin"] == "search" and fused["name"].startswith("fusion-s")
    # Directories are no candidates, which are then all searched.
    recipe(work, THREE[0], {"fusion": {}, "uses": ["run/adapters/a", "run/adapters/b"]})
    said = tanzaku("compare", "recipe.yaml", "--trials", 2, "--seeds", 1, "--out", "again")
    assert said.code == 0 and "as written" not in said.out + said.err, said.err
    assert [search["entry"] for search in results_of(Path("again"))["search"]] == ["a", "fusion"]


def test_it_goes_on_after_a_cut(work: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained before is used again, from its files."""
    recipe(work, *THREE[:2], {"fusion": {}, "uses": ["a", "b"]})
    whole = tanzaku("compare", "recipe.yaml", "--seeds", 2, "--out", "whole")
    assert whole.code == 0, whole.err
    run, cuts = Comparison._run, []

    def cut(self: Comparison, scheduler: Any, groups: Any) -> None:
        run(self, scheduler, groups)
        if not cuts:
            cuts.append(scheduler)
            raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "_run", cut)
    assert tanzaku("compare", "recipe.yaml", "--seeds", 2, "--out", "run").code == 130
    done = {path.stem for path in Path("run/state/jobs").iterdir()}
    assert done and not any(name.startswith("fusion") for name in done)
    said = tanzaku("compare", "--resume", "--out", "run")
    assert said.code == 0, said.err
    one, other = results_of(Path("whole")), results_of(Path("run"))
    for before, after in zip(one["candidates"], other["candidates"], strict=True):
        assert before["scores"]["loss"] == pytest.approx(after["scores"]["loss"], rel=1e-4)


def test_what_uses_a_candidate_that_failed_fails_with_it(work: Path, tanzaku: Tanzaku) -> None:
    failing = {"lora": {"r": 1}, "name": "b", "train": {"learning_rate": 1e30}}
    recipe(work, THREE[0], failing, {"fusion": {}, "uses": ["a", "b"]})
    said = tanzaku("compare", "recipe.yaml", "--seeds", 1, "--out", "run")
    assert said.code == 1
    found = {c["name"]: c for c in results_of(Path("run"))["candidates"]}
    assert found["a"]["status"] == "done" and found["b"]["status"] == found["fusion"]["status"] == "failed"
    assert "it uses 'b', of which there is no adapter in" in found["fusion"]["error"]


def test_train_uses_directories(work: Path, tanzaku: Tanzaku) -> None:
    recipe(work, *THREE[:2])
    assert tanzaku("compare", "recipe.yaml", "--seeds", 1, "--out", "run").code == 0
    recipe(work, {"average": {}, "uses": ["run/adapters/a", "run/adapters/b"]})
    said = tanzaku("train", "recipe.yaml", "--dry-run")
    assert said.code == 0, said.err
    said = tanzaku("train", "recipe.yaml", "--out", "made")
    assert said.code == 0, said.err
    assert names(Path("made/adapters/average/parts")) == ["a", "b"]
    config = json.loads(Path("made/adapters/average/adapter_config.json").read_text(encoding="utf-8"))
    assert config["adapters"] == ["a", "b"]
    flags = ("--method", "fusion", "--set", "uses={one: run/adapters/a, other: run/adapters/b}")
    said = tanzaku("train", "recipe.yaml", *flags, "--out", "fused")
    assert said.code == 0, said.err
    assert names(Path("fused/adapters/fusion/parts")) == ["one", "other"]


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([{"fusion": {}}], ["candidate 'fusion': fusion is made of other adapters", "uses: [a, b]"]),
        ([THREE[0], {"lora": {}, "uses": ["a"]}], ["lora is not made of other adapters; fusion, average, xlora are"]),
        ([*THREE, {"fusion": {}, "uses": ["a", "bb"]}], ["uses 'bb'", "no other candidate", "did you mean 'b'"]),
        ([*THREE, {"fusion": {}, "uses": "a"}], ["uses: found 'a'", "such as [a, b]"]),
        ([*THREE, {"fusion": {}, "uses": ["a"]}], ["the names of two or more"]),
        (
            [*THREE, FUSION, {"average": {}, "uses": ["a", "fusion"]}],
            ["candidate 'average' uses 'fusion', which is made of others itself"],
        ),
        (
            [*THREE, {"average": {"learned": False, "modules_to_save": []}, "uses": ["a", "b"]}],
            ["candidate 'average': nothing of it is trained"],
        ),
        ([*THREE, {"average": {}, "uses": {"a" * 65: "a", "b": "b"}}], ["64 at most"]),
        (
            [{"lora": {"r": {"grid": [1, 2]}}, "name": "a"}, THREE[1], {"fusion": {}, "uses": ["a", "b"]}],
            ["uses 'a', which stands for several candidates"],
        ),
        (
            [*THREE[:2], {"lora": {"target_modules": "all-linear"}, "name": "w"}, {"fusion": {}, "uses": ["a", "w"]}],
            ["candidate 'fusion'", "adapters at different places"],
        ),
        (
            [*THREE[:2], {"prompt_tuning": {}, "name": "p"}, {"average": {}, "uses": ["a", "p"]}],
            ["candidate 'average'", "'p', which adds tokens"],
        ),
    ],
)
def test_bad_input_is_told_before_training(
    work: Path, tanzaku: Tanzaku, methods: list[dict[str, Any]], says: list[str]
) -> None:
    recipe(work, *methods)
    assert_refused(tanzaku("compare", "recipe.yaml", "--out", "run"), *says)
    assert not Path("run").exists()
