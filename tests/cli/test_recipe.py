"""The recipe: its schema, its file, and flags over it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tanzaku.cli import compare, train
from tanzaku.cli.flags import fields, recipe_flags
from tanzaku.compare.candidates import expand
from tanzaku.core.space import ends
from tanzaku.errors import TanzakuError
from tanzaku.methods import METHODS
from tanzaku.recipe.comparison import CompareSettings
from tanzaku.recipe.schema import SECTIONS, MethodEntry, Recipe, build_recipe, jobs_of, load_recipe
from tanzaku.train.results import Job
from tanzaku.train.settings import TrainSettings

BASE = "model: some/model\ndata: {train: train.tsv}\n"


def recipe(folder: Path, text: str, flags: dict[str, Any] | None = None, base: str = BASE, **options: Any) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(base + text, encoding="utf-8")
    return build_recipe(file, flags or {}, **options)


def names(found: Recipe) -> list[str | None]:
    return [entry.name for entry in found.methods]


def test_defaults(tmp_path: Path) -> None:
    found = recipe(tmp_path, "")
    assert found.train == TrainSettings()
    assert (found.data.text, found.data.label, found.data.valid, found.methods) == ("text", "label", None, [])


def test_every_form_of_a_candidate(tmp_path: Path) -> None:
    found = recipe(
        tmp_path,
        "train: {learning_rate: 1e-4, epochs: 3}\n"
        "methods:\n"
        "  - lora\n"
        "  - lora: {r: 1}\n"
        "  - ia3:\n"
        "  - lora: {r: 4}\n"
        "    name: big\n"
        "    train: {learning_rate: 3e-4}\n",
    )
    jobs = jobs_of(found)
    assert [job.name for job in jobs] == ["lora", "lora-2", "ia3", "big"]
    assert [job.method.settings().get("r") for job in jobs] == [8, 1, None, 4]
    assert [job.settings.learning_rate for job in jobs] == [1e-4, 1e-4, 1e-4, 3e-4]
    assert {job.settings.epochs for job in jobs} == {3}


def test_a_dumped_recipe_can_be_run_again(tmp_path: Path) -> None:
    found = recipe(
        tmp_path,
        "compare: {trials: 4, memory: 8GB, folds: 3, rank_by: loss}\n"
        "methods: [lora, lora: {r: {grid: [1, 4]}}, {ia3: {}, name: third, train: {epochs: 1}}, "
        "{ia3: {}, train: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}}]",
    )
    again = recipe(tmp_path, yaml.safe_dump(found.model_dump(mode="json")), base="")
    assert again == found


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_numbers_as_people_write_them(tmp_path: Path, written: str) -> None:
    found = recipe(tmp_path, f"train: {{learning_rate: {written}}}\nmethods: [adalora: {{target_r: {written}}}]")
    assert found.train.learning_rate == 1e-4
    assert jobs_of(found)[0].method.settings()["target_r"] == 1e-4


def test_flags_override_the_file_and_nothing_else(tmp_path: Path) -> None:
    found = recipe(
        tmp_path,
        "train: {epochs: 3, batch_size: 4}\nmethods: [lora: {r: 2}]",
        {"model": "other", "data": {"text": "poem"}, "train": {"epochs": "5"}, "set": ["r=6", "use_rslora=true"]},
    )
    assert (found.model.name, found.data.text, found.train.epochs, found.train.batch_size) == ("other", "poem", 5, 4)
    assert found.methods[0].settings == {"r": 6, "use_rslora": True}


def test_the_compare_section(tmp_path: Path) -> None:
    assert recipe(tmp_path, "").compare == recipe(tmp_path, "compare:\n").compare == CompareSettings(rank_by="roc_auc")
    found = recipe(tmp_path, "compare: {folds: 4, trials: 8, memory: 8 GB}", {"compare": {"trials": "5", "keep": "2"}})
    assert found.compare == CompareSettings(folds=4, trials=5, keep=2, memory="8 GB", rank_by="roc_auc")


def test_spaces_in_a_recipe_and_in_set(tmp_path: Path) -> None:
    found = recipe(
        tmp_path,
        "methods:\n  - lora: {lora_alpha: {choice: [8, 16]}}\n"
        "    train: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}\n  - ia3\n",
        {"set": ["lora.r={grid: [1, 4]}", "lora.lora_dropout={low: 0, high: 1e-1}"]},
    )
    candidates, (search,) = expand(found.methods, found.train, found.compare)
    assert [candidate.name for candidate in candidates] == ["ia3"]
    assert {key: space.written() for key, space in search.space.items()} == {
        "lora_alpha": {"choice": [8, 16]},
        "r": {"choice": [1, 4]},
        "lora_dropout": {"low": 0, "high": 0.1},
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    }


def test_flags_alone_are_a_recipe() -> None:
    found = build_recipe(None, {"model": "m", "data": {"train": "imdb:train"}, "methods": ["lora", "ia3"]})
    assert (found.data.train, names(found)) == ("imdb:train", ["lora", "ia3"])


def test_a_method_flag_picks_from_the_recipe(tmp_path: Path) -> None:
    text = "methods: [lora: {r: 1}, {lora: {r: 4}, name: big}, {ia3: {}, name: x}, {ia3: {}, name: y}]"
    assert names(recipe(tmp_path, text, {"methods": ["big"]})) == ["big"]
    assert names(recipe(tmp_path, text, {"methods": ["ia3", "head"]})) == ["x", "y", "head"]
    picked = recipe(tmp_path, text, {"methods": ["lora"], "set": ["lora.lora_alpha=2"]})
    assert picked.methods[0].settings == {"r": 1, "lora_alpha": 2}


def test_defaults_only_where_nothing_is_named(tmp_path: Path) -> None:
    assert names(recipe(tmp_path, "", default_methods=["lora", "head"])) == ["lora", "head"]
    assert names(recipe(tmp_path, "methods: [ia3]", default_methods=["lora"])) == ["ia3"]


def test_paths_are_taken_from_the_recipe_and_other_names_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "rows").mkdir()
    file = folder / "recipe.yaml"
    file.write_text("model: ./base\ndata: {train: train.tsv, valid: rows, test: 'imdb:test'}\n", encoding="utf-8")
    raw = load_recipe(file)
    assert raw["data"] == {"train": str(folder / "train.tsv"), "valid": str(folder / "rows"), "test": "imdb:test"}
    assert raw["model"] == {"name": str(folder / "base")}
    assert build_recipe(file, {"data": {"train": "here.tsv"}}).data.train == "here.tsv"
    assert os.path.relpath(raw["data"]["train"], folder) == "train.tsv"


@pytest.mark.parametrize("name", ["imdb", "user/rows", "-", "https://example.com/a.csv", "s3://b/x.parquet"])
def test_what_is_no_path_is_left_alone(tmp_path: Path, name: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {{train: '{name}'}}\n", encoding="utf-8")
    assert load_recipe(file)["data"] == {"train": name}


# What is refused: (text of the recipe after model and data, what the one line must say).
REFUSED = [
    ("trian: {epochs: 1}", ["recipe.yaml", "'trian'", "did you mean 'train'"]),
    ("train: {learning_rat: 1}", ["recipe.yaml", "train has no key 'learning_rat'", "did you mean 'learning_rate'"]),
    ("train: {epochs: 0}", ["train.epochs is 0", "greater than or equal to 1"]),
    ("train: {epochs: many}", ["train.epochs is 'many'", "a valid integer"]),
    ("train: {schedule: linaer}", ["train.schedule", "'linaer'", "did you mean 'linear'"]),
    ("train: 4", ["train is 4", "a mapping"]),
    ("train: {epochs: 1, epochs: 2}", ["line 3", "'epochs' is there twice"]),
    ("train: {epochs: 1\nmethods: [", ["line 4", "expected YAML"]),
    ("methods: lora", ["methods is 'lora'", "a list"]),
    ("methods: [1]", ["methods item 1", "found 1"]),
    ("methods: [lora, lora: 8]", ["methods item 2", "found 8 as settings of lora", "{r: 8}"]),
    ("methods: [{lora: {}, ia3: {}}]", ["methods item 1", "lora, ia3", "one method"]),
    ("methods: [{lora: {}, train: {epoch: 1}}]", ["methods item 1", "'epoch'", "did you mean 'epochs'"]),
    ("methods: [{lora: {}, train: {max_length: 1}}]", ["methods item 1", "max_length"]),
    ("methods: [{lora: {}, train: {epochs: 0}}]", ["candidate 'lora'", "epochs is 0"]),
    ("methods: [{lora: {}, name: a b}]", ["name is 'a b'", "letters"]),
    ("methods: [{lora: {}, name: a}, {ia3: {}, name: a}]", ["two candidates are named 'a'"]),
    ("methods: [lorra]", ["unknown method 'lorra'", "did you mean 'lora'"]),
    ("methods: [lora: {lora_alfa: 1}]", ["no setting 'lora_alfa'", "did you mean 'lora_alpha'"]),
    ("methods: [lora: {r: four}]", ["candidate 'lora'", "r is 'four'", "a valid integer"]),
    ("methods: [lora: {r: {grid: [1, 4]}}]", ["'lora': r has a grid, and train takes one setting", "tanzaku compare"]),
    ("methods: [lora: {r: {choice: [1, 4]}}]", ["r has a choice", "tanzaku compare"]),
    ("methods: [{lora: {}, train: {epochs: {low: 1, high: 4}}}]", ["epochs has a range", "tanzaku compare"]),
    ("methods: [lora: {r: {low: 1, hi: 4}}]", ["'lora': r: found the key 'hi'", "did you mean 'high'"]),
    ("methods: [{lora: {}, train: {epoch: {low: 1, high: 4}}}]", ["'epoch'", "did you mean 'epochs'"]),
    ("train: {epochs: {low: 1, high: 4}}", ["train.epochs is {'low'", "a range stands in a candidate's own train"]),
    ("compare: {fold: 3}", ["recipe.yaml", "compare has no key 'fold'", "did you mean 'folds'"]),
    ("compare: {folds: 1}", ["compare.folds is 1", "greater than or equal to 2"]),
    ("compare: {memory: 8}", ["compare.memory: found '8'", "such as 8GB"]),
    ("compare: {rank_by: auc}", ["compare.rank_by is 'auc'", "roc_auc"]),
    ("compare: [1]", ["compare is [1]", "a mapping"]),
    ("device: gpu", ["device is 'gpu'", "'cuda'"]),
    ("task: regresion", ["task is 'regresion'", "'classification'", "did you mean 'regression'"]),
]


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=[text for text, _ in REFUSED])
def test_refused(tmp_path: Path, text: str, says: list[str]) -> None:
    with pytest.raises(TanzakuError) as caught:
        jobs_of(recipe(tmp_path, text))
    for part in says:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# Whole files that are no recipe.
FILES = [
    (b"", ["is empty"]),
    (b"# nothing\n", ["is empty"]),
    (b"- lora\n", ["is a list", "model"]),
    (b"text\tlabel\nrain\t1\n", ["recipe.yaml"]),
    (b"model: \xff\n", ["line 1", "not UTF-8"]),
    (b"model: !!python/object:os.system x\n", ["line 1", "YAML"]),
    (b"model: \x00\n", ["recipe.yaml", "YAML"]),
    (b"data: {train: a.tsv}\n", ["model is missing", "--model"]),
    (b"model: m\n", ["data.train is missing", "--train"]),
    (b"model: {a: 1}\ndata: {train: a.tsv}\n", ["model has no key 'a'", "it has name, dtype, attention"]),
    (b"model: ''\ndata: {train: a.tsv}\n", ["model is ''"]),
    (b"model: m\ndata: [a.tsv]\n", ["data is ['a.tsv']", "a mapping"]),
    (b"[" * 5000, ["recipe.yaml"]),
    (b"1: 2\n", ["recipe.yaml has the key 1; expected names such as model"]),
]


def test_a_table_in_the_place_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,0\n", encoding="utf-8")
    with pytest.raises(TanzakuError, match=r"train.csv is a table; expected a recipe, .* give rows with --train "):
        build_recipe(tmp_path / "train.csv", {})


@pytest.mark.parametrize(("content", "says"), FILES)
def test_no_recipe(tmp_path: Path, content: bytes, says: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(TanzakuError) as caught:
        build_recipe(tmp_path / "recipe.yaml", {})
    for part in says:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    recipe(tmp_path, "")
    with pytest.raises(TanzakuError, match=r"no recipe .*recipe.yml \(did you mean 'recipe.yaml'\?\)"):
        build_recipe(tmp_path / "recipe.yml", {})
    with pytest.raises(TanzakuError, match="is a directory"):
        build_recipe(tmp_path, {})


SETS = [
    ("r", "r=1"),
    ("=1", "r=1"),
    ("r=1", "2 candidates; say whose it is, as in lora.r=1"),
    ("lor.r=1", "did you mean 'lora'"),
    ("lora.r=[1", "expected YAML"),
]


@pytest.mark.parametrize(("assignment", "says"), SETS)
def test_a_set_that_cannot_be_read(tmp_path: Path, assignment: str, says: str) -> None:
    with pytest.raises(TanzakuError, match="--set") as caught:
        recipe(tmp_path, "methods: [lora, ia3]", {"set": [assignment]})
    assert says in str(caught.value)


def test_a_bad_flag_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(TanzakuError) as caught:
        recipe(tmp_path, "train: {epochs: 3}", {"train": {"batch_size": "x"}})
    assert str(caught.value).startswith("--batch-size is 'x', expected")
    for field, value, says in [("memory", "8", "--memory: found '8'"), ("rank_by", "f1", "--rank-by is 'f1'")]:
        with pytest.raises(TanzakuError) as caught:
            recipe(tmp_path, "compare: {folds: 3}", {"compare": {field: value}})
        assert str(caught.value).startswith(says)


def test_every_key_has_a_flag_and_reaches_the_schema() -> None:
    seen: list[dict[str, Any]] = []
    command = recipe_flags(lambda file, flags, overwrite: seen.append(flags))
    given = dict.fromkeys(command.__signature__.parameters)  # type: ignore[attr-defined]
    assert set(TrainSettings.model_fields) <= set(given)
    assert {"model", "task", "train", "valid", "test", "text", "text_pair", "label", "out", "device"} <= set(given)
    assert {"method", "set", "recipe", "overwrite"} <= set(given)
    command(**{name: f"<{name}>" for name in given})
    assert seen[0]["train"] == {name: f"<{name}>" for name in TrainSettings.model_fields}
    assert seen[0]["data"]["train"] == "<train>"
    assert len(given) == len(fields()) + 6


def test_a_verb_has_the_sections_and_the_switches_it_asks_for() -> None:
    seen: list[Any] = []
    command = recipe_flags(
        lambda file, flags, overwrite, resume: seen.append((flags, overwrite, resume)),
        sections=SECTIONS,
        switches={"resume": "go on"},
    )
    given = dict.fromkeys(command.__signature__.parameters)  # type: ignore[attr-defined]
    assert set(CompareSettings.model_fields) <= set(given) and len(given) == len(fields(SECTIONS)) + 7
    command(**given | {"folds": "3", "memory": "8GB", "epochs": "2", "resume": True, "overwrite": False})
    flags = {"methods": [], "set": [], "train": {"epochs": "2"}, "compare": {"folds": "3", "memory": "8GB"}}
    assert seen == [(flags, False, True)]


def test_no_two_keys_are_one_flag() -> None:
    names = [name for _, name, _ in fields(SECTIONS)]
    assert len(names) == len({*names, "method", "set", "recipe", "overwrite", "resume"}) - 5


def test_flags_of_a_comparison_are_those_of_compare_alone() -> None:
    shown = {verb: set(verb.__signature__.parameters) for verb in (train.train, compare.compare)}
    assert set(CompareSettings.model_fields) <= shown[compare.compare] - shown[train.train]
    assert not shown[train.train] - shown[compare.compare]


def test_a_recipe_brings_in_nothing_heavy() -> None:
    heavy = ("torch", "optuna", "numpy", "sqlalchemy", "tanzaku.methods")
    found = f"','.join(m for m in {heavy} if m in sys.modules)"
    code = f"import sys, tanzaku.recipe.schema, tanzaku.cli; sys.exit({found} or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_candidates_can_be_built_in_python() -> None:
    entries = [MethodEntry.model_validate("lora"), MethodEntry.model_validate({"lora": {"r": 1}})]
    made = Recipe(model="m", data={"train": "t.tsv"}, methods=entries)
    assert [job.name for job in jobs_of(made)] == ["lora", "lora-2"]


def test_each_method_has_a_learning_rate_of_its_own() -> None:
    """One for all compares learning rates; the recipe's, and a candidate's, go before it."""
    entries = [
        MethodEntry.model_validate({name: {}, "uses": ["lora", "ia3"]} if method.uses_others else name)
        for name, method in METHODS.items()
    ]
    candidates, _ = expand(entries, TrainSettings(), CompareSettings())
    rates = {c.name: c.settings.learning_rate for c in candidates}
    assert rates == {name: method.learning_rate for name, method in METHODS.items()}
    assert rates["full"] < rates["lora"] < rates["ia3"] and {c.rate for c in candidates} == {"default"}
    entries[0] = MethodEntry.model_validate({"lora": {}, "train": {"learning_rate": 0.5}})
    told, _ = expand(entries[:2], TrainSettings(learning_rate=0.25), CompareSettings())
    assert [(c.settings.learning_rate, c.rate) for c in told] == [(0.5, "own"), (0.25, "shared")]
    assert Job("a", METHODS["ia3"](), TrainSettings()).settings.learning_rate == METHODS["ia3"].learning_rate
    spaces = {name: method.open_space({}) for name, method in METHODS.items()}
    for name, space in spaces.items():
        low, high = ends(space["learning_rate"])[0], ends(space["learning_rate"])[-1]
        assert low <= rates[name] <= high, "a search would not find it"


@pytest.mark.parametrize(
    ("allow", "says"),
    [
        ("[duplicate]", ["data.allow item 1 is 'duplicate'", "'duplicates-across-splits'"]),
        ("duplicates-across-splits", ["data.allow is 'duplicates-across-splits'", "a list"]),
        ("[label-spelings]", ["did you mean 'label-spellings'"]),
    ],
)
def test_checks_are_allowed_by_name(tmp_path: Path, allow: str, says: list[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: some/model\ndata: {{train: train.tsv, allow: {allow}}}\n", encoding="utf-8")
    with pytest.raises(TanzakuError) as caught:
        build_recipe(file, {})
    for part in says:
        assert part in str(caught.value)
