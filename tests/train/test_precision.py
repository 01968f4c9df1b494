"""`precision: auto` is bf16 where its products are much faster, and one precision from then on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tanzaku as tz
from models import tiny
from tanzaku.engine import precision
from tanzaku.engine.onednn import Speeds, Times
from tanzaku.engine.precision import precision_for
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task


def products(monkeypatch: pytest.MonkeyPatch, bf16: float | None, fp32: float = 10.0) -> None:
    """Have each type's products take so long; None: there are none in bf16."""
    took = {torch.bfloat16: bf16 or 0.0, torch.float32: fp32}
    monkeypatch.setattr(precision, "available", lambda _kind: bf16 is not None)
    monkeypatch.setattr(precision, "speeds", lambda kind: Speeds(*[Times(took[kind], 99.0, 99.0)] * 2))


@pytest.mark.parametrize(
    ("bf16", "chosen"), [(2.0, "bf16"), (5.9, "bf16"), (6.1, "fp32"), (20.0, "fp32"), (None, "fp32")]
)
def test_the_faster_one_is_chosen_by_a_margin(bf16: Any, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products(monkeypatch, bf16)
    assert precision_for(torch.device("cpu"), torch.bfloat16) == chosen
    assert precision_for(torch.device("cpu"), torch.float32) == "fp32", "weights would be cast at every product"
    assert precision_for(torch.device("mps"), torch.bfloat16) == "fp32"


@pytest.mark.parametrize(("bf16", "chosen"), [(2.0, "bf16"), (20.0, "fp32")])
def test_a_job_says_what_it_had(bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products(monkeypatch, bf16)
    job = Job("lora", tz.LoRA(r=2), TrainSettings(epochs=1, precision="auto"))
    (result,) = train_jobs(tiny("llama", num_labels=2).bfloat16(), task(), [job])
    assert result.status == "done" and result.train_settings["precision"] == chosen
    assert job.settings.precision == "auto"
