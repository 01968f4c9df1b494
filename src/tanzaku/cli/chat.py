"""`tanzaku chat`: one prompt to several adapters and their bare base, in one batch."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tanzaku.cli.adapters import check_paths, names_of, note
from tanzaku.cli.flags import check_choices, take_overrides
from tanzaku.cli.run import Interrupted
from tanzaku.cli.trained import LONGEST, PRECISIONS, Trained, check_base, load_model, read_trained
from tanzaku.errors import TanzakuError, flag, listed, nearest, printable
from tanzaku.tasks.conversations import Message, words_in
from tanzaku.tasks.sampling import OVERRIDES, Decoding, decoding_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tanzaku.core.routing import Entry
    from tanzaku.tasks.decoding import Written
    from tanzaku.tasks.task import Task

_COMMANDS = ("/new", "/quit")
_BASE = "base model"  # with a space, which no adapter's name has
_APART = 0.1  # seconds between two looks at what is being written


def chat(
    adapters: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER", help="directories of adapters, from train or compare, or HF PEFT's", show_default=False
        ),
    ],
    base: Annotated[bool, typer.Option("--base/--no-base", help="let the bare base model answer, too")] = True,
    template: Annotated[
        bool | None,
        typer.Option(
            "--template/--no-template", help="prompts go through the chat template (as in training)", show_default=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="what stands before a conversation")] = None,
    model: Annotated[str | None, typer.Option(metavar="TEXT", help="where the base model is now")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="|".join(PRECISIONS), help="arithmetic (as in training)")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="where the model runs")] = "auto",
    **overrides: str | list[str] | None,
) -> None:
    """Ask trained adapters, and their bare base, in the terminal.

    Each line is a prompt, which all answer in one batch. Adapters that were trained on conversations or instructions
    hear it through the chat template, and each remembers its own conversation; others write on from it. /new begins
    anew, /quit or the end of the input ends. Of a pipe each line is a prompt, too.
    """
    check_choices({"--device": (device, ("auto", "cpu", "cuda", "mps")), "--precision": (precision, PRECISIONS)})
    flags = {name: value for name, value in overrides.items() if value not in (None, [])}
    decoding_of(flags, flag)
    check_paths(adapters)
    if sys.stdin is None:
        raise TanzakuError("standard input is closed; expected prompts there, one a line")
    from tanzaku.cli.machine import device_named, quieten
    from tanzaku.models.loading import load_tokenizer

    quieten()
    asked = {} if model is None else {"model": model}
    named = zip(names_of(adapters), adapters, strict=True)
    given = [read_trained(name, path, asked, precision) for name, path in named]
    own = _checked(given)
    place = device_named(device)
    settings = decoding_of({**own.model_dump(), **flags}, flag)
    tokenizer = load_tokenizer(given[0].model, on_progress=note)
    speakers = _speakers(given, tokenizer, base, template, system)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    talk = _Chat(load_model(given, given[0].task, place), tokenizer, speakers, settings, given[0].precision, terminal)
    if terminal:
        note(f"{listed(each.name for each in speakers)}; /new begins anew, /quit ends")
    try:
        talk.run(_typed() if terminal else _piped())
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None


take_overrides(chat, OVERRIDES)


# -- who speaks


@dataclass
class _Speaker:
    """An adapter, or the base.

    Args:
        name: in the output. adapter: as a route calls it; None: the base. task: of rows as it hears them.
        said: the conversation until now.
    """

    name: str
    adapter: str | None
    task: Task
    begins: list[Message] = field(default_factory=list)
    said: list[Message] = field(default_factory=list)

    def hears(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
        """The tokens that it writes on from."""
        from tanzaku.tasks.data import Table

        asked = [*self.begins, *self.said, {"role": "user", "content": prompt}]
        [column] = self.task.reads
        table = Table({column: [asked if self.task.converses else prompt]}, "the prompt in")
        [example] = self.task.encode(table, "chat", tokenizer, LONGEST).examples
        return self.task.prompt(example)

    def remember(self, prompt: str, answer: str) -> None:
        if self.task.converses:
            self.said += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _checked(given: Sequence[Trained]) -> Decoding:
    """How adapters that can answer together write."""
    one_by_one = "talk to them one by one"
    own: list[Decoding] = []
    for adapter in given:
        if adapter.task.decoding is None:
            raise TanzakuError(
                f"{adapter.path} is an adapter for the task {adapter.task.name}, which writes no text; tanzaku predict "
                "answers with it"
            )
        own.append(adapter.task.decoding)
    check_base(given, one_by_one)
    first = given[0]
    for adapter, decoding in zip(given, own, strict=True):
        if adapter.precision != first.precision:
            raise TanzakuError(
                f"adapters with different arithmetic: {first.path} has {first.precision}, {adapter.path} has "
                f"{adapter.precision}; say with --precision which all are to have"
            )
        if decoding.sampling != own[0].sampling:
            raise TanzakuError(
                f"adapters with different sampling: {first.path} says {own[0].sampling or 'nothing'}, {adapter.path} "
                f"says {decoding.sampling or 'nothing'}; {one_by_one}"
            )
    return max(own, key=lambda each: each.max_new_tokens)


def _speakers(
    given: Sequence[Trained],
    tokenizer: PreTrainedTokenizerBase,
    base: bool,
    template: bool | None,
    system: str | None,
) -> list[_Speaker]:
    """The adapters and, if it is to speak, the base, which hears what the first adapter hears."""
    speakers = []
    for adapter in given:
        converses = adapter.task.converses if template is None else template
        if converses and getattr(tokenizer, "chat_template", None) is None:
            found = f"{adapter.path} was trained on conversations" if template is None else "--template is given"
            raise TanzakuError(
                f"{found}, and the tokenizer of {adapter.model!r} has no chat template; expected a model that has one "
                "(--model), or --no-template, for plain prompts"
            )
        speaker = _Speaker(adapter.name, adapter.name, adapter.task.typed(converses).told_by(tokenizer))
        if system is not None and converses:
            speaker.begins = [{"role": "system", "content": words_in(system, "--system")}]
        speakers.append(speaker)
    if system is not None and not any(each.task.converses for each in speakers):
        raise TanzakuError("--system stands before a conversation, and all adapters write on from plain prompts")
    if base:
        speakers.append(replace(speakers[0], name=_BASE, adapter=None, said=[]))
    return speakers


# -- what is asked


def _typed() -> Iterator[str]:
    """Lines of a terminal."""
    with suppress(ImportError):  # where there is one, it keeps the lines that were typed
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # which was meant to stop an answer, maybe
            print()
            note("/quit ends")


def _piped() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # what is no text is told as such
    for line in sys.stdin:
        if line.strip():
            print(f"> {printable(line.rstrip())}")
        yield line


class _Chat:
    """Prompts, and what is answered."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        speakers: Sequence[_Speaker],
        settings: Decoding,
        precision: str,
        terminal: bool,
    ):
        self.model, self.tokenizer, self.speakers = model, tokenizer, speakers
        self.settings, self.precision, self.terminal = settings, precision, terminal
        self.asked = 0  # prompts, of which each has draws of its own
        self.begins, *others = dict.fromkeys((*each.task.begins(model),) for each in speakers)
        if others:
            raise TanzakuError("adapters whose texts begin in different languages; talk to them one by one")

    def run(self, lines: Iterator[str]) -> None:
        for line in lines:
            word = line.strip()
            if word == "/quit":
                return
            if word == "/new":
                for each in self.speakers:
                    each.said.clear()
            elif word:
                self._take(line.rstrip("\r\n"))  # a space at its end may be what was learnt

    def _take(self, prompt: str) -> None:
        """Answer; in a terminal what goes wrong ends nothing."""
        try:
            word = prompt.strip()
            if word.startswith("/") and (near := nearest(word, _COMMANDS)):
                raise TanzakuError(f"there is no command {word!r}{near}, expected {listed(_COMMANDS)} or a prompt")
            self._answer(words_in(prompt, "the prompt"))
        except TanzakuError as error:
            if not self.terminal:
                raise
            note(f"error: {error}")
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            note("stopped; the prompt is forgotten")

    def _answer(self, prompt: str) -> None:
        from tanzaku.tasks.decoding import decode
        from tanzaku.train.step import autocast

        heard: dict[Entry, Any] = {each.adapter: [each.hears(prompt, self.tokenizer)] for each in self.speakers}
        number, self.asked = self.asked, self.asked + 1
        found: dict[Entry, Written] = {}
        stream = _Stream(self.speakers, self.tokenizer, self.terminal)
        with stream, autocast(self.model.device, self.precision):
            for each in decode(
                self.model,
                heard,
                self.settings,
                int(self.tokenizer.pad_token_id),
                tokenizer=self.tokenizer,
                batch_size=1,
                begins=self.begins,
                numbers=[number],
                on_token=stream.take,
            ):
                found[each.entry] = each
        for speaker in self.speakers:
            written = found[speaker.adapter]
            text = written.text(self.tokenizer, self.settings.stop).strip()
            cut = f" (cut at {self.settings.max_new_tokens} tokens)" if written.end == "length" else ""
            print(_block(f"{speaker.name}{cut}", text or "(nothing)"))
            speaker.remember(prompt, text)
        print(flush=True)


def _block(name: str, text: str) -> str:
    """An answer behind its name; of several lines below it."""
    lines = [printable(line) for line in text.expandtabs(4).split("\n")]
    return f"{name}: {lines[0]}" if len(lines) == 1 else "\n".join([f"{name}:", *lines])


class _Stream:
    """Shows what is being written, in a terminal, and takes it away again: the answers themselves are printed whole."""

    def __init__(self, speakers: Sequence[_Speaker], tokenizer: PreTrainedTokenizerBase, terminal: bool):
        self.tokenizer, self.next = tokenizer, 0.0
        self.tokens: Mapping[Any, list[int]] = {each.adapter: [] for each in speakers}
        self.names = {each.adapter: each.name for each in speakers}
        self.live: Any = None
        if terminal:
            from rich.console import Console
            from rich.live import Live

            console = Console(markup=False, highlight=False, emoji=False)
            self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> _Stream:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def take(self, entry: Any, row: int, token: int) -> None:
        self.tokens[entry].append(token)
        if self.live is not None and time.monotonic() >= self.next:
            self.next = time.monotonic() + _APART
            self.live.update(self.shown(self.live.console), refresh=True)

    def shown(self, console: Console) -> RenderableType:
        """The last lines of each, as many as there is room for."""
        from rich.console import Group
        from rich.text import Text

        room = max(1, (console.height - 1) // len(self.tokens) - 1)
        lines: list[Text] = []
        for entry, tokens in self.tokens.items():
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            whole = Text(_block(self.names[entry], text)).wrap(console, console.width)
            lines += whole[-room:]
        return Group(*lines)
