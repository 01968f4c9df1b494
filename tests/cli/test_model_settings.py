"""The base model of a run: a name, or a block that says how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_kit import Tanzaku, results_of


def test_a_block_says_how_the_model_is_loaded(work: Path, tanzaku: Tanzaku) -> None:
    """It is kept in results.json, beside the adapter, and heeded by predict; a name alone stays a name."""
    base = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    block = {"name": base["model"], "dtype": "bfloat16", "attention": "eager"}
    (work / "block.yaml").write_text(json.dumps({**base, "model": block}), encoding="utf-8")
    assert tanzaku("train", "block.yaml", "--out", "by-block").code == 0
    flags = ("--dtype", "bfloat16", "--attention", "eager")
    assert tanzaku("train", "recipe.yaml", *flags, "--out", "by-flags").code == 0
    assert tanzaku("train", "recipe.yaml", "--out", "plain").code == 0
    one, two, plain = (results_of(work / name) for name in ("by-block", "by-flags", "plain"))
    assert one["recipe"]["model"] == two["recipe"]["model"] == block and plain["recipe"]["model"] == base["model"]
    assert one["jobs"][0]["predictions"] == two["jobs"][0]["predictions"] != plain["jobs"][0]["predictions"]
    adapter = next((work / "by-block" / "adapters").iterdir())
    meta = json.loads((adapter / "tanzaku.json").read_text(encoding="utf-8"))["meta"]
    assert meta["loading"] == {"dtype": "bfloat16", "attention": "eager"} and isinstance(meta["model"], str)
    said = tanzaku("predict", "--adapters", str(adapter), "--data", base["data"]["valid"], "--json")
    assert said.code == 0, said.err
    other = next((work / "plain" / "adapters").iterdir())
    said = tanzaku("predict", str(adapter), str(other), "--data", base["data"]["valid"])
    assert said.code == 2 and "adapters whose base was loaded differently" in said.err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": ""}, "model is '', expected a name"),
        ({}, "model is missing"),
        ({"name": "embedded", "dtyp": "auto"}, "model has no key 'dtyp' (did you mean 'dtype'?)"),
        ({"name": "embedded", "dtype": "bf16"}, "model.dtype is 'bf16', expected"),
        (3, "model is 3, expected"),
    ],
)
def test_a_block_that_is_wrong(work: Path, tanzaku: Tanzaku, model: Any, message: str) -> None:
    base = yaml.safe_load((work / "recipe.yaml").read_text(encoding="utf-8"))
    (work / "block.yaml").write_text(json.dumps({**base, "model": model}), encoding="utf-8")
    said = tanzaku("train", "block.yaml")
    assert said.code == 2 and message in said.err


def test_attention_that_is_not_installed(work: Path, tanzaku: Tanzaku) -> None:
    said = tanzaku("train", "recipe.yaml", "--attention", "flash_attention_2", "--out", "run")
    assert said.code == 2 and len(said.err.strip().splitlines()) == 1 and "lash" in said.err
