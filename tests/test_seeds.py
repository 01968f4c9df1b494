"""Random generators: what has a seed of its own draws by it and leaves every generator as it was, those of GPUs too."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tanzaku as tz
from models import NEEDED, tiny
from models import attach as attach_one
from tanzaku.methods import METHODS
from tanzaku.models.loading import load_base
from tanzaku.support.seeds import seeded
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

SETTINGS: dict[str, dict[str, Any]] = {**NEEDED, "adalora": {"init_r": 2, "target_r": 1}}
ENCODER = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2, "encoder_dropout": 0.5}


def attach(model: Any, folder: Path) -> None:
    for name, method in METHODS.items():
        attach_one(model, method.from_settings(SETTINGS.get(name, {})), name, seed=3)


def save_and_load(model: Any, folder: Path) -> None:
    attach(model, folder)
    for name in METHODS:
        tz.save(model, name, folder / name)
        tz.load(model, folder / name, f"{name}-2")


def combine(model: Any, folder: Path) -> None:
    for number, name in enumerate("ab"):
        tz.attach(model, tz.LoRA(r=2), name, seed=number)
    tz.combine(model, ["a", "b"], "c", how="dare_ties", density=0.5, seed=3, copies="mean")


def merge(model: Any, folder: Path) -> None:
    tz.attach(model, tz.LoRA(r=2), "a", seed=0)
    tz.merge(model, "a")
    tz.unmerge(model)


def train(model: Any, folder: Path) -> None:
    """With what draws in each step: dropout, and an LSTM that drops between its layers by itself."""
    settings = TrainSettings(epochs=1, batch_size=2)
    methods = {"a": tz.LoRA(r=2, lora_dropout=0.5), "b": tz.PTuning(num_virtual_tokens=2, **ENCODER), "c": tz.Full()}
    results = train_jobs(model, task(), [Job(name, m, settings) for name, m in methods.items()], out=folder, workers=1)
    assert [result.status for result in results] == ["done"] * 3


def load_a_base(model: Any, folder: Path) -> None:
    model.save_pretrained(folder / "base")
    load_base(str(folder / "base"), type(model), num_labels=3)


@pytest.mark.parametrize("work", [attach, save_and_load, combine, merge, train, load_a_base], ids=lambda f: f.__name__)
def test_every_generator_is_left_as_it_was(
    work: Callable[[Any, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeding all of torch seeds GPUs too, at once or as soon as there is one in use: nobody asks for that."""
    model = tiny("llama", num_labels=2, attention_dropout=0.3)

    def refuse(*_: Any) -> None:
        raise AssertionError("generators of others were seeded")

    for module in (torch, torch.random, torch.cuda, torch.cuda.random, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refuse)

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), [str(each) for each in np.random.get_state()]]

    before = states()
    work(model, tmp_path)
    assert states() == before


def test_a_seed_reaches_the_devices_it_is_for_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(torch.Generator().manual_seed(number) for number in range(3))
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    generators = (torch.default_generator, *gpus)
    before = [generator.get_state().tolist() for generator in generators]
    with pytest.raises(ZeroDivisionError), seeded(7, [torch.device(d) for d in ("cpu", "cuda", "cuda:0", "meta")]):
        assert [generator.initial_seed() for generator in generators[1:]] == [7, 1, 7]
        drawn = [torch.rand(1, generator=generator).item() for generator in generators]
        assert drawn[0] == drawn[1] == drawn[3] != drawn[2]
        gpus[1].set_state(torch.tensor(before[2], dtype=torch.uint8))
        raise ZeroDivisionError
    assert [generator.get_state().tolist() for generator in generators] == before
    with seeded(None):
        assert torch.get_rng_state().tolist() == before[0]
