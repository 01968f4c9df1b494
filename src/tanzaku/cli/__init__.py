"""The command line: one file per verb, imported when it is asked for. Heavy libraries are imported by the functions
that use them."""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tanzaku.cli.run import Interrupted
from tanzaku.errors import TanzakuError, listed, nearest, printable
from tanzaku.files.writing import is_full
from tanzaku.support.versions import VERSION

# Some versions of typer bring their own click and some do not; this is click's UsageError in all of them.
_UsageError = typer.BadParameter.__bases__[0]

# The verbs, and the first line of what each says of itself: the list of them needs no more.
VERBS = {
    "demo": "Try several methods on bundled rows.",
    "check": "Look at rows before training.",
    "train": "Train one adapter.",
    "compare": "Train many candidates at once, and say which is better.",
    "predict": "Say what trained adapters make of rows.",
    "chat": "Ask trained adapters, and their bare base, in the terminal.",
    "merge": "Fold adapters into their base model.",
    "convert": "Make an adapter one of another method.",
    "export": "Write an adapter as GGUF, for llama.cpp and Ollama.",
    "methods": "List the methods.",
}


def _app(words: Sequence[str]) -> typer.Typer:
    """The program, with those verbs imported that are among the words of a command."""
    app = typer.Typer(
        help="One frozen model, many adapters at once.",
        add_completion=False,
        rich_markup_mode=None,  # rich cuts long flags short in a narrow terminal, and takes its time
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_options)
    for verb, line in VERBS.items():
        if verb in words:
            app.command()(getattr(importlib.import_module(f"tanzaku.cli.{verb}"), verb))
        else:
            app.command(verb, help=line)(lambda: None)  # it stands in the list alone
    app.command("help")(help_of)
    return app


def help_of(
    context: typer.Context,
    verb: Annotated[str | None, typer.Argument(metavar="VERB", help="a command", show_default=False)] = None,
) -> None:
    """Show the help of a command."""
    whole = context.parent
    assert whole is not None
    if verb is None:
        typer.echo(whole.get_help())
        return
    verbs = getattr(whole.command, "commands", {})
    if verb not in verbs:
        raise TanzakuError(f"there is no command {verb!r}{nearest(verb, verbs)}; expected {listed(verbs)}")
    with verbs[verb].make_context(verb, [], parent=whole, resilient_parsing=True) as of_verb:
        typer.echo(of_verb.get_help())


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tanzaku {VERSION}")
        raise typer.Exit


def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 a negative answer, 2 bad input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    given = [arg for arg in args if arg != "--debug"]  # it may stand before or after the verb
    if wrong := _surroundings(args):
        return _end(f"error: {wrong}", 2)
    _prepare_torch()
    # It tells of faster kernels whenever it is imported, which may be at once.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows few letters
    try:
        code = _app(given)(given, prog_name="tanzaku", standalone_mode=False)
    except Interrupted as interrupted:
        return _end(str(interrupted), 130)
    except Exception as error:
        if len(given) < len(args):
            traceback.print_exc()
        return _end(f"error: {_line(error)}", 2)
    if code == 130:  # typer's word for Ctrl-C
        return _end("interrupted; nothing was finished yet, so run the same command again", 130)
    return code if isinstance(code, int) else 0


def _surroundings(args: Sequence[str]) -> str | None:
    """What is wrong with where the program runs, where all that it could say would lead elsewhere."""
    try:
        Path.cwd()
    except OSError:  # torch's libraries end the process there, and relative paths mean nothing
        return "the current directory is gone; change to one that is there"
    if sys.flags.optimize > 1:
        return "Python leaves out docstrings (-OO, PYTHONOPTIMIZE=2), which transformers reads; run it without that"
    # Bytes that the locale has no letters for.
    if unread := next((arg for arg in args if any("\udc80" <= letter <= "\udcff" for letter in arg)), None):
        kind = sys.getfilesystemencoding()
        fix = "name it otherwise" if kind == "utf-8" else "set PYTHONUTF8=1, or a locale with UTF-8 such as C.UTF-8"
        shown = os.fsencode(unread).decode("utf-8", "backslashreplace")
        return f"{printable(shown)} is not text in {kind}, which this locale has; {fix}"
    return None


def _prepare_torch() -> None:
    """Settings that torch and its libraries read when torch is first imported; what the user set stays."""
    # Large tensors lie in pages of 2 MB, where the system has them: in full fine-tuning the gradient of an embedding,
    # new in each step, spends most of its time on pages of 4 kB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Threads of GNU's OpenMP fall asleep after a few microseconds in place of milliseconds. Where something else has
    # the core of one, the others would spin for as long as it waits (python -m bench busy).
    if "OMP_WAIT_POLICY" not in os.environ:  # which this would override
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _line(error: Exception) -> str:
    """What went wrong, in one line."""
    if type(error).__name__ == "NoSuchOption":
        return _no_option(error)
    if isinstance(error, _UsageError):
        return f"{error.format_message()} (tanzaku --help, tanzaku VERB --help)"  # type: ignore[attr-defined]
    if isinstance(error, TanzakuError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        full = "; free some space, or write elsewhere" if is_full(error) else ""
        return f"{where}{error.strerror or error}{full}"
    return f"{type(error).__name__}: {error} (unforeseen: --debug shows the traceback)"


def _no_option(error: Any) -> str:
    name, verb = error.option_name, error.ctx.info_name if error.ctx.parent is not None else ""
    bare = name.lstrip("-")
    known = [option[2:] for each in error.ctx.command.params for option in each.opts if option.startswith("--")]
    near = [option for option in known if "".join(word[:1] for word in option.split("-")) == bare]  # --lr
    near = near or difflib.get_close_matches(bare, known, n=1, cutoff=0.6)
    fix = f" (did you mean '--{near[0]}'?)" if near else ""
    of = " ".join(filter(None, ["tanzaku", verb, "--help"]))
    return f"there is no option {printable(name)}{fix}; {of} lists them"


def _end(line: str, code: int) -> int:
    print(f"tanzaku: {' '.join(line.split())}", file=sys.stderr)
    return code
