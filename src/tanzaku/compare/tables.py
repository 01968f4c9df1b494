"""The learning curves of a comparison as one flat Parquet file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tanzaku.files.writing import written_beside

_TEXT, _WHOLE = ("candidate", "method", "job", "stage"), ("repeat", "fold", "seed", "epoch")


def write_epochs(results: Mapping[str, Any], metrics: Sequence[str], path: Path) -> None:
    """Write a row for every epoch of every job, in the order of `jobs`.

    Args:
        results: the content of results.json. metrics: of the task, by name.

    Raises:
        TanzakuError: the file cannot be written.
    """
    methods = {entry["name"]: entry["method"] for entry in results["candidates"]}
    for entry in results.get("search") or ():
        methods |= {trial["name"]: entry["method"] for trial in entry["trials"]}
    rows = [
        {
            "candidate": job["candidate"],
            "method": methods.get(job["candidate"]),
            "job": job["name"],
            **{key: job[key] for key in ("stage", "repeat", "fold", "seed")},
            **{key: epoch[key] for key in ("epoch", "train_loss", "learning_rate", "seconds")},
            **{f"valid_{metric}": epoch["valid"].get(metric) for metric in metrics},
        }
        for job in results["jobs"]
        for epoch in job["epochs"]
    ]
    figures = ("train_loss", "learning_rate", *(f"valid_{metric}" for metric in metrics), "seconds")
    kinds = {pa.string(): _TEXT, pa.int64(): _WHOLE, pa.float64(): figures}
    schema = pa.schema([(name, kind) for kind, names in kinds.items() for name in names])
    table = pa.Table.from_pylist(rows, schema=schema)
    with written_beside(path) as beside, beside.open("wb") as file:
        pq.write_table(table, file)
