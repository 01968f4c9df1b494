"""What a demo shows of text that is written: some rows, by the base before training and by the adapters after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tanzaku.errors import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tanzaku.cli.display import Display
    from tanzaku.core.routing import Entry
    from tanzaku.tasks.task import TaskData

_BASE, _EXPECTED = "the base", "expected"


def by_the_base(display: Display, model: PreTrainedModel, data: TaskData, count: int) -> list[str]:
    """Show what the base, without adapters, writes for the first rows that the finalists will write for, and return it;
    nothing of a task that writes no text."""
    from tanzaku.tasks.decoding import decode

    task, split = data.task, data.test or data.valid
    if not count or split is None or task.decoding is None or not task.writes:
        return []
    examples = split.examples[:count]
    prompts: dict[Entry, Any] = {None: [task.prompt(example) for example in examples]}
    written = decode(model, prompts, task.decoding, data.pad_token_id, tokenizer=task.tokenizer, batch_size=count)
    found = [each.text(task.tokenizer, task.decoding.stop) for each in written]
    display.say("\nbefore training")
    _show(display, data, [{_BASE: text} for text in found])
    return found


def by_the_adapters(display: Display, data: TaskData, base: list[str], rows: dict[str, Any] | None) -> None:
    """Show what the adapters wrote for the same rows, by the `rows` of results.json."""
    split = data.test or data.valid
    if not base or rows is None or split is None:
        return
    display.say("\nafter training")
    written = [
        {name: data.task.said(found[at], split.examples[at]).text for name, found in rows["predictions"].items()}
        for at in range(len(base))
    ]
    _show(display, data, [{_BASE: text, **others} for text, others in zip(base, written, strict=True)])


def _show(display: Display, data: TaskData, texts: list[dict[str, str]]) -> None:
    split = data.test or data.valid
    assert split is not None
    for row, example, by_whom in zip(split.texts, split.examples, texts, strict=False):
        display.say(_line(row))
        lines = {_EXPECTED: data.task.truth(example), **by_whom}
        width = max(map(len, lines))
        for name, text in lines.items():
            display.say(f"  {name.ljust(width)}  {_line(text)}".rstrip())


def _line(text: str) -> str:
    return printable(" ".join(text.split()))
