"""epochs.parquet: a row for every epoch of every job, with the columns that docs/results.md lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample import sample

from tanzaku.compare.tables import write_epochs as write
from tanzaku.errors import TanzakuError
from tanzaku.tasks.classification import Classification


def write_epochs(results: dict[str, Any], path: Path) -> None:
    write(results, [metric.name for metric in Classification.metrics], path)


def test_a_row_an_epoch_in_the_order_of_jobs(tmp_path: Path) -> None:
    results = sample(repeats=1)
    write_epochs(results, tmp_path / "epochs.parquet")
    table = pq.read_table(tmp_path / "epochs.parquet")

    text, whole = ["candidate", "method", "job", "stage"], ["repeat", "fold", "seed", "epoch"]
    figures = ["train_loss", "learning_rate", "valid_loss", "valid_roc_auc", "valid_accuracy", "valid_macro_f1"]
    assert table.column_names == [*text, *whole, *figures, "seconds"]
    types = [pa.string()] * 4 + [pa.int64()] * 4 + [pa.float64()] * 7
    assert table.schema.types == types

    rows = table.to_pylist()
    told = [(job, epoch) for job in results["jobs"] for epoch in job["epochs"]]
    assert len(rows) == len(told) > 100
    assert {row["stage"] for row in rows} == {"search", "measure"}
    for row, (job, epoch) in zip(rows, told, strict=True):
        assert (row["job"], row["candidate"], row["fold"]) == (job["name"], job["candidate"], job["fold"])
        assert (row["epoch"], row["train_loss"], row["seconds"]) == (
            epoch["epoch"],
            epoch["train_loss"],
            epoch["seconds"],
        )
        assert row["valid_macro_f1"] == epoch["valid"]["macro_f1"]
    # A trial of the search is no candidate, but has its entry's method.
    assert {row["method"] for row in rows if row["stage"] == "search"} == {"lora"}
    assert {row["method"] for row in rows if row["candidate"] == "ia3"} == {"ia3"}


def test_no_figure_is_null(tmp_path: Path) -> None:
    results = sample(candidates=1, repeats=1, folds=1) | {"search": []}
    results["jobs"] = [job for job in results["jobs"] if job["stage"] == "measure"]
    results["jobs"][0]["epochs"][0] |= {"valid": {"accuracy": None}, "train_loss": None}
    write_epochs(results, tmp_path / "epochs.parquet")
    first = pq.read_table(tmp_path / "epochs.parquet").to_pylist()[0]
    assert [first[key] for key in ("train_loss", "valid_accuracy", "valid_loss")] == [None, None, None]


def test_nothing_trained_is_an_empty_table(tmp_path: Path) -> None:
    write_epochs({"candidates": [], "jobs": [], "search": None}, tmp_path / "epochs.parquet")
    table = pq.read_table(tmp_path / "epochs.parquet")
    assert (table.num_rows, table.num_columns) == (0, 15)


def test_what_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "epochs.parquet"
    write_epochs(sample(candidates=2, repeats=1), path)
    before = path.read_bytes()
    broken = sample(candidates=2, repeats=1)
    broken["jobs"][-1]["epochs"][0]["train_loss"] = "much"
    with pytest.raises(pa.ArrowInvalid):
        write_epochs(broken, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(TanzakuError, match=r"cannot write .*epochs\.parquet: No such file"):
        write_epochs(sample(candidates=1, repeats=1), tmp_path / "none" / "epochs.parquet")
