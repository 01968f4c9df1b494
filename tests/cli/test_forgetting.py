"""What the base forgets: the perplexity of a text that nothing is trained on, of the base and of each candidate."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import Tanzaku, assert_refused, results_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import tanzaku as tz
from tanzaku.support.numbers import written

HELD = "the sea of the cold wind a warm rain of spring the winter sea the rain of a cold spring"


@pytest.fixture
def recipe(recipe_of_texts: Path) -> Path:
    """A recipe of the task generation in a folder below the current directory, beside its rows and `held.txt`."""
    (recipe_of_texts.parent / "held.txt").write_text(HELD, encoding="utf-8")
    return recipe_of_texts


def by_hand(model: Any, tokenizer: Any, text: str, size: int) -> float:
    """Windows of the text, each token but a window's first foretold from those before it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses: list[float] = []
    for at in range(0, len(ids), size):
        window = torch.tensor([ids[at : at + size]])
        with torch.no_grad():
            logits = model(window).logits
        losses += cross_entropy(logits[0, :-1], window[0, 1:], reduction="none").tolist()
    return math.exp(sum(losses) / len(losses))


def test_it_is_measured_of_the_base_and_of_the_adapter(recipe: Path, tanzaku: Tanzaku, model_dir: Path) -> None:
    with recipe.open("a", encoding="utf-8") as file:
        file.write("forgetting: held.txt\n")
    said = tanzaku("train", recipe, "--set", "r=4", "--out", "run")
    assert said.code == 0, said.err
    results = results_of(Path("run"))
    [job] = results["jobs"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir).eval(), AutoTokenizer.from_pretrained(model_dir)
    base = by_hand(model, tokenizer, HELD, 8)
    assert results["forgetting"] == {"text": "held.txt", "tokens": 17, "base": pytest.approx(base, rel=1e-5)}
    tz.load(model, "run/adapters/lora", name="mine")
    tz.activate(model, "mine")
    own = by_hand(model, tokenizer, HELD, 8)
    assert job["held_perplexity"] == pytest.approx(own, rel=1e-4) and abs(own - base) > 1e-3
    assert f"perplexity on held text: base {written(base, 2)}, lora {written(own, 2)}" in said.out
    card = Path("run/adapters/lora/README.md").read_text(encoding="utf-8")
    assert f"held.txt, 17 tokens, which nothing was trained on): base {written(base, 2)}, with this adapter" in card


@pytest.mark.parametrize("design", [["--folds", "3", "--finalists", "1"], ["--seeds", "2"]])
def test_a_comparison_measures_each_candidate_once_and_ranks_as_it_would(
    recipe: Path, tanzaku: Tanzaku, design: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tanzaku.train import scheduler

    measured: list[float] = []
    perplexity = scheduler.perplexity
    monkeypatch.setattr(scheduler, "perplexity", lambda records: measured.append(0) or perplexity(records))
    flags = ["--method", "lora", "--method", "prompt_tuning", "--sample", "2", "--workers", "1", *design]
    said = tanzaku("compare", recipe, *flags, "--out", "run")
    assert said.code == 0, said.err
    results = results_of(Path("run"))
    kept = results["forgetting"]
    assert kept["text"] == "bundled" and kept["base"] > 1
    found = {each["name"]: each["held_perplexity"] for each in results["candidates"]}
    assert all(value > 1 for value in found.values())
    assert len(measured) == len(found) + ("--folds" in design)  # the finalist's adapter was trained anew
    [line] = [line for line in said.out.splitlines() if line.startswith("perplexity on held text: base ")]
    assert all(f"{name} {written(value, 2)}" in line for name, value in found.items())
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "perplexity on held text" in page and f"a perplexity of {written(kept['base'], 2)} on the held text" in page
    measured.clear()
    said = tanzaku("compare", recipe, *flags, "--forgetting", "none", "--out", "plain")
    assert said.code == 0, said.err
    plain = results_of(Path("plain"))
    assert not measured and plain["forgetting"] is None and "held text" not in said.out
    assert [(each["name"], each["mean"]) for each in plain["candidates"]] == [
        (each["name"], pytest.approx(each["mean"])) for each in results["candidates"]
    ]
    assert (
        "held text" not in Path("plain/report.html").read_text(encoding="utf-8").split("<main>")[1].split("<script")[0]
    )


def test_a_held_text_that_changed_is_noticed_by_resume(
    recipe: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tanzaku.cli.display import Display

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "epoch_done", stop)
        assert tanzaku("train", recipe, "--forgetting", "job/held.txt", "--out", "run").code == 130
    (recipe.parent / "held.txt").write_text(HELD + " sea", encoding="utf-8")
    assert_refused(tanzaku("train", "--resume", "--out", "run"), "the held text has changed", "--overwrite")
    (recipe.parent / "held.txt").write_text(HELD, encoding="utf-8")
    said = tanzaku("train", "--resume", "--out", "run")
    assert said.code == 0 and "perplexity on held text" in said.out, said.err


def test_texts_that_cannot_be_used(recipe: Path, tanzaku: Tanzaku) -> None:
    Path("empty.txt").write_text("\n", encoding="utf-8")
    Path("other.txt").write_bytes("春の海".encode("cp932"))
    for name, says in {"no.txt": "there is no", "empty.txt": "has no text", "other.txt": "is no UTF-8"}.items():
        said = tanzaku("train", recipe, "--forgetting", name, "--out", "run")
        assert_refused(said, "forgetting: ", name, says, "expected a text file in UTF-8, bundled or none")
    said = tanzaku("train", "recipe.yaml", "--forgetting", "job/held.txt", "--out", "run")
    assert_refused(said, "task classification has no perplexity of a text", "generation")


@pytest.mark.parametrize(("value", "kept"), [("true", "bundled"), ("false", "none"), ("held.txt", "held.txt")])
def test_what_a_recipe_may_say(recipe: Path, value: str, kept: str) -> None:
    from tanzaku.recipe.schema import build_recipe

    with recipe.open("a", encoding="utf-8") as file:
        file.write(f"forgetting: {value}\n")
    assert Path(build_recipe(recipe, {}).forgetting).name == kept


def test_the_bundled_text_is_in_two_languages() -> None:
    folder = files("tanzaku") / "data" / "held"
    english, japanese = ((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("english", "japanese"))
    assert english.isascii() and 1500 < len(english) < 4000
    assert not any(letter.isascii() and letter.isalpha() for letter in japanese) and 500 < len(japanese) < 1500
    assert "CC0-1.0" in (folder / "LICENSE").read_text(encoding="utf-8")
