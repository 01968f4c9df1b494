"""`tanzaku chat`: what adapters and their base are asked, and what they answer."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Said, Tanzaku, assert_refused
from transformers import AutoTokenizer

from tanzaku.tasks import decoding

chat = importlib.import_module("tanzaku.cli.chat")  # the package has the verb by that name

ROWS = [("the warm rain", "of spring"), ("a cold wind", "of winter"), ("warm sea", "rain"), ("winter", "cold wind")]
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'the ', 'user': '<s> ', 'assistant': 'a '}[m['role']] }}"
    "{{ m['content'] + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
ASK = ["--max-new-tokens", "5"]
Ask = Callable[..., Said]


@pytest.fixture
def ask(tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`tanzaku chat` with lines that are piped in."""

    def run(lines: str, *args: Any) -> Said:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return tanzaku("chat", *args)

    return run


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[dict[Any, list[int]]]:
    """What each was asked, by turn, as tokens."""
    found: list[dict[Any, list[int]]] = []
    own = decoding.decode

    def decode(model: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        found.append({entry: list(some[0]) for entry, some in prompts.items()})
        return own(model, prompts, *args, **options)

    monkeypatch.setattr(decoding, "decode", decode)
    return found


def train(tanzaku: Tanzaku, model: Path, out: str, *methods: str, conversations: bool = False) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{prompt} ", "completion": answer} for prompt, answer in ROWS]
    if conversations:
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in ROWS
        ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for method in methods:
        options = ["--epochs", "20", "--batch-size", "2", "--learning-rate", "1e-1", "--max-length", "16"]
        said = tanzaku(
            "train", "--model", model, "--task", "generation", "--train", "rows.jsonl", "--method", method,
            "--max-new-tokens", "4", *options, "--out", f"{out}-{method}",
        )  # fmt: skip
        assert said.code == 0, said.err
        shutil.copytree(f"{out}-{method}/adapters/{method}", f"{out}/{method}")


@pytest.fixture
def chat_model(work: Path, model_dir: Path) -> Path:
    """The tiny model with a chat template."""
    shutil.copytree(model_dir, "chat-model")
    tokenizer = AutoTokenizer.from_pretrained("chat-model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("chat-model")
    return work / "chat-model"


def answers(said: Said) -> list[dict[str, str]]:
    """By turn, what each said by its name."""
    assert said.code == 0, said.err
    turns: list[dict[str, str]] = []
    for line in said.out.splitlines():
        if line.startswith("> ") and line[2:] not in ("/new", "/quit"):
            turns.append({})
        elif not line.startswith(">") and line:
            name, text = line.split(": ", 1)
            turns[-1][name] = text
    return turns


def test_all_answer_as_they_would_alone(work: Path, model_dir: Path, tanzaku: Tanzaku, ask: Ask) -> None:
    train(tanzaku, model_dir, "pairs", "lora", "ia3")
    prompts = "the warm rain\na cold wind\n\n"
    both = answers(ask(prompts, "pairs/lora", "pairs/ia3"))
    assert [[name.split(" (")[0] for name in turn] for turn in both] == [["lora", "ia3", "base model"]] * 2
    assert both[0] != both[1] and all(len({*turn.values()}) > 1 for turn in both)
    for name in ("lora", "ia3"):
        alone = answers(ask(prompts, f"pairs/{name}", "--no-base"))
        assert alone == [{key: text for key, text in turn.items() if key.startswith(name)} for turn in both]
    Path("new.jsonl").write_text('{"prompt": "the warm rain"}\n{"prompt": "a cold wind"}\n', encoding="utf-8")
    said = tanzaku("predict", "pairs/lora", "--data", "new.jsonl", "--json")
    predicted = [json.loads(line)["predicted"] or "(nothing)" for line in said.out.splitlines()]
    assert [next(iter(turn.values())) for turn in both] == predicted


def test_each_remembers_its_own_conversation(
    chat_model: Path, tanzaku: Tanzaku, ask: Ask, heard: list[dict[Any, list[int]]]
) -> None:
    train(tanzaku, chat_model, "chat", "lora", conversations=True)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    heard.clear()
    said = ask("the warm rain\na cold wind\n/new\na cold wind\n/quit\nwarm sea\n", "chat/lora", *ASK)
    turns = answers(said)
    assert len(turns) == len(heard) == 3
    texts = [{name.split(" (")[0]: text for name, text in turn.items()} for turn in turns]
    for entry, name in (("lora", "lora"), (None, "base model")):
        first, second, anew = (tokenizer.decode(turn[entry]) for turn in heard)
        assert first == "<s> the warm rain </s> a"
        assert second == f"<s> the warm rain </s> a {texts[0][name]} </s> <s> a cold wind </s> a"
        assert anew == "<s> a cold wind </s> a"
    assert texts[0]["lora"] != texts[0]["base model"]
    heard.clear()
    assert ask("warm sea\n", "chat/lora", "--system", "of spring", "--no-base", *ASK).code == 0
    assert tokenizer.decode(heard[0]["lora"]) == "the of spring </s> <s> warm sea </s> a" and len(heard[0]) == 1
    heard.clear()
    assert ask("warm sea\n", "chat/lora", "--no-template", *ASK).code == 0
    assert [tokenizer.decode(tokens) for tokens in heard[0].values()] == ["warm sea"] * 2


def test_a_prompt_is_taken_as_it_is_typed(
    work: Path, model_dir: Path, tanzaku: Tanzaku, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows whose prompts end with a space, one without it would be another."""
    train(tanzaku, model_dir, "pairs", "lora")
    asked: list[str] = []
    hears = chat._Speaker.hears

    def heard(speaker: Any, prompt: str, tokenizer: Any) -> Any:
        asked.append(prompt)
        return hears(speaker, prompt, tokenizer)

    monkeypatch.setattr(chat._Speaker, "hears", heard)
    assert ask("warm sea \r\n  /new \n/think cold\n", "pairs/lora", "--no-base").code == 0
    assert asked == ["warm sea ", "/think cold"]


def test_flags_of_sampling(work: Path, model_dir: Path, tanzaku: Tanzaku, ask: Ask) -> None:
    train(tanzaku, model_dir, "pairs", "lora")
    lines, drawn = "warm\n" * 3, ("--temperature", "2", "--max-new-tokens", "8")
    found = answers(ask(lines, "pairs/lora", *drawn))
    assert len({*map(str, found)}) == 3, "each prompt has draws of its own"
    assert found == answers(ask(lines, "pairs/lora", *drawn))
    assert found != answers(ask(lines, "pairs/lora", *drawn, "--seed", "1"))
    word = next(text.split()[1] for turn in found for text in turn.values() if len(text.split()) > 2)
    stopped = answers(ask(lines, "pairs/lora", *drawn, "--stop", word))
    assert not any(word in text for turn in stopped for text in turn.values()) and stopped != found
    short = ask("warm\n", "pairs/lora", "--max-new-tokens", "1").out
    assert "lora (cut at 1 tokens): " in short or "lora: (nothing)" in short


def test_what_cannot_be_asked(chat_model: Path, model_dir: Path, tanzaku: Tanzaku, ask: Ask) -> None:
    train(tanzaku, chat_model, "chat", "lora", conversations=True)
    train(tanzaku, model_dir, "pairs", "lora")
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 0
    other = ask("warm\n", "run/adapters/lora", "--temperature", "1")
    assert_refused(other, "an adapter for the task classification", "writes no text", "tanzaku predict")
    bases = ask("warm\n", "chat/lora", "pairs/lora")
    assert_refused(bases, "different base models", "talk to them one by one", "--model")
    assert_refused(ask("warm\n", "chat/lora", "--model", model_dir), "no chat template", "--no-template")
    assert_refused(ask("warm\n", "pairs/lora", "--template"), "--template is given", "no chat template")
    assert_refused(ask("warm\n", "pairs/lora", "--system", "warm"), "--system stands before a conversation")
    assert_refused(ask("warm\n", "pairs/lora", "--top-k", "3"), "--temperature", "such as 1")
    assert_refused(ask("warm\n", "pairs/lora", "--device", "gpu"), "--device is 'gpu'")
    assert_refused(ask("warm\n", "pairs/none"), "there is no adapter pairs/none")
    assert ask("warm\n", "chat/lora", "pairs/lora", "--model", chat_model).code == 0, "each in its own way"
    wrong = ask("warm\n/qiut\n", "pairs/lora")
    assert wrong.code == 2 and "base model" in wrong.out and "did you mean '/quit'" in wrong.err
    long = ask("warm " * 100, "pairs/lora")
    assert long.code == 2 and "the model's 64 positions" in long.err


def test_in_a_terminal_an_error_ends_nothing(
    work: Path, model_dir: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is being written is shown as it comes."""
    train(tanzaku, model_dir, "pairs", "lora")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, lines = Terminal(), iter(["warm " * 100, "/qiut", KeyboardInterrupt, "warm", "cold"])

    def typed(_: str) -> str:
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    seen: list[str] = []
    take = chat._Stream.take  # type: ignore[attr-defined]

    def taken(stream: Any, *args: Any) -> None:
        stream.next = 0.0
        take(stream, *args)
        if not seen:
            seen.append("")
            raise KeyboardInterrupt
        seen.append("".join(str(line) for line in stream.shown(stream.live.console).renderables))

    monkeypatch.setattr(chat._Stream, "take", taken)  # type: ignore[attr-defined]
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", screen)
    said = tanzaku("chat", "pairs/lora", "--max-new-tokens", "4")
    assert said.code == 0, said.err
    assert "64 positions" in said.err and "did you mean '/quit'" in said.err and "/new begins anew" in said.err
    assert said.err.index("/quit ends") < said.err.index("stopped; the prompt is forgotten")
    assert "lora: " in screen.getvalue() and "base model: " in screen.getvalue()
    assert len(seen) > 2 and all("lora:" in each and "base model:" in each for each in seen[1:])
    assert seen[1] != seen[-1]
