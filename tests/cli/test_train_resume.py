"""`tanzaku train --resume`: cut off anywhere, a run ends with the adapter of one that nobody cut off."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Tanzaku, assert_refused, results_of
from safetensors.torch import load_file
from torch import Tensor

from close import RUN, assert_close
from tanzaku.cli.display import Display
from tanzaku.train.events import read_events
from tiers import costly

TENSORS = "adapter_model.safetensors"


class Kill(BaseException):
    """As good as a kill: nothing catches it on its way out, and nothing is written down."""


def told(out: Path) -> dict[str, Any]:
    """What a run found, without what depends on the clock."""
    (job,) = results_of(out)["jobs"]
    for each in (job, *job["epochs"]):
        each.pop("seconds")
    job.pop("peak_memory_bytes")
    return job


def adapter(out: Path) -> dict[str, Tensor]:
    (path,) = out.glob(f"adapters/*/{TENSORS}")
    return load_file(path)


def assert_same_adapter(found: Path, expected: Path) -> None:
    assert_close(adapter(found), adapter(expected), RUN)


def assert_same_run(found: Path, expected: Path) -> None:
    assert_close(told(found), told(expected), RUN, scale=1)
    assert_same_adapter(found, expected)


def stop(monkeypatch: pytest.MonkeyPatch, epoch: int, error: type[BaseException]) -> None:
    """Raise the error in the first step after an epoch."""
    seen = [0]
    epoch_done = Display.epoch_done

    def note(self: Display, job: str, figures: Any) -> None:
        seen[0] = figures["epoch"]
        epoch_done(self, job, figures)

    def step_done(self: Display, *_: Any) -> None:
        if seen[0] == epoch:
            raise error

    monkeypatch.setattr(Display, "epoch_done", note)
    monkeypatch.setattr(Display, "step_done", step_done)


@pytest.fixture
def whole(work: Path, tanzaku: Tanzaku) -> Path:
    """A run of 4 epochs that nobody cut off; its recipe makes the learning rate fall and dropout draw."""
    text = (work / "recipe.yaml").read_text(encoding="utf-8").replace("epochs: 2", "epochs: 4")
    (work / "recipe.yaml").write_text(text.replace("{r: 2}", "{r: 2, lora_dropout: 0.3}"), encoding="utf-8")
    assert tanzaku("train", "recipe.yaml", "--out", "whole").code == 0
    return work / "whole"


def test_ctrl_c_says_how_to_go_on(work: Path, whole: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop(patch, 1, KeyboardInterrupt)
        said = tanzaku("train", "recipe.yaml", "--out", "run")
    assert (said.code, said.err.count("\n")) == (130, 1)
    assert "interrupted after epoch 1; go on with tanzaku train --resume --out run" in said.err
    with monkeypatch.context() as patch:
        stop(patch, 3, KeyboardInterrupt)
        said = tanzaku("train", "--resume", "--out", "run")
    assert said.code == 130 and "after epoch 3" in said.err
    said = tanzaku("train", "recipe.yaml", "--resume", "--out", "run")
    assert (said.code, said.err) == (0, "")
    assert "steps, going on after epoch 3" in said.out
    assert_same_run(work / "run", whole)
    assert sorted(path.name for path in (work / "run").iterdir()) == ["adapters", "events.jsonl", "results.json"]
    events = read_events(work / "run" / "events.jsonl")
    assert [e.figures["epoch"] for e in events if e.kind == "epoch"] == [1, 2, 3, 4], "each once, over three sittings"
    assert [e.figures["epochs"] for e in events if e.kind == "job_started"] == [0, 1, 3]
    assert [e.figures["status"] for e in events if e.kind == "run_done"] == ["interrupted", "interrupted", "done"]
    assert_refused(tanzaku("train", "--resume", "--out", "run"), "the run in run is done", "run/adapters")
    assert_refused(tanzaku("train", "--resume", "--out", "nowhere"), "there is no nowhere", "leave --resume out")


def test_the_newest_run_goes_on(work: Path, whole: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop(patch, 2, KeyboardInterrupt)
        assert tanzaku("train", "recipe.yaml").code == 130
    said = tanzaku("train", "--resume")
    assert said.code == 0
    (out,) = (work / "runs").iterdir()
    assert_same_adapter(out, whole)
    assert_refused(tanzaku("train", "--resume"), "found no run of tanzaku train in runs", "--out")


def test_resuming_the_wrong_thing(work: Path, whole: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = pytest.MonkeyPatch()
    stop(stopped, 2, KeyboardInterrupt)
    assert tanzaku("train", "recipe.yaml", "--out", "run").code == 130
    stopped.undo()
    assert_refused(tanzaku("train", "--resume", "--out", "run", "--epochs", "9"), "leave --epochs out")
    assert_refused(tanzaku("train", "recipe.yaml", "--resume", "--out", "run", "--seed", "9"), "another train.seed")
    assert_refused(tanzaku("compare", "--resume", "--out", "run"), "a run of tanzaku train", "tanzaku train --resume")
    about = json.loads((work / "run" / "state" / "run.json").read_text(encoding="utf-8"))
    with monkeypatch.context() as patch:
        patch.setattr("tanzaku.compare.journal.VERSION", "9.9")
        assert_refused(tanzaku("train", "--resume", "--out", "run"), f"tanzaku {about['tanzaku']}", "this is 9.9")
    rows = (work / "train.tsv").read_text(encoding="utf-8")
    (work / "train.tsv").write_text(rows.replace("sea", "rain"), encoding="utf-8")
    assert_refused(tanzaku("train", "--resume", "--out", "run"), "the rows have changed")
    (work / "train.tsv").write_text(rows, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr("tanzaku.train.state.base_checksum", lambda _: "another")
        assert_refused(tanzaku("train", "--resume", "--out", "run"), "the base model has changed")
    state = work / "run" / "state" / "under_way" / "lora.safetensors"
    kept = state.read_bytes()
    state.write_bytes(kept[:50])
    assert_refused(tanzaku("train", "--resume", "--out", "run"), "is damaged", "remove it to train 'lora' anew")
    state.unlink()
    assert tanzaku("train", "--resume", "--out", "run").code == 0
    assert_same_adapter(work / "run", whole)


def test_cut_off_between_the_last_epoch_and_the_end(
    work: Path, whole: Path, tanzaku: Tanzaku, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained again: the test rows are predicted, and the adapter is written."""

    def never(*_: Any) -> None:
        raise AssertionError("a step was trained")

    for place in ("tanzaku.storage.store.save", "tanzaku.cli.record.write_results", "shutil.rmtree"):
        shutil.rmtree(work / "run", ignore_errors=True)
        with monkeypatch.context() as patch:
            calls = [0]

            def kill(*args: Any, place: str = place, calls: list[int] = calls, **_: Any) -> None:
                calls[0] += 1
                # Results are written at the beginning; the state goes at the end, other folders before.
                if place.endswith("save") or calls[0] == (2 if "write" in place else 3):
                    raise Kill

            patch.setattr(place, kill)
            with pytest.raises(Kill):
                tanzaku("train", "recipe.yaml", "--out", "run")
        with monkeypatch.context() as patch:
            patch.setattr(Display, "step_done", never)
            assert tanzaku("train", "--resume", "--out", "run").code == 0, place
        assert_same_run(work / "run", whole)


def cut_off(tanzaku: Tanzaku, *args: str) -> None:
    """A run in `run` that was cut off after its second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, 2, KeyboardInterrupt)
        assert tanzaku("train", "recipe.yaml", "--out", "run", *args).code == 130


def test_a_flipped_bit_in_the_state_is_noticed(work: Path, whole: Path, tanzaku: Tanzaku) -> None:
    cut_off(tanzaku)
    state = work / "run" / "state" / "under_way" / "lora.safetensors"
    kept = state.read_bytes()
    header = int.from_bytes(kept[:8], "little")
    figure = kept.index(b"train_loss") + 16
    for at in (8 + header + 5, len(kept) - 3, figure):
        digit = b"2" if kept[at : at + 1] == b"1" else b"1"
        other = digit if at == figure else bytes([kept[at] ^ 1])
        state.write_bytes(kept[:at] + other + kept[at + 1 :])
        assert_refused(tanzaku("train", "--resume", "--out", "run"), "is damaged", "remove it to train 'lora' anew")
    state.write_bytes(kept)
    assert tanzaku("train", "--resume", "--out", "run").code == 0
    assert_same_adapter(work / "run", whole)


DAMAGED: dict[str, Any] = {
    "not JSON": lambda about: "{",
    "a list": lambda about: "[]",
    "no command": lambda about: json.dumps({k: v for k, v in about.items() if k != "command"}),
    "no version": lambda about: json.dumps({k: v for k, v in about.items() if k != "tanzaku"}),
    "no rows": lambda about: json.dumps({k: v for k, v in about.items() if k != "rows"}),
    "a bad recipe": lambda about: json.dumps(
        {**about, "recipe": {**about["recipe"], "train": {**about["recipe"]["train"], "epochs": "x"}}}
    ),
    "half a recipe": lambda about: json.dumps({**about, "recipe": {"model": "m"}}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_records(work: Path, whole: Path, tanzaku: Tanzaku, name: str) -> None:
    cut_off(tanzaku)
    path = work / "run" / "state" / "run.json"
    path.write_text(DAMAGED[name](json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    said = tanzaku("train", "--resume", "--out", "run")
    assert_refused(said, "run/state/run.json is damaged", "begin anew with --overwrite")
    (work / "run" / "results.json").write_text("{", encoding="utf-8")
    assert tanzaku("train", "recipe.yaml", "--out", "run", "--overwrite").code == 0
    assert_same_adapter(work / "run", whole)


def test_resume_and_overwrite(work: Path, whole: Path, tanzaku: Tanzaku) -> None:
    cut_off(tanzaku)
    for verb in ("train", "compare"):
        said = tanzaku(verb, "--resume", "--out", "run" if verb == "train" else "other", "--overwrite")
        assert_refused(said, "--resume" if verb == "train" else "holds no run")
    assert_refused(tanzaku("train", "--resume", "--out", "run", "--overwrite"), "give one of the two")
    assert_refused(tanzaku("train", "recipe.yaml", "--out", "run"), "not empty", "go on with --resume")


def test_one_run_at_a_time(work: Path, whole: Path, tanzaku: Tanzaku) -> None:
    cut_off(tanzaku)
    code = "import sys; from pathlib import Path; from tanzaku.cli.record import locked\n"
    code += "import os, time\nwith locked(Path('run')):\n"
    # A worker that outlives its parent does not hold the lock.
    code += " os.fork() or (time.sleep(60), os._exit(0)); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        for args in (["recipe.yaml", "--overwrite"], ["--resume"], ["recipe.yaml"]):
            said = tanzaku("train", *args, "--out", "run")
            assert_refused(said, "run is in use by another run", "another --out")
        other.kill()  # the lock goes with it
    assert tanzaku("train", "--resume", "--out", "run").code == 0
    assert_same_adapter(work / "run", whole)


@pytest.mark.parametrize("verb", ["train", "compare"])
@pytest.mark.parametrize(
    "place",
    [
        "tanzaku.models.loading.load_tokenizer",
        "tanzaku.models.loading.load_classifier",
        "tanzaku.train.state.base_checksum",
        "tanzaku.compare.journal.Journal.begin",
        "tanzaku.train.scheduler.train_jobs",
        "tanzaku.compare.comparison.resamples",
        "tanzaku.train.step.SharedStep.__enter__",
    ],
)
@pytest.mark.parametrize("kill", [True, pytest.param(False, marks=pytest.mark.product)])
def test_the_same_command_works_again(work: Path, tanzaku: Tanzaku, verb: str, place: str, kill: bool) -> None:
    """Ctrl-C or a kill before anything was finished: the advice holds, and nothing is in the way."""

    def stopped(*_: Any, **__: Any) -> None:
        raise Kill if kill else KeyboardInterrupt

    command = [verb, "recipe.yaml", "--out", "run", "--epochs", "1"]
    command += ["--seeds", "1", "--workers", "1"] if verb == "compare" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, stopped)
        if kill:
            with contextlib.suppress(Kill):
                tanzaku(*command)
        else:
            said = tanzaku(*command)
            if said.code == 0:
                return  # this verb does not come by
            assert (said.code, said.err.count("\n")) == (130, 1)
            if "--resume" in said.err:
                command = [verb, "--resume", "--out", "run"]
            else:
                assert "run the same command again" in said.err
    if kill and (work / "run" / "adapters").exists():
        return
    assert tanzaku(*command).code == 0


def test_a_second_ctrl_c_says_how_to_go_on(work: Path, tanzaku: Tanzaku) -> None:
    command = ["compare", "recipe.yaml", "--method", "lora", "--method", "head", "--out", "run", "--workers", "1"]

    presses = []

    def stopped(*_: Any, **__: Any) -> None:
        presses.append(1)
        raise KeyboardInterrupt

    def pressed(results: Any, path: Path) -> None:
        if presses:  # while what was finished is written down
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tanzaku.compare.comparison.Comparison._test", stopped)
        patch.setattr("tanzaku.compare.report.write_report", pressed)
        said = tanzaku(*command)
    assert said.code == 130 and "go on with tanzaku compare --resume --out run" in said.err
    assert tanzaku("compare", "--resume", "--out", "run").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("delay", costly([0.02], [0.0, 0.004, 0.05]))
def test_kill_9(work: Path, whole: Path, tanzaku: Tanzaku, delay: float) -> None:
    """Killed a while after an epoch, twice over, it ends as if it had not been."""
    command = [sys.executable, "-m", "tanzaku", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    state = work / "run" / "state" / "under_way" / "lora.safetensors"
    for flags in (["recipe.yaml"], ["--resume"]):
        before = state.stat().st_mtime_ns if state.exists() else 0
        running = subprocess.Popen(
            [*command, *flags, "--out", "run"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while running.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.0005)
        time.sleep(delay)
        running.send_signal(signal.SIGKILL)
        if running.wait() == 0:
            break  # it was faster
    if (work / "run" / "state" / "run.json").exists():
        assert tanzaku("train", "--resume", "--out", "run").code == 0
    assert_same_run(work / "run", whole)
