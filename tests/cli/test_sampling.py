"""How `tanzaku predict` writes text: flags of sampling, and where it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Tanzaku, assert_refused

from tanzaku.models import loading
from tanzaku.tasks import inference

TEXTS = ["the warm rain", "a cold wind of winter", "", "sea of rain", "warm sea", "the cold spring", "winter"]
ARGS = ["predict", "run/adapters/lora", "--data", "new.jsonl"]


@pytest.fixture(autouse=True)
def written(work: Path, tanzaku: Tanzaku) -> None:
    """An adapter in run/adapters/lora, trained for a moment, and rows in new.jsonl."""
    rows = [{"prompt": text, "completion": " the sea"} for text in TEXTS if text]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    new = "".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS)
    Path("new.jsonl").write_text(new, encoding="utf-8")
    recipe = Path("recipe.yaml").read_text(encoding="utf-8").split("data:")[0]
    recipe += "task: generation\ndata: {train: train.jsonl, max_new_tokens: 6}\n"
    recipe += "train: {epochs: 1, max_length: 8}\nmethods: [lora]\n"
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0


def texts(tanzaku: Tanzaku, *options: str) -> list[str | None]:
    said = tanzaku(*ARGS, "--json", *options)
    assert said.code == 0, said.err
    return [json.loads(line)["predicted"] for line in said.out.splitlines()]


def test_draws_are_of_seed_and_row_alone(tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows are computed together, and however many of them have no text."""
    drawn = ("--temperature", "1.5")
    found = texts(tanzaku, *drawn)
    assert found[2] is None and len({*found}) > 3
    assert found != texts(tanzaku) and found != texts(tanzaku, *drawn, "--seed", "1")
    monkeypatch.setattr(inference, "WINDOW", 2)
    assert found == texts(tanzaku, *drawn, "--batch-size", "2")
    assert texts(tanzaku) == texts(tanzaku, *drawn, "--top-k", "1") == texts(tanzaku, *drawn, "--top-p", "1e-9")


def test_text_ends_before_a_stop_string(tanzaku: Tanzaku) -> None:
    drawn = ("--temperature", "2", "--max-new-tokens", "12")
    whole = texts(tanzaku, *drawn)
    first, second = "warm", "of"
    expected = [text and min((text.partition(stop)[0] for stop in (first, second)), key=len).strip() for text in whole]
    assert expected != whole
    assert texts(tanzaku, *drawn, "--stop", first, "--stop", second) == expected


WRONG = {
    "cold": (["--temperature", "-1"], ["--temperature is '-1'", "greater than or equal to 0"]),
    "no number": (["--temperature", "warm"], ["--temperature is 'warm'", "a valid number"]),
    "of draws": (["--top-k", "5"], ["--temperature", "top_k and top_p are of draws", "such as 1"]),
    "none": (["--temperature", "1", "--top-k", "0"], ["--top-k is '0'"]),
    "share": (["--temperature", "1", "--top-p", "1.5"], ["--top-p is '1.5'", "less than or equal to 1"]),
    "seed": (["--seed", "x"], ["--seed is 'x'", "a valid integer"]),
    "stop": (["--stop", ""], ["--stop", "found an empty text"]),
    "tokens": (["--max-new-tokens", "0"], ["--max-new-tokens is '0'", "greater than or equal to 1"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_told_before_the_model_loads(
    case: str, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_for", load)
    options, says = WRONG[case]
    assert_refused(tanzaku(*ARGS, *options), *says)


def test_a_file_goes_on_with_the_same_draws_alone(tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*ARGS, "--temperature", "1.5", "--batch-size", "2"]
    monkeypatch.setattr(inference, "WINDOW", 2)
    assert tanzaku(*args, "--out", "whole.jsonl").code == 0
    compute, calls = inference._records, list[Any]()

    def stop(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(*given)

    with monkeypatch.context() as patch:
        patch.setattr(inference, "_records", stop)
        assert tanzaku(*args, "--out", "x.jsonl").code == 130
    for other in (["--seed", "1"], ["--top-k", "3"], ["--stop", "sea"]):
        said = tanzaku(*args, *other, "--out", "x.jsonl", "--resume")
        assert_refused(said, "begun with another set of flags", "same command")
    assert tanzaku(*args, "--out", "x.jsonl", "--resume").code == 0
    assert Path("x.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_what_an_adapter_keeps(tanzaku: Tanzaku) -> None:
    """Nothing of sampling; what somebody writes into the file is read, and a flag overrules it."""
    path = Path("run/adapters/lora/tanzaku.json")
    about = json.loads(path.read_text(encoding="utf-8"))
    assert "sampling" not in about["meta"] and about["meta"]["max_new_tokens"] == 6
    greedy, drawn = texts(tanzaku), texts(tanzaku, "--temperature", "1.5", "--seed", "3")
    about["meta"]["sampling"] = {"temperature": 1.5, "seed": 3}
    path.write_text(json.dumps(about), encoding="utf-8")
    assert texts(tanzaku) == drawn and texts(tanzaku, "--temperature", "0") == greedy
    about["meta"]["sampling"] = {"temperature": "warm"}
    path.write_text(json.dumps(about), encoding="utf-8")
    assert_refused(tanzaku(*ARGS), "meta.sampling.temperature is 'warm'", "a valid number")
