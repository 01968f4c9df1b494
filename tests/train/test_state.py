"""The state of a job under way: one that goes on from it ends with the weights of one that nobody cut off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tanzaku as tz
from close import RUN, assert_close
from models import NEEDED, tiny, with_parts
from tanzaku.core.method import Method
from tanzaku.methods import METHODS
from tanzaku.train import state as states
from tanzaku.train.results import EpochRecord, Job, JobResult
from tanzaku.train.scheduler import JobScheduler, Silent, train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task
from tiers import costly

# Every setting that leaves something behind from one step to the next.
TRAIN: dict[str, Any] = {
    "epochs": 4,
    "learning_rate": 0.05,
    "batch_size": 2,
    "accumulation": 3,
    "schedule": "cosine",
    "warmup": 0.3,
    "weight_decay": 0.1,
    "restore_best": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "lora_dropout": 0.3},
    "adalora": {"init_r": 3, "target_r": 1, "tinit": 2, "tfinal": 2},
    "p_tuning": {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.3},
    "prefix_tuning": {"prefix_projection": True},
    **NEEDED,
}


class Cut(BaseException):
    """A kill: nothing in the loop catches it."""


class CutAt(Silent):
    """Ends everything when a job has closed an epoch, or in the step after it."""

    def __init__(self, epoch: int, in_step: bool = False):
        self.epoch, self.in_step, self.closed = epoch, in_step, 0

    def epoch_done(self, job: Job, record: EpochRecord) -> None:
        self.closed = record.epoch
        if record.epoch == self.epoch and not self.in_step:
            raise Cut

    def step_done(self, job: Job, step: int, steps: int, loss: float) -> None:
        if self.closed == self.epoch and self.in_step:
            raise Cut


def model_of() -> PreTrainedModel:
    """One that draws random numbers, too."""
    return tiny("bert", "cls", num_labels=2, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)


def a_job(method: str = "lora", **train: Any) -> Job:
    settings = TrainSettings.model_validate({**TRAIN, **train})
    options = SETTINGS.get(method, {})
    return Job(method, METHODS[method].from_settings(options), settings)


def run(
    jobs: list[Job], out: Path, model: Callable[[], PreTrainedModel] = model_of, **options: Any
) -> tuple[list[JobResult], dict[str, dict[str, torch.Tensor]]]:
    jobs = with_parts(model(), jobs, out)
    results = train_jobs(model(), task(train=11, test=4), jobs, out=out, states=out / "states", **options)
    assert [(r.status, r.error) for r in results] == [("done", None)] * len(jobs)
    assert not any((out / "states").iterdir()), "what has ended needs no state"
    return results, {r.name: load_file(out / str(r.adapter) / "adapter_model.safetensors") for r in results}


def cut(jobs: list[Job], out: Path, epoch: int, in_step: bool = False, **options: Any) -> None:
    with pytest.raises(Cut):
        run(jobs, out, observer=CutAt(epoch, in_step), **options)
    assert any((out / "states").iterdir())


def figures_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["tanzaku"])["figures"]
    return found


def without_clock(result: JobResult) -> dict[str, Any]:
    found = result.to_json()
    for key in ("seconds", "peak_memory_bytes", "step_bytes"):
        found.pop(key)
    for epoch in found["epochs"]:
        epoch.pop("seconds")
    return found


# Those whose training is not the plain loop alone, and some that are as most are.
_PARTS = ("training_state", "resume", "after_step", "prepare", "penalty", "calibrate", "rate_of")
OWN = {n for n, kind in METHODS.items() if any(getattr(kind, part) is not getattr(Method, part) for part in _PARTS)}
OWN |= {name for name, kind in METHODS.items() if kind.draws}
OWN |= {"lora", "full", "head", "prefix_tuning", "p_tuning", "llama_adapter"}
FEW = [name for name in METHODS if name in OWN]


@pytest.mark.parametrize("method", costly(FEW, [name for name in METHODS if name not in FEW]))
def test_a_job_that_goes_on_ends_as_if_it_had_not_been_cut_off(method: str, tmp_path: Path) -> None:
    """Its figures, too: cut off in the middle of an epoch, at the end of one, and after the last."""
    model = (lambda: tiny("llama", num_labels=2)) if method == "llama_adapter" else model_of
    job = a_job(method)
    expected, whole = run([job], tmp_path / "whole", model)
    cut([job], tmp_path / "cut", 1, in_step=True, model=model)
    cut([job], tmp_path / "cut", 3, model=model)
    cut([job], tmp_path / "cut", 4, model=model)
    (found,), weights = run([job], tmp_path / "cut", model)
    assert found.seconds >= sum(epoch.seconds for epoch in found.epochs) > 0
    assert_close(without_clock(found), without_clock(expected[0]), RUN, scale=1)
    assert_close(weights, whole, RUN)


def test_jobs_that_share_steps_go_on_together(tmp_path: Path) -> None:
    """Each from its own epoch; batches are shared in another way then, so weights are equal to rounding."""
    jobs = [replace(a_job("lora", epochs=1 + n, batch_size=n, seed=n), name=f"lora-{n}") for n in (1, 2, 3)]
    jobs += [a_job("ia3"), a_job("adalora", accumulation=1)]
    _, whole = run(jobs, tmp_path / "whole", rows_per_step=5)
    cut(jobs, tmp_path / "cut", 2, rows_per_step=5)
    assert len({len(figures_of(path)["epochs"]) for path in (tmp_path / "cut" / "states").iterdir()}) > 1
    left = [job for job in jobs if not (tmp_path / "cut" / "adapters" / job.name).exists()]
    _, found = run(left, tmp_path / "cut", rows_per_step=5)
    assert_close(found, {name: whole[name] for name in found}, RUN)


def test_patience_and_the_best_weights_outlive_a_kill(tmp_path: Path) -> None:
    job = a_job("lora", epochs=30, learning_rate=0.3, patience=3, accumulation=1)
    (expected,), whole = run([job], tmp_path / "whole")
    assert expected.best_epoch is not None and expected.restored_epoch == expected.best_epoch
    assert len(expected.epochs) == expected.best_epoch + 3 < 30, "the task must get worse for this test"
    cut([job], tmp_path / "cut", expected.best_epoch + 2)
    (found,), weights = run([job], tmp_path / "cut")
    assert_close(without_clock(found), without_clock(expected), RUN, scale=1)
    assert_close(weights, whole, RUN)


def test_half_precision_keeps_its_scale(tmp_path: Path) -> None:
    job = a_job("lora", precision="fp16", accumulation=1)
    cut([job], tmp_path, 2)
    figures = figures_of(tmp_path / "states" / "lora.safetensors")
    assert figures["scaler"]["scale"] > 1 and figures["schedule"]["last_epoch"] == figures["step"] == 12


def test_a_job_at_a_rung_waits_there_again(tmp_path: Path) -> None:
    job = replace(a_job("lora"), rungs=(1, 3))
    model, data = model_of(), task(train=11)
    with JobScheduler(model, data, states=tmp_path) as scheduler:
        scheduler.add([job])
        scheduler.run()
        assert scheduler.active_jobs["lora"].waiting
    with JobScheduler(model, data, states=tmp_path) as scheduler:
        scheduler.add([job])
        scheduler.run()
        active = scheduler.active_jobs["lora"]
        assert active.waiting and active.epoch == 1 and len(scheduler.results["lora"].epochs) == 1
        scheduler.proceed()
        scheduler.run()
        assert active.waiting and active.epoch == 3


# -- states that do not fit


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("begun")
    cut([a_job()], out, 2)
    return out


def assert_refused(out: Path, to: Path, *parts: str, **changes: Any) -> None:
    """Named in the error; neither the state nor the model is changed."""
    to = shutil.copytree(out, to / "copy")
    before = {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}
    given = {"job": a_job(), "model": model_of(), "data": task(train=11, test=4), **changes}
    with pytest.raises(tz.TanzakuError) as caught:
        train_jobs(given["model"], given["data"], [given["job"]], states=to / "states")
    assert "\n" not in str(caught.value)
    for part in ("lora.safetensors", *parts):
        assert part in str(caught.value)
    assert tz.adapters(given["model"]) == []
    assert {path: path.read_bytes() for path in to.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"job": a_job(learning_rate=0.04)}, "another learning_rate (0.05, now 0.04)"),
        ({"job": replace(a_job(), method=tz.LoRA(r=3, lora_dropout=0.3))}, "another lora.r (2, now 3)"),
        ({"job": replace(a_job("ia3"), name="lora")}, "another method ('lora', now 'ia3')"),
        ({"data": task(train=12, test=4)}, "another data;"),
        ({"model": tiny("bert", num_labels=2, seed=1, hidden_dropout_prob=0.2)}, "another base model;"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_state_of_another_run_is_refused_by_name(
    begun: Path, tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    assert_refused(begun, tmp_path, part, "remove it to begin anew", **change)


def test_the_state_of_another_version_is_refused(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "VERSION", "9.9")
    assert_refused(begun, tmp_path, "another version of tanzaku", "now '9.9'")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_damaged_state_is_refused(begun: Path, tmp_path: Path, keep: float) -> None:
    path = shutil.copytree(begun, tmp_path / "damaged") / "states" / "lora.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert_refused(tmp_path / "damaged", tmp_path, "is damaged", "remove it to train 'lora' anew")


# -- what a state costs


def test_only_the_last_epoch_is_kept(begun: Path) -> None:
    (path,) = (begun / "states").iterdir()
    assert len(figures_of(path)["epochs"]) == 2
    kinds = [key.partition(".")[0] for key in load_file(path)]
    trained = kinds.count("weights")
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "weights": trained,
        "optimizer": 3 * trained,
        "best": trained,
    }


def test_a_full_disk_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    [result] = train_jobs(model_of(), task(train=11), [a_job()], states=tmp_path)
    assert result.status == "done" and "cannot be resumed: its state takes" in str(result.note)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("takes", "expected"),
    [(2.0, [0.0, 22.0, 44.0]), (0.5, [4.5 * n for n in range(11)])],
)
def test_large_states_take_a_tenth_of_the_time(
    takes: float, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an epoch every four seconds, a state that takes two is written again after twenty; a small one each time."""
    clock = [0.0]
    written: list[float] = []

    def slow(active: Any, folder: Path) -> None:
        written.append(clock[0])
        clock[0] += takes

    monkeypatch.setattr(states.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(states, "save_state", slow)
    active: Any = type("", (), {"job": a_job()})()
    keeper = states.States(tmp_path)
    while clock[0] < 49:
        keeper.keep(active)
        clock[0] += 4
    assert written == expected
