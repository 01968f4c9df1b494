"""Events: what a run tells, and the file that keeps it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tanzaku as tz
from models import tiny
from tanzaku.train.events import Emitter, Event, EventLog, read_events
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings
from task_data import task

FAST = TrainSettings(epochs=2, batch_size=2, learning_rate=0.02)


def job(name: str, **changes: Any) -> Job:
    return Job(name, tz.LoRA(r=2), FAST.model_copy(update=changes))


def log_of(path: Path, said: list[str] | None = None) -> EventLog:
    return EventLog(path, ([] if said is None else said).append)


def test_a_run_is_told_and_kept_as_it_happens(tmp_path: Path) -> None:
    path, heard = tmp_path / "events.jsonl", list[Event]()
    with log_of(path) as log:

        def kept_by_now(event: Event) -> None:
            kept = read_events(path)
            assert kept and (event.kind == "step" or kept[-1].kind == event.kind), "the line is there at once"

        events = Emitter(heard.append, log, kept_by_now)
        with events.run("train", resumed=False) as ending:
            results = train_jobs(
                tiny("llama", num_labels=2),
                task(train=6),
                [job("a"), job("b", learning_rate=math.nan)],
                observer=events,
            )
            ending["status"] = "done"
    of_a = [event.kind for event in heard if event.job == "a"]
    assert of_a == ["job_started", *(["step"] * 3 + ["epoch"]) * 2, "job_done"]
    kept = read_events(path)
    assert [kept[0].kind, kept[-1].kind] == ["run_started", "run_done"]
    started, *_, done = (event for event in kept if event.job == "a")
    assert started.figures["method"] == "lora" and started.figures["method_settings"]["r"] == 2
    assert started.figures["steps"] == 6 and started.figures["trainable_parameters"] > 0
    epochs = [event.figures["valid"] for event in kept if event.job == "a" and event.kind == "epoch"]
    assert epochs == [record.valid for record in results[0].epochs]
    assert done.figures["status"] == "done" and done.figures["valid"] == results[0].valid
    assert "predictions" not in done.figures and "epochs" not in done.figures
    [failed] = (event.figures for event in kept if event.job == "b" and event.kind == "job_done")
    assert failed["status"] == "failed" and failed["error"] == results[1].error
    assert [event.time for event in kept] == sorted(event.time for event in kept)


def test_two_steps_a_second_are_written_of_each_job(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with log_of(path) as log:
        for tenth in range(20):
            for name in "ab":
                log(Event("step", name, {"step": tenth, "loss": math.nan}, time=1000 + tenth / 10))
    assert [(e.job, e.figures["step"]) for e in read_events(path)] == [(j, s) for s in (0, 5, 10, 15) for j in "ab"]
    assert {e.figures["loss"] for e in read_events(path)} == {None}


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_line_that_a_kill_cut_off_is_left_out_and_the_file_goes_on(tmp_path: Path, left: int) -> None:
    path = tmp_path / "events.jsonl"
    with log_of(path) as log:
        for name in "ab":
            log(Event("note", name, {"text": "短冊"}))
    first, second = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + second[:left])
    assert [event.job for event in read_events(path)] == ["a"]
    with log_of(path) as log:
        log(Event("note", "c", {"text": "短冊"}))
    assert [event.job for event in read_events(path)] == ["a", "c"]
    assert read_events(path)[1].figures == {"text": "短冊"}


def test_ends_of_jobs_that_a_kill_left_without_a_line_are_added_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    records = {name: {"status": "done", "epochs": [], "seconds": 1.0} for name in "ab"}
    with log_of(path) as log:
        log(Event("job_done", "a", {"status": "done"}))
        log(Event("job_done", "b", {"status": "interrupted"}))
    for _ in range(2):
        with log_of(path) as log:
            log.complete(records)
    found = [(event.job, event.figures["status"]) for event in read_events(path)]
    assert found == [("a", "done"), ("b", "interrupted"), ("b", "done")]


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("no device that is always full")
    path, said = tmp_path / "events.jsonl", list[str]()
    path.symlink_to(full)
    with log_of(path, said) as log:
        [result] = train_jobs(tiny("llama", num_labels=2), task(train=6), [job("a")], observer=Emitter(log))
    assert result.status == "done"
    assert said == [f"cannot write {path}: No space left on device; the run goes on without it"]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    said: list[str] = []
    with log_of(tmp_path / "none" / "events.jsonl", said) as log:
        log(Event("note"))
        log.complete({"a": {"status": "done"}})
    assert len(said) == 1 and "No such file" in said[0]
    with pytest.raises(tz.TanzakuError, match=r"cannot read .*none.*expected the events.jsonl of a run"):
        read_events(tmp_path / "none" / "events.jsonl")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), "interrupted", None), (RuntimeError("no room\nat all"), "failed", "no room")],
)
def test_how_a_run_ends_is_told(error: BaseException, status: str, said: str | None) -> None:
    heard: list[Event] = []
    with pytest.raises(type(error)), Emitter(heard.append).run("compare", resumed=True):
        raise error
    assert [event.kind for event in heard] == ["run_started", "run_done"]
    assert dict(heard[-1].figures) == {"status": status, "error": said}


def test_lines_are_json_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with log_of(path) as log:
        Emitter(log).emit("stage", stage="measure", jobs=4, done=1)
    [line] = path.read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert found.pop("time") > 1e9
    assert found == {"kind": "stage", "job": None, "stage": "measure", "jobs": 4, "done": 1}
