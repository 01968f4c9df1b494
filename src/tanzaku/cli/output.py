"""What `tanzaku predict` writes: rows in four formats, and a file that can be gone on with after a kill at any moment.

While it is written, a file lies beside its place under a hidden name, and a second hidden file says how much of it is
whole. Parquet has its end in one piece, so until then its rows lie there as an Arrow stream.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanzaku.errors import CONTROL, TanzakuError, printable
from tanzaku.files.locks import held
from tanzaku.files.writing import finite, is_full, to_disk, written_beside
from tanzaku.tasks.stream import Row, Rows

if TYPE_CHECKING:
    import pyarrow

FORMATS = ("tsv", "csv", "jsonl", "parquet")


class Lines:
    """TSV and CSV with a header, and JSON lines."""

    def __init__(self, kind: str, names: Sequence[str], shown: Callable[[str], str] = str):
        """
        Args:
            names: of the columns; JSON's objects have their own.
            shown: how a cell that is text is written.
        """
        self.kind, self.names, self.shown = kind, names, shown

    def head(self) -> bytes:
        return b"" if self.kind == "jsonl" else self._separated([list(map(printable, self.names))])

    def rows(self, rows: Iterable[Row]) -> bytes:
        if self.kind == "jsonl":
            return "".join(_json_line(row) for row in rows).encode("utf-8")
        return self._separated([self.shown(_cell(row[name])) for name in self.names] for row in rows)

    def finish(self, path: Path, out: Path) -> None:
        """Make the file `out` of the rows at `path`, which go."""
        path.replace(out)

    def _separated(self, cells: Iterable[Sequence[str]]) -> bytes:
        out = io.StringIO()
        csv.writer(out, delimiter="\t" if self.kind == "tsv" else ",", lineterminator="\n").writerows(cells)
        return out.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


def _json_line(row: Row) -> str:
    text = json.dumps(finite(row), ensure_ascii=False, default=str)
    # JSON's escapes read back as what they stand for.
    return CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text) + "\n"


class Parquet:
    """One table. The kinds of its columns must be known before the first row is written."""

    def __init__(self, schema: pyarrow.Schema):
        self.schema = schema

    def head(self) -> bytes:
        return bytes(self.schema.serialize())

    def rows(self, rows: Iterable[Row]) -> bytes:
        import pyarrow

        return bytes(pyarrow.RecordBatch.from_pylist(list(rows), schema=self.schema).serialize())

    def finish(self, path: Path, out: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        whole = path.with_name(f"{path.name}.parquet")
        try:
            with (
                pyarrow.OSFile(str(path)) as file,
                pyarrow.ipc.open_stream(file) as stream,
                pyarrow.parquet.ParquetWriter(whole, self.schema) as writer,
            ):
                held: list[pyarrow.RecordBatch] = []
                for batch in stream:  # some together: groups of a few hundred rows are slow to read
                    held.append(batch)
                    if sum(map(len, held)) >= _GROUP:
                        writer.write_table(pyarrow.Table.from_batches(held))
                        held = []
                if held:
                    writer.write_table(pyarrow.Table.from_batches(held))
            to_disk(whole)
            whole.replace(out)
        finally:
            whole.unlink(missing_ok=True)
        path.unlink()


_GROUP = 2**15  # rows


def schema_of(rows: Rows, added: Mapping[str, str]) -> pyarrow.Schema:
    """Of the rows and of columns that are added, each `text` or `number`.

    Raises:
        TanzakuError: a column holds values of several kinds.
    """
    import pyarrow
    import pyarrow.parquet

    own: pyarrow.Schema | None = None
    if Path(rows.source).suffix.lower() == ".parquet" and Path(rows.source).is_file():
        own = pyarrow.parquet.read_schema(rows.source).remove_metadata()
    else:
        for chunk in rows.chunks(4096):
            for name in rows.names:
                try:
                    kind = pyarrow.schema([(name, pyarrow.array([row[name] for row in chunk]).type)])
                    own = kind if own is None else pyarrow.unify_schemas([own, kind], promote_options="permissive")
                except (pyarrow.ArrowException, OverflowError):
                    raise TanzakuError(
                        f"column {name!r} of {rows.source} holds values of several kinds, which Parquet has no place "
                        "for; use --out X.jsonl"
                    ) from None
    assert own is not None  # there is a row
    kinds = {"text": pyarrow.string(), "number": pyarrow.float64()}
    return pyarrow.schema([*(own.field(name) for name in rows.names), *((n, kinds[k]) for n, k in added.items())])


class Unwritten(TanzakuError):
    """The disk takes no more of a file; what is whole of it is there."""


class Partial:
    """The file `out` on its way. A context manager: while entered, no other process writes it.

    Left without :meth:`finish` it stays for `--resume`, unless nothing in it is whole or what was wrong with the run
    would be so again.
    """

    def __init__(
        self,
        out: Path,
        form: Lines | Parquet,
        about: dict[str, str],
        resume: bool,
        overwrite: bool = False,
        keep: bool = True,
    ):
        """
        Args:
            about: all that the rows in the file depend on, by a name for the user.
            resume: go on with what is there. overwrite: begin anew, whatever is there.
            keep: whether what is written before the run is cut off can be gone on with.
        """
        self.out, self.form, self.about, self.resume, self.overwrite = out, form, about, resume, overwrite
        self.keep = keep
        self.path = out.with_name(f".{out.name}.partial")
        self.journal = out.with_name(f".{out.name}.partial.json")
        self.counts: dict[str, int] = {}
        self.done = False

    @property
    def rows(self) -> int:
        """Rows of the data that are in the file."""
        return self.counts.get("rows", 0)

    def __enter__(self) -> Partial:
        with ExitStack() as stack:
            try:
                self.path.touch()
                self.file = stack.enter_context(self.path.open("r+b"))
                stack.enter_context(held(self.path))
            except BlockingIOError:
                raise TanzakuError(f"--out {self.out} is being written by another tanzaku predict") from None
            except OSError as error:
                raise TanzakuError(f"cannot write {self.out}: {error.strerror or error}") from None
            if self.keep and not (self.resume or self.overwrite):
                self._check_nothing_is_lost()
            size = self._go_on() if self.resume else 0
            self.file.truncate(size)
            self.file.seek(size)
            if not size:
                self.journal.unlink(missing_ok=True)
                self.file.write(self.form.head())
            self.held = stack.pop_all()
        return self

    def _noted(self) -> tuple[int, dict[str, int], dict[str, str]] | None:
        """Bytes that are whole, the run's counts and what the rows depend on; None where that cannot be told."""
        try:
            kept = json.loads(self.journal.read_text(encoding="utf-8"))
            size, counts, about = int(kept["bytes"]), dict(kept["counts"]), dict(kept["about"])
            return (size, counts, about) if self.path.stat().st_size >= size else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _check_nothing_is_lost(self) -> None:
        noted = self._noted()
        if noted is not None and (rows := noted[1].get("rows", 0)):
            raise TanzakuError(
                f"--out {self.out} was begun and cut off after {rows} rows; go on with them by --resume, or begin anew "
                "with --overwrite"
            )

    def _go_on(self) -> int:
        """Bytes that are whole; 0 where there is nothing to go on with."""
        if (noted := self._noted()) is None:
            return 0
        size, counts, about = noted
        if about != self.about:
            other = [key for key, value in self.about.items() if about.get(key) != value]
            raise TanzakuError(
                f"--resume: {self.out} was begun with another {other[0] if other else 'version'}; give the same "
                "command again, or begin anew with --overwrite in place of --resume"
            )
        self.counts = counts
        return size

    def add(self, rows: Sequence[Row], counts: Mapping[str, int]) -> None:
        """Write rows, which are there from now on, whatever happens. `counts` are the run's, and are kept with them.

        Raises:
            Unwritten: they cannot be written, nor can it be noted that they are.
        """
        written = self.form.rows(rows)
        try:
            self.file.write(written)
            self.file.flush()
            os.fsync(self.file.fileno())
            state = {"bytes": self.file.tell(), "counts": dict(counts), "about": self.about}
            with written_beside(self.journal) as beside:
                beside.write_text(json.dumps(state), encoding="utf-8")
        except (OSError, TanzakuError) as error:
            full = is_full(error)
            fix = "free some space" if full else ""
            if self.keep and self.rows:
                fix += f"{', then ' if full else ''}go on with the same command and --resume: {self.rows} rows are kept"
            elif full:
                fix += ", or write elsewhere"
            reason = os.strerror(errno.ENOSPC) if full else str(error)
            raise Unwritten(f"cannot write {self.out}: {reason}{f'; {fix}' if fix else ''}") from None
        self.counts = dict(counts)

    def finish(self) -> None:
        """Put the file in its place."""
        self.file.close()  # Windows moves nothing that is open
        to_disk(self.path)
        self.form.finish(self.path, self.out)
        self.journal.unlink(missing_ok=True)
        self.done = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        with self.held:  # what did not fit is in the file's buffer yet
            with suppress(OSError):
                self.file.close()
            self._clear(kind)

    def _clear(self, kind: type[BaseException] | None) -> None:
        """Remove what nobody can go on with."""
        hopeless = kind is not None and not (self.keep and issubclass(kind, OSError | KeyboardInterrupt | Unwritten))
        if not self.done and (hopeless or not self.rows):
            for path in (self.path, self.journal):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
