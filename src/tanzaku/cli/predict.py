"""`tanzaku predict`: labels and probabilities of texts, from a trained adapter."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tanzaku.errors import TanzakuError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tanzaku.tasks.classification import Split

_SUFFIXES = (".tsv", ".jsonl")


def predict(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="directory of an adapter, from train or compare")],
    data: Annotated[str, typer.Option(metavar="TEXT", help="rows to label: .tsv, .csv, .jsonl, .parquet or a dataset")],
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="column of the text (as in training)")] = None,
    text_pair: Annotated[str | None, typer.Option(metavar="TEXT", help="column of a second text")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="a .tsv or .jsonl file (standard output)")] = None,
    model: Annotated[str | None, typer.Option(metavar="TEXT", help="where the base model is now")] = None,
    batch_size: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="rows a step")] = 8,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="where the model runs")] = "auto",
) -> None:
    """Label texts with a trained adapter.

    One line a row: the text, its label and the probability of each label.
    """
    _check_out(out, data)
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise TanzakuError(f"--device is {device!r}, expected auto, cpu, cuda or mps")
    from tanzaku.cli.machine import device_named, quieten
    from tanzaku.models import load_classifier, load_tokenizer
    from tanzaku.store import load, read_meta
    from tanzaku.tasks.classification import encode_split
    from tanzaku.tasks.data import read_table

    quieten()
    meta = _checked(read_meta(adapter), adapter)
    place = device_named(device)
    labels: list[str] = meta["labels"]
    base = model or meta["model"]
    first, second = text or meta["text"], text_pair or meta["text_pair"]
    table = read_table(data)
    for column in (first, second):
        if column is not None:
            table.column(column)
    tokenizer = load_tokenizer(base, on_progress=_note)
    split = encode_split(table, "data", tokenizer, first, second, None, None, meta["max_length"])
    if split.truncated:
        _note(f"{split.truncated} of {len(split)} texts were cut at {meta['max_length']} tokens")
    classifier = load_classifier(base, len(labels), id2label=dict(enumerate(labels)))
    load(classifier, adapter)
    classifier.to(place)
    rows = _probabilities(classifier, split, int(tokenizer.pad_token_id), batch_size)
    if out is None:
        for line in _lines(split.texts, labels, rows, ".tsv"):
            sys.stdout.write(line)
        sys.stdout.flush()
        return
    beside = out.with_name(f".{out.name}.partial")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.writelines(_lines(split.texts, labels, rows, out.suffix))
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    _note(f"{len(split)} rows written to {out}")


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


def _checked(meta: dict[str, Any], adapter: Path) -> dict[str, Any]:
    wanted = {"labels": list, "model": str, "text": str, "max_length": int}
    for key, kind in wanted.items():
        if not isinstance(meta.get(key), kind):
            raise TanzakuError(
                f"{adapter} does not say its {key}; expected an adapter that tanzaku train or compare has written"
            )
    return {"text_pair": None, **meta}


def _probabilities(model: PreTrainedModel, split: Split, pad_token_id: int, batch_size: int) -> Iterator[list[float]]:
    """Of each label, row by row."""
    import inspect

    import torch

    from tanzaku.host import activate
    from tanzaku.tasks.classification import collate

    model.eval()
    activate(model, "default")
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    for start in range(0, len(split), batch_size):
        batch = collate(split.examples[start : start + batch_size], pad_token_id, labels=False)
        if not takes_types:
            batch.pop("token_type_ids", None)
        with torch.no_grad():
            logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits
        yield from logits.double().softmax(-1).tolist()


def _lines(texts: list[str], labels: list[str], rows: Iterator[list[float]], suffix: str) -> Iterator[str]:
    """A header and a line a row in TSV, or an object a row in JSON lines."""

    def tsv(*cells: str) -> str:
        line = io.StringIO()
        csv.writer(line, delimiter="\t", lineterminator="\n").writerow(cells)
        return line.getvalue()

    if suffix == ".tsv":
        yield tsv("text", "label", *(f"p_{label}" for label in labels))
    for text, row in zip(texts, rows, strict=True):
        label = labels[row.index(max(row))]
        if suffix == ".tsv":
            yield tsv(text, label, *(f"{p:.6f}" for p in row))
        else:
            probabilities = {name: round(p, 6) for name, p in zip(labels, row, strict=True)}
            found = {"text": text, "label": label, "probabilities": probabilities}
            yield json.dumps(found, ensure_ascii=False) + "\n"


def _note(line: str) -> None:
    print(line, file=sys.stderr)
