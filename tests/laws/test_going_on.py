"""A job that goes on from a saved adapter begins with what is in the file, whatever the method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from variants import VARIANTS, bamboo, method

from close import RUN, assert_close, close
from tanzaku.methods import METHODS
from tanzaku.storage.starts import keeps_head, method_from
from tanzaku.storage.store import checksum
from tanzaku.tasks.classification import Classification
from tanzaku.tasks.task import TaskData
from tanzaku.train.results import Job, JobResult
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

ALONE = [name for name, each in METHODS.items() if not each.uses_others]
STILL = {"learning_rate": 1e-12, "epochs": 1}
DATA = task(train=8)


def trained(job: Job, out: Path, data: TaskData = DATA, model: Any = None) -> tuple[JobResult, dict[str, torch.Tensor]]:
    meta = {"task": "classification", **data.task.to_json()}
    model = model or bamboo(num_labels=len(data.task.classes))
    [result] = train_jobs(model, data, [job], out=out, meta=meta, workers=1)
    assert (result.status, result.error) == ("done", None)
    return result, load_file(out / "adapters/a/adapter_model.safetensors")


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings.model_validate({"epochs": 3, "learning_rate": 0.02, "batch_size": 2, **changes})


@pytest.mark.parametrize("name", ALONE)
def test_it_begins_where_the_other_ended(name: str, tmp_path: Path) -> None:
    first = Job("a", method(name, next(iter(VARIANTS[name]))), settings())
    before, kept = trained(first, tmp_path / "first")
    folder = tmp_path / "first/adapters/a"
    on = Job("a", method_from(folder), settings(**STILL), init_from=folder)
    after, found = trained(on, tmp_path / "still")
    assert_close(after.valid, before.valid, RUN)
    for key, value in kept.items():
        assert_close(found[key].float(), value.float(), RUN, at=key)
    assert after.init_from == {"adapter": "a", "sha256": checksum(folder)}
    more = replace(on, settings=settings(epochs=2))
    result, moved = trained(more, tmp_path / "more")
    assert any(not close(moved[key].float(), value.float(), RUN) for key, value in kept.items() if key in moved)
    assert result.epochs[0].train_loss < before.epochs[0].train_loss


def test_other_labels_have_a_new_head(tmp_path: Path) -> None:
    """And what is not the head goes on."""
    _, kept = trained(Job("a", method("lora"), settings()), tmp_path / "first")
    folder = tmp_path / "first/adapters/a"
    for names in (("c", "d"), ("a", "b", "c")):
        data = replace(DATA, task=Classification(names))
        assert not keeps_head(folder, data.task) and keeps_head(folder, DATA.task)
        on = Job("a", method_from(folder), settings(**STILL), init_from=folder)
        model = bamboo(num_labels=2)  # whose weights are those of the first, but for the head
        model.score = torch.nn.Linear(model.score.in_features, len(names), bias=False)
        model.config.num_labels = len(names)
        head = {key: p.detach().clone() for key, p in model.named_parameters() if key.startswith("score.")}
        _, found = trained(on, tmp_path / "-".join(names), data, model)
        own = {key: value for key, value in found.items() if ".score." in key}
        for key, value in own.items():
            assert_close(value, head[key.removeprefix("base_model.model.")], RUN)
        assert own and all(
            torch.allclose(found[key], value, atol=1e-6) for key, value in kept.items() if key not in own
        )
