"""`tanzaku predict`: what one trained adapter says of rows, or what many say in one pass."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tanzaku.cli.adapters import check_paths, names_of, note
from tanzaku.cli.flags import check_choices, take_overrides
from tanzaku.cli.run import Interrupted
from tanzaku.cli.trained import PRECISIONS, Trained, check_base, load_model, read_trained
from tanzaku.errors import TanzakuError, flag, listed, nearest, printable
from tanzaku.tasks import TASKS
from tanzaku.tasks.cells import cell_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tanzaku.cli.output import Lines, Parquet
    from tanzaku.engine.accelerations import Accelerations
    from tanzaku.tasks.piped import Piped
    from tanzaku.tasks.stream import Row, Rows
    from tanzaku.tasks.task import Column, Split, Task

_FORMATS = ("tsv", "csv", "jsonl", "parquet")
_TEXTS = ("tsv", "csv", "jsonl", "json")


def predict(
    data: Annotated[
        str,
        typer.Option(metavar="TEXT", help="rows: .tsv, .csv, .jsonl, .parquet, a dataset, or - for standard input"),
    ],
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ADAPTER", help="directories of adapters, from train or compare, or HF PEFT's", show_default=False
        ),
    ] = None,
    named: Annotated[
        list[Path] | None, typer.Option("--adapters", metavar="ADAPTER...", help="the same, as in --adapters A B C")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(metavar="NAME", help="of --data, such as cp932 (found out)", show_default=False)
    ] = None,
    data_format: Annotated[
        str | None, typer.Option(metavar="|".join(_TEXTS), help="of --data (as its name ends)", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a .tsv, .csv, .jsonl or .parquet file (standard output)")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--format", metavar="|".join(_FORMATS), help="of the output (as --out ends, or tsv)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the same as --format jsonl")] = False,
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="what the names of new columns begin with")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an --out that is there")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with an --out that was cut off, by the same command")
    ] = False,
    model: Annotated[str | None, typer.Option(metavar="TEXT", help="where the base model is now")] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="INTEGER", min=1, help="texts are cut after this many tokens (as in training)")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="texts a step; each goes through every adapter")
    ] = 8,
    precision: Annotated[
        str | None, typer.Option(metavar="|".join(PRECISIONS), help="arithmetic (as in training)")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="where the model runs")] = "auto",
    **overrides: str | list[str] | None,
) -> None:
    """Say what trained adapters make of rows.

    Each row keeps its columns, and gets what the adapter's task answers: its label (predicted), say, and the
    probability of each label (p_LABEL). Several adapters of one base model, of any methods, go through it together;
    each has columns of its own, predicted_NAME and p_NAME_LABEL. NAME is the adapter's directory; of two directories
    with one name, it begins with the nearest folder that tells them apart (a-lora and b-lora for a/adapters/lora and
    b/adapters/lora), or ends with a number. A row without text gets no answer. Rows of standard input are answered as
    they come.
    """
    # The option takes one word; the others fall to the argument.
    paths = [*(named or []), *(adapters or [])]
    check_paths(paths)
    kind = _format(out, kind, as_json)
    _check_out(out, data, overwrite, resume)
    check_choices(
        {
            "--device": (device, ("auto", "cpu", "cuda", "mps")),
            "--precision": (precision, PRECISIONS),
            "--data-format": (data_format, _TEXTS),
        }
    )
    from tanzaku.cli.machine import device_named, quieten
    from tanzaku.cli.output import Partial
    from tanzaku.models.loading import load_tokenizer
    from tanzaku.tasks.piped import Piped
    from tanzaku.tasks.sources import STDIN
    from tanzaku.tasks.stream import open_rows

    quieten()
    said = {name: value for name, value in overrides.items() if value != []}
    asked = {"model": model, "max_length": max_length, **said}
    given = [read_trained(name, path, asked, precision) for name, path in zip(names_of(paths), paths, strict=True)]
    _check_fit(given)
    task = _task_of(given)
    place = device_named(device)
    piped = data == STDIN
    # Parquet must know the kinds of all columns before its first row.
    rows = Piped(encoding, data_format) if piped and kind != "parquet" else open_rows(data, encoding, data_format)
    for column in task.needs:
        rows.check_column(column)
    added = _added([adapter.name for adapter in given], task, kind, prefix)
    _check_names(rows.names, rows.source, added)
    digest = "" if isinstance(rows, Piped) else _digest_of(rows, task)
    form = _form(kind, rows, added, out)
    tokenizer = load_tokenizer(given[0].model, on_progress=note)
    run = _Run(given, rows, tokenizer, batch_size, place)
    total = None if isinstance(rows, Piped) else len(rows)
    say = _Progress(total, quiet=out is None and sys.stderr.isatty())

    def written(start: int, counts: Counter[str]) -> Iterator[tuple[int, list[Row]]]:
        """Rows as they are written, and how many are done."""
        done = start
        for chunk, found in run.chunks(start, counts):
            if total is None:
                _check_new(chunk, rows, done, added, kind)
            done += len(chunk)
            yield done, _written(chunk, found, given, kind, prefix)
            say(done, len(chunk))

    counts: Counter[str] = Counter()
    if out is None:
        _print(form, written(0, counts), total)
    else:
        about = {
            "data": digest,
            "adapter": _digest(given),
            "format": kind,
            "set of flags": repr((given[0].model, task.to_json(), batch_size, place, prefix)),
            "precision": repr([adapter.precision for adapter in given]),
            "max length": repr([adapter.max_length for adapter in given]),
        }
        partial = Partial(out, form, about, resume, overwrite, keep=not piped)
        try:
            with partial:
                counts.update(partial.counts)
                if resume:
                    after = f"after row {partial.rows} of {len(rows)}"
                    note(f"going on {after}" if partial.rows else "nothing of it is left to go on with: it begins anew")
                for done, chunk in written(partial.rows, counts):
                    counts["rows"] = done
                    partial.add(chunk, counts)
                partial.finish()
        except KeyboardInterrupt:
            fix = "run the same command again"
            if partial.rows and not piped:
                fix = f"{partial.rows} of {len(rows)} rows are kept; go on with the same command and --resume"
            raise Interrupted(f"interrupted; {fix}") from None
    run.report(counts)
    if out is not None:
        note(f"{len(rows)} rows written to {out}")


take_overrides(predict, {name: each for kind in TASKS.values() for name, each in kind.overrides.items()})


# -- which adapters


def _check_fit(adapters: Sequence[Trained]) -> None:
    """Adapters in one pass have one base and one task; a flag overrules what they say."""
    one_by_one = "predict with them one by one"
    check_base(adapters, one_by_one)
    of_all = _task_of(adapters)
    whose = next(each for each in adapters if each.task is of_all)
    expected = {"task": of_all.name, **of_all.to_json()}
    for adapter in adapters:
        theirs = {"task": adapter.task.name, **adapter.task.to_json()}
        if adapter.task.row_tasks is None:  # it reads no such column, whichever that is
            theirs |= of_all.tasks_to_json()
        for key, mine in expected.items():
            if key not in of_all.of_adapters and mine != theirs.get(key):
                found = f"{whose.path} has {_shown(mine)}, {adapter.path} has {_shown(theirs.get(key))}"
                if isinstance(mine, list):
                    odd = sorted({*mine} ^ {*theirs[key]})
                    found += f"; they differ in {listed(odd)}" if odd else "; their order differs"
                fix = f", or say with {flag(key)} which to read" if key in of_all.reading else ""
                raise TanzakuError(f"adapters with different {key.replace('_', ' ')}: {found}; {one_by_one}{fix}")


def _task_of(adapters: Sequence[Trained]) -> Task:
    """The task of adapters in one pass: that of the first which reads of rows which of several tasks they are of."""
    return next((each.task for each in adapters if each.task.row_tasks is not None), adapters[0].task)


def _shown(value: Any) -> str:
    return listed(value) if isinstance(value, list) else "none" if value is None else repr(value)


def _digest(adapters: Sequence[Trained]) -> str:
    from tanzaku.storage.store import checksum

    return " ".join(f"{adapter.name} {checksum(adapter.path)}" for adapter in adapters)


# -- what goes in


def _digest_of(rows: Rows, task: Task) -> str:
    """A checksum of all rows; an error where a cell is none that can be read."""
    digest = hashlib.sha256()
    for number, row in enumerate(rows, 1):
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
        _check_cells(row, task, f"{rows.source} row {number}")
    return digest.hexdigest()


def _check_cells(row: Row, task: Task, where: str) -> None:
    for column in task.reads:
        task.check_cell(cell_in(row, column), f"{where}: column {column!r}")
    if task.row_tasks is not None:
        task.row_tasks.id_of(row[task.row_tasks.column], f"{where}: column {task.row_tasks.column!r}")


class _Run:
    """Labels rows, some hundred at a time; what is read, encoded and computed goes again."""

    def __init__(
        self,
        adapters: Sequence[Trained],
        rows: Rows | Piped,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        device: str,
    ):
        self.adapters, self.rows, self.task = adapters, rows, _task_of(adapters).told_by(tokenizer)
        self.tokenizer, self.batch_size, self.device = tokenizer, batch_size, device
        self.accelerations: Accelerations | None = None
        self.lengths = list(dict.fromkeys(adapter.max_length for adapter in adapters))

    def chunks(self, start: int, counts: Counter[str]) -> Iterator[tuple[list[Row], list[dict[str, Any] | None]]]:
        """Chunks of rows from number `start`, and for each row the predictions by adapter; None without a text.

        Args:
            counts: of rows without text, and of texts that were cut by the length they were cut at, go here.
        """
        from tanzaku.tasks.inference import window_of

        model = None
        for chunk in self.rows.chunks(window_of(self.batch_size), start):
            for number, row in enumerate(chunk, start + 1):
                _check_cells(row, self.task, f"{self.rows.source} row {number}")
            there, splits = self._encoded(chunk, counts)
            found: list[dict[str, Any] | None] = [None] * len(chunk)
            if there:
                if model is None:  # the first rows are encoded: they can be used
                    model = load_model(self.adapters, self.task, self.device)
                for at, row in zip(there, self._predictions(model, splits, start, there), strict=True):
                    found[at] = row
            yield chunk, found
            start += len(chunk)

    def report(self, counts: Counter[str]) -> None:
        """Say what happened to rows on the way."""
        for length in self.lengths:
            if cut := counts[f"cut at {length}"]:
                names = [adapter.name for adapter in self.adapters if adapter.max_length == length]
                whose = f" for {listed(names)}" if len(self.lengths) > 1 else ""
                note(f"{cut} of {len(self.rows)} texts were cut at {length} tokens{whose}")
        if blank := counts["blank"]:
            note(f"{blank} of {len(self.rows)} rows have no text, so they have no answer")

    def _encoded(self, chunk: list[Row], counts: Counter[str]) -> tuple[list[int], dict[int, Split]]:
        """Which rows have a text, and by length they are cut at, these rows as tokens."""
        from tanzaku.tasks.data import Table

        columns = self.task.required
        there = [
            at for at, row in enumerate(chunk) if not any(self.task.blank(cell_in(row, column)) for column in columns)
        ]
        for column in columns:
            some = self.task.have_tokens([cell_in(chunk[at], column) for at in there], self.tokenizer)
            there = [at for at, tokens in zip(there, some, strict=True) if tokens]
        counts["blank"] += len(chunk) - len(there)
        if not there:
            return [], {}
        read = [column for column in self.task.reads if column in chunk[0]]
        names = dict.fromkeys([*self.task.needs, *read])
        table = Table({column: [cell_in(chunk[at], column) for at in there] for column in names}, self.rows.source)
        splits = {}
        for length in self.lengths:
            splits[length] = self.task.encode(table, "data", self.tokenizer, length)
            counts[f"cut at {length}"] += splits[length].truncated
        return there, splits

    def _predictions(
        self, model: PreTrainedModel, splits: dict[int, Split], start: int, there: Sequence[int]
    ) -> list[dict[str, Any]]:
        from tanzaku.core.manager import manager_of
        from tanzaku.engine.accelerations import Accelerations
        from tanzaku.tasks.inference import NotFinite, check_rows, predictions
        from tanzaku.train.step import autocast

        rows: list[dict[str, Any]] = [{} for _ in there]
        manager = manager_of(model)
        self.accelerations = self.accelerations or Accelerations(manager.base)
        for adapter in self.adapters:
            length = adapter.max_length
            numbers = [start + at + 1 for at in there]
            check_rows(manager.base, splits[length], length, manager.get(adapter.name), numbers, self.task)
        for precision in dict.fromkeys(adapter.precision for adapter in self.adapters):
            group = [adapter for adapter in self.adapters if adapter.precision == precision]
            texts = {adapter.name: splits[adapter.max_length] for adapter in group}
            try:
                with autocast(model.device, precision):
                    pad = int(self.tokenizer.pad_token_id)
                    own = {adapter.name: adapter.task for adapter in group}
                    args = (texts, pad, self.batch_size, self.accelerations, own)
                    found = list(predictions(model, self.task, *args, numbers=[start + at for at in there]))
            except NotFinite as error:
                path = next(adapter.path for adapter in group if adapter.name == error.name)
                fix = "" if precision == "fp32" else ", or --precision fp32"
                number = start + there[error.row] + 1
                raise TanzakuError(
                    f"{path} gives {self.rows.source} row {number} the {error.what} {error.found}, "
                    f"expected finite numbers; the adapter's weights are too large: train it anew{fix}"
                ) from None
            for row, each in zip(rows, found, strict=True):
                row.update(each)
        return [{adapter.name: row[adapter.name] for adapter in self.adapters} for row in rows]


# -- what comes out


def _format(out: Path | None, kind: str | None, as_json: bool) -> str:
    if as_json and kind not in (None, "jsonl"):
        raise TanzakuError(f"--json is --format jsonl, and --format is {kind!r}; give one of the two")
    kind = "jsonl" if as_json else kind
    if kind is not None and kind not in _FORMATS:
        raise TanzakuError(f"--format is {kind!r}{nearest(kind, _FORMATS)}, expected {listed(_FORMATS)}")
    if out is None:
        if kind == "parquet":
            raise TanzakuError("--format parquet needs --out: a table of Parquet is written as a whole file")
        return kind or "tsv"
    suffixes = [f".{each}" for each in _FORMATS]
    if kind is None and out.suffix.lower() not in suffixes:
        near = nearest(out.suffix, suffixes)
        raise TanzakuError(
            f"--out {out} ends with {out.suffix or 'no suffix'}{near}; expected {listed(suffixes)}, or --format"
        )
    return kind or out.suffix.lower().removeprefix(".")


def _check_out(out: Path | None, data: str, overwrite: bool, resume: bool) -> None:
    from tanzaku.tasks.sources import STDIN

    if out is None:
        for flag, given in (("--overwrite", overwrite), ("--resume", resume)):
            if given:
                raise TanzakuError(f"{flag} needs --out, the file to write")
        if sys.stdout is None:
            raise TanzakuError("standard output is closed; give --out, the file to write")
        return
    if resume and data == STDIN:
        raise TanzakuError("--resume reads --data again, and - is standard input, which is read once; give a file")
    if out.is_dir() or not out.parent.is_dir():
        raise TanzakuError(f"--out {out}: expected a file in a directory that exists")
    if out.exists() and Path(data).exists() and out.samefile(data):
        raise TanzakuError(f"--out {out} is the file that --data reads; choose another")
    if out.exists() and not out.is_file():
        raise TanzakuError(f"--out {out} is no regular file; leave --out out to write to standard output")
    if (out.exists() or out.is_symlink()) and not overwrite:
        done = ", whole, so there is nothing to resume" if resume else ""
        raise TanzakuError(f"--out {out} is there already{done}; choose another, or give --overwrite")


def _added(names: Sequence[str], task: Task, kind: str, prefix: str) -> dict[str, str]:
    """The new columns, and whether each is text or a number."""
    if kind == "jsonl":
        own = task.answer_keys if len(names) == 1 else ("adapters",)
        return {f"{prefix}{key}": "text" for key in own}
    added: list[tuple[str, str]] = []
    for name in names:
        added += [(_name(column, "" if len(names) == 1 else name, prefix), column.kind) for column in task.columns()]
    for column, times in Counter(name for name, _ in added).items():
        if times > 1:
            raise TanzakuError(f"two columns would be {column!r}; rename an adapter's directory, or use --out X.jsonl")
    return dict(added)


def _check_names(names: Iterable[str], source: str, added: dict[str, str]) -> None:
    for name in names:
        if name in added:
            raise TanzakuError(
                f"{source} has a column {name!r}, and a new one would be named so; rename it, or begin the names "
                "of new columns otherwise, as in --prefix new_"
            )


def _check_new(chunk: Sequence[Row], rows: Rows | Piped, done: int, added: dict[str, str], kind: str) -> None:
    """An error where rows that come later have names that the first have not, and there is no place for them."""
    for number, row in enumerate(chunk, done + 1):
        new = [name for name in row if name not in rows.names]
        _check_names(new, rows.source, added)
        if new and kind != "jsonl":
            raise TanzakuError(
                f"{rows.source} row {number} has {new[0]!r}, which is no column of the first rows "
                f"({listed(rows.names)}); give --json, where each row has its own"
            )


def _form(kind: str, rows: Rows | Piped, added: dict[str, str], out: Path | None) -> Lines | Parquet:
    from tanzaku.cli.output import Lines, Parquet, schema_of
    from tanzaku.tasks.piped import Piped

    if kind == "parquet":
        assert not isinstance(rows, Piped)  # whose kinds are not known
        return Parquet(schema_of(rows, added))
    on_terminal = out is None and sys.stdout.isatty()
    return Lines(kind, [*rows.names, *added], printable if on_terminal else str)


def _written(
    chunk: Sequence[Row],
    found: Sequence[dict[str, Any] | None],
    adapters: Sequence[Trained],
    kind: str,
    prefix: str,
) -> list[Row]:
    """The rows with what was found."""
    task, out = _task_of(adapters), []
    columns, lines = task.columns(), kind in ("tsv", "csv")
    for row, of_row in zip(chunk, found, strict=True):
        new: Row = {}
        for adapter in adapters:
            said = None if of_row is None else of_row[adapter.name]
            if kind == "jsonl":
                new[adapter.name] = dict.fromkeys(task.answer_keys) if said is None else task.answer(said)
                continue
            cells = [None] * len(columns) if said is None else task.cells(said)
            for column, cell in zip(columns, cells, strict=True):
                name = _name(column, "" if len(adapters) == 1 else adapter.name, prefix)
                new[name] = _cell(cell) if lines and cell is not None else cell
        if kind == "jsonl":
            new = {"adapters": new} if len(adapters) > 1 else new[adapters[0].name]
            new = {f"{prefix}{key}": value for key, value in new.items()}
        out.append({**row, **new})
    return out


def _name(column: Column, adapter: str, prefix: str) -> str:
    return prefix + "_".join(filter(None, (column.stem, adapter, column.part)))


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return printable(value)
    # Six decimals, unless these would not show all that was kept of it.
    short = f"{value:.6f}"
    return (
        str(value) if isinstance(value, int) else short if float(short) == value and abs(value) < 1e9 else repr(value)
    )


def _print(form: Lines | Parquet, chunks: Iterator[tuple[int, list[Row]]], rows: int | None) -> None:
    done, begun = 0, False
    binary = getattr(sys.stdout, "buffer", None)

    def write(data: bytes) -> None:
        if binary is not None and not sys.stdout.isatty():
            binary.write(data)  # in UTF-8, whatever the terminal speaks: it is a file's content
        else:
            sys.stdout.write(data.decode("utf-8"))
        sys.stdout.flush()

    try:
        for done, chunk in chunks:  # noqa: B007
            # The header waits for the first rows: an error before leaves nothing.
            write((b"" if begun else form.head()) + form.rows(chunk))
            begun = True
    except BrokenPipeError:  # who reads has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        fix = "" if rows is None else f" of {rows} rows; with --out, --resume could go on there"
        raise Interrupted(f"interrupted after {done}{fix or ' rows'}") from None


class _Progress:
    """How far it is, on standard error: one line that changes on a terminal, else a new line each ten seconds."""

    def __init__(self, rows: int | None, quiet: bool):
        self.rows, self.quiet = rows, quiet
        self.terminal = rows is not None and sys.stderr is not None and sys.stderr.isatty()
        self.every = 0.2 if self.terminal else 10.0  # seconds
        self.began = self.told = time.monotonic()
        self.start: int | None = None  # where this sitting began

    def __call__(self, done: int, chunk: int) -> None:
        now = time.monotonic()
        self.start = done - chunk if self.start is None else self.start
        last = done == self.rows
        if self.quiet or (now - self.told < self.every and not (last and self.terminal)):
            return
        self.told = now
        pace = (done - self.start) / max(now - self.began, 1e-9)
        line = f"{done:,}{'' if self.rows is None else f' of {self.rows:,}'} rows, {pace:,.0f} rows/s"
        if self.terminal:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            note(line)
