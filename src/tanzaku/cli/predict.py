"""`tanzaku predict`: labels and probabilities of texts, from one trained adapter or from many in one pass."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tanzaku.cli.adapters import check_paths, names_of, note
from tanzaku.errors import TanzakuError, listed, nearest
from tanzaku.files import written_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tanzaku.tasks.classification import Split
    from tanzaku.tasks.data import Table

_SUFFIXES = (".tsv", ".jsonl")


@dataclass(frozen=True)
class _Adapter:
    name: str  # in the output and on the model
    path: Path
    meta: dict[str, Any]


def predict(
    data: Annotated[str, typer.Option(metavar="TEXT", help="rows to label: .tsv, .csv, .jsonl, .parquet or a dataset")],
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(metavar="ADAPTER", help="directories of adapters, from train or compare", show_default=False),
    ] = None,
    named: Annotated[
        list[Path] | None, typer.Option("--adapters", metavar="ADAPTER...", help="the same, as in --adapters A B C")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="column of the text (as in training)")] = None,
    text_pair: Annotated[str | None, typer.Option(metavar="TEXT", help="column of a second text")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="a .tsv or .jsonl file (standard output)")] = None,
    model: Annotated[str | None, typer.Option(metavar="TEXT", help="where the base model is now")] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="texts a step; each goes through every adapter")
    ] = 8,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="where the model runs")] = "auto",
) -> None:
    """Label texts with trained adapters.

    One line a row: the text, its label and the probability of each label. Several adapters of one base model, of any
    methods, go through it together; each has columns of its own, label_NAME and p_NAME_LABEL. NAME is the adapter's
    directory; of two directories with one name, it begins with the nearest folder that tells them apart (a-lora and
    b-lora for a/adapters/lora and b/adapters/lora), or ends with a number.
    """
    # The option takes one word; the others fall to the argument.
    paths = [*(named or []), *(adapters or [])]
    check_paths(paths)
    _check_out(out, data)
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise TanzakuError(f"--device is {device!r}, expected auto, cpu, cuda or mps")
    from tanzaku.cli.machine import device_named, quieten
    from tanzaku.models import load_classifier, load_tokenizer
    from tanzaku.tasks.data import read_table
    from tanzaku.tasks.inference import probabilities

    quieten()
    given = [_Adapter(name, path, _meta(path)) for name, path in zip(names_of(paths), paths, strict=True)]
    _check_fit(given, model, text, text_pair)
    place = device_named(device)
    meta = given[0].meta
    labels: list[str] = meta["labels"]
    names = [adapter.name for adapter in given]
    suffix = ".tsv" if out is None else out.suffix
    head = _head(names, labels, suffix)
    base = model or meta["model"]
    columns = text or meta["text"], text_pair or meta["text_pair"]
    table = read_table(data)
    for column in columns:
        if column is not None:
            table.column(column)
    tokenizer = load_tokenizer(base, on_progress=note)
    splits = _encoded(given, table, tokenizer, *columns)
    classifier = load_classifier(base, len(labels), id2label=dict(enumerate(labels)))
    _load(classifier, given)
    classifier.to(place)
    rows = probabilities(classifier, splits, int(tokenizer.pad_token_id), batch_size)
    texts = splits[names[0]].texts
    lines = _lines(texts, labels, rows, head)
    if out is None:
        for line in lines:
            sys.stdout.write(line)
        sys.stdout.flush()
        return
    with written_beside(out) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)
    note(f"{len(texts)} rows written to {out}")


# -- which adapters


def _meta(path: Path) -> dict[str, Any]:
    from tanzaku.store import META, read_meta

    inside = sorted(str(each.parent) for each in path.glob(f"adapters/*/{META}"))
    if inside and not (path / META).exists():
        raise TanzakuError(f"{path} holds a run and is no adapter; its adapters are {listed(inside)}")
    meta = read_meta(path)
    wanted = {"labels": list, "model": str, "text": str, "max_length": int}
    for key, kind in wanted.items():
        if not isinstance(meta.get(key), kind):
            raise TanzakuError(
                f"{path} does not say its {key}; expected an adapter that tanzaku train or compare has written"
            )
    return {"text_pair": None, **meta}


def _check_fit(adapters: Sequence[_Adapter], model: str | None, text: str | None, text_pair: str | None) -> None:
    """Adapters in one pass have one base, one list of labels and the same columns; a flag overrules what they say."""
    one_by_one = "predict with them one by one"
    rules = [
        ("model", model, "base models", f"{one_by_one}, or say with --model where the one base of both is"),
        ("labels", None, "labels", one_by_one),
        ("text", text, "text columns", "say with --text which to read"),
        ("text_pair", text_pair, "columns of a second text", f"{one_by_one}, or say with --text-pair which to read"),
    ]
    expected, *others = adapters
    for adapter in others:
        for key, flag, what, fix in rules:
            mine, theirs = expected.meta[key], adapter.meta[key]
            if flag is None and mine != theirs:
                found = f"{expected.path} has {_shown(mine)}, {adapter.path} has {_shown(theirs)}"
                if key == "labels":
                    odd = sorted({*map(str, mine)} ^ {*map(str, theirs)})
                    found += f"; they differ in {listed(odd)}" if odd else "; their order differs"
                raise TanzakuError(f"adapters with different {what}: {found}; {fix}")


def _shown(value: Any) -> str:
    return listed(map(str, value)) if isinstance(value, list) else "none" if value is None else repr(value)


# -- what goes in


def _encoded(
    adapters: Sequence[_Adapter],
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    text_pair: str | None,
) -> dict[str, Split]:
    """By adapter, the rows cut at its own length."""
    from tanzaku.tasks.classification import encode_split

    lengths = list(dict.fromkeys(adapter.meta["max_length"] for adapter in adapters))
    splits = {length: encode_split(table, "data", tokenizer, text, text_pair, None, None, length) for length in lengths}
    for length, split in splits.items():
        if split.truncated:
            names = [adapter.name for adapter in adapters if adapter.meta["max_length"] == length]
            whose = f" for {listed(names)}" if len(lengths) > 1 else ""
            note(f"{split.truncated} of {len(split)} texts were cut at {length} tokens{whose}")
    return {adapter.name: splits[adapter.meta["max_length"]] for adapter in adapters}


def _load(model: PreTrainedModel, adapters: Sequence[_Adapter]) -> None:
    """Hang the adapters on the model, and say what is not as one might expect."""
    from tanzaku.store import load

    for adapter in adapters:
        method = load(model, adapter.path, adapter.name).method
        if len(adapters) > 1 and adapter.name != adapter.path.name:
            note(f"{adapter.name} is {adapter.path}")
        if len(adapters) > 1 and not method.shares_batch:
            note(f"{adapter.name} ({method.name}) changes every weight: it takes a pass of its own")


# -- what comes out


def _check_out(out: Path | None, data: str) -> None:
    if out is None:
        return
    if out.suffix not in _SUFFIXES:
        near = nearest(out.suffix, _SUFFIXES)
        raise TanzakuError(f"--out {out} ends with {out.suffix or 'no suffix'}{near}; expected .tsv or .jsonl")
    if out.is_dir() or not out.parent.is_dir():
        raise TanzakuError(f"--out {out}: expected a file in a directory that exists")
    if out.exists() and Path(data).exists() and out.samefile(data):
        raise TanzakuError(f"--out {out} is the file that --data reads; choose another")


def _head(names: Sequence[str], labels: Sequence[str], suffix: str) -> list[str] | None:
    """The names of the columns of a TSV; None for JSON lines."""
    if suffix != ".tsv":
        return None
    head = ["text"]
    for name in names:
        whose = "" if len(names) == 1 else f"_{name}"
        head += [f"label{whose}", *(f"p{whose}_{label}" for label in labels)]
    twice = [column for column, times in Counter(head).items() if times > 1]
    if twice:
        raise TanzakuError(f"two columns would be {twice[0]!r}; rename an adapter's directory, or use --out X.jsonl")
    return head


def _lines(
    texts: Sequence[str],
    labels: Sequence[str],
    rows: Iterator[dict[str, list[float]]],
    head: Sequence[str] | None,
) -> Iterator[str]:
    """A header and a line a row in TSV, or, without a header, an object a row in JSON lines."""

    def tsv(cells: Sequence[str]) -> str:
        line = io.StringIO()
        csv.writer(line, delimiter="\t", lineterminator="\n").writerow(cells)
        return line.getvalue()

    if head is not None:
        yield tsv(head)
    for text, row in zip(texts, rows, strict=True):
        best = {name: labels[of_one.index(max(of_one))] for name, of_one in row.items()}
        if head is not None:
            cells = [[best[name], *(f"{p:.6f}" for p in of_one)] for name, of_one in row.items()]
            yield tsv([text, *(cell for each in cells for cell in each)])
            continue
        found: dict[str, Any] = {
            name: {
                "label": best[name],
                "probabilities": {label: round(p, 6) for label, p in zip(labels, of_one, strict=True)},
            }
            for name, of_one in row.items()
        }
        one = next(iter(found.values()))
        yield json.dumps({"text": text, **(one if len(found) == 1 else {"adapters": found})}, ensure_ascii=False) + "\n"
