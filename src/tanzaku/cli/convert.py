"""`tanzaku convert`: an adapter as the nearest one of another method, which more programs may read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tanzaku.cli.adapters import attach_saved, check_mergeable, check_paths, load_base_of, names_of, note, read_adapter
from tanzaku.errors import TanzakuError, listed


def convert(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="an adapter's directory, Tanzaku's or HF PEFT's", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="the adapter's directory to write")] = None,
    to: Annotated[str | None, typer.Option(metavar="METHOD", help="the method; the first that can by default")] = None,
    r: Annotated[int, typer.Option(metavar="INTEGER", help="rank of the changes")] = 8,
    model: Annotated[str | None, typer.Option(metavar="TEXT", help="where the base model is now")] = None,
) -> None:
    """Make an adapter one of another method.

    Each change of a weight becomes the nearest one of that rank, and what is lost of it is said.
    """
    check_paths([adapter])
    if out is None:
        raise TanzakuError("convert needs --out, the directory to write the adapter to")
    if out.exists():
        raise TanzakuError(f"--out {out} is there already; choose another")
    from tanzaku.cli.machine import quieten
    from tanzaku.methods import METHODS

    quieten()
    (name,) = names_of([adapter])
    given = read_adapter(name, adapter)
    check_mergeable(given)
    base = model or given.base
    if base is None:
        raise TanzakuError(f"{given.path} does not name its base model; say with --model where it is")
    able = [each for each, method in METHODS.items() if method.holds_changes]
    if to is not None and to not in able:
        raise TanzakuError(f"--to is {to!r}, expected {listed(able)}")
    loaded, _ = load_base_of(base, [given], "auto")
    attach_saved(loaded, [given])
    import tanzaku as tz

    found = tz.convert(loaded, name, to or able[0], r=r)
    for tensor, share in sorted(found.lost.items(), key=lambda each: -each[1]):
        note(f"{share:7.2%} {tensor}")
    tz.save(loaded, found.adapter.name, out, meta=_meta(given.path))
    note(f"{given.name} as {found.adapter.method.name}: {out}; {found}")


def _meta(path: Path) -> dict[str, object] | None:
    """What prediction needs of the first adapter, if Tanzaku wrote it."""
    from tanzaku.storage.store import META, read_meta

    return read_meta(path) if (path / META).is_file() else None
