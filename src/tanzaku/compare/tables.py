"""The learning curves of a comparison as one flat Parquet file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tanzaku.files import written_beside

_TEXT, _WHOLE = ("candidate", "method", "job", "stage"), ("repeat", "fold", "seed", "epoch")
_METRICS = ("loss", "accuracy", "roc_auc", "macro_f1")
_FIGURES = ("train_loss", "learning_rate", *(f"valid_{metric}" for metric in _METRICS), "seconds")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in _TEXT]
    + [(name, pa.int64()) for name in _WHOLE]
    + [(name, pa.float64()) for name in _FIGURES]
)


def write_epochs(results: Mapping[str, Any], path: Path) -> None:
    """Write a row for every epoch of every job, in the order of `jobs`.

    Args:
        results: the content of results.json.

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
            **{f"valid_{metric}": epoch["valid"].get(metric) for metric in _METRICS},
        }
        for job in results["jobs"]
        for epoch in job["epochs"]
    ]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    with written_beside(path) as beside, beside.open("wb") as file:
        pq.write_table(table, file)
