"""Rows of several tasks: a column says of which, and methods with `num_tasks` read it, in training and predicting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_kit import ROWS, Tanzaku, assert_refused, write_tsv

import tanzaku as tz
from tanzaku.storage.store import read_meta

HYPER: dict[str, Any] = {"hyper": {"num_tasks": 2, "reduction_factor": 4, "embedding_dim": 4, "hidden_dim": 4}}
PROMPT: dict[str, Any] = {"multitask_prompt_tuning": {"num_tasks": 2, "num_virtual_tokens": 2}}


def recipe(work: Path, *methods: dict[str, Any], **data: Any) -> None:
    """Rows of two tasks, of which one has the other labels."""
    for name, before in (("train", ""), ("valid", "the "), ("test", "a ")):
        lines = ["text\tlabel\twhich"]
        for number, (text, label) in enumerate(ROWS):
            lines.append(f"{before}{text}\t{label}\t{'right' if number % 2 else 'left'}")
        (work / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    found |= {"methods": list(methods), "data": {**found["data"], **data}}
    (work / "recipe.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")


def test_trained_together_and_predicted_by_task(work: Path, tanzaku: Tanzaku) -> None:
    recipe(work, HYPER, PROMPT, {"lora": {"r": 1}}, task_id="which")
    said = tanzaku("compare", "recipe.yaml", "--seeds", 1, "--out", "run", "--finalists", 3)
    assert said.code == 0, said.err
    meta = read_meta(Path("run/adapters/hyper"))
    assert (meta["task_id"], meta["tasks"]) == ("which", ["left", "right"])
    said = tanzaku("predict", "run/adapters/hyper", "--data", "test.tsv", "--format", "jsonl")
    assert said.code == 0, said.err
    first = [json.loads(line)["probabilities"] for line in said.out.splitlines()]
    # Its vectors made to differ by far, a row's task decides: the other one's gives other numbers.
    folder = Path("run/adapters/hyper")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.tasks"][1] += 9
    tensors["base_model.up.weight"] += torch.randn(
        tensors["base_model.up.weight"].shape, generator=torch.manual_seed(0)
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = json.loads((folder / "tanzaku.json").read_text(encoding="utf-8"))
    (folder / "tanzaku.json").write_text(json.dumps({**about, "sha256": None}), encoding="utf-8")
    text = Path("test.tsv").read_text(encoding="utf-8")
    Path("turned.tsv").write_text(
        text.replace("\tleft", "\tL").replace("\tright", "\tleft").replace("\tL", "\tright"), encoding="utf-8"
    )
    found = []
    for file in ("test.tsv", "turned.tsv"):
        said = tanzaku("predict", "run/adapters/hyper", "--data", file, "--format", "jsonl")
        assert said.code == 0, said.err
        found.append([json.loads(line)["probabilities"] for line in said.out.splitlines()])
    assert len(first) == len(found[0]) and all(a != b for a, b in zip(*found, strict=True))


def test_who_does_not_read_it_is_not_asked_for_it(work: Path, tanzaku: Tanzaku) -> None:
    """Beside one that does, in either order, and alone on rows that have no such column."""
    recipe(work, HYPER, {"lora": {"r": 1}}, task_id="which")
    assert tanzaku("compare", "recipe.yaml", "--seeds", 1, "--out", "run").code == 0
    hyper, lora = "run/adapters/hyper", "run/adapters/lora"
    assert "task_id" not in read_meta(Path(lora))
    for paths in ((hyper, lora), (lora, hyper)):
        said = tanzaku("predict", *paths, "--data", "test.tsv")
        assert said.code == 0, said.err
    write_tsv(work / "bare.tsv", ROWS)
    assert tanzaku("predict", lora, "--data", "bare.tsv").code == 0
    assert_refused(tanzaku("predict", lora, hyper, "--data", "bare.tsv"), "no column 'which'")


def test_what_uses_one_that_reads_it_reads_it_too(work: Path, tanzaku: Tanzaku) -> None:
    parts = [{**HYPER, "name": "a"}, {"hyper": {**HYPER["hyper"], "hidden_dim": 6}, "name": "b"}]
    recipe(work, *parts, {"average": {}, "uses": ["a", "b"]}, task_id="which")
    said = tanzaku("compare", "recipe.yaml", "--seeds", 1, "--out", "run")
    assert said.code == 0, said.err
    assert read_meta(Path("run/adapters/average"))["task_id"] == "which"
    said = tanzaku("predict", "run/adapters/average", "--data", "test.tsv")
    assert said.code == 0, said.err


def test_a_run_of_it_alone_is_a_run_of_it_beside_others(work: Path, tanzaku: Tanzaku) -> None:
    recipe(work, HYPER, task_id="which")
    assert tanzaku("train", "recipe.yaml", "--out", "alone").code == 0
    assert tanzaku("train", "recipe.yaml", "--out", "none", "--method", "lora", "--task-id", "which").code == 0
    said = tanzaku("predict", "alone/adapters/hyper", "--data", "test.tsv")
    assert said.code == 0, said.err


@pytest.mark.parametrize("method", [HYPER, PROMPT])
def test_rows_must_say_their_task_before_anything_is_trained(
    work: Path, tanzaku: Tanzaku, method: dict[str, Any]
) -> None:
    recipe(work, method)
    assert_refused(tanzaku("train", "recipe.yaml"), "num_tasks is 2", "do not say which task", "--task-id")
    recipe(work, method, task_id="label")
    assert_refused(tanzaku("train", "recipe.yaml"), "both name the column 'label'")
    recipe(work, method, task_id="whihc")
    assert_refused(tanzaku("train", "recipe.yaml"), "no column 'whihc'", "--task-id")
    name = next(iter(method))
    recipe(work, {name: {**method[name], "num_tasks": 3}}, task_id="which")
    assert_refused(tanzaku("train", "recipe.yaml"), "num_tasks is 3", "has 2: left, right")


def test_a_task_that_no_training_row_has(work: Path, tanzaku: Tanzaku) -> None:
    recipe(work, HYPER, task_id="which")
    text = Path("valid.tsv").read_text(encoding="utf-8")
    Path("valid.tsv").write_text(text.replace("\tright", "\trihgt", 1), encoding="utf-8")
    assert_refused(tanzaku("train", "recipe.yaml"), "valid.tsv row 2", "'rihgt'", "did you mean 'right'")
    recipe(work, HYPER, task_id="which")
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    write_tsv(work / "bare.tsv", ROWS)
    assert_refused(tanzaku("predict", "run/adapters/hyper", "--data", "bare.tsv"), "no column 'which'")
    text = Path("test.tsv").read_text(encoding="utf-8")
    Path("test.tsv").write_text(text.replace("\tleft", "\tup", 1), encoding="utf-8")
    said = tanzaku("predict", "run/adapters/hyper", "--data", "test.tsv")
    assert_refused(said, "test.tsv row 1", "'up'", "no task of the training rows")


def test_in_python_it_is_told_at_the_first_pass() -> None:
    from models import batch, tiny

    model = tiny("llama")
    tz.attach(model, tz.Hyper(num_tasks=2, reduction_factor=8), "a")
    with pytest.raises(tz.TanzakuError, match="reads 'task_ids' of each row"), tz.route(model, ["a"] * 2):
        model(**batch(model, rows=2))


TOLD: dict[str, Any] = {"r": 2, "embedding_dim": 4, "hidden_dim": 4}


def test_descriptions_are_read_by_the_base_and_go_by_the_names_of_tasks(work: Path, tanzaku: Tanzaku) -> None:
    texts = {"right": "the warm spring", "left": "a cold winter"}
    method = {"text_to_lora": {**TOLD, "descriptions": texts}}
    recipe(work, method, {"text_to_lora": TOLD | {"num_tasks": 2}, "name": "drawn"}, task_id="which")
    said = tanzaku("compare", "recipe.yaml", "--seeds", 1, "--out", "run", "--finalists", 2)
    assert said.code == 0, said.err
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from close import assert_close
    from tanzaku.models.loading import load_classifier

    where = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))["model"]
    expected = tz.describe(
        load_classifier(where, 2), AutoTokenizer.from_pretrained(where), [texts["left"], texts["right"]]
    )
    kept = load_file("run/adapters/text_to_lora/adapter_model.safetensors")["base_model.descriptions"]
    assert_close(kept, expected)
    said = tanzaku("predict", "run/adapters/text_to_lora", "run/adapters/drawn", "--data", "test.tsv")
    assert said.code == 0, said.err


def test_descriptions_of_other_tasks(work: Path, tanzaku: Tanzaku) -> None:
    texts = {"rihgt": "the warm spring", "left": "a cold winter"}
    recipe(work, {"text_to_lora": {**TOLD, "descriptions": texts}}, task_id="which")
    assert_refused(tanzaku("train", "recipe.yaml"), "tell of tasks left, rihgt", "has left, right", "mean 'rihgt'")
