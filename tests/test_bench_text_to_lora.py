"""The benchmark of written LoRA: its questions, that it goes on where it was cut off, and what it says in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import described, text_to_lora
from bench.described import Question
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tanzaku as tz
from models import tiny

WORDS = ["<pad>", "<unk>", *"abcdefghijklmnopqrst"]


def questions(*names: str) -> list[Question]:
    draws = {name: WORDS[2 + at : 8 + at] for at, name in enumerate(names)}
    return [Question(name, "made up", f"{name} {' '.join(yes[:2])}", yes, WORDS[12:18]) for name, yes in draws.items()]


def reader() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(text_to_lora, "LORA", {"r": 2})
    monkeypatch.setattr(text_to_lora, "SEEDS", (0, 1))
    monkeypatch.setattr(text_to_lora, "wordnet", lambda number, rows: questions("a", "b", "c"))
    monkeypatch.setattr(text_to_lora, "others", lambda rows: questions("d", "e"))
    model = tiny("llama", num_labels=2)
    monkeypatch.setattr(text_to_lora, "minilm", lambda folder: (model, reader()))
    text_to_lora.table([str(tmp_path)])
    first = capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert tz.adapters(model) == []
    # Cut off within a line of the second seed: nothing is trained again, and the figures are the same.
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:3]) + lines[3][:9], encoding="utf-8")
    monkeypatch.setattr(text_to_lora, "fit", None)
    text_to_lora.table([str(tmp_path)])
    assert capsys.readouterr().out == first
    text_to_lora.table([str(tmp_path)])
    assert capsys.readouterr().out == first
    assert [line.split(" | ")[1] for line in first.splitlines()[2:4]] == ["d", "e"]


def test_what_is_said_in_the_end() -> None:
    records = [
        {
            "seed": seed,
            "source": "r" if question == "z" else "s",
            "question": question,
            "near": "n",
            **dict.fromkeys(text_to_lora.WHAT, 0.5),
        }
        | {"written": 0.6 + 0.1 * seed, "mean": mean}
        for seed in (0, 1)
        for question, mean in (("x", 0.5), ("y", 0.75), ("z", 0.25))
    ]
    lines = text_to_lora.summary(records)
    assert lines[2] == "| s | x | n | 0.500 | 0.500 | 0.500 | 0.500 | 0.650 |"
    assert lines[5:] == [
        "| s | mean of 2 |  | 0.500 | 0.500 | 0.625 | 0.500 | 0.650 |",
        "| all | mean of 3 questions |  | 0.500 | 0.500 | 0.500 | 0.500 | 0.650 |",
        "| all | mean of 2 sources |  | 0.500 | 0.500 | 0.438 | 0.500 | 0.650 |",
        "| all | mean of questions, seed 0 |  | 0.500 | 0.500 | 0.500 | 0.500 | 0.600 |",
        "| all | mean of questions, seed 1 |  | 0.500 | 0.500 | 0.500 | 0.500 | 0.700 |",
        "",
        *lines[11:],
    ]
    assert "mean of the trained LoRA: ahead in 2 of 3 questions, by +0.150" in "\n".join(lines[11:])
    assert text_to_lora.drawn_again([1.0, 1.0]) == (1.0, 1.0)


def test_kinds_of_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is in two parts, of which the first does not end in a line's end; one without a gloss is left out."""
    folder = tmp_path / "text" / "en" / "wordnet" / "dict"
    folder.mkdir(parents=True)
    kinds = {"0": ("bird", "a thing with feathers; it flies", "13"), "2": ("family", "(biology) a rank", "4")}
    lines = ["  licence | text"]
    for at, (name, gloss, below) in kinds.items():
        pointers = " ".join(f"~ {number} n 0000" for number in below)
        lines.append(f"{at} 05 n 01 {name} 0 {len(below):03} {pointers} | {gloss}  ")
    lines += [f"{at} 05 n 02 {name} 0 other 0 001 @ 0 n 0000 | one" for at, name in (("1", "blue_jay"), ("3", "tit"))]
    lines += ["4 05 n 01 thing 0 000 | one", "5 05 n 01 tool 0 001 ~ 4 n 0000 | what is used (by hand)"]
    (folder / "data.noun1").write_text("\n".join(lines[:3]), encoding="latin-1")
    (folder / "data.noun2").write_text("\n".join(lines[3:]) + "\n", encoding="latin-1")
    monkeypatch.setattr(described, "folder_of", lambda module: tmp_path)
    monkeypatch.setattr(described, "_LEAST", 1)
    found = described.wordnet(2, 1)
    assert [(each.name, each.description) for each in found] == [
        ("bird", "bird: a thing with feathers"),
        ("tool", "tool: what is used"),
    ]
    assert found[0].yes[0] in ("blue jay", "tit") and found[1].yes == ["thing"]
    assert found[0].no in (["thing"], [])


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(described, "PACKAGES", {"no_such_module": "no-such-package"})
    with pytest.raises(SystemExit, match="found no no_such_module; expected: pip install --no-deps no-such-package"):
        described.folder_of("no_such_module")
