"""Where rows come from: a file, standard input or a dataset, told apart before anything is read."""

from __future__ import annotations

import gzip
import re
import stat
import sys
import zipfile
import zlib
from glob import glob, has_magic
from io import BufferedReader, BytesIO
from itertools import islice
from pathlib import Path

from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.files.writing import foreign

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".xlsx", ".tsv.gz", ".csv.gz", ".jsonl.gz", ".json.gz")
STDIN = "-"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
SPLIT = re.compile(r"(?P<name>.+?):(?P<split>\w+(\[.*\])?)")
_SHARD = re.compile(r"\w+-\d{5}-of-\d{5}")  # how the datasets library itself names the parts of a split
_KINDS = {stat.S_ISFIFO: "a FIFO", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISSOCK: "a socket"}
_MANY = 10_000  # files in a folder
_AS_CSV = "in the spreadsheet program, save it as CSV (UTF-8)"


def suffix_of(path: Path) -> str:
    """The suffix in small letters, two where the last is .gz: `.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def is_address(name: str) -> bool:
    """Whether it is a URL of any kind: https://, s3://, hf://."""
    return _URL.match(name) is not None


def check_name(name: str) -> None:
    """A name that can be one file, folder or dataset.

    Raises:
        TanzakuError: an address, a pattern, a file that could keep a reader waiting, or nothing.
    """
    if not name.strip():
        raise TanzakuError("the data source is empty; expected a file or the name of a dataset")
    if "\0" in name:
        raise TanzakuError(f"{name!r} is no name of a file: it has a NUL character")
    if is_address(name):
        raise TanzakuError(f"{name} is an address, which is not read; download it first, and give the file")
    path = Path(name)
    if path.exists():
        mode = path.stat().st_mode
        kind = next((kind for test, kind in _KINDS.items() if test(mode)), "")
        if kind:
            raise TanzakuError(f"{name} is {kind}; expected a file, a folder, or {STDIN} for standard input")
    elif has_magic(name):
        found = sorted(glob(name))  # noqa: PTH207, as Path.glob raises at some patterns
        if found or "*" in name or "?" in name:
            matches = f"it matches {listed(found)}" if found else "it matches no file"
            raise TanzakuError(f"{name} is a pattern, and one file is expected; {matches}")


def table_in(folder: Path, split: str | None) -> Path | None:
    """The one table in a folder, or the one with the split's name; None where the datasets library knows the parts.

    Splits are never guessed from parts of names: `poems.tsv` beside `poems_test.tsv` would be left out.

    Raises:
        TanzakuError: several tables, or none of that name.
    """
    inside = list(islice(folder.rglob("*"), _MANY + 1))
    if len(inside) > _MANY:  # / or a home directory by mistake: looking through it could take minutes
        raise TanzakuError(f"{folder} is a folder of more than {_MANY:,} files; name the table")
    tables = sorted(path for path in inside if suffix_of(path) in SUFFIXES and path.is_file())
    if all(_SHARD.fullmatch(path.stem) for path in tables):
        return None
    named = [path for path in tables if split in (None, path.name.split(".")[0])]
    if len(named) == 1:
        return named[0]
    found = listed(str(path.relative_to(folder)) for path in tables)
    if split is None:
        raise TanzakuError(f"{folder} is a folder of {len(tables)} tables: {found}; name one, as in {tables[0]}")
    stems = [path.name.split(".")[0] for path in tables]
    raise TanzakuError(
        f"{folder} has {'several tables' if named else 'no table'} named {split!r}{nearest(split, stems)}; "
        f"its tables are {found}; name one, as in {tables[0]}"
    )


def bytes_of(path: Path) -> bytes:
    """What the file holds, unpacked if its name ends with .gz.

    Raises:
        TanzakuError: it is not there, cannot be read, is empty, or is something else than its name says.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        folder = "" if path.parent.is_dir() else f", nor a folder {path.parent}"
        raise TanzakuError(f"there is no file {path}{folder}{neighbour(path)}") from None
    except OSError as error:
        raise TanzakuError(f"{path} cannot be read: {error.strerror or error}") from None
    if suffix_of(path).endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise TanzakuError(f"{path} is not a whole gzip file: {error}") from None
    check_content(raw, path)
    return raw


def stdin_stream() -> BufferedReader:
    """The bytes of standard input.

    Raises:
        TanzakuError: it is closed, or a terminal.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise TanzakuError("- is standard input, and nothing is piped into it; expected rows, as in cat a.tsv | ...")
    return sys.stdin.buffer  # type: ignore[return-value]


def stdin_bytes() -> bytes:
    """All of standard input; a TanzakuError where there is none."""
    raw = stdin_stream().read()
    check_content(raw, "standard input")
    return raw


def format_of(text: str) -> str:
    """The format of rows that have no name, by their first line."""
    first = text.lstrip().partition("\n")[0]
    if first.startswith(("{", "[")):
        return "json"  # which reads an object a line as well
    return "tsv" if "\t" in first else "csv"


def format_named(path: Path) -> str:
    """The format that a file's suffix names.

    Raises:
        TanzakuError: the suffix is none that is known.
    """
    suffix = suffix_of(path)
    if suffix in SUFFIXES:
        return suffix.split(".")[1]
    if suffix in (".xls", ".xlsm", ".xlsb", ".ods", ".numbers"):
        raise TanzakuError(f"{path} is a spreadsheet; {_AS_CSV}")
    raise TanzakuError(
        f"{path} has no known suffix{nearest(suffix, SUFFIXES)}; expected {listed(SUFFIXES)}, "
        "or say what it is with --format (predict: --data-format) tsv, csv or jsonl"
    )


def check_content(raw: bytes, path: Path | str) -> None:
    """What a file's first bytes say must be what its name says."""
    if not raw.removeprefix(b"\xef\xbb\xbf").strip():
        raise TanzakuError(f"{path} is empty; expected column names and rows")
    suffix = suffix_of(Path(path))
    if raw.startswith(b"PK\x03\x04") and suffix != ".xlsx":
        excel = _is_excel(raw)
        fix = f"name it .xlsx, or {_AS_CSV}" if excel else "unpack it, and give the table in it"
        raise TanzakuError(f"{path} is {'an Excel file' if excel else 'a zip archive'}, whatever its name; {fix}")
    if raw.startswith(b"\xd0\xcf\x11\xe0"):
        raise TanzakuError(f"{path} is an old Excel file or another of Microsoft's; {_AS_CSV}")
    if raw.startswith(b"\x1f\x8b"):
        raise TanzakuError(f"{path} is packed with gzip; expected a name that ends with .gz, as in {path}.gz")
    if what := foreign(raw[:64]):
        raise TanzakuError(f"{path} is {what}")
    if raw.startswith(b"PAR1") and suffix != ".parquet":
        raise TanzakuError(f"{path} is a Parquet file; expected a name that ends with .parquet")


def _is_excel(raw: bytes) -> bool:
    try:
        with zipfile.ZipFile(BytesIO(raw)) as archive:
            return any(name.startswith("xl/") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def neighbour(path: Path) -> str:
    """The fix for a path that is not there: the nearest name in its folder, else the tables there are."""
    if not path.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.name != path.name)
    tables = [name for name in names if suffix_of(Path(name)) in SUFFIXES]
    return nearest(path.name, names) or (f"; that folder has {listed(tables)}" if tables else "")
