"""Multi-label classification on the command line: forms of labels, tuned thresholds, merging, HF PEFT's adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import Tanzaku, assert_refused, results_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tanzaku.storage.store import read_meta

KINDS = {"mild": {"warm", "spring"}, "wet": {"sea", "rain"}, "airy": {"wind"}}
TEXTS = ["warm rain", "cold wind", "warm sea", "winter", "spring wind of sea", "rain wind", "warm", "cold"]


def labels_of(text: str) -> list[str]:
    return [name for name, of in KINDS.items() if of & {*text.split()}]


@pytest.fixture
def rows(work: Path) -> Path:
    for split, before in (("train", ""), ("valid", "the "), ("test", "a ")):
        lines = [json.dumps({"text": before + text, "label": labels_of(text)}) for text in TEXTS]
        (work / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = (work / "recipe.yaml").read_text(encoding="utf-8").replace(".tsv", ".jsonl")
    (work / "recipe.yaml").write_text(f"task: multilabel\n{recipe}", encoding="utf-8")
    return work


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_every_form_of_labels_is_the_same_run(rows: Path, tanzaku: Tanzaku) -> None:
    forms = {"lists": (["recipe.yaml"], None), "texts": (["recipe.yaml", "--separator", "|"], "|")}
    forms["columns"] = (["recipe.yaml", *(word for name in KINDS for word in ("--label-columns", name))], "")
    found = {}
    for form, (command, separator) in forms.items():
        files = []
        for split, before in (("train", ""), ("valid", "the "), ("test", "a ")):
            path = rows / f"{split}.{'jsonl' if separator is None else 'tsv'}"
            if separator is not None:
                head = ["text", *(KINDS if form == "columns" else ["label"])]
                cells = [
                    [str(int(name in labels_of(text))) for name in KINDS] if form == "columns"
                    else [str(separator).join(labels_of(text))]
                    for text in TEXTS
                ]  # fmt: skip
                body = [[before + text, *own] for text, own in zip(TEXTS, cells, strict=True)]
                path.write_text("".join("\t".join(row) + "\n" for row in [head, *body]), encoding="utf-8")
            files += [f"--{split}", str(path)]
        said = tanzaku("train", *command, *files, "--out", form)
        assert said.code == 0, said.err
        job = results_of(rows / form)["jobs"][0]
        order = read_meta(rows / form / "adapters/lora")["labels"]
        found[form] = {name: job["by_class"][name]["rows"] for name in KINDS}
        assert sorted(order) == sorted(KINDS)
        assert "figures of the test rows, by class" in said.out
    assert found["lists"] == found["texts"] == found["columns"] == {"mild": 4, "wet": 4, "airy": 3}


def test_thresholds_are_tuned_on_validation_rows_and_kept(rows: Path, tanzaku: Tanzaku) -> None:
    """Not on the test rows: these may be anything. What is kept is what predict gives."""
    said = tanzaku("train", "recipe.yaml", "--thresholds", "tuned", "--out", "run")
    assert said.code == 0, said.err
    kept = read_meta(rows / "run/adapters/lora")["thresholds"]
    assert len(kept) == 3 and kept != [0.5] * 3
    lines = (rows / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (rows / "other.jsonl").write_text(
        "\n".join(json.dumps({"text": json.loads(line)["text"], "label": []}) for line in lines) + "\n"
    )
    assert tanzaku("train", "recipe.yaml", "--thresholds", "tuned", "--test", "other.jsonl", "--out", "two").code == 0
    assert read_meta(rows / "two/adapters/lora")["thresholds"] == pytest.approx(kept, abs=1e-5)
    assert tanzaku("predict", "run/adapters/lora", "--data", "test.jsonl", "--out", "out.jsonl").code == 0
    labels = read_meta(rows / "run/adapters/lora")["labels"]
    least = dict(zip(labels, kept, strict=True))
    job = results_of(rows / "run")["jobs"][0]
    for line, prediction in zip(lines_of("out.jsonl"), job["predictions"], strict=True):
        assert line["predicted"] == [name for name, p in line["probabilities"].items() if p >= least[name]]
        assert [labels[at] for at in prediction["predicted"]] == line["predicted"]
    assert job["by_class"]["mild"]["threshold"] == pytest.approx(least["mild"])
    said = tanzaku("merge", "run/adapters/lora", "--out", "merged")
    assert said.code == 0 and "from these probabilities on" in said.err
    assert json.loads((rows / "merged/config.json").read_text())["label_thresholds"] == pytest.approx(least)


def test_each_finalist_has_thresholds_of_its_own(rows: Path, tanzaku: Tanzaku) -> None:
    flags = ["--method", "lora", "--method", "ia3", "--workers", "1", "--thresholds", "tuned", "--out", "run"]
    assert_refused(tanzaku("compare", "recipe.yaml", *flags, "--folds", "2"), "thresholds: tuned", "folds")
    said = tanzaku("compare", "recipe.yaml", *flags, "--seeds", "2")
    assert said.code == 0, said.err
    results = results_of(rows / "run")
    kept = {name: read_meta(rows / f"run/adapters/{name}")["thresholds"] for name in ("lora", "ia3")}
    assert kept["lora"] != kept["ia3"]
    labels = results["data"]["task"]["labels"]
    for name, predictions in results["rows"]["predictions"].items():
        for each in predictions:
            chances = zip(each["probabilities"], kept[name], strict=True)
            assert each["predicted"] == [at for at, (p, least) in enumerate(chances) if p >= least]
        [own] = [each for each in results["candidates"] if each["name"] == name]
        assert [own["by_class"][label]["threshold"] for label in labels] == pytest.approx(kept[name])
    page = (rows / "run/report.html").read_text(encoding="utf-8")
    assert "By class" in page and "threshold</th>" in page
    said = tanzaku("predict", "run/adapters/lora", "run/adapters/ia3", "--data", "test.jsonl", "--out", "out.jsonl")
    assert said.code == 0, said.err
    for at, line in enumerate(lines_of("out.jsonl")):
        for name, answer in line["adapters"].items():
            expected = results["rows"]["predictions"][name][at]["predicted"]
            assert answer["predicted"] == [labels[each] for each in expected]


def test_tuning_needs_validation_rows(rows: Path, tanzaku: Tanzaku) -> None:
    recipe = (rows / "recipe.yaml").read_text(encoding="utf-8").replace("valid: valid.jsonl, ", "")
    (rows / "recipe.yaml").write_text(recipe, encoding="utf-8")
    flags = ["--thresholds", "tuned", "--out", "run"]
    assert_refused(tanzaku("train", "recipe.yaml", *flags), "thresholds: tuned", "give --valid")
    assert_refused(tanzaku("train", "recipe.yaml", "--thresholds", "most"), "--thresholds", "'most'", "tuned")
    assert_refused(tanzaku("train", "recipe.yaml", "--label-columns", "text", "--label-columns", "mild"), "both name")


def test_a_merged_model_is_plain_transformers(rows: Path, tanzaku: Tanzaku) -> None:
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    assert tanzaku("merge", "run/adapters/lora", "--out", "merged").code == 0
    assert tanzaku("predict", "run/adapters/lora", "--data", "test.jsonl", "--out", "out.jsonl").code == 0
    model = AutoModelForSequenceClassification.from_pretrained("merged")
    assert model.config.problem_type == "multi_label_classification"
    tokenizer = AutoTokenizer.from_pretrained("merged")
    for line in lines_of("out.jsonl"):
        with torch.no_grad():
            chances = model(**tokenizer(line["text"], return_tensors="pt")).logits.sigmoid()[0].tolist()
        names = [model.config.id2label[at] for at in range(3)]
        assert dict(zip(names, chances, strict=True)) == pytest.approx(line["probabilities"], abs=1e-5)


def test_an_adapter_of_hf_peft_is_read_by_its_bases_problem_type(rows: Path, tanzaku: Tanzaku, model_dir: Path) -> None:
    """It says SEQ_CLS alone; a base that says multi_label_classification is not read as one of classes."""
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    assert tanzaku("predict", "run/adapters/lora", "--data", "test.jsonl", "--out", "ours.jsonl").code == 0
    shutil.copytree(model_dir, "base")
    config = json.loads(Path("base/config.json").read_text())
    labels = read_meta(rows / "run/adapters/lora")["labels"]
    config |= {"problem_type": "multi_label_classification", "id2label": dict(enumerate(labels))}
    config["label2id"] = {name: at for at, name in enumerate(labels)}
    Path("base/config.json").write_text(json.dumps(config))
    (rows / "run/adapters/lora/tanzaku.json").unlink()
    said = tanzaku("predict", "run/adapters/lora", "--model", "base", "--data", "test.jsonl", "--out", "theirs.jsonl")
    assert said.code == 0, said.err
    for ours, theirs in zip(lines_of("ours.jsonl"), lines_of("theirs.jsonl"), strict=True):
        assert theirs["predicted"] == ours["predicted"]
        assert theirs["probabilities"] == pytest.approx(ours["probabilities"], abs=1e-5)
