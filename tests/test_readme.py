"""What the READMEs show is run: the Python block on a tiny model, and the recipe as it lies in examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tanzaku as tz
from models import batch, tiny
from tanzaku.compare.candidates import expand
from tanzaku.methods import METHODS
from tanzaku.recipe.schema import build_recipe

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.ja.md"]


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("readme", READMES)
def test_the_python_block_runs(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports, code = blocks(readme, "python")
    exec(imports, {})
    model = tiny("llama", num_labels=2)

    class AutoModelForSequenceClassification:
        @staticmethod
        def from_pretrained(name: str, **settings: Any) -> Any:
            assert (name, settings) == ("llm-jp/llm-jp-3-1.8b", {"num_labels": 2})
            return model

    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.chdir(tmp_path)
    code = code.replace("from transformers import AutoModelForSequenceClassification\n", "")
    names = {
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "batch_of_three": batch(model, rows=3),
    }
    exec(code, names)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert tz.adapters(model) == [] and (tmp_path / "out/lora/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("readme", READMES)
def test_the_recipes(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compares grids and a search, and names candidates that can be trained; one is the example; and methods that
    are made of others go into any."""
    comparison, shown, composed = blocks(readme, "yaml")
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/poems/adapters/lora", "my-adapter"):
        (tmp_path / folder).mkdir(parents=True)
    made = "model: embedded\ndata: {train: train.tsv}\n" + composed
    (tmp_path / "composed.yaml").write_text(made, encoding="utf-8")
    recipe = build_recipe(tmp_path / "composed.yaml", {})
    candidates, _ = expand(recipe.methods, recipe.train, recipe.compare)
    assert [[*c.uses] for c in candidates] == [[], [], ["lora", "miss"], ["one", "other"]]
    (tmp_path / "recipe.yaml").write_text(comparison, encoding="utf-8")
    recipe = build_recipe(tmp_path / "recipe.yaml", {})
    candidates, searched = expand(recipe.methods, recipe.train, recipe.compare)
    assert [c.name for c in candidates] == ["ia3", "lora-r1", "lora-r4", "lora-r16"]
    assert [(s.name, s.trials) for s in searched] == [("prompt_tuning", 16)]
    assert recipe.compare.design(valid_rows=True).runs == 10
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "examples/book.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("readme", READMES)
def test_every_method_is_named(readme: str) -> None:
    """In the table, with its paper, or below it."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| [^|]+ \| (.*)\|$", text, flags=re.MULTILINE)
    expected = []
    for name, kind in METHODS.items():
        number = kind.paper.removeprefix("arXiv ")
        expected.append((name, kind.__name__, "" if number == "-" else f"[{number}](https://arxiv.org/abs/{number}) "))
    assert set(rows) <= set(expected)
    below = {
        name for line in re.findall(r"^(?:- |  ).*`.*$", text, flags=re.MULTILINE) for name in line.split("`")[1::2]
    }
    assert METHODS.keys() == {name for name, *_ in rows} | (below & METHODS.keys())
